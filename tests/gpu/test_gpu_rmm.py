"""RMM's failed allocations on a real GPU: under a pool, an asynchronous and a limiting resource, and in a pool in pieces."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.device import HostFrames
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.rmm import Rescuer, RmmResource
from dask_gpurt.memory.spiller import Spiller

pytestmark = pytest.mark.gpu

MIB = 2**20
#: Of a block, and of what the resource gives out, which holds sixteen.
BLOCK, CAPACITY = 4 * MIB, 64 * MIB


class Unknown:
    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [IDLE for _ in names]


@dataclass
class Rig:
    mover: Mover
    rescuer: Rescuer

    def fill(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.mover.put(number, block(number))

    async def check(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            pinned = await self.mover.ensure([number])
            value: Any = self.mover.get(number)
            assert value.copy_to_host().tobytes() == pattern(number).tobytes()
            self.mover.unpin(pinned)


def pattern(number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(number).integers(0, 256, BLOCK, dtype="u1")


def block(number: int) -> Any:
    rmm = pytest.importorskip("rmm")
    return rmm.DeviceBuffer.to_device(pattern(number))


def pool(mr: Any) -> Any:
    return mr.PoolMemoryResource(mr.CudaMemoryResource(), initial_pool_size=CAPACITY, maximum_pool_size=CAPACITY)


def asynchronous(mr: Any) -> Any:
    return mr.LimitingResourceAdaptor(mr.CudaAsyncMemoryResource(), allocation_limit=CAPACITY)


def limiting(mr: Any) -> Any:
    return mr.LimitingResourceAdaptor(mr.CudaMemoryResource(), allocation_limit=CAPACITY)


@contextmanager
def resource(make: Callable[[Any], Any]) -> Iterator[Any]:
    mr = pytest.importorskip("rmm").mr
    former = mr.get_current_device_resource()
    current = make(mr)
    mr.set_current_device_resource(current)
    try:
        yield current
    finally:
        mr.set_current_device_resource(former)


@asynccontextmanager
async def rig(path: Any) -> AsyncIterator[Rig]:
    ledger = Ledger({Tier.DEVICE: 2 * CAPACITY, Tier.HOST: 2 * CAPACITY})
    folder = SpillFolder(str(path), BlockPool(CAPACITY))
    lost: list[object] = []
    loop = asyncio.get_running_loop()
    host = Mover(Spiller(ledger, Unknown()), DiskStore(folder), loop, lambda *what: lost.append(what))
    device = Mover(
        Spiller(ledger, Unknown(), upper=Tier.DEVICE, lower=None),
        HostFrames(host),
        loop,
        lambda *what: lost.append(what),
        threads=1,
    )
    rescuer = Rescuer(device, loop, lambda: "the test", others=[host])
    guard = rescuer.resource = RmmResource(rescuer.rescue)
    try:
        yield Rig(device, rescuer)
    finally:
        rescuer.close()
        for mover in (device, host):
            await mover.close()
        guard.uninstall()
        folder.close()
    assert lost == []


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


@pytest.mark.parametrize("make", [pool, asynchronous, limiting])
def test_an_allocation_succeeds_after_data_was_moved(make: Callable[[Any], Any], tmp_path: Any) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.fill(range(15))
            more = await asyncio.to_thread(block, 99)
            larger = await asyncio.to_thread(pytest.importorskip("rmm").DeviceBuffer, size=5 * BLOCK)
            here = block(98)  # the thread of the event loop
            assert r.rescuer.failures > 0
            assert r.rescuer.refusals == 0
            assert len(r.mover.absent) >= 6
            assert more.copy_to_host().tobytes() == pattern(99).tobytes()
            assert here.copy_to_host().tobytes() == pattern(98).tobytes()
            del more, larger, here
            await r.check(range(15))

    with resource(make) as current:
        run(main())
        mr = pytest.importorskip("rmm").mr
        assert mr.get_current_device_resource() is current


@pytest.mark.parametrize("make", [pool, asynchronous, limiting])
def test_reading_back_moves_others_away(make: Callable[[Any], Any], tmp_path: Any) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.fill(range(30))
            for _ in range(2):
                await r.check(range(30))
            assert r.rescuer.refusals == 0

    with resource(make):
        run(main())


def test_a_pool_in_pieces_gives_no_large_block_and_says_so_and_then_does(tmp_path: Any) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            foreign = []
            for number in range(7):
                r.fill([number])
                foreign.append(block(100 + number))
            size = 6 * BLOCK
            rmm = pytest.importorskip("rmm")
            # However much is moved away, what lies between stays.
            with pytest.raises(MemoryError, match=r"the test asked for 24\.00 MiB.*dask-gpurt holds"):
                await asyncio.to_thread(rmm.DeviceBuffer, size=size)
            assert [f.copy_to_host().tobytes() for f in foreign] == [pattern(100 + n).tobytes() for n in range(7)]
            foreign.clear()
            assert (await asyncio.to_thread(rmm.DeviceBuffer, size=size)).size == size
            await r.check(range(7))

    with resource(pool):
        run(main())


def test_several_threads_at_once(tmp_path: Any) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            together = threading.Barrier(4, timeout=30)

            def task(worker: int) -> None:
                together.wait()
                for step in range(16):
                    r.fill([1000 * worker + step])

            await asyncio.gather(*(asyncio.to_thread(task, worker) for worker in range(4)))
            await r.check([1000 * worker + step for worker in range(4) for step in range(16)])

    with resource(pool):
        run(main())


def set_pool() -> None:
    import rmm

    rmm.mr.set_current_device_resource(pool(rmm.mr))


def make_block(number: int) -> Any:
    import rmm

    return rmm.DeviceBuffer.to_device(np.full(BLOCK, number, dtype="u1"))


def work(buffer: Any, scratch: int) -> int:
    held = [make_block(0) for _ in range(scratch)]
    return int(buffer.copy_to_host()[0]) + len(held)


def test_one_task_out_of_memory_does_not_end_the_worker() -> None:
    pytest.importorskip("rmm")
    with local_cluster(1) as cluster, Client(cluster) as client:
        client.run(set_pool)
        answer = dask_gpurt.install(client, placement=False, config={"memory.device-limit": CAPACITY})
        assert answer.installed("memory"), str(answer)
        buffers = client.map(make_block, range(12))
        wait(buffers)
        (address,) = client.run(lambda: None)
        with pytest.raises(MemoryError, match="task 'greedy' on worker"):
            client.submit(work, buffers[0], scratch=20, key="greedy", retries=0).result(timeout=60)
        assert client.gather(client.map(work, buffers, scratch=8)) == [number + 8 for number in range(12)]
        assert list(client.run(lambda: None)) == [address]
