"""Disks that fail under real workers: answers are right all the same, and nothing is lost that cannot be made again."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import WITHOUT_MONITOR, local_cluster
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.errors import SpillError
from dask_gpurt.memory import lower


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    """Two processes, and stock's memory monitor kept out, so that only managed memory decides."""
    with (
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(2, memory_limit="100 MB") as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def client(cluster: Client) -> Iterator[Client]:
    answer = dask_gpurt.install(cluster, config={"memory.host-limit": 1_000_000})
    assert answer.installed("memory"), str(answer)
    assert answer.installed("shuffle"), str(answer)
    yield cluster
    cluster.run(mend)
    dask_gpurt.uninstall(cluster)


def break_disk(call: str, fault: int, dask_worker: Any = None) -> None:
    """Let a system call fail."""
    honest = getattr(os, call)

    def fail(fd: int, data: Any, offset: int) -> int:
        dask_worker.extensions["test-faults"] = dask_worker.extensions.get("test-faults", 0) + 1
        raise OSError(fault, os.strerror(fault))

    dask_worker.honest = (os, call, honest)
    setattr(os, call, fail)


def mend(dask_worker: Any = None) -> int:
    """Say how often it failed, and let it fail no more."""
    if hasattr(dask_worker, "honest"):
        setattr(*dask_worker.honest)
        del dask_worker.honest
    failed: int = dask_worker.extensions.pop("test-faults", 0)
    return failed


def total(client: Client, figure: str) -> int:
    def metrics(dask_worker: Any) -> int:
        found: int = dask_worker.extensions["gpurt"].memory.metrics()[figure]
        return found

    return sum(client.run(metrics).values())


async def settle(dask_worker: Any = None) -> None:
    """Wait until what is on its way down has arrived."""
    await dask_worker.extensions["gpurt"].memory._host.settle()


def persisted(client: Client) -> Any:
    x = da.arange(500_000, dtype="f8", chunks=25_000).persist()
    wait(x)
    client.run(settle)
    return x


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_takes_nothing(client: Client, number: int) -> None:
    x = persisted(client)
    scattered = client.scatter(np.arange(100_000.0))
    client.run(break_disk, "pwritev", number)
    y = (x + 1).persist()
    wait(y)
    np.testing.assert_array_equal(y.compute(), np.arange(500_000.0) + 1)
    assert total(client, "host_write_failures") > 0
    assert sum(client.run(mend).values()) > 0
    # As soon as it takes something again, it is given it.
    z = (y + 1).persist()
    np.testing.assert_array_equal(z.compute(), np.arange(500_000.0) + 2)
    np.testing.assert_array_equal(scattered.result(), np.arange(100_000.0))
    assert total(client, "host_corrupt_blocks") == 0, "nothing was lost"


def test_a_disk_that_gives_nothing_back(client: Client) -> None:
    x = persisted(client)
    client.run(break_disk, "preadv", errno.EIO)
    np.testing.assert_array_equal(x.compute(), np.arange(500_000.0))
    np.testing.assert_array_equal((x * 2).compute(), np.arange(500_000.0) * 2)
    assert total(client, "host_corrupt_blocks") > 0
    assert sum(client.run(mend).values()) > 0
    np.testing.assert_array_equal((x * 3).compute(), np.arange(500_000.0) * 3)


def test_scattered_data_on_a_disk_that_gives_nothing_back_fails_clearly(client: Client) -> None:
    futures = client.scatter([np.full(50_000, n, dtype="f8") for n in range(10)])
    wait(futures)
    client.run(settle)
    client.run(break_disk, "preadv", errno.EIO)
    results = [client.submit(np.sum, future, pure=False) for future in futures]
    wait(results, timeout=30)
    assert {result.status for result in results} == {"finished", "error"}
    for number, result in enumerate(results):
        if result.status == "finished":
            assert result.result() == number * 50_000
        else:
            assert isinstance(result.exception(), SpillError)


async def has_heard_of_its_end(address: str, dask_worker: Any = None) -> None:
    """Wait until a worker knows that another one has left."""
    async with asyncio.timeout(30):
        while address in dask_worker.state.has_what:  # noqa: ASYNC110 - it comes by the stream of tasks
            await asyncio.sleep(0.01)


def big(number: int) -> Any:
    return np.arange(50_000.0) * number


def test_what_a_peer_had_made_and_took_with_it_is_made_again(client: Client) -> None:
    """A value that was fetched, of which the only other copy is gone, is not taken for scattered data."""
    maker, keeper = sorted(client.scheduler_info()["workers"])
    made = [client.submit(big, n, workers=[maker], allow_other_workers=True, key=f"made-{n}") for n in range(10)]
    wait(made)
    fetched = client.submit(len, made, workers=[keeper], pure=False)
    assert fetched.result() == len(made)
    client.run(settle, workers=[keeper])
    assert total(client, "host_written_nbytes") > 0
    client.restart_workers([maker], timeout=30)
    client.run(has_heard_of_its_end, maker, workers=[keeper])
    client.run(break_disk, "preadv", errno.EIO, workers=[keeper])
    again = [client.submit(np.sum, future, workers=[keeper], pure=False) for future in made]
    assert client.gather(again) == [big(n).sum() for n in range(10)]
    assert client.run(mend, workers=[keeper])[keeper] > 0


def part(number: int) -> pd.DataFrame:
    rows = 25_000
    keys = np.random.default_rng(number).integers(0, 1000, rows)
    return pd.DataFrame({"key": keys, "value": np.arange(rows) + rows * number})


def spoil_shards(how: str, times: int, dask_worker: Any = None) -> None:
    """Spoil the files of the first shards that go to the disk, as soon as they are there."""
    honest = lower.DiskStore.store
    done = 0

    def store(self: lower.DiskStore, name: Any, value: Any) -> lower.Copy:
        nonlocal done
        copy = honest(self, name, value)
        if isinstance(name, lower.RawName) and done < times:
            done += 1
            dask_worker.extensions["test-faults"] = done
            path = copy._kept.path  # type: ignore[attr-defined]
            if how == "flip":
                with open(path, "r+b") as file:
                    file.seek(100)
                    file.write(b"\xff\xfe\xfd")
            else:
                os.unlink(path)
                if how == "fail":
                    # Not gone, and not to be opened.
                    os.symlink(path, path)
        return copy

    lower.DiskStore.store = store  # type: ignore[assignment, method-assign]
    dask_worker.honest = (lower.DiskStore, "store", honest)


@pytest.mark.parametrize("how", ["flip", "remove", "fail"])
def test_shards_of_a_shuffle_that_are_lost(client: Client, how: str) -> None:
    shuffled = dd.from_map(part, range(10)).shuffle("key", npartitions=10, shuffle_method="p2p")
    client.run(spoil_shards, how, 1)
    found = shuffled.compute()
    expected = pd.concat(map(part, range(10)), ignore_index=True)
    pd.testing.assert_frame_equal(found.sort_values("value", ignore_index=True), expected)
    assert sum(client.run(mend).values()) > 0
    assert total(client, "host_corrupt_blocks") > 0
