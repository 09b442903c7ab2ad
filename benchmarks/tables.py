"""Tables that workers make by themselves, and how their shuffled form is judged.

Covers: frames of eight columns that follow from row numbers, TPC-H's lineitem in equal parts, fingerprints of
partitions; shuffles of both as :class:`~benchmarks.contest.Workload`.
Does not cover: who competes; see :mod:`benchmarks.contest`. How large the cases are; see :mod:`benchmarks.shuffle`.

A partition's *fingerprint* is the number of its rows and the sum, modulo 2**64, of a 64-bit hash of each row, index
included, by pandas. It does not depend on the order of the rows; a row that is lost, doubled, changed in any column or
put into another partition changes it. What the fingerprint of each output partition has to be follows from the inputs
without any shuffle: each input partition is hashed where it lies, and the hashes are summed by output partition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from distributed import Client, wait
from distributed.client import futures_of

from benchmarks.frame import WrongAnswerError

__all__ = [
    "Fingerprint",
    "Shuffle",
    "SummedShuffle",
    "add_fingerprints",
    "compare_frames",
    "fingerprint",
    "fingerprints_by_output",
    "frame_nbytes",
    "in_parts",
    "key_of_row",
    "lineitem",
    "numeric",
    "ordered_futures",
    "output_of",
    "persisted_frame",
    "sums",
    "sums_by_output",
    "values",
]

#: Coprime to any count of rows below it, so that ``number * STRIDE % rows`` meets each key once.
STRIDE = 2_147_483_647

#: Multipliers of the columns other than the key: odd, so that no two rows have the same value.
FACTORS = np.array(
    [
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
        0xE7037ED1A0B428DB,
        0x8EBC6AF09C88C6E3,
    ],
    dtype="uint64",
)

#: Rows, and the sum of their hashes.
Fingerprint = tuple[int, int]


def numeric(part: int, *, rows: int, parts: int, hot: bool = False) -> pd.DataFrame:
    """Make one partition of a table of four integer and four float columns.

    Parameters
    ----------
    part, parts
        Number of the partition, and how many there are.
    rows
        Rows of each.
    hot
        Whether every second row of the table has the key 0; else all keys are different.

    Examples
    --------
    >>> numeric(0, rows=3, parts=2).columns.to_list()
    ['key', 'int_0', 'int_1', 'int_2', 'float_0', 'float_1', 'float_2', 'float_3']
    """
    number = np.arange(part * rows, (part + 1) * rows, dtype="uint64")
    key = key_of_row(number, rows * parts)
    if hot:
        key[::2] = 0
    return values(key, number)


def key_of_row(number: Any, rows: int, stride: int = STRIDE) -> Any:
    """Return the key of each row number of a table: all keys below ``rows``, once each, in an order without order.

    Examples
    --------
    >>> key_of_row(np.arange(5, dtype="uint64"), rows=5, stride=3)
    array([0, 3, 1, 4, 2])
    """
    return (number * np.uint64(stride) % np.uint64(rows)).astype("int64")


def values(key: Any, number: Any, prefix: str = "") -> pd.DataFrame:
    """Make a frame of these keys and of seven columns that follow from ``number``, a uint64 a row."""
    # One block for all columns of a type, as a frame has that was read from a file.
    integers = np.empty((4, len(key)), dtype="int64")
    integers[0] = key
    for column, factor in zip(integers[1:], FACTORS[:3], strict=True):
        np.multiply(number, factor, out=column.view("uint64"))
    floats = np.empty((4, len(key)))
    for column, factor in zip(floats, FACTORS[3:], strict=True):
        # The upper 53 bits as a fraction: every float in [0, 1) that can come.
        np.multiply((number * factor) >> np.uint64(11), 2.0**-53, out=column)
    names = ["key", *(f"{prefix}int_{i}" for i in range(3))], [f"{prefix}float_{i}" for i in range(4)]
    return pd.concat(
        [pd.DataFrame(block.T, columns=columns) for block, columns in zip((integers, floats), names, strict=True)],
        axis=1,
    )


def lineitem(part: int, *, files: Sequence[Path], parts: int) -> pd.DataFrame:
    """Read one of equal parts of lineitem, as dask.dataframe does."""
    import dask.dataframe as dd

    per_file = parts // len(files)
    whole = dd.read_parquet(str(files[part // per_file])).compute(scheduler="synchronous")
    bounds = np.linspace(0, len(whole), per_file + 1).astype(int)
    # A slice would share the strings of the whole file, and ship them.
    return whole.take(np.arange(*bounds[part % per_file :][:2])).reset_index(drop=True)


def in_parts(client: Client, make: Callable[[int], Any], parts: int) -> list[Any]:
    """Return futures of ``make(0)``, ``make(1)`` …, which lie on the workers in turn."""
    workers = sorted(client.scheduler_info()["workers"])
    return [client.submit(make, part, workers=[workers[part % len(workers)]], pure=False) for part in range(parts)]


def persisted_frame(client: Client, make: Callable[[int], pd.DataFrame], parts: int) -> Any:
    """Return a dataframe whose partitions lie in the memory of the workers in turn."""
    import dask.dataframe as dd

    futures = in_parts(client, make, parts)
    frame = client.persist(dd.from_delayed(futures, meta=make(0).iloc[:0], verify_meta=False))
    wait(frame)
    return frame


def fingerprint(frame: pd.DataFrame) -> Fingerprint:
    """Return the fingerprint of a partition.

    Examples
    --------
    >>> frame = numeric(0, rows=3, parts=1)
    >>> fingerprint(frame) == fingerprint(frame[::-1]), fingerprint(frame) == fingerprint(frame[:2])
    (True, False)
    """
    return len(frame), int(_row_hashes(frame).sum(dtype="uint64"))


def _row_hashes(frame: pd.DataFrame) -> Any:
    return pd.util.hash_pandas_object(frame).to_numpy()


def output_of(frame: pd.DataFrame, key: str, outputs: int) -> Any:
    """Return the output partition that Dask gives each row: the hash of its key, which becomes a float for that."""
    return pd.util.hash_pandas_object(frame[[key]].astype("float64"), index=False).to_numpy() % np.uint64(outputs)


def fingerprints_by_output(frame: pd.DataFrame, key: str, outputs: int) -> list[Fingerprint]:
    """Return what one input partition adds to the fingerprint of each output partition."""
    output = output_of(frame, key, outputs)
    order = np.argsort(output, kind="stable")
    rows = np.bincount(output.astype("int64"), minlength=outputs)
    # Sums of neighbours as differences of running sums, which wrap around as they should.
    running = np.concatenate([np.zeros(1, dtype="uint64"), np.cumsum(_row_hashes(frame)[order], dtype="uint64")])
    ends = np.cumsum(rows)
    sums = running[ends] - running[ends - rows]
    return [(int(count), int(total)) for count, total in zip(rows, sums, strict=True)]


def add_fingerprints(parts: Sequence[Sequence[Fingerprint]]) -> list[Fingerprint]:
    """Add up what all input partitions give to each output partition.

    Examples
    --------
    >>> add_fingerprints([[(1, 5), (2, 6)], [(3, 7), (0, 0)]])
    [(4, 12), (2, 6)]
    """
    return [
        (sum(rows for rows, _ in output), sum(total for _, total in output) % 2**64)
        for output in zip(*parts, strict=True)
    ]


def frame_nbytes(frame: pd.DataFrame) -> int:
    """Return the bytes of the columns of a partition."""
    return int(frame.memory_usage(index=False).sum())


def sums(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row: the number of rows, and the sum of each column of numbers; those of integers wrap around.

    Examples
    --------
    >>> sums(pd.DataFrame({"a": [1, 2], "b": [0.5, 1.0]})).to_dict("records")
    [{'rows': 2, 'a': 3, 'b': 1.5}]
    """
    return pd.DataFrame({"rows": [len(frame)], **{name: [frame[name].to_numpy().sum()] for name in frame.columns}})


