"""Allocations that fail on a device of our own: every thread that may be the one, and what it may hold, without a hang."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from dask_gpurt.errors import SpillError
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.rescue import Figures
from dask_gpurt.memory.rmm import Rescuer, RmmResource
from dask_gpurt.memory.spiller import Spiller, State

KIB = 2**10
#: Of a block of the tests, and of the device, which holds ten.
BLOCK = 100 * KIB
CAPACITY = 10 * BLOCK + 5 * KIB
PATIENCE_S = 0.1
HANG_S = 20.0


class Array:
    """Memory of the device, given back when the last one lets go of it."""

    def __init__(self, device: Device, nbytes: int, number: int = 0) -> None:
        device.take(nbytes)
        self.nbytes = nbytes
        self.number = number
        weakref.finalize(self, device.give, nbytes).atexit = False

    def __sizeof__(self) -> int:
        return self.nbytes


class Device:
    """A device with an allocator that calls back as RMM's adaptor does: until it is told not to try again."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.total_nbytes = capacity
        self.used = 0
        self.count = 0
        #: Bytes that are free and of no use, for they lie in pieces.
        self.fragments = 0
        self.callback: Callable[[int], bool] = lambda nbytes: False  # noqa: ARG005
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> None:
        while True:
            with self._lock:
                if self.used + self.fragments + nbytes <= self.total_nbytes:
                    self.used += nbytes
                    self.count += 1
                    return
            if not self.callback(nbytes):
                raise MemoryError("std::bad_alloc")

    def give(self, nbytes: int) -> None:
        with self._lock:
            self.used -= nbytes
            self.fragments //= 2

    def allocations(self) -> int:
        return self.count

    def figures(self) -> Figures:
        return Figures(self.used, self.total_nbytes - self.used, self.total_nbytes)


