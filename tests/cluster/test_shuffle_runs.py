"""Dask's p2p over our data plane, on real processes: the same answers, and what is not ours goes to stock."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from dask.dataframe.shuffle import partitioning_index
from distributed import Client, Event

import dask_gpurt
from dask_gpurt.shuffle.dataframe import KERNEL_ROWS

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    """A cluster for all tests of this module, with nothing of ours."""
    with (
        dask.config.set({"distributed.scheduler.validate": True, "distributed.worker.validate": True}),
        local_cluster(2, silence_logs=False) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def plain(shared: Client) -> Iterator[Client]:
    """The cluster without us, and nothing left behind afterwards."""
    yield shared
    left = shared.run(leftovers) if any(shared.run(has_part).values()) else {}
    dask_gpurt.uninstall(shared)
    assert all(left == (0, 0) for left in left.values()), left


@pytest.fixture
def ours(plain: Client) -> Client:
    """The cluster with our shuffle, and nothing else of ours."""
    dask_gpurt.install(plain, placement=False, memory=False)
    return plain


def has_part(dask_worker: Any) -> bool:
    return "gpurt" in dask_worker.extensions


async def leftovers(dask_worker: Any) -> tuple[int, int]:
    """Count the names in the store, and the bytes under way, once no run is active."""
    import asyncio

    part = dask_worker.extensions["gpurt"].shuffle
    for run in list(part._runs.values()):
        await asyncio.wait_for(run._closed_event.wait(), 10)
    return len(part.store._held), part.window.used_nbytes


def totals(client: Client) -> dict[str, float]:
    found = client.run(lambda dask_worker: dask_worker.extensions["gpurt"].shuffle.metrics())
    return {key: sum(metrics[key] for metrics in found.values()) for key in next(iter(found.values()))}


def frame(rows: int = 5000, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "key": rng.integers(0, 200, rows),
            "value": rng.random(rows),
            "name": pd.Series([["a", "b", None][i] for i in rng.integers(0, 3, rows)], dtype="str"),
            "kind": pd.Categorical(rng.choice(["u", "v", "w"], rows)),
            "when": pd.to_datetime(rng.integers(0, 10**9, rows), unit="s", utc=True),
            "maybe": pd.array([None if i == 9 else i for i in rng.integers(0, 10, rows)], dtype="Int64"),
        }
    )


def partitions(client: Client, collection: Any) -> list[pd.DataFrame]:
    return client.gather(client.compute(collection.to_delayed(), sync=False), errors="raise")  # type: ignore[no-any-return]


def test_every_output_partition_is_what_stock_makes(plain: Client) -> None:
    collection = dd.from_pandas(frame(), npartitions=7, sort=False).shuffle("key", npartitions=5, shuffle_method="p2p")
    expected = partitions(plain, collection)
    dask_gpurt.install(plain, placement=False, memory=False)
    found = partitions(plain, collection)
    assert totals(plain)["runs"] == 2
    assert len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        pd.testing.assert_frame_equal(one, other)
    moved = totals(plain)
    assert moved["bytes_sent"] > moved["bytes_received"] > 0
    assert moved["bytes_local"] > 0


def test_merge_sort_and_set_index_agree_with_pandas(ours: Client) -> None:
    left, right = frame(3000), frame(500, seed=1).rename(columns={"value": "other"})[["key", "other"]]
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        dleft, dright = dd.from_pandas(left, npartitions=6), dd.from_pandas(right, npartitions=3)
        merged = dleft.merge(dright, on="key", how="left", shuffle_method="p2p", broadcast=False).compute()
        expected = left.merge(right, on="key", how="left")
        order = ["key", "value", "other"]
        pd.testing.assert_frame_equal(
            merged[order].sort_values(order, ignore_index=True), expected[order].sort_values(order, ignore_index=True)
        )
        indexed = dleft.set_index("value", shuffle_method="p2p")["key"].compute()
        pd.testing.assert_series_equal(indexed, left.set_index("value")["key"].sort_index())
        ordered = dleft.sort_values("value", shuffle_method="p2p")["key"].compute()
        pd.testing.assert_series_equal(ordered, left.sort_values("value")["key"])
    assert totals(ours)["runs"] == 2 * 4


def compiled() -> bool:
    """Wait for the compiler; say whether Dask's own function still stands where Dask calls it."""
    import importlib
    import threading

    for thread in threading.enumerate():
        if thread.name == "gpurt-compile":
            thread.join(60)
    module = importlib.import_module("dask.dataframe.dask_expr._shuffle")
    return not hasattr(module.partitioning_index, "__wrapped__")