def sums_by_output(frame: pd.DataFrame, key: str, outputs: int) -> pd.DataFrame:
    """Return what one input partition adds to :func:`sums` of each output partition, one row each."""
    output = output_of(frame, key, outputs)
    grouped = frame.groupby(output).sum()
    grouped.insert(0, "rows", np.bincount(output.astype("int64"), minlength=outputs)[grouped.index.astype("int64")])
    return grouped.reindex(np.arange(outputs, dtype="uint64"), fill_value=0)


@dataclass(frozen=True)
class Shuffle:
    """A shuffle of a table that lies in memory, by one column, into as many partitions as it has.

    Parameters
    ----------
    make
        Makes an input partition, on a worker.
    parts
        How many there are.
    key
        Column to shuffle by.
    row_key
        Columns that tell rows apart.
    """

    make: Callable[[int], pd.DataFrame]
    parts: int
    key: str
    row_key: tuple[str, ...]

    @classmethod
    def of_numeric(cls, *, parts: int, rows: int, hot: bool = False) -> Self:
        """Return the shuffle of a table of :func:`numeric`."""
        return cls(functools.partial(numeric, rows=rows, parts=parts, hot=hot), parts, "key", ("int_0",))

    @classmethod
    def of_lineitem(cls, *, parts: int, files: Sequence[Path]) -> Self:
        """Return the shuffle of :func:`lineitem` by order."""
        make = functools.partial(lineitem, files=files, parts=parts)
        return cls(make, parts, "l_orderkey", ("l_orderkey", "l_linenumber"))

    def load(self, client: Client) -> Any:
        """Make the partitions on the workers."""
        return persisted_frame(client, self.make, self.parts)

    def nbytes(self, client: Client, inputs: Any) -> int:
        """Ask where the partitions lie."""
        return sum(client.gather(client.map(frame_nbytes, ordered_futures(inputs), pure=False)))

    def build(self, inputs: Any) -> Any:
        """Return the shuffled dataframe."""
        return inputs.shuffle(self.key, npartitions=self.parts)

    def truth(self, client: Client, inputs: Any) -> Any:
        """Return the fingerprint of each output partition."""
        # As a partial: client.map takes ``key`` for itself.
        add = functools.partial(fingerprints_by_output, key=self.key, outputs=self.parts)
        return add_fingerprints(client.gather(client.map(add, ordered_futures(inputs), pure=False)))

    def check(self, client: Client, answer: Any, truth: Any) -> None:
        """Compare the fingerprints."""
        found = client.gather(client.map(fingerprint, ordered_futures(answer), pure=False))
        wrong = [number for number, (mine, true) in enumerate(zip(found, truth, strict=True)) if mine != true]
        if wrong:
            number = wrong[0]
            raise WrongAnswerError(
                f"{len(wrong)} of {len(truth)} partitions are wrong; partition {number} is {found[number]}, "
                f"expected {truth[number]}"
            )

    def excerpt(self, client: Client, answer: Any) -> pd.DataFrame | None:
        """Return the first partition, in order."""
        frame: pd.DataFrame = client.gather(ordered_futures(answer)[0])
        return frame.sort_values(list(self.row_key))


