"""Panels to be read: runs of shuffles, reasons of the placement, latest decisions."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import ClassVar

from bokeh.models import ColumnDataSource, FactorRange
from dask.utils import format_bytes, format_time

from dask_gpurt.observe.board import Board, Placing
from dask_gpurt.observe.drawing import (
    COLOURS,
    NOTHING,
    STILL,
    heading,
    middle,
    plain_figure,
    short,
    table,
    text_panel,
)
from dask_gpurt.observe.reports import PATHS, Run
from dask_gpurt.observe.shuffles import HEADS, cells

__all__ = ["REASONS", "DecisionsPanel", "PlacementPanel", "ShufflesPanel"]

#: Reasons, and runs of shuffles that have ended, that are shown.
REASONS = 12
ENDED = 6


class ShufflesPanel:
    """Runs of shuffles, and the ways that their bytes go."""

    name: ClassVar[str] = "shuffles"
    title: ClassVar[str] = "Shuffles"
    _HEADS: ClassVar[Sequence[str]] = ("run", "workers", "inputs", "outputs", "sent", "to be sent", "waits")

    def __init__(self) -> None:
        self.root = text_panel()

    def update(self, board: Board) -> None:
        """Show the active runs, the bytes of all by the way that they went, and the runs that ended last."""
        runs = board.runs()
        begun = max((report.shuffles for _, report in board.reports), default=0)
        parts = [heading(f"{self.title}: {len(runs)} active, {begun} so far")]
        if runs:
            parts.append(table(self._HEADS, map(_run_cells, runs)))
        counts, rates = board.counts(), board.rates()
        ways = {**{path: PATHS[path] for path in ("ucx", "comm")}, "local": "stayed here"}
        said = (
            f"<b>{html.escape(text)}</b> {format_bytes(counts[path])}"
            + (f" ({format_bytes(int(rates[path]))}/s)" if rates[path] else "")
            for path, text in ways.items()
        )
        waited_s = sum(report.credit_wait_s for _, report in board.reports)
        parts.append(f"<p>{' · '.join(said)} · <b>waited for room</b> {format_time(waited_s)}</p>")
        if board.ended:
            parts.append(table(HEADS, ([html.escape(text) for text in cells(run)] for run in board.ended[:ENDED])))
        self.root.text = "".join(parts)


def _run_cells(run: Run) -> list[str]:
    phases = ", ".join(f"{count} {html.escape(phase)}" for phase, count in sorted(run.phases.items()))
    stuck = f"<b class='bad'>stuck: {html.escape(', '.join(map(short, run.stuck[:3])))}</b>, " if run.stuck else ""
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
        format_bytes(run.outbox_nbytes) if run.outbox_nbytes else NOTHING,
        "; ".join(waits) or NOTHING,
    ]


class PlacementPanel:
    """Why tasks went where they went."""

    name: ClassVar[str] = "placement"
    title: ClassVar[str] = "Placement"

    def __init__(self) -> None:
        self.source = ColumnDataSource({"reason": [], "count": [], "text": []})
        plot = self.root = plain_figure(self.title, y_range=FactorRange())
        plot.hbar(y="reason", right="count", height=0.75, source=self.source, color=COLOURS["host"])
        plot.text(
            "count", "reason", "text", source=self.source, x_offset=4, text_baseline="middle", text_font_size="11px",
            text_color=STILL,
        )  # fmt: skip
        plot.x_range.start = 0
        plot.x_range.range_padding = 0.5
        plot.xaxis.visible = False
        plot.grid.visible = False

    def update(self, board: Board) -> None:
        """Show the most frequent reasons, the most frequent one on top."""
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
            self.summarize(board)
            # Two lines, whatever there is to say: the plot stays where it is.
            self.root.title.text += f"\n{cluster.planned:,} planned ahead, {cluster.waiting:,} wait"

    def summarize(self, board: Board) -> None:
        """Say what there was, which is what is left to say afterwards."""
        cluster = board.cluster
        errors = f", {cluster.errors:,} errors" if cluster.errors else ""
        self.root.title.text = f"{self.title}: {sum((cluster.reasons or {}).values()):,} decisions{errors}"


class DecisionsPanel:
    """Where tasks went lately."""

    name: ClassVar[str] = "decisions"
    title: ClassVar[str] = "Latest decisions"

    def __init__(self) -> None:
        self.root = text_panel()

    def update(self, board: Board) -> None:
        """Show the latest decisions, the latest one on top."""
        latest = board.cluster.latest
        rows = ([html.escape(middle(p.key)), _reason(p), html.escape(short(p.worker) or NOTHING)] for p in latest)
        text = table(("task", "reason", "worker"), rows) if latest else "<p>none is remembered</p>"
        self.root.text = heading(self.title) + text


def _reason(placing: Placing) -> str:
    """Say the reason, and under the pointer what was compared."""
    return f'<span title="{html.escape(placing.why)}">{html.escape(placing.reason)}</span>'
