"""What panels are drawn with: plots, axes, colours and text that look alike.

Covers: :class:`Panel`, what a page wants of a panel; figures, axes and tables.
Does not cover: the panels (:mod:`dask_gpurt.observe.history`, :mod:`dask_gpurt.observe.flow`,
:mod:`dask_gpurt.observe.tables`); colours of text and page (:mod:`dask_gpurt.observe.pages`).

The number of workers decides nothing but how thick a row is: what is shown of each worker is a row of pixels or one of the busiest
few, so that a page of 200 workers has as much to read as one of 2, and sends about as much.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from bokeh.models import BasicTicker, CustomJSTickFormatter, NumeralTickFormatter, Range1d
from bokeh.models.widgets import Div
from bokeh.plotting import figure
from dask.utils import format_bytes

from dask_gpurt.observe.board import INTERVAL_S, LENGTH, Board

__all__ = [
    "BYTES_STEPS",
    "COLOURS",
    "FEW",
    "FLOWING",
    "LIVE",
    "NOTHING",
    "STILL",
    "Panel",
    "Span",
    "bytes_axis",
    "heading",
    "middle",
    "name_axis",
    "over_time",
    "plain_figure",
    "short",
    "size",
    "table",
    "text_panel",
]

#: Told apart without colour vision, and on white as on black.
COLOURS = {"device": "#9467bd", "host": "#2b8cbe", "disk": "#e07b39", "object": "#8c8c8c"}
FLOWING, STILL = "#2ca25f", "#9e9e9e"
NOTHING = "\N{EN DASH}"
#: Binary steps, for axes of bytes.
BYTES_STEPS: Mapping[str, Any] = {"base": 1024, "mantissas": [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]}
#: Names that have room beside an axis.
FEW = 24


@dataclass(frozen=True)
class Span:
    """The time that an axis shows."""

    start_s: float
    end_s: float
    #: Between two samples.
    step_s: float
    #: Where its marks are wanted, in seconds; empty: wherever it suits.
    marks: Sequence[float]
    #: JavaScript that says what stands at a ``tick``.
    label: str

    @classmethod
    def recorded(cls, elapsed_s: float, samples: int) -> Span:
        """Show all of a recording, from its beginning."""
        return cls(0, elapsed_s, elapsed_s / max(1, samples - 1), (), _SINCE)


#: Minutes and seconds, or seconds alone.
_SINCE = (
    "return tick < 60 ? `${tick} s` : `${Math.floor(tick / 60)}:${String(Math.round(tick % 60)).padStart(2, '0')} min`"
)
_SPAN_S = (LENGTH - 1) * INTERVAL_S
#: The last minutes.
LIVE = Span(-_SPAN_S, 0, INTERVAL_S, range(0, -int(_SPAN_S), -60), "return tick ? `${tick / 60} min` : 'now'")


class Panel(Protocol):
    """Something that is shown."""

    #: Name of the panel in URLs, and for people.
    name: ClassVar[str]
    title: ClassVar[str]
    root: Any

    def update(self, board: Board) -> None:
        """Show what the board has."""


def plain_figure(title: str, **options: Any) -> Any:
    """Make a plot without tools that fills its place."""
    return figure(title=title, tools="", toolbar_location=None, sizing_mode="stretch_both", min_height=120, **options)


def over_time(title: str, span: Span, *, narrow: bool = False, **options: Any) -> Any:
    """Make a plot over time; a narrow one has half as many marks."""
    plot = plain_figure(title, x_range=Range1d(start=span.start_s, end=span.end_s), **options)
    if span.marks:
        plot.xaxis.ticker = list(span.marks[:: 2 if narrow else 1])
    else:
        plot.xaxis.ticker = BasicTicker(base=60, mantissas=[1, 2, 5, 10, 20, 30], desired_num_ticks=3 if narrow else 7)
    plot.xaxis.formatter = CustomJSTickFormatter(code=span.label)
    plot.xgrid.visible = False
    return plot


def name_axis(axis: Any, names: Sequence[str], few: int = FEW) -> None:
    """Have an axis show names, one to each whole number; where they are many, numbers."""
    named = len(names) <= few
    axis.ticker = [place + 0.5 for place in range(len(names))] if named else BasicTicker()
    axis.major_label_overrides = {place + 0.5: short(name) for place, name in enumerate(names)} if named else {}


def bytes_axis(axis: Any) -> None:
    """Have an axis count bytes."""
    axis.ticker = BasicTicker(**BYTES_STEPS)
    axis.formatter = NumeralTickFormatter(format="0.0 b")


def text_panel() -> Div:
    """Make what shows HTML, and fills its place."""
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


def heading(text: str) -> str:
    """Make a title, of text."""
    return f"<h3>{html.escape(text)}</h3>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Make a table; heads are text, cells are HTML."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def size(nbytes: float, limit_nbytes: float = math.nan) -> str:
    """Say bytes, and of how many, if that is known."""
    if math.isnan(nbytes):
        return NOTHING
    return format_bytes(int(nbytes)) + ("" if math.isnan(limit_nbytes) else f" of {format_bytes(int(limit_nbytes))}")


def short(worker: str) -> str:
    """Leave out of an address what all have."""
    return worker.rpartition("://")[2]


def middle(key: str, longest: int = 40) -> str:
    """Shorten a key where it says least: most have a hash in the middle."""
    return key if len(key) <= longest else f"{key[: longest - 17]}…{key[-16:]}"
