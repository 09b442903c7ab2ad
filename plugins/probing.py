"""Measures a few links as soon as workers are there, so that the first moves have a price that is near the truth.

Covers: :class:`Pairs`, which links are measured; :class:`Prober` on the scheduler; :class:`Probe` on a worker.
Does not cover: what is made of it (:mod:`dask_gpurt.plugins.prices`), and what is learned from the transfers that come later
(:mod:`dask_gpurt.plugins.serving`).

Theory of operation
-------------------
Until workers have reported what their transfers have shown, Dask assumes 100 MB/s everywhere; with NVLink that is a thousand times too
little, and a whole graph may be over before there is a report. So when a worker has reported that it is ready, it may be asked to send some
messages to another one, by Dask's own comms: a small one that opens the connection, some small ones for the latency, and up
to :data:`LARGE` of :data:`PROBE_NBYTES`, but no more after :data:`ENOUGH_S`. :data:`PAIRS_MAX` pairs on one host and as many on two are measured,
one after the other, which takes some ten milliseconds each, in the background. Nothing waits for it, and nothing is lost if it fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distributed.protocol.serialize import to_serialize

from dask_gpurt.handlers import weak
from dask_gpurt.topology import DASK, Place, Report, Topology

if TYPE_CHECKING:
    from distributed import Scheduler, Worker

__all__ = ["ENOUGH_S", "LARGE", "PAIRS_MAX", "PROBE_NBYTES", "SMALL", "Pairs", "Probe", "Prober"]

logger = logging.getLogger(__name__)

#: Pairs of workers on one host that are measured, and of workers on two: of three measurements, one may be disturbed.
PAIRS_MAX = 3
#: Bytes of a large message: as many as a block of a small array has.
PROBE_NBYTES = 4 * 2**20
#: Small messages, and large ones.
SMALL, LARGE = 3, 3
#: Seconds after which no more large messages are sent.
ENOUGH_S = 0.05
#: Bytes of a small message.
_SMALL_NBYTES = 64

_PROBE = "gpurt_probe"
_SINK = "gpurt_sink"


class Pairs:
    """Which links are measured.

    Parameters
    ----------
    host_of
        Address of a worker to its host.

    Examples
    --------
    >>> pairs = Pairs(lambda address: address[0])
    >>> [pairs.joined(address) for address in ("a1", "a2", "b1")]
    [[], [('a2', 'a1')], [('b1', 'a1')]]
    """

    def __init__(self, host_of: Callable[[str], str]) -> None:
        self._host_of = host_of
        #: Host to the first worker of it that was ready, as it is measured, and the pairs so far: on one host, and on two.
        self._first: dict[str, str] = {}
        self._near = self._far = 0

    def joined(self, address: str) -> list[tuple[str, str]]:
        """Take down a worker that is ready; returns the pairs to measure now, the sender first."""
        host = self._host_of(address)
        first = self._first.get(host)
        found: list[tuple[str, str]] = []
        if first is None:
            if self._first and self._far < PAIRS_MAX:
                self._far += 1
                found.append((address, next(iter(self._first.values()))))
            self._first[host] = address
        elif first != address and self._near < PAIRS_MAX:
            self._near += 1
            found.append((address, first))
        return found

    def left(self, address: str) -> None:
        """Forget a worker that has left."""
        # By then, where it was may be forgotten.
        for host, first in self._first.items():
            if first == address:
                del self._first[host]
                break


class Prober:
    """Ask workers of ``scheduler`` to measure links.

    Parameters
    ----------
    scheduler
        The scheduler.
    topology
        Takes down what they have measured.
    pairs
        Which links.
    """

    def __init__(self, scheduler: Scheduler, topology: Topology, pairs: Pairs) -> None:
        self._scheduler = scheduler
        self._topology = topology
        self._pairs = pairs
        self._ahead: deque[tuple[str, str]] = deque()
        self._running: asyncio.Task[None] | None = None

    def worker_ready(self, address: str) -> None:
        """Measure what is worth it now that a worker is ready."""
        self._ahead.extend(self._pairs.joined(address))
        if self._ahead and self._running is None:
            self._running = asyncio.create_task(self._run())

    def remove_worker(self, address: str) -> None:
        """Forget a worker that has left."""
        self._pairs.left(address)

    async def settled(self) -> None:
        """Wait until all has been measured that was to be."""
        if self._running is not None:
            await asyncio.wait([self._running])

    def stop(self) -> None:
        """Measure nothing more."""
        self._ahead.clear()
        if self._running is not None:
            self._running.cancel()

    async def _run(self) -> None:
        try:
            while self._ahead:
                source, target = self._ahead.popleft()
                try:
                    self._topology.learn(await getattr(self._scheduler.rpc(source), _PROBE)(peer=target))
                except OSError as error:
                    # One of the two has left.
                    logger.debug("the link from %s to %s was not measured: %s", source, target, error)
        finally:
            self._running = None


class Probe:
    """Measure links of ``worker`` when it is asked to.

    Parameters
    ----------
    worker
        The worker.
    topology
        Takes down what its links carry.
    """

    def __init__(self, worker: Worker, topology: Topology) -> None:
        self._worker = worker
        self._topology = topology

    def start(self) -> None:
        """Begin to answer."""
        self._worker.handlers[_PROBE] = weak(self.probe)
        self._worker.handlers[_SINK] = weak(self.sink)

    def stop(self) -> None:
        """Answer no more."""
        for name in (_PROBE, _SINK):
            self._worker.handlers.pop(name, None)

    async def probe(self, peer: str) -> list[Report]:
        """Send messages to ``peer``; returns what they have shown."""
        now = asyncio.get_running_loop().time
        link = self._topology.link(Place(self._worker.address), Place(peer), DASK)
        sink = getattr(self._worker.rpc(peer), _SINK)
        await sink(data=None)
        began = now()
        for number in range(SMALL + LARGE):
            if number > SMALL and now() - began > ENOUGH_S:
                break
            nbytes = _SMALL_NBYTES if number < SMALL else PROBE_NBYTES
            message = to_serialize(memoryview(bytearray(nbytes)))
            started = now()
            await sink(data=message)
            link.observe(nbytes, now() - started)
        return [report for report in self._topology.report() if report[2] == peer and report[4] == DASK]

    async def sink(self, data: Any) -> None:
        """Take a message."""
