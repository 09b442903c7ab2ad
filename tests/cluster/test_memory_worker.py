"""The tiers under real workers: data larger than memory, losses, hooks, and the way back to stock."""

from __future__ import annotations

import asyncio
import os
from collections import UserDict
from collections.abc import AsyncIterator, Callable, Hashable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import WITHOUT_MONITOR, local_cluster
from distributed import Client, Scheduler, Worker, wait
from distributed.utils_test import gen_test
from distributed.worker import get_data_from_worker

import dask_gpurt
from dask_gpurt.config import MemorySettings
from dask_gpurt.errors import CorruptDataError, GpurtError, SpillError
from dask_gpurt.memory.horizon import RECENT, SERVED
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.manager import MemoryManager
from dask_gpurt.memory.mapping import TieredMapping
from dask_gpurt.memory.mover import Mover


async def start(settings: MemorySettings, dask_worker: Any = None) -> None:
    manager = dask_worker.extensions["test-memory"] = MemoryManager(dask_worker, settings)
    await manager.start()


async def stop(dask_worker: Any = None) -> tuple[str, int]:
    await dask_worker.extensions.pop("test-memory").stop()
    assert dask_worker.data is dask_worker.state.data is dask_worker.memory_manager.data
    assert "execute" not in vars(dask_worker)
    return type(dask_worker.data).__name__, len(dask_worker.data)


def metrics(dask_worker: Any = None) -> dict[str, int]:
    found: dict[str, int] = dask_worker.extensions["test-memory"].metrics()
    return found


def spilled_files(dask_worker: Any = None) -> list[str]:
    return [str(path) for path in Path(dask_worker.local_directory).glob("gpurt/gpurt-spill-*/*.blk")]


def total(client: Client, figure: str) -> int:
    return sum(m[figure] for m in client.run(metrics).values())


