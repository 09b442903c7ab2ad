"""The page of a report: one file with what was recorded, in numbers, plots and tables.

Covers: :func:`render`, and the plots that only a report has. All others are panels of the dashboard, drawn once
(:mod:`dask_gpurt.observe.history`, :mod:`dask_gpurt.observe.flow`, :mod:`dask_gpurt.observe.tables`).
Does not cover: what is recorded (:mod:`dask_gpurt.observe.recording`); writing files (:mod:`dask_gpurt.webpage`).
"""

from __future__ import annotations

import datetime as dt
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.models import ColumnDataSource, FactorRange, HoverTool
from dask.utils import format_bytes, format_time

import dask_gpurt
from dask_gpurt import webpage
from dask_gpurt.observe.drawing import COLOURS, FLOWING, Panel, Span, bytes_axis, over_time, short, size, table
from dask_gpurt.observe.flow import MatrixPanel
from dask_gpurt.observe.history import HealthPanel, TiersPanel, WorkersPanel
from dask_gpurt.observe.journal import ShuffleRun
from dask_gpurt.observe.pages import STATIC
from dask_gpurt.observe.recording import Recording
from dask_gpurt.observe.reports import LOCAL, PATHS
from dask_gpurt.observe.shuffles import HEADS, cells, spans
from dask_gpurt.observe.tables import PlacementPanel

__all__ = ["RUNS_DRAWN", "render"]

#: Runs of shuffles that have a bar: the latest.
RUNS_DRAWN = 40

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; background: #fafafa; color: #333333; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #dddddd; } }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.sub, th { opacity: .75; } .sub { margin-top: .2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } th { text-align: left; font-weight: normal; }
th, td { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid rgba(128, 128, 128, .25); white-space: nowrap; }
.wide { overflow-x: auto; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, max-content)); gap: 1rem 3rem; align-items: start; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(520px, 100%), 1fr)); grid-auto-rows: 300px; grid-auto-flow: dense; gap: 14px 22px; }
.plots > .broad { grid-column: 1 / -1; } .plots > .high { grid-row: span 2; }
"""


def render(recording: Recording, title: str) -> str:
    """Return the page.

    Parameters
    ----------
    recording
        One that was finished.
    title
        Stands at the top.
    """
    assert recording.elapsed_s is not None, "finished"
    span = Span.recorded(recording.elapsed_s, len(recording.times_s))
    event_loops, placement = HealthPanel(span), PlacementPanel()
    panels: list[tuple[str, Panel]] = [
        ("", TiersPanel(span)),
        ("broad", WorkersPanel(span)),
        ("high", MatrixPanel()),
        ("", placement),
        ("", event_loops),
    ]
    for _, panel in panels:
        panel.update(recording.board)
    event_loops.summarize(recording.board)
    placement.summarize(recording.board)
    between = {path: (text, colour) for (path, text), colour in zip(PATHS.items(), _PATH_COLOURS, strict=True)}
    moves = {name: _move(name) for name in sorted(recording.moved) if ">" in name}
    plots = {
        **{panel.name: (place, panel.root) for place, panel in panels},
        "between-workers": ("", _rates(recording, span, "Moved between workers", between)),
        "between-tiers": ("", _rates(recording, span, "Moved between tiers", moves)),
    }
    runs = recording.runs[:RUNS_DRAWN]
    if runs:
        plots["runs"] = ("broad", _bars(recording, runs, span))
    order = [name for name in _ORDER if name in plots]
    script, divisions = components([plots[name][1] for name in order], theme=STATIC)
    placed = dict(zip(order, divisions, strict=True))

    def grid(*names: str) -> str:
        there = (name for name in names if name in placed)
        return f'<div class="plots">{"".join(f"""<div class="{plots[n][0]}">{placed[n]}</div>""" for n in there)}</div>'

    began = dt.datetime.fromtimestamp(recording.begun_s, dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    workers = len(recording.board.cluster.workers)
    body = f"""<h1>{html.escape(title)}</h1>
