"""``dask gpurt``: the subcommands of Dask's own command line.

Covers: options, messages and exit statuses.
Does not cover: what the subcommands do; see :mod:`dask_gpurt.demo`, :mod:`dask_gpurt.doctor`, :mod:`dask_gpurt.explainer`,
:mod:`dask_gpurt.reporter`. Heavy libraries are imported when a subcommand
runs: ``dask --help`` imports this module.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

import dask_gpurt
from dask_gpurt.config import PARTS

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["gpurt"]

#: Libraries of the ``demo`` extra that are imported; tpchgen-cli is a program, and is looked for when it is needed.
DEMO_MODULES = ("pandas", "pyarrow", "duckdb", "bokeh", "rich")
#: Those of them that the bench imports.
BENCH_MODULES = ("pandas", "pyarrow", "rich")


def _nbytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    from dask.utils import parse_bytes

    if value is None:
        return None
    try:
        nbytes = int(parse_bytes(value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a size such as '2 GiB'", context, parameter) from error
    if nbytes < 384 * 2**20:
        raise click.BadParameter(
            f"{value!r} is too little: a worker with its libraries takes over 200 MiB; 384 MiB is the least that works",
            context,
            parameter,
        )
    return nbytes


_rounds = click.option(
    "--rounds", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each job and side."
)
_without = click.option(
    "--without",
    type=click.Choice(PARTS),
    multiple=True,
    help="Leave this part of dask-gpurt out; may be repeated. Without all three, stock Dask is compared with itself.",
)
_time_limit = click.option(
    "--time-limit",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Give a run up after this time.",
)
_json_path = click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures here."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(dask_gpurt.__version__, prog_name="dask-gpurt")
def gpurt() -> None:
    """Place, spill and shuffle better: dask-gpurt."""


@gpurt.command()
@click.option("--scale", type=click.FloatRange(min=0.01), default=1.0, show_default=True, help="TPC-H scale factor.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Worker processes.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of each worker.")
@click.option(
    "--memory-limit",
    callback=_nbytes,
    metavar="SIZE",
    help="Memory of each worker, of its GPU where it has one.  [default: 1.25 GiB; 16 GiB with a GPU]",
)
@click.option(
    "--array-size",
    callback=lambda c, p, v: None if v is None else _array_nbytes(c, p, v),
    metavar="SIZE",
    help="Size of the arrays.  [default: 1.1 times the memory of all workers]",
)
@_rounds
@click.option("--only", type=click.Choice(["tpch", "array"]), help="Run only these jobs.  [default: all]")
@_without
@_time_limit
@click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the TPC-H tables.  [default: ~/.cache/dask-gpurt]",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML report to this file.")
@_json_path
def demo(  # noqa: PLR0917 - click passes all of them by name
    scale: float,
    workers: int,
    threads: int,
    memory_limit: int | None,
    array_size: int | None,
    rounds: int,
    only: str | None,
    without: tuple[str, ...],
    time_limit: float,
    cache: Path | None,
    report: Path | None,
    json_path: Path | None,
) -> None:
    """Run a real workload on stock Dask and on dask-gpurt, and compare.

    TPC-H queries 3, 5, 9 and 18 with dask.dataframe, checked by DuckDB, and three array jobs on more data than the
    workers have memory, checked by NumPy. Each runs on both sides, in turns, on clusters of local processes.

    The exit status is 0 if all answers were right, 1 if not.
    """
    _check_modules(DEMO_MODULES)
    _check_folders(report, json_path)
    from dask_gpurt.demo.app import Options, run
    from dask_gpurt.errors import GpurtError

    options = Options(
        scale=scale,
        workers=workers,
        threads=threads,
        memory_limit_nbytes=memory_limit,
        array_nbytes=array_size,
        rounds=rounds,
        only=only,
        parts=tuple(part for part in PARTS if part not in without),
        limit_s=time_limit,
        cache=cache,
        report=report,
        json=json_path,
    )
    try:
        agreed = run(options)
    except GpurtError as error:
        raise click.ClickException(str(error)) from error
    if not agreed:
        raise SystemExit(1)


def _check_modules(modules: Sequence[str]) -> None:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise click.ClickException(f"{', '.join(missing)} not installed; try: pip install 'dask-gpurt[demo]'")


def _check_folders(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise click.ClickException(f"there is no folder {path.absolute().parent} to write {path.name} to")


def _array_nbytes(context: click.Context, parameter: click.Parameter, value: str) -> int:
    from dask.utils import parse_bytes

    try:
        nbytes = int(parse_bytes(value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a size such as '2 GiB'", context, parameter) from error
    if nbytes <= 0:
        raise click.BadParameter(f"{value!r} is not above zero", context, parameter)
    return nbytes


def _address(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    from distributed.comm.addressing import parse_address
    from distributed.comm.registry import get_backend

    if value is not None:
        try:
            get_backend(parse_address(value)[0])
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from error
    return value


_timeout = click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="Give up connecting to the scheduler after this time.",
)


@gpurt.command()
@click.option(
    "--scheduler",
    callback=_address,
    metavar="ADDRESS",
    help="Examine the cluster of this scheduler.  [default: this machine]",
)
@click.option("--measure/--no-measure", default=True, help="Measure what memory, disks, devices and networks carry.")
@click.option("--json", "as_json", is_flag=True, help="Print facts, findings and figures as JSON.")
@_timeout
def doctor(scheduler: str | None, measure: bool, as_json: bool, timeout: float) -> None:
    """Say what is found here, what is missing, and what mends it.

    On this machine, or on a running cluster: then the scheduler and every worker look at themselves. Nothing is installed or
    changed. What is measured takes some seconds, and writes at most 256 MiB to the disk of each machine.

    The exit status is 0 if nothing is broken, 1 if something that was asked for does not work.
    """
    from dask_gpurt.doctor.app import run

    if not run(scheduler, measure=measure, as_json=as_json, connect_s=timeout):
        raise SystemExit(1)


@gpurt.command()
@click.option(
    "--scheduler",
    callback=_address,
    metavar="ADDRESS",
    help="Measure on the cluster of this scheduler.  [default: 2 local workers of 1 GiB]",
)
@click.option(
    "--only",
    type=click.Choice(["shuffle", "merge", "rechunk", "spill"]),
    multiple=True,
    help="Run only this job; may be repeated.  [default: all; spill only where it takes no more than 8 GiB]",
)
@click.option(
    "--size",
    callback=_array_nbytes,
    default="128 MiB",
    show_default=True,
    metavar="SIZE",
    help="Data of each job for each worker, but for spill, which takes 1.1 times the memory of all workers.",
)
@_rounds
@_without
@_time_limit
@_json_path
@_timeout
def bench(  # noqa: PLR0917 - click passes all of them by name
    scheduler: str | None,
    only: tuple[str, ...],
    size: int,
    rounds: int,
    without: tuple[str, ...],
    time_limit: float,
    json_path: Path | None,
    timeout: float,
) -> None:
    """Measure on your own cluster what dask-gpurt gains.

    A shuffle, a merge, a rechunk and an array that is larger than memory, on stock Dask and on dask-gpurt, in turns; every answer is
    checked. Without --scheduler each run has a cluster of its own, on this machine.

    On your cluster dask-gpurt is installed and uninstalled for each run. Data that others hold there is kept, and at the end it is
    installed, with the same settings, if it was before. It has to be importable there, and the figures are good for as much as the cluster
    has nothing else to do.

    The exit status is 0 if all answers were right, 1 if not.
    """
    _check_modules(BENCH_MODULES)
    _check_folders(json_path)
    from dask_gpurt.demo.bench import Options, run
    from dask_gpurt.errors import GpurtError

    options = Options(
        scheduler=scheduler,
        connect_s=timeout,
        only=only,
        worker_nbytes=size,
        rounds=rounds,
        parts=tuple(part for part in PARTS if part not in without),
        limit_s=time_limit,
        json=json_path,
    )
    try:
        right = run(options)
    except GpurtError as error:
        raise click.ClickException(str(error)) from error
    if not right:
        raise SystemExit(1)


_scheduler = click.option(
    "--scheduler", required=True, callback=_address, metavar="ADDRESS", help="Address of the scheduler."
)


@contextlib.contextmanager
def _connected(scheduler: str, timeout: float) -> Iterator[Client]:
    from dask_gpurt.errors import GpurtError
    from dask_gpurt.terminal import connect

    try:
        client = connect(scheduler, timeout)
    except GpurtError as error:
        raise click.ClickException(str(error)) from error
    with client:
        yield client


@gpurt.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.html")
@_scheduler
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="How long to record; an interrupt (Ctrl-C) ends it earlier.",
)
@_timeout
def report(path: Path, scheduler: str, seconds: float, timeout: float) -> None:
    """Write an HTML file of what happens on a cluster.

    What is moved by which path, who sends to whom, bytes by tier, runs of shuffles, reasons of the placement, stalls, event loops. The
    file opens without a network. dask-gpurt has to be installed on the cluster. Encryption is as Dask's configuration says.

    In code: with dask_gpurt.report("run.html"): ...

    The exit status is 1 if there is no report.
    """
    _check_modules(("bokeh",))
    _check_folders(path)
    from dask_gpurt.errors import GpurtError
    from dask_gpurt.reporter import record

    try:
        with _connected(scheduler, timeout) as client:
            record(client, path, seconds)
    except (GpurtError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Report: {path}")


@gpurt.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_scheduler
@_timeout
def explain(keys: tuple[str, ...], scheduler: str, timeout: float) -> None:
    """Say why tasks went to their workers.

    KEY is the key of a task, as Dask shows it: name-0123, or "('x-0123', 0, 2)". Encryption is as Dask's configuration says.

    The exit status is 1 if the scheduler knows none of the tasks.
    """
    from dask_gpurt.explainer import explain as ask
    from dask_gpurt.terminal import progress

    with _connected(scheduler, timeout) as client, progress() as say:
        say(f"Asking {scheduler}")
        answer = ask(client, [_key(text) for text in keys])
    click.echo(str(answer))
    if not any(task.state != "unknown" or task.decisions for task in answer.tasks):
        raise SystemExit(1)


def _key(text: str) -> object:
    """Read a key: what looks like a tuple is one."""
    if text.startswith("("):
        try:
            key: object = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            return text
        return key
    return text
