"""What distributed promises of a p2p shuffle, whatever data plane it is on: its state comes and goes, errors are named."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import beat, local_cluster
from distributed import Client, Event, LocalCluster, SchedulerPlugin, Worker

from dask_gpurt.config import ShuffleSettings
from dask_gpurt.memory.store import DictBufferStore
from dask_gpurt.seams import ShuffleClosedError
from dask_gpurt.shuffle import merging
from dask_gpurt.shuffle import scheduler as shuffle_scheduler
from dask_gpurt.shuffle.dataframe import FrameRun
from dask_gpurt.shuffle.merging import inner_merge
from dask_gpurt.shuffle.run import Run
from dask_gpurt.shuffle.scheduler import ShuffleScheduler, supports
from dask_gpurt.shuffle.shelves import Shelves
from dask_gpurt.shuffle.wire import WireError
from dask_gpurt.shuffle.worker import ShuffleWorker


class Parts:
    """A cluster in this process, with our shuffle and nothing else of ours."""

    def __init__(self, cluster: LocalCluster, client: Client) -> None:
        self.cluster = cluster
        self.client = client
        assert cluster.scheduler is not None
        assert cluster.scheduler is not None
        self.scheduler: Any = cluster.scheduler
        self.workers: list[Worker] = list(cluster.workers.values())
        self.shuffle = ShuffleScheduler(self.scheduler, ShuffleSettings())
        self.equipped: list[ShuffleWorker] = []
        for worker in self.workers:
            self.equip(worker)
        self.shuffle.start()

    def equip(self, worker: Worker) -> None:
        part = ShuffleWorker(worker, ShuffleSettings(), DictBufferStore())
        self.equipped.append(part)
        part.start()
        worker.extensions["gpurt"] = SimpleNamespace(shuffle=part)
        self.shuffle.set_capable(worker.address, True)

    def part(self, worker: Worker) -> ShuffleWorker:
        part: ShuffleWorker = worker.extensions["gpurt"].shuffle
        return part

    def runs(self) -> list[Run]:
        return [run for worker in self.workers for run in list(self.part(worker)._runs.values())]

    async def at_rest(self) -> None:
        """Wait until no run is active, and see that nothing is left of any."""
        for run in self.runs():
            await asyncio.wait_for(run._closed_event.wait(), 10)
        for worker in self.workers:
            part = self.part(worker)
            assert not part.store._held  # type: ignore[attr-defined]
            assert part.window.used_nbytes == 0


@asynccontextmanager
async def parts() -> AsyncIterator[Parts]:
    async with (
        local_cluster(2, 2, processes=False, asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        found = Parts(cluster, client)
        try:
            yield found
        finally:
            # Of this process, too, nothing stays changed.
            for part in found.equipped:
                await part.stop()


def frame(rows: int = 1000) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"key": rng.integers(0, 50, rows), "value": rng.random(rows)})


def shuffled(data: pd.DataFrame, inputs: int = 5, outputs: int = 6) -> Any:
    return dd.from_pandas(data, npartitions=inputs, sort=False).shuffle(
        "key", npartitions=outputs, shuffle_method="p2p"
    )


def run(main: Any) -> None:
    asyncio.run(asyncio.wait_for(main(), 100))


def test_nothing_is_left_of_a_shuffle_that_is_forgotten() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            found = await cluster.client.compute(shuffled(data))
            pd.testing.assert_frame_equal(found.sort_index(), data)
            await cluster.at_rest()
            assert all(cluster.part(worker).runs == 1 for worker in cluster.workers)
            assert not cluster.scheduler.plugins["shuffle"].active_shuffles

    run(main)


def test_results_may_be_dropped_and_others_asked_for_later() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            collection = shuffled(data)
            first = cluster.client.compute(collection.partitions[:2].to_delayed())
            await asyncio.gather(*first)
            rest = cluster.client.compute(collection.to_delayed())
            del first
            found = pd.concat(await asyncio.gather(*rest))
            pd.testing.assert_frame_equal(found.sort_index(), data)
            del rest
            await cluster.at_rest()

    run(main)


def test_many_shuffles_go_side_by_side() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            futures = [cluster.client.compute(shuffled(data, inputs=3 + i, outputs=2 + i)) for i in range(4)]
            for future in futures:
                pd.testing.assert_frame_equal((await future).sort_index(), data)
            del future, futures
            await cluster.at_rest()

    run(main)


def test_the_same_parcel_twice_is_taken_in_once() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            stock, doubled = Run._deliver, 0

            async def twice(self: Run, address: str, buffers: list[Any]) -> None:
                nonlocal doubled
                doubled += 1
                await asyncio.gather(stock(self, address, buffers), stock(self, address, buffers))

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Run, "_deliver", twice)
                found = await cluster.client.compute(shuffled(data))
            assert doubled
            pd.testing.assert_frame_equal(found.sort_index(), data)

    run(main)


def test_a_worker_that_joins_late_may_send() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            reached, go_on = Event("late-reached"), Event("late-go-on")

            def hold(part: pd.DataFrame) -> pd.DataFrame:
                if len(part) and Event("late-first").is_set():
                    Event("late-reached").set()
                    assert Event("late-go-on").wait(30)
                Event("late-first").set()
                return part

            source = dd.from_pandas(data, npartitions=12, sort=False).map_partitions(hold, meta=data.iloc[:0])
            future = cluster.client.compute(source.shuffle("key", npartitions=4, shuffle_method="p2p"))
            await reached.wait()
            async with Worker(cluster.scheduler.address, nthreads=2, host="127.0.0.1", dashboard_address=":0") as late:
                assert late.address not in {worker.address for worker in cluster.workers}
                await go_on.set()
                found = await future
            pd.testing.assert_frame_equal(found.sort_index(), data)

    run(main)


@pytest.mark.parametrize("phase", ["transfer", "unpack"])
def test_errors_of_our_own_name_the_shuffle_and_its_phase(phase: str) -> None:
    async def main() -> None:
        async with parts() as cluster:

            def fail(*_: Any, **__: Any) -> Any:
                raise ZeroDivisionError("on purpose")

            from dask_gpurt.shuffle import frames

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(frames, "split" if phase == "transfer" else "join", fail)
                future = cluster.client.compute(shuffled(frame()))
                with pytest.raises(RuntimeError, match=f"failed during {phase} phase") as caught:
                    await future
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            del future
            await cluster.at_rest()

    run(main)


def test_a_failed_send_fails_the_shuffle_and_not_the_worker() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()

            async def fail(self: Run, address: str, buffers: list[Any]) -> None:
                raise ValueError(f"{self} cannot reach {address} with {len(buffers)} buffers")

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Run, "_deliver", fail)
                future = cluster.client.compute(shuffled(data))
                with pytest.raises(RuntimeError, match="P2P"):
                    await future
            # Where the barrier failed, Dask ends the shuffle with the last of its tasks. What the future has raised refers to it.
            future.release()
            await cluster.at_rest()
            found = await cluster.client.compute(shuffled(data, inputs=4))
            pd.testing.assert_frame_equal(found.sort_index(), data)

    run(main)


def test_outputs_meant_for_a_worker_that_is_gone_are_made_by_others() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            gone = "tcp://127.0.0.1:1"
            future = cluster.client.compute(shuffled(data), workers=[gone], allow_other_workers=True)
            found = await asyncio.wait_for(future, 15)
            pd.testing.assert_frame_equal(found.sort_index(), data)
            assert sum(cluster.part(worker).runs for worker in cluster.workers) == 2
            del future
            await cluster.at_rest()

    run(main)


def test_a_barrier_that_fails_before_it_hears_of_the_restart_is_run_again() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            scheduler, plugin = cluster.scheduler, cluster.scheduler.plugins["shuffle"]
            late: list[Callable[[], None]] = []

            async def barrier(id: str, run_id: int, consistent: bool) -> None:  # noqa: A002
                # As when a worker leaves: the restart is on its way to the workers, and the answer overtakes it.
                scheduler.handlers["shuffle_barrier"] = plugin.barrier
                for worker in cluster.workers:
                    fail = worker.stream_handlers["shuffle-fail"]
                    worker.stream_handlers["shuffle-fail"] = lambda fail=fail, **message: late.append(
                        partial(fail, **message)
                    )
                await plugin.barrier(id, run_id, consistent=False)
                while len(late) < len(cluster.workers):  # noqa: ASYNC110 - of a stream, which tells nobody
                    await asyncio.sleep(0.001)
                raise RuntimeError("a worker left")

            def arrive() -> None:
                for worker in cluster.workers:
                    plugin_there: Any = worker.plugins["shuffle"]
                    worker.stream_handlers["shuffle-fail"] = plugin_there.shuffle_fail
                while late:
                    late.pop()()

            def get(**message: Any) -> Any:
                arrive()
                return plugin.get(**message)

            scheduler.handlers.update(shuffle_barrier=barrier, shuffle_get=get)
            future = cluster.client.compute(shuffled(data))
            try:
                pd.testing.assert_frame_equal((await future).sort_index(), data)
            finally:
                arrive()
            assert all(cluster.part(worker).runs == 2 for worker in cluster.workers)
            del future
            await cluster.at_rest()

    run(main)


class Late:
    """Stands before the scheduler's stream to a worker, which is busy: what is sent comes later, all at once, in order."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.kept: list[Any] = []
        self.hears = asyncio.Event()

    def send(self, *messages: Any) -> None:
        self.kept += messages
        if any(message["op"] == "compute-task" for message in messages):
            self.hears.set()

    def arrive(self) -> None:
        self._stream.send(*self.kept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def test_the_end_of_an_old_barrier_does_not_end_the_new_run() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            scheduler, plugin = cluster.scheduler, cluster.scheduler.plugins["shuffle"]
            busy, other = cluster.workers
            inputs_go_on = Event("inputs-go-on")

            def hold(part: pd.DataFrame) -> pd.DataFrame:
                assert Event("inputs-go-on").wait(30)
                return part

            source = dd.from_pandas(data, npartitions=4).map_partitions(hold, meta=data.iloc[:0])
            collection = source.shuffle("key", npartitions=4, shuffle_method="p2p")
            asked, late = asyncio.Event(), Late(scheduler.stream_comms[busy.address])

            async def barrier(id: str, run_id: int, consistent: bool) -> None:  # noqa: A002
                # Run 1 ends while its barrier is here, as it does when a worker is lost.
                scheduler.handlers["shuffle_barrier"] = plugin.barrier
                scheduler.stream_comms[busy.address] = late
                await plugin.barrier(id, run_id, consistent=False)
                asked.set()
                await asyncio.Event().wait()

            scheduler.handlers["shuffle_barrier"] = barrier
            # All inputs are made and split by the other worker, which needs no word of the busy one.
            future = cluster.client.compute(collection, workers=[other.address])
            while not (  # noqa: ASYNC110 - a graph that arrives tells nobody
                barriers := [key for key in scheduler.tasks if str(key).startswith("shuffle-barrier")]
            ):
                await asyncio.sleep(0.001)
            (key,) = barriers
            both = {busy.address, other.address}
            scheduler.set_restrictions({ts.key: both for ts in scheduler.tasks[key].dependents})
            scheduler.set_restrictions({key: {busy.address}})
            await inputs_go_on.set()
            await asyncio.wait_for(asked.wait(), 15)
            # Its barrier of run 2 is on its way.
            await asyncio.wait_for(late.hears.wait(), 15)
            assert scheduler.tasks[key].state == "processing"
            scheduler.stream_comms[busy.address] = late._stream
            late.arrive()
            pd.testing.assert_frame_equal((await asyncio.wait_for(future, 20)).sort_index(), data)
            del future
            await cluster.at_rest()

    run(main)


def test_types_that_do_not_go_together_are_named_with_their_column() -> None:
    def make(number: int) -> pd.DataFrame:
        return pd.DataFrame({"key": range(4), "price": ["dear"] * 4 if number % 2 else [1.5] * 4})

    async def main() -> None:
        async with parts() as cluster:
            data = dd.from_map(make, range(4), meta=make(0).iloc[:0])
            future = cluster.client.compute(data.shuffle("key", npartitions=2, shuffle_method="p2p"))
            with pytest.raises(RuntimeError, match="failed during unpack phase") as caught:
                await future
            assert isinstance(caught.value.__cause__, TypeError)
            assert "Field price has incompatible types" in str(caught.value.__cause__)
            del future
            await cluster.at_rest()

    run(main)


def test_a_run_that_cannot_clean_up_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Shelves.close

    async def fail(self: Shelves) -> None:
        await close(self)
        raise OSError("on purpose")

    monkeypatch.setattr(Shelves, "close", fail)

    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            found = await cluster.client.compute(shuffled(data))
            pd.testing.assert_frame_equal(found.sort_index(), data)
            await cluster.at_rest()

    run(main)


def test_what_is_sent_aside_is_counted_for_the_shuffle_and_not_for_a_task() -> None:
    async def main() -> None:
        async with parts() as cluster:
            await cluster.client.compute(shuffled(frame()))
            await cluster.at_rest()
            for worker in cluster.workers:
                await beat(worker)
            found = dict(cluster.scheduler.cumulative_worker_metrics)
            carriers = [cluster.part(worker).carrier for worker in cluster.workers]
            for path, nbytes in (
                ("ucx", sum(carrier.ucx_nbytes for carrier in carriers)),
                ("comm", sum(carrier.comm_nbytes for carrier in carriers)),
            ):
                assert found.get(("p2p", "background-comms", f"send-{path}", "bytes"), 0) == nbytes
            assert sum(carrier.ucx_nbytes + carrier.comm_nbytes for carrier in carriers) > 0
            assert found["p2p", "background-comms", "send", "count"] == sum(
                cluster.part(worker).messages for worker in cluster.workers
            )
            assert found["p2p", "background-comms", "send", "seconds"] > 0
            assert ("p2p", "background-comms", "serialize", "seconds") in found
            # Tasks wait for the limit on bytes under way, and for shards that are read.
            waited = {key[2] for key in found if key[0] == "execute" and key[2].startswith("p2p-")}
            assert {"p2p-comms-limiter", "p2p-shards-read"} <= waited
            assert not [key for key in found if key[:2] == ("execute", "shuffle-transfer") and key[2] == "serialize"]
            span = cluster.scheduler.extensions["spans"].spans_search_by_name["default",][0]
            assert span.cumulative_worker_metrics["p2p", "background-comms", "send", "seconds"] > 0

    run(main)


def test_garbage_from_a_peer_is_refused_and_does_no_harm() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            reached, go_on = threading.Event(), threading.Event()
            join = FrameRun._join

            def hold(self: FrameRun, partition_id: int, buffers: list[Any]) -> pd.DataFrame:
                # In the middle of an output: until this is there, the run is.
                reached.set()
                assert go_on.wait(30)
                return join(self, partition_id, buffers)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(FrameRun, "_join", hold)
                future = cluster.client.compute(shuffled(data))
                assert await asyncio.to_thread(reached.wait, 30)
                try:
                    run = cluster.runs()[0]
                    for garbage in ([b"x"], [b"x", b"y"], [b"GPSH" + bytes(40), b""]):
                        with pytest.raises(WireError):
                            await run.receive(garbage)
                finally:
                    go_on.set()
                pd.testing.assert_frame_equal((await future).sort_index(), data)
            # A peer that is late is told so, and does not try again.
            await asyncio.wait_for(run._closed_event.wait(), 10)
            reply: Any = await run.receive([])
            assert reply["status"] == "error"
            assert "P2PConsistencyError" in reply["exception_text"]

    run(main)


def test_large_merges_are_those_of_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[bool] = []

    def noted(*sides: Any) -> Any:
        merged = inner_merge(*sides)
        done.append(merged is not None)
        return merged

    monkeypatch.setattr(merging, "inner_merge", noted)

    async def main() -> None:
        async with parts() as cluster:
            rng = np.random.default_rng(0)
            rows = 4 * merging.ROWS_MIN
            left = pd.DataFrame({"key": rng.integers(0, rows, rows), "left": np.arange(rows)})
            right = pd.DataFrame({"key": rng.permutation(rows)[: rows // 2], "right": rng.random(rows // 2)})
            merged = dd.from_pandas(left, npartitions=2).merge(
                dd.from_pandas(right, npartitions=2), on="key", shuffle_method="p2p"
            )
            found = await cluster.client.compute(merged)
            expected = left.merge(right, on="key")
            order = ["left"]
            pd.testing.assert_frame_equal(
                found.sort_values(order, ignore_index=True), expected.sort_values(order, ignore_index=True)
            )
            assert done == [True, True]

    run(main)


def test_stock_where_a_worker_lacks_our_part() -> None:
    async def main() -> None:
        async with parts() as cluster:
            data = frame()
            cluster.shuffle.set_capable(cluster.workers[0].address, False)
            found = await cluster.client.compute(shuffled(data))
            pd.testing.assert_frame_equal(found.sort_index(), data)
            assert all(cluster.part(worker).runs == 0 for worker in cluster.workers)
            cluster.shuffle.set_capable(cluster.workers[0].address, True)
            cluster.shuffle.remove_worker("tcp://127.0.0.1:1")
            await cluster.client.compute(shuffled(data, outputs=3))
            assert all(cluster.part(worker).runs == 1 for worker in cluster.workers)

    run(main)


@pytest.mark.parametrize("ends", ["with our part", "without it", "it leaves", "we leave"])
def test_a_new_run_waits_for_a_worker_that_is_joining(ends: str) -> None:
    async def main() -> None:
        async with parts() as cluster:
            late = cluster.workers[0].address
            joining = {late}
            cluster.shuffle._joining = joining.__contains__
            cluster.shuffle._capable.discard(late)
            data = frame()
            future = cluster.client.compute(shuffled(data))
            while not cluster.shuffle._since:  # noqa: ASYNC110 - that somebody waits sets no event
                await asyncio.sleep(0.01)
            assert not cluster.scheduler.plugins["shuffle"].active_shuffles
            joining.clear()
            if ends == "it leaves":
                # Dask has forgotten it by then.
                cluster.scheduler.add_plugin(RemovalPlugin(cluster.shuffle))
                await cluster.workers[0].close()
            elif ends == "we leave":
                cluster.shuffle.stop()
            else:
                cluster.shuffle.set_capable(late, ends == "with our part")
            found = await future
            pd.testing.assert_frame_equal(found.sort_index(), data)
            ours = ends in ("with our part", "it leaves")
            assert [cluster.part(worker).runs for worker in cluster.workers[1:]] == [int(ours)]
            assert not cluster.shuffle._since

    run(main)


class RemovalPlugin(SchedulerPlugin):
    name = "removal"

    def __init__(self, shuffle: ShuffleScheduler) -> None:
        self._shuffle = shuffle

    def remove_worker(self, scheduler: Any, worker: str, **kwargs: Any) -> None:
        self._shuffle.remove_worker(worker)


def test_a_worker_that_keeps_silent_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shuffle_scheduler, "JOINING_LIMIT_S", 0.2)

    async def main() -> None:
        async with parts() as cluster:
            late = cluster.workers[0].address
            cluster.shuffle._joining = late.__eq__
            cluster.shuffle._capable.discard(late)
            data = frame()
            for outputs in (6, 3):
                found = await cluster.client.compute(shuffled(data, outputs=outputs))
                pd.testing.assert_frame_equal(found.sort_index(), data)
            assert all(cluster.part(worker).runs == 0 for worker in cluster.workers)
            told = [record.getMessage() for record in caplog.records if "hear from" in record.getMessage()]
            # Each task that asked has waited; the second shuffle's have not.
            assert told
            assert all(late in line for line in told)
            began = asyncio.get_running_loop().time()
            await cluster.shuffle.joined("another")
            assert asyncio.get_running_loop().time() - began < 0.1

    run(main)


def test_stop_leaves_no_trace() -> None:
    async def main() -> None:
        async with parts() as cluster:
            plugin = cluster.scheduler.plugins["shuffle"]
            assert "_retrieve_spec" in vars(plugin)
            cluster.shuffle.start()  # Twice is once.
            cluster.shuffle.stop()
            cluster.shuffle.stop()
            assert "_retrieve_spec" not in vars(plugin)
            assert "gpurt_shuffle_decline" not in cluster.scheduler.handlers
            assert cluster.scheduler.handlers["shuffle_get_or_create"] == plugin.get_or_create
            data = frame()
            pd.testing.assert_frame_equal((await cluster.client.compute(shuffled(data))).sort_index(), data)
            assert all(cluster.part(worker).runs == 0 for worker in cluster.workers)

    run(main)


def test_stop_ends_though_a_run_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with parts() as cluster:
            data, begun, stopped = frame(), asyncio.Event(), asyncio.Event()
            begin, close = FrameRun.__init__, Shelves.close

            def note(self: FrameRun, *args: Any, **kwargs: Any) -> None:
                begin(self, *args, **kwargs)
                begun.set()

            async def move(self: Shelves, *_: Any) -> None:
                # A worker that closes ends its runs, and then us, while what they do last is in a thread.
                await closed.offload(id, self)

            async def close_late(self: Shelves) -> None:
                await stopped.wait()
                await close(self)

            def hold(part: pd.DataFrame) -> pd.DataFrame:
                if len(part) and part.index[0]:
                    assert Event("closed-go-on").wait(30)
                return part

            monkeypatch.setattr(FrameRun, "__init__", note)
            source = dd.from_pandas(data, npartitions=4, sort=False).map_partitions(hold, meta=data.iloc[:0])
            future = cluster.client.compute(source.shuffle("key", npartitions=4, shuffle_method="p2p"))
            await begun.wait()
            closed = cluster.runs()[0]
            monkeypatch.setattr(Shelves, "move", move)
            monkeypatch.setattr(Shelves, "close", close_late)
            closing = asyncio.create_task(closed.close())
            await asyncio.sleep(0)
            with pytest.raises(ShuffleClosedError):
                await closed.move()
            for part in cluster.equipped:
                await part.stop()
            assert closed in cluster.runs()
            stopped.set()
            await Event("closed-go-on").set()
            await future.cancel()
            await closing
            for run in cluster.runs():
                await asyncio.wait_for(run._closed_event.wait(), 10)
            assert all("gpurt_shuffle_take" not in worker.handlers for worker in cluster.workers)

    run(main)


def test_what_is_not_known_is_not_supported() -> None:
    assert not supports(object())
