"""Columns that go by Arrow's own format: nested types, Python objects, unknown categories, several levels of an index.

Covers: frames to Arrow tables and back as Dask does it, with the types that are expected; streams of them.
Does not cover: columns that are taken apart; see :mod:`dask_gpurt.shuffle.columns`.
See also: :mod:`distributed.shuffle._arrow`, whose results these must equal.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.columns import Arrangement
from dask_gpurt.shuffle.wire import WireError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "SMALL_ROWS",
    "arrange_tables",
    "cast_frame",
    "decode_table",
    "encode_table",
    "name_index",
    "stream_nbytes",
    "to_frame",
    "to_table",
    "write_stream",
]

#: Up to so many rows a shard, gathering all of them at once is cheaper than slicing each (about 10 µs a slice).
SMALL_ROWS = 4096


def to_table(frame: pd.DataFrame, meta: pd.DataFrame, *, index: bool = True) -> pa.Table:
    """Make an Arrow table of a frame, whose columns stand as in ``meta``; they are named by their places."""
    import pyarrow as pa
    from dask.dataframe.dispatch import to_pyarrow_table_dispatch

    frame = frame.set_axis([str(place) for place in range(len(meta.columns))], axis=1)
    if not all(name is None or isinstance(name, str) for name in frame.index.names):
        frame = frame.rename_axis([None] * frame.index.nlevels)
    # Columns that are Arrow's anyway need no conversion, and pandas cannot parse back the names of nested types.
    arrow = [str(place) for place in _arrow_places(meta)]
    arrays = {name: pa.array(frame[name].array, from_pandas=True) for name in arrow}
    if not index and len(arrow) == len(frame.columns):
        return pa.table(arrays)
    table: pa.Table = to_pyarrow_table_dispatch(frame.drop(columns=arrow) if arrow else frame, preserve_index=index)
    for name, array in arrays.items():
        table = table.append_column(name, array)
    return table


def _arrow_places(meta: pd.DataFrame) -> list[int]:
    import pandas as pd

    return [place for place, dtype in enumerate(meta.dtypes) if isinstance(dtype, pd.ArrowDtype)]


def encode_table(table: pa.Table) -> memoryview:
    """Write an Arrow IPC stream into a buffer of just its size."""
    view = np.empty(stream_nbytes(table), np.uint8).data
    write_stream(table, view)
    return view


def stream_nbytes(table: pa.Table) -> int:
    """Return the size of the Arrow IPC stream of a table."""
    import pyarrow as pa

    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, table.schema) as writer:
        writer.write_table(table)
    return int(size.size())


def write_stream(table: pa.Table, view: memoryview) -> None:
    """Write an Arrow IPC stream into a buffer of its size."""
    import pyarrow as pa

    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(pa.py_buffer(view)), table.schema) as writer:
        writer.write_table(table)


def decode_table(body: Buffer, rows: int) -> pa.Table:
    """Read an Arrow IPC stream of ``rows`` rows without a copy.

    What Arrow reads it does not check by itself: a wrong offset in it would end the process where it is followed. And what
    is compressed may be of any size when it is not: nobody of ours compresses within a stream.

    Raises
    ------
    WireError
        If it is none, is compressed, or has other rows.
    """
    import pyarrow as pa

    try:
        if any(map(_is_compressed, pa.ipc.MessageReader.open_stream(pa.py_buffer(body)))):
            raise WireError("this Arrow stream is compressed within")
        table = pa.ipc.open_stream(pa.py_buffer(body)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        raise WireError(f"this is not an Arrow stream: {error}") from error
    if table.num_rows != rows:
        raise WireError(f"the header says there are {rows} rows, and there are {table.num_rows}")
    return table


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Whether a batch has compressed buffers. pyarrow does not tell, but in its Flatbuffers it is easily found."""
    metadata = memoryview(message.metadata).cast("B")
    (root,) = struct.unpack_from("<I", metadata)
    batch = _table_in(metadata, root, 2)
    if message.type == "dictionary" and batch is not None:
        batch = _table_in(metadata, batch, 1)
    return message.type in {"dictionary", "record batch"} and batch is not None and _slot(metadata, batch, 3) != 0


