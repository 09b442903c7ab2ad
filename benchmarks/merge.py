"""A merge of two dataframes that lie in memory, of 500 MB each, on a key that each of them has once.

The left table has the keys in one order and the right one in another. All other columns follow from the key, so that an
output partition can be judged by itself: what has to stand beside each of its keys is computed anew, and compared with
pandas, exactly. That all keys are there, and none twice, follows from the rows: each partition has only keys that belong
to it, each once, and all partitions together have as many rows as there are keys.

See :mod:`benchmarks.contest` for what is compared with what.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client

from benchmarks.contest import P2P, TASKS, Case, runner
from benchmarks.frame import Subject, WrongAnswerError
from benchmarks.tables import (
    compare_frames,
    frame_nbytes,
    key_of_row,
    ordered_futures,
    output_of,
    persisted_frame,
    values,
)

#: Rows of a partition of 64 MB.
ROWS = 1_000_000

#: For each table what its keys are dealt with, a prime each, and what its values are moved by.
STRIDES = {"left": 2_147_483_647, "right": 998_244_353}
SHIFTS = {"left": 0, "right": 2**40}


def table(part: int, *, which: str, rows: int, parts: int) -> pd.DataFrame:
    """Make a partition of the left or the right table."""
    number = np.arange(part * rows, (part + 1) * rows, dtype="uint64")
    return row_values(key_of_row(number, rows * parts, STRIDES[which]), which)


def row_values(key: Any, which: str) -> pd.DataFrame:
    """Return the rows that a table has for these keys."""
    return values(key, key.astype("uint64") + np.uint64(SHIFTS[which]), prefix=f"{which}_")


def expected(key: Any) -> pd.DataFrame:
    """Return the rows that the merged table has for these keys."""
    return pd.concat([row_values(key, "left"), row_values(key, "right").drop(columns="key")], axis=1)


def judge(frame: pd.DataFrame, part: int, *, rows: int, parts: int) -> int:
    """Return the rows of an output partition, of which there are ``parts``, with ``rows`` keys in all.

    Raises
    ------
    WrongAnswerError
        If a row is wrong, is there twice, or belongs elsewhere.
    """
    key = frame["key"]
    if not (key.is_unique and key.between(0, rows - 1).all() and (output_of(frame, "key", parts) == part).all()):
        raise WrongAnswerError(f"partition {part} has keys that it should not have")
    compare_frames(frame, expected(key.to_numpy()))
    return len(frame)


@dataclass(frozen=True)
class Merge:
    """A merge of two tables of ``parts`` partitions of ``rows`` rows."""

    rows: int
    parts: int

    def load(self, client: Client) -> Any:
        """Make both tables on the workers."""
        return tuple(
            persisted_frame(client, functools.partial(table, which=which, rows=self.rows, parts=self.parts), self.parts)
            for which in ("left", "right")
        )

    def nbytes(self, client: Client, inputs: Any) -> int:
        """Ask where the partitions lie."""
        futures = [future for frame in inputs for future in ordered_futures(frame)]
        return sum(client.gather(client.map(frame_nbytes, futures, pure=False)))

    def build(self, inputs: Any) -> Any:
        """Return the merged dataframe."""
        left, right = inputs
        return left.merge(right, on="key")

    def truth(self, client: Client, inputs: Any) -> Any:  # noqa: ARG002
        """Return the number of rows."""
        return self.rows * self.parts

    def check(self, client: Client, answer: Any, truth: Any) -> None:
        """Judge each partition where it lies, and count."""
        judging = functools.partial(judge, rows=truth, parts=self.parts)
        found = sum(client.gather(client.map(judging, ordered_futures(answer), range(self.parts), pure=False)))
        if found != truth:
            raise WrongAnswerError(f"{found} rows, expected {truth}")

    def excerpt(self, client: Client, answer: Any) -> pd.DataFrame | None:  # noqa: ARG002
        """Return nothing: everything was compared with pandas."""
        return None


def merge(*, quick: bool) -> Case:
    """Merge two tables of 500 MB; quick: a quarter of them."""
    return Case(
        name="merge",
        workload=Merge(rows=ROWS // 4 if quick else ROWS, parts=8),
        small=Merge(rows=ROWS // 16, parts=8),
        peers=(P2P, TASKS),
        rounds=3 if quick else 7,
    )


SUBJECT = Subject.of_cases("merge", "a merge of dataframes beside stock p2p and tasks", {"merge": runner(merge)})
