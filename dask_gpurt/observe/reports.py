"""What a worker says of itself, with the heartbeats that Dask sends anyway.

Covers: :class:`WorkerReport` and :class:`RunReport`, how they travel, :class:`Run`, which adds up those of one run, and
:func:`columns` for Dask's own table of workers.
Does not cover: where the figures come from (:mod:`dask_gpurt.observe.worker`); what is made of them
(:mod:`dask_gpurt.observe.board`).

Everything is a level or an ever-increasing count, so that a lost heartbeat loses nothing, and nobody on a worker has to
know whether somebody looks. A report takes about 400 bytes, and 100 more for each run of a shuffle, of which the
:data:`RUNS_MAX` latest are told.

Pure: no I/O, no clock, no Dask but its way to write sizes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dask.utils import format_bytes

__all__ = [
    "LOCAL",
    "PATHS",
    "RUNS_MAX",
    "Run",
    "RunReport",
    "TierReport",
    "WorkerReport",
    "columns",
    "natural",
    "total",
]

#: Runs that one report tells of.
RUNS_MAX = 8

#: Ways from a worker to another one, in the order in which they are shown: what it is called in reports, and for people.
PATHS: Mapping[str, str] = {"ucx": "shuffle, UCX", "comm": "shuffle, comms", "inputs": "inputs"}
#: What is reported beside them: shards that stay.
LOCAL = "local"


@dataclass(frozen=True)
class TierReport:
    """One tier of one worker."""

    held_nbytes: int
    reserved_nbytes: int
    #: None: as much as there is.
    limit_nbytes: int | None

    @property
    def used_nbytes(self) -> int:
        """What counts against the limit."""
        return self.held_nbytes + self.reserved_nbytes

    def __str__(self) -> str:
        limit = "" if self.limit_nbytes is None else f" of {format_bytes(self.limit_nbytes)}"
        return f"{format_bytes(self.used_nbytes)}{limit}"


@dataclass(frozen=True)
class RunReport:
    """One run of a shuffle on one worker."""

    shuffle_id: str
    run_id: int
    #: ``transfer`` or ``unpack``.
    phase: str
    stuck: bool
    #: Inputs that were split here; outputs that were handed out, of how many.
    inputs: int
    outputs: int
    own_outputs: int
    #: Bytes that peers have taken, that wait for them, and that came from them.
    sent_nbytes: int
    outbox_nbytes: int
    received_nbytes: int
    #: Messages that peers have not answered yet, for want of room perhaps, and for how long the first of them waits.
    unanswered: int
    unanswered_s: float
    #: Requests of peers for room here that wait.
    credits_wanted: int

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> RunReport:
        """Take from the state of a run what is worth telling; see :meth:`dask_gpurt.shuffle.run.Run.state`."""
        waits = state["unanswered"]
        return cls(
            shuffle_id=str(state["id"]),
            run_id=int(state["run_id"]),
            phase=str(state["phase"]),
            stuck=bool(state["stuck"]),
            inputs=int(state["inputs"]),
            outputs=int(state["outputs"]),
            own_outputs=int(state["own_outputs"]),
            sent_nbytes=int(state["sent_nbytes"]),
            outbox_nbytes=int(state["outbox_nbytes"]),
            received_nbytes=int(state["received_nbytes"]),
            unanswered=len(waits),
            unanswered_s=round(max((wait["since_s"] for wait in waits), default=0.0), 3),
            credits_wanted=int(state["credits_wanted"]),
        )


@dataclass
class Run:
    """One run of a shuffle, over all workers."""

    shuffle_id: str
    run_id: int
    #: Phase to workers in it.
    phases: Counter[str] = field(default_factory=Counter)
    #: Names of the workers that have reported it as stuck.
    stuck: list[str] = field(default_factory=list)
    inputs: int = 0
    outputs: int = 0
    own_outputs: int = 0
    sent_nbytes: int = 0
    outbox_nbytes: int = 0
    received_nbytes: int = 0
    unanswered: int = 0
    unanswered_s: float = 0.0
    credits_wanted: int = 0

    def add(self, worker: str, part: RunReport) -> None:
        """Count in what a worker says."""
        self.phases[part.phase] += 1
        if part.stuck:
            self.stuck.append(worker)
        self.inputs += part.inputs
        self.outputs += part.outputs
        self.own_outputs += part.own_outputs
        self.sent_nbytes += part.sent_nbytes
        self.outbox_nbytes += part.outbox_nbytes
        self.received_nbytes += part.received_nbytes
        self.unanswered += part.unanswered
        self.unanswered_s = max(self.unanswered_s, part.unanswered_s)
        self.credits_wanted += part.credits_wanted


@dataclass(frozen=True)
class WorkerReport:
    """What a worker says of itself."""

    #: Name of a tier to what is there, from the top down; tiers that the worker does not have are left out.
    tiers: Mapping[str, TierReport] = field(default_factory=dict)
    #: (where bytes came from, where they went) to how many have: names of tiers.
    moves: Mapping[tuple[str, str], int] = field(default_factory=dict)
    #: One of :data:`PATHS`, or ``local`` for shards that stay, to the bytes that have gone it.
    sent: Mapping[str, int] = field(default_factory=dict)
    #: Bytes of shards that came from peers.
    received_nbytes: int = 0
    #: Seconds that messages have waited for room at peers.
    credit_wait_s: float = 0.0
    #: Runs of shuffles that ever began here.
    shuffles: int = 0
    runs: Sequence[RunReport] = ()

    def to_message(self) -> dict[str, Any]:
        """Turn into what a heartbeat carries."""
        return {
            "tiers": {tier: [t.held_nbytes, t.reserved_nbytes, t.limit_nbytes] for tier, t in self.tiers.items()},
            "moves": [[source, target, nbytes] for (source, target), nbytes in self.moves.items()],
            "sent": dict(self.sent),
            "received": self.received_nbytes,
            "credit_wait_s": self.credit_wait_s,
            "shuffles": self.shuffles,
            "runs": [list(vars(run).values()) for run in self.runs[-RUNS_MAX:]],
        }

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> WorkerReport:
        """Read what :meth:`to_message` has made.

        Examples
        --------
        >>> report = WorkerReport(tiers={"host": TierReport(1, 2, None)}, moves={("host", "disk"): 3})
        >>> WorkerReport.from_message(report.to_message()) == report
        True
        """
        return cls(
            tiers={tier: TierReport(*figures) for tier, figures in message["tiers"].items()},
            moves={(source, target): nbytes for source, target, nbytes in message["moves"]},
            sent=message["sent"],
            received_nbytes=message["received"],
            credit_wait_s=message["credit_wait_s"],
            shuffles=message["shuffles"],
            runs=tuple(RunReport(*figures) for figures in message["runs"]),
        )


def total(tiers: Sequence[TierReport]) -> TierReport:
    """Add up the same tier of several workers; without a limit if one of them has none.

    Examples
    --------
    >>> total([TierReport(1, 2, 10), TierReport(3, 0, 10)])
    TierReport(held_nbytes=4, reserved_nbytes=2, limit_nbytes=20)
    >>> total([TierReport(1, 2, 10), TierReport(3, 0, None)]).limit_nbytes
    """
    limits = [tier.limit_nbytes for tier in tiers if tier.limit_nbytes is not None]
    return TierReport(
        sum(tier.held_nbytes for tier in tiers),
        sum(tier.reserved_nbytes for tier in tiers),
        sum(limits) if len(limits) == len(tiers) else None,
    )


def columns(tiers: Iterable[str]) -> dict[str, str]:
    """Name the columns that Dask's table of workers has for each of ``tiers``: tier to column."""
    return {tier: f"gpurt {tier}" for tier in tiers}


def natural(name: str) -> list[tuple[int, int, str]]:
    """Give what sorts ``w10`` after ``w9``."""
    return [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]
