"""Workers that come, go and pause, clients that change their minds, errors in the policy: no task is lost or stuck.

Each test holds its tasks back with an event, so that what happens meanwhile happens while tasks wait.
"""

from __future__ import annotations

import asyncio
import logging
import operator
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import dask
import pytest
from dask.base import annotate
from dask.delayed import Delayed, delayed
from distributed import Client, Scheduler, Status, Worker, get_worker, secede, wait

from dask_gpurt import seams
from dask_gpurt.config import PlacementSettings
from dask_gpurt.errors import SeamError
from dask_gpurt.plugins import policy, stealing
from dask_gpurt.plugins.placement import Placement

N_LEAVES = 32
FAN_IN = 4
EXPECTED = sum(range(N_LEAVES))


class House:
    """A scheduler that validates itself, workers in this process, a client and a placement."""

    def __init__(self, scheduler: Scheduler, client: Client) -> None:
        self.scheduler = scheduler
        self.client = client
        self.workers: list[Worker] = []
        self.placement = Placement(scheduler, PlacementSettings())
        #: What leaves wait for; see :func:`leaf`.
        self.gate = threading.Event()
        GATES["gate"] = self.gate

    async def add_worker(self, **kwargs: Any) -> Worker:
        worker: Worker = await Worker(
            self.scheduler.address, nthreads=1, host="127.0.0.1", memory_limit=0, dashboard=False, **kwargs
        )
        self.workers.append(worker)
        return worker

    def silence(self) -> None:
        """Let no worker tell how long its tasks have run by now: that many seconds are what decides, however slow the machine is."""
        for worker in self.workers:
            worker.periodic_callbacks["heartbeat"].stop()

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Let the event loop turn until ``condition`` holds."""
        async with asyncio.timeout(20):
            while not (found := condition()):  # noqa: ASYNC110 - the scheduler's state has no event to wait for
                await asyncio.sleep(0.005)
            return found


#: Leaves run in the worker's threads of this process and find their gate here.
GATES: dict[str, threading.Event] = {}


@asynccontextmanager
async def house(n_workers: int, config: dict[str, Any]) -> AsyncIterator[House]:
    settings = {"distributed.scheduler.validate": True, "distributed.worker.validate": True, **config}
    with dask.config.set(settings):
        async with (
            Scheduler(host="127.0.0.1", port=0, dashboard_address="127.0.0.1:0") as scheduler,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            built = House(scheduler, client)
            try:
                for _ in range(n_workers):
                    await built.add_worker()
                built.placement.start()
                yield built
                scheduler.validate_state()
                assert built.placement.metrics()["waiting"] == 0
                built.placement.stop()
            finally:
                built.gate.set()
                for worker in built.workers:
                    await worker.close()


def run(test: Callable[[House], Awaitable[None]], n_workers: int = 3, config: dict[str, Any] | None = None) -> None:
    async def main() -> None:
        async with house(n_workers, config or {}) as built:
            await test(built)

    asyncio.run(main())


def leaf(i: int) -> int:
    assert GATES["gate"].wait(30)
    return i


def broken_leaf() -> None:
    # The others wait in the scheduler until then: an error forgets them.
    assert GATES["gate"].wait(30)
    raise ValueError("no")


#: How often :func:`flaky` will fail.
FAILURES: list[bool] = []


def flaky() -> int:
    if FAILURES and FAILURES.pop():
        raise ValueError("not yet")
    return 1


def tree(tag: str = "t") -> Delayed:
    """Sum the numbers below N_LEAVES by a tree of tasks whose leaves wait for the gate."""
    level: list[Delayed] = [delayed(leaf)(i, dask_key_name=(f"leaf-{tag}", i)) for i in range(N_LEAVES)]
    depth = 0
    while len(level) > 1:
        level = [
            delayed(sum)(level[i : i + FAN_IN], dask_key_name=(f"sum-{tag}-{depth}", i))
            for i in range(0, len(level), FAN_IN)
        ]
        depth += 1
    return level[0]


async def started(built: House, graph: Delayed) -> Any:
    """Submit ``graph`` and return its future once leaves wait in the scheduler."""
    future = built.client.compute(graph)
    await built.until(lambda: built.placement.metrics()["waiting"] > 0)
    built.scheduler.validate_state()
    return future


def test_a_family_stays_together_and_says_why() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        built.gate.set()
        assert await future == EXPECTED
        for start in range(0, N_LEAVES, FAN_IN):
            keys = [("leaf-t", i) for i in range(start, start + FAN_IN)]
            decisions = [task.decisions[0] for task in built.placement.explain(keys)]
            assert {decision.reason for decision in decisions} == {"planned"}
            assert len({decision.worker for decision in decisions}) == 1
            family = decisions[0].family
            assert family is not None
            assert (set(family.keys), family.at) == (set(keys), ("sum-t-0", start))
        assert built.placement.metrics()["decisions"]["planned"] == N_LEAVES
        assert built.placement.metrics()["planned"] == 0
        (nobody,) = built.placement.explain(["nobody"])
        assert (nobody.state, nobody.decisions) == ("unknown", ())

    run(test)


@pytest.mark.parametrize(("saturation", "bound"), [(1.0, 1), (1.1, 2), (3.0, 3)])
def test_queuing_keeps_its_bound(saturation: float, bound: int) -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        assert built.placement.metrics()["waiting"] == N_LEAVES - 3 * bound
        assert all(len(ws.processing) == bound for ws in built.scheduler.workers.values())
        built.gate.set()
        assert await future == EXPECTED

    run(test, config={"distributed.scheduler.worker-saturation": saturation})


def test_without_queuing_all_leaves_go_to_their_workers_at_once() -> None:
    async def test(built: House) -> None:
        future = built.client.compute(tree())
        await built.until(lambda: built.placement.metrics()["decisions"].get("planned") == N_LEAVES)
        assert built.placement.metrics()["waiting"] == 0
        built.gate.set()
        assert await future == EXPECTED

    run(test, config={"distributed.scheduler.worker-saturation": float("inf")})


def test_a_worker_dies() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        await built.workers.pop(0).close(timeout=1, executor_wait=False)
        await built.until(lambda: len(built.scheduler.workers) == 2)
        built.scheduler.validate_state()
        assert built.placement.metrics()["decisions"]["rehomed"] > 0
        built.gate.set()
        assert await future == EXPECTED

    run(test)


def test_all_workers_die_and_one_comes() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        for worker in built.workers:
            await worker.close(timeout=1, executor_wait=False)
        built.workers.clear()
        await built.until(lambda: not built.scheduler.workers)
        built.scheduler.validate_state()
        built.gate.set()
        await built.add_worker()
        assert await future == EXPECTED

    run(test)


def test_workers_join_and_take_over_what_waits() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        built.silence()
        leaf_prefix = built.scheduler.tasks["leaf-t", 0].prefix
        leaf_prefix.add_exec_time(60)  # as a heartbeat would, once leaves have run for a minute
        await built.add_worker()
        await built.until(lambda: built.placement.metrics()["decisions"].get("relieved"))
        await built.until(lambda: len(built.scheduler.workers[built.workers[-1].address].processing) == 2)
        built.scheduler.validate_state()
        built.gate.set()
        assert await future == EXPECTED

    # Stealing may come first, and leave nothing to take over.
    run(test, 2, {"distributed.scheduler.work-stealing": False})


def test_stealing_respects_a_plan_until_leaving_it_pays() -> None:
    async def test(built: House) -> None:
        built.silence()
        future = built.client.compute(tree())
        decisions = built.placement.metrics
        await built.until(lambda: decisions()["decisions"].get("planned") == N_LEAVES)
        thief = await built.add_worker()
        await built.until(lambda: thief.address in built.scheduler.idle)
        stealing = built.scheduler.extensions["stealing"]
        stealing.balance()
        assert decisions()["decisions"]["steal-refused"] > 0  # nobody knows yet how long a leaf takes
        assert not stealing.in_flight
        refused = [task for task in built.placement.explain(list(built.scheduler.tasks)) if task.decisions[1:]]
        assert refused
        stealing.balance()
        for task in built.placement.explain([task.key for task in refused]):
            # Once, however often it is asked, and where it was planned to.
            assert [decision.reason for decision in task.decisions] == ["steal-refused", "planned"]
            assert [decision.worker for decision in task.decisions] == list(task.workers) * 2
            assert thief.address in {alternative.worker for alternative in task.decisions[0].alternatives}
        built.scheduler.tasks["leaf-t", 0].prefix.add_exec_time(60)
        stealing.balance()
        assert decisions()["decisions"]["steal-allowed"] > 0
        await built.until(lambda: built.scheduler.workers[thief.address].processing)
        built.gate.set()
        assert await future == EXPECTED

    run(test, 2, {"distributed.scheduler.worker-saturation": float("inf")})


def test_what_waits_behind_a_long_task_is_taken_however_short_it_is() -> None:
    async def test(built: House) -> None:
        built.silence()
        busy, _ = built.workers
        tasks = built.scheduler.tasks
        stealing = built.scheduler.extensions["stealing"]
        there = await built.client.scatter(1, workers=[busy.address])
        long = built.client.submit(leaf, 0, workers=[busy.address])
        short = built.client.submit(operator.add, there, 1, workers=[busy.address], allow_other_workers=True)
        await built.until(lambda: all(getattr(tasks.get(f.key), "state", "") == "processing" for f in (long, short)))
        tasks[short.key].prefix.add_duration("compute", 0.0, 0.01)
        stealing.balance()
        assert not stealing.in_flight  # nobody knows yet how long the first one takes
        tasks[long.key].prefix.add_exec_time(60)
        stealing.balance()
        assert await asyncio.wait_for(short, 20) == 2
        assert not long.done()
        built.gate.set()
        assert await long == 0

    run(test, 2)


#: Side of two matrices of numbers, and how many are multiplied for each number of the product.
SIDE, DEPTH = 6, 2
#: Name of the worker whose products wait for the gate.
HELD_UP = "held-up"


def multiplied(left: int, right: int) -> int:
    if get_worker().name == HELD_UP:
        assert GATES["gate"].wait(30)
    time.sleep(0.002)  # so much work, by which a wait is judged
    return left * right


def product() -> Delayed:
    """Multiply two matrices: each number of them is taken by many tasks, whose results meet in the product's."""
    left = {(i, k): delayed(int)(i + k, dask_key_name=("left", i, k)) for i in range(SIDE) for k in range(DEPTH)}
    right = {(k, j): delayed(int)(k - j, dask_key_name=("right", k, j)) for k in range(DEPTH) for j in range(SIDE)}
    blocks = []
    for i in range(SIDE):
        for j in range(SIDE):
            parts = [
                delayed(multiplied)(left[i, k], right[k, j], dask_key_name=("part", i, j, k)) for k in range(DEPTH)
            ]
            blocks.append(delayed(sum)(parts, dask_key_name=("block", i, j)))
    made: Delayed = delayed(list)(blocks, dask_key_name="product")
    return made


