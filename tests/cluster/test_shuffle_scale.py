"""Many shuffles at once, and shuffles of many partitions: they end, with right answers, and cost little memory.

With ``--stock``, Dask without dask-gpurt; the figures are printed (``-s``).
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import cloudpickle
import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pytest
from clusters import local_cluster
from dask.base import collections_to_expr
from dask.delayed import delayed
from distributed import Client, Event, get_worker, secede, wait

import dask_gpurt

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(1800)

ROWS = 500
DEADLINE_S = 900


@pytest.fixture
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    with local_cluster(2, memory_limit="2 GiB") as cluster, Client(cluster) as client:
        if not request.config.getoption("--stock"):
            dask_gpurt.install(client)
        yield client


def part(shuffle: int, number: int, *_: Any) -> pd.DataFrame:
    rng = np.random.default_rng([shuffle, number])
    return pd.DataFrame({"id": np.arange(ROWS) + number * ROWS, "key": rng.integers(0, 50, ROWS)})


def check(shuffle: int, parts: list[pd.DataFrame]) -> None:
    assert pd.concat([frame["key"].drop_duplicates() for frame in parts]).is_unique, "a key is in one partition"
    expected = pd.concat([part(shuffle, number) for number in range(2)], ignore_index=True)
    pd.testing.assert_frame_equal(pd.concat(parts).sort_values("id", ignore_index=True), expected)


def runs(dask_scheduler: Any) -> int:
    return len(dask_scheduler.plugins["shuffle"].active_shuffles)


def gate() -> int:
    """End when it is opened, and take no thread meanwhile."""
    secede()
    Event("open").wait()
    return 1


def outputs(client: Client, shuffle: int, *after: Any) -> list[Any]:
    """Begin a shuffle of two inputs, of which the second may have to wait."""
    inputs = [delayed(part)(shuffle, 0), delayed(part)(shuffle, 1, *after)]
    source = dd.from_delayed(inputs, meta=part(0, 0).iloc[:0], verify_meta=False)
    found: list[Any] = client.compute(source.shuffle("key", npartitions=2, shuffle_method="p2p").to_delayed())
    return found


class Peaks:
    """The most memory that each process had, until the end of the block."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peaks")
        self.before = [process.memory_info().rss for process in self._processes]
        self.peaks = list(self.before)

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            self.peaks = [max(peak, p.memory_info().rss) for peak, p in zip(self.peaks, self._processes, strict=True)]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def grown(self) -> list[int]:
        return [peak - before for peak, before in zip(self.peaks, self.before, strict=True)]


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_many_shuffles_are_under_way_at_once(client: Client, count: int) -> None:
    check(0, client.gather(outputs(client, 0)))
    closed = client.submit(gate, pure=False)
    pids = list(client.run(os.getpid).values())
    with Peaks([*pids, os.getpid()]) as peaks:
        begun = time.monotonic()
        futures = [outputs(client, shuffle, closed) for shuffle in range(count)]
        # All of them have begun, and none of them can end.
        while (under_way := client.run_on_scheduler(runs)) < count:
            assert time.monotonic() - begun < DEADLINE_S, under_way
            time.sleep(0.05)
        waited_s = time.monotonic() - begun
        Event("open").set()
        _, pending = wait([future for shuffle in futures for future in shuffle], timeout=DEADLINE_S)
        assert not pending
        ended_s = time.monotonic() - begun
    grown = ", ".join(f"{nbytes / 1e6:.0f}" for nbytes in peaks.grown())
    sys.stdout.write(f"{count} shuffles: begun in {waited_s:.1f} s, done in {ended_s:.1f} s, MB grown {grown}\n")
    for shuffle, parts in enumerate(futures):
        check(shuffle, client.gather(parts))
    # The data of one are 16 kB, of which a worker holds half.
    assert max(peaks.grown()) < 100e6 + 200e3 * count


# Many partitions

#: Of each worker that are made before the rest waits: their shards are some that the next ones follow.
INPUTS = 10


def first_part(number: int) -> pd.DataFrame:
    """Be made at once if it is one of the first of a worker, and wait otherwise."""
    worker: Any = get_worker()
    worker.inputs_begun = getattr(worker, "inputs_begun", 0) + 1
    if worker.inputs_begun > INPUTS:
        Event("planned").wait()
    return part(0, number)


def ours_nbytes(snapshot: tracemalloc.Snapshot) -> int:
    package = Path(dask_gpurt.__file__).parent
    # Links of folders are resolved or not, by how the modules were found.
    places = {str(folder) for folder in (package, package / "plugins", package / "shuffle")}
    places |= {os.path.realpath(place) for place in places}
    kept = snapshot.filter_traces([tracemalloc.Filter(True, f"{place}/*") for place in places])
    return sum(trace.size for trace in kept.traces)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_many_partitions_are_planned_in_little_memory(request: pytest.FixtureRequest, count: int) -> None:
    # All in this process, where it can be measured: scheduler, two workers, client.
    stock = request.config.getoption("--stock")
    with local_cluster(2, processes=False, memory_limit=0) as cluster, Client(cluster) as client:
        if not stock:
            dask_gpurt.install(client)
        source = dd.from_map(first_part, range(count), meta=part(0, 0).iloc[:0])
        shuffled = source.shuffle("key", npartitions=count, shuffle_method="p2p").map_partitions(len)
        sent_nbytes = len(pickle.dumps(collections_to_expr([shuffled]).optimize()))
        tracemalloc.start()
        begun_s, cpu_s = time.monotonic(), time.process_time()
        future = client.compute(shuffled)
        # The run is there, and first inputs of each worker have been split into as many shards as there are outputs.
        while not client.run_on_scheduler(runs) or not all(client.run(waits).values()):
            assert time.monotonic() - begun_s < DEADLINE_S
            time.sleep(0.05)
        begun_s, cpu_s = time.monotonic() - begun_s, time.process_time() - cpu_s
        snapshot = tracemalloc.take_snapshot()
        tracemalloc.stop()
        (run,) = cluster.scheduler.plugins["shuffle"].active_shuffles.values()
        run_nbytes = len(pickle.dumps(run.run_spec))
        total_nbytes = sum(trace.size for trace in snapshot.traces)
        sys.stdout.write(
            f"{count} x {count} partitions: graph of {sent_nbytes} bytes sent; planned in {begun_s:.1f} s, {cpu_s:.1f} s of CPU, "
            f"{total_nbytes / 1e6:.1f} MB, of which ours {ours_nbytes(snapshot) / 1e6:.2f}; each worker is sent {run_nbytes} bytes\n"
        )
        future.release()
        Event("planned").set()
    assert sent_nbytes < 20_000
    assert run_nbytes < 5_000 + 10 * count
    assert stock or 0 < ours_nbytes(snapshot) < 500_000 + 1000 * count
    assert total_nbytes < 10e6 + 40_000 * count


def waits(dask_worker: Any) -> bool:
    return getattr(dask_worker, "inputs_begun", 0) > INPUTS
