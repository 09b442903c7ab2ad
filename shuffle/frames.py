"""Data frames as shards: split by output partition, pack, unpack.

Covers: pandas frames by way of Arrow tables. All functions are pure and run in threads.
Does not cover: which partition goes where (:mod:`dask_gpurt.shuffle.plan`), transport and storage.
See also: :mod:`dask_gpurt.shuffle.bricks`, the same for arrays; :mod:`distributed.shuffle._arrow`, whose results these
must equal.

Theory of operation: a frame becomes an Arrow table once, and for each peer one ``take`` gathers the peer's rows, ordered
by output partition. The body of a message is an Arrow IPC stream of that; its segments are (output partition, rows).
Packed for the store, a body is the stream of one output partition; its segments are (input partition, rows). An output
frame has its rows in the order of the input partitions, and as they were within each: the same frame every time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.plan import PartitionPlan, gather_ranges
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "SMALL_ROWS",
    "check_parcel",
    "decode_table",
    "encode_table",
    "pack",
    "parcel_of",
    "split",
    "to_frame",
    "unpack",
]

#: Up to so many rows a shard, gathering all of them at once is cheaper than slicing each (about 10 µs a slice).
SMALL_ROWS = 4096


def split(
    frame: pd.DataFrame, column: Hashable, plan: PartitionPlan, meta: pd.DataFrame
) -> list[tuple[str, npt.NDArray[np.int64], pa.Table]]:
    """Split a frame by the partition ids in ``column``: for each peer its segments and a table of its rows.

    ``meta`` is an empty output frame. On the way columns are named by their position in it: their own names need not
    be strings, nor differ from each other, nor stand in the same order in all input partitions.
    """
    import pyarrow as pa

    rows = plan.split(_partition_ids(frame, column, plan))
    if not len(rows.rows):
        return []
    if not frame.columns.equals(meta.columns):
        frame = frame.drop(columns=[column]) if column not in meta.columns else frame
        frame = frame if frame.columns.equals(meta.columns) else frame[meta.columns]
    table = _to_table(frame, meta)
    parts = []
    for peer in plan.peers:
        bounds = rows.bounds[peer.start : peer.stop + 1]
        if bounds[0] == bounds[-1]:
            continue
        sizes = np.diff(bounds)
        segments = np.stack([plan.partitions[peer.start : peer.stop], sizes], axis=1)[sizes > 0]
        parts.append((peer.address, segments, table.take(pa.array(rows.rows[bounds[0] : bounds[-1]]))))
    return parts


def _to_table(frame: pd.DataFrame, meta: pd.DataFrame) -> pa.Table:
    import pyarrow as pa
    from dask.dataframe.dispatch import to_pyarrow_table_dispatch

    frame = frame.set_axis([str(place) for place in range(len(meta.columns))], axis=1)
    if not all(name is None or isinstance(name, str) for name in frame.index.names):
        frame = frame.rename_axis([None] * frame.index.nlevels)
    # Columns that are Arrow's anyway need no conversion, and pandas cannot parse back the names of nested types.
    arrow = [str(place) for place in _arrow_places(meta)]
    table: pa.Table = to_pyarrow_table_dispatch(frame.drop(columns=arrow) if arrow else frame, preserve_index=True)
    for name in arrow:
        table = table.append_column(name, pa.array(frame[name].array, from_pandas=True))
    return table


def _arrow_places(meta: pd.DataFrame) -> list[int]:
    import pandas as pd

    return [place for place, dtype in enumerate(meta.dtypes) if isinstance(dtype, pd.ArrowDtype)]


def _partition_ids(frame: pd.DataFrame, column: Hashable, plan: PartitionPlan) -> npt.NDArray[Any]:
    """Partition ids as plain numbers; what is no number becomes -1, which no partition has."""
    import pandas as pd

    series = frame[column]
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "biuf":
        values: npt.NDArray[Any] = series.to_numpy()
        return values.view(np.uint8) if values.dtype.kind == "b" else values
    # Whatever else there may be is compared as pandas compares, like the join that stock makes of it.
    found = pd.Index(plan.partitions).get_indexer(pd.Index(series))
    ids: npt.NDArray[np.int64] = np.where(found >= 0, plan.partitions[found], -1)
    return ids


def encode_table(table: pa.Table) -> pa.Buffer:
    """Write an Arrow IPC stream into a buffer of just its size."""
    import pyarrow as pa

    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, table.schema) as writer:
        writer.write_table(table)
    buffer = pa.allocate_buffer(size.size())
    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(buffer), table.schema) as writer:
        writer.write_table(table)
    return buffer


def decode_table(body: Buffer, rows: int) -> pa.Table:
    """Read an Arrow IPC stream of ``rows`` rows without a copy.

    Raises
    ------
    WireError
        If it is none, or has other rows.
    """
    import pyarrow as pa

    try:
        table = pa.ipc.open_stream(pa.py_buffer(body)).read_all()
    except (pa.ArrowException, OSError) as error:
        raise WireError(f"this is not an Arrow stream: {error}") from error
    if table.num_rows != rows:
        raise WireError(f"the header says there are {rows} rows, and there are {table.num_rows}")
    return table


def parcel_of(input_partition: int, segments: npt.NDArray[np.int64], table: pa.Table) -> Parcel:
    """Make a parcel of a worker's own shards."""
    nbytes = int(table.get_total_buffer_size())
    return Parcel(Header(Kind.FRAME, (input_partition,), segments, nbytes), table, nbytes)