<p class="sub">{format_time(recording.elapsed_s)} from {html.escape(began)}, {workers} worker{"" if workers == 1 else "s"} at the end, dask-gpurt {html.escape(dask_gpurt.__version__)}</p>
<div class="numbers">{_moved_table(recording)}{_tiers_table(recording)}</div>
<h2>Memory</h2>{grid("tiers", "between-tiers", "workers")}
<h2>Between workers</h2>{grid("matrix", "between-workers", "event-loop")}
<h2>Shuffles</h2>{_runs_table(recording)}{grid("runs")}
<h2>Placement</h2>{grid("placement")}
<h2>Stalls</h2>{_stalls_table(recording)}"""
    return webpage.page(title, _STYLE, script, body)


_ORDER = ("tiers", "between-tiers", "workers", "matrix", "between-workers", "event-loop", "runs", "placement")
_PATH_COLOURS = (FLOWING, COLOURS["disk"], COLOURS["device"])


def _move(name: str) -> tuple[str, str]:
    """Say what a move between tiers is called, and its colour: that of where it goes."""
    source, _, target = name.partition(">")
    return f"{source} to {target}", COLOURS[target]


def _rates(recording: Recording, span: Span, title: str, lines: Mapping[str, tuple[str, str]]) -> Any:
    """Plot bytes a second over time."""
    plot = over_time(title, span)
    bytes_axis(plot.yaxis[0])
    plot.y_range.start = 0
    for name, (text, colour) in lines.items():
        source = ColumnDataSource({"at": recording.times_s, "rate": recording.rates(name)})
        # A rate is the mean since the sample before.
        line = plot.step("at", "rate", source=source, mode="before", color=colour, line_width=2, legend_label=text)
        plot.add_tools(HoverTool(renderers=[line], tooltips=[(text, "@rate{0.00 b}/s"), ("", "@at{0.0} s")]))
    moved = sum(recording.total[name] for name in lines)
    plot.title.text = f"{title}: {format_bytes(int(moved))}" if moved else f"{title}: nothing"
    if lines:
        plot.add_layout(plot.legend[0], "above")
        plot.legend.orientation = "horizontal"
    return plot


def _bars(recording: Recording, runs: Sequence[ShuffleRun], span: Span) -> Any:
    """Plot when each run transferred and when it unpacked, the first one on top."""
    # The latest is the first in the list, and the axis goes up.
    names = [f"{run.shuffle_id[:8]} #{run.run_id}" for run in runs]
    plot = over_time("Runs of shuffles", span, y_range=FactorRange(factors=names))
    for position, (phase, colour) in enumerate((("transfer", COLOURS["disk"]), ("unpack", COLOURS["host"]))):
        bars = [
            (name, start_s - recording.begun_s, (end_s or np.inf) - recording.begun_s)
            for name, run in zip(names, runs, strict=True)
            for start_s, end_s in [spans(run)[position]]
            if start_s is not None
        ]
        source = ColumnDataSource(
            {
                "run": [name for name, _, _ in bars],
                # Clocks of workers are their own.
                "left": [float(np.clip(left, 0, span.end_s)) for _, left, _ in bars],
                "right": [float(np.clip(right, 0, span.end_s)) for _, _, right in bars],
            }
        )
        drawn = plot.hbar(
            y="run", left="left", right="right", height=0.7, source=source, color=colour, legend_label=phase
        )
        said = [("run", "@run"), (phase, "@left{0.00} s to @right{0.00} s")]
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=said))
    plot.ygrid.visible = False
    plot.add_layout(plot.legend[0], "above")
    plot.legend.orientation = "horizontal"
    return plot


def _moved_table(recording: Recording) -> str:
    names = {**PATHS, LOCAL: "shuffle, stayed on its worker"}
    names |= {name: _move(name)[0] for name in sorted(recording.moved) if ">" in name}
    elapsed_s = max(recording.elapsed_s or 0.0, 1e-9)
    rows = [
        [
            html.escape(text),
            format_bytes(recording.total[name]),
            f"{format_bytes(int(recording.total[name] / elapsed_s))}/s",
        ]
        for name, text in names.items()
    ]
    waited = ["waited for room at peers", format_time(recording.total["credit_wait_s"]), ""]
    return table(("what moved", "in all", "on average"), [*rows, waited])


def _tiers_table(recording: Recording) -> str:
    board = recording.board
    rows = [
        [tier.upper(), size(recording.peaks[tier], float(board.limit(tier)[-1])), size(float(board.total(tier)[-1]))]
        for tier in recording.tiers
    ]
    return _or_nothing(("tier", "most at once", "at the end"), rows, "No worker has tiers.")


def _runs_table(recording: Recording) -> str:
    rows = [[html.escape(text) for text in cells(run)] for run in recording.runs]
    return f'<div class="wide">{_or_nothing(HEADS, rows, "None ran on the data plane of dask-gpurt.")}</div>'


def _stalls_table(recording: Recording) -> str:
    rows = [
        [f"{stall.at_s:.1f} s", html.escape(short(stall.worker)), html.escape(stall.what), format_time(stall.elapsed_s)]
        for stall in recording.stalls
    ]
    return _or_nothing(("at", "who", "what stood still", "for"), rows, "Nothing stood still for a second.")


def _or_nothing(heads: Sequence[str], rows: Iterable[Sequence[str]], otherwise: str) -> str:
    rows = list(rows)
    return table(heads, rows) if rows else f"<p>{html.escape(otherwise)}</p>"
