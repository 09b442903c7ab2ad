"""Shuffles of dataframes: large partitions, strings, many small partitions, more than memory, a hot key.

See :mod:`benchmarks.contest` for what is compared with what, and when an answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from benchmarks.contest import P2P, P2P_MEMORY, TASKS, Case, runner
from benchmarks.frame import Subject
from benchmarks.tables import Shuffle

#: Rows of a partition of the 64 MB that are in the range that Dask's documentation recommends.
ROWS = 1_000_000


def numeric_16(*, quick: bool) -> Case:
    """1 GB of numbers in partitions of 64 MB; quick: a quarter of it."""
    return Case(
        name="numeric-16",
        workload=Shuffle.of_numeric(parts=16, rows=ROWS // 4 if quick else ROWS),
        small=Shuffle.of_numeric(parts=16, rows=ROWS // 16),
        peers=(P2P, TASKS, P2P_MEMORY),
        rounds=3 if quick else 7,
    )


#: Makes a case, given whether it is to be quick.
CASES: Mapping[str, Callable[..., Case]] = {"numeric-16": numeric_16}


SUBJECT = Subject.of_cases(
    "shuffle",
    "dataframe shuffles beside stock p2p and tasks",
    {name: runner(make) for name, make in CASES.items()},
)
