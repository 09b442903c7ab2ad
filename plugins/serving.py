"""Sends large results of a worker to one peer at a time, and learns from that what its links carry.

Covers: :class:`Serving`, which stands before the entry of a worker that peers ask for data.
Does not cover: who is served when (:mod:`dask_gpurt.plugins.turns`); what is sent, and from which tier (:mod:`dask_gpurt.memory.manager`).

Clients, and the scheduler on their behalf, take no turns: they do not pass on what they get.

A request holds its connection while it waits; there are no more of those than peers, and of one key no more than
:data:`~dask_gpurt.plugins.turns.WAITING_MAX`. A peer that takes very long to receive (its event loop stands still while a task runs) holds up
nobody for long: who waits while no copy ends for :data:`PATIENCE` times what a copy should take, is served beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING, Any

from distributed.core import Status

from dask_gpurt import seams
from dask_gpurt.handlers import strong, weak
from dask_gpurt.plugins.turns import AWAY_DELAY_S, LARGE_NBYTES, Turns
from dask_gpurt.topology import DASK, Place, Topology

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["PATIENCE", "PATIENCE_S", "Serving"]

#: How many times what a copy should take it may take until others are served beside it, and seconds on top.
PATIENCE = 4
PATIENCE_S = 1.0

_BUSY = {"status": "busy"}


class Serving:
    """Serve the peers of ``worker`` from :meth:`start` to :meth:`stop`.

    Parameters
    ----------
    worker
        The worker.
    topology
        Takes down what each link carries.
    """

    def __init__(self, worker: Worker, topology: Topology) -> None:
        self._worker = worker
        self._topology = topology
        self._before: Any = None
        self._stock: Any = None
        #: What is set to True for a request that is served next, and to False for one that is sent away.
        self._turns: Turns[asyncio.Future[bool]] = Turns()
        #: When a copy of a key that is being sent has ended last.
        self._ended_s: dict[Hashable, float] = {}
        #: Requests that have waited, that were sent away, and that were served beside others.
        self.waited = 0
        self.sent_away = 0
        self.impatient = 0

    def start(self) -> None:
        """Begin."""
        self._before = seams.worker_get_data(self._worker)
        # Those that wait for their turns when all is taken away are served by it.
        self._stock = strong(self._before)
        seams.set_worker_get_data(self._worker, weak(self._get_data))

    def stop(self) -> None:
        """End. Those that wait have their turns none the less."""
        seams.set_worker_get_data(self._worker, self._before)

    async def _get_data(
        self, comm: Any, keys: Collection[Hashable], who: str | None = None, serializers: list[str] | None = None
    ) -> Any:
        sizes = {key: seams.worker_result_nbytes(self._worker, key) or 0 for key in keys}
        largest = max(sizes, key=sizes.__getitem__, default=None)
        if who is None or largest is None or sizes[largest] < LARGE_NBYTES:
            return await self._stock(comm, keys, who=who, serializers=serializers)
        # A peer asks one request at a time, so that nothing goes beside it on the link.
        link = self._topology.link(Place(self._worker.address), Place(who), DASK)
        nbytes = sum(sizes.values())
        admitted = await self._admitted(largest, PATIENCE_S + PATIENCE * link.price(nbytes))
        if admitted is False:
            self.sent_away += 1
            return _BUSY
        elapsed_s: float | None = None
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            answer = await self._stock(comm, keys, who=who, serializers=serializers)
            if answer is Status.dont_reply:
                elapsed_s = loop.time() - started
                link.observe(nbytes, elapsed_s)
            return answer
        finally:
            if admitted:
                self._leave(largest, elapsed_s)

    async def _admitted(self, key: Hashable, patience_s: float) -> bool | None:
        """Wait for a turn; False: sent away, None: served without one."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[bool] = loop.create_future()
        entered = self._turns.enter(key, turn)
        if entered:
            self._ended_s[key] = loop.time()
        if entered is not False:
            return bool(entered)
        self.waited += 1

        def due_s() -> float:
            # Who is sent away in a moment may be the last one that knows of the key.
            return self._ended_s.get(key, loop.time()) + patience_s

        while not turn.done():
            try:
                await asyncio.wait([turn], timeout=due_s() - loop.time())
            except asyncio.CancelledError:
                if turn.done() and turn.result():
                    self._leave(key, None)
                turn.cancel()
                raise
            if not turn.done() and loop.time() >= due_s():
                # Its place in the row is passed over.
                turn.cancel()
                self.impatient += 1
                return None
        return turn.result()

    def _leave(self, key: Hashable, elapsed_s: float | None) -> None:
        following, away = self._turns.leave(key, elapsed_s)
        # Requests that were given up while they waited are passed over.
        while following is not None and following.done():
            following, _ = self._turns.leave(key, None)
        loop = asyncio.get_running_loop()
        if following is None:
            del self._ended_s[key]
        else:
            self._ended_s[key] = loop.time()
            following.set_result(True)
        if away:
            loop.call_later(AWAY_DELAY_S, _send_away, away)


def _send_away(turns: Collection[asyncio.Future[bool]]) -> None:
    for turn in turns:
        if not turn.done():
            turn.set_result(False)
