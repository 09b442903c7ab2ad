"""Allocations that fail on a device of our own: every thread that may be the one, and what it may hold, without a hang."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from rmm_standin import Array, Device, Resource, plant

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


class Below:
    """A tier below that takes copies at once, or when it is let."""

    def __init__(self) -> None:
        self.stored: list[Hashable] = []
        self.on_store: Callable[[], None] = lambda: None

    def store(self, name: Hashable, value: Any) -> Copy:
        self.on_store()
        self.stored.append(name)
        return Copy(value.nbytes, value.number)


class Copy:
    tier = Tier.HOST

    def __init__(self, nbytes: int, number: int) -> None:
        self.nbytes, self.number = nbytes, number

    def load(self) -> Array:
        return Array(self.number, self.nbytes)

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
            self.mover.put(number, Array(number, BLOCK))

    async def allocate(self, nbytes: int = BLOCK, pool: ThreadPoolExecutor | None = None) -> Array:
        """Allocate as a task does."""
        return await asyncio.get_running_loop().run_in_executor(pool, Array, 0, nbytes)


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    mr = plant(CAPACITY)
    below = Below()
    lost: list[tuple[Hashable, Exception]] = []
    loop = asyncio.get_running_loop()
    spiller = Spiller(Ledger({Tier.DEVICE: CAPACITY}), Unknown(), upper=Tier.DEVICE, lower=None)
    mover = Mover(spiller, below, loop, lambda n, e: lost.append((n, e)), threads=1)
    rescuer = Rescuer(mover, loop, lambda: "task 'mine'", patience_s=PATIENCE_S)
    resource = rescuer.resource = RmmResource(rescuer.rescue)
    try:
        yield Rig(mr.device, below, mover, rescuer, lost)
    finally:
        rescuer.close()
        await mover.close()
        resource.uninstall()
        del sys.modules["rmm"], sys.modules["rmm.mr"]


def assert_set(event: threading.Event) -> None:
    assert event.wait(HANG_S)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, HANG_S))


def test_a_task_gets_its_memory_and_no_more_than_that_is_moved() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            array = await r.allocate()
            assert array.nbytes == BLOCK
            assert len(r.below.stored) == 1
            assert r.device.used_nbytes <= CAPACITY
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
            r.device.fragments_nbytes = 4 * BLOCK
            assert (await r.allocate()).nbytes == BLOCK
            assert r.rescuer.failures > 1
            assert len(r.below.stored) > 2

    run(main())


def test_the_thread_of_the_event_loop_helps_itself() -> None:
    async def main() -> None:
        async with rig() as r:
            r.fill(10)
            assert Array(0, 3 * BLOCK).nbytes == 3 * BLOCK
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
            assert Array(0, BLOCK).nbytes == BLOCK
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
                Array(0, scratch)

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
            let, rounds, waiting = threading.Event(), list[int](), asyncio.Event()
            make_room, wish = r.mover.make_room, r.rescuer._wish

            async def counted(nbytes: int) -> int:
                rounds.append(nbytes)
                return await make_room(nbytes)

            def noted(nbytes: int, answer: Any) -> None:
                wish(nbytes, answer)
                wishes.append(nbytes)
                if len(wishes) == 5:
                    waiting.set()

            wishes: list[int] = []
            r.mover.make_room = counted  # type: ignore[method-assign]
            r.rescuer._wish = noted  # type: ignore[method-assign]
            r.rescuer._patience_s = HANG_S
            r.below.on_store = lambda: assert_set(let)
            r.fill(10)
            with ThreadPoolExecutor(5) as pool:
                arrays = [asyncio.ensure_future(r.allocate(BLOCK, pool)) for _ in range(5)]
                await waiting.wait()
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
                array = pool.submit(Array, 0, BLOCK)
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
                    return Array(0, BLOCK)

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
                    Array(0, BLOCK)

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
                    r.mover.put((number, step), Array(number, BLOCK // 2))
                return sum(r.mover.get((number, step)).number for step in range(20))  # type: ignore[attr-defined]

            with ThreadPoolExecutor(4) as pool:
                loop = asyncio.get_running_loop()
                sums = await asyncio.gather(*(loop.run_in_executor(pool, task, number) for number in range(4)))
            assert sums == [20 * number for number in range(4)]
            assert r.device.used_nbytes <= CAPACITY
            assert r.lost == []

    run(main())


# Over RMM


@pytest.fixture
def mr(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("rmm", "rmm.mr"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert not RmmResource.in_use()
    return plant(1000)


def test_ours_stands_over_what_is_current_and_goes_again(mr: Any) -> None:
    former = mr.current
    assert RmmResource.in_use()
    resource = RmmResource(lambda nbytes: nbytes > 0)
    assert mr.current.upstream_mr.upstream_mr is former
    assert mr.current.upstream_mr.callback(1)
    assert resource.installed
    mr.current.allocate(11)
    assert (resource.allocations(), resource.total_nbytes, resource.figures()) == (1, 1000, Figures(11, 989, 1000))
    resource.uninstall()
    assert mr.current is former
    assert not resource.installed


def test_what_others_have_put_there_since_stays(mr: Any) -> None:
    resource = RmmResource(lambda nbytes: nbytes > 0)
    over = mr.current = Resource(mr.current)
    assert resource.installed
    resource.uninstall()
    assert mr.current is over
    mr.current = Resource(mr.device)
    assert not resource.installed
