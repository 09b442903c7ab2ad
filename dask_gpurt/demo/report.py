"""The HTML report: one file that opens without a network.

Covers: the page, its plots (Bokeh, scripts inlined) and its table.
Does not cover: where the figures come from; see :mod:`dask_gpurt.demo.runner`; the file; see :mod:`dask_gpurt.webpage`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from bokeh.embed import components
from bokeh.models import ColumnDataSource, FactorRange, Range1d, VSpan
from bokeh.plotting import figure
from bokeh.transform import dodge
from dask.utils import format_bytes

from dask_gpurt import webpage
from dask_gpurt.demo.runner import METRICS, Comparison, Metric
from dask_gpurt.demo.show import EVEN, format_ratio, format_value

__all__ = ["render"]

#: First side, second side: told apart without colour vision, and in print.
COLOURS = ("#9aa5b1", "#d9730d")

#: Ratios from 1/REACH to REACH are plotted where they are.
REACH = 16

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.sub { color: #616e7c; margin-top: .2rem; }
.bad { background: #fde8e8; border-left: 4px solid #c81e1e; padding: .5rem 1rem; }
.good { background: #e6f6ec; border-left: 4px solid #2f855a; padding: .5rem 1rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
th, td { padding: .25rem .6rem; } td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.first td { border-top: 1px solid #cbd2d9; } tr.ratio td { color: #616e7c; }
tr.ratio td.better { color: #2f855a; font-weight: 600; } tr.ratio td.worse { color: #c81e1e; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; } dt { color: #616e7c; } dd { margin: 0; }
"""


def render(comparisons: Sequence[Comparison], about: Mapping[str, Any], settings: Mapping[str, str]) -> str:
    """Return the whole page.

    Parameters
    ----------
    comparisons
        What came out, job by job.
    about
        Machine, versions and command, as :func:`dask_gpurt.demo.machine.describe` returns them.
    settings
        Name -> value of what was chosen for this run, in words.
    """
    plots = [_bars(comparisons, metric) for metric in METRICS]
    plots = [plot for plot in plots if plot is not None]
    script, divisions = components([_ratios(comparisons), *plots])
    problems = [problem for comparison in comparisons for problem in comparison.problems()]
    if problems:
        items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        verdict = f'<div class="bad"><b>Not all answers agreed.</b><ul>{items}</ul></div>'
    else:
        verdict = '<div class="good"><b>All answers agreed</b> with those of DuckDB and NumPy, on both sides.</div>'
    facts = {**settings, **_facts(about)}
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items())
    body = f"""<h1>dask-gpurt beside stock Dask</h1>
<p class="sub">{html.escape(str(about["time"]))}, by <code>{html.escape(str(about["command"]))}</code></p>
{verdict}
<h2>Ratios</h2>
<p class="sub">Stock ÷ dask-gpurt, median over the rounds. To the right of 1 dask-gpurt is better.</p>
{divisions[0]}
<h2>Figures</h2>
<p class="sub">Bars are medians, dots are single runs. Less is better.</p>
<div class="plots">{"".join(divisions[1:])}</div>
<h2>Table</h2>
{_table(comparisons)}
<h2>How it was measured</h2>
<p>Each run has a fresh cluster, warmed up alike. Bytes between workers are counted where they are sent, by one
instrument on both sides; traffic with the scheduler and the client is left out. Spilled is what the workers wrote to
files, also for a shuffle. Peak memory is the sum of the workers' highest resident sets.</p>
<dl>{listed}</dl>"""
    return webpage.page("dask-gpurt beside stock Dask", _STYLE, script, body)


def _facts(about: Mapping[str, Any]) -> dict[str, str]:
    machine = about["machine"]
    memory = format_bytes(machine["memory_nbytes"])
    return {
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {memory}",
        "System": f"{machine['system']}, {machine['architecture']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
    }


def _bars(comparisons: Sequence[Comparison], metric: Metric) -> Any:
    """Plot one metric of all jobs; None if nothing was measured."""
    divisor, unit = 1.0, "s"
    if metric.unit == "B":
        divisor, unit = (2.0**30, "GiB") if _upper(comparisons, metric) >= 2.0**30 else (2.0**20, "MiB")
    jobs = [comparison.job for comparison in comparisons][::-1]
    plot = figure(
        y_range=FactorRange(factors=jobs),
        height=80 + 45 * len(jobs),
        sizing_mode="stretch_width",
        title=f"{metric.title} ({unit})",
        toolbar_location=None,
        x_range=Range1d(start=0, end=_upper(comparisons, metric) / divisor),
    )
    for side, colour, offset in zip(_sides(comparisons), COLOURS, (0.19, -0.19), strict=True):
        medians = {comparison.job: comparison.median(metric, side) for comparison in comparisons}
        bars = {job: value / divisor for job, value in medians.items() if value is not None}
        source = ColumnDataSource({"job": list(bars), "value": list(bars.values())})
        plot.hbar(
            y=dodge("job", offset, range=plot.y_range),
            right="value",
            height=0.34,
            source=source,
            color=colour,
            legend_label=side,
        )
        dots = [(c.job, value / divisor) for c in comparisons for value in c.values(metric, side)]
        source = ColumnDataSource({"job": [job for job, _ in dots], "value": [value for _, value in dots]})
        plot.scatter(
            x="value", y=dodge("job", offset, range=plot.y_range), source=source, color="#1f2933", size=4, alpha=0.7
        )
    if not any(c.values(metric, side) for c in comparisons for side in _sides(comparisons)):
        return None
    _dress(plot)
    plot.add_layout(plot.legend[0], "below")
    plot.legend.orientation = "horizontal"
    plot.legend.border_line_color = None
    return plot


