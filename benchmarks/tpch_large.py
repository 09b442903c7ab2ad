"""The 22 TPC-H queries on more data than the workers have memory: who comes to the end, and when.

Covers: ``python -m benchmarks tpch --scale N``: a line ``wall_s`` for each query, ``finished``, the number of queries that
ended with DuckDB's answer, and the case ``tpch-N``, the geometric mean over those that both sides finish.
Does not cover: the queries (:mod:`benchmarks.tpch_queries`); tables that fit, where small differences count
(:mod:`benchmarks.tpch`).

Each side has a cluster of two workers with one thread and 4 GiB each, and keeps it from query to query, as its users do, until
a query fails there: then the next one finds a fresh cluster, so that one failure does not make others. A query runs once on each
side, at every other query ours first. It fails by an error, by a worker that was killed too often, or by not having ended
after :data:`RUN_LIMIT_S`. What a failed query took counts as infinite, and a line with an infinite ratio is in no mean.
An answer that differs from DuckDB's ends the benchmark, whichever side it is of.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pandas as pd
from distributed import Client

from benchmarks.frame import Line, WrongAnswerError
from benchmarks.tpch_queries import NAMES, differences, finish, queries
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec, Side, open_client, warm_up
from dask_gpurt.demo.data import default_cache, ensure_tables
from dask_gpurt.demo.tpch import Query, Reader, reader, truth

__all__ = ["RUN_LIMIT_S", "Arena", "run"]

SPEC = ClusterSpec(workers=2, threads=1, memory_limit_nbytes=4 * 2**30)

#: Some ten times what the slowest query takes at scale factor 10 on two cores.
RUN_LIMIT_S = 600.0


class Arena:
    """A side's cluster, which is replaced after a run that failed. A context manager.

    Parameters
    ----------
    side
        What is installed there.
    spec
        What the cluster is made of.
    limit_s
        Seconds after which a run has failed.
    """

    def __init__(self, side: Side, spec: ClusterSpec = SPEC, limit_s: float = RUN_LIMIT_S) -> None:
        self.side = side
        self.spec = spec
        self.limit_s = limit_s
        self._client: Client | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self) -> Client:
        if self._client is None:
            self._client = self._stack.enter_context(open_client(self.spec, as_default=False))
            self.side.install(self._client)
            with self._client.as_current():
                warm_up(self._client)
        return self._client

    def wall_s(self, query: Query, read: Reader, expected: pd.DataFrame) -> float:
        """Run a query; return how long it took, infinity if it failed.

        Raises
        ------
        WrongAnswerError
            If it came to its end with another answer than the expected one.
        """
        client = self._open()
        with client.as_current():
            collection = query.build(read)
            started = time.perf_counter()
            future = client.compute(collection)
            try:
                computed = future.result(timeout=self.limit_s)
            except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 - whatever a query dies of is the result
                self._client = None
                self._stack.close()
                print(f"{query.name} failed with {self.side.name}: {error!r:.500}", file=sys.stderr, flush=True)
                return float("inf")
            elapsed_s = time.perf_counter() - started
            del future
        found = differences(query, finish(query, computed), expected)
        if found:
            raise WrongAnswerError(f"{query.name} with {self.side.name}: {'; '.join(found)}")
        return elapsed_s


def run(scale: float, *, names: Sequence[str] = NAMES, limit_s: float = RUN_LIMIT_S) -> Iterator[Line]:
    """Yield a line a query, then, where it was all queries, those for all of them.

    Parameters
    ----------
    scale
        Scale factor of the tables.
    names
        Queries to run.
    limit_s
        Seconds after which a run has failed.
    """
    folder: Path = ensure_tables(scale, default_cache())
    every = queries(scale)
    expected = {name: truth(every[name], folder) for name in names}
    read = reader(folder)
    times: list[tuple[float, float]] = []
    with Arena(GPURT, limit_s=limit_s) as ours, Arena(STOCK, limit_s=limit_s) as stock:
        for number, name in enumerate(names):
            order = (ours, stock) if number % 2 else (stock, ours)
            wall = {arena.side.name: arena.wall_s(every[name], read, expected[name]) for arena in order}
            times.append((wall[GPURT.name], wall[STOCK.name]))
            yield _line(name, "wall_s", *times[-1])
    if tuple(names) == NAMES:
        yield from summary(scale, times)


def summary(scale: float, times: Sequence[tuple[float, float]]) -> Iterator[Line]:
    """Yield the lines for all queries, from the times of ours and of stock; infinite where a query failed.

    Examples
    --------
    >>> inf = float("inf")
    >>> [line.text("tpch") for line in summary(10, [(1.0, 2.0), (2.0, 1.0), (3.0, inf)])]  # doctest: +ELLIPSIS
    ['tpch tpch-10 finished ratio=1.500 ours=3 peer=2 ...', 'tpch tpch-10 wall_s ratio=1.000 ours=1.41421 peer=1.41421 ...']
    """
    finished = [sum(wall < float("inf") for wall in side) for side in zip(*times, strict=True)]
    yield _line(f"tpch-{scale:g}", "finished", *finished, more_is_better=True)
    both = [(ours, stock) for ours, stock in times if max(ours, stock) < float("inf")]
    if both:
        yield _line(f"tpch-{scale:g}", "wall_s", *(statistics.geometric_mean(side) for side in zip(*both, strict=True)))


def _line(case: str, metric: str, ours: float, stock: float, *, more_is_better: bool = False) -> Line:
    first, second = (ours, stock) if more_is_better else (stock, ours)
    # Where both failed, neither is better.
    ratio = 1.0 if first == second else first / second if second else float("inf")
    return Line(case, metric, ratio, ours, stock, STOCK.name, (ratio, ratio), 1)
