"""Two workers send each other arrays on a device by UCX, and compare what has come; for the emulated driver and for a real GPU."""

from __future__ import annotations

import asyncio
import importlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
from distributed import Client

__all__ = ["exchange_between_two"]

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SIZES = [2**20, 3 * 2**20 + 1]


class Numba:
    """Arrays of numba-cuda."""

    def __init__(self) -> None:
        self._cuda: Any = importlib.import_module("numba.cuda")
        self.to_device = self._cuda.to_device
        self.synchronize = self._cuda.synchronize
        self.make_current = self._cuda.current_context

    def empty(self, nbytes: int) -> Any:
        return self._cuda.device_array(nbytes, "u1")

    def to_host(self, array: Any) -> Any:
        return array.copy_to_host()


class Cupy:
    """Arrays of CuPy."""

    def __init__(self) -> None:
        self._cupy: Any = importlib.import_module("cupy")
        self.to_device = self._cupy.asarray
        self.to_host = self._cupy.asnumpy

    def make_current(self) -> None:
        self._cupy.cuda.Device().use()

    def synchronize(self) -> None:
        self._cupy.cuda.Device().synchronize()

    def empty(self, nbytes: int) -> Any:
        return self._cupy.empty(nbytes, "u1")


LIBRARIES: dict[str, Callable[[], Any]] = {"numba": Numba, "cupy": Cupy}


async def open_transport(library: str, wanted: str, dask_worker: Any) -> tuple[bytes, int]:
    from dask_gpurt.secret import Secret
    from dask_gpurt.shuffle.transport.ucx import UCXTransport

    arrays = LIBRARIES[library]()
    # The device's context, here and in the transport's thread.
    arrays.make_current()
    dask_worker.transport = UCXTransport.open(asyncio.get_running_loop(), Secret(bytes(32)), arrays.make_current)
    assert wanted in dask_worker.transport.describe()["found"], dask_worker.transport.describe()
    return dask_worker.transport.address, dask_worker.transport.new_tag()


async def exchange(library: str, peers: dict[str, tuple[bytes, int]], dask_worker: Any) -> list[list[int]]:
    """Send device arrays to the other worker, and receive its; returns what was sent and what has come."""
    arrays = LIBRARIES[library]()
    me = dask_worker.address
    (peer, its_tag), (_, my_tag) = next(p for a, p in peers.items() if a != me), peers[me]
    rng = np.random.default_rng(zlib.crc32(me.encode()))
    sent = [rng.integers(0, 256, nbytes, "u1") for nbytes in SIZES]
    frames = [arrays.to_device(array) for array in sent]
    arrays.synchronize()
    _, got = await asyncio.gather(
        dask_worker.transport.send(peer, my_tag, frames),
        dask_worker.transport.receive(peer, its_tag, SIZES, arrays.empty),
    )
    arrays.synchronize()
    return [[zlib.crc32(array.data) for array in sent], [zlib.crc32(arrays.to_host(array).data) for array in got]]


async def close_transport(dask_worker: Any) -> None:
    await dask_worker.transport.close()


def exchange_between_two(client: Client, library: str, wanted: str) -> None:
    """Exchange arrays of ``library`` between the two workers of ``client``, on which UCX has to find the transport ``wanted``."""
    peers = client.run(open_transport, library, wanted)
    (one, one_got), (other, other_got) = client.run(exchange, library, peers).values()
    assert one_got == other
    assert other_got == one
    assert one != other
    # Only now that both have everything.
    client.run(close_transport)
