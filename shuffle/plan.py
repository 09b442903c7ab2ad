"""Which rows of an input partition go where: a pure decision over arrays.

Covers: the order of output partitions in which those of one peer lie side by side, and the stable sort of an input
partition's rows into that order.
Does not cover: the choice of a worker for an output partition; :mod:`dask_gpurt.shuffle.assignment`.
See also: :mod:`dask_gpurt.shuffle.dataframe`, which takes the rows.

Theory of operation: an output partition has a *position*: its rank when all output partitions are ordered by worker,
then by id. One stable sort of the rows by position therefore groups them by peer and by partition at once, and a peer's
rows are a contiguous range of the sorted rows. Positions are small integers, for which NumPy's stable sort is a radix
sort: linear in the number of rows.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dask_gpurt.shuffle.kernels import Kernels

__all__ = ["PartitionPlan", "Peer", "RowOrder", "gather_ranges"]

Ints = npt.NDArray[np.int64]

#: Partition ids up to this are looked up in a table; others are searched for.
TABLE_SIZE_MAX = 2**20


@dataclass(frozen=True)
class Peer:
    """A worker and positions of output partitions that it holds together, ``start`` included, ``stop`` excluded."""

    address: str
    start: int
    stop: int


class RowOrder:
    """The rows of one input partition by position: counted at once, sorted when that is asked for.

    Parameters
    ----------
    positions
        Of each row; ``count`` for a row that no output wants.
    count
        How many positions there are.
    kernels
        Used for counting, if there are any; then :attr:`ranks` are there too.
    """

    def __init__(self, positions: npt.NDArray[Any], count: int, kernels: Kernels | None) -> None:
        self.positions = positions
        self.count = count
        self.kernels = kernels
        #: Of each row, how many with the same position are before it.
        self.ranks = np.empty(0 if kernels is None else len(positions), np.uint32)
        if kernels is not None:
            self.positions = positions.astype(np.uint16, copy=False)
            sizes = kernels.rank(self.positions, count, self.ranks)
        else:
            sizes = np.bincount(positions, minlength=count + 1)[:count]
        #: Rows before each position, and of all at the end.
        self.bounds = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(sizes, out=self.bounds[1:])

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        # The cost of a radix sort is in the width of what is sorted. Unwanted rows have the highest position.
        narrow = self.positions.astype(np.uint8) if self.count < 2**8 else self.positions
        return np.argsort(narrow, kind="stable")

    @property
    def rows(self) -> npt.NDArray[np.intp]:
        """Row numbers, ordered by position, and by row within a position. Rows that no output wants are missing."""
        return self._order[: self.bounds[-1]]

    @cached_property
    def places(self) -> npt.NDArray[np.intp]:
        """Of each row, its place in that order; rows that no output wants come last."""
        places = np.empty_like(self._order)
        places[self._order] = np.arange(len(places))
        return places

    def rows_of(self, start: int, stop: int) -> npt.NDArray[np.intp]:
        """Row numbers of the positions from ``start`` to ``stop``."""
        return self.rows[self.bounds[start] : self.bounds[stop]]


@dataclass(frozen=True)
class PartitionPlan:
    """The output partitions of one run, by position.

    Parameters
    ----------
    partitions
        Position to output partition.
    peers
        The workers, in the order of their positions, which they share out without a gap. A worker is there once, and once more for
        each output partition that is to be by itself.

    Examples
    --------
    >>> plan = PartitionPlan.build({0: "b", 1: "a", 2: "b"})
    >>> plan.partitions.tolist(), plan.peers
    ([1, 0, 2], (Peer(address='a', start=0, stop=1), Peer(address='b', start=1, stop=3)))
    >>> split = plan.split(np.array([2, 1, 7, 2, 0]))
    >>> split.rows.tolist(), split.bounds.tolist()
    ([1, 4, 0, 3], [0, 1, 2, 4])
    """

    partitions: Ints
    peers: tuple[Peer, ...]

    @classmethod
    def build(cls, worker_for: Mapping[int, str], alone: Container[int] = ()) -> PartitionPlan:
        """Order the output partitions of ``worker_for`` (output partition to worker's address).

        Those in ``alone`` are each by itself, whatever else their worker holds.

        Examples
        --------
        >>> PartitionPlan.build({0: "a", 1: "a", 2: "a"}, alone={1}).peers
        (Peer(address='a', start=0, stop=2), Peer(address='a', start=2, stop=3))
        """
        ordered = sorted(worker_for, key=lambda partition: (worker_for[partition], partition in alone, partition))
        peers: list[Peer] = []
        for position, partition in enumerate(ordered):
            address = worker_for[partition]
            start = position
            if partition not in alone and peers and peers[-1].address == address:
                start = peers.pop().start
            peers.append(Peer(address, start, position + 1))
        return cls(np.array(ordered, dtype=np.int64), tuple(peers))

    def positions(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8 | np.uint16 | np.uint32]:
        """Position of each of the partition ids ``values`` (integers or floats); ``len(partitions)`` for the others.

        The result has the narrowest unsigned type that fits, because the cost of a radix sort is in its width.
        """
        count = len(self.partitions)
        narrow = np.uint8 if count < 2**8 else np.uint16 if count < 2**16 else np.uint32
        if not len(values) or not count:
            return np.full(len(values), count, dtype=narrow)
        last = int(self.partitions.max())
        if values.dtype.kind in "iu" and last < TABLE_SIZE_MAX and values.min() >= 0 and values.max() <= last:
            table = np.full(last + 1, count, dtype=narrow)
            table[self.partitions] = np.arange(count, dtype=narrow)
            positions: npt.NDArray[Any] = table[values]
            return positions
        # searchsorted compares by value, as a join would: 1.0 is partition 1; 1.5 and NaN are none.
        by_id = np.argsort(self.partitions)
        ids = self.partitions[by_id]
        found = np.minimum(np.searchsorted(ids, values), count - 1)
        return np.where(ids[found] == values, by_id[found], count).astype(narrow)

    def split(self, values: npt.NDArray[Any], kernels: Kernels | None = None) -> RowOrder:
        """Order the rows whose partition ids are ``values``."""
        return RowOrder(self.positions(values), len(self.partitions), kernels)


def gather_ranges(starts: Ints, lengths: Ints) -> Ints:
    """Concatenate the ranges ``[start, start + length)``.

    Examples
    --------
    >>> gather_ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    offsets = np.cumsum(lengths) - lengths
    return np.repeat(starts - offsets, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)
