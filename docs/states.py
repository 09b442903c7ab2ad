"""A diagram of states as SVG text, made from the table in the docstring of the module that has them. Pure.

The table is the first one with rows that begin with a name in capitals, ``NAME  where  how -> NEXT; how -> NEXT``, as Sphinx reads simple
tables. States stand in a row; what leads on goes above, what leads back below. Where the name behind the arrow is no state of the
table, that is the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

__all__ = ["Move", "diagram", "moves"]

_STEP, _BOX, _HEIGHT, _RISE = 160, 92, 30, 42
_ON, _BACK = "#2a78c2", "#c96a1b"
#: So that words that an arrow passes through can be read.
_HALO = 'stroke="#ffffff" stroke-width="4" paint-order="stroke"'


@dataclass(frozen=True)
class Move:
    """One way from a state to another."""

    source: str
    target: str
    how: str


def moves(documentation: str) -> list[Move]:
    r"""Read the table of states.

    Examples
    --------
    >>> table = "=====  ====  =====\nHERE   x     go -> THERE; stay ->\n             HERE\nTHERE  y     lost -> gone\n=====  ====  ====="
    >>> [(move.source, move.target, move.how) for move in moves(table)]
    [('HERE', 'THERE', 'go'), ('HERE', 'HERE', 'stay'), ('THERE', 'gone', 'lost')]
    """
    return [move for row in _rows(documentation) for move in _moves_of(row)]


def _rows(documentation: str) -> Iterator[list[str]]:
    """Yield state and last column of each row, which may go on in lines that begin with a blank."""
    row: list[str] = []
    last = None
    for line in documentation.splitlines():
        if re.fullmatch(r"(=+ +)+=+", line):
            last = line.rindex(" ") + 1
        elif last is not None and line[:1].isupper():
            if row:
                yield row
            row = [line.split()[0], line[last:]]
        elif last is not None and row and line.startswith(" "):
            row[1] += " " + line[last:].strip()
        elif row:
            break
        elif not line.strip():
            last = None
    if row:
        yield row


def _moves_of(row: list[str]) -> Iterator[Move]:
    state, ways = row
    for how, target in re.findall(r"([^;]+?) -> \*?(\w+)", ways):
        yield Move(state, target, re.sub(r" \(.*\)", "", how.strip()))


def diagram(title: str, documentation: str) -> str:
    """Draw the states of a module's documentation."""
    ways = moves(documentation)
    states = list(dict.fromkeys(move.source for move in ways))
    # The last first: ways to the ends lie within one another then.
    ends = [target for target in dict.fromkeys(move.target for move in reversed(ways)) if target not in states]
    places = {name: 60 + number * _STEP for number, name in enumerate([*states, *ends])}
    spans = [_span(move, places) for move in ways]
    middle = round(45 + _RISE * _levels(max(spans)))
    total, height = 120 + (len(places) - 1) * _STEP, round(middle + 40 + _RISE * _levels(min(spans)))
    arrow = '<marker id="{0}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="{1}"/></marker>'
    size = f'viewBox="0 0 {total} {height}" width="{total}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f"<defs>{arrow.format('on', _ON)}{arrow.format('back', _BACK)}</defs>",
        f'<rect width="{total}" height="{height}" rx="6" fill="#ffffff"/>',
    ]
    arcs = [
        _arc(places[move.source], places[move.target], span, middle, move.how)
        for move, span in zip(ways, spans, strict=True)
    ]
    # All words above all arrows.
    lines += [path for path, _ in arcs] + [text for _, text in arcs]
    for name, x in places.items():
        border = "#1b1f24" if name in states else "#8c959f"
        lines += [
            f'<rect x="{x - _BOX / 2}" y="{middle - _HEIGHT / 2}" width="{_BOX}" height="{_HEIGHT}" rx="6" fill="#f6f8fa" stroke="{border}"/>',
            f'<text x="{x}" y="{middle + 4}" text-anchor="middle" fill="#1b1f24">{escape(name)}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _span(move: Move, places: dict[str, int]) -> int:
    return (places[move.target] - places[move.source]) // _STEP


def _levels(span: int) -> float:
    """How far an arc goes up or down: little more for a long one."""
    return math.pow(abs(span), 0.8) - 0.4


def _arc(start: int, end: int, span: int, middle: int, how: str) -> tuple[str, str]:
    """Draw an arrow, and say what leads along it."""
    up = -1 if span > 0 else 1
    edge = middle + up * _HEIGHT // 2
    top = edge + up * _RISE * _levels(span)
    # A little beside the middle of a box, so that what comes and what goes do not meet.
    begin, finish = (start + 12, end - 12) if span > 0 else (start - 12, end + 12)
    colour, head = (_ON, "on") if span > 0 else (_BACK, "back")
    # The middle of a cubic lies three quarters of the way to its two handles.
    handle = round(edge + (top - edge) * 4 / 3, 1)
    label = round(top + (-5 if up < 0 else 14), 1)
    return (
        f'<path d="M{begin} {edge}C{begin} {handle} {finish} {handle} {finish} {edge}" fill="none" stroke="{colour}" stroke-width="1.5" marker-end="url(#{head})"/>',
        f'<text x="{(begin + finish) / 2}" y="{label}" text-anchor="middle" fill="#1b1f24" {_HALO}>{escape(how)}</text>',
    )