PRODUCT = [sum((i + k) * (k - j) for k in range(DEPTH)) for i in range(SIDE) for j in range(SIDE)]


async def worked(built: House, worker: Worker, number: int) -> None:
    """Let tasks be done that have nothing to do with all others: whenever one is, the scheduler looks who is idle."""
    await built.client.gather(built.client.map(abs, range(-number, 0), workers=[worker.address], pure=False))


def test_an_idle_worker_takes_products_that_wait_on_a_busy_one() -> None:
    async def test(built: House) -> None:
        await built.add_worker(name=HELD_UP)
        idle = await built.add_worker()
        future = built.client.compute(product(), optimize_graph=False)
        decisions = built.placement.metrics

        async def taken() -> None:
            while not decisions()["decisions"].get("steal-allowed"):
                await worked(built, idle, 4)

        await asyncio.wait_for(taken(), 20)
        assert decisions()["decisions"]["relieved"] > 0
        told = built.placement.explain(
            [("part", i, j, k) for i in range(SIDE) for j in range(SIDE) for k in range(DEPTH)]
        )
        stolen = [task for task in told if task.reason == "steal-allowed"]
        for task in stolen:
            decision = task.decisions[0]
            assert decision.worker == idle.address
            assert {alternative.worker for alternative in decision.alternatives} == {
                worker.address for worker in built.workers
            }
        # The one that its worker has begun stays there; of the others, what was made of them may be all that is left.
        states = built.scheduler.tasks
        await built.until(
            lambda: sum(states[task.key].state in ("memory", "released") for task in stolen) >= len(stolen) - 1
        )
        assert built.scheduler.workers[built.workers[0].address].processing
        built.scheduler.validate_state()
        built.gate.set()
        assert await future == PRODUCT
        assert decisions()["errors"] == 0

    run(test, 0)


