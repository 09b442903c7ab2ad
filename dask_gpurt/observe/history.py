"""Panels over time: bytes of tiers, in total and by worker, and how event loops fare.

See also: :mod:`dask_gpurt.observe.board`, which keeps the figures.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from bokeh.layouts import row
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    CustomJSHover,
    HoverTool,
    LinearColorMapper,
    NumeralTickFormatter,
    Range1d,
)
from bokeh.models.annotations import ColorBar, Legend, LegendItem
from bokeh.palettes import Cividis256
from dask.utils import format_bytes, format_time

from dask_gpurt.observe.board import TIERS, Board
from dask_gpurt.observe.drawing import BYTES_STEPS, COLOURS, LIVE, Span, bytes_axis, name_axis, over_time, short, size

__all__ = ["HealthPanel", "TiersPanel", "WorkersPanel"]


class TiersPanel:
    """Bytes of each tier on the whole cluster, with what it may hold."""

    name: ClassVar[str] = "tiers"
    title: ClassVar[str] = "Bytes by tier"

    def __init__(self, span: Span = LIVE) -> None:
        columns = [f"{tier}{what}" for tier in TIERS for what in ("", "_area", "_limit")]
        self.source = ColumnDataSource({name: [] for name in ("age", *columns)})
        plot = self.root = over_time(self.title, span)
        bytes_axis(plot.yaxis[0])
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
        """Show the sums of all workers, of tiers that some worker has."""
        tiers = board.tiers
        data: dict[str, Any] = {"age": board.ages_s}
        for tier in TIERS:
            data[tier], data[f"{tier}_limit"] = board.total(tier), board.limit(tier)
            # An area takes what is unknown for a straight way there.
            data[f"{tier}_area"] = np.nan_to_num(data[tier])
            for glyph in self._glyphs[tier]:
                glyph.visible = tier in tiers
        self.source.data = data
        now = [f"{tier.upper()} {size(data[tier][-1], data[f'{tier}_limit'][-1])}" for tier in tiers]
        # More than two are too much for a line of a small panel.
        lines = (" · ".join(now[place : place + 2]) for place in range(0, len(now), 2))
        self.root.title.text = "\n".join(lines) if tiers else f"{self.title}: no worker tells yet"


class WorkersPanel:
    """Bytes of each tier on each worker over time: a row a worker."""

    name: ClassVar[str] = "workers"
    title: ClassVar[str] = "Bytes by worker"

    def __init__(self, span: Span = LIVE) -> None:
        self._plots: dict[str, tuple[Any, ColumnDataSource, LinearColorMapper, ColumnDataSource]] = {}
        for tier in TIERS:
            plot = over_time(tier.upper(), span, narrow=True)
            plot.y_range = Range1d(start=1, end=0)
            plot.min_width = 200
            # Room for the numbers of the bar, which get longer.
            plot.min_border_right = 78
            plot.ygrid.visible = False
            source = ColumnDataSource({"image": [], "rows": []})
            names = ColumnDataSource({"name": []})
            mapper = LinearColorMapper(palette=Cividis256, low=0, high=1, nan_color="rgba(0, 0, 0, 0)")
            x, width = span.start_s - span.step_s / 2, span.end_s - span.start_s + span.step_s
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
                ticker=BasicTicker(**BYTES_STEPS, desired_num_ticks=4),
                padding=4,
            )
            plot.add_layout(bar, "right")
            plot.visible = False
            self._plots[tier] = (plot, source, mapper, names)
        plots = (plot for plot, *_ in self._plots.values())
        self.root = row(*plots, sizing_mode="stretch_both", styles={"flex-wrap": "wrap"})

    def update(self, board: Board) -> None:
        """Show a row for each worker, of tiers that some worker has."""
        for tier, (plot, source, mapper, names) in self._plots.items():
            plot.visible = tier in board.tiers
            if not plot.visible:
                continue
            found, rows = board.names(tier), board.by_worker(tier)
            limit = board.worker_limit(tier)
            high = limit or float(np.nanmax(rows, initial=1.0))
            said = f" (of {format_bytes(limit)})" if limit and len(board.tiers) <= 2 else ""
            plot.title.text = f"{tier.upper()} by worker{said}"
            mapper.high = high
            if names.data["name"] != found:
                names.data = {"name": found}
                plot.y_range.start = len(found)
                name_axis(plot.yaxis[0], found)
            # What is read off colours needs no more digits.
            source.data = {"image": [rows.astype(np.float32)], "rows": [len(found)]}


class HealthPanel:
    """How long event loops take for a turn: what they do beside takes the rest."""

    name: ClassVar[str] = "event-loop"
    title: ClassVar[str] = "Event loops"

    def __init__(self, span: Span = LIVE) -> None:
        names = {"scheduler": "scheduler", "worst": "slowest worker", "median": "median worker"}
        colours = {"scheduler": COLOURS["device"], "worst": COLOURS["disk"], "median": COLOURS["host"]}
        self.source = ColumnDataSource({"age": [], **{name: [] for name in names}})
        plot = self.root = over_time(self.title, span)
        plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
        plot.yaxis.axis_label = "ms"
        plot.y_range.start = 0
        for name, label in names.items():
            line = plot.line("age", name, source=self.source, color=colours[name], line_width=2, legend_label=label)
            plot.add_tools(HoverTool(renderers=[line], mode="vline", tooltips=[(label, f"@{name}{{0.0}} ms")]))
        plot.add_layout(plot.legend[0], "above")
        plot.legend.orientation = "horizontal"

    def update(self, board: Board) -> None:
        """Show the scheduler, the median worker and the slowest one."""
        self.source.data = {"age": board.ages_s, **{name: 1000 * row for name, row in board.loops_s.items()}}
        slowest = board.slowest()
        said = f"scheduler {format_time(board.cluster.loop_s)}"
        if slowest is not None:
            said += f", worker {short(slowest.name)} {format_time(slowest.loop_s)}"
        self.root.title.text = f"{self.title}: {said}"

    def summarize(self, board: Board) -> None:
        """Say what was worst, which is what one wants to know afterwards."""
        worst = {name: float(np.nanmax(board.loops_s[name], initial=0.0)) for name in ("scheduler", "worst")}
        self.root.title.text = f"{self.title}: at worst scheduler {format_time(worst['scheduler'])}, a worker {format_time(worst['worst'])}"