def test_large_keys_are_hashed_by_the_compiled_loop_until_it_is_uninstalled(ours: Client) -> None:
    collection = dd.from_pandas(frame(4 * KERNEL_ROWS), npartitions=4).persist()
    data = collection.compute()
    # Dask makes floats of the numbers among the keys.
    expected = partitioning_index(data[["key", "name"]].astype({"key": "f8"}), 4)
    # The first one has it compiled, the second one begins to use it.
    for _ in range(3):
        outputs = partitions(ours, collection.shuffle(["key", "name"], shuffle_method="p2p"))
        for number, output in enumerate(outputs):
            pd.testing.assert_frame_equal(output.sort_index(), data[expected == number])
        stock = ours.run(compiled)
    assert not any(stock.values())
    dask_gpurt.uninstall(ours)
    assert all(ours.run(compiled).values())


def test_some_outputs_alone_can_be_asked_for(ours: Client) -> None:
    collection = dd.from_pandas(frame(), npartitions=4, sort=False).shuffle("key", npartitions=6, shuffle_method="p2p")
    whole = partitions(ours, collection)
    some = partitions(ours, collection.partitions[[4, 1]])
    pd.testing.assert_frame_equal(some[0], whole[4])
    pd.testing.assert_frame_equal(some[1], whole[1])


def test_empty_partitions_keep_their_types(ours: Client) -> None:
    data = frame(40).assign(key=1)
    collection = dd.from_pandas(data, npartitions=4, sort=False)
    collection = collection[collection["value"] > 0.5].shuffle("key", npartitions=6, shuffle_method="p2p")
    found = partitions(ours, collection)
    assert sorted(len(part) for part in found)[:5] == [0] * 5
    assert all((part.dtypes == found[0].dtypes).all() for part in found)
    assert sum(map(len, found)) == (data["value"] > 0.5).sum()


@pytest.mark.parametrize("dtype", ["f8", "i2", "?", "M8[s]", "S4", [("a", "i4"), ("b", "f8")]], ids=str)
def test_rechunk_agrees_with_numpy(ours: Client, dtype: Any) -> None:
    array = np.arange(60 * 40).astype("i8").astype("f8" if isinstance(dtype, list) else dtype).reshape(60, 40)
    if isinstance(dtype, list):
        array = np.array([(x, x) for x in array.ravel()], dtype=dtype).reshape(60, 40)
    found = da.from_array(array, chunks=(7, 40)).rechunk((60, 9), method="p2p").compute()
    assert found.dtype == array.dtype
    assert (found == array).all()
    assert totals(ours)["runs"] == 2


def test_rechunk_of_objects_goes_to_stock(ours: Client) -> None:
    array = np.array([["a", 1, None], [2.5, "b", ()]] * 20, dtype=object)
    found = da.from_array(array, chunks=(4, 3)).rechunk((40, 1), method="p2p").compute()
    assert found.tolist() == array.tolist()
    assert totals(ours)["bytes_sent"] == 0


def test_subclasses_of_arrays_go_to_stock(ours: Client) -> None:
    array = da.from_array(np.arange(400.0).reshape(20, 20), chunks=(5, 20))
    masked = da.ma.masked_greater(array, 100).rechunk((20, 5), method="p2p").compute()
    assert masked.sum() == np.arange(101.0).sum()
    assert totals(ours)["bytes_sent"] == 0


