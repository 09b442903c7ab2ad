"""What one run of a shuffle did on one worker, for people: when, by which paths, and what it waited for.

Covers: :class:`Account`, which a run keeps and which outlives it.
Does not cover: what a run does at the moment (:meth:`dask_gpurt.shuffle.run.Run.state`); how accounts come to people
(:mod:`dask_gpurt.observe.journal`).

Pure: no I/O, no clock, no Dask.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Account"]


@dataclass
class Account:
    """What one run did on one worker; times are those of the worker's wall clock."""

    begun_s: float
    #: Path to the bytes that went it; ``local``: they stayed.
    sent: Counter[str] = field(default_factory=Counter)
    #: Seconds that messages waited for room at peers.
    credit_wait_s: float = 0.0
    #: When peers had all that was sent to them; None: they have not yet.
    transferred_s: float | None = None
    ended_s: float | None = None
    #: Bytes that went to DISK while they waited to be unpacked.
    written_nbytes: int = 0
