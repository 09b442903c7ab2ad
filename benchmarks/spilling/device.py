"""Data that leaves a GPU's memory and comes back, beside copies from and to page-locked memory.

Theory of operation
-------------------
Ours is what a worker with a GPU has (:mod:`dask_gpurt.memory.manager`): a mover for DEVICE above a mover for HOST, which has
room for all. Its limit is set to nothing, and all arrays go down; it is lifted, and all are asked for. The peer, which is the roof too,
copies as many bytes between memory of the device and one block of page-locked memory of the host, by the driver, all copies of a
round at once.

Covers: :func:`down_and_up`.
Does not cover: jobs (:mod:`benchmarks.spilling.clusters`, with ``gpu``). It was run on the emulated driver of the tests, with
Numba's arrays, and not yet on a real GPU.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from benchmarks.frame import BrokenRunError, turns
from benchmarks.spilling.disk import Rates
from dask_gpurt.doctor.links import memory_of
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cuda import Copier, Device, Pinner
from dask_gpurt.memory.device import device_mover, pinned_pool
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger
from dask_gpurt.memory.lower import Copy
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.spiller import Spiller

__all__ = ["down_and_up"]

ARRAY_NBYTES = 64 * 2**20


class _KnowsNothing:
    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [IDLE] * len(names)


class _NothingBelow:
    def store(self, name: Hashable, value: object) -> Copy:  # noqa: ARG002
        raise AssertionError(f"HOST has no limit, and yet {name!r} is to leave it")


def _lost(name: Hashable, error: Exception) -> None:
    raise BrokenRunError(f"{name!r} was lost: {error}")


def _cupy_array(number: int, nbytes: int) -> Any:
    cupy: Any = importlib.import_module("cupy")
    array = cupy.full(nbytes // 8, float(number))
    cupy.cuda.Device().synchronize()
    return array


def _numba_array(number: int, nbytes: int) -> Any:
    cuda: Any = importlib.import_module("numba.cuda")
    array = cuda.to_device(np.full(nbytes // 8, float(number)))
    cuda.synchronize()
    return array


#: Library to what makes an array of so many bytes, which is full of a number.
LIBRARIES: dict[str, Callable[[int, int], Any]] = {"cupy": _cupy_array, "numba": _numba_array}


def down_and_up(
    total_nbytes: int, pairs: int, library: str = "cupy", array_nbytes: int = ARRAY_NBYTES
) -> tuple[Rates, Rates]:
    """Measure both ways in turns.

    Raises
    ------
    BrokenRunError
        If data did not go where it should, or is not what it was.
    """
    make = LIBRARIES[library]
    return asyncio.run(
        _measure(lambda number: make(number, array_nbytes), total_nbytes // array_nbytes, array_nbytes, pairs)
    )


async def _measure(make: Callable[[int], Any], count: int, array_nbytes: int, pairs: int) -> tuple[Rates, Rates]:
    loop = asyncio.get_running_loop()
    host = Mover(Spiller(Ledger(), _KnowsNothing()), _NothingBelow(), loop, _lost)
    gpu = Device.find()
    if gpu is None:
        raise BrokenRunError("there is no CUDA device")
    pool = pinned_pool(gpu, None)
    device = device_mover(host, _KnowsNothing(), loop, _lost, device=gpu, lease=pool.lease)
    names = list(range(count))
    downs, ups = Rates(), Rates()
    nbytes = array_nbytes * count
    with ExitStack() as stack:
        raw = _Raw(stack, gpu, array_nbytes, count)
        try:
            for number, is_ours in ((-1, True), *turns(pairs)):
                if not is_ours:
                    downs.add(False, nbytes / raw.down())
                    ups.add(False, nbytes / raw.up())
                    continue
                for name in names:
                    # A new value has no copy below.
                    device.put(name, make(name))
                started = time.perf_counter()
                device.set_limit(0)
                await device.settle()
                down_s = time.perf_counter() - started
                if len(device.absent) != count:
                    raise BrokenRunError(f"{count - len(device.absent)} of {count} arrays did not leave the device")
                device.set_limit(None)
                started = time.perf_counter()
                device.unpin(await device.ensure(names))
                up_s = time.perf_counter() - started
                _compare(gpu, [device.get(name) for name in names])
                if number >= 0:  # the first makes the memory
                    downs.add(True, nbytes / down_s)
                    ups.add(True, nbytes / up_s)
        finally:
            await device.close()
            await host.close()
            pool.trim()
    return downs, ups


def _compare(gpu: Device, values: Sequence[Any]) -> None:
    """Look at both ends of each array."""
    back = np.empty(2)
    first, last = (back[at : at + 1].view(np.uint8).data for at in range(2))
    for name, value in enumerate(values):
        address = value.__cuda_array_interface__["data"][0]
        with gpu.copying(()) as copier:
            copier.to_host(first, address)
            copier.to_host(last, address + value.nbytes - 8)
        if not (back == name).all():
            raise BrokenRunError("an array is not what it was")


class _Raw:
    """Copies between one place on the device and one block of page-locked memory."""

    def __init__(self, stack: ExitStack, gpu: Device, nbytes: int, count: int) -> None:
        self._gpu = gpu
        self._count = count
        pinner = Pinner(gpu, 2 * nbytes)
        self._host = BlockPool(0, pinner).lease(nbytes)
        if not pinner.nbytes:
            raise BrokenRunError("the system locks no memory")
        self._address = stack.enter_context(memory_of(gpu, nbytes))

    def _seconds(self, copy: Callable[[Copier], object]) -> float:
        started = time.perf_counter()
        with self._gpu.copying(()) as copier:
            for _ in range(self._count):
                copy(copier)
        return time.perf_counter() - started

    def down(self) -> float:
        """Copy to the host; return the seconds."""
        return self._seconds(lambda copier: copier.to_host(self._host, self._address))

    def up(self) -> float:
        """Copy to the device; return the seconds."""
        return self._seconds(lambda copier: copier.to_device(self._address, self._host))
