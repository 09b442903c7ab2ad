"""What a shuffle keeps of what it has sent, who takes over the outputs of a lost worker, and when a repair has ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.errors import SpillError
from dask_gpurt.memory.store import DeviceBuffer, DictBufferStore, Reservation
from dask_gpurt.shuffle.kept import Allowance, Kept
from dask_gpurt.shuffle.repair import REPAIR, REPAIRED, Repairs, new_owners
from dask_gpurt.shuffle.wire import Header, Kind, encode

# Owners

WORKERS = "abcde"


@given(
    st.dictionaries(st.integers(0, 30), st.sampled_from(WORKERS)),
    st.sampled_from(WORKERS),
    st.sets(st.sampled_from(WORKERS)),
    st.dictionaries(st.integers(0, 30), st.sampled_from(WORKERS)),
)
def test_the_outputs_of_a_lost_worker_have_new_owners(
    worker_for: dict[int, str], lost: str, living: set[str], agreed: dict[int, str]
) -> None:
    living.discard(lost)
    moved = new_owners(worker_for, lost, living, agreed)
    owners = {address for address in worker_for.values() if address in living}
    if not owners:
        assert moved is None
        return
    assert moved is not None
    assert moved.keys() == {output for output, address in worker_for.items() if address == lost}
    assert owners.issuperset(moved.values())
    assert all(moved[output] == agreed[output] for output in moved if agreed.get(output) in owners)
    if not moved.keys() & agreed.keys():
        # Nobody is given more while another one has fewer.
        before = Counter(address for address in worker_for.values() if address in owners)
        after = Counter({**worker_for, **moved}.values())
        given_to = [address for address in owners if after[address] > before[address]]
        assert all(after[address] <= after[other] + 1 for address in given_to for other in owners)


# What is kept


def message(*inputs: int, nbytes: int = 10) -> list[Any]:
    buffers: list[Any] = []
    for number in inputs:
        buffers += [encode(Header(Kind.FRAME, (number,), np.zeros((1, 2), np.int64), nbytes)), bytes([number]) * nbytes]
    return buffers


class Store(DictBufferStore):
    """Fails, or waits, when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()

    async def reserve(self, nbytes: int) -> Reservation:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        return await super().reserve(nbytes)

    async def take(self, name: str) -> list[Any]:
        if self.error is not None:
            raise self.error
        return await super().take(name)


async def all_of(kept: Kept, address: str) -> list[Any]:
    return [buffers async for buffers, _ in kept.take(address)]


def test_what_was_sent_is_kept_by_peer() -> None:
    async def main() -> None:
        store, allowance = Store(), Allowance(100)
        kept = Kept(store, allowance, name="run")
        assert await kept.keep("a", message(1, 2), 20, wanted=lambda: True)
        assert await kept.keep("b", message(3), 10, wanted=lambda: True)
        assert (kept.nbytes, allowance.used_nbytes) == (30, 30)
        assert await all_of(kept, "a") == [message(1, 2)]
        assert kept.missing("a") == set()
        assert (kept.nbytes, allowance.used_nbytes) == (10, 10)
        assert await all_of(kept, "a") == []
        kept.forget()
        assert (kept.nbytes, allowance.used_nbytes, store._held) == (0, 0, {})

    asyncio.run(main())


def test_what_has_no_room_is_missing_and_no_error() -> None:
    async def main() -> None:
        store, allowance = Store(), Allowance(25)
        kept = Kept(store, allowance, name="run")
        await kept.keep("a", message(1), 20, wanted=lambda: True)
        await kept.keep("a", message(2), 10, wanted=lambda: True)
        await kept.keep("a", [*message(3)[:1], DeviceBuffer(1)], 1, wanted=lambda: True)
        store.error = SpillError("full")
        await kept.keep("a", message(4), 1, wanted=lambda: True)
        store.error = None
        assert await all_of(kept, "a") == [message(1)]
        assert kept.missing("a") == {(2,), (3,), (4,)}
        assert kept.missing("a") == set()
        assert allowance.used_nbytes == 0

    asyncio.run(main())


def test_what_cannot_be_read_again_is_missing() -> None:
    async def main() -> None:
        store, allowance = Store(), Allowance(100)
        kept = Kept(store, allowance, name="run")
        await kept.keep("a", message(1, 2), 20, wanted=lambda: True)
        store.error = SpillError("damaged")
        assert await all_of(kept, "a") == []
        assert kept.missing("a") == {(1,), (2,)}
        assert allowance.used_nbytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_peer_that_is_lost_while_room_is_waited_for_has_it_sent_again(forgotten: bool) -> None:
    async def main() -> None:
        store, allowance, wanted = Store(), Allowance(100), [True]
        kept = Kept(store, allowance, name="run")
        store.open.clear()
        keeping = asyncio.create_task(kept.keep("a", message(1), 10, wanted=lambda: wanted[0]))
        await asyncio.sleep(0)
        assert allowance.used_nbytes == 10
        if forgotten:
            kept.forget()
        else:
            wanted[0] = False
        store.open.set()
        # Forgotten: dealt with, as missing. Lost: it is the caller's again.
        assert await keeping is forgotten
        assert kept.missing("a") == ({(1,)} if forgotten else set())
        assert (allowance.used_nbytes, store._held) == (0, {})

    asyncio.run(main())


