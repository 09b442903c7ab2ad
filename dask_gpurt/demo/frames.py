"""Jobs with tables: a shuffle and a merge, on data that workers make by themselves.

Covers: the tables, both jobs with dask.dataframe, and what is wrong with an answer.
Does not cover: queries as people write them; see :mod:`dask_gpurt.demo.tpch`. Larger and harder tables; see the ``benchmarks`` folder.

All columns follow from the key, and each key is there a known number of times. So every output partition is judged where it lies, and
no truth has to be made: rows that do not belong to their key, keys that are not complete in their partition, and the number and a
checksum of all rows are what is sent to the client.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["Tables", "differences", "judged", "table"]

#: Columns beside the key, of 8 bytes each; odd factors, so that no two keys have the same values.
FACTORS = {"a": 0x9E3779B97F4A7C15, "b": 0xC2B2AE3D27D4EB4F, "c": 0x165667B19E3779F9}
ROW_NBYTES = 8 * (1 + len(FACTORS))
#: Rows of one key in a table that is shuffled.
REPEATS = 4
#: Primes above any number of rows, by which row numbers are dealt with.
STRIDES = {"left": 2_147_483_647, "right": 998_244_353}
#: What answers are made of, for each partition.
FIGURES = ("rows", "wrong_rows", "torn_keys", "checksum")


def values(key: Any, factor: int) -> Any:
    """Return a column: numbers in [0, 1) that follow from the key."""
    return ((key.astype("uint64") * np.uint64(factor)) >> np.uint64(11)) * 2.0**-53


def table(part: int, *, which: str, rows: int, keys: int) -> pd.DataFrame:
    """Make a partition.

    Parameters
    ----------
    part
        Its number.
    which
        ``left`` or ``right``: the tables have their rows in different orders, and their columns different names.
    rows
        Rows of each partition.
    keys
        Keys of the table, below which all numbers are keys.

    Examples
    --------
    >>> table(0, which="left", rows=2, keys=5).columns.to_list()
    ['key', 'left_a', 'left_b', 'left_c']
    """
    number = np.arange(part * rows, (part + 1) * rows, dtype="uint64")
    key = (number * np.uint64(STRIDES[which]) % np.uint64(keys)).astype("int64")
    return pd.DataFrame({"key": key} | {f"{which}_{name}": values(key, factor) for name, factor in FACTORS.items()})


def judged(frame: pd.DataFrame, repeats: int) -> pd.DataFrame:
    """Judge a partition in which each key is to be ``repeats`` times: one row of :data:`FIGURES`.

    Examples
    --------
    >>> frame = table(0, which="left", rows=4, keys=4)
    >>> judged(frame, 1).iloc[0].tolist()
    [4, 0, 0, 10]
    >>> judged(frame.assign(left_a=0.5), 1).wrong_rows.tolist()
    [4]
    """
    key = frame["key"].to_numpy()
    wrong = np.zeros(len(frame), dtype=bool)
    for name in frame.columns.drop("key"):
        wrong |= frame[name].to_numpy() != values(key, FACTORS[name.rpartition("_")[2]])
    counts = np.unique(key, return_counts=True)[1]
    figures = [len(frame), int(wrong.sum()), int((counts != repeats).sum()), int((key + 1).sum())]
    return pd.DataFrame([figures], columns=list(FIGURES), dtype="int64")


@dataclass(frozen=True)
class Tables:
    """How large the tables are.

    Parameters
    ----------
    parts
        Partitions.
    rows
        Rows of each; of a number that four divides.
    """

    parts: int
    rows: int

    @classmethod
    def of(cls, nbytes: int, parts: int) -> Tables:
        """Return tables of about so many bytes each.

        Examples
        --------
        >>> Tables.of(2**20, 4).nbytes / 2**20
        1.0
        """
        return cls(parts, REPEATS * max(1, nbytes // (parts * ROW_NBYTES * REPEATS)))

    @property
    def nbytes(self) -> int:
        """Bytes of a table."""
        return self.parts * self.rows * ROW_NBYTES

    def _frame(self, which: str, keys: int) -> Any:
        import dask.dataframe as dd

        make = functools.partial(table, which=which, rows=self.rows, keys=keys)
        return dd.from_map(make, range(self.parts), meta=table(0, which=which, rows=1, keys=1))

    def shuffle(self) -> pd.DataFrame:
        """Shuffle a table in which each key is there four times; see :func:`judged`."""
        keys = self.parts * self.rows // REPEATS
        return _judge(self._frame("left", keys).shuffle("key", shuffle_method="p2p"), REPEATS)

    def merge(self) -> pd.DataFrame:
        """Merge two tables in which each key is there once; see :func:`judged`."""
        left, right = (self._frame(which, self.parts * self.rows) for which in STRIDES)
        return _judge(left.merge(right, on="key", shuffle_method="p2p"), 1)

    def shuffle_differences(self, answer: pd.DataFrame) -> list[str]:
        """Say what is wrong with an answer of :meth:`shuffle`."""
        return differences(answer, self.parts * self.rows, REPEATS)

    def merge_differences(self, answer: pd.DataFrame) -> list[str]:
        """Say what is wrong with an answer of :meth:`merge`."""
        return differences(answer, self.parts * self.rows, 1)


def _judge(frame: Any, repeats: int) -> pd.DataFrame:
    meta = pd.DataFrame({name: pd.Series(dtype="int64") for name in FIGURES})
    answer: pd.DataFrame = frame.map_partitions(judged, repeats, meta=meta).compute()
    return answer


def differences(answer: pd.DataFrame, rows: int, repeats: int) -> list[str]:
    """Say what is wrong with a table of so many rows that was judged part by part.

    Examples
    --------
    >>> parts = [judged(table(part, which="left", rows=2, keys=4), 1) for part in (0, 1)]
    >>> differences(pd.concat(parts), 4, 1), differences(parts[0], 4, 1)
    ([], ['there are 2 rows, expected 4', 'the checksum is 5, expected 10'])
    """
    sums = answer.sum()
    keys = rows // repeats
    expected: Sequence[tuple[str, int, int]] = (
        ("there are {} rows, expected {}", sums.rows, rows),
        ("the checksum is {}, expected {}", sums.checksum, repeats * keys * (keys + 1) // 2),
        ("{} rows do not belong to their keys, expected {}", sums.wrong_rows, 0),
        ("{} keys are in more than one partition, expected {}", sums.torn_keys, 0),
    )
    return [text.format(found, wanted) for text, found, wanted in expected if found != wanted]