def _ratios(comparisons: Sequence[Comparison]) -> Any:
    """Plot all ratios on a logarithmic axis, so that 2 and 1/2 are equally far from 1.

    What lies beyond the axis, or is infinite, stands at its edge with its value written beside it.
    """
    jobs = [comparison.job for comparison in comparisons][::-1]
    plot = figure(
        y_range=FactorRange(factors=jobs),
        x_axis_type="log",
        x_range=Range1d(start=0.8 / REACH, end=1.25 * REACH),
        height=90 + 48 * len(jobs),
        sizing_mode="stretch_width",
        toolbar_location=None,
    )
    marks = ("circle", "square", "triangle", "diamond")
    colours = ("#d9730d", "#2b6cb0", "#2f855a", "#805ad5")
    offsets = (0.27, 0.09, -0.09, -0.27)
    for metric, mark, colour, offset in zip(METRICS, marks, colours, offsets, strict=True):
        points = [(c.job, ratio) for c in comparisons if (ratio := c.ratio(metric)) is not None]
        data: dict[str, Any] = {
            "job": [job for job, _ in points],
            "at": [min(max(ratio, 1 / REACH), REACH) for _, ratio in points],
            "text": ["" if 1 / REACH <= ratio <= REACH else format_ratio(ratio) for _, ratio in points],
        }
        source = ColumnDataSource(data)
        y = dodge("job", offset, range=plot.y_range)
        plot.scatter(x="at", y=y, source=source, marker=mark, size=9, color=colour, legend_label=metric.title)
        plot.text(
            x="at",
            y=y,
            text="text",
            source=source,
            x_offset=-8,
            text_align="right",
            text_baseline="middle",
            text_font_size="8pt",
            text_color=colour,
        )
    plot.add_glyph(VSpan(x=1, line_color="#616e7c", line_dash="dashed"))
    _dress(plot)
    steps = [2**power for power in range(round(math.log2(REACH)) + 1)]
    plot.xaxis.ticker = [1 / step for step in steps[:0:-1]] + steps
    labels: dict[Any, Any] = {step: str(step) for step in steps} | {1 / step: f"1/{step}" for step in steps[1:]}
    plot.xaxis.major_label_overrides = labels
    plot.add_layout(plot.legend[0], "right")
    plot.legend.border_line_color = None
    return plot


def _dress(plot: Any) -> None:
    plot.outline_line_color = None
    plot.ygrid.grid_line_color = None
    plot.yaxis.major_tick_line_color = None
    plot.axis.axis_line_color = "#cbd2d9"
    plot.yaxis.major_label_text_font_size = "10pt"


def _upper(comparisons: Sequence[Comparison], metric: Metric) -> float:
    values = [value for c in comparisons for side in c.sides for value in c.values(metric, side)]
    return 1.05 * max(values, default=1.0) or 1.0


def _sides(comparisons: Sequence[Comparison]) -> tuple[str, str]:
    return comparisons[0].sides if comparisons else ("", "")


def _table(comparisons: Sequence[Comparison]) -> str:
    heads = "".join(f'<th class="number">{html.escape(metric.title)}</th>' for metric in METRICS)
    rows = []
    for comparison in comparisons:
        for side in comparison.sides:
            first = side == comparison.sides[0]
            figures = "".join(
                f'<td class="number">{format_value(comparison.median(metric, side), metric)}</td>' for metric in METRICS
            )
            runs = [run for run in comparison.outcomes if run.side == side]
            verdict = "right" if runs and all(run.right for run in runs) else "<b>failed or wrong</b>"
            rows.append(
                f'<tr class="{"first" if first else ""}"><td>{html.escape(comparison.job) if first else ""}</td>'
                f"<td>{html.escape(side)}</td>{figures}<td>{verdict}</td></tr>"
            )
        ratios = "".join(_ratio_cell(comparison.ratio(metric)) for metric in METRICS)
        rows.append(f'<tr class="ratio"><td></td><td>ratio</td>{ratios}<td></td></tr>')
    return f"<table><tr><th>job</th><th>side</th>{heads}<th>answer</th></tr>{''.join(rows)}</table>"


def _ratio_cell(ratio: float | None) -> str:
    kind = "" if ratio is None or abs(ratio - 1) < EVEN else "better" if ratio > 1 else "worse"
    return f'<td class="number {kind}">{format_ratio(ratio)}</td>'
