"""A cluster on the two hosts of :mod:`wire`: scheduler, client and a worker on the near one, a worker on the far one.

As a program, run in the near host's namespace: ``python network_site.py FAR_NAMESPACE FOLDER TRANSPORT``, where the transport ``stock``
is Dask without dask-gpurt. It says ``{"ready": …}``, then answers each line of its input, ``shuffle`` or ``arrays``, by two lines: that the
work is under way, and what came of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from clusters import WITHOUT_MONITOR
from distributed import Client, LocalCluster, as_completed, wait
from distributed.client import futures_of
from wire import FAR, NEAR

import dask_gpurt

__all__ = ["WORK"]

PARTITIONS, ROWS = 8, 40_000
#: Nothing may take longer, whatever goes wrong.
DEADLINE_S = 240


def part(number: int) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    return pd.DataFrame(
        {"id": np.arange(ROWS) + number * ROWS, "key": rng.integers(0, 500, ROWS), "x": rng.random(ROWS)}
    )


def _shuffle(say: Any) -> None:
    source = dd.from_map(part, range(PARTITIONS), meta=part(0).iloc[:0]).persist()
    wait(source, timeout=DEADLINE_S)
    futures = futures_of(source.shuffle("key", npartitions=PARTITIONS, shuffle_method="p2p").persist())
    say(begun=True)
    parts = _gathered(futures)
    keys = pd.concat([frame["key"].drop_duplicates() for frame in parts])
    assert keys.is_unique, "a key is in one partition"
    found = pd.concat(parts).sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, pd.concat([part(number) for number in range(PARTITIONS)], ignore_index=True))


def _arrays(say: Any) -> None:
    # Each product needs blocks of both workers.
    x = da.arange(1_000_000, chunks=125_000).reshape(1000, 1000).persist()
    y = (x @ x.T % 1009).sum(axis=0).persist()
    say(begun=True)
    (future,) = futures_of(y.rechunk(-1).persist())
    a = np.arange(1_000_000).reshape(1000, 1000)
    np.testing.assert_array_equal(_gathered([future])[0], (a @ a.T % 1009).sum(axis=0))


def _gathered(futures: list[Any]) -> list[Any]:
    for _ in as_completed(futures, timeout=DEADLINE_S, raise_errors=False):
        pass
    return [future.result(timeout=DEADLINE_S) for future in futures]


WORK = {"shuffle": _shuffle, "arrays": _arrays}


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _far_worker(namespace: str, scheduler: str, folder: str) -> Iterator[None]:
    """Keep a worker on the far host: one that has lost its scheduler ends, nanny and all, and whoever runs it starts it again."""
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "distributed.cli.dask_worker", scheduler]
    command += [
        "--nthreads",
        "1",
        "--memory-limit",
        "1GB",
        "--host",
        FAR,
        "--local-directory",
        folder,
        "--no-dashboard",
    ]
    ending = threading.Event()
    processes: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        while not ending.is_set():
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            processes.append(process)
            process.wait()

    keeper = threading.Thread(target=keep, name="far-worker")
    keeper.start()
    try:
        yield
    finally:
        ending.set()
        while keeper.is_alive():
            processes[-1].terminate()
            keeper.join(1)


def _main(namespace: str, folder: str, transport: str) -> None:
    cluster = LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        host=NEAR,
        protocol="tcp",
        memory_limit="1GB",
        local_directory=folder,
        dashboard_address="127.0.0.1:0",
        silence_logs=logging.CRITICAL,
    )
    with (
        dask.config.set(WITHOUT_MONITOR),
        cluster,
        _far_worker(namespace, cluster.scheduler_address, folder),
        Client(cluster) as client,
    ):
        client.wait_for_workers(2, timeout=DEADLINE_S)
        if transport != "stock":
            dask_gpurt.install(client, config={"shuffle.transport": transport, "memory.host-limit": 2_000_000})
        _say(ready=sorted(client.scheduler_info(n_workers=-1)["workers"]))
        for line in sys.stdin:
            begun = time.monotonic()
            try:
                # A worker that was lost is started again by its nanny.
                client.wait_for_workers(2, timeout=DEADLINE_S)
                WORK[line.strip()](_say)
            except Exception as error:  # noqa: BLE001 - it is what came of it
                _say(error=f"{type(error).__name__}: {error}"[:2000], elapsed_s=time.monotonic() - begun)
            else:
                _say(right=True, elapsed_s=time.monotonic() - begun)
        carried = 0 if transport == "stock" else sum(client.run(_by_ucx).values())
    _say(by_ucx_nbytes=carried)


def _by_ucx(dask_worker: Any) -> int:
    return int(dask_worker.extensions["gpurt"].shuffle.metrics()["bytes_sent_ucx"])


if __name__ == "__main__":
    _main(*sys.argv[1:])