def test_whoever_waits_for_room_and_is_cancelled_keeps_nothing() -> None:
    async def main() -> None:
        store, allowance = Store(), Allowance(100)
        kept = Kept(store, allowance, name="run")
        store.open.clear()
        keeping = asyncio.create_task(kept.keep("a", message(1), 10, wanted=lambda: True))
        await asyncio.sleep(0)
        keeping.cancel()
        await asyncio.wait([keeping])
        assert allowance.used_nbytes == 0

    asyncio.run(main())


# The scheduler's side


class FakeSpec:
    """A spec that is repaired."""

    keeps = True

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch

    def repaired(self, moved: dict[Any, str]) -> FakeSpec:
        return FakeSpec(self.epoch + 1)


class FakeTask:
    """A task, which is like no other."""

    key: Any
    state: str
    dependencies: list[Any]
    dependents: list[Any]

    def __init__(self, **what: Any) -> None:
        self.__dict__.update(what)


class FakeScheduler:
    """As much of a scheduler as a repair touches, with one shuffle of four inputs on three workers."""

    def __init__(self) -> None:
        self.workers = dict.fromkeys("abc")
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.released: list[Any] = []
        self.handlers: dict[str, Any] = {"shuffle_barrier": self.answer}
        self.stream_handlers: dict[str, Any] = {}
        self.answers: list[tuple[str, int, bool]] = []
        self.stock: list[str] = []
        inputs = [FakeTask(key=("in", n), state="memory" if n < 3 else "processing") for n in range(4)]
        self.barrier = FakeTask(key="shuffle-barrier-x", state="waiting", dependencies=inputs, dependents=[])
        self.tasks = {task.key: task for task in [*inputs, self.barrier]}
        run = SimpleNamespace(spec=FakeSpec(), worker_for={0: "a", 1: "b", 2: "c"})
        self.run = SimpleNamespace(id="x", run_id=7, run_spec=run, participating_workers={"a", "b", "c"})
        self.plugins = {
            "shuffle": SimpleNamespace(active_shuffles={"x": self.run}, remove_worker=self.remove_worker),
        }

    async def answer(self, id: str, run_id: int, consistent: bool) -> None:  # noqa: A002
        self.answers.append((id, run_id, consistent))

    def remove_worker(self, scheduler: Any, worker: str, *, stimulus_id: str) -> None:
        if worker in self.run.participating_workers:
            self.stock.append(worker)
            self.plugins["shuffle"].active_shuffles.clear()

    def lose(self, worker: str) -> None:
        del self.workers[worker]
        self.plugins["shuffle"].remove_worker(self, worker, stimulus_id="test")

    def worker_send(self, worker: str, what: dict[str, Any]) -> None:
        self.sent.append((worker, what))

    def transitions(self, recommendations: dict[Any, str], stimulus_id: str) -> None:
        self.released += sorted(recommendations)

    def stimulus_queue_slots_maybe_opened(self, stimulus_id: str) -> None: ...

    def log_event(self, topic: str, what: dict[str, Any]) -> None: ...

    def vouch(self, worker: str, *inputs: int, epoch: int = 1, run_id: int = 7, missed: Sequence[int] = ()) -> None:
        told = {"keys": [("in", number) for number in inputs], "missed": [("in", number) for number in missed]}
        self.stream_handlers[REPAIRED](worker=worker, shuffle_id="x", run_id=run_id, epoch=epoch, **told)


def begun(able: bool = True) -> tuple[FakeScheduler, Repairs]:
    scheduler: Any = FakeScheduler()
    repairs = Repairs(scheduler, lambda workers: able)
    repairs.start()
    return scheduler, repairs


def test_a_run_goes_on_without_a_worker_that_is_lost() -> None:
    scheduler, repairs = begun()
    scheduler.lose("a")
    assert scheduler.stock == []
    assert repairs.count == 1
    assert scheduler.run.run_spec.worker_for == {0: "b", 1: "b", 2: "c"}
    assert scheduler.run.run_spec.spec.epoch == 1
    assert scheduler.run.participating_workers == {"b", "c"}
    assert sorted(worker for worker, _ in scheduler.sent) == ["b", "c"]
    assert scheduler.sent[0][1] == {
        "op": REPAIR,
        "shuffle_id": "x",
        "run_id": 7,
        "epoch": 1,
        "lost": "a",
        "moved": [(0, "b")],
    }
    scheduler.vouch("b", 0)
    assert scheduler.released == []
    scheduler.vouch("c", 2)
    # Input 1 was the lost worker's, 3 was not done.
    assert scheduler.released == [("in", 1)]


