"""Faults of the machine and of the cluster in the middle of work: the right answer or a clear error, soon, and the next job is right.

``make chaos`` runs them all, with those of the other modules that take long. With ``--stock`` they are Dask's faults to bear.
"""

from __future__ import annotations

import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import WITHOUT_MONITOR, local_cluster
from distributed import Client, LocalCluster, as_completed, wait
from distributed.client import futures_of

import dask_gpurt

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(1200)

#: Far less than what is worked with.
CONFIG = {"memory.host-limit": 2_000_000}
PARTITIONS, ROWS = 6, 40_000
#: Nothing may take longer, whatever goes wrong.
DEADLINE_S = 120
ROUNDS = [1, pytest.param(10, marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def stock(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--stock"))


@pytest.fixture(scope="module")
def cluster(folder: Path, stock: bool) -> Iterator[LocalCluster]:
    # Stock's own limit, which is that of both: as little as ours has.
    target = {"distributed.worker.memory.target": CONFIG["memory.host-limit"] / 400e6} if stock else {}
    with (
        # Where no connection can be opened, Dask tries this long, each time.
        dask.config.set(WITHOUT_MONITOR | target | {"distributed.comm.timeouts.connect": "5s"}),
        local_cluster(2, memory_limit="400 MB", local_directory=str(folder)) as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster, folder: Path, stock: bool) -> Iterator[Client]:
    with Client(cluster) as client:
        if not stock:
            dask_gpurt.install(client, config=CONFIG)
        yield client
        dask_gpurt.uninstall(client)
        assert [name for where, names, _ in os.walk(folder) for name in names if name.startswith("gpurt-spill-")] == []


def part(number: int) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    return pd.DataFrame(
        {"id": np.arange(ROWS) + number * ROWS, "key": rng.integers(0, 500, ROWS), "x": rng.random(ROWS)}
    )


def shuffled() -> Any:
    source = dd.from_map(part, range(PARTITIONS), meta=part(0).iloc[:0])
    return source.shuffle("key", npartitions=PARTITIONS, shuffle_method="p2p")


def check(parts: list[pd.DataFrame]) -> None:
    keys = pd.concat([frame["key"].drop_duplicates() for frame in parts])
    assert keys.is_unique, "a key is in one partition"
    found = pd.concat(parts).sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, pd.concat([part(number) for number in range(PARTITIONS)], ignore_index=True))


def right_answer(client: Client) -> None:
    futures = client.compute(shuffled().to_delayed())
    _, pending = wait(futures, timeout=DEADLINE_S)
    assert not pending
    check(client.gather(futures))


# Out of file descriptors


def limit_files(spare: int | None, dask_worker: Any) -> None:
    """Let a worker open so many files more; None: as many as before."""
    if spare is None:
        resource.setrlimit(resource.RLIMIT_NOFILE, dask_worker.files_before)
        return
    dask_worker.files_before = soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The limit is one of numbers, of which some are free.
    used = set(map(int, os.listdir("/proc/self/fd")))
    free = (number for number in itertools.count() if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(next(itertools.islice(free, spare, None)), soft), hard))


def writes(dask_worker: Any) -> int:
    """Return a number that grows when something is written to DISK, or cannot be."""
    if "gpurt" not in dask_worker.extensions:
        return 0
    memory = dask_worker.extensions["gpurt"].memory
    return int(memory.metrics()["host_write_failures"] + sum(memory.moves().values()))


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("spare", [0, *(pytest.param(spare, marks=pytest.mark.exhaustive) for spare in (3, 30))])
def test_workers_are_out_of_file_descriptors(client: Client, stock: bool, spare: int, rounds: int) -> None:
    # The connections that are there stay; what can be had no more are files and connections.
    right_answer(client)
    for _ in range(rounds):
        before = sum(client.run(writes).values())
        client.run(limit_files, spare)
        try:
            began_s = time.monotonic()
            futures = client.compute(shuffled().to_delayed())
            done, pending = wait(futures, timeout=DEADLINE_S)
            assert not pending
            assert time.monotonic() - began_s < DEADLINE_S
            failed = [future for future in done if future.status == "error"]
            if failed:
                assert "Too many open files" in f"{failed[0].exception()!r}" or isinstance(
                    failed[0].exception(), RuntimeError | OSError
                ), repr(failed[0].exception())
            else:
                check(client.gather(futures))
        finally:
            client.run(limit_files, None)
        # The job failed, or what had to be written went to files that were open already, or stayed in memory.
        assert spare or stock or failed or sum(client.run(writes).values()) > before
        del futures, done, failed
        right_answer(client)


# Workers that come and go


def beside(action: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=action, name="chaos")
    thread.start()
    return thread


# A barrier tries for half a minute to reach a worker that has left.
@pytest.mark.exhaustive
@pytest.mark.parametrize("rounds", [1, 10])
def test_the_cluster_grows_and_shrinks_within_shuffles(cluster: LocalCluster, client: Client, rounds: int) -> None:
    stop = threading.Event()

    def scale() -> None:
        while not stop.is_set():
            for size in (3, 1, 4, 2):
                cluster.scale(size)
                if stop.wait(0.5):
                    break

    thread = beside(scale)
    try:
        for _ in range(rounds):
            right_answer(client)
            right_answer(client)
    finally:
        stop.set()
        thread.join()
    cluster.scale(2)
    client.wait_for_workers(2, timeout=DEADLINE_S)
    right_answer(client)


def written(dask_worker: Any) -> int:
    if "gpurt" not in dask_worker.extensions:
        return int(dask_worker.data.spilled_total.disk)
    figures: dict[str, int] = dask_worker.extensions["gpurt"].memory.metrics()
    return figures["host_written_nbytes"]


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_worker_is_restarted_while_it_spills(client: Client, rounds: int) -> None:
    for number in range(rounds):
        x = da.random.default_rng(number).random((3000, 2000), chunks=(250, 2000)).persist()
        # Half of the chunks, of 4 MB, are many times what the workers may hold.
        list(itertools.islice(as_completed(futures_of(x), timeout=DEADLINE_S), 6))
        victim = min(client.scheduler_info(n_workers=-1)["workers"])
        assert client.restart_workers([victim], timeout=DEADLINE_S) == {victim: "OK"}
        expected = da.random.default_rng(number).random((3000, 2000), chunks=(250, 2000)).sum(axis=0)
        np.testing.assert_allclose(x.sum(axis=0).compute(), expected.compute(scheduler="threads"))
        # The worker that was not restarted has spilled.
        assert sum(client.run(written).values()) > 0
        right_answer(client)
        del x


# Workers that stand still, and workers that are killed for the memory that they take


@pytest.mark.exhaustive
@pytest.mark.parametrize("still_s", [5, 60])
@pytest.mark.parametrize("work", ["shuffle", "spilling"])
def test_a_worker_stands_still_for_a_minute(client: Client, work: str, still_s: float) -> None:
    # Longer than Dask tries to connect to somebody, and than it waits for an answer to that.
    pids: dict[str, int] = client.run(os.getpid)
    victim = pids[min(pids)]
    x = da.random.default_rng(7).random((3000, 2000), chunks=(250, 2000))
    futures = client.compute(shuffled().to_delayed()) if work == "shuffle" else futures_of(x.persist())
    # So that it is in the midst of it.
    next(as_completed(futures, timeout=DEADLINE_S))
    os.kill(victim, signal.SIGSTOP)
    try:
        # So long is the fault.
        time.sleep(still_s)
    finally:
        os.kill(victim, signal.SIGCONT)
    _, pending = wait(futures, timeout=DEADLINE_S)
    assert not pending
    if work == "shuffle":
        check(client.gather(futures))
    else:
        np.testing.assert_array_equal(np.concatenate(client.gather(futures)), x.compute(scheduler="threads"))
    del futures
    right_answer(client)
    assert client.run(os.getpid) == pids, "nobody was lost"


def hungry_part(folder: Path, number: int) -> pd.DataFrame:
    """Take more than there is, once, until somebody does something about it."""
    try:
        (folder / "hungry").touch(exist_ok=False)
    except FileExistsError:
        return part(number)
    taken = [np.ones(2**22) for _ in range(16)]
    threading.Event().wait()
    raise AssertionError(len(taken))


@pytest.mark.exhaustive
def test_a_nanny_kills_a_worker_that_takes_too_much(tmp_path: Path, folder: Path, stock: bool) -> None:
    with (
        dask.config.set(WITHOUT_MONITOR | {"distributed.worker.memory.terminate": 0.95}),
        local_cluster(2, memory_limit="500 MB", local_directory=str(folder)) as cluster,
        Client(cluster) as client,
    ):
        if not stock:
            dask_gpurt.install(client, config=CONFIG)
        pids = client.run(os.getpid)
        right_answer(client)
        source = dd.from_map(lambda number: hungry_part(tmp_path, number), range(PARTITIONS), meta=part(0).iloc[:0])
        futures = client.compute(source.shuffle("key", npartitions=PARTITIONS, shuffle_method="p2p").to_delayed())
        _, pending = wait(futures, timeout=DEADLINE_S)
        assert not pending
        check(client.gather(futures))
        client.wait_for_workers(2, timeout=DEADLINE_S)
        assert len(set(client.run(os.getpid).values()) & set(pids.values())) == 1, "one of them was killed"
        del futures
        right_answer(client)
        if not stock:
            dask_gpurt.uninstall(client)
        assert [name for where, names, _ in os.walk(folder) for name in names if name.startswith("gpurt-spill-")] == []
