"""Data frames as shards: split by output partition, pack, join.

Covers: pandas frames. All functions are pure and run in threads.
Does not cover: which partition goes where (:mod:`dask_gpurt.shuffle.plan`), transport and storage.
See also: :mod:`dask_gpurt.shuffle.bricks`, the same for arrays; :mod:`distributed.shuffle._arrow`, whose results these
must equal.

Theory of operation
    A body holds some rows of all columns, laid out as its :class:`~dask_gpurt.shuffle.schema.Schema` says, which the
    header has as its ``extra``; no pickle is involved.

    Rows are gathered once, from the frame right into the body that is sent or kept, and copied once, from the body right
    into the output frame. Large shards have a body each: they need nothing done between arrival and joining, and their
    memory is freed one by one. Small ones go together, a body a peer, because what costs then is their number; they are
    packed by output partition after they have arrived.

    The segments of a body that is sent are (output partition, rows), those of a packed one (input partition, rows). An
    output frame has its rows in the order of the input partitions, and as they were within each: the same frame every
    time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.arrow import (
    arrange_tables,
    cast_frame,
    decode_table,
    encode_table,
    name_index,
    to_frame,
    to_table,
)
from dask_gpurt.shuffle.columns import Allocate, Arrangement, Source, check_form, fresh, put_together, take_apart
from dask_gpurt.shuffle.kernels import MAX_POSITIONS, Kernels
from dask_gpurt.shuffle.plan import PartitionPlan
from dask_gpurt.shuffle.scatter import Cut, gather
from dask_gpurt.shuffle.schema import INDEX, Content, Form, Schema
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, NotHeldError, WireError, decode, encode

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa

__all__ = ["LARGE_NBYTES", "check_parcel", "cut", "join", "pack", "ready", "split"]

#: From this size on, on average, each shard has a body of its own. Its fixed cost, some 20 µs, is little then.
LARGE_NBYTES = 2**18
#: No shard has more rows. Where rows take no bytes, which Arrow knows, nothing else would bound them.
ROWS_MAX = 2**31 - 1


def split(
    frame: pd.DataFrame,
    input_partition: int,
    column: Hashable,
    plan: PartitionPlan,
    meta: pd.DataFrame,
    *,
    allocate: Allocate = fresh,
    kernels: Kernels | None = None,
) -> list[tuple[str, Header, memoryview]]:
    """Split a frame by the partition ids in ``column``: bodies for the peers, with their addresses and headers.

    ``meta`` is an empty output frame. On the way columns are known by their place in it: their own names need not be
    strings, nor differ from each other, nor stand in the same order in all input partitions. ``allocate`` lends the memory
    of bodies. ``kernels`` are used if there are any.
    """
    order = plan.split(_partition_ids(frame, column, plan), kernels if len(plan.partitions) <= MAX_POSITIONS else None)
    if not order.bounds[-1]:
        return []
    columns = _places(frame, column, meta)
    schema, sources = _take_apart(frame, columns, meta)
    table = _rest_of(frame, columns, schema, meta) if schema.stream else None
    nbytes = sum(source.text.nbytes for source in sources if source.text is not None)
    nbytes += 0 if table is None else table.nbytes
    row_nbytes = schema.row_nbytes + nbytes / len(frame)
    cuts: list[Cut] = []
    for peer in plan.peers:
        sizes = np.diff(order.bounds[peer.start : peer.stop + 1])
        present = np.flatnonzero(sizes)
        if not len(present):
            continue
        segments = np.stack([plan.partitions[peer.start : peer.stop], sizes], axis=1)[present]
        if sizes.sum() * row_nbytes >= LARGE_NBYTES * len(present):
            for number, position in enumerate((present + peer.start).tolist()):
                cuts.append(Cut(peer.address, segments[number : number + 1], position, position + 1))
        else:
            cuts.append(Cut(peer.address, segments, peer.start, peer.stop))
    bodies = gather(schema, sources, table, order, cuts, allocate)
    return [
        (cut.address, Header(Kind.FRAME, (input_partition,), cut.segments, body.nbytes, schema.token), body)
        for cut, body in zip(cuts, bodies, strict=True)
    ]


def _places(frame: pd.DataFrame, column: Hashable, meta: pd.DataFrame) -> list[int]:
    """Find each column of ``meta`` in ``frame``, which may have ``column`` in addition, and another order."""
    names = frame.columns
    if names.equals(meta.columns):
        return list(range(len(names)))
    if not names.is_unique:
        # They can't be told apart, and stand as in meta.
        return [place for place, name in enumerate(names) if name != column or column in meta.columns]
    found: list[int] = names.get_indexer(meta.columns).tolist()
    if -1 in found:
        raise KeyError(meta.columns[found.index(-1)])
    return found


def _take_apart(frame: pd.DataFrame, columns: list[int], meta: pd.DataFrame) -> tuple[Schema, list[Source]]:
    """Take the columns of ``frame`` apart; ``columns`` says where those of ``meta`` are."""
    found = {
        place: take_apart(frame.iloc[:, column], dtype)
        for place, (column, dtype) in enumerate(zip(columns, meta.dtypes, strict=True))
    }
    index = frame.index
    if index.nlevels == 1:
        found[INDEX] = take_apart(index, meta.index.dtype)
    own = {place: source for place, source in found.items() if source is not None}
    rest = tuple(place for place in found if place not in own and place != INDEX)
    name = index.name if INDEX in own and isinstance(index.name, str) else None
    described = tuple(source.column(place) for place, source in own.items())
    return Schema(described, name, rest, stream=bool(rest) or INDEX not in own), list(own.values())


def _rest_of(frame: pd.DataFrame, columns: list[int], schema: Schema, meta: pd.DataFrame) -> pa.Table:
    """Make an Arrow table of what was not taken apart."""
    part = frame.iloc[:, [columns[place] for place in schema.rest]]
    return to_table(part, meta.iloc[:, list(schema.rest)], index=not schema.has_index)


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


def check_parcel(header: Header, wanted: Callable[[Hashable], bool]) -> None:
    """Check what a peer has sent before it is taken in.

    Raises
    ------
    WireError
        If it is no frame, or for partitions that nobody unpacks here.
    """
    if header.kind is not Kind.FRAME or len(header.input_id) != 1 or not _has_pairs(header):
        raise WireError(f"shards of a frame were expected, got {header.kind!r} for {header.input_id}")
    if int(header.segments[:, 1].max()) > ROWS_MAX:
        # More than memory has bytes: their sum could be any number.
        raise WireError(f"a shard of {int(header.segments[:, 1].max())} rows")
    for partition in header.segments[:, 0].tolist():
        if not wanted(partition):
            raise NotHeldError(f"output partition {partition} is not held here")
    Schema.parse(header.extra).check_size(header.body_nbytes, int(header.segments[:, 1].sum()))


def _has_pairs(header: Header) -> bool:
    return len(header.segments) > 0 and header.segments.shape[1] == 2


def ready(parcel: Parcel) -> tuple[int, list[Buffer]] | None:
    """Give the packed form of a parcel that needs no packing; None for the others."""
    header = parcel.header
    if len(header.segments) != 1 or parcel.nbytes < LARGE_NBYTES:
        return None
    partition, rows = header.segments[0].tolist()
    return partition, [
        _packed_header(partition, [[header.input_id[0], rows]], parcel.nbytes, header.extra),
        parcel.body,
    ]


def _packed_header(partition: int, segments: Any, nbytes: int, token: bytes) -> bytes:
    return encode(Header(Kind.FRAME, (partition,), np.array(segments, dtype=np.int64), nbytes, token))


def pack(parcels: Sequence[Parcel]) -> dict[Hashable, list[Buffer]]:
    """Regroup parcels by output partition. Parcels with different columns stay apart."""
    groups: dict[bytes, list[Parcel]] = {}
    for parcel in sorted(parcels, key=lambda parcel: parcel.header.input_id):
        groups.setdefault(parcel.header.extra, []).append(parcel)
    packed: dict[Hashable, list[Buffer]] = {}
    for token, group in groups.items():
        for partition, buffers in _pack_alike(Schema.parse(token), group):
            packed.setdefault(partition, []).extend(buffers)
    return packed


def _pack_alike(schema: Schema, parcels: Sequence[Parcel]) -> Iterator[tuple[int, list[Buffer]]]:
    segments = np.concatenate([parcel.header.segments for parcel in parcels])
    inputs = np.repeat(
        np.array([parcel.header.input_id[0] for parcel in parcels], dtype=np.int64),
        [len(parcel.header.segments) for parcel in parcels],
    )
    # The stable sort leaves the shards of a partition in the order of the inputs.
    arrangement = Arrangement(segments[:, 1], np.argsort(segments[:, 0], kind="stable"))
    rows = [int(parcel.header.segments[:, 1].sum()) for parcel in parcels]
    contents = [schema.read(parcel.body, count) for parcel, count in zip(parcels, rows, strict=True)]
    parts = []
    for number, part in enumerate(schema.parts):
        out = np.empty(arrangement.row_count, part.dtype)
        arrangement.fill(out, [content.parts[number] for content in contents])
        parts.append(out)
    counts = [len(parcel.header.segments) for parcel in parcels]
    texts = [
        arrangement.texts(
            [content.parts[part] for content in contents], [content.texts[number] for content in contents], counts
        )
        for number, part in enumerate(schema.texts)
    ]
    table = None
    if schema.stream:
        table = arrange_tables(
            [_rest(content, count) for content, count in zip(contents, rows, strict=True)], arrangement
        )
    partitions, inputs = segments[arrangement.order, 0], inputs[arrangement.order]
    sizes = arrangement.sizes[arrangement.order]
    edges = np.flatnonzero(np.diff(partitions, prepend=partitions[0] - 1, append=partitions[-1] + 1))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    own = np.stack([inputs, sizes], axis=1)
    for first, last in pairwise(edges.tolist()):
        begin, end = int(ends[first]), int(ends[last])
        partition = int(partitions[first])
        pieces = [part[begin:end].view(np.uint8).data for part in parts]
        pieces += [segment.data for text in texts for _, segment in text[first:last]]
        if table is not None:
            filled = sum(piece.nbytes for piece in pieces)
            pieces += [
                memoryview(bytes(schema.stream_start(filled) - filled)),
                encode_table(table.slice(begin, end - begin)),
            ]
        body = b"".join(pieces)
        yield partition, [_packed_header(partition, own[first:last], len(body), schema.token), body]


def cut(parcel: Parcel) -> list[tuple[int, Header, Buffer]]:
    """Cut a parcel into shards by themselves: for each its output partition, and the header and body that it is sent with."""
    if len(parcel.header.segments) == 1:
        return [(int(parcel.header.segments[0, 0]), parcel.header, parcel.body)]
    # The body of one packed shard is laid out as that of a sent one.
    packed = pack([parcel])
    shards = []
    for partition, rows in parcel.header.segments.tolist():
        _, body = packed[partition]
        header = Header(
            Kind.FRAME,
            parcel.header.input_id,
            np.array([[partition, rows]], dtype=np.int64),
            memoryview(body).nbytes,
            parcel.header.extra,
        )
        shards.append((partition, header, body))
    return shards


def _rest(content: Content, rows: int) -> pa.Table:
    assert content.stream is not None
    return decode_table(content.stream, rows)


def join(buffers: Sequence[Buffer], meta: pd.DataFrame, *, allocate: Allocate = fresh) -> pd.DataFrame:
    """Make the output frame of the packed shards of an output partition.

    ``meta`` is an empty output frame, which says what is expected. ``allocate`` lends the memory of the columns.

    Raises
    ------
    WireError
        If these are no packed shards.
    """
    if not buffers or len(buffers) % 2:
        raise WireError(f"headers and bodies alternate, got {len(buffers)} buffers")
    pieces = []
    for head, body in zip(buffers[::2], buffers[1::2], strict=True):
        header = decode(head, body)
        if header.kind is not Kind.FRAME or not _has_pairs(header):
            raise WireError(f"shards of a frame were expected, got {header.kind!r}")
        schema = Schema.parse(header.extra)
        if schema.width != len(meta.columns):
            raise WireError(f"{len(meta.columns)} columns were expected")
        if schema.has_index and meta.index.nlevels > 1:
            raise WireError(f"an index of {meta.index.nlevels} levels was expected")
        pieces.append(_Piece(header.segments, schema, schema.read(body, int(header.segments[:, 1].sum()))))
    # Mostly this alone puts all of them in order.
    pieces.sort(key=lambda piece: int(piece.segments[0, 0]))
    if all(piece.schema.family == pieces[0].schema.family for piece in pieces):
        return _join_alike(pieces, meta, allocate)
    # By way of Arrow, which knows how to make one type of two as stock does.
    tables = [to_table(_join_alike([piece], meta, fresh, cast=False), meta) for piece in pieces]
    return to_frame(arrange_tables(tables, _arrangement(pieces), meta.columns), meta)


class _Piece(NamedTuple):
    """Some shards of an output partition: (input partition, rows) of each."""

    segments: npt.NDArray[np.int64]
    schema: Schema
    content: Content

    def part(self, column: int, *, validity: bool = False) -> npt.NDArray[Any]:
        """View the values of a column, or which of them are valid."""
        number = self.schema.part_of.get((column, validity))
        if number is None:
            return np.ones(self.rows, np.bool_)
        return self.content.parts[number]

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return int(self.segments[:, 1].sum())


def _arrangement(pieces: Sequence[_Piece]) -> Arrangement:
    segments = np.concatenate([piece.segments for piece in pieces])
    return Arrangement(segments[:, 1], np.argsort(segments[:, 0], kind="stable"))


def _join_alike(pieces: Sequence[_Piece], meta: pd.DataFrame, allocate: Allocate, *, cast: bool = True) -> pd.DataFrame:
    """Join pieces whose schemas are of one family."""
    import pandas as pd

    schema = pieces[0].schema
    arrangement = _arrangement(pieces)
    dtypes = list(meta.dtypes)
    arrays: list[tuple[Any, list[int]]] = []
    plain = [(number, column) for number, column in enumerate(schema.columns) if column.form is Form.PLAIN]
    # pandas keeps the columns of a type together.
    for dtype in dict.fromkeys(column.dtype for _, column in plain):
        alike = [(number, column.place) for number, column in plain if column.dtype == dtype]
        shape = len(alike), arrangement.row_count
        block = np.frombuffer(allocate(shape[0] * shape[1] * dtype.itemsize), dtype).reshape(shape)
        for out, (number, _) in zip(block, alike, strict=True):
            arrangement.fill(out, [piece.part(number) for piece in pieces])
        arrays.append((block, [place for _, place in alike]))
    for number, column in enumerate(schema.columns):
        if column.form is not Form.PLAIN:
            expected = meta.index.dtype if column.place == INDEX else dtypes[column.place]
            arrays.append((_join_column(pieces, number, arrangement, expected, allocate), [column.place]))
    rest = None
    if schema.stream:
        tables = [_rest(piece.content, piece.rows) for piece in pieces]
        rest_meta = meta.iloc[:, list(schema.rest)]
        rest = to_frame(arrange_tables(tables, arrangement, rest_meta.columns), rest_meta, cast=cast)
    index: pd.Index
    if schema.has_index:
        values = next(array for array, places in arrays if INDEX in places)
        index = pd.Index(values[-1] if isinstance(values, np.ndarray) else values, name=schema.index_name, copy=False)
    else:
        assert rest is not None
        index = rest.index
    frame = _assemble(arrays, schema.rest, rest, index=index, names=meta.columns)
    name_index(frame, meta)
    # What is as expected, and mostly all is, needs no cast. The rest was cast.
    same = all(array.dtype == dtypes[place] for array, own in arrays for place in own if place != INDEX)
    return frame if same or not cast else cast_frame(frame, meta)


def _join_column(
    pieces: Sequence[_Piece], number: int, arrangement: Arrangement, expected: Any, allocate: Allocate
) -> pd.api.extensions.ExtensionArray:
    """Join a column that is not NumPy's; ``number`` is that in the schema."""
    column = pieces[0].schema.columns[number]
    check_form(column.form, column.dtype, expected)
    parts = [piece.part(number) for piece in pieces]
    text: list[tuple[int, npt.NDArray[np.uint8]]] = []
    if column.form is Form.TEXT:
        values = np.empty(arrangement.row_count, np.result_type(*parts))
        texts = [piece.content.texts[piece.schema.text_of[number]] for piece in pieces]
        text = arrangement.texts(parts, texts, [len(piece.segments) for piece in pieces])
    else:
        values = np.frombuffer(allocate(arrangement.row_count * column.dtype.itemsize), column.dtype)
    arrangement.fill(values, parts)
    valid = None
    if any(piece.schema.columns[number].nulls for piece in pieces):
        valid = np.empty(arrangement.row_count, np.bool_)
        arrangement.fill(valid, [piece.part(number, validity=True) for piece in pieces])
    return put_together(column.form, expected, values, valid, text=text, allocate=allocate)


