"""The jobs of the demonstration as cases: four TPC-H queries and three array jobs, in time, bytes and memory.

A metric that is nothing on either side has no ratio and no line. Quick takes a tenth of the tables, arrays of half the
size on workers of half the memory, and one round.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from benchmarks.frame import Line, Subject, WrongAnswerError, line_of_pairs
from dask_gpurt.demo.app import MEMORY_LIMIT_NBYTES
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec
from dask_gpurt.demo.data import default_cache, ensure_tables
from dask_gpurt.demo.runner import METRICS, Comparison, array_jobs, run_jobs, tpch_jobs


def run(*, quick: bool) -> Iterator[Line]:
    """Yield a line a job and metric."""
    scale, rounds, limit_nbytes = (0.1, 1, MEMORY_LIMIT_NBYTES // 2) if quick else (1.0, 3, MEMORY_LIMIT_NBYTES)
    spec = ClusterSpec(memory_limit_nbytes=limit_nbytes)
    for job in itertools.chain(tpch_jobs(ensure_tables(scale, default_cache())), array_jobs(spec)):
        yield from lines(run_jobs([job], (STOCK, GPURT), spec, rounds)[0])


def lines(comparison: Comparison) -> Iterator[Line]:
    """Yield a line for each metric of a job."""
    problems = comparison.problems()
    if problems:
        raise WrongAnswerError("; ".join(problems))
    stock, gpurt = comparison.sides
    for metric in METRICS:
        ours, peer = comparison.values(metric, gpurt), comparison.values(metric, stock)
        if len(ours) == len(peer) and any(ours + peer):
            yield line_of_pairs(comparison.job, metric.name, ours, peer, peer_name=stock)


SUBJECT = Subject("demo", "TPC-H queries and array jobs beside stock Dask", lambda quick: run(quick=quick))
