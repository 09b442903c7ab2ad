"""Array rechunks over our data plane.

Covers: the run, and the spec by which the scheduler asks for it.
Does not cover: the cutting and joining, which is :mod:`dask_gpurt.shuffle.bricks`.
See also: :mod:`dask_gpurt.shuffle.run`, the part that data frames share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_gpurt.seams import ArrayRechunkSpec, DataUnavailable, split_axes
from dask_gpurt.shuffle import bricks
from dask_gpurt.shuffle.device import library_of
from dask_gpurt.shuffle.repair import RepairableSpec
from dask_gpurt.shuffle.run import Declined, Run, Shards
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header
from dask_gpurt.shuffle.worker import part_of

if TYPE_CHECKING:
    from distributed.shuffle import ShuffleWorkerPlugin

__all__ = ["BrickRun", "BrickSpec", "supports"]

Index = tuple[int, ...]


def supports(spec: object) -> bool:
    """Whether our data plane can do this rechunk, as far as its spec says, which knows no dtype."""
    return type(spec) is ArrayRechunkSpec


class BrickRun(Run):
    """A run that rechunks arrays, NumPy's or those of a library for devices.

    Parameters
    ----------
    old, new
        Chunks along each axis, of the input and the output.
    """

    def __init__(self, *, old: Any, new: Any, **common: Any) -> None:
        self._axes = split_axes(old, new)
        super().__init__(**common)

    def _split(self, data: Any, partition_id: Index) -> Shards:
        known = type(data) is np.ndarray or library_of(data) is not None
        if not known or bricks.dtype_token(data.dtype) is None:
            raise Declined(f"chunk {partition_id} is a {type(data).__name__} of {getattr(data, 'dtype', 'no dtype')}")
        shards = bricks.split(
            data, partition_id, self._axes, self.worker_for, alone=self._adopted, allocate=self._allocate
        )
        return self._sort_out(shards)

    def _identity(self, header: Header) -> Hashable:
        # How a chunk is cut is in the spec: together there are always the same.
        ndim = len(header.input_id)
        alone = len(header.segments) == 1
        return header.input_id, tuple(header.segments[0, :ndim].tolist()) if alone else None

    def _ready(self, parcel: Parcel) -> tuple[Hashable, list[Any]] | None:
        return bricks.ready(parcel)

    def _pack(self, parcels: Sequence[Parcel]) -> dict[Hashable, list[Any]]:
        return bricks.pack(parcels)

    def _cut(self, parcel: Parcel) -> Sequence[tuple[Any, Header, Any]]:
        return bricks.cut(parcel)

    def _check(self, header: Header) -> None:
        bricks.check_parcel(header, self._own.__contains__)

    def _join(self, partition_id: Index, buffers: list[Any]) -> Any:
        if not buffers:
            raise DataUnavailable(partition_id)
        return bricks.unpack(buffers, allocate=self._allocate)


@dataclass(frozen=True)
class BrickSpec(RepairableSpec, ArrayRechunkSpec):
    """Stock's spec, with a run over our data plane."""

    @classmethod
    def of(cls, spec: ArrayRechunkSpec, *, keeps: bool = False) -> BrickSpec:
        """Ask for our data plane instead of stock's."""
        return cls.instead_of(spec, keeps=keeps)

    def create_run_on_worker(
        self, run_id: int, span_id: str | None, worker_for: dict[Index, str], plugin: ShuffleWorkerPlugin
    ) -> BrickRun:
        """Make the run; called by distributed on each worker that takes part."""
        return BrickRun(
            old=self.old,
            new=self.new,
            id=self.id,
            run_id=run_id,
            span_id=span_id,
            worker_for=worker_for,
            plugin=plugin,
            part=part_of(plugin.worker),
            keeps=self.keeps,
            epoch=self.epoch,
            adopted=self.adopted,
        )