def test_the_barrier_waits_for_repairs_unless_something_is_wrong() -> None:
    async def main() -> None:
        scheduler, repairs = begun()
        scheduler.lose("a")
        asked = asyncio.create_task(scheduler.handlers["shuffle_barrier"](id="x", run_id=7, consistent=True))
        await asyncio.sleep(0)
        await scheduler.handlers["shuffle_barrier"](id="x", run_id=7, consistent=False)
        assert scheduler.answers == [("x", 7, False)]
        scheduler.vouch("b", 0, 1, 2)
        await asyncio.sleep(0)
        assert not asked.done()
        scheduler.vouch("c")
        await asked
        assert scheduler.answers == [("x", 7, False), ("x", 7, True)]
        assert scheduler.released == []
        assert "0 under way" in repr(repairs)

    asyncio.run(main())


def test_an_input_that_is_done_when_its_worker_says_that_shards_are_missing_is_done_again() -> None:
    scheduler, _ = begun()
    scheduler.lose("a")
    scheduler.tasks["in", 3].state = "memory"
    scheduler.vouch("b", 0, 1, 2, missed=[3])
    scheduler.vouch("c")
    assert scheduler.released == [("in", 3)]


@pytest.mark.parametrize("missed", [[3], []])
def test_one_that_is_not_done_then_makes_the_barrier_a_restart(missed: list[int]) -> None:
    async def main() -> None:
        scheduler, _ = begun()
        scheduler.lose("a")
        scheduler.vouch("b", 0, 1, 2, missed=missed)
        scheduler.vouch("c")
        assert scheduler.released == []
        for _ in range(2):
            await scheduler.handlers["shuffle_barrier"](id="x", run_id=7, consistent=True)
        assert scheduler.answers == [("x", 7, not missed), ("x", 7, True)]

    asyncio.run(main())


def test_a_worker_that_is_lost_within_a_repair_is_not_awaited() -> None:
    scheduler, repairs = begun()
    scheduler.lose("a")
    scheduler.vouch("b", 0, 1, 2)
    scheduler.lose("c")
    # What b has vouched for is right for what a had; for what c had it has to say so again.
    assert repairs.count == 2
    assert scheduler.run.run_spec.worker_for == dict.fromkeys(range(3), "b")
    assert scheduler.released == []
    scheduler.vouch("b", 1, 2, epoch=2)
    assert scheduler.released == [("in", 0)]


def test_words_that_nobody_waits_for_change_nothing() -> None:
    scheduler, _ = begun()
    scheduler.vouch("b", 0)
    scheduler.lose("a")
    scheduler.vouch("a", 1)
    scheduler.vouch("b", 1, epoch=2)
    scheduler.vouch("b", 1, run_id=6)
    scheduler.vouch("b", 0)
    scheduler.vouch("b", 1)
    scheduler.vouch("c")
    assert scheduler.released == [("in", 1), ("in", 2)]


def test_a_run_that_has_ended_meanwhile_is_left_alone() -> None:
    scheduler, _ = begun()
    scheduler.lose("a")
    scheduler.plugins["shuffle"].active_shuffles.clear()
    scheduler.vouch("b")
    scheduler.vouch("c")
    assert scheduler.released == []


@pytest.mark.parametrize("what", ["barrier", "unable", "stock's", "alone", "stopped"])
def test_what_cannot_be_repaired_is_stocks(what: str) -> None:
    scheduler, repairs = begun(able=what != "unable")
    if what == "barrier":
        scheduler.barrier.state = "processing"
    elif what == "stock's":
        scheduler.run.run_spec.spec = SimpleNamespace()
    elif what == "alone":
        scheduler.run.run_spec.worker_for = dict.fromkeys(range(3), "a")
    elif what == "stopped":
        repairs.stop()
        assert REPAIRED not in scheduler.stream_handlers
        assert scheduler.handlers["shuffle_barrier"] == scheduler.answer
    scheduler.lose("a")
    assert scheduler.stock == ["a"]
    assert scheduler.sent == []


def test_repairs_that_are_under_way_end_after_it_has_been_stopped() -> None:
    scheduler, repairs = begun()
    scheduler.lose("a")
    repairs.stop()
    scheduler.vouch("b", 0, 2)
    scheduler.vouch("c")
    assert scheduler.released == [("in", 1)]
    assert REPAIRED not in scheduler.stream_handlers


def test_shuffles_that_share_outputs_agree() -> None:
    scheduler, _ = begun()
    barrier = FakeTask(
        key="shuffle-barrier-y", state="waiting", dependencies=scheduler.barrier.dependencies, dependents=[]
    )
    output = FakeTask(key="out", dependencies=[scheduler.barrier, barrier])
    scheduler.barrier.dependents = barrier.dependents = [output]
    scheduler.tasks[barrier.key] = barrier
    # It has more at b, and would give it to c alone.
    run = SimpleNamespace(spec=FakeSpec(), worker_for={0: "a", 1: "b", 2: "b", 3: "c"})
    other = SimpleNamespace(id="y", run_id=8, run_spec=run, participating_workers={"a", "b", "c"})
    scheduler.plugins["shuffle"].active_shuffles["y"] = other
    scheduler.lose("a")
    assert scheduler.run.run_spec.worker_for[0] == other.run_spec.worker_for[0] == "b"