def test_nothing_is_taken_where_stealing_is_off() -> None:
    async def test(built: House) -> None:
        await built.add_worker(name=HELD_UP)
        idle = await built.add_worker()
        future = built.client.compute(product(), optimize_graph=False)
        await built.until(lambda: built.placement.metrics()["decisions"].get("planned", 0) > SIDE * SIDE)
        await built.until(lambda: not built.scheduler.workers[idle.address].processing)
        await worked(built, idle, 50)
        assert "steal-allowed" not in built.placement.metrics()["decisions"]
        built.gate.set()
        assert await future == PRODUCT

    run(test, 0, {"distributed.scheduler.work-stealing": False})


def test_an_error_while_an_idle_worker_is_helped_leaves_the_tasks_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken policy")

    async def test(built: House) -> None:
        monkeypatch.setattr(stealing, "shared_out", fail)
        await built.add_worker(name=HELD_UP)
        idle = await built.add_worker()
        built.silence()  # or Dask's own stealing takes what has waited for long
        future = built.client.compute(product(), optimize_graph=False)

        async def failed() -> None:
            while not built.placement.metrics()["errors"]:
                await worked(built, idle, 4)

        await asyncio.wait_for(failed(), 20)
        built.gate.set()
        assert await future == PRODUCT
        assert "steal-allowed" not in built.placement.metrics()["decisions"]

    run(test, 0)


