"""Documents of the dashboard: the page ``/gpurt``, and one for each panel, light or dark.

Covers: what Bokeh calls for each browser that opens a page; themes.
Does not cover: the panels (:mod:`dask_gpurt.observe.drawing`); how pages come into Dask's dashboard
(:mod:`dask_gpurt.observe.scheduler`).

Dask's own pages are light. Ours follow the browser: a line of script in the templates asks it for the preferred scheme, and opens
the page anew with ``?theme=dark`` where that is dark, for Bokeh draws text in colours that the server says. ``?theme=light`` and
``?theme=dark`` may be asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import distributed.http
from bokeh.themes import Theme
from jinja2 import Environment, FileSystemLoader

from dask_gpurt.observe.board import INTERVAL_S, Board
from dask_gpurt.observe.drawing import Panel
from dask_gpurt.observe.flow import FlowPanel, MatrixPanel, MovesPanel
from dask_gpurt.observe.history import HealthPanel, TiersPanel, WorkersPanel
from dask_gpurt.observe.tables import DecisionsPanel, PlacementPanel, ShufflesPanel

__all__ = ["PAGE", "PANELS", "STATIC", "Source", "documents"]

#: In the order of the page.
PANELS: tuple[type[Panel], ...] = (
    TiersPanel,
    FlowPanel,
    WorkersPanel,
    MovesPanel,
    MatrixPanel,
    HealthPanel,
    ShufflesPanel,
    PlacementPanel,
    DecisionsPanel,
)

#: Path of the page, and what the paths of single panels begin with: JupyterLab's extension looks for ``individual-``.
PAGE = "/gpurt"
PANEL = "/individual-gpurt-"


class Source(Protocol):
    """Where the figures come from."""

    board: Board
    #: Whether there will be any more.
    active: bool

    def refresh(self) -> None:
        """Bring the board up to date."""

    def ask(self) -> None:
        """Have what only workers know brought up to date on the board, for which all of them are asked."""


def _theme(text: str, grid: str) -> Theme:
    return Theme(
        json={
            "attrs": {
                "Plot": {
                    "background_fill_color": None,
                    "border_fill_color": None,
                    "outline_line_color": None,
                    "min_border_right": 22,
                },
                "Axis": {
                    "axis_label_text_color": text,
                    "axis_label_text_font_style": "normal",
                    "major_label_text_color": text,
                    "axis_line_color": grid,
                    "major_tick_line_color": grid,
                    "minor_tick_line_color": None,
                },
                "Grid": {"grid_line_color": grid},
                "Legend": {
                    "background_fill_alpha": 0,
                    "border_line_color": None,
                    "label_text_color": text,
                    "label_text_font_size": "11px",
                    "padding": 0,
                    "margin": 0,
                    "spacing": 10,
                    "glyph_height": 12,
                    "label_height": 12,
                },
                "Title": {"text_color": text, "text_font_size": "13px"},
                "BaseColorBar": {
                    "background_fill_color": None,
                    "major_label_text_color": text,
                    "major_tick_line_color": grid,
                    "bar_line_color": None,
                },
            }
        }
    )


_THEMES = {"light": _theme("#333333", "#dddddd"), "dark": _theme("#dddddd", "#444444")}
#: Of a file, of which nobody can say beforehand on what it will be read.
STATIC = _theme("#808080", "#80808055")
_TEMPLATES = Environment(
    loader=FileSystemLoader(
        [os.path.dirname(__file__), os.path.join(os.path.dirname(distributed.http.__file__), "templates")]
    ),
    # Bokeh gives ready pieces of HTML, and nothing else than those and our own constants is written into the templates.
    autoescape=False,  # noqa: S701
)


def documents(source: Source) -> dict[str, Callable[..., None]]:
    """Return path to what makes its document, in the form of Dask's own: it takes the scheduler, variables and a document."""
    pages: dict[str, Callable[..., None]] = {
        PAGE: partial(_page, source=source, kinds=PANELS, template="gpurt.html", title="Dask: dask-gpurt")
    }
    for panel in PANELS:
        pages[PANEL + panel.name] = partial(
            _page, source=source, kinds=(panel,), template="panel.html", title=f"dask-gpurt: {panel.title}"
        )
    return pages


def _page(
    scheduler: Any,  # noqa: ARG001  Dask's way to call
    extra: dict[str, Any],
    doc: Any,
    *,
    source: Source,
    kinds: Sequence[type[Panel]],
    template: str,
    title: str,
) -> None:
    panels = [kind() for kind in kinds]
    # All models are looked through once, and not for each root.
    with doc.models.freeze():
        for panel in panels:
            panel.root.name = panel.name.replace("-", "_")
            doc.add_root(panel.root)
    arguments = doc.session_context.request.arguments
    asked = arguments.get("theme", [b""])[0].decode(errors="replace")
    theme = asked if asked in _THEMES else "light"
    doc.theme = _THEMES[theme]
    doc.title = title
    doc.template = _TEMPLATES.get_template(template)
    doc.template_variables.update(
        extra, gpurt_theme=theme, gpurt_asked=asked in _THEMES, gpurt_panels=[panel.root.name for panel in panels]
    )

    def update() -> None:
        if not source.active:
            doc.remove_periodic_callback(callback)
            return
        source.refresh()
        if MatrixPanel in kinds or ShufflesPanel in kinds:
            source.ask()
        for panel in panels:
            panel.update(source.board)

    callback = doc.add_periodic_callback(update, int(1000 * INTERVAL_S))
    update()