class Below:
    """A tier below that takes copies at once, or when it is let."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.stored: list[Hashable] = []
        self.on_store: Callable[[], None] = lambda: None

    def store(self, name: Hashable, value: Any) -> Copy:
        self.on_store()
        self.stored.append(name)
        return Copy(self.device, value.nbytes, value.number)


class Copy:
    tier = Tier.HOST

    def __init__(self, device: Device, nbytes: int, number: int) -> None:
        self.device, self.nbytes, self.number = device, nbytes, number

    def load(self) -> Array:
        return Array(self.device, self.nbytes, self.number)

    def frames(self) -> None:
        return None

    def remove(self) -> None:
        pass


class Unknown:
    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [IDLE for _ in names]


@dataclass
class Rig:
    device: Device
    below: Below
    mover: Mover
    rescuer: Rescuer
    lost: list[tuple[Hashable, Exception]] = field(default_factory=list)

    def fill(self, count: int) -> None:
        for number in range(count):
            self.mover.put(number, Array(self.device, BLOCK, number))

    async def allocate(self, nbytes: int = BLOCK, pool: ThreadPoolExecutor | None = None) -> Array:
        """Allocate as a task does."""
        return await asyncio.get_running_loop().run_in_executor(pool, Array, self.device, nbytes)


@asynccontextmanager
async def rig(capacity: int = CAPACITY) -> AsyncIterator[Rig]:
    device = Device(capacity)
    below = Below(device)
    lost: list[tuple[Hashable, Exception]] = []
    loop = asyncio.get_running_loop()
    spiller = Spiller(Ledger({Tier.DEVICE: 100 * capacity}), Unknown(), upper=Tier.DEVICE, lower=None)
    mover = Mover(spiller, below, loop, lambda n, e: lost.append((n, e)), threads=1)
    rescuer = Rescuer(mover, loop, lambda: "task 'mine'", patience_s=PATIENCE_S)
    rescuer.resource = device
    device.callback = rescuer.rescue
    # A step of a limit that is never reached would be everything.
    mover.ledger.set_limit(Tier.DEVICE, capacity)
    rescuer._rescue._step_nbytes = BLOCK // 4
    try:
        yield Rig(device, below, mover, rescuer, lost)
    finally:
        rescuer.close()
        await mover.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, HANG_S))


def test_a_task_gets_its_memory_and_no_more_than_that_is_moved() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            array = await r.allocate()
            assert array.nbytes == BLOCK
            assert len(r.below.stored) == 1
            assert r.device.used <= CAPACITY
            assert (r.rescuer.failures, r.rescuer.refusals) == (1, 0)

    run(main())


def test_when_nothing_can_be_moved_the_task_is_told_the_whole_story_and_the_next_one_runs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(5)
            pinned = await r.mover.ensure(range(5))
            mine = [await r.allocate() for _ in range(5)]
            with pytest.raises(MemoryError) as caught:
                await r.allocate()
            for part in ("task 'mine' asked for", "are free", "dask-gpurt holds", "after 1 try"):
                assert part in str(caught.value)
            assert r.rescuer.refusals == 1
            # As a worker goes on when the task that failed has let go of what it had.
            mine.clear()
            assert (await r.allocate()).nbytes == BLOCK
            r.mover.unpin(pinned)
            assert all(r.mover.get(number).number == number for number in range(5))  # type: ignore[attr-defined]

    run(main())
    assert "out of device memory" in caplog.text


def test_memory_in_pieces_is_answered_by_asking_for_more() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            r.device.fragments = 4 * BLOCK
            assert (await r.allocate()).nbytes == BLOCK
            assert r.rescuer.failures > 1
            assert len(r.below.stored) > 2

    run(main())


def test_the_thread_of_the_event_loop_helps_itself() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            assert Array(r.device, 3 * BLOCK).nbytes == 3 * BLOCK
            assert len(r.below.stored) == 3

    run(main())


def test_the_event_loop_hears_of_a_write_that_another_thread_has_in_hand() -> None:
    async def main() -> None:
        async with rig() as r:
            begun, let = threading.Event(), threading.Event()

            def wait_once() -> None:
                r.below.on_store = lambda: None
                begun.set()
                assert let.wait(HANG_S)

            r.below.on_store = wait_once
            r.fill(10)
            pinned = await r.mover.ensure(range(1, 10))
            r.mover.press(1)
            assert begun.wait(HANG_S)
            # The only block that can go is being written by the mover's thread; the loop, which would take note, is here.
            threading.Timer(0.05, let.set).start()
            assert Array(r.device, BLOCK).nbytes == BLOCK
            r.mover.unpin(pinned)

    run(main())


def test_a_thread_that_copies_for_the_tier_helps_itself() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            assert r.mover.press(BLOCK) == 0
            await r.mover.settle()
            (name,) = r.below.stored
            blocker = await r.allocate()
            assert r.mover.spiller.blocks[name].state is State.SPILLED
            # The device is full: the thread that reads it back has to move another one first, all by itself.
            pinned = await r.mover.ensure([name])
            assert r.mover.get(name).number == name  # type: ignore[attr-defined]
            assert len(r.below.stored) == 2
            r.mover.unpin(pinned)
            assert blocker.nbytes == BLOCK

    run(main())


def test_a_copy_that_needs_memory_itself_fails_at_most_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            scratch = 2 * BLOCK

            def pack() -> None:
                Array(r.device, scratch)

            r.below.on_store = pack
            with pytest.raises(MemoryError, match="mine"):
                await r.allocate()
            scratch = KIB
            r.mover._retry_now()
            assert (await r.allocate()).nbytes == BLOCK
            # No value was to blame.
            assert not any(block.unwritable for block in r.mover.spiller.blocks.values())

    run(main())
    assert "will be tried again" in caplog.text


def test_what_cannot_be_read_for_lack_of_memory_is_not_lost() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(1)
            r.mover.press(BLOCK)
            await r.mover.settle()
            big = await r.allocate(CAPACITY)
            with pytest.raises(MemoryError, match="asked for"):
                await r.mover.ensure([0])
            with pytest.raises(MemoryError, match="asked for"):
                r.mover.get(0)
            assert r.mover.spiller.blocks[0].state is State.SPILLED
            assert r.mover.ledger.reserved(Tier.DEVICE) == 0
            assert big.nbytes == CAPACITY
            del big
            pinned = await r.mover.ensure([0])
            assert r.mover.get(0).number == 0  # type: ignore[attr-defined]
            r.mover.unpin(pinned)
            assert r.lost == []

    run(main())


def test_threads_that_fail_at_once_share_what_is_moved() -> None:
    async def main() -> None:
        async with rig() as r:
            let, seen = threading.Event(), threading.Semaphore(0)
            rounds = []
            make_room = r.mover.make_room

            async def counted(nbytes: int) -> int:
                rounds.append(nbytes)
                return await make_room(nbytes)

            r.mover.make_room = counted  # type: ignore[method-assign]
            rescue = r.rescuer.rescue

            def announced(nbytes: int) -> bool:
                seen.release()
                return rescue(nbytes)

            r.device.callback = announced
            r.rescuer._patience_s = HANG_S
            r.below.on_store = lambda: None if let.wait(HANG_S) else None
            r.fill(10)
            with ThreadPoolExecutor(5) as pool:
                arrays = [asyncio.ensure_future(r.allocate(BLOCK, pool)) for _ in range(5)]
                for _ in range(5):
                    await asyncio.to_thread(seen.acquire, timeout=HANG_S)
                # All wishes are behind this on the loop, but for those that have yet to get from the callback to it.
                while sum(rounds) + sum(nbytes for nbytes, _ in r.rescuer._rescue._waiting) < 5 * BLOCK:
                    await asyncio.sleep(0)
                let.set()
                got = await asyncio.gather(*arrays)
            assert len(got) == 5
            assert len(rounds) <= 2
            assert sum(rounds) == 5 * BLOCK
            assert len(r.below.stored) == 5

    run(main())


def test_a_loop_that_waits_for_the_thread_that_waits_for_it_is_not_waited_for() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            with ThreadPoolExecutor(1) as pool:
                array = pool.submit(Array, r.device, BLOCK)
                # The loop stands still until the allocation has succeeded.
                assert array.result(HANG_S).nbytes == BLOCK

    run(main())


def test_a_task_may_hold_the_lock_that_copying_takes() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            library = threading.RLock()

            def locked() -> None:
                assert library.acquire(timeout=HANG_S)
                library.release()

            r.below.on_store = locked

            def task() -> Array:
                with library:
                    return Array(r.device, BLOCK)

            begun = time.monotonic()
            assert (await asyncio.to_thread(task)).nbytes == BLOCK
            assert time.monotonic() - begun < HANG_S / 2

    run(main())


def test_whoever_is_inside_the_books_is_refused_at_once() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)

            def inside() -> None:
                with r.mover._acting():
                    assert r.mover.entered
                    Array(r.device, BLOCK)

            with pytest.raises(MemoryError, match="asked for"):
                await asyncio.to_thread(inside)
            assert not r.mover.entered
            assert (await r.allocate()).nbytes == BLOCK

    run(main())


def test_after_the_end_nothing_is_done() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            r.rescuer.close()
            with pytest.raises(MemoryError, match="bad_alloc"):
                await r.allocate()
            assert r.below.stored == []

    run(main())


def test_a_tier_that_refuses_leaves_the_data_where_it_is() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)

            def full() -> None:
                raise SpillError("no room below")

            r.below.on_store = full
            with pytest.raises(MemoryError, match="mine"):
                await r.allocate()
            assert len(r.mover.in_memory) == 10

    run(main())


def test_many_threads_on_a_small_device_all_get_through() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)

            def task(number: int) -> int:
                for step in range(20):
                    r.mover.put((number, step), Array(r.device, BLOCK // 2, number))
                return sum(r.mover.get((number, step)).number for step in range(20))  # type: ignore[attr-defined]

            with ThreadPoolExecutor(4) as pool:
                loop = asyncio.get_running_loop()
                sums = await asyncio.gather(*(loop.run_in_executor(pool, task, number) for number in range(4)))
            assert sums == [20 * number for number in range(4)]
            assert r.device.used <= CAPACITY
            assert r.lost == []

    run(main())


# Over RMM


class _Resource:
    """What is asked of RMM's resources and adaptors."""

    def __init__(self, upstream_mr: Any = None, callback: Any = None) -> None:
        self.upstream_mr = upstream_mr
        self.callback = callback
        self.allocation_counts = types.SimpleNamespace(total_count=7, current_bytes=11)


