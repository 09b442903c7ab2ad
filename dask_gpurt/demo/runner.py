"""Both sides take turns at the jobs; their answers are compared, and what they cost is kept.

Covers: :class:`Job`, :func:`run_jobs`, and the figures that follow from several runs (:class:`Comparison`).
Does not cover: the clusters (:mod:`dask_gpurt.demo.cluster`), the jobs' contents, how results are shown.

The order alternates: of two neighbouring runs of the same job, one time stock goes first and the next time dask-gpurt.
A machine that slows down over minutes then weighs on both. The ratio of times is the median over such pairs of
neighbours, not the ratio of two medians, since neighbours share the state of the machine.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from distributed import Client

from dask_gpurt.demo.arrays import ARRAY_JOBS, ArrayJob, Shape
from dask_gpurt.demo.cluster import ClusterSpec, Side, warm_up
from dask_gpurt.demo.compare import array_differences
from dask_gpurt.demo.measure import Usage, measure
from dask_gpurt.demo.tpch import QUERIES, Query, truth

__all__ = [
    "METRICS",
    "OVERSIZE",
    "Comparison",
    "Job",
    "Metric",
    "Outcome",
    "Place",
    "array_job",
    "array_jobs",
    "run_jobs",
    "run_once",
    "tpch_jobs",
]

#: How much more than the workers' memory the arrays take. More says the same and takes longer.
OVERSIZE = 1.1

#: A run that takes longer is given up: several times what the slowest job takes on two cores.
TIME_LIMIT_S = 120.0


@dataclass(frozen=True)
class Job:
    """Something to compute on a cluster, and how to tell whether the answer is right."""

    name: str
    title: str
    run: Callable[[], Any]
    #: Answer -> what is wrong with it, in words.
    check: Callable[[Any], list[str]]


@dataclass(frozen=True)
class Outcome:
    """One run of one job on one side."""

    job: str
    side: str
    round: int
    #: None: the run failed.
    usage: Usage | None
    #: What is wrong with the answer; empty if it is right.
    differences: list[str] = field(default_factory=list)
    #: Why the run failed.
    error: str | None = None

    @property
    def right(self) -> bool:
        """Whether there is an answer and it is the expected one."""
        return self.error is None and not self.differences


@dataclass(frozen=True)
class Metric:
    """A figure that the two sides are compared by; less is better."""

    name: str
    #: As the head of a column.
    short: str
    title: str
    of: Callable[[Usage], float | None]
    unit: str


METRICS = (
    Metric("wall_s", "wall", "wall time", lambda usage: usage.wall_s, "s"),
    Metric("moved_nbytes", "moved", "moved between workers", lambda usage: usage.moved_nbytes, "B"),
    Metric("written_nbytes", "spilled", "spilled to disk", lambda usage: usage.written_nbytes, "B"),
    Metric("peak_nbytes", "peak", "peak memory", lambda usage: usage.peak_nbytes, "B"),
)


@dataclass(frozen=True)
class Comparison:
    """All runs of one job on both sides.

    Examples
    --------
    >>> runs = [Outcome("job", side, 0, Usage(wall_s=s)) for side, s in [("stock", 3.0), ("ours", 2.0)]]
    >>> Comparison("job", ("stock", "ours"), runs).ratio(METRICS[0])
    1.5
    """

    job: str
    sides: tuple[str, str]
    outcomes: Sequence[Outcome]

    def values(self, metric: Metric, side: str) -> list[float]:
        """Return the metric of every run of a side that gave the right answer."""
        usages = [run.usage for run in self.outcomes if run.side == side and run.right and run.usage is not None]
        return [value for usage in usages if (value := metric.of(usage)) is not None]

    def median(self, metric: Metric, side: str) -> float | None:
        """Return the median over the runs of a side; None if no run was right."""
        values = self.values(metric, side)
        return statistics.median(values) if values else None

    def ratios(self, metric: Metric) -> list[float]:
        """Return first side ÷ second side for each round in which both were right."""
        found = []
        for number in sorted({run.round for run in self.outcomes}):
            part = Comparison(self.job, self.sides, [run for run in self.outcomes if run.round == number])
            first, second = (part.median(metric, side) for side in self.sides)
            if first is not None and second is not None:
                found.append(quotient(first, second))
        return [ratio for ratio in found if not math.isnan(ratio)]

    def ratio(self, metric: Metric) -> float | None:
        """Return the median of :meth:`ratios`, above 1 where the second side is better; None: nothing to compare."""
        ratios = self.ratios(metric)
        return statistics.median(ratios) if ratios else None

    def problems(self) -> list[str]:
        """Say what failed, and which answers are wrong."""
        said = []
        for run in self.outcomes:
            if run.error is not None:
                said.append(f"{run.job} failed on {run.side}: {run.error}")
            said += [f"{run.job} on {run.side}: {difference}" for difference in run.differences]
        return list(dict.fromkeys(said))


def quotient(first: float, second: float) -> float:
    """Divide; infinite where only the second is nothing, not a number where both are."""
    if second:
        return first / second
    return math.inf if first else math.nan


def tpch_jobs(folder: Path) -> list[Job]:
    """Return the four queries on the tables in ``folder``; DuckDB answers them here and now."""

    def make(query: Query) -> Job:
        expected = truth(query, folder)
        return Job(
            name=query.name,
            title=query.title,
            run=lambda: query.run(folder),
            check=lambda answer: query.differences(answer, expected),
        )

    return [make(query) for query in QUERIES.values()]


def array_jobs(spec: ClusterSpec, shape: Shape | None = None) -> list[Job]:
    """Return the three array jobs, by default on more data than the cluster has memory; NumPy answers them here."""
    if shape is None:
        nbytes = int(OVERSIZE * spec.workers * spec.memory_limit_nbytes)
        shape = Shape.larger_than(nbytes, module=spec.array_module)

    return [array_job(name, shape) for name in ARRAY_JOBS]


def array_job(which: str, shape: Shape, name: str | None = None, title: str | None = None) -> Job:
    """Return one of the array jobs, perhaps under another name; NumPy answers it here."""
    job: ArrayJob = ARRAY_JOBS[which]
    expected = job.truth(shape)
    return Job(
        name=name or job.name,
        title=title or job.title,
        run=lambda: job.run(shape),
        check=lambda answer: array_differences(answer, expected),
    )


class Place(Protocol):
    """Where runs take place, one after the other."""

    def open(self) -> AbstractContextManager[Client]:
        """Connect to a cluster without dask-gpurt, on which Dask computes until the end."""


def run_once(job: Job, side: Side, place: Place, number: int = 0, limit_s: float = TIME_LIMIT_S) -> Outcome:
    """Run a job on one side.

    Whatever goes wrong in the run becomes part of the outcome: that a side fails is a result.
    """
    with place.open() as client:
        late = threading.Event()
        with _deadline(client, limit_s, late):
            try:
                side.install(client)
                warm_up(client)
                with measure(client) as usage:
                    answer = job.run()
            except Exception as error:  # noqa: BLE001 - reported, with its reason
                reason = f"given up after {limit_s:g} s" if late.is_set() else f"{type(error).__name__}: {error}"
                return Outcome(job.name, side.name, number, usage=None, error=reason.splitlines()[0])
        return Outcome(job.name, side.name, number, usage, differences=job.check(answer))


@contextlib.contextmanager
def _deadline(client: Client, limit_s: float, late: threading.Event) -> Iterator[None]:
    """Close the cluster at the deadline, or the client of one that is lent: the computation that waits for it fails."""

    def close() -> None:
        late.set()
        (client.cluster or client).close()

    timer = threading.Timer(limit_s, close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if late.is_set():
            timer.join()


def run_jobs(
    jobs: Sequence[Job],
    sides: tuple[Side, Side],
    place: Place,
    rounds: int,
    *,
    limit_s: float = TIME_LIMIT_S,
    on_start: Callable[[Job, Side, int], None] = lambda *_: None,
    on_end: Callable[[Outcome], None] = lambda _: None,
) -> list[Comparison]:
    """Run every job ``rounds`` times on both sides, in turns, and return what came out, job by job."""
    outcomes: list[Outcome] = []
    for number in range(rounds):
        for position, job in enumerate(jobs):
            for side in sides if (number + position) % 2 == 0 else sides[::-1]:
                on_start(job, side, number)
                outcome = run_once(job, side, place, number, limit_s)
                outcomes.append(outcome)
                on_end(outcome)
    names = (sides[0].name, sides[1].name)
    return [Comparison(job.name, names, [run for run in outcomes if run.job == job.name]) for job in jobs]