def _assemble(
    arrays: Sequence[tuple[Any, list[int]]],
    places: Sequence[int],
    rest: pd.DataFrame | None,
    *,
    index: pd.Index,
    names: pd.Index,
) -> pd.DataFrame:
    """Make a frame of arrays (blocks, with the places of their rows, or columns) and of the rest.

    One of the places may be the index's.
    """
    import pandas as pd

    parts: list[tuple[Any, npt.NDArray[np.intp]]] = []
    for array, own in arrays:
        kept = [place for place in own if place != INDEX]
        if kept:
            # The index is the last of them: what is left is a slice, no copy.
            values = array[: len(kept)] if isinstance(array, np.ndarray) else array
            parts.append((values, np.array(kept, dtype=np.intp)))
    for number, place in enumerate(places):
        assert rest is not None
        column = rest.iloc[:, number]
        values = column.to_numpy()[None, :] if isinstance(column.dtype, np.dtype) else column.array
        parts.append((values, np.array([place], dtype=np.intp)))
    frame: pd.DataFrame
    try:
        # Not an attribute of pandas.api until somebody imports it.
        from pandas.api.internals import create_dataframe_from_blocks
    except ImportError:
        # Before pandas 3: a block for each column.
        values_of = {
            int(place): values[n] if getattr(values, "ndim", 1) == 2 else values
            for values, numbers in parts
            for n, place in enumerate(numbers)
        }
        frame = pd.DataFrame({place: values_of[place] for place in sorted(values_of)}, index=index, copy=False)
        return frame.set_axis(names, axis=1)
    frame = create_dataframe_from_blocks(parts, index=index, columns=names)
    return frame