def _slot(metadata: memoryview, table: int, number: int) -> int:
    """Find a field of a Flatbuffers table: how far it is behind the beginning of the table; 0: it is not there."""
    (back,) = struct.unpack_from("<i", metadata, table)
    nbytes, *_ = struct.unpack_from("<H", metadata, table - back)
    at = 4 + 2 * number
    return int(struct.unpack_from("<H", metadata, table - back + at)[0]) if at + 2 <= nbytes else 0


def _table_in(metadata: memoryview, table: int, number: int) -> int | None:
    """Follow a field that refers to another table."""
    field = _slot(metadata, table, number)
    return table + field + int(struct.unpack_from("<I", metadata, table + field)[0]) if field else None


def name_index(frame: pd.DataFrame, meta: pd.DataFrame) -> None:
    """Give the index the names that do not go over the wire."""
    if not all(name is None or isinstance(name, str) for name in meta.index.names):
        frame.index.names = meta.index.names


def cast_frame(frame: pd.DataFrame, meta: pd.DataFrame) -> pd.DataFrame:
    """Make the types of the columns those that are expected, as far as stock would."""
    import pandas as pd
    from pandas.core.dtypes.cast import find_common_type

    wanted: dict[int, Any] = {}
    for place, (actual, expected) in enumerate(zip(frame.dtypes, meta.dtypes, strict=True)):
        if actual == expected:
            continue
        if isinstance(actual, pd.CategoricalDtype) and isinstance(expected, pd.CategoricalDtype):
            # The categories of the data may be others than those of meta, and are right.
            continue
        if isinstance(actual, pd.StringDtype) and isinstance(expected, pd.StringDtype):
            # Arrow tells strings from strings by their width, pandas by what holds them and by their missing value.
            wanted[place] = expected
        else:
            wanted[place] = find_common_type([actual, expected])
    if not wanted:
        return frame
    names = frame.columns
    # By place: names may be there twice.
    return frame.set_axis(range(len(names)), axis=1).astype(wanted).set_axis(names, axis=1)


def arrange_tables(tables: Sequence[pa.Table], arrangement: Arrangement, names: pd.Index | None = None) -> pa.Table:
    """Concatenate tables, and put their segments into order.

    ``names`` are what those who get to see an error call the columns.
    """
    import pyarrow as pa

    try:
        table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException:
        if names is None:
            raise
        # Once more for the message, which has the names of the columns that have no common type.
        called = {str(place): str(name) for place, name in enumerate(names)}
        renamed = [table.rename_columns([called.get(name, name) for name in table.column_names]) for table in tables]
        table = pa.concat_tables(renamed, promote_options="permissive")
    if arrangement.in_order:
        return table
    if arrangement.row_count <= SMALL_ROWS * len(arrangement.sizes):
        # A take needs one dictionary for all chunks of a column.
        return table.unify_dictionaries().take(pa.array(arrangement.rows))
    order = arrangement.order
    segments = zip(arrangement.starts[order].tolist(), arrangement.sizes[order].tolist(), strict=True)
    return pa.concat_tables([table.slice(start, size) for start, size in segments])


def to_frame(table: pa.Table, meta: pd.DataFrame, *, cast: bool = True) -> pd.DataFrame:
    """Make a frame of a table; ``meta`` is the empty frame that says what is expected.

    Raises
    ------
    WireError
        If the table has other columns, or what it says of them for pandas is not so.
    """
    try:
        frame = _to_frame(table, meta)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        # What pandas and Arrow make of metadata that are none.
        raise WireError(f"this is no table of the columns that are expected: {error!r}") from error
    return cast_frame(frame, meta) if cast else frame


def _to_frame(table: pa.Table, meta: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd
    from dask.dataframe.dispatch import from_pyarrow_table_dispatch

    arrow = _arrow_places(meta)
    kept = {str(place): pd.arrays.ArrowExtensionArray(table.column(str(place))) for place in arrow}
    others = table.drop_columns(list(kept)) if kept else table
    frame: pd.DataFrame
    if others.num_columns:
        frame = from_pyarrow_table_dispatch(meta, others, self_destruct=True)
    else:
        frame = pd.DataFrame(index=pd.RangeIndex(table.num_rows))
    for place in arrow:
        frame.insert(place, str(place), kept[str(place)])
    frame.columns = meta.columns
    name_index(frame, meta)
    return frame
