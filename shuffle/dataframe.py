"""Data frame shuffles over our data plane.

Covers: the run, and the spec by which the scheduler asks for it.
Does not cover: the splitting and joining, which is :mod:`dask_gpurt.shuffle.frames`, and :mod:`dask_gpurt.shuffle.tables`
for frames on a device.
See also: :mod:`dask_gpurt.shuffle.run`, the part that arrays share.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dask_gpurt.seams import DataFrameShuffleSpec
from dask_gpurt.shuffle import frames, tables
from dask_gpurt.shuffle.kernels import Kernels, kernels_if_ready
from dask_gpurt.shuffle.plan import PartitionPlan
from dask_gpurt.shuffle.repair import RepairableSpec
from dask_gpurt.shuffle.run import Declined, Run, Shards
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, WireError
from dask_gpurt.shuffle.worker import part_of

if TYPE_CHECKING:
    import pandas as pd
    from distributed.shuffle import ShuffleWorkerPlugin

#: Partitions of fewer rows are not worth a compiler.
KERNEL_ROWS = 50_000

__all__ = ["KERNEL_ROWS", "FrameRun", "FrameSpec", "TableRun", "supports"]


def supports(spec: object) -> bool:
    """Whether our data plane can do this shuffle, as far as its spec says.

    Frames of libraries that are not known here, and of subclasses of pandas', have conversions of their own, and duplicate
    column names have none.
    """
    import pandas as pd

    if type(spec) is not DataFrameShuffleSpec or not spec.meta.columns.is_unique:
        return False
    if type(spec.meta) is pd.DataFrame:
        return True
    library = tables.frames_of(spec.meta)
    return library is not None and library.supports(spec.meta)


class FrameRun(Run):
    """A run that shuffles pandas frames.

    Parameters
    ----------
    column
        Column that holds the output partition of each row.
    meta
        Empty frame with the columns and types of the input.
    drop_column
        Whether ``column`` is missing in the output.
    """

    def __init__(self, *, column: Hashable, meta: pd.DataFrame, drop_column: bool, **common: Any) -> None:
        self.column = column
        self.meta = meta
        self.drop_column = drop_column
        self._plan = PartitionPlan.build(common["worker_for"], common.get("adopted", ()))
        #: Input partition to whether its shards arrive together.
        self._many: dict[int, bool] = {}
        self._output_meta = meta.drop(columns=[column]) if drop_column else meta
        super().__init__(**common)

    def validate_data(self, data: Any) -> None:
        """Refuse what stock refuses."""
        from dask.utils import is_dataframe_like

        if not is_dataframe_like(data):
            raise TypeError(f"Expected {data=} to be a DataFrame, got {type(data)}.")
        if set(data.columns) != set(self.meta.columns):
            raise ValueError(f"Expected {self.meta.columns=} to match {data.columns=}.")

    def _split(self, data: Any, partition_id: int) -> Shards:
        import pandas as pd

        if type(data) is not pd.DataFrame:
            raise Declined(f"input partition {partition_id} is a {type(data).__name__}")
        self.part.replace_functions()
        shards = frames.split(
            data,
            partition_id,
            self.column,
            self._plan,
            self._output_meta,
            allocate=self._allocate,
            kernels=self._kernels(len(data)),
        )
        return self._sort_out(shards)

    def _kernels(self, rows: int) -> Kernels | None:
        if not self.part.compiles or rows < KERNEL_ROWS:
            return None
        return kernels_if_ready()

    def _planned(self) -> None:
        self._plan = PartitionPlan.build(self.worker_for, self._adopted)

    def _identity(self, header: Header) -> Hashable:
        (number,) = header.input_id
        many = len(header.segments) > 1
        if not many and (output := int(header.segments[0, 0])) in self._adopted:
            # These come one by one, whatever the others do.
            return number, output
        if self._many.setdefault(number, many) is not many:
            # The task ran twice, and did not give the same.
            raise WireError(f"input partition {number} was split in two ways")
        return number if many else (number, int(header.segments[0, 0]))

    def _ready(self, parcel: Parcel) -> tuple[Hashable, list[Any]] | None:
        return frames.ready(parcel)

    def _pack(self, parcels: Sequence[Parcel]) -> dict[Hashable, list[Any]]:
        return frames.pack(parcels)

    def _cut(self, parcel: Parcel) -> Sequence[tuple[Any, Header, Any]]:
        return frames.cut(parcel)

    def _check(self, header: Header) -> None:
        frames.check_parcel(header, self._own.__contains__)

    def _join(self, partition_id: int, buffers: list[Any]) -> pd.DataFrame:  # noqa: ARG002
        return frames.join(buffers, self._output_meta, allocate=self._allocate) if buffers else self._output_meta.copy()


class TableRun(FrameRun):
    """A run that shuffles frames on a device."""

    def _split(self, data: Any, partition_id: int) -> Shards:
        library = tables.frames_of(data)
        if library is None:
            raise Declined(f"input partition {partition_id} is a {type(data).__name__}")
        try:
            shards = tables.split(
                library,
                data,
                partition_id,
                self.column,
                worker_for=self.worker_for,
                meta=self._output_meta,
                allocate=self._allocate,
            )
        except tables.UnsupportedFrameError as reason:
            raise Declined(f"input partition {partition_id}: {reason}") from reason
        return self._sort_out(shards)

    def _ready(self, parcel: Parcel) -> tuple[Hashable, list[Any]] | None:
        return tables.ready(parcel)

    def _pack(self, parcels: Sequence[Parcel]) -> dict[Hashable, list[Any]]:
        return tables.pack(parcels)

    def _cut(self, parcel: Parcel) -> Sequence[tuple[Any, Header, Any]]:
        # Each shard has a body of its own.
        return [(int(parcel.header.segments[0, 0]), parcel.header, parcel.body)]

    def _check(self, header: Header) -> None:
        tables.check_parcel(header, self._own.__contains__, self._output_meta)

    def _join(self, partition_id: int, buffers: list[Any]) -> Any:  # noqa: ARG002
        return tables.join(buffers, self._output_meta) if buffers else self._output_meta.copy()


@dataclass(frozen=True)
class FrameSpec(RepairableSpec, DataFrameShuffleSpec):
    """Stock's spec, with a run over our data plane."""

    @classmethod
    def of(cls, spec: DataFrameShuffleSpec, *, keeps: bool = False) -> FrameSpec:
        """Ask for our data plane instead of stock's. Nothing in the memory of a device is kept."""
        import pandas as pd

        return cls.instead_of(spec, keeps=keeps and type(spec.meta) is pd.DataFrame)

    def create_run_on_worker(
        self, run_id: int, span_id: str | None, worker_for: dict[int, str], plugin: ShuffleWorkerPlugin
    ) -> FrameRun:
        """Make the run; called by distributed on each worker that takes part."""
        import pandas as pd

        kind = FrameRun if type(self.meta) is pd.DataFrame else TableRun
        return kind(
            column=self.column,
            meta=self.meta,
            drop_column=self.drop_column,
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