def test_a_worker_retires_with_its_results() -> None:
    async def test(built: House) -> None:
        built.gate.set()
        leaves = built.client.persist([delayed(operator.neg)(i, dask_key_name=("neg", i)) for i in range(30)])
        await wait(leaves)
        built.gate.clear()
        future = await started(built, tree())
        retiring = asyncio.create_task(built.client.retire_workers([built.workers[0].address]))
        built.gate.set()
        await retiring
        assert await future == EXPECTED
        assert await built.client.gather(built.client.compute(leaves)) == [-i for i in range(30)]

    run(test)


def test_a_worker_pauses_and_its_families_go_elsewhere() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        paused = built.workers[0]
        paused.status = Status.paused
        await built.until(lambda: built.scheduler.workers[paused.address].status == Status.paused)
        await built.until(lambda: built.placement.metrics()["decisions"].get("rehomed"))
        built.scheduler.validate_state()
        built.gate.set()
        await built.until(lambda: not built.placement.metrics()["waiting"])
        paused.status = Status.running
        assert await future == EXPECTED

    run(test)


def test_a_client_cancels_and_submits_again() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        await future.cancel(force=True)
        await built.until(lambda: not built.scheduler.tasks)
        assert built.placement.metrics()["planned"] == 0
        assert built.placement.metrics()["waiting"] == 0
        # The same tasks under another future: the client may still have to hear of the end of the first.
        future = await started(built, delayed(int)(tree()))
        built.gate.set()
        assert await future == EXPECTED

    run(test)


def test_two_clients_share_a_graph_and_one_leaves() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        async with Client(built.scheduler.address, asynchronous=True) as other:
            shared = other.compute(tree())
            own = other.compute(tree("own"))
            await built.until(lambda: ("leaf-own", 0) in built.scheduler.tasks)
            assert built.placement.metrics()["planned"] == 2 * N_LEAVES
            built.scheduler.validate_state()
            # What it alone wanted goes with it; what the first wants, too, stays.
            del shared, own
        await built.until(lambda: ("leaf-own", 0) not in built.scheduler.tasks)
        assert built.placement.metrics()["planned"] == N_LEAVES
        built.gate.set()
        assert await future == EXPECTED

    run(test)


def seceding_leaf(i: int) -> int:
    secede()
    return leaf(i)


def test_a_task_that_has_seceded_holds_up_no_planned_one() -> None:
    async def test(built: House) -> None:
        leaves = [delayed(seceding_leaf if i == 0 else int)(i, dask_key_name=("leaf", i)) for i in range(N_LEAVES)]
        sums = [delayed(sum)(leaves[i : i + FAN_IN]) for i in range(0, N_LEAVES, FAN_IN)]
        future = built.client.compute(delayed(sum)(sums), optimize_graph=False)
        tasks = built.scheduler.tasks
        await built.until(lambda: tasks and all(tasks["leaf", i].state != "queued" for i in range(1, N_LEAVES)))
        # The first is still on the one thread of its worker's pool, where others of its family ran after it.
        await built.until(lambda: any(ws.long_running for ws in built.scheduler.workers.values()))
        (ws,) = [ws for ws in built.scheduler.workers.values() if ws.long_running]
        await built.until(lambda: set(ws.processing) == set(ws.long_running))
        (task,) = built.placement.explain([("leaf", 1)])
        assert (task.reason, task.decisions[0].worker) == ("planned", ws.address)
        built.scheduler.validate_state()
        built.gate.set()
        assert await future == EXPECTED

    run(test)


