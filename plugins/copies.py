"""Which copies a worker that is short of memory has no more use for.

Covers: :func:`droppable`. Pure: no I/O, no clock, no Dask.
Does not cover: dropping; see :mod:`dask_gpurt.plugins.placement`. Copies of workers that are not short of memory: Dask's active memory
manager goes through them from time to time, and keeps one for each task that is to come.

Theory of operation
-------------------
Whoever fetches an input keeps it, until it is released everywhere. What a client wants, a factor of a product or a block of a
factorization, is not released, and its copies stay with all who ever took it. So whenever a task is done, its inputs are looked at: a
copy goes if its holder is short of memory, and no task that is to come takes it there; the last one stays, that of the
holder with the most room. Tasks that have no place yet may come to any holder, and keep all copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol, TypeVar

__all__ = ["FULL", "WAITERS_MAX", "droppable", "is_full"]

#: Part of a worker's memory in use from which on it is short of it. Dask begins to write to disk a little above that.
FULL = 0.5
#: Tasks to come that are looked at; where there are more, copies stay.
WAITERS_MAX = 64


class Holder(Protocol):
    """A worker that holds data."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    @property
    def memory_limit(self) -> int:
        """Bytes that it may hold; 0: no limit."""


class Held(Protocol):
    """An input in memory."""

    @property
    def who_has(self) -> Collection[Any] | None:
        """Workers that hold it."""

    @property
    def waiters(self) -> Collection[Any] | None:
        """Tasks that take it and have not ended."""


W = TypeVar("W", bound=Holder)


def is_full(worker: Holder, incoming_nbytes: int = 0) -> bool:
    """Whether a worker is short of memory, with so many bytes that are on their way to it."""
    return bool(worker.memory_limit) and worker.nbytes + incoming_nbytes > FULL * worker.memory_limit


def droppable(dep: Held, place_of: Callable[[Any], Any | None]) -> list[Any]:
    """List the workers that may forget their copy of ``dep``.

    Parameters
    ----------
    dep
        An input with several copies.
    place_of
        Where a task that is to come will run; None if nobody knows.
    """
    waiters = dep.waiters or ()
    if len(waiters) > WAITERS_MAX:
        return []
    places = {place_of(waiter) for waiter in waiters}
    holders = dep.who_has or ()
    if None in places or any(waiter.processing_on not in holders for waiter in waiters if waiter.processing_on):
        return []
    holders = sorted(holders, key=lambda worker: worker.nbytes, reverse=True)
    found = [worker for worker in holders if is_full(worker) and worker not in places]
    return found[: len(holders) - 1]
