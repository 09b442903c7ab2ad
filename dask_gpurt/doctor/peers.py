"""Measures what goes from one worker to another: by Dask's comms, by UCX, and by UCX from device to device.

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
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
from distributed.protocol.serialize import to_serialize

from dask_gpurt import seams
from dask_gpurt.doctor.facts import Measure, Missing
from dask_gpurt.doctor.links import memory_of
from dask_gpurt.handlers import weak
from dask_gpurt.memory.cuda import CudaError, Device
from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.transport.ucx import (
    MIN_FRAME_NBYTES,
    TransportError,
    TransportUnavailable,
    UCXTransport,
    host_buffer,
)
from dask_gpurt.shuffle.ways import on_loopback
from dask_gpurt.topology import LARGE_NBYTES, Link, Place

__all__ = ["Peer", "close_peer", "measure_to", "open_peer", "ring"]

logger = logging.getLogger(__name__)

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


class DeviceBlock:
    """Memory on a device, as UCX finds it; what lies there does not matter.

    Parameters
    ----------
    address, nbytes
        Where it is.
    """

    def __init__(self, address: int, nbytes: int) -> None:
        self._address = address
        self.nbytes = nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The description that array libraries have agreed on."""
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def part(self, nbytes: int) -> DeviceBlock:
        """Return its beginning."""
        assert nbytes <= self.nbytes
        return DeviceBlock(self._address, nbytes)


def _host_memory(nbytes: int) -> Any:
    return np.ones(nbytes, np.uint8)


class Peer:
    """Takes and sends what is measured, on one worker.

    Parameters
    ----------
    worker
        The worker.
    secret
        What all who take part know.
    """

    def __init__(self, worker: Any, secret: Secret) -> None:
        self._worker = worker
        self._secret = secret
        self._transport: UCXTransport | None = None
        #: Why UCX is not measured; None: it is.
        self.without_ucx: str | None = None
        #: Memory of this worker's device, where it has one, and what gives it back.
        self._block: DeviceBlock | None = None
        self._stack = ExitStack()
        self._handlers: dict[str, Callable[..., Any]] = {
            "gpurt_doctor_take": weak(self.take),
            "gpurt_doctor_receive": weak(self.receive),
            "gpurt_doctor_address": weak(self.address),
        }

    async def open(self) -> None:
        """Begin to answer peers; start UCX where there is one."""
        self._worker.handlers.update(self._handlers)
        if seams.worker_encrypts(self._worker):
            self.without_ucx = "Dask's comms are encrypted, and UCX is not: it is not used"
        elif importlib.util.find_spec("ucxx") is None:
            self.without_ucx = "ucxx is not installed"
        else:
            try:
                self._transport = await asyncio.to_thread(self._open_ucx, asyncio.get_running_loop())
            except TransportUnavailable as reason:
                self.without_ucx = str(reason)

    def _open_ucx(self, loop: asyncio.AbstractEventLoop) -> UCXTransport:
        device = Device.find()
        begin = partial(UCXTransport.open, loop, self._secret, loopback=on_loopback(self._worker.address))
        if device is None:
            return begin()
        try:
            self._block = DeviceBlock(self._stack.enter_context(memory_of(device, LARGE)), LARGE)
        except CudaError as error:
            logger.info("The way from device to device is not measured: %s", error)
        device.use()
        return begin(device.use)

    async def close(self) -> None:
        """Stop answering."""
        for name in self._handlers:
            self._worker.handlers.pop(name, None)
        if self._transport is not None:
            await self._transport.close()
        await asyncio.to_thread(self._stack.close)

    # Handlers for peers

    async def take(self, data: Any) -> int:
        """Take what came by Dask's comms; say how much it was."""
        return int(data.nbytes)

    async def receive(self, peer: bytes, tag: int, nbytes: int, on_device: bool) -> int:
        """Receive by UCX, and throw it away."""
        block = self._block
        if self._transport is None or nbytes > LARGE or (on_device and block is None):
            raise ValueError(f"{nbytes} bytes are not expected by UCX")
        allocate = block.part if on_device and block is not None else host_buffer
        await asyncio.wait_for(self._transport.receive(peer, tag, [nbytes], allocate), TRANSFER_LIMIT_S)
        return nbytes

    async def address(self) -> tuple[bytes | None, bool]:
        """Say where UCX finds this worker, None for nowhere, and whether it has memory of a device for it."""
        return (None if self._transport is None else self._transport.address), self._block is not None

    # Measuring

    async def measure(self, peer: str) -> list[Measure]:
        """Measure all paths to a peer."""
        rpc = self._worker.rpc(peer)
        ends = Place(self._worker.address), Place(peer)

        async def by_comm(data: Any) -> None:
            await rpc.gpurt_doctor_take(data=to_serialize(data))

        measures = [await self._path(*ends, "Dask's comms", by_comm, _host_memory)]
        transport = self._transport
        address, on_device = await rpc.gpurt_doctor_address()
        if transport is None or address is None:
            reason = "the peer has no UCX" if transport is not None else self.without_ucx or "UCX is not started"
            return [*measures, Measure(*ends, "UCX", Missing(reason))]
        measures.append(await self._path(*ends, "UCX", partial(self._send, transport, rpc, address), _host_memory))
        if on_device and self._block is not None:
            ends = Place(self._worker.address, "device 0"), Place(peer, "device 0")
            measures.append(
                await self._path(*ends, "UCX", partial(self._send, transport, rpc, address), self._block.part)
            )
        return measures

    @staticmethod
    async def _send(transport: UCXTransport, rpc: Any, address: bytes, data: Any) -> None:
        tag = transport.new_tag()
        sending = asyncio.ensure_future(transport.send(address, tag, [data]))
        try:
            on_device = isinstance(data, DeviceBlock)
            await rpc.gpurt_doctor_receive(peer=transport.address, tag=tag, nbytes=data.nbytes, on_device=on_device)
            await sending
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    @staticmethod
    async def _path(
        source: Place,
        target: Place,
        path: str,
        send: Callable[[Any], Awaitable[None]],
        allocate: Callable[[int], Any],
    ) -> Measure:
        link, moved_nbytes = Link(), 0
        began = time.perf_counter()
        try:
            # The first one of each size makes connections and memory.
            for nbytes, count in ((SMALL, 1 + SMALL_TRANSFERS), (LARGE, 1 + LARGE_TRANSFERS_MAX)):
                data = allocate(nbytes)
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


async def open_peer(secret: Secret, dask_worker: Any) -> None:
    """Let this worker take part; replaces what an interrupted measurement has left."""
    await close_peer(dask_worker)
    peer = dask_worker.extensions[_EXTENSION] = Peer(dask_worker, secret)
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
