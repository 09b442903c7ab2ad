"""What every benchmark has in common: pairs of runs, ratios, one line a case.

Covers: :class:`Subject`, :class:`Line`, :func:`ratio_of_pairs`, the output.
Does not cover: what is measured; one module a subject.

Ours and the peer take turns in one process on one machine, ABBA, so that a drift weighs on both. Of each pair of
neighbouring runs the ratio is taken; the median of these ratios is what is reported, with the quartiles as its spread:
a ratio whose quartiles enclose 1 says nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from dask_gpurt.demo import machine
from dask_gpurt.demo.runner import quotient

__all__ = ["BrokenRunError", "Line", "Subject", "WrongAnswerError", "line_of_pairs", "rounds", "run_subject", "turns"]

T = TypeVar("T")


class WrongAnswerError(Exception):
    """Ours and the peer do not give the same answer: there is nothing to compare."""


class BrokenRunError(Exception):
    """A run did not come to its end as it should: there is nothing to compare."""


@dataclass(frozen=True)
class Line:
    """One case of a subject.

    Parameters
    ----------
    case, metric
        What was done, and what was measured, with its unit last: ``wall_s``.
    ratio
        Above 1: ours is better.
    ours, peer
        The figures, medians if there are several runs.
    peer_name
        What ours is compared with.
    quartiles
        Of the pairs' ratios.
    pairs
        Pairs of runs.
    """

    case: str
    metric: str
    ratio: float
    ours: float
    peer: float
    peer_name: str
    quartiles: tuple[float, float]
    pairs: int

    def text(self, subject: str) -> str:
        """Return the line as it is printed.

        Examples
        --------
        >>> Line("sum", "wall_s", 1.25, 2.0, 2.5, "stock", (1.2, 1.3), 7).text("demo")
        'demo sum wall_s ratio=1.250 ours=2 peer=2.5 peer_name=stock q1=1.200 q3=1.300 pairs=7'
        """
        low, high = self.quartiles
        return (
            f"{subject} {self.case} {self.metric} ratio={self.ratio:.3f} ours={self.ours:.6g} peer={self.peer:.6g} "
            f"peer_name={self.peer_name} q1={low:.3f} q3={high:.3f} pairs={self.pairs}"
        )


@dataclass(frozen=True)
class Subject:
    """A benchmark.

    Parameters
    ----------
    name
        As on the command line.
    title
        What it measures, in one line.
    run
        Called with whether it is to be quick (two minutes on two cores); yields the cases as they are done.
    cases
        What does the same for one case, by its name, where cases can be run alone; see :meth:`of_cases`.
    scaled
        Makes the subject for another scale of its data, where that can be chosen.
    """

    name: str
    title: str
    run: Callable[[bool], Iterable[Line]]
    cases: Mapping[str, Callable[[bool], Iterable[Line]]] = field(default_factory=dict)
    scaled: Callable[[float], Subject] | None = None

    @classmethod
    def of_cases(cls, name: str, title: str, cases: Mapping[str, Callable[[bool], Iterable[Line]]]) -> Subject:
        """Return a subject whose cases can be run alone."""
        return cls(
            name, title, lambda quick: itertools.chain.from_iterable(run(quick) for run in cases.values()), cases
        )

    def only(self, names: Sequence[str]) -> Subject:
        """Return the subject with these of its cases.

        Raises
        ------
        KeyError
            If there is no such case.
        """
        return self.of_cases(self.name, self.title, {name: self.cases[name] for name in names})


def turns(pairs: int) -> Iterator[tuple[int, bool]]:
    """Say whose turn it is: the number of the pair, and whether it is ours.

    Examples
    --------
    >>> list(turns(2))
    [(0, False), (0, True), (1, True), (1, False)]
    """
    for number in range(pairs):
        for ours in (False, True) if number % 2 == 0 else (True, False):
            yield number, ours


def rounds(sides: Sequence[T], count: int) -> Iterator[tuple[int, T]]:
    """Say whose turn it is where there are more than two: the number of the round, and the side.

    Examples
    --------
    >>> list(rounds("abc", 2))
    [(0, 'a'), (0, 'b'), (0, 'c'), (1, 'c'), (1, 'b'), (1, 'a')]
    """
    for number in range(count):
        for side in sides if number % 2 == 0 else sides[::-1]:
            yield number, side


def line_of_pairs(case: str, metric: str, ours: Sequence[float], peer: Sequence[float], peer_name: str) -> Line:
    """Make a line of paired figures, of which less is better.

    Examples
    --------
    >>> line = line_of_pairs("sum", "wall_s", ours=[1.0, 2.0, 1.0], peer=[2.0, 4.0, 4.0], peer_name="stock")
    >>> line.ratio, line.ours, line.peer
    (2.0, 1.0, 4.0)
    """
    # Where neither did anything, neither is better.
    ratios = [quotient(theirs, mine) if mine or theirs else 1.0 for mine, theirs in zip(ours, peer, strict=True)]
    low, high = _quartiles(ratios)
    return Line(
        case=case,
        metric=metric,
        ratio=statistics.median(ratios),
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        peer_name=peer_name,
        quartiles=(low, high),
        pairs=len(ratios),
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1 or not all(map(math.isfinite, values)):
        return min(values), max(values)
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _plain(line: Line) -> dict[str, object]:
    """Return the line as plain data; JSON has no infinity, which becomes null."""
    plain = dataclasses.asdict(line)
    plain["ratio"] = line.ratio if math.isfinite(line.ratio) else None
    plain["ours"], plain["peer"] = (figure if math.isfinite(figure) else None for figure in (line.ours, line.peer))
    plain["quartiles"] = [ratio if math.isfinite(ratio) else None for ratio in line.quartiles]
    return plain


def run_subject(subject: Subject, *, quick: bool, json_path: Path | None, say: Callable[[str], None]) -> list[Line]:
    """Run a subject: say each line when it is there, and write all of them to a file at the end. If there is none, nothing is written.

    Raises
    ------
    WrongAnswerError, BrokenRunError
        If the answers differ, or there is none. Nothing is written then.
    """
    lines: list[Line] = []
    for line in subject.run(quick):
        lines.append(line)
        say(line.text(subject.name))
    if json_path is not None and lines:
        content = {
            "subject": subject.name,
            "quick": quick,
            **machine.describe(),
            "lines": [_plain(line) for line in lines],
        }
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return lines