@pytest.fixture
def rmm(monkeypatch: pytest.MonkeyPatch) -> Any:
    module: Any = types.ModuleType("rmm.mr")
    module.current = _Resource()
    module.get_current_device_resource = lambda: module.current
    module.set_current_device_resource = lambda mr: setattr(module, "current", mr)
    module.FailureCallbackResourceAdaptor = module.StatisticsResourceAdaptor = _Resource
    module.available_device_memory = lambda: (3, 17)
    package: Any = types.ModuleType("rmm")
    package.mr = module
    monkeypatch.setitem(sys.modules, "rmm", package)
    monkeypatch.setitem(sys.modules, "rmm.mr", module)
    return module


def test_ours_stands_over_what_is_current_and_goes_again(rmm: Any) -> None:
    former = rmm.current
    assert RmmResource.in_use()
    resource = RmmResource(lambda nbytes: nbytes > 0)
    assert rmm.current.upstream_mr.upstream_mr is former
    assert rmm.current.upstream_mr.callback(1)
    assert resource.installed
    assert (resource.allocations(), resource.total_nbytes, resource.figures()) == (7, 17, Figures(11, 3, 17))
    resource.uninstall()
    assert rmm.current is former
    assert not resource.installed


def test_what_others_have_put_there_since_stays(rmm: Any) -> None:
    resource = RmmResource(lambda nbytes: nbytes > 0)
    over = rmm.current = _Resource(rmm.current)
    assert resource.installed
    resource.uninstall()
    assert rmm.current is over
    rmm.current = _Resource()
    assert not resource.installed