@pytest.fixture
def client() -> Iterator[Client]:
    """Two processes, and stock's memory monitor kept out, so that only managed memory decides."""
    with (
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(2, memory_limit="50 MB") as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_persisted_array_larger_than_memory(client: Client) -> None:
    client.run(start, MemorySettings(host_limit=4_000_000))
    n = 2000
    expected = np.arange(n * n, dtype="f8").reshape(n, n)
    x = da.arange(n * n, dtype="f8", chunks=n * 250).reshape(n, n).rechunk((250, 250)).persist()
    wait(x)
    assert total(client, "host_written_nbytes") > 8_000_000
    np.testing.assert_array_equal((x + x.T).compute(), expected + expected.T)
    assert total(client, "host_read_nbytes") > 0
    np.testing.assert_array_equal(x.compute(), expected)
    client.run(settle)
    held = total(client, "host_held_nbytes")
    assert held <= 2 * 4_000_000 + 4 * 250 * 250 * 8
    kinds = client.run(stop)
    assert {kind for kind, _ in kinds.values()} == {"SpillBuffer"}
    np.testing.assert_array_equal(x.compute(), expected)


def test_install_and_uninstall_with_data_in_memory_and_on_disk(client: Client) -> None:
    n = 3000
    expected = np.arange(n * n, dtype="f8").reshape(n, n)
    # 72 MB; each worker's stock store takes 30 MB in memory, the rest it has spilled.
    x = da.arange(n * n, dtype="f8", chunks=n * 250).reshape(n, n).rechunk((250, 1500)).persist()
    frame = dd.from_pandas(pd.DataFrame({"a": range(10_000), "b": ["x"] * 10_000}), npartitions=4).persist()
    scattered = client.scatter({"scattered": list(range(1000))})
    wait([x, frame])
    truth_of_frame = frame.compute()
    client.run(start, MemorySettings(host_limit=6_000_000))
    np.testing.assert_array_equal(x.sum(axis=0).compute(), expected.sum(axis=0))
    y = (x + 1).persist()
    wait(y)
    assert total(client, "host_written_nbytes") > 10_000_000
    client.run(stop)
    np.testing.assert_array_equal(y.sum(axis=1).compute(), (expected + 1).sum(axis=1))
    client.run(start, MemorySettings(host_limit=6_000_000))
    client.run(stop)
    for array, truth in ((x, expected), (y, expected + 1)):
        np.testing.assert_array_equal(array.compute(), truth)
    pd.testing.assert_frame_equal(frame.compute(), truth_of_frame)
    assert client.gather(scattered)["scattered"] == list(range(1000))
    assert not any(client.run(spilled_files).values())


def test_uninstall_while_tasks_run(client: Client) -> None:
    client.run(start, MemorySettings(host_limit=3_000_000))
    x = da.ones((2000, 2000), chunks=250).persist()
    wait(x)
    result = client.compute(((x + x.T) @ (x - 0.5)).sum())
    client.run(stop)
    client.run(start, MemorySettings(host_limit=3_000_000))
    assert result.result() == 2000.0**3 * 2 * 0.5
    client.run(stop)


async def settle(dask_worker: Any = None) -> None:
    """Wait until what is on its way down has arrived."""
    await dask_worker.extensions["test-memory"]._host.settle()


def damage(dask_worker: Any = None) -> int:
    files = spilled_files(dask_worker)
    for number, path in enumerate(files):
        match number % 3:
            case 0:
                os.unlink(path)
            case 1:
                os.truncate(path, 10)
            case _:
                with open(path, "r+b") as file:
                    file.seek(100)
                    file.write(b"\xff\xff\xff")
    return len(files)


@pytest.mark.parametrize("how", ["local", "peers", "gather"])
def test_damaged_data_is_computed_again(client: Client, how: str) -> None:
    client.run(start, MemorySettings(host_limit=2_000_000))
    x = da.arange(1_000_000, dtype="f8", chunks=25_000).persist()
    wait(x)
    client.run(settle)
    assert sum(client.run(damage).values()) >= 15
    if how == "local":
        assert (x * 2).sum().compute() == 1_000_000 * 999_999
    elif how == "peers":
        y = x.reshape(1000, 1000).rechunk((1000, 100))
        np.testing.assert_array_equal(y.compute(), np.arange(1e6).reshape(1000, 1000))
    else:
        np.testing.assert_array_equal(x.compute(), np.arange(1e6))
    assert total(client, "host_corrupt_blocks") > 0
    # And the cluster works on.
    assert da.ones(1000, chunks=10).sum().compute() == 1000
    client.run(stop)


def double(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return value * 2


def test_what_cannot_be_computed_again_fails_clearly(client: Client) -> None:
    client.run(start, MemorySettings(host_limit=2_000_000))
    futures = client.scatter([np.full(100_000, n, dtype="f8") for n in range(10)])
    wait(futures)
    client.run(settle)
    assert sum(client.run(damage).values()) > 0
    statuses = set()
    for number, future in enumerate(futures):
        result = client.submit(double, future, pure=False)
        wait(result, timeout=30)
        statuses.add(result.status)
        if result.status == "finished":
            assert (result.result() == number * 2).all()
        else:
            assert isinstance(result.exception(), CorruptDataError)
            # Elsewhere, and asked for again, the answer is the same.
            (there,) = client.who_has(future)[future.key]
            (elsewhere,) = set(client.scheduler_info()["workers"]) - {there}
            again = client.submit(double, future, pure=False, workers=[elsewhere])
            wait(again, timeout=30)
            assert again.status == "error"
            with pytest.raises(GpurtError, match="cannot be computed again"):
                future.result(timeout=10)
    assert statuses == {"finished", "error"}
    client.run(stop)


def test_actors_and_odd_values_work_as_before(client: Client) -> None:
    client.run(start, MemorySettings(host_limit=1_000_000))

    class Counter:
        def __init__(self) -> None:
            self.n = 0

        def add(self, array: Any) -> int:
            self.n += len(array)
            return self.n

    counter: Any = client.submit(Counter, actor=True).result()
    assert counter.add(np.zeros(10)).result() == 10
    values = [client.submit(np.zeros, 200_000, pure=False) for _ in range(10)]
    wait(values)
    assert counter.add(np.zeros(5)).result() == 15
    odd = [client.submit(lambda v=v: v) for v in (None, 1, "x", {"a": (1, 2)}, [np.arange(3)])]
    assert repr(client.gather(odd)) == repr([None, 1, "x", {"a": (1, 2)}, [np.arange(3)]])
    locks = client.submit(lambda: [__import__("threading").Lock(), np.zeros(200_000)])
    assert client.submit(len, locks, workers=list(client.who_has(locks)[locks.key])).result() == 2
    client.run(stop)


async def async_poll(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - keys are freed by a message, which sets no event
            await asyncio.sleep(0.01)


@gen_test(timeout=60)
async def test_the_figures_of_the_dashboard_are_right() -> None:
    async with (
        local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        worker = cluster.workers[0]
        stock = worker.data
        manager = MemoryManager(worker, MemorySettings(host_limit=1_000_000))
        await manager.start()
        assert isinstance(worker.data, TieredMapping)
        futures = [client.submit(np.full, 50_000, n) for n in range(10)]
        await wait(futures)
        await asyncio.gather(*(m.settle() for m in manager._movers()))
        found = await worker.get_metrics()
        assert found["managed_bytes"] == 4_000_000
        assert found["managed_bytes"] - found["spilled_bytes"]["memory"] == manager.metrics()["host_held_nbytes"]
        assert found["spilled_bytes"]["disk"] == 8 * 400_000
        assert repr(manager).startswith("<MemoryManager of tcp://127.0.0.1")
        results = await client.gather(futures)
        assert [int(r[0]) for r in results] == list(range(10))
        for future in futures:
            future.release()
        await async_poll(lambda: not worker.data)
        assert manager.metrics()["host_held_nbytes"] == 0
        await manager.stop()
        await manager.stop()
        assert worker.data is stock


@gen_test(timeout=60)
async def test_a_worker_that_closes_serves_what_it_has_in_memory_to_the_end() -> None:
    async with (
        local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        worker = cluster.workers[0]
        manager = MemoryManager(worker, MemorySettings())
        await manager.start()
        futures = [client.submit(np.full, 50_000, n) for n in range(3)]
        await wait(futures)
        await manager.close()
        assert not isinstance(worker.data, TieredMapping)
        worker.validate_state()
        assert [int(result[0]) for result in await client.gather(futures)] == [0, 1, 2]


@gen_test(timeout=60)
async def test_a_peer_that_was_told_to_come_back_later_was_not_served() -> None:
    async with (
        local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        worker = cluster.workers[0]
        manager = MemoryManager(worker, MemorySettings())
        await manager.start()
        assert manager._horizon is not None
        uses = manager._horizon.uses
        future = client.submit(np.full, 50_000, 1)
        await wait(future)
        peer = "tcp://127.0.0.1:1"
        manager._horizon.tell([(future.key, None, False, [("user", peer)], 0)])
        limit = worker.transfer_outgoing_count_limit
        worker.transfer_outgoing_count_limit = 0
        assert await get_data_from_worker(worker.rpc, [future.key], worker.address, who=peer) == {"status": "busy"}
        assert uses([future.key]) == [RECENT]
        worker.transfer_outgoing_count_limit = limit
        answer: Any = await get_data_from_worker(worker.rpc, [future.key], worker.address, who=peer)
        assert int(answer["data"][future.key][0]) == 1
        # It sends, and then takes note of it.
        await async_poll(lambda: uses([future.key]) == [SERVED])
        await manager.stop()


@dataclass
class Lost:
    """A value whose copy below is gone."""

    client: Any
    worker: Worker
    manager: MemoryManager
    host: Mover
    future: Any
    #: The number that it is full of.
    number: int
    #: What the worker has not been told yet.
    late: list[tuple[Hashable, Exception]]


@asynccontextmanager
async def value_lost(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lost]:
    """Lose a value, as the mover knows; the worker is not told."""
    async with (
        local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        worker = cluster.workers[0]
        manager = MemoryManager(worker, MemorySettings(host_limit=1_000_000))
        await manager.start()
        host = manager._host
        assert host is not None
        futures = [client.submit(np.full, 50_000, number) for number in range(5)]
        await wait(futures)
        await host.settle()
        number = next(number for number, future in enumerate(futures) if future.key in host.absent)
        for path in spilled_files(worker):
            os.unlink(path)
        late: list[tuple[Hashable, Exception]] = []
        monkeypatch.setattr(host, "_lost", lambda name, error: late.append((name, error)))
        with pytest.raises(CorruptDataError):
            await host.ensure([futures[number].key])
        yield Lost(client, worker, manager, host, futures[number], number, late)
        await manager.stop()


@gen_test(timeout=60)
async def test_what_is_lost_is_no_input_before_the_worker_knows_that(monkeypatch: pytest.MonkeyPatch) -> None:
    async with value_lost(monkeypatch) as lost:
        given_up = asyncio.Event()
        give_up = lost.manager._give_up

        def give_up_and_tell(*args: Any) -> Any:
            given_up.set()
            return give_up(*args)

        monkeypatch.setattr(lost.manager, "_give_up", give_up_and_tell)
        worker, key = lost.worker, lost.future.key
        answer: Any = await get_data_from_worker(worker.rpc, [key], worker.address, who="tcp://127.0.0.1:1")
        assert answer["data"] == {}
        result = lost.client.submit(double, lost.future)
        await asyncio.wait_for(given_up.wait(), 10)
        await async_poll(lambda: bool(lost.late))
        monkeypatch.undo()
        for name, error in lost.late:
            lost.manager._on_lost(name, error)
        assert (await result == 2 * lost.number).all()


@gen_test(timeout=60)
async def test_a_task_waits_for_the_end_of_a_doubt_that_came_while_it_waited_for_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with value_lost(monkeypatch) as lost:
        asked, answered = asyncio.Event(), asyncio.Event()
        reserve = lost.host.reserve

        async def know_of_it_and_reserve(nbytes: int, **options: Any) -> Any:
            while lost.late:
                lost.manager._on_lost(*lost.late.pop())
            return await reserve(nbytes, **options)

        async def can_make(key: Hashable) -> bool:
            asked.set()
            await answered.wait()
            return True

        await async_poll(lambda: bool(lost.late))
        # As if a peer had made it that has left.
        monkeypatch.setattr("dask_gpurt.seams.is_pure_data", lambda *_: True)
        monkeypatch.setattr(lost.manager._watch, "can_make", can_make)
        monkeypatch.setattr(lost.host, "reserve", know_of_it_and_reserve)
        result = lost.client.submit(double, lost.future)
        await asyncio.wait_for(asked.wait(), 10)
        monkeypatch.undo()
        answered.set()
        assert (await result == 2 * lost.number).all()


@gen_test(timeout=60)
async def test_a_key_that_is_deleted_while_data_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        worker = cluster.workers[0]
        stock = worker.data
        manager = MemoryManager(worker, MemorySettings(host_limit=1_000_000))
        await manager.start()
        futures = {key: client.submit(np.full, 50_000, n, key=key) for n, key in enumerate("abcdef")}
        await wait(list(futures.values()))
        ensure = Mover.ensure

        async def ensure_late(mover: Mover, names: Any, **options: Any) -> Any:
            pinned = await ensure(mover, names, **options)
            if "c" in names:
                futures.pop("c").release()
                await async_poll(lambda: "c" not in worker.data)
            return pinned

        monkeypatch.setattr(Mover, "ensure", ensure_late)
        await manager.stop()
        assert worker.data is stock
        assert sorted(stock) == ["a", "b", "d", "e", "f"]
        for number, key in enumerate("abcdef"):
            if key != "c":
                assert (stock[key] == number).all()


@gen_test(timeout=60)
async def test_a_worker_that_cannot_have_it_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    async with local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster:
        worker = cluster.workers[0]
        stock = worker.data
        manager = MemoryManager(worker, MemorySettings(directory=str(tmp_path / "file")))
        with pytest.raises(SpillError, match="cannot keep spilled data"):
            await manager.start()
        assert worker.data is stock
        assert "execute" not in vars(worker)
        await manager.stop()
        second = MemoryManager(worker, MemorySettings())
        await second.start()
        await second.close()
        assert worker.data is stock


@gen_test(timeout=60)
async def test_without_a_limit_nothing_is_touched() -> None:
    async with local_cluster(1, processes=False, memory_limit=0, asynchronous=True) as cluster:
        worker = cluster.workers[0]
        stock = worker.data
        manager = MemoryManager(worker, MemorySettings())
        await manager.start()
        assert worker.data is stock
        store = manager.store
        store.put("a", [b"x"], await store.reserve(1))
        assert await store.take("a") == [b"x"]
        await manager.stop()


def limits(dask_worker: Any = None) -> tuple[int, int]:
    """The limit now, and the most that it may be."""
    manager = dask_worker.extensions["test-memory"]
    found = manager.ledger.limit(Tier.HOST)
    assert found is not None
    return found, int(dask_worker.memory_manager.memory_limit * dask_worker.memory_manager.memory_target_fraction)


async def adapted(nbytes: int, dask_worker: Any = None) -> None:
    """Wait until the limit is about ``nbytes``."""
    manager = dask_worker.extensions["test-memory"]

    async def settled() -> None:
        # A timer sets the limit, and tells nobody.
        while abs(manager.ledger.limit(Tier.HOST) - nbytes) > 60_000_000:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    await asyncio.wait_for(settled(), 20)


def occupy(nbytes: int, dask_worker: Any = None) -> None:
    """Take memory that Dask knows nothing of; nothing gives it back."""
    dask_worker.occupied = np.ones(nbytes, dtype="u1") if nbytes else None


def test_what_is_no_data_takes_its_room_from_the_data() -> None:
    with (
        local_cluster(1, memory_limit=2_000_000_000) as cluster,
        Client(cluster) as client,
    ):
        client.run(start, MemorySettings())
        ((full, most),) = client.run(limits).values()
        assert full == most == 1_200_000_000
        client.run(occupy, 1_000_000_000)
        # The process is to stay below 0.7: 1.4 GB, of which 1 GB and the code are no data.
        (rest,) = client.run(beside).values()
        client.run(adapted, 1_400_000_000 - rest)
        data = client.map(np.ones, [12_500_000] * 8, pure=False)
        wait(data)
        assert total(client, "host_written_nbytes") >= 400_000_000
        (process_nbytes,) = client.run(lambda dask_worker: dask_worker.monitor.get_process_memory()).values()
        assert process_nbytes < 1_600_000_000, "no worker is paused for it"
        client.run(occupy, 0)
        client.run(adapted, most)
        assert [future.result().sum() for future in data] == [12_500_000] * 8
        client.run(stop)


def beside(dask_worker: Any = None) -> int:
    """Bytes of the process that are not data."""
    held = dask_worker.extensions["test-memory"].ledger.used(Tier.HOST)
    return int(dask_worker.monitor.get_process_memory() - held)


@gen_test()
async def test_a_store_that_was_chosen_for_a_worker_is_left_to_it() -> None:
    async with (
        Scheduler(host="127.0.0.1", dashboard_address="127.0.0.1:0") as scheduler,
        Worker(scheduler.address, data=UserDict, dashboard_address="127.0.0.1:0") as worker,
        Client(scheduler.address, asynchronous=True) as client,
    ):
        pending: Any = dask_gpurt.install(client)
        answer = await pending
        assert not answer.installed("memory")
        assert "UserDict was chosen" in str(answer)
        assert answer.installed("shuffle")
        assert type(worker.data) is UserDict
        assert await client.submit(sum, [1, 2]) == 3
