"""How large the outputs of a shuffle will be, by what a few of its inputs hold: a pure estimate over arrays.

Covers: the sample that a worker takes of an input (:func:`sample_of`), what follows from several of them
(:func:`expected_sizes`), and from both sides of a join (:func:`joint_sizes`).
Does not cover: when samples are taken and asked for; :mod:`dask_gpurt.shuffle.sampler` (worker) and
:mod:`dask_gpurt.shuffle.assigner` (scheduler).

Theory of operation: what one input looks like says little about the others. Of sorted data each has an output of its own,
and taking the first for all would send most of the outputs to one worker. So of what was not measured, each output is
expected to get the share that it has in *all* the samples, and the rest is expected to be even: a key that is everywhere
is found, one that is in a single input is not taken for more than that. What was measured counts as measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_gpurt.shuffle.wire import WireError, check_nbytes

__all__ = ["ROWS_MAX", "Sample", "expected_sizes", "joint_sizes", "sample_of"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: About so many rows of an input are looked at: half a millisecond's worth.
ROWS_MAX = 2**18

#: Partition ids up to this are counted in a table.
TABLE_SIZE_MAX = 2**20


@dataclass(frozen=True)
class Sample:
    """What one input of a shuffle holds.

    Parameters
    ----------
    column
        That which says the output partition.
    nbytes
        Of the input.
    rows
        Those that were looked at, by output partition.
    """

    column: str
    nbytes: int
    rows: Ints

    def to_message(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"column": self.column, "nbytes": self.nbytes, "rows": self.rows.astype("<u4").tobytes()}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Sample:
        """Read what :meth:`to_message` has written.

        Raises
        ------
        WireError
            If it is not that.
        """
        column, nbytes, rows = message.get("column"), check_nbytes(message.get("nbytes")), message.get("rows")
        if (
            not isinstance(column, str)
            or not isinstance(rows, bytes)
            or len(rows) % 4
            or len(rows) > 4 * TABLE_SIZE_MAX
        ):
            raise WireError("this is no sample of an input")
        return cls(column, nbytes, np.frombuffer(rows, "<u4").astype(np.int64))

    def sizes(self, outputs: Ints) -> Floats:
        """Return the bytes of this input that go to each of ``outputs``."""
        rows = np.zeros(len(outputs))
        known = outputs < len(self.rows)
        rows[known] = self.rows[outputs[known]]
        return rows * (self.nbytes / max(int(self.rows.sum()), 1))


def sample_of(column: str, values: npt.NDArray[Any], nbytes: int) -> Sample | None:
    """Take a sample of an input of ``nbytes`` whose rows go to the output partitions ``values``.

    None if those are not what can be counted: whole numbers, from 0 on, below a million.

    Examples
    --------
    >>> sample_of("to", np.array([2, 0, 2, 2]), 400)
    Sample(column='to', nbytes=400, rows=array([1, 0, 3]))
    """
    if values.dtype.kind not in "iu" or not len(values):
        return None
    # Of rows in a period, the same ones would be met with an even step.
    looked_at = values[:: len(values) // ROWS_MAX | 1] if len(values) > ROWS_MAX else values
    if looked_at.min() < 0 or looked_at.max() >= TABLE_SIZE_MAX:
        return None
    return Sample(column, nbytes, np.bincount(looked_at))


def expected_sizes(samples: Sequence[Sample], outputs: Ints, inputs: int) -> Floats:
    """Estimate the bytes of each of ``outputs``, of a shuffle of ``inputs`` of which ``samples`` were taken.

    Examples
    --------
    >>> hot = Sample("to", 800, np.array([5, 1, 1, 1]))
    >>> expected_sizes([hot, hot], np.arange(4), 10).tolist()
    [5000.0, 1000.0, 1000.0, 1000.0]
    >>> apart = [Sample("to", 800, np.array([8])), Sample("to", 800, np.array([0, 0, 8]))]
    >>> expected_sizes(apart, np.arange(4), 10).tolist()
    [2400.0, 1600.0, 2400.0, 1600.0]
    """
    sizes = np.array([sample.sizes(outputs) for sample in samples])
    measured = np.asarray(sizes.sum(axis=0), dtype=np.float64)
    total = float(measured.sum())
    if not total:
        return measured
    more = total / len(samples) * max(inputs - len(samples), 0)
    common = np.zeros(len(outputs))
    if len(samples) > 1:
        common = (sizes / np.maximum(sizes.sum(axis=1, keepdims=True), 1e-9)).min(axis=0)
    expected: Floats = measured + more * (common + (1 - common.sum()) / len(outputs))
    return expected


def joint_sizes(sides: Sequence[tuple[Floats | None, int]], outputs: int) -> Floats | None:
    """Estimate the bytes of each of ``outputs`` partitions that several shuffles make together; None if nothing is known.

    Parameters
    ----------
    sides
        Of each shuffle, the expected bytes of its outputs, or None, and the number of its inputs. One of which nothing is
        known is taken for even, and its inputs for as large as those of the others. A side with another number of outputs is
        left out: nobody knows which of them belong together.

    Examples
    --------
    A small side with a hot key would by itself keep a worker free for its first output:

    >>> joint_sizes([(np.array([50.0, 10.0, 10.0, 10.0]), 2), (None, 8)], 4).tolist()
    [130.0, 90.0, 90.0, 90.0]
    """
    known = [(sizes, inputs) for sizes, inputs in sides if sizes is not None and len(sizes) == outputs]
    total: Floats = np.sum([sizes for sizes, _ in known], axis=0, dtype=np.float64)
    if not known or not total.any():
        return None
    unknown = sum(inputs for sizes, inputs in sides if sizes is None)
    found: Floats = total + total.mean() * unknown / max(sum(inputs for _, inputs in known), 1)
    return found
