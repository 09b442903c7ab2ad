"""The meter on real workers counts known transfers, files and memory."""

from __future__ import annotations

from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.demo.measure import measure

NBYTES = 32_000_000


@pytest.fixture(scope="module")
def client() -> Any:
    with (
        local_cluster(2) as cluster,
        Client(cluster) as client,
    ):
        yield client


def make() -> Any:
    return np.random.default_rng(0).random(NBYTES // 8)


def size(array: Any) -> Any:
    return array.nbytes


def write_file(path: Any) -> None:
    with open(path, "wb") as file:
        file.write(bytes(NBYTES))


def test_a_transfer_is_counted_once(client: Any) -> None:
    a, b = client.scheduler_info()["workers"]
    array = client.submit(make, workers=[a], pure=False)
    wait(array)
    with measure(client) as usage:
        assert client.submit(size, array, workers=[b], pure=False).result() == NBYTES
    assert NBYTES <= usage.moved_nbytes < NBYTES * 1.01
    assert usage.looped_nbytes == 0
    assert usage.written_nbytes < NBYTES / 100
    assert usage.wall_s > 0
    assert usage.lost_workers == 0
    # There is a copy on b now.
    with measure(client) as usage:
        assert client.submit(size, array, workers=[b], pure=False).result() == NBYTES
    assert usage.moved_nbytes < NBYTES / 100


@pytest.mark.parametrize("transport", ["auto", "dask"])
def test_a_shuffle_is_counted_once_by_either_path(client: Any, transport: str) -> None:
    # The index travels too: three numbers a row.
    frame = pd.DataFrame({"key": np.arange(NBYTES // 24), "value": 1.0})
    # One for each worker: nothing waits in a queue, from which a busy machine would have it stolen, with its input.
    shuffled = dd.from_pandas(frame, npartitions=2).persist()
    wait(shuffled)
    with dask.config.set({"gpurt.shuffle.transport": transport}):
        dask_gpurt.install(client, placement=False, memory=False)
    try:
        with measure(client) as usage:
            wait(shuffled.shuffle("key", shuffle_method="p2p").persist())
    finally:
        dask_gpurt.uninstall(client)
    # About half of the rows change places; the rest of a run's messages is small.
    assert 0.4 * NBYTES < usage.moved_nbytes < 0.6 * NBYTES


def test_what_a_client_gathers_is_not_counted(client: Any) -> None:
    array = client.submit(make, pure=False)
    wait(array)
    with measure(client) as usage:
        array.result()
    assert usage.moved_nbytes < NBYTES / 100


def test_files_are_counted(client: Any, tmp_path: Any) -> None:
    with measure(client) as usage:
        client.submit(write_file, str(tmp_path / "file"), pure=False).result()
    assert NBYTES <= usage.written_nbytes < NBYTES * 1.01
    assert usage.moved_nbytes < NBYTES / 100


def test_the_peak_is_that_of_the_block(client: Any) -> Any:
    def peak(factor: Any) -> Any:
        with measure(client) as usage:
            client.submit(lambda: float(np.ones(factor * NBYTES // 8).sum()), pure=False).result()
        if usage.peak_nbytes is None:
            pytest.skip("the kernel does not let the high-water mark be reset")
        return usage.peak_nbytes

    large, small = peak(8), peak(1)
    assert large - small > 6 * NBYTES


def test_a_lost_worker_is_said(client: Any) -> None:
    a, _ = client.scheduler_info()["workers"]
    with measure(client) as usage:
        client.retire_workers([a])
    assert usage.lost_workers == 1
