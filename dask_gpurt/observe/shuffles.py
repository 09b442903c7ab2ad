"""Runs of shuffles for people: the answer of :func:`dask_gpurt.shuffles`, in text and in the HTML of notebooks, and the table of a report.

Covers: :class:`Shuffles`, :func:`cells`. Does not cover: where runs come from (:mod:`dask_gpurt.observe.journal`); the live panel, which
knows active runs alone, but what they wait for as well (:mod:`dask_gpurt.observe.tables`).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dask.utils import format_bytes, format_time

from dask_gpurt.observe.journal import ShuffleRun
from dask_gpurt.observe.reports import LOCAL, PATHS

__all__ = ["HEADS", "SHOWN_MAX", "Shuffles", "cells", "spans"]

#: Runs that are shown; the others are counted.
SHOWN_MAX = 50

HEADS = (
    *("run", "state", "inputs", "outputs", "transfer", "unpack", *(PATHS[path] for path in ("ucx", "comm"))),
    *("stayed here", "to disk", "waited for room"),
)


@dataclass(frozen=True)
class Shuffles:
    """The answer of :func:`dask_gpurt.shuffles`: runs of shuffles on dask-gpurt's data plane, the latest first.

    Examples
    --------
    >>> print(Shuffles(()))
    no shuffle has run on dask-gpurt's data plane
    """

    runs: Sequence[ShuffleRun]

    def __str__(self) -> str:
        if not self.runs:
            return "no shuffle has run on dask-gpurt's data plane"
        rows = [list(HEADS), *map(cells, self.runs[:SHOWN_MAX])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        return "\n".join([*lines, *self._rest()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.runs:
            return f"<div>{html.escape(str(self))}</div>"
        cell = "<{0} style='text-align:left'>{1}</{0}>"
        head = "".join(cell.format("th", html.escape(text)) for text in HEADS)
        body = "".join(
            f"<tr>{''.join(cell.format('td', html.escape(text)) for text in cells(run))}</tr>"
            for run in self.runs[:SHOWN_MAX]
        )
        active = sum(run.active for run in self.runs)
        title = f"Shuffles: {active} active, {len(self.runs) - active} ended"
        rest = "".join(f"<p>{line}</p>" for line in self._rest())
        return f"<div><strong>{title}</strong><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{rest}</div>"

    def _rest(self) -> Iterator[str]:
        if len(self.runs) > SHOWN_MAX:
            yield f"and {len(self.runs) - SHOWN_MAX} more"


def cells(run: ShuffleRun) -> list[str]:
    """Put a run into words, by :data:`HEADS`."""
    state = f"stuck on {', '.join(run.stuck[:3])}" if run.stuck else "ended" if not run.active else _phases(run)
    return [
        f"{run.shuffle_id[:8]} #{run.run_id}",
        state,
        f"{run.inputs:,}",
        f"{run.outputs:,} of {run.own_outputs:,}",
        *(_elapsed(start_s, end_s) for start_s, end_s in spans(run)),
        *(format_bytes(run.sent.get(path, 0)) for path in ("ucx", "comm", LOCAL)),
        format_bytes(run.written_nbytes),
        format_time(run.credit_wait_s),
    ]


def spans(run: ShuffleRun) -> tuple[tuple[float, float | None], tuple[float | None, float | None]]:
    """Say when the transfer began and ended, and when the unpacking did."""
    # One that was given up in the middle ended, and has never been transferred.
    transferred_s = run.ended_s if run.transferred_s is None else run.transferred_s
    return (run.begun_s, transferred_s), (run.transferred_s, run.ended_s)


def _elapsed(start_s: float | None, end_s: float | None) -> str:
    return "-" if start_s is None else "goes on" if end_s is None else format_time(max(0.0, end_s - start_s))


def _phases(run: ShuffleRun) -> str:
    return ", ".join(f"{count} {phase}" for phase, count in sorted(run.phases.items()))
