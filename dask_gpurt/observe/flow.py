"""Panels of what moves: between tiers and to other workers, which workers move most, and who sends to whom.

See also: :mod:`dask_gpurt.observe.board`, which makes rates of counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CustomJSHover,
    FactorRange,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar
from bokeh.palettes import Cividis256
from dask.utils import format_bytes

from dask_gpurt.observe.board import Board
from dask_gpurt.observe.drawing import BYTES_STEPS, COLOURS, FLOWING, STILL, bytes_axis, name_axis, plain_figure, size
from dask_gpurt.observe.matrix import Matrix
from dask_gpurt.observe.reports import PATHS

__all__ = ["BUSIEST", "FlowPanel", "MatrixPanel", "MovesPanel"]

#: Workers that are shown.
BUSIEST = 12
#: Workers whose names are written beside the rows and columns of the matrix.
NAMED_MAX = 16

#: Middle of the box of a tier, and of all other workers, in the picture of what flows, and half of its width and height.
_PLACES = {
    "device": (0.0, 4.5, 0.42, 0.36),
    "host": (0.0, 2.6, 0.42, 0.86),
    "disk": (0.0, 0.7, 0.28, 0.36),
    "object": (0.0, -0.62, 0.42, 0.36),
    "peers": (2.5, 2.6, 0.42, 0.86),
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
    ("ucx", "host", "peers", 0.44),
    ("comm", "host", "peers", -0.15),
    ("inputs", "host", "peers", -0.74),
)


class FlowPanel:
    """What moves between tiers and workers at the moment."""

    name: ClassVar[str] = "flow"
    title: ClassVar[str] = "Moves now"

    def __init__(self) -> None:
        self.boxes = ColumnDataSource({name: [] for name in ("x", "y", "width", "height", "label", "detail", "colour")})
        columns = ("x0", "y0", "x1", "y1", "width", "colour", "angle", "what", "rate", "count")
        self.arrows = ColumnDataSource({name: [] for name in columns})
        self.labels = ColumnDataSource({"x": [], "y": [], "text": [], "align": [], "colour": [], "above": []})
        plot = self.root = plain_figure(
            self.title, x_range=Range1d(start=-1.3, end=3.0), y_range=Range1d(start=0, end=1)
        )
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
            y_offset="above",
            text_align="align",
            text_baseline="middle",
            text_font_size="11px",
            text_color="colour",
        )

    def update(self, board: Board) -> None:
        """Show the rates, and where nothing moves what has moved."""
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
                f"{len(board.reports)} workers" if p == "peers" else size(board.total(p)[-1]) for p, *_ in boxes
            ],
            "colour": [COLOURS.get(place, "#4d4d4d") for place, *_ in boxes],
        }
        arrows = [_arrow(*flow[1:]) for flow in shown]
        self.arrows.data = {
            **{name: [a[i] for a in arrows] for i, name in enumerate(("x0", "y0", "x1", "y1"))},
            "angle": [math.atan2(y1 - y0, x1 - x0) - math.pi / 2 for x0, y0, x1, y1 in arrows],
            "width": [_width(rates[flow[0]]) for flow in shown],
            "colour": [FLOWING if rates[flow[0]] else STILL for flow in shown],
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
            name: [label[i] for label in labels]
            for i, name in enumerate(("x", "y", "text", "align", "colour", "above"))
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
) -> tuple[float, float, str, str, str, int]:
    x0, y0, x1, y1 = arrow
    name, _, target, beside = flow
    # Where nothing moves, what has moved.
    said = f"{format_bytes(int(rate))}/s" if rate else format_bytes(count)
    colour = FLOWING if rate else STILL
    if target == "peers":
        # In pixels: the text and the arrow have as many, whatever the size of the panel.
        return (x0 + x1) / 2, y0, f"{PATHS[name]}: {said}", "center", colour, -10
    return shift if beside > 0 else -shift, (y0 + y1) / 2, said, "left" if beside > 0 else "right", colour, 0


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
        "received": FLOWING,
    }

    def __init__(self) -> None:
        self.source = ColumnDataSource({"worker": [], **{kind: [] for kind in self._KINDS}})
        plot = self.root = plain_figure(self.title, y_range=FactorRange())
        plot.hbar_stack(
            list(self._KINDS),
            y="worker",
            height=0.8,
            source=self.source,
            color=list(self._KINDS.values()),
            legend_label=["moved down", "moved up", "sent", "shards received"],
        )
        bytes_axis(plot.xaxis[0])
        plot.xaxis.axis_label = "bytes/s"
        plot.x_range.start = 0
        plot.ygrid.visible = False
        plot.add_layout(plot.legend[0], "above")
        plot.legend.orientation = "horizontal"
        plot.add_tools(
            HoverTool(tooltips=[("worker", "@worker"), *((kind, f"@{kind}{{0.00 b}}/s") for kind in self._KINDS)])
        )

    def update(self, board: Board) -> None:
        """Show the busiest workers, the busiest one on top."""
        busiest = board.busiest(BUSIEST)[::-1]
        names = [name for name, _ in busiest]
        self.root.y_range.factors = names
        self.source.data = {"worker": names, **{kind: [rates[kind] for _, rates in busiest] for kind in self._KINDS}}
        moving = len(board.busiest(len(board.reports)))
        said = f"{moving} of {len(board.reports)} move data" if moving else "none moves data"
        self.root.title.text = f"{self.title}: {said}"


class MatrixPanel:
    """Bytes from worker to worker: a row for each sender, a column for each receiver."""

    name: ClassVar[str] = "matrix"
    title: ClassVar[str] = "Worker to worker"

    def __init__(self) -> None:
        columns = ("image", *PATHS, "count")
        self.source = ColumnDataSource({name: [] for name in columns})
        self.names = ColumnDataSource({"name": []})
        plot = self.root = plain_figure(self.title, x_range=Range1d(start=0, end=1), y_range=Range1d(start=1, end=0))
        plot.xaxis.axis_label, plot.yaxis.axis_label = "to", "from"
        plot.grid.visible = False
        plot.min_border_right = 78
        #: Pairs between which nothing went have no colour.
        self.mapper = LinearColorMapper(palette=Cividis256, low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
        image = plot.image("image", x=0, y=0, dw="count", dh="count", source=self.source, color_mapper=self.mapper)
        who = CustomJSHover(args={"names": self.names}, code="return names.data.name[Math.floor(value)] ?? ''")
        said = [("from", "$y{custom}"), ("to", "$x{custom}"), ("bytes", "@image{0.00 b}")]
        said += [(text, f"@{path}{{0.00 b}}") for path, text in PATHS.items()]
        plot.add_tools(HoverTool(renderers=[image], tooltips=said, formatters={"$x": who, "$y": who}))
        ticker = BasicTicker(**BYTES_STEPS, desired_num_ticks=4)
        formatter = NumeralTickFormatter(format="0.0 b")
        bar = ColorBar(color_mapper=self.mapper, width=10, formatter=formatter, ticker=ticker, padding=4)
        plot.add_layout(bar, "right")
        self._shown: Matrix | None = None

    def update(self, board: Board) -> None:
        """Show what workers have said when they were asked last."""
        matrix = board.matrix
        if matrix is None:
            self.root.title.text = f"{self.title}: the workers are being asked"
        if matrix is None or matrix is self._shown:
            return
        self._shown = matrix
        count, total = len(matrix.names), matrix.total
        self.names.data = {"name": list(matrix.names)}
        self.root.x_range.end = self.root.y_range.start = max(1, count)
        for axis in (self.root.xaxis[0], self.root.yaxis[0]):
            name_axis(axis, matrix.names, NAMED_MAX)
        long = count <= NAMED_MAX and max(map(len, matrix.names), default=0) > 4
        self.root.xaxis.major_label_orientation = math.pi / 4 if long else "horizontal"
        self.mapper.high = float(total.max(initial=1.0))
        images = {"image": np.where(total > 0, total, np.nan), **matrix.nbytes}
        # What is read off colours needs no more digits.
        data = {name: [image.astype(np.float32)] if count else [] for name, image in images.items()}
        self.source.data = {**data, "count": [count] if count else []}
        moved = format_bytes(int(total.sum()))
        self.root.title.text = f"{self.title}: {moved}" if total.any() else f"{self.title}: nothing yet"
