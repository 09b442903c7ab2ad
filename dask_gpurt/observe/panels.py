"""The panels of the dashboard: what is on the board, drawn with Bokeh.

Covers: one class a panel. Each has a ``root`` that is laid out by a page, and an ``update`` that takes what the board has now.
Does not cover: the figures, which are the board's (:mod:`dask_gpurt.observe.board`); pages and colours of text
(:mod:`dask_gpurt.observe.pages`).

The number of workers decides nothing but how thick a row is: what is shown of each worker is a row of pixels or one of the busiest
few, so that a page of 200 workers has as much to read as one of 2, and sends about as much.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from bokeh.layouts import row
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CustomJSHover,
    CustomJSTickFormatter,
    FactorRange,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar, Legend, LegendItem
from bokeh.models.widgets import Div
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from dask.utils import format_bytes, format_time

from dask_gpurt.observe.board import INTERVAL_S, LENGTH, TIERS, Board, Run
from dask_gpurt.observe.reports import PATHS

__all__ = ["PANELS", "Panel"]

#: Told apart without colour vision, and on white as on black.
COLOURS = {"device": "#9467bd", "host": "#2b8cbe", "disk": "#e07b39", "object": "#8c8c8c"}
_FLOWING, _STILL = "#2ca25f", "#9e9e9e"
_NOTHING = "\N{EN DASH}"
#: Workers whose names are written beside their rows.
NAMED_MAX = 24
#: Workers and reasons that are shown.
BUSIEST, REASONS = 12, 12
#: Binary steps, for axes of bytes.
_BYTES: Mapping[str, Any] = {"base": 1024, "mantissas": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}
_SPAN_S = (LENGTH - 1) * INTERVAL_S


class Panel(Protocol):
    """Something that is shown."""

    #: Name of the panel in URLs, and for people.
    name: ClassVar[str]
    title: ClassVar[str]
    root: Any

    def update(self, board: Board) -> None:
        """Show what the board has."""


def _figure(title: str, **options: Any) -> Any:
    return figure(title=title, tools="", toolbar_location=None, sizing_mode="stretch_both", min_height=120, **options)


def _over_time(title: str, every_s: int = 60) -> Any:
    plot = _figure(title, x_range=Range1d(start=-_SPAN_S, end=0))
    plot.xaxis.ticker = list(range(0, -int(_SPAN_S), -every_s))
    plot.xaxis.formatter = CustomJSTickFormatter(code="return tick ? `${tick / 60} min` : 'now'")
    plot.xgrid.visible = False
    return plot


def _bytes_axis(axis: Any) -> None:
    axis.ticker = BasicTicker(**_BYTES)
    axis.formatter = NumeralTickFormatter(format="0.0 b")


class TiersPanel:
    """Bytes of each tier on the whole cluster, with what it may hold."""

    name: ClassVar[str] = "tiers"
    title: ClassVar[str] = "Bytes by tier"

    def __init__(self) -> None:
        columns = [f"{tier}{what}" for tier in TIERS for what in ("", "_area", "_limit")]
        self.source = ColumnDataSource({name: [] for name in ("age", *columns)})
        plot = self.root = _over_time(self.title)
        _bytes_axis(plot.yaxis[0])
        plot.y_range.start = 0
        self._glyphs: dict[str, list[Any]] = {}
        items = []
        for tier in TIERS:
            colour = COLOURS[tier]
            line = plot.line("age", tier, source=self.source, color=colour, line_width=2)
            area = plot.varea("age", 0, f"{tier}_area", source=self.source, color=colour, alpha=0.15)
            limit = plot.line("age", f"{tier}_limit", source=self.source, color=colour, line_dash="dashed")
            item = LegendItem(label=tier.upper(), renderers=[line])
            plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=[(tier.upper(), f"@{tier}{{0.00 b}}")]))
            items.append(item)
            self._glyphs[tier] = [line, area, limit, item]
        items.append(LegendItem(label="limit", renderers=[self._glyphs["host"][2]]))
        plot.add_layout(Legend(items=items, orientation="horizontal"), "above")

    def update(self, board: Board) -> None:
        tiers = board.tiers
        data: dict[str, Any] = {"age": board.ages_s}
        for tier in TIERS:
            data[tier], data[f"{tier}_limit"] = board.total(tier), board.limit(tier)
            # An area takes what is unknown for a straight way there.
            data[f"{tier}_area"] = np.nan_to_num(data[tier])
            for glyph in self._glyphs[tier]:
                glyph.visible = tier in tiers
        self.source.data = data
        now = (f"{tier.upper()} {_size(data[tier][-1], data[f'{tier}_limit'][-1])}" for tier in tiers)
        self.root.title.text = " · ".join(now) if tiers else f"{self.title}: no worker tells yet"


class WorkersPanel:
    """Bytes of each tier on each worker over time: a row a worker."""

    name: ClassVar[str] = "workers"
    title: ClassVar[str] = "Bytes by worker"

    def __init__(self) -> None:
        self._plots: dict[str, tuple[Any, ColumnDataSource, LinearColorMapper, ColumnDataSource]] = {}
        for tier in TIERS:
            plot = _over_time(tier.upper(), every_s=120)
            plot.y_range = Range1d(start=1, end=0)
            plot.min_width = 200
            # Room for the numbers of the bar, which get longer.
            plot.min_border_right = 78
            plot.ygrid.visible = False
            source = ColumnDataSource({"image": [], "rows": []})
            names = ColumnDataSource({"name": []})
            mapper = LinearColorMapper(palette=Cividis256, low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
            x, width = -_SPAN_S - INTERVAL_S / 2, _SPAN_S + INTERVAL_S
            image = plot.image("image", x=x, y=0, dw=width, dh="rows", source=source, color_mapper=mapper)
            who = CustomJSHover(args={"names": names}, code="return names.data.name[Math.floor(value)] ?? ''")
            plot.add_tools(
                HoverTool(
                    renderers=[image],
                    tooltips=[("worker", "$y{custom}"), ("bytes", "@image{0.00 b}")],
                    formatters={"$y": who},
                )
            )
            bar = ColorBar(
                color_mapper=mapper,
                width=10,
                formatter=NumeralTickFormatter(format="0.0 b"),
                ticker=BasicTicker(**_BYTES, desired_num_ticks=4),
                padding=4,
            )
            plot.add_layout(bar, "right")
            plot.visible = False
            self._plots[tier] = (plot, source, mapper, names)
        plots = (plot for plot, *_ in self._plots.values())
        self.root = row(*plots, sizing_mode="stretch_both", styles={"flex-wrap": "wrap"})

    def update(self, board: Board) -> None:
        for tier, (plot, source, mapper, names) in self._plots.items():
            plot.visible = tier in board.tiers
            if not plot.visible:
                continue
            found, rows = board.names(tier), board.by_worker(tier)
            limit = board.worker_limit(tier)
            high = limit or float(np.nanmax(rows, initial=1.0))
            plot.title.text = f"{tier.upper()} by worker" + (f" (of {format_bytes(limit)})" if limit else "")
            mapper.high = high
            if names.data["name"] != found:
                names.data = {"name": found}
                plot.y_range.start = len(found)
                few = len(found) <= NAMED_MAX
                plot.yaxis.ticker = [index + 0.5 for index in range(len(found))] if few else BasicTicker()
                plot.yaxis.major_label_overrides = (
                    {i + 0.5: _short(name) for i, name in enumerate(found)} if few else {}
                )
            # What is read off colours needs no more digits.
            source.data = {"image": [rows.astype(np.float32)], "rows": [len(found)]}


#: Middle of the box of a tier, and of all other workers, in the picture of what flows, and half of its width and height.
_PLACES = {
    "device": (0.0, 4.27, 0.42, 0.3),
    "host": (0.0, 2.6, 0.42, 0.72),
    "disk": (0.0, 0.93, 0.28, 0.3),
    "object": (0.0, -0.27, 0.42, 0.3),
    "peers": (2.5, 2.6, 0.42, 0.72),
}
#: What may flow: its name on the board, from, to, and how far beside the line between the middles.
_FLOWS: tuple[tuple[str, str, str, float], ...] = (
    ("device>host", "device", "host", -0.18),
    ("host>device", "host", "device", 0.18),
    ("host>disk", "host", "disk", -0.14),
    ("disk>host", "disk", "host", 0.14),
    ("disk>object", "disk", "object", -0.14),
    ("object>host", "object", "host", 0.36),
    ("host>object", "host", "object", -0.36),
    ("ucx", "host", "peers", 0.32),
    ("comm", "host", "peers", -0.12),
    ("inputs", "host", "peers", -0.56),
)


class FlowPanel:
    """What moves between tiers and workers at the moment."""

    name: ClassVar[str] = "flow"
    title: ClassVar[str] = "Moves now"

    def __init__(self) -> None:
        self.boxes = ColumnDataSource({name: [] for name in ("x", "y", "width", "height", "label", "detail", "colour")})
        columns = ("x0", "y0", "x1", "y1", "width", "colour", "angle", "what", "rate", "count")
        self.arrows = ColumnDataSource({name: [] for name in columns})
        self.labels = ColumnDataSource({"x": [], "y": [], "text": [], "align": [], "colour": []})
        plot = self.root = _figure(self.title, x_range=Range1d(start=-1.3, end=3.0), y_range=Range1d(start=0, end=1))
        plot.axis.visible = False
        plot.grid.visible = False
        lines = plot.segment("x0", "y0", "x1", "y1", source=self.arrows, line_width="width", color="colour", alpha=0.8)
        said = [("", "@what"), ("now", "@rate{0.00 b}/s"), ("so far", "@count{0.00 b}")]
        plot.add_tools(HoverTool(renderers=[lines], tooltips=said, line_policy="interp"))
        plot.scatter("x1", "y1", marker="triangle", size=11, angle="angle", source=self.arrows, color="colour")
        plot.rect(
            "x",
            "y",
            width="width",
            height="height",
            source=self.boxes,
            fill_color="colour",
            line_color=None,
            border_radius=6,
        )
        text = {"text_align": "center", "text_color": "white"}
        plot.text(
            "x",
            "y",
            "label",
            source=self.boxes,
            text_baseline="bottom",
            text_font_style="bold",
            text_font_size="12px",
            **text,
        )
        plot.text("x", "y", "detail", source=self.boxes, text_baseline="top", text_font_size="10px", **text)
        plot.text(
            "x",
            "y",
            "text",
            source=self.labels,
            text_align="align",
            text_baseline="middle",
            text_font_size="11px",
            text_color="colour",
        )

    def update(self, board: Board) -> None:
        rates, counts = board.rates(), board.counts()
        there = {*board.tiers, "peers"}
        shown = [flow for flow in _FLOWS if {flow[1], flow[2]} <= there]
        boxes = [(place, *at) for place, at in _PLACES.items() if place in there]
        self.root.y_range.start = min(y - half for _, _, y, _, half in boxes) - 0.1
        self.root.y_range.end = max(y + half for _, _, y, _, half in boxes) + 0.1
        self.boxes.data = {
            "x": [x for _, x, *_ in boxes],
            "y": [y for _, _, y, *_ in boxes],
            "width": [2 * half for *_, half, _ in boxes],
            "height": [2 * half for *_, half in boxes],
            "label": [place.upper() for place, *_ in boxes],
            "detail": [
                f"{len(board.reports)} workers" if p == "peers" else _size(board.total(p)[-1]) for p, *_ in boxes
            ],
            "colour": [COLOURS.get(place, "#4d4d4d") for place, *_ in boxes],
        }
        arrows = [_arrow(*flow[1:]) for flow in shown]
        self.arrows.data = {
            **{name: [a[i] for a in arrows] for i, name in enumerate(("x0", "y0", "x1", "y1"))},
            "angle": [math.atan2(y1 - y0, x1 - x0) - math.pi / 2 for x0, y0, x1, y1 in arrows],
            "width": [_width(rates[flow[0]]) for flow in shown],
            "colour": [_FLOWING if rates[flow[0]] else _STILL for flow in shown],
            "what": [PATHS.get(flow[0], f"{flow[1]} to {flow[2]}") for flow in shown],
            "rate": [rates[flow[0]] for flow in shown],
            "count": [counts[flow[0]] for flow in shown],
        }
        # Beyond all arrows.
        beside = 0.5 if "object" in there else 0.3
        labels = [
            _label(arrow, flow, rates[flow[0]], counts[flow[0]], beside)
            for arrow, flow in zip(arrows, shown, strict=True)
        ]
        self.labels.data = {
            name: [label[i] for label in labels] for i, name in enumerate(("x", "y", "text", "align", "colour"))
        }
        moving = sum(rates[flow[0]] for flow in shown)
        self.root.title.text = f"{self.title}: {format_bytes(int(moving))}/s" if moving else f"{self.title}: nothing"


def _arrow(source: str, target: str, beside: float) -> tuple[float, float, float, float]:
    (x0, y0, width0, height0), (x1, y1, width1, height1) = _PLACES[source], _PLACES[target]
    # The head is drawn around the end.
    if x0 != x1:
        return x0 + width0, y0 + beside, x1 - width1 - 0.03, y1 + beside
    down = -1 if y1 < y0 else 1
    return x0 + beside, y0 + down * height0, x1 + beside, y1 - down * (height1 + 0.08)


def _label(
    arrow: tuple[float, float, float, float],
    flow: tuple[str, str, str, float],
    rate: float,
    count: int,
    shift: float,
) -> tuple[float, float, str, str, str]:
    x0, y0, x1, y1 = arrow
    name, _, target, beside = flow
    # Where nothing moves, what has moved.
    said = f"{format_bytes(int(rate))}/s" if rate else format_bytes(count)
    colour = _FLOWING if rate else _STILL
    if target == "peers":
        return (x0 + x1) / 2, y0 + 0.22, f"{PATHS[name]}: {said}", "center", colour
    return shift if beside > 0 else -shift, (y0 + y1) / 2, said, "left" if beside > 0 else "right", colour


def _width(rate: float) -> float:
    """From 1 pixel for nothing to 9 for tens of GB/s: a pixel for each factor of 8 above 10 kB/s."""
    return 1.0 if rate <= 0 else float(min(9.0, 1.5 + max(0.0, math.log(rate / 1e4, 8))))


class MovesPanel:
    """The workers that move most."""

    name: ClassVar[str] = "moves"
    title: ClassVar[str] = "Busiest workers"
    _KINDS: ClassVar[Mapping[str, str]] = {
        "down": COLOURS["disk"],
        "up": COLOURS["host"],
        "sent": COLOURS["device"],
        "received": _FLOWING,
    }

    def __init__(self) -> None:
        self.source = ColumnDataSource({"worker": [], **{kind: [] for kind in self._KINDS}})
        plot = self.root = _figure(self.title, y_range=FactorRange())
        plot.hbar_stack(
            list(self._KINDS),
            y="worker",
            height=0.8,
            source=self.source,
            color=list(self._KINDS.values()),
            legend_label=["moved down", "moved up", "sent", "shards received"],
        )
        _bytes_axis(plot.xaxis[0])
        plot.x_range.start = 0
        plot.ygrid.visible = False
        plot.add_layout(plot.legend[0], "above")
        plot.legend.orientation = "horizontal"
        plot.add_tools(
            HoverTool(tooltips=[("worker", "@worker"), *((kind, f"@{kind}{{0.00 b}}/s") for kind in self._KINDS)])
        )

    def update(self, board: Board) -> None:
        # The busiest one on top.
        busiest = board.busiest(BUSIEST)[::-1]
        names = [name for name, _ in busiest]
        self.root.y_range.factors = names
        self.source.data = {"worker": names, **{kind: [rates[kind] for _, rates in busiest] for kind in self._KINDS}}
        moving = len(board.busiest(len(board.reports)))
        rest = f", the {len(names)} busiest" if moving > len(names) else ""
        of = f"{moving} of {len(board.reports)} move data{rest}; bytes/s"
        self.root.title.text = f"{self.title}: {of}" if moving else f"{self.title}: none moves data"


class ShufflesPanel:
    """Runs of shuffles, and the ways that their bytes go."""

    name: ClassVar[str] = "shuffles"
    title: ClassVar[str] = "Shuffles"
    _HEADS: ClassVar[Sequence[str]] = ("run", "workers", "inputs", "outputs", "sent", "to be sent", "waits")

    def __init__(self) -> None:
        self.root = _text_panel()

    def update(self, board: Board) -> None:
        runs = board.runs()
        begun = max((report.shuffles for _, report in board.reports), default=0)
        parts = [_title(f"{self.title}: {len(runs)} active, {begun} so far")]
        if runs:
            parts.append(_table(self._HEADS, map(_run_cells, runs)))
        counts, rates = board.counts(), board.rates()
        ways = {**{path: PATHS[path] for path in ("ucx", "comm")}, "local": "stayed here"}
        said = (
            f"<b>{html.escape(text)}</b> {format_bytes(counts[path])}"
            + (f" ({format_bytes(int(rates[path]))}/s)" if rates[path] else "")
            for path, text in ways.items()
        )
        waited_s = sum(report.credit_wait_s for _, report in board.reports)
        parts.append(f"<p>{' · '.join(said)} · <b>waited for room</b> {format_time(waited_s)}</p>")
        self.root.text = "".join(parts)


def _run_cells(run: Run) -> list[str]:
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(run.phases.items()))
    stuck = f"<b class='bad'>stuck: {html.escape(', '.join(map(_short, run.stuck[:3])))}</b>, " if run.stuck else ""
    waits = []
    if run.unanswered:
        waits.append(f"{run.unanswered} unanswered, {format_time(run.unanswered_s)}")
    if run.credits_wanted:
        waits.append(f"{run.credits_wanted} for room")
    return [
        html.escape(f"{run.shuffle_id[:8]} #{run.run_id}"),
        stuck + phases,
        f"{run.inputs:,}",
        f"{run.outputs:,} of {run.own_outputs:,}",
        format_bytes(run.sent_nbytes),
        format_bytes(run.outbox_nbytes) if run.outbox_nbytes else _NOTHING,
        "; ".join(waits) or _NOTHING,
    ]


class PlacementPanel:
    """Why tasks went where they went."""

    name: ClassVar[str] = "placement"
    title: ClassVar[str] = "Placement"

    def __init__(self) -> None:
        self.source = ColumnDataSource({"reason": [], "count": [], "text": []})
        plot = self.root = _figure(self.title, y_range=FactorRange())
        plot.hbar(y="reason", right="count", height=0.75, source=self.source, color=COLOURS["host"])
        plot.text(
            "count", "reason", "text", source=self.source, x_offset=4, text_baseline="middle", text_font_size="11px",
            text_color=_STILL,
        )  # fmt: skip
        plot.x_range.start = 0
        plot.x_range.range_padding = 0.5
        plot.xaxis.visible = False
        plot.grid.visible = False
        self.root = plot

    def update(self, board: Board) -> None:
        cluster = board.cluster
        reasons = sorted((cluster.reasons or {}).items(), key=lambda item: -item[1])[:REASONS][::-1]
        self.root.y_range.factors = [reason for reason, _ in reasons]
        self.source.data = {
            "reason": [reason for reason, _ in reasons],
            "count": [count for _, count in reasons],
            "text": [f"{count:,}" for _, count in reasons],
        }
        if cluster.reasons is None:
            self.root.title.text = f"{self.title}: stock Dask"
        else:
            errors = f", {cluster.errors} errors" if cluster.errors else ""
            self.root.title.text = f"{self.title}: {cluster.planned:,} planned, {cluster.waiting:,} wait{errors}"


class DecisionsPanel:
    """Where tasks went lately."""

    name: ClassVar[str] = "decisions"
    title: ClassVar[str] = "Latest decisions"

    def __init__(self) -> None:
        self.root = _text_panel()

    def update(self, board: Board) -> None:
        latest = board.cluster.latest
        rows = (
            [html.escape(text) for text in (_middle(p.key), p.reason, _short(p.worker) or _NOTHING)] for p in latest
        )
        table = _table(("task", "reason", "worker"), rows) if latest else "<p>none is remembered</p>"
        self.root.text = _title(self.title) + table


class HealthPanel:
    """How long event loops take for a turn: what they do beside takes the rest."""

    name: ClassVar[str] = "event-loop"
    title: ClassVar[str] = "Event loops"

    def __init__(self) -> None:
        names = {"scheduler": "scheduler", "worst": "slowest worker", "median": "median worker"}
        colours = {"scheduler": COLOURS["device"], "worst": COLOURS["disk"], "median": COLOURS["host"]}
        self.source = ColumnDataSource({"age": [], **{name: [] for name in names}})
        plot = self.root = _over_time(self.title)
        plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.yaxis.axis_label = "ms"
        plot.y_range.start = 0
        for name, label in names.items():
            line = plot.line("age", name, source=self.source, color=colours[name], line_width=2, legend_label=label)
            plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=[(label, f"@{name}{{0.0}} ms")]))
        plot.add_layout(plot.legend[0], "above")
        plot.legend.orientation = "horizontal"

    def update(self, board: Board) -> None:
        self.source.data = {"age": board.ages_s, **{name: 1000 * row for name, row in board.loops_s.items()}}
        slowest = board.slowest()
        said = f"scheduler {format_time(board.cluster.loop_s)}"
        if slowest is not None:
            said += f", slowest {_short(slowest.name)} {format_time(slowest.loop_s)}"
        self.root.title.text = f"{self.title}: {said}"


#: In the order of the page.
PANELS: tuple[type[Panel], ...] = (
    TiersPanel,
    FlowPanel,
    WorkersPanel,
    MovesPanel,
    HealthPanel,
    ShufflesPanel,
    PlacementPanel,
    DecisionsPanel,
)


# Text


def _text_panel() -> Div:
    return Div(sizing_mode="stretch_both", styles={"overflow": "auto"}, stylesheets=[_STYLE], min_height=120)


_STYLE = """
:host { font: 12px/1.45 Helvetica, Arial, sans-serif; }
h3 { font-size: 13px; margin: 2px 0 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: normal; opacity: .7; }
th, td { padding: 1px 8px 1px 0; border-bottom: 1px solid rgba(128, 128, 128, .25); white-space: nowrap; }
.bad { color: #e5484d; }
p { margin: 6px 0; }
.bk-clearfix { display: block; width: 100%; }
"""


def _title(text: str) -> str:
    return f"<h3>{html.escape(text)}</h3>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table; heads are text, cells are HTML."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _size(nbytes: float, limit_nbytes: float = math.nan) -> str:
    if math.isnan(nbytes):
        return _NOTHING
    return format_bytes(int(nbytes)) + ("" if math.isnan(limit_nbytes) else f" of {format_bytes(int(limit_nbytes))}")


def _short(worker: str) -> str:
    """Leave out of an address what all have."""
    return worker.rpartition("://")[2]


def _middle(key: str, longest: int = 40) -> str:
    """Shorten a key where it says least: most have a hash in the middle."""
    return key if len(key) <= longest else f"{key[: longest - 17]}…{key[-16:]}"
