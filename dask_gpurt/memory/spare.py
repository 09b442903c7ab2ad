"""Offers copies back that only peers need, which have theirs by now.

Theory of operation
-------------------
A value that a peer has fetched lies on two workers. Where all tasks that still need it were given to workers that hold it, this worker has no
use for its own copy, though the value lives on until these tasks have run, which may be long: a peer fetches for all that it has been
given. To write such a copy would be in vain, and to drop it by itself is not for a worker to decide: the peer's task may have been
stolen while the value was on its way, and then this copy is the only one.

So a worker that is short of memory *offers* such keys to the scheduler. That takes back what others hold, and will be needed where it
is held (:meth:`dask_gpurt.plugins.horizon.HorizonScheduler.spare`), by the same means as Dask's active memory manager does. What no peer has
reported yet is offered again, a few times.

Covers: when, and how often.
Does not cover: which keys; see :class:`~dask_gpurt.memory.manager.WorkerHorizon`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Hashable

__all__ = ["OFFERS_MAX", "OFFER_S", "Offers"]

#: How long keys are collected, in which the peer reports what it got.
OFFER_S = 0.01
#: How often a key is offered.
OFFERS_MAX = 4


class Offers:
    """Offers keys.

    Parameters
    ----------
    spare
        Gives the keys that only peers need.
    offer
        Offers keys to the scheduler, and returns those that are to be offered again.
    """

    def __init__(
        self,
        spare: Callable[[], list[Hashable]],
        offer: Callable[[list[Hashable]], Awaitable[Collection[Hashable]]],
    ) -> None:
        self._spare = spare
        self._offer = offer
        #: How often each was offered, of those that are still here.
        self._offered: dict[Hashable, int] = {}
        self._task: asyncio.Task[None] | None = None
        #: Keys that were offered.
        self.count = 0

    def soon(self) -> None:
        """Offer what there is in a moment."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="gpurt-offer")

    def close(self) -> None:
        """Offer nothing any more."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        try:
            while True:
                await asyncio.sleep(OFFER_S)
                spare = self._spare()
                self._offered = {key: self._offered.get(key, 0) for key in spare}
                keys = [key for key, times in self._offered.items() if times < OFFERS_MAX]
                if not keys:
                    return
                self.count += len(keys)
                again = set(await self._offer(keys))
                for key in keys:
                    self._offered[key] = self._offered[key] + 1 if key in again else OFFERS_MAX
                if not again:
                    return
        finally:
            self._task = None
