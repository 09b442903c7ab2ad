"""What people see in the terminal: the progress while it runs, the table at the end.

Covers: figures and ratios in words (shared with the HTML report), the table, the progress display.
Does not cover: the HTML page; see :mod:`dask_gpurt.demo.report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

from dask.utils import format_bytes
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dask_gpurt.demo.cluster import Side
from dask_gpurt.demo.runner import METRICS, Comparison, Job, Metric, Outcome

__all__ = ["EVEN", "Display", "format_ratio", "format_value", "make_table"]

#: Ratios nearer to 1 than this are shown without a colour: they are within what repeated runs differ by.
EVEN = 0.05


def format_value(value: float | None, metric: Metric) -> str:
    """Put a figure into words.

    Examples
    --------
    >>> format_value(2.345, METRICS[0]), format_value(3 * 2**30, METRICS[1]), format_value(None, METRICS[0])
    ('2.35 s', '3.00 GiB', '-')
    """
    if value is None:
        return "-"
    return f"{value:.2f} s" if metric.unit == "s" else format_bytes(round(value))


def format_ratio(ratio: float | None) -> str:
    """Put a ratio into words.

    Examples
    --------
    >>> format_ratio(1.534), format_ratio(5e5), format_ratio(float("inf")), format_ratio(None)
    ('1.53', '> 1000', '∞', '-')
    """
    if ratio is None:
        return "-"
    if math.isinf(ratio):
        return "∞"
    # What is left of the second side then is no workload's, but a runtime's small change.
    return "> 1000" if ratio > 1000 else f"{ratio:.2f}"


def make_table(comparisons: Sequence[Comparison]) -> Table:
    """Return the table of all jobs, two rows a job, and the ratio of each figure."""
    caption = "Less is better. A ratio, stock ÷ dask-gpurt, above 1 speaks for dask-gpurt."
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=78)
    table.add_column("job", style="bold", no_wrap=True)
    table.add_column("side", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric.short, justify="right", no_wrap=True)
    table.add_column("answer")
    for comparison in comparisons:
        for side in comparison.sides:
            runs = [run for run in comparison.outcomes if run.side == side]
            figures = [format_value(comparison.median(metric, side), metric) for metric in METRICS]
            first = side == comparison.sides[0]
            table.add_row(comparison.job if first else "", side, *figures, _verdict(runs))
        ratios = [_coloured(comparison.ratio(metric)) for metric in METRICS]
        table.add_row("", Text("ratio", style="dim"), *ratios, "")
        table.add_row()
    return table


def _verdict(runs: Sequence[Outcome]) -> Text:
    if not runs:
        return Text("-")
    if any(run.error is not None for run in runs):
        return Text("failed", style="bold red")
    if not all(run.right for run in runs):
        return Text("wrong", style="bold red")
    if any(run.usage is not None and run.usage.lost_workers for run in runs):
        return Text("right, lost workers", style="yellow")
    return Text("right", style="green")


def _coloured(ratio: float | None) -> Text:
    style = "dim"
    if ratio is not None and abs(ratio - 1) >= EVEN:
        style = "bold green" if ratio > 1 else "bold red"
    return Text(format_ratio(ratio), style=style)


class Display:
    """Shows which run is on and how far the whole is; where there is no terminal, a line a finished run."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=runs)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, job: Job, side: Side, number: int) -> None:  # noqa: ARG002
        """Show that a run begins."""
        self._progress.update(self._task, description=f"[bold]{job.name}[/] on {side.name}: {job.title}")

    def end(self, outcome: Outcome) -> None:
        """Show how a run ended."""
        if outcome.usage is None:
            said = f"[red]failed: {outcome.error}[/]"
        else:
            said = "  ".join(f"{format_value(metric.of(outcome.usage), metric):>11}" for metric in METRICS)
            if outcome.differences:
                said += f"  [red]wrong: {outcome.differences[0]}[/]"
        self._console.print(f"{outcome.job:>10} {outcome.side:<11}{said}", highlight=False)
        self._progress.advance(self._task)
