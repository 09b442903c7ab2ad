"""Bars of ratios as SVG text: what a table of results shows at a glance, readable in light and dark. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "bars"]

_ROW, _WIDTH, _VALUE, _MARGIN = 20, 480, 60, 10
_BETTER, _WORSE = "#2a78c2", "#c96a1b"


@dataclass(frozen=True)
class Bar:
    """One ratio, stock over dask-gpurt: above 1 dask-gpurt is better."""

    name: str
    ratio: float
    #: Lower and upper quartile.
    spread: tuple[float, float]


def bars(title: str, each: Sequence[Bar]) -> str:
    """Draw the ratios on a logarithmic axis with 1 as the base.

    Examples
    --------
    >>> "2.00" in bars("shuffle", [Bar("numbers", 2.0, (1.5, 2.5))])
    True
    """
    ends = [end for bar in each for end in (bar.ratio, *bar.spread)]
    low, high = min(0.9, *ends), max(1.5, *ends)
    label = 2 * _MARGIN + 7.5 * max(len(bar.name) for bar in each)
    scale = _WIDTH / math.log(high / low)

    def across(ratio: float) -> float:
        return round(label + math.log(ratio / low) * scale, 1)

    total = label + _WIDTH + _VALUE + _MARGIN
    height = _ROW * (len(each) + 2) + _MARGIN
    base = across(1)
    size = f'viewBox="0 0 {total} {height}" width="{total}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        # A ground of its own: the page behind may be dark.
        f'<rect width="{total}" height="{height}" rx="6" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="{_ROW - 4}" font-weight="bold" fill="#1b1f24">{escape(title)}</text>',
    ]
    for row, bar in enumerate(each, start=1):
        top = row * _ROW + 4
        here = across(bar.ratio)
        left, right = sorted((base, here))
        low_end, high_end = map(across, bar.spread)
        middle = top + _ROW / 2 - 3
        colour = _BETTER if bar.ratio >= 1 else _WORSE
        weight = ' font-weight="bold"' if bar.name.startswith("geometric mean") else ""
        lines += [
            f'<text x="{label - 8}" y="{top + 11}" text-anchor="end" fill="#1b1f24"{weight}>{escape(bar.name)}</text>',
            f'<rect x="{left}" y="{top}" width="{max(round(right - left, 1), 1)}" height="{_ROW - 6}" fill="{colour}"/>',
            f'<path d="M{low_end} {middle}H{high_end}" stroke="#1b1f24" stroke-width="1.5"/>',
            f'<text x="{max(right, high_end) + 5}" y="{top + 11}" fill="#1b1f24"{weight}>{bar.ratio:.2f}</text>',
        ]
    foot = (len(each) + 1) * _ROW + 2
    lines += [
        f'<path d="M{base} {_ROW}V{foot}" stroke="#1b1f24" stroke-width="1"/>',
        f'<text x="{base}" y="{foot + 14}" text-anchor="middle" fill="#57606a">1 = as stock; right: dask-gpurt is better</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
