"""What dask-gpurt costs where there is nothing to gain.

Cases: ``tasks-10000`` (10,000 tasks that do nothing) and ``fits`` (arrays and dataframes that fit in memory many times
over) with all parts; the subject ``overhead_parts`` has each part alone: ``tasks-10000-memory``. Quick runs 2,000 tasks.

One cluster serves both: dask-gpurt is installed and uninstalled in turn. The differences that are looked for, a few
percent, are smaller than those between two clusters that were started alike. After each change a short run that is not
counted brings both sides to the same state.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import Client

from benchmarks.frame import Line, Subject, WrongAnswerError, line_of_pairs, turns
from dask_gpurt import uninstall
from dask_gpurt.demo.cluster import GPURT, ClusterSpec, Side, open_client, warm_up

#: Enough that neither case ever spills, so that what is measured is bookkeeping.
SPEC = ClusterSpec(workers=2, threads=1, memory_limit_nbytes=2 * 2**30)

#: Returns an answer that has to be the same on both sides.
Workload = Callable[[Client], tuple[float, ...]]


def trivial_tasks(client: Client, tasks: int = 10_000) -> tuple[float, ...]:
    """Run tasks that do nothing, and gather what they return."""
    answers = client.gather(client.map(_identity, range(tasks), pure=False))
    return len(answers), sum(answers)


def small_workload(client: Client, side: int = 3000, rows: int = 300_000) -> tuple[float, ...]:
    """Run some of everything: a transposition, a product, a join by shuffle, a groupby."""
    x = da.random.default_rng(0).random((side, side), chunks=(side // 6, side // 6))
    product = ((x + x.T) @ x).sum()
    left, right = (
        dd.from_map(_frame, range(12), rows=rows // 12, factor=factor, meta=_frame(0, rows=1, factor=factor))
        for factor in (7, 11)
    )
    joined = left.merge(right, on="key", shuffle_method="p2p")
    grouped = joined.groupby("group_x").value_y.sum().max()
    futures = [client.compute(answer) for answer in (product, joined.value_x.sum(), grouped)]
    return tuple(float(answer) for answer in client.gather(futures))


def _identity(number: int) -> int:
    return number


def _frame(part: int, rows: int, factor: int) -> pd.DataFrame:
    # Keys of all parts together are 0, 1, 2 …, in an order that scatters each part over all partitions of a join.
    key = np.arange(rows, dtype="int64") * 12 + (part * factor) % 12
    return pd.DataFrame({"key": key, "group": key % 100, "value": (key * factor % 1000).astype("float64")})


#: Pairs of runs of each case: enough for quartiles.
PAIRS = 7


def cases(*, quick: bool) -> dict[str, Workload]:
    """Return the workloads by name. A task that does nothing takes a worker of stock Dask about 3 ms on two cores."""
    tasks = 2_000 if quick else 10_000
    return {f"tasks-{tasks}": functools.partial(trivial_tasks, tasks=tasks), "fits": small_workload}


def run(*, quick: bool, sides: Mapping[str, Side]) -> Iterator[Line]:
    """Yield each case with each of ``sides``, by suffix of its name."""
    with open_client(SPEC) as client:
        warm_up(client)
        for case, workload in cases(quick=quick).items():
            for suffix, side in sides.items():
                yield compare(client, case + suffix, side, workload, PAIRS)


def compare(client: Client, case: str, side: Side, workload: Workload, pairs: int) -> Line:
    """Run a workload in turns with and without ``side`` on one cluster."""
    ours: list[float] = []
    peer: list[float] = []
    expected = None
    for _, is_ours in turns(pairs):
        if is_ours:
            side.install(client)
        try:
            warm_up(client)
            started = time.perf_counter()
            answer = workload(client)
            elapsed_s = time.perf_counter() - started
        finally:
            if is_ours:
                uninstall(client)
        (ours if is_ours else peer).append(elapsed_s)
        expected = answer if expected is None else expected
        # Sums of floats depend on their order, by far less than one part in a billion.
        if not np.allclose(answer, expected, rtol=1e-9, atol=0):
            raise WrongAnswerError(f"{case}: {answer}, expected {expected}")
    return line_of_pairs(case, "wall_s", ours, peer, peer_name="stock")


SUBJECT = Subject(
    "overhead", "what installing costs when nothing is to be gained", lambda quick: run(quick=quick, sides={"": GPURT})
)
