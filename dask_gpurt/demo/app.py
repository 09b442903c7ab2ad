"""The demonstration from start to end: data, runs, table, report.

Covers: what ``dask gpurt demo`` does once its options are read.
Does not cover: the options themselves; see :mod:`dask_gpurt.cli`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dask.utils import format_bytes, format_time
from rich.console import Console

from dask_gpurt import webpage
from dask_gpurt.demo import machine, report
from dask_gpurt.demo.arrays import SIDE, Shape
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec, Side, count_gpus
from dask_gpurt.demo.data import default_cache, ensure_tables
from dask_gpurt.demo.runner import METRICS, OVERSIZE, Comparison, array_jobs, run_jobs, tpch_jobs
from dask_gpurt.demo.show import Display, make_table

__all__ = ["Options", "conclude", "run", "side_of", "to_plain"]

#: Memory of a worker. Without a GPU: two workers, the client and DuckDB fit into 8 GB beside a desktop, the arrays do
#: not fit into the workers, and stock Dask survives all jobs. With one: an array of this size is made in a second.
MEMORY_LIMIT_NBYTES = 5 * 2**28
DEVICE_LIMIT_NBYTES = 16 * 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for on the command line; see its help."""

    scale: float = 1.0
    workers: int = 2
    threads: int = 1
    memory_limit_nbytes: int | None = None
    array_nbytes: int | None = None
    rounds: int = 1
    only: str | None = None
    parts: tuple[str, ...] = GPURT.parts
    limit_s: float = 120.0
    cache: Path | None = None
    report: Path | None = None
    json: Path | None = None


def run(options: Options, console: Console | None = None) -> bool:
    """Run it all and show it; return whether all answers were right."""
    started = time.perf_counter()
    console = console or Console()
    gpu = count_gpus() >= options.workers
    limit_nbytes = options.memory_limit_nbytes or (DEVICE_LIMIT_NBYTES if gpu else MEMORY_LIMIT_NBYTES)
    spec = ClusterSpec(options.workers, options.threads, limit_nbytes, gpu)
    array_nbytes = options.array_nbytes or int(OVERSIZE * spec.workers * limit_nbytes)
    # A small array still has to have several blocks.
    block_side = SIDE if array_nbytes >= 2**30 else max(8, math.isqrt(array_nbytes // 8 // 36))
    shape = Shape.larger_than(array_nbytes, side=block_side, module=spec.array_module)

    jobs = []
    if options.only != "array":
        with console.status(f"Making the TPC-H tables of scale factor {options.scale:g}, once"):
            folder = ensure_tables(options.scale, options.cache or default_cache())
        with console.status("Asking DuckDB for the true answers"):
            jobs += tpch_jobs(folder)
    if options.only != "tpch":
        with console.status("Calculating the true answers of the array jobs with NumPy"):
            jobs += array_jobs(spec, shape)

    settings = {
        "Cluster": f"{spec.workers} workers of {spec.threads} thread(s) and {format_bytes(limit_nbytes)}"
        + (", each with a GPU" if gpu else ""),
        "Tables": f"TPC-H scale factor {options.scale:g}",
        "Arrays": f"{format_bytes(shape.nbytes)} in blocks of {format_bytes(8 * shape.side**2)}",
        "Rounds": str(options.rounds),
    }
    for name, value in settings.items():
        console.print(f"{name + ':':<9}{value}", highlight=False)
    with Display(console, runs=2 * options.rounds * len(jobs)) as display:
        comparisons = run_jobs(
            jobs,
            (STOCK, side_of(options.parts)),
            spec,
            options.rounds,
            limit_s=options.limit_s,
            on_start=display.start,
            on_end=display.end,
        )
    verdict = "All answers agreed with those of DuckDB and NumPy, on both sides."
    about, right = conclude(console, comparisons, settings, options.json, verdict)
    if options.report is not None:
        webpage.write(options.report, report.render(comparisons, about, settings))
        console.print(f"Report:  {options.report}", highlight=False)
    console.print(f"It took {format_time(time.perf_counter() - started)}.", highlight=False)
    return right


def conclude(
    console: Console, comparisons: Sequence[Comparison], settings: Mapping[str, str], path: Path | None, verdict: str
) -> tuple[dict[str, Any], bool]:
    """Show what came out, and write it as JSON if there is a path.

    Parameters
    ----------
    comparisons
        What came out, job by job.
    settings
        Name to value of what was chosen, in words.
    verdict
        What is said if all answers were right.

    Returns
    -------
    tuple
        What it was measured on, and whether all answers were right.
    """
    console.print(make_table(comparisons))
    problems = [problem for comparison in comparisons for problem in comparison.problems()]
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    if not problems:
        console.print(verdict, style="green")
    about = machine.describe()
    if path is not None:
        plain = {**about, "settings": settings, "jobs": [to_plain(comparison) for comparison in comparisons]}
        path.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        console.print(f"Figures: {path}", highlight=False)
    return about, not problems


def to_plain(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data for JSON; what is infinite or unknown becomes null."""
    ratios = {metric.name: comparison.ratio(metric) for metric in METRICS}
    return {
        "job": comparison.job,
        "ratios": {name: None if ratio is None or math.isinf(ratio) else ratio for name, ratio in ratios.items()},
        "runs": [dataclasses.asdict(outcome) for outcome in comparison.outcomes],
    }


def side_of(parts: tuple[str, ...]) -> Side:
    """Return the side that stands beside stock Dask, with these parts of dask-gpurt."""
    if not parts:
        return Side("stock again")
    return GPURT if parts == GPURT.parts else Side(f"{GPURT.name} ({', '.join(parts)})", parts)
