"""Which blocks to move away first (the policy called *gx*).

Theory of operation
-------------------
To move a block away costs bytes: writing it (unless a clean copy lies below already) and reading it again (unless it
is not needed any more). What is gained is room until its next use. So blocks go in order of

    distance to the next use / bytes that are moved per byte that is freed,

highest first. The cost table:

=========  =====  ======  ====================================
next use   clean  dirty   why
=========  =====  ======  ====================================
known      1      2       it is read again; dirty: written too
idle       0      1       it may never be read again
dying      0      0       it is dropped and never written
=========  =====  ======  ====================================

Where the copy lies, or would go, in a tier that is dearer than the first one below, the bytes count as many times more.

Idle blocks have no distance. They go before all that are known to be needed, free ones first, then the most recently
used: what cycles through data larger than the tier (k-means over a persisted array) finds part of it that way, where
the least recently used order finds nothing. Of equals the larger goes first: fewer operations.

Where the next use is known, every operation counts as much as :data:`OPERATION_NBYTES` more: it opens a file, and takes a
turn on the event loop. What is smaller than :data:`SMALL_NBYTES` goes after all else.

Blocks that share a buffer form one :class:`Candidate`: only when all of them go, anything is freed. What is moved is not the buffer but
the blocks, which may be less: slices that are left of a value that nobody needs any more. They come back one by one.

Covers: the order.
Does not cover: how many of them go, and what may go at all; see :mod:`dask_gpurt.memory.spiller`.

Pure: no I/O, no clock, no dask.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from dask_gpurt.memory.horizon import Kind, Use

__all__ = ["SMALL_NBYTES", "Candidate", "cost_per_byte", "order"]


#: A page: what a file takes at least.
SMALL_NBYTES = 4096

#: What an operation costs beside its bytes: 0.3 ms were measured, in which a disk of 1.5 GB/s moves so much.
OPERATION_NBYTES = 2**19


class Candidate(NamedTuple):
    """Blocks that share one buffer, and what is known about them."""

    names: tuple[Hashable, ...]
    #: Bytes that become free when all of them are gone.
    nbytes: int
    #: Bytes of those that have to be written.
    dirty_nbytes: int
    use: Use
    #: Higher: used more recently.
    recency: int
    #: How many times as dear its bytes are below as those of the first tier there.
    dearness: float = 1.0
    #: Bytes of those that will be read again; None: what becomes free.
    wanted_nbytes: int | None = None
    #: How many are written, and read again.
    writes: int = 1
    reads: int = 1
    #: Those that nobody will ever need, where others will be needed.
    dying: tuple[Hashable, ...] = ()


def cost_per_byte(candidate: Candidate) -> float:
    """Bytes moved per byte freed, by the table above, in bytes of the first tier below.

    Examples
    --------
    >>> cost_per_byte(Candidate(("x",), 8, 8, Use(Kind.NEXT, 3), 0))
    2.0
    >>> cost_per_byte(Candidate(("x",), 8, 0, Use(Kind.IDLE), 0))
    0.0
    >>> cost_per_byte(Candidate(("x",), 8, 0, Use(Kind.NEXT, 3), 0, dearness=10.0))
    10.0
    """
    if candidate.use.kind is Kind.DYING:
        return 0.0
    return _moved_nbytes(candidate) / max(1, candidate.nbytes) * candidate.dearness


def _moved_nbytes(candidate: Candidate) -> int:
    if candidate.use.kind is not Kind.NEXT:
        return candidate.dirty_nbytes
    wanted_nbytes = candidate.nbytes if candidate.wanted_nbytes is None else candidate.wanted_nbytes
    return candidate.dirty_nbytes + wanted_nbytes


def _key(candidate: Candidate) -> tuple[float, ...]:
    cost = cost_per_byte(candidate)
    kind = candidate.use.kind
    small = float(cost > 0 and candidate.nbytes < SMALL_NBYTES)
    if kind is Kind.NEXT:
        operations = candidate.reads + (candidate.writes if candidate.dirty_nbytes else 0)
        moved_nbytes = _moved_nbytes(candidate) + operations * OPERATION_NBYTES
        cost = moved_nbytes / max(1, candidate.nbytes) * candidate.dearness
        return (small, 2.0, -(candidate.use.distance + 1) / cost, -candidate.nbytes)
    if kind is Kind.IDLE:
        return (small, 1.0, cost, -candidate.recency, -candidate.nbytes)
    return (small, 0.0, -candidate.nbytes)


def order(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Sort: what is cheapest to miss comes first. What running tasks hold is left out.

    Examples
    --------
    >>> soon, late = Use(Kind.NEXT, 1), Use(Kind.NEXT, 9)
    >>> [c.names[0] for c in order([
    ...     Candidate(("soon",), 8, 0, soon, 1), Candidate(("late",), 8, 8, late, 2),
    ...     Candidate(("dying",), 8, 8, Use(Kind.DYING), 3), Candidate(("held",), 8, 8, Use(Kind.RUNNING), 4)])]
    ['dying', 'late', 'soon']
    """
    return sorted((c for c in candidates if c.use.kind is not Kind.RUNNING), key=_key)