class Counter:
    """An actor that counts."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, number: int) -> int:
        self.count += number
        return self.count


def test_actors_are_dasks_and_live_beside_planned_tasks() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        # The gate is for leaves: a thread is free once they are done.
        made = built.client.submit(Counter, actor=True, key="counter", priority=1)
        built.gate.set()
        counter = await made
        assert [await counter.add(number) for number in (1, 2)] == [1, 3]
        (task,) = built.placement.explain(["counter"])
        assert task.reason == "restricted"
        assert await future == EXPECTED

    run(test)


def test_a_future_is_released_mid_way() -> None:
    async def test(built: House) -> None:
        doomed = await started(built, tree("doomed"))
        kept = await started(built, tree("kept"))
        doomed.release()
        await built.until(lambda: not any("doomed" in str(key) for key in built.scheduler.tasks))
        built.scheduler.validate_state()
        built.gate.set()
        assert await kept == EXPECTED

    run(test)


def test_a_restart_forgets_all_plans() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        built.gate.set()
        # Workers without a nanny do not come back by themselves.
        await built.client.restart(wait_for_workers=False)
        assert future.cancelled()
        assert built.placement.metrics()["planned"] == 0
        await built.until(lambda: not built.scheduler.workers)
        await built.add_worker()
        await built.add_worker()
        assert await built.client.compute(tree()) == EXPECTED

    run(test)


def test_a_leaf_fails_and_is_retried() -> None:
    async def test(built: House) -> None:
        FAILURES[:] = [True, True]
        leaves = [delayed(flaky)(dask_key_name=("flaky", 0)), *(delayed(leaf)(i) for i in range(8))]
        built.gate.set()
        assert await built.client.compute(delayed(sum)(leaves), retries=2) == 1 + sum(range(8))
        assert not FAILURES

    run(test)


def test_an_error_of_a_leaf_reaches_the_client() -> None:
    async def test(built: House) -> None:
        leaves = [delayed(broken_leaf)(), *(delayed(leaf)(i) for i in range(20))]
        future = await started(built, delayed(sum)(leaves))
        built.gate.set()
        with pytest.raises(ValueError, match="no"):
            await future
        await built.until(lambda: not built.placement.metrics()["waiting"])

    run(test)


def test_restrictions_mean_what_they_mean_in_dask() -> None:
    async def test(built: House) -> None:
        built.gate.set()
        only = built.workers[1].address
        with annotate(workers=[only], allow_other_workers=False):
            graph = tree()
            with dask.config.set({"optimization.fuse.active": False}):
                future = built.client.compute(graph, optimize_graph=False)
        assert await future == EXPECTED
        ran = {entry.key for entry in built.scheduler.transition_log if entry.finish == "memory"}
        assert len(ran) > N_LEAVES
        assert set(built.workers[0].data) | set(built.workers[2].data) == set()

    run(test)


def test_what_no_worker_meets_waits_for_one_that_does() -> None:
    def step(name: str, resource: str, *inputs: Delayed) -> Delayed:
        with annotate(resources={resource: 1}):
            made: Delayed = delayed(sum)([1, *inputs], dask_key_name=name)
        return made

    async def test(built: House) -> None:
        built.gate.set()
        # Each needs a worker that no other one of its neighbours can run on, in a circle; and there is none at all.
        first = step("first", "left")
        last = step("last", "left", step("middle", "right", first), first)
        future = built.client.compute(last, optimize_graph=False)
        other = built.client.compute(tree())
        assert await other == EXPECTED
        assert built.scheduler.tasks["first"].state == "no-worker"
        (task,) = built.placement.explain(["first"])
        assert (task.state, task.reason) == ("no-worker", "restricted")
        await built.add_worker(resources={"left": 1})
        await built.until(lambda: built.scheduler.tasks["first"].state == "memory")
        await built.until(lambda: built.scheduler.tasks["middle"].state == "no-worker")
        built.scheduler.validate_state()
        await built.add_worker(resources={"right": 1})
        assert await future == 1 + 1 + (1 + 1)
        assert built.placement.metrics()["errors"] == 0

    run(test, 2)


def test_annotations_that_nobody_knows_change_nothing() -> None:
    async def test(built: House) -> None:
        with annotate(colour="blue", shape={"round": object}, priority=1):
            future = built.client.compute(tree(), optimize_graph=False)
        built.gate.set()
        assert await future == EXPECTED
        assert built.placement.metrics()["decisions"]["planned"] == N_LEAVES
        assert built.placement.metrics()["errors"] == 0

    run(test)


def test_priorities_hold_across_the_queues_of_all_workers() -> None:
    async def test(built: House) -> None:
        low = await started(built, tree("low"))
        high = built.client.compute(tree("high"), priority=10)
        await built.until(lambda: built.placement.metrics()["waiting"] > N_LEAVES)
        built.gate.set()
        assert await high == EXPECTED
        assert await low == EXPECTED
        order = [
            entry.key[0]
            for entry in built.scheduler.transition_log
            if entry.start == "queued" and entry.finish == "processing" and isinstance(entry.key, tuple)
        ]
        assert order == ["leaf-high"] * N_LEAVES + ["leaf-low"] * (len(order) - N_LEAVES)

    run(test)


def test_tasks_without_a_plan_wait_beside_planned_ones_and_keep_their_rank() -> None:
    async def test(built: House) -> None:
        planned = await started(built, tree())
        lone = built.client.map(leaf, range(100, 140), priority=-1)
        urgent = built.client.map(leaf, range(200, 240), priority=1)
        await built.until(lambda: len(built.scheduler.queued) >= 80)
        built.scheduler.validate_state()
        built.gate.set()
        assert await built.client.gather(lone) == list(range(100, 140))
        assert await built.client.gather(urgent) == list(range(200, 240))
        assert await planned == EXPECTED
        order = [
            entry.key
            for entry in built.scheduler.transition_log
            if entry.start == "queued" and entry.finish == "processing"
        ]
        kinds = [
            key[0] if isinstance(key, tuple) else ("urgent" if key in {f.key for f in urgent} else "lone")
            for key in order
        ]
        assert kinds.index("leaf-t") >= kinds.count("urgent")
        assert kinds.index("lone") >= kinds.count("leaf-t")

    run(test)


def test_stop_in_the_middle_leaves_the_rest_to_dask() -> None:
    async def test(built: House) -> None:
        future = await started(built, tree())
        built.placement.stop()
        assert not {"_TRANSITIONS_TABLE", "stimulus_queue_slots_maybe_opened"} & vars(built.scheduler).keys()
        assert "_get_thief" not in vars(built.scheduler.extensions["stealing"])
        assert "gpurt-placement" not in built.scheduler.plugins
        assert "gpurt-placement" not in built.scheduler.periodic_callbacks
        assert built.scheduler.queued
        built.scheduler.validate_state()
        built.gate.set()
        assert await future == EXPECTED
        built.placement.stop()  # a second time does nothing

    run(test)


def test_start_in_the_middle() -> None:
    async def test(built: House) -> None:
        built.placement.stop()
        lone = built.client.map(leaf, range(40))
        await built.until(lambda: len(built.scheduler.queued) > 10)
        built.placement.start()
        built.placement.start()  # a second time does nothing
        future = await started(built, tree())
        built.gate.set()
        assert await future == EXPECTED
        assert await built.client.gather(lone) == list(range(40))

    run(test)


def test_a_second_placement_is_refused_and_changes_nothing() -> None:
    async def test(built: House) -> None:
        before = seams.stock_choice.__name__, dict(vars(built.scheduler))
        with pytest.raises(SeamError, match="replaced already"):
            Placement(built.scheduler, PlacementSettings()).start()
        assert (seams.stock_choice.__name__, dict(vars(built.scheduler))) == before

    run(test)


def test_an_error_in_the_policy_falls_to_dask_and_is_shown_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken policy")

    async def test(built: House) -> None:
        built.gate.set()
        monkeypatch.setattr(policy, "holdings", fail)
        assert await built.client.compute(tree()) == EXPECTED
        assert built.placement.metrics()["errors"] > 1

    with caplog.at_level(logging.ERROR, logger="dask_gpurt"):
        run(test)
    assert len([record for record in caplog.records if record.name.startswith("dask_gpurt")]) == 1
    assert "broken policy" in caplog.text


def test_a_graph_that_cannot_be_planned_runs_as_in_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(built: House) -> None:
        built.gate.set()
        monkeypatch.setattr(built.placement, "_families", None)
        assert await built.client.compute(tree()) == EXPECTED
        assert built.placement.metrics()["errors"] == 1
        assert "planned" not in built.placement.metrics()["decisions"]

    run(test)


def test_an_empty_cluster_waits_for_its_first_worker() -> None:
    async def test(built: House) -> None:
        built.gate.set()
        future = built.client.compute(tree())
        await built.until(lambda: built.scheduler.queued or built.scheduler.unrunnable)
        await built.add_worker()
        assert await future == EXPECTED

    run(test, 0)