def test_types_that_stock_refuses_are_refused(ours: Client) -> None:
    data = pd.DataFrame({"key": range(10), "z": np.arange(10) * 1j})
    with pytest.raises((TypeError, RuntimeError), match="complex"):
        dd.from_pandas(data, npartitions=2).shuffle("key", shuffle_method="p2p").compute()


def test_a_tiny_limit_makes_it_slow_and_not_stuck(plain: Client) -> None:
    dask_gpurt.install(plain, placement=False, memory=False, config={"shuffle.send-limit": 100})
    data = frame()
    found = dd.from_pandas(data, npartitions=9).shuffle("key", npartitions=4, shuffle_method="p2p").compute()
    pd.testing.assert_series_equal(found["value"].sort_index(), data["value"])


def test_a_run_ends_on_the_plane_on_which_it_began(plain: Client) -> None:
    data = frame()

    def hold(part: pd.DataFrame, name: str) -> pd.DataFrame:
        if len(part):
            Event(name + "-reached").set()
            assert Event(name).wait(60)
        return part

    def begin(name: str) -> Any:
        blocked = dd.from_pandas(data, npartitions=6, sort=False).map_partitions(hold, name, meta=data.iloc[:0])
        future = plain.compute(blocked.shuffle("key", npartitions=4, shuffle_method="p2p")["value"])
        assert Event(name + "-reached").wait(60)
        return future

    stock = begin("before")
    dask_gpurt.install(plain, placement=False, memory=False)
    Event("before").set()
    pd.testing.assert_series_equal(stock.result(60).sort_index(), data["value"])
    ours = begin("during")
    dask_gpurt.uninstall(plain)
    Event("during").set()
    pd.testing.assert_series_equal(ours.result(60).sort_index(), data["value"])


def test_a_run_keeps_its_shards_when_it_is_uninstalled_between_transfer_and_unpack(plain: Client) -> None:
    data = frame()
    dask_gpurt.install(plain, placement=False, memory=True)

    def hold(part: pd.DataFrame) -> pd.DataFrame:
        Event("unpacking").set()
        assert Event("unpack").wait(60)
        return part

    shuffled = dd.from_pandas(data, npartitions=6, sort=False).shuffle("key", npartitions=8, shuffle_method="p2p")
    future = plain.compute(shuffled.map_partitions(hold, meta=shuffled)["value"])
    assert Event("unpacking").wait(60)
    assert totals(plain)["runs"] == 2
    dask_gpurt.uninstall(plain)
    Event("unpack").set()
    pd.testing.assert_series_equal(future.result(60).sort_index(), data["value"])


def test_the_heartbeat_is_what_the_dashboard_reads(ours: Client) -> None:
    def beat(dask_worker: Any) -> dict[str, Any]:
        (run,) = dask_worker.extensions["gpurt"].shuffle.runs_of(
            [str(shuffle_id) for shuffle_id in dask_worker.extensions["shuffle"].shuffle_runs._active_runs]
        )
        found: dict[str, Any] = run.heartbeat()
        assert dask_worker.extensions["shuffle"].heartbeat()
        return found

    def hold(part: pd.DataFrame) -> pd.DataFrame:
        Event("beating").set()
        assert Event("beat").wait(60)
        return part

    # Many outputs: a worker unpacks the next ones while the first is on its way to `hold`, and the run ends with the last.
    shuffled = dd.from_pandas(frame(), npartitions=4).shuffle("key", npartitions=200, shuffle_method="p2p")
    future = ours.compute(shuffled.map_partitions(hold, meta=shuffled))
    assert Event("beating").wait(60)
    for found in ours.run(beat).values():
        assert found["comm"]["written"] > 0
        for prefix in ("comm", "disk"):
            assert {"memory", "total", "buckets", "written", "read", "avg_size", "avg_duration", "memory_limit"} == set(
                found[prefix]
            )
    Event("beat").set()
    assert len(future.result(60)) == 5000
