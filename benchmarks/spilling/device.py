"""Data that leaves a GPU's memory and comes back, beside copies from and to pinned memory.

Theory of operation
-------------------
Ours is what a worker with a GPU has (:mod:`dask_gpurt.memory.manager`): a mover for DEVICE above a mover for HOST, which has
room for all. Its limit is set to nothing, and all arrays go down; it is lifted, and all are asked for. The peer copies as
many bytes between memory of the device and one block of pinned memory of the host.

Covers: :func:`down_and_up`.
Does not cover: jobs (:mod:`benchmarks.spilling.clusters`, with ``gpu``). Nothing here was run yet on a real GPU.
"""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Hashable, Sequence
from typing import Any

from benchmarks.frame import BrokenRunError, turns
from benchmarks.spilling.disk import Rates
from dask_gpurt.memory.cuda import Device
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


def down_and_up(total_nbytes: int, pairs: int) -> tuple[Rates, Rates]:
    """Measure both ways in turns."""
    return asyncio.run(_measure(total_nbytes // ARRAY_NBYTES, pairs))


async def _measure(count: int, pairs: int) -> tuple[Rates, Rates]:
    cupy = importlib.import_module("cupy")
    loop = asyncio.get_running_loop()
    ledger = Ledger()
    host = Mover(Spiller(ledger, _KnowsNothing()), _NothingBelow(), loop, _lost)
    gpu = Device.find()
    if gpu is None:
        raise BrokenRunError("there is no CUDA device")
    pool = pinned_pool(gpu, None)
    device = device_mover(host, _KnowsNothing(), loop, _lost, device=gpu, lease=pool.lease)
    names = list(range(count))
    downs, ups = Rates(), Rates()
    raw = _Pinned(cupy)
    try:
        for number, is_ours in ((-1, True), *turns(pairs)):
            if not is_ours:
                downs.add(False, ARRAY_NBYTES * count / raw.down(count))
                ups.add(False, ARRAY_NBYTES * count / raw.up(count))
                continue
            for name in names:
                # A new value has no copy below.
                device.put(name, cupy.full(ARRAY_NBYTES // 8, float(name)))
            cupy.cuda.Device().synchronize()
            started = time.perf_counter()
            device.set_limit(0)
            await device.settle()
            down_s = time.perf_counter() - started
            if len(device.absent) != count:
                raise BrokenRunError(f"{count - len(device.absent)} of {count} arrays did not leave the device")
            device.set_limit(None)
            started = time.perf_counter()
            device.unpin(await device.ensure(names))
            cupy.cuda.Device().synchronize()
            up_s = time.perf_counter() - started
            values: list[Any] = [device.get(name) for name in names]
            if any(float(value[-1]) != name for name, value in zip(names, values, strict=True)):
                raise BrokenRunError("an array is not what it was")
            del values
            if number >= 0:  # the first makes the memory
                downs.add(True, ARRAY_NBYTES * count / down_s)
                ups.add(True, ARRAY_NBYTES * count / up_s)
    finally:
        await device.close()
        await host.close()
    return downs, ups


class _Pinned:
    def __init__(self, cupy: Any) -> None:
        self._device = cupy.ones(ARRAY_NBYTES // 8)
        self._host = importlib.import_module("cupyx").empty_pinned(self._device.shape, self._device.dtype)
        self._synchronize = cupy.cuda.Device().synchronize

    def down(self, count: int) -> float:
        """Copy to the host; return the seconds."""
        started = time.perf_counter()
        for _ in range(count):
            self._device.get(out=self._host)
        self._synchronize()
        return time.perf_counter() - started

    def up(self, count: int) -> float:
        """Copy to the device; return the seconds."""
        started = time.perf_counter()
        for _ in range(count):
            self._device.set(self._host)
        self._synchronize()
        return time.perf_counter() - started