class SummedShuffle(Shuffle):
    """A shuffle of a table that is larger than memory: made by the tasks, and summed up partition by partition."""

    def load(self, client: Client) -> Any:  # noqa: ARG002
        """Return the table, of which nothing is made yet."""
        import dask.dataframe as dd

        return dd.from_map(self.make, range(self.parts), meta=self.make(0).iloc[:0])

    def nbytes(self, client: Client, inputs: Any) -> int:  # noqa: ARG002
        """Scale up the first partition: all are alike."""
        return self.parts * frame_nbytes(self.make(0))

    def build(self, inputs: Any) -> Any:
        """Return the sums of each partition of the shuffled dataframe."""
        return super().build(inputs).map_partitions(sums, meta=sums(self.make(0).iloc[:0]))

    def truth(self, client: Client, inputs: Any) -> Any:  # noqa: ARG002
        """Return the sums of each output partition."""
        add = functools.partial(_made_sums_by_output, make=self.make, column=self.key, outputs=self.parts)
        return sum(client.gather(client.map(add, range(self.parts), pure=False)))

    def check(self, client: Client, answer: Any, truth: Any) -> None:
        """Compare the sums; those of floats depend on their order, by far less than one part in a billion."""
        found = pd.concat(client.gather(ordered_futures(answer)), ignore_index=True)
        compare_frames(found, truth.reset_index(drop=True), rtol=1e-9)

    def excerpt(self, client: Client, answer: Any) -> pd.DataFrame | None:  # noqa: ARG002
        """Return nothing: no partition is left."""
        return None


def _made_sums_by_output(part: int, make: Callable[[int], pd.DataFrame], column: str, outputs: int) -> pd.DataFrame:
    return sums_by_output(make(part), column, outputs)


def ordered_futures(collection: Any) -> list[Any]:
    """Return the futures of a persisted collection in the order of its partitions."""
    return sorted(futures_of(collection), key=lambda future: tuple(future.key[1:]))


def compare_frames(first: pd.DataFrame, second: pd.DataFrame, *, rtol: float = 0.0) -> None:
    """Raise if two frames differ in columns, types, index or values; floats may by a relative ``rtol``.

    Raises
    ------
    WrongAnswerError
        With what pandas says about it.
    """
    floats = first.select_dtypes("floating").columns if rtol else []
    try:
        pd.testing.assert_index_equal(first.columns, second.columns)
        pd.testing.assert_frame_equal(first.drop(columns=floats), second.drop(columns=floats), check_exact=True)
        if len(floats):
            pd.testing.assert_frame_equal(first[floats], second[floats], check_exact=False, rtol=rtol, atol=0)
    except AssertionError as error:
        raise WrongAnswerError(str(error)) from error
