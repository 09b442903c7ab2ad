"""Workers are killed, results are lost, tasks run twice: the shuffle ends with the right answer."""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, Event, wait

import dask_gpurt

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def client() -> Iterator[Client]:
    config = {
        "distributed.scheduler.validate": True,
        "distributed.worker.validate": True,
        # A cluster gives up a nanny whose new worker is not there after 15 seconds.
        "distributed.deploy.lost-worker-timeout": "1 hour",
    }
    with (
        dask.config.set(config),
        local_cluster(3, 4, silence_logs=False) as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client, placement=False, memory=False)
        yield client
        # Dask gives a nanny 5 seconds to close, and fails where it is just about to start another worker for so long.
        client.wait_for_workers(3, timeout=60)


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({"key": rng.integers(0, 100, 3000), "value": rng.random(3000)})


def once(folder: pathlib.Path, act: Callable[[], None]) -> Callable[[Any], Any]:
    """Make a function that does ``act`` in the first call that comes to it, in whatever process."""

    def function(part: Any) -> Any:
        if len(part):
            try:
                (folder / "done").touch(exist_ok=False)
            except FileExistsError:
                return part
            act()
        return part

    return function


def die() -> None:
    os._exit(1)


def fail() -> None:
    raise RuntimeError("once")


def metrics(client: Client, key: str) -> float:
    def metric(dask_worker: Any) -> float:
        # A worker that has just come may not have its part yet.
        part = getattr(dask_worker.extensions.get("gpurt"), "shuffle", None)
        return 0.0 if part is None else float(part.metrics()[key])

    return float(sum(client.run(metric).values()))


@pytest.mark.parametrize("phase", ["transfer", "unpack"])
def test_a_worker_dies_in_a_shuffle(client: Client, tmp_path: pathlib.Path, phase: str) -> None:
    data = frame()
    collection = dd.from_pandas(data, npartitions=9, sort=False)
    deadly = once(tmp_path, die)
    if phase == "transfer":
        # The seventh partition is deadly: the others are sent, or on their way, by then.
        last = collection.partitions[6].map_partitions(deadly, meta=data.iloc[:0])
        collection = dd.concat([collection.partitions[:6], last, collection.partitions[7:]])
    shuffled = collection.shuffle("key", npartitions=7, shuffle_method="p2p")
    if phase == "unpack":
        shuffled = shuffled.map_partitions(deadly, meta=data.iloc[:0])
    found = client.compute(shuffled["value"]).result(60)
    assert (tmp_path / "done").exists()
    pd.testing.assert_series_equal(found.sort_index(), data["value"])
    # The shuffle that restarts may begin before the lost worker is replaced: then nothing has to be sent.
    assert metrics(client, "bytes_sent") + metrics(client, "bytes_local") > 0


@pytest.mark.parametrize("phase", ["transfer", "unpack"])
def test_a_worker_dies_in_a_rechunk(client: Client, tmp_path: pathlib.Path, phase: str) -> None:
    data = np.arange(90.0 * 40).reshape(90, 40)
    deadly = once(tmp_path, die)

    def deadly_late(block: Any, block_info: Any = None) -> Any:
        return deadly(block) if block_info[0]["chunk-location"][0] == 6 else block

    # Without a meta, Dask tries the function out right here.
    nothing = np.empty((0, 0))
    array = da.from_array(data, chunks=(10, 40))
    if phase == "transfer":
        array = array.map_blocks(deadly_late, meta=nothing)
    array = array.rechunk((90, 6), method="p2p")
    if phase == "unpack":
        array = array.map_blocks(deadly, meta=nothing)
    found = client.compute(array).result(60)
    assert (tmp_path / "done").exists()
    assert (found == data).all()


def test_a_worker_dies_in_a_merge(client: Client, tmp_path: pathlib.Path) -> None:
    left, right = frame(), frame().drop_duplicates("key").rename(columns={"value": "other"})
    merged = dd.from_pandas(left, npartitions=6).merge(
        dd.from_pandas(right, npartitions=4), on="key", shuffle_method="p2p", broadcast=False
    )
    found = client.compute(merged.map_partitions(once(tmp_path, die), meta=merged)).result(60)
    assert (tmp_path / "done").exists()
    order = ["key", "value", "other"]
    expected = left.merge(right, on="key")[order].sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(found[order].sort_values(order, ignore_index=True), expected)


def test_a_task_that_is_tried_again_finds_its_shards_again(client: Client, tmp_path: pathlib.Path) -> None:
    data = frame()
    shuffled = dd.from_pandas(data, npartitions=4, sort=False).shuffle("key", npartitions=5, shuffle_method="p2p")
    runs = metrics(client, "runs")
    found = client.compute(
        shuffled.map_partitions(once(tmp_path, fail), meta=data.iloc[:0])["value"], retries=2
    ).result(60)
    assert (tmp_path / "done").exists()
    pd.testing.assert_series_equal(found.sort_index(), data["value"])
    assert metrics(client, "runs") == runs + 3


@pytest.mark.parametrize("join", [False, True], ids=["shuffle", "merge"])
def test_a_result_that_is_lost_after_its_shards_are_gone_restarts_the_shuffle(client: Client, join: bool) -> None:
    data = frame()

    def hold(part: pd.DataFrame, partition_info: Any = None) -> pd.DataFrame:
        # The run stays active as long as one output is missing.
        if partition_info is not None and partition_info["number"] == 0:
            assert Event("go-on").wait(60)
        return part

    async def lose(dask_scheduler: Any, keys: list[Any]) -> None:
        dask_scheduler.transitions(dict.fromkeys(keys, "released"), stimulus_id="lost")
        # A client hears of it later, and would take the old results for the new ones: so the scheduler itself is asked.
        async with asyncio.timeout(60):
            while any(dask_scheduler.tasks[key].state != "memory" for key in keys):  # noqa: ASYNC110 - Dask has no event for it
                await asyncio.sleep(0.01)

    one = dd.from_pandas(data, npartitions=4, sort=False)
    if join:
        other = dd.from_pandas(data.drop_duplicates("key").rename(columns={"value": "other"}), npartitions=3)
        shuffled = one.merge(other, on="key", npartitions=8, shuffle_method="p2p", broadcast=False)
        expected = data.merge(data.drop_duplicates("key").rename(columns={"value": "other"}), on="key")
    else:
        shuffled = one.shuffle("key", npartitions=8, shuffle_method="p2p")
        expected = data
    held = shuffled.map_partitions(hold, meta=shuffled).persist()
    futures = client.futures_of(held)
    done = {future.key for future in wait(futures[2:6], timeout=60).done}
    assert len(done) == 4
    runs = metrics(client, "runs")
    client.run_on_scheduler(lose, keys=list(done))
    # Not because the run ended: one of its outputs is still missing.
    assert metrics(client, "runs") > runs
    Event("go-on").set()
    found = client.compute(held).result(60)
    order = list(expected.columns)
    pd.testing.assert_frame_equal(
        found[order].sort_values(order, ignore_index=True), expected.sort_values(order, ignore_index=True)
    )
