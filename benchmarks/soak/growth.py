"""What has grown over many rounds of work, after each of which nothing is held any more.

The rule: of each figure of each process, the median over the last third of the rounds may exceed the median over the middle
third by an allowance (:data:`ALLOWANCES`). The first third is for what is filled once: pools, caches, imported modules. An
allowance is what such a median was seen to vary by without a leak; something that is left behind in every round passes it
when there are enough rounds: one descriptor a round in some fifteen.

Pure: no I/O, no clock, no Dask.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

__all__ = ["ALLOWANCES", "complaints", "growth"]

#: Figure -> by how much it may grow from the middle third to the last.
ALLOWANCES: Mapping[str, int] = {
    "rss_nbytes": 64 * 2**20,
    "descriptors": 4,
    # Dask keeps connections for later, as many as were needed at a time.
    "sockets": 48,
    "threads": 4,
    "files": 4,
    "file_nbytes": 64 * 2**20,
    "processes": 1,
    "segments": 4,
}

#: Rounds below which thirds say nothing.
ROUNDS_MIN = 6


def growth(figures: Sequence[float]) -> float:
    """Say by how much a figure has grown from the middle third of the rounds to the last.

    Examples
    --------
    >>> growth([5, 80, 81, 80, 80, 81])
    0.0
    >>> growth([0, 1, 2, 3, 4, 5, 6, 7, 8])
    3
    """
    third = len(figures) // 3
    return statistics.median(figures[-third:]) - statistics.median(figures[-2 * third : -third])


def complaints(samples: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Say what has grown by more than its allowance.

    Parameters
    ----------
    samples
        For each round, and each process by name, the figures by name. A process that was not there in all of them is looked at in
        those in which it was, if they are enough.

    Examples
    --------
    >>> complaints([{"worker 1": {"files": 20 + 3 * number}} for number in range(12)])
    ['files of worker 1 grew by 12: 20, 23, 26, 29, 32, 35, 38, 41, 44, 47, 50, 53']
    >>> complaints([{"worker 1": {"files": 20 + number % 3}} for number in range(12)])
    []
    """
    if not samples:
        return []
    found = []
    for process, last in samples[-1].items():
        lived = [sample[process] for sample in samples if process in sample]
        if len(lived) < ROUNDS_MIN:
            continue
        for figure in last:
            series = [figures[figure] for figures in lived]
            grown = growth(series)
            if grown > ALLOWANCES[figure]:
                listed = ", ".join(f"{value:g}" for value in series)
                found.append(f"{figure} of {process} grew by {grown:g}: {listed}")
    return found
