"""A quick measurement on a cluster of the user's, or on one of its own: some jobs on stock Dask and on dask-gpurt, in turns.

Covers: what ``dask gpurt bench`` does once its options are read; a cluster that is lent.
Does not cover: the options (:mod:`dask_gpurt.cli`); runs, figures and tables, which are those of the demonstration
(:mod:`dask_gpurt.demo.runner`, :mod:`dask_gpurt.demo.show`).

On a cluster that is lent nothing is restarted and nobody's data is touched: each run has a client of its own, with dask-gpurt installed
or not, and at the end the cluster is as it was, with the settings that it had. Others who use it meanwhile are measured, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dask.utils import format_bytes
from distributed import Client
from rich.console import Console

from dask_gpurt.demo.app import conclude, side_of
from dask_gpurt.demo.arrays import SIDE, Shape
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec
from dask_gpurt.demo.frames import Tables
from dask_gpurt.demo.measure import Meter
from dask_gpurt.demo.runner import OVERSIZE, Job, Place, array_job, run_jobs
from dask_gpurt.demo.show import Display
from dask_gpurt.doctor.cluster import installed_settings
from dask_gpurt.errors import GpurtError
from dask_gpurt.installer import install_settings, uninstall
from dask_gpurt.terminal import connect

__all__ = ["JOBS", "LOCAL", "SPILL_MAX_NBYTES", "Lent", "Options", "Size", "jobs", "run"]

#: In the order in which they run.
JOBS = ("shuffle", "merge", "rechunk", "spill")
#: The cluster that is opened where none is lent.
LOCAL = ClusterSpec(workers=2, threads=1, memory_limit_nbytes=2**30)
#: Where spilling would take more than this, it is left out unless it is asked for: stock Dask would be at it for minutes.
SPILL_MAX_NBYTES = 8 * 2**30
#: Data of a job for each worker, but for the one that spills, and of one partition.
WORKER_NBYTES = 128 * 2**20
PART_NBYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for on the command line; see its help."""

    scheduler: str | None = None
    connect_s: float = 10.0
    only: tuple[str, ...] = ()
    worker_nbytes: int = WORKER_NBYTES
    rounds: int = 1
    parts: tuple[str, ...] = GPURT.parts
    limit_s: float = 120.0
    json: Path | None = None


@dataclass(frozen=True)
class Size:
    """What a cluster is known to have."""

    workers: int
    #: Memory of all workers; None: some has no limit.
    memory_nbytes: int | None


@dataclass(frozen=True)
class Lent:
    """A running cluster on which runs take place.

    Parameters
    ----------
    host
        A client that stays for all runs.
    """

    host: Client

    @contextlib.contextmanager
    def open(self) -> Iterator[Client]:
        """Connect to it as it would be without dask-gpurt; whatever the run has installed is taken away."""
        uninstall(self.host)
        assert self.host.scheduler is not None
        try:
            with Client(self.host.scheduler.address, security=self.host.security) as client:
                yield client
        finally:
            with contextlib.suppress(ValueError):
                # It is not there where the run ended before it was measured.
                self.host.unregister_worker_plugin(Meter.name)
            uninstall(self.host)


def run(options: Options, console: Console | None = None) -> bool:
    """Run it all and show it; return whether all answers were right.

    Raises
    ------
    GpurtError
        If there is nothing to measure on.
    """
    console = console or Console()
    with contextlib.ExitStack() as stack:
        place: Place = LOCAL
        size = Size(LOCAL.workers, LOCAL.workers * LOCAL.memory_limit_nbytes)
        if options.scheduler is not None:
            place = stack.enter_context(lent(options.scheduler, options.connect_s))
            size = _size(place.host)
        return _measure(options, place, size, console)


@contextlib.contextmanager
def lent(scheduler: str, connect_s: float) -> Iterator[Lent]:
    """Connect to a cluster, and leave it as it was found."""
    with connect(scheduler, connect_s) as host:
        before = installed_settings(host)
        try:
            yield Lent(host)
        finally:
            if before is not None:
                install_settings(host, before)


def _size(client: Client) -> Size:
    limits = [worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    if not limits:
        raise GpurtError("the cluster has no workers")
    return Size(len(limits), sum(limits) if all(limits) else None)


def _measure(options: Options, place: Place, size: Size, console: Console) -> bool:
    with console.status("Calculating the true answers with NumPy"):
        chosen, left_out = jobs(size, options.worker_nbytes, options.only)
    where = "2 local workers of 1 GiB, new for each run" if options.scheduler is None else options.scheduler
    settings = {
        "Cluster": f"{where}, {size.workers} workers"
        + ("" if size.memory_nbytes is None else f" with {format_bytes(size.memory_nbytes)}"),
        "Data": f"{format_bytes(options.worker_nbytes * size.workers)} for each job",
        "Rounds": str(options.rounds),
    }
    if left_out:
        settings["Left out"] = left_out
    for name, value in settings.items():
        console.print(f"{name + ':':<10}{value}", highlight=False)
    with Display(console, runs=2 * options.rounds * len(chosen)) as display:
        comparisons = run_jobs(
            chosen,
            (STOCK, side_of(options.parts)),
            place,
            options.rounds,
            limit_s=options.limit_s,
            on_start=display.start,
            on_end=display.end,
        )
    _, right = conclude(console, comparisons, settings, options.json, "All answers were right, on both sides.")
    return right


def jobs(size: Size, worker_nbytes: int, only: Sequence[str] = ()) -> tuple[list[Job], str | None]:
    """Return the jobs for a cluster of this size, and what was left out and why.

    Parameters
    ----------
    size
        Of the cluster.
    worker_nbytes
        Data of a job for each worker, but for the one that spills.
    only
        Names of :data:`JOBS`; empty: all that suit the cluster.
    """
    nbytes = worker_nbytes * size.workers
    tables = Tables.of(nbytes, parts=max(2 * size.workers, nbytes // PART_NBYTES))
    left_out = None
    makers: dict[str, Callable[[], Job]] = {
        "shuffle": lambda: Job("shuffle", "A table, by its key", tables.shuffle, tables.shuffle_differences),
        "merge": lambda: Job("merge", "Two tables, on a key", tables.merge, tables.merge_differences),
        "rechunk": lambda: array_job("rechunk", shape_of(nbytes)),
    }
    if size.memory_nbytes is None:
        left_out = "spill: the workers have no memory limit"
    elif size.memory_nbytes * OVERSIZE > SPILL_MAX_NBYTES and "spill" not in only:
        spilled = format_bytes(int(size.memory_nbytes * OVERSIZE))
        left_out = f"spill: it would take {spilled}; --only spill asks for it"
    else:
        shape = shape_of(int(size.memory_nbytes * OVERSIZE))
        makers["spill"] = lambda: array_job("transpose", shape, name="spill", title="x + x.T, larger than memory")
    return [makers[name]() for name in JOBS if name in makers and (not only or name in only)], left_out


def shape_of(nbytes: int) -> Shape:
    """Return a square array of so many bytes, of at least six blocks a side.

    Examples
    --------
    >>> shape_of(2**20).grid, shape_of(2**31).side == SIDE
    (7, True)
    """
    return Shape.larger_than(nbytes, side=max(8, min(SIDE, int((nbytes / 8 / 36) ** 0.5))))
