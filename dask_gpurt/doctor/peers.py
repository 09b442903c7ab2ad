"""Measures what goes from one worker to another: by Dask's comms, and by UCX.

Theory of operation
    For as long as it is measured each worker has a :class:`Peer`, with handlers that take bytes, as the shuffle's do, and throw them
    away. Transfers go one after another, small ones, which tell the latency, and large ones, which tell the bandwidth; what
    they took is put together by :class:`~dask_gpurt.topology.Link`, as in a shuffle. Each path has :data:`PATH_S` seconds, and each
    transfer :data:`TRANSFER_LIMIT_S`: a way that a firewall closes must not hold anybody up.

Covers: :class:`Peer`, :func:`open_peer`, :func:`measure_to`, :func:`close_peer`, which run on workers; :func:`ring`.
Does not cover: who is measured when (:mod:`dask_gpurt.doctor.cluster`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import numpy as np
from distributed.protocol.serialize import to_serialize

from dask_gpurt import seams
from dask_gpurt.doctor.facts import Measure, Missing
from dask_gpurt.shuffle.transport.ucx import MIN_FRAME_NBYTES, TransportError, TransportUnavailable, UCXTransport
from dask_gpurt.topology import LARGE_NBYTES, Link, Place

__all__ = ["Peer", "close_peer", "measure_to", "open_peer", "ring"]

#: A message of a shuffle is as large.
LARGE = 2**23
#: Smaller ones UCX is not asked to carry.
SMALL = max(MIN_FRAME_NBYTES, 2**14)
SMALL_TRANSFERS = 5
LARGE_TRANSFERS_MAX = 32
PATH_S = 0.3
TRANSFER_LIMIT_S = 5.0

_EXTENSION = "gpurt-doctor"

assert SMALL < LARGE_NBYTES <= LARGE


def ring(hosts: Mapping[str, str], limit: int) -> list[tuple[str, str]]:
    """Choose which worker sends to which: each to its neighbour, at most ``limit`` pairs, between hosts first.

    Parameters
    ----------
    hosts
        Worker to its host.
    limit
        Pairs at most.

    Examples
    --------
    >>> ring({"a": "one", "b": "one", "c": "two"}, 2)
    [('b', 'c'), ('c', 'a')]
    >>> ring({"a": "one"}, 2)
    []
    """
    workers = sorted(hosts, key=lambda worker: (hosts[worker], worker))
    if len(workers) < 2:
        return []
    pairs = list(zip(workers, [*workers[1:], workers[0]], strict=True))
    # A sort keeps the order of what is alike.
    return sorted(pairs, key=lambda pair: hosts[pair[0]] == hosts[pair[1]])[:limit]


class Peer:
    """Takes and sends what is measured, on one worker.

    Parameters
    ----------
    worker
        The worker.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._transport: UCXTransport | None = None
        #: Why UCX is not measured; None: it is.
        self.without_ucx: str | None = None
        self._handlers: dict[str, Callable[..., Any]] = {
            "gpurt_doctor_take": self.take,
            "gpurt_doctor_receive": self.receive,
            "gpurt_doctor_address": self.address,
        }

    async def open(self) -> None:
        """Begin to answer peers; start UCX where there is one."""
        self._worker.handlers.update(self._handlers)
        if seams.worker_encrypts(self._worker):
            self.without_ucx = "Dask's comms are encrypted, and UCX is not: it is not used"
        elif importlib.util.find_spec("ucxx") is None:
            self.without_ucx = "ucxx is not installed"
        else:
            loop = asyncio.get_running_loop()
            try:
                self._transport = await loop.run_in_executor(None, UCXTransport.open, loop)
            except TransportUnavailable as reason:
                self.without_ucx = str(reason)

    async def close(self) -> None:
        """Stop answering."""
        for name in self._handlers:
            self._worker.handlers.pop(name, None)
        if self._transport is not None:
            await self._transport.close()

    # Handlers for peers

    async def take(self, data: Any) -> int:
        """Take what came by Dask's comms; say how much it was."""
        return int(data.nbytes)

    async def receive(self, peer: bytes, tag: int, nbytes: int) -> int:
        """Receive by UCX, and throw it away."""
        if self._transport is None or nbytes > LARGE:
            raise ValueError(f"{nbytes} bytes are not expected by UCX")
        await asyncio.wait_for(self._transport.receive(peer, tag, [nbytes]), TRANSFER_LIMIT_S)
        return nbytes

    async def address(self) -> bytes | None:
        """Say where UCX finds this worker; None: nowhere."""
        return None if self._transport is None else self._transport.address

    # Measuring

    async def measure(self, peer: str) -> list[Measure]:
        """Measure both paths to a peer."""
        rpc = self._worker.rpc(peer)

        async def by_comm(data: Any) -> None:
            await rpc.gpurt_doctor_take(data=to_serialize(data))

        return [
            await self._path(peer, "Dask's comms", by_comm),
            await self._path(peer, "UCX", await self._by_ucx(rpc)),
        ]

    async def _by_ucx(self, rpc: Any) -> Callable[[Any], Awaitable[None]] | Missing:
        transport = self._transport
        if transport is None:
            return Missing(self.without_ucx or "UCX is not started")
        address: bytes | None = await rpc.gpurt_doctor_address()
        if address is None:
            return Missing("the peer has no UCX")

        async def send(data: Any) -> None:
            tag = transport.new_tag()
            await asyncio.gather(
                transport.send(address, tag, [data]),
                rpc.gpurt_doctor_receive(peer=transport.address, tag=tag, nbytes=data.nbytes),
            )

        return send

    async def _path(self, peer: str, path: str, send: Callable[[Any], Awaitable[None]] | Missing) -> Measure:
        source, target = Place(self._worker.address), Place(peer)
        if isinstance(send, Missing):
            return Measure(source, target, path, send)
        link, moved_nbytes = Link(), 0
        began = time.perf_counter()
        try:
            # The first one of each size makes connections and memory.
            for nbytes, count in ((SMALL, 1 + SMALL_TRANSFERS), (LARGE, 1 + LARGE_TRANSFERS_MAX)):
                data = np.ones(nbytes, np.uint8)
                for number in range(count):
                    started = time.perf_counter()
                    await asyncio.wait_for(send(data), TRANSFER_LIMIT_S)
                    ended = time.perf_counter()
                    moved_nbytes += nbytes
                    if number:
                        link.observe(nbytes, ended - started)
                    if number > 1 and ended - began > PATH_S:
                        break
        except TimeoutError:
            reason = f"{nbytes} bytes did not arrive within {TRANSFER_LIMIT_S:g} s"
            return Measure(source, target, path, Missing(reason, "TimeoutError"))
        except (OSError, TransportError) as error:
            return Measure(source, target, path, Missing(str(error), type(error).__name__))
        return Measure(source, target, path, link.rate, moved_nbytes)


async def open_peer(dask_worker: Any) -> None:
    """Let this worker take part; replaces what an interrupted measurement has left."""
    await close_peer(dask_worker)
    peer = dask_worker.extensions[_EXTENSION] = Peer(dask_worker)
    await peer.open()


async def measure_to(peer: str, dask_worker: Any) -> list[Measure]:
    """Measure from this worker to another."""
    measures: list[Measure] = await dask_worker.extensions[_EXTENSION].measure(peer)
    return measures


async def close_peer(dask_worker: Any) -> None:
    """Let this worker take part no more."""
    peer = dask_worker.extensions.pop(_EXTENSION, None)
    if peer is not None:
        await peer.close()