def check_parcel(header: Header, wanted: Callable[[Hashable], bool]) -> None:
    """Check what a peer has sent before it is taken in.

    Raises
    ------
    WireError
        If it is no frame, or for partitions that nobody unpacks here.
    """
    if header.kind is not Kind.FRAME or len(header.input_id) != 1 or header.segments.shape[1] != 2:
        raise WireError(f"shards of a frame were expected, got {header.kind!r} for {header.input_id}")
    for partition in header.segments[:, 0].tolist():
        if not wanted(partition):
            raise WireError(f"output partition {partition} is not held here")


def pack(parcels: Sequence[Parcel]) -> dict[Hashable, list[Buffer]]:
    """Regroup parcels by output partition."""
    parcels = sorted(parcels, key=lambda parcel: parcel.header.input_id)
    segments = np.concatenate([parcel.header.segments for parcel in parcels])
    inputs = np.repeat(
        np.array([parcel.header.input_id[0] for parcel in parcels], dtype=np.int64),
        [len(parcel.header.segments) for parcel in parcels],
    )
    # The stable sort leaves the shards of a partition in the order of the inputs.
    order = np.argsort(segments[:, 0], kind="stable")
    table, starts = _arrange([_table_of(parcel) for parcel in parcels], segments[:, 1], order)
    partitions, sizes, inputs = segments[order, 0], segments[order, 1], inputs[order]
    edges = np.flatnonzero(np.diff(partitions, prepend=partitions[0] - 1, append=partitions[-1] + 1))
    packed: dict[Hashable, list[Buffer]] = {}
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        partition = int(partitions[first])
        begin = int(starts[first])
        stop = int(starts[last - 1] + sizes[last - 1])
        body = memoryview(encode_table(table.slice(begin, stop - begin)))
        own = np.stack([inputs[first:last], sizes[first:last]], axis=1)
        packed[partition] = [encode(Header(Kind.FRAME, (partition,), own, body.nbytes)), body]
    return packed


def unpack(buffers: Sequence[Buffer]) -> pa.Table:
    """Join the packed shards of one output partition in the order of the inputs."""
    if not buffers or len(buffers) % 2:
        raise WireError(f"headers and bodies alternate, got {len(buffers)} buffers")
    tables: list[pa.Table] = []
    all_segments = []
    for head, body in zip(buffers[::2], buffers[1::2], strict=True):
        header = decode(head, body)
        if header.kind is not Kind.FRAME or header.segments.shape[1] != 2:
            raise WireError(f"shards of a frame were expected, got {header.kind!r}")
        all_segments.append(header.segments)
        tables.append(decode_table(body, int(header.segments[:, 1].sum())))
    segments = np.concatenate(all_segments)
    return _arrange(tables, segments[:, 1], np.argsort(segments[:, 0], kind="stable"))[0]


def _table_of(parcel: Parcel) -> pa.Table:
    if isinstance(parcel.body, bytes | bytearray | memoryview):
        return decode_table(parcel.body, int(parcel.header.segments[:, 1].sum()))
    return parcel.body


def _arrange(
    tables: Sequence[pa.Table], sizes: npt.NDArray[np.int64], order: npt.NDArray[np.intp]
) -> tuple[pa.Table, npt.NDArray[np.int64]]:
    """Concatenate tables, and put their consecutive segments of ``sizes`` rows into ``order``.

    Returns the table, and the row at which each segment (in the new order) starts.
    """
    import pyarrow as pa

    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    starts = np.cumsum(sizes) - sizes
    ordered = sizes[order]
    if bool((np.diff(order) > 0).all()):
        return table, starts
    if int(sizes.sum()) <= SMALL_ROWS * len(sizes):
        # A take needs one dictionary for all chunks of a column.
        table = table.unify_dictionaries().take(pa.array(gather_ranges(starts[order], ordered)))
    else:
        table = pa.concat_tables(
            [table.slice(start, size) for start, size in zip(starts[order].tolist(), ordered.tolist(), strict=True)]
        )
    return table, np.cumsum(ordered) - ordered


def to_frame(table: pa.Table, meta: pd.DataFrame) -> pd.DataFrame:
    """Make the output frame of the joined shards; ``meta`` is the empty frame that says what is expected."""
    import pandas as pd
    from dask.dataframe.dispatch import from_pyarrow_table_dispatch
    from pandas.core.dtypes.cast import find_common_type

    arrow = _arrow_places(meta)
    kept = {str(place): pd.arrays.ArrowExtensionArray(table.column(str(place))) for place in arrow}
    table = table.drop_columns(list(kept)) if kept else table
    frame: pd.DataFrame = from_pyarrow_table_dispatch(meta, table, self_destruct=True)
    for place in arrow:
        frame.insert(place, str(place), kept[str(place)])
    wanted: dict[str, Any] = {}
    for name, actual, expected in zip(frame.columns, frame.dtypes, meta.dtypes, strict=True):
        if actual == expected:
            continue
        if isinstance(actual, pd.CategoricalDtype) and isinstance(expected, pd.CategoricalDtype):
            # The categories of the data may be others than those of meta, and are right.
            continue
        if isinstance(actual, pd.StringDtype) and isinstance(expected, pd.StringDtype):
            # Arrow tells strings from strings by their width, pandas by what holds them and by their missing value.
            wanted[name] = expected
        else:
            wanted[name] = find_common_type([actual, expected])
    if wanted:
        frame = frame.astype(wanted)
    frame.columns = meta.columns
    if not all(name is None or isinstance(name, str) for name in meta.index.names):
        frame.index.names = meta.index.names
    return frame
