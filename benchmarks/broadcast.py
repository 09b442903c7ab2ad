"""One result of 200 MB that all workers of a cluster of processes take at once: how long until the last of them has it.

The result lies on one worker; each of the other five is given a task that takes it. The answers are those of NumPy. Between the rounds,
dask-gpurt is installed and taken away again. ``from_first`` counts the copies that the first holder has sent: with stock Dask, all of them.

On one machine all workers share its cores, so that copying itself is what takes long, and not a network; what the turns gain on a cluster
whose workers have a port each is simulated, see :mod:`benchmarks.placement`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from distributed import Client, LocalCluster, wait

import dask_gpurt
from benchmarks.frame import BrokenRunError, Line, Subject, WrongAnswerError, line_of_pairs, turns

WORKERS = 6
NBYTES = 200_000_000
PAIRS, QUICK_PAIRS = 9, 3
PEER = "stock"


def make(number: int) -> Any:
    """Make the result."""
    return np.arange(number, number + NBYTES // 8, dtype="i8")


def take(values: Any) -> int:
    """Take it."""
    return int(values[::4096].sum())


def _round(client: Client, number: int) -> tuple[float, float]:
    """Return the seconds until all workers have it, and how many copies the first holder has sent."""
    first, *others = client.scheduler_info(n_workers=-1)["workers"]
    made = client.submit(make, number, workers=[first], pure=False)
    wait(made)
    started = time.perf_counter()
    taken = [client.submit(take, made, workers=[worker], pure=False) for worker in others]
    answers = client.gather(taken)
    elapsed_s = time.perf_counter() - started
    if set(answers) != {take(make(number))}:
        raise WrongAnswerError(f"{answers}, expected {take(make(number))} of each")
    sent = client.run(_copies, made.key, workers=[first])[first]
    return elapsed_s, float(sent)


def _copies(key: str, dask_worker: Any) -> int:
    return sum(key in entry["keys"] for entry in dask_worker.transfer_outgoing_log)


def broadcast(quick: bool) -> Iterator[Line]:
    """Run it in turns."""
    elapsed_s: dict[bool, list[float]] = {True: [], False: []}
    sent: dict[bool, list[float]] = {True: [], False: []}
    with (
        LocalCluster(
            n_workers=WORKERS,
            threads_per_worker=1,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as cluster,
        Client(cluster) as client,
    ):
        for number, ours in turns(1 + (QUICK_PAIRS if quick else PAIRS)):
            if ours and not dask_gpurt.install(client).installed("placement"):
                raise BrokenRunError("the placement is not installed")
            figures = _round(client, number)
            if ours:
                dask_gpurt.uninstall(client)
            if number:  # the first pair opens connections
                elapsed_s[ours].append(figures[0])
                sent[ours].append(figures[1])
    yield line_of_pairs(f"local-{WORKERS}", "wall_s", elapsed_s[True], elapsed_s[False], PEER)
    yield line_of_pairs(f"local-{WORKERS}", "from_first", sent[True], sent[False], PEER)


SUBJECT = Subject.of_cases(
    "broadcast", "one result that all workers take, on processes", {f"local-{WORKERS}": broadcast}
)
