"""Data frames as shards: split by output partition, pack, join.

Covers: pandas frames. All functions are pure and run in threads.
Does not cover: which partition goes where (:mod:`dask_gpurt.shuffle.plan`), transport and storage.
See also: :mod:`dask_gpurt.shuffle.bricks`, the same for arrays; :mod:`distributed.shuffle._arrow`, whose results these
must equal.

Theory of operation
    A body holds some rows: first the *plain* columns (NumPy types without references, and such an index), each
    contiguous, then the *rest* of the columns as an Arrow IPC stream. The header's ``extra`` is the :class:`Schema`, by
    which a body is read; no pickle is involved.

    Plain columns are gathered once, from the frame right into the body that is sent or kept, and copied once, from the
    body right into the output frame. Large shards have a body each: they need nothing done between arrival and joining,
    and their memory is freed one by one. Small ones go together, a body a peer, because what costs then is their
    number; they are packed by output partition after they have arrived.

    The segments of a body that is sent are (output partition, rows), those of a packed one (input partition, rows). An
    output frame has its rows in the order of the input partitions, and as they were within each: the same frame every
    time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.kernels import MAX_POSITIONS, ScatterKernels
from dask_gpurt.shuffle.plan import PartitionPlan, RowOrder, gather_ranges
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa

__all__ = [
    "LARGE_NBYTES",
    "SMALL_ROWS",
    "Schema",
    "check_parcel",
    "decode_table",
    "encode_table",
    "join",
    "pack",
    "ready",
    "split",
]

#: Up to so many rows a shard, gathering all of them at once is cheaper than slicing each (about 10 µs a slice).
SMALL_ROWS = 4096
#: From this size on, on average, each shard has a body of its own. Its fixed cost, some 20 µs, is little then.
LARGE_NBYTES = 2**18
#: Lends so many bytes of memory with any content, for as long as somebody refers to the view.
Allocate = Callable[[int], memoryview]

#: Where the Arrow stream begins: a multiple of this, as Arrow likes its buffers.
_ALIGNMENT = 64
#: Place of the index among the columns.
_INDEX = -1


@dataclass(frozen=True)
class Schema:
    """What the columns of a body are.

    Parameters
    ----------
    plain
        Place in the output frame (-1: the index) and dtype of each plain column, in the order in which they lie.
    index_name
        Name of a plain index.
    rest
        Places of the columns in the Arrow stream, in their order. A stream without columns may hold an index.
    stream
        Whether there is a stream.
    """

    plain: tuple[tuple[int, np.dtype[Any]], ...]
    index_name: str | None
    rest: tuple[int, ...]
    stream: bool

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Schema:
        """Describe the columns of ``frame``, which stand as in the output."""
        places = [(place, dtype) for place, dtype in enumerate(frame.dtypes) if _is_plain(dtype)]
        index = frame.index
        name = index.name if index.nlevels == 1 else None
        plain_index = index.nlevels == 1 and _is_plain(index.dtype)
        if plain_index:
            places.append((_INDEX, index.dtype))
        # The widest first: so each begins at a multiple of its width. Stable: of its type, the index is the last.
        places.sort(key=lambda column: -column[1].itemsize)
        taken = {place for place, _ in places}
        rest = tuple(place for place in range(len(frame.columns)) if place not in taken)
        return cls(tuple(places), name if isinstance(name, str) else None, rest, bool(rest) or not plain_index)

    @cached_property
    def token(self) -> bytes:
        """Encode it."""
        plain = [[place, dtype.str] for place, dtype in self.plain]
        return json.dumps([plain, self.index_name, list(self.rest), self.stream]).encode()

    @staticmethod
    @lru_cache(maxsize=1000)
    def parse(token: bytes) -> Schema:
        """Decode a token.

        Raises
        ------
        WireError
            If it is none.
        """
        try:
            plain, index_name, rest, stream = json.loads(token)
            schema = Schema(
                tuple((int(place), np.dtype(str(dtype))) for place, dtype in plain),
                None if index_name is None else str(index_name),
                tuple(int(place) for place in rest),
                bool(stream),
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise WireError(f"this does not describe columns: {token[:100]!r}") from error
        places = [place for place, _ in schema.plain]
        every = sorted(place for place in (*places, *schema.rest) if place != _INDEX)
        if (
            every != list(range(len(every)))
            or not all(_is_plain(dtype) for _, dtype in schema.plain)
            or not 1 - schema.stream <= places.count(_INDEX) <= 1
            or len(places) - places.count(_INDEX) + len(schema.rest) != len(every)
            or (schema.rest and not schema.stream)
        ):
            raise WireError(f"these are not the columns of a frame: {token[:100]!r}")
        return schema

    @cached_property
    def has_index(self) -> bool:
        """Whether the index is plain."""
        return any(place == _INDEX for place, _ in self.plain)

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of the plain columns of a row."""
        return sum(dtype.itemsize for _, dtype in self.plain)

    def stream_start(self, rows: int) -> int:
        """Where the stream begins in a body of so many rows, and the body ends if there is none."""
        end = rows * self.row_nbytes
        return -(-end // _ALIGNMENT) * _ALIGNMENT if self.stream else end

    def columns(self, body: Buffer, rows: int) -> list[npt.NDArray[Any]]:
        """View the plain columns of a body.

        Raises
        ------
        WireError
            If the body is too small for them, or has something behind them that is no stream.
        """
        view = memoryview(body)
        end = self.stream_start(rows)
        if view.nbytes < end or (not self.stream and view.nbytes != end):
            raise WireError(f"{rows} rows take {end} bytes and the body has {view.nbytes}")
        offset = 0
        columns = []
        for _, dtype in self.plain:
            # Of no bytes nothing can be cast.
            column = np.frombuffer(view, dtype, rows, offset) if rows else np.empty(0, dtype)
            columns.append(column)
            offset += rows * dtype.itemsize
        return columns

    def table(self, body: Buffer, rows: int) -> pa.Table:
        """Read the stream of a body; None if there is none.

        Raises
        ------
        WireError
            If it is none, or has other rows.
        """
        return decode_table(memoryview(body)[self.stream_start(rows) :], rows) if self.stream else None


def _is_plain(dtype: object) -> bool:
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufcmM":
        return False
    return dtype.kind not in "mM" or np.datetime_data(dtype)[0] != "generic"


def _allocate(nbytes: int) -> memoryview:
    return np.empty(nbytes, np.uint8).data


def split(
    frame: pd.DataFrame,
    input_partition: int,
    column: Hashable,
    plan: PartitionPlan,
    meta: pd.DataFrame,
    *,
    allocate: Allocate = _allocate,
    kernels: ScatterKernels | None = None,
) -> list[tuple[str, Header, memoryview]]:
    """Split a frame by the partition ids in ``column``: bodies for the peers, with their addresses and headers.

    ``meta`` is an empty output frame. ``allocate`` lends the memory of bodies. ``kernels`` are used if there are any. On the way columns are known by their position in it: their own names need not
    be strings, nor differ from each other, nor stand in the same order in all input partitions.
    """
    order = plan.split(_partition_ids(frame, column, plan), kernels if len(plan.partitions) <= MAX_POSITIONS else None)
    if not order.bounds[-1]:
        return []
    if not frame.columns.equals(meta.columns):
        frame = frame.drop(columns=[column]) if column not in meta.columns else frame
        frame = frame if frame.columns.equals(meta.columns) else frame[meta.columns]
    schema = Schema.of(frame)
    sources = [_values(frame.index if place == _INDEX else frame.iloc[:, place]) for place, _ in schema.plain]
    table = _rest_of(frame, schema, meta) if schema.stream else None
    row_nbytes = schema.row_nbytes + (table.nbytes / len(frame) if table is not None else 0)
    cuts: list[_Cut] = []
    for peer in plan.peers:
        sizes = np.diff(order.bounds[peer.start : peer.stop + 1])
        present = np.flatnonzero(sizes)
        if not len(present):
            continue
        segments = np.stack([plan.partitions[peer.start : peer.stop], sizes], axis=1)[present]
        if sizes.sum() * row_nbytes >= LARGE_NBYTES * len(present):
            for number, position in enumerate((present + peer.start).tolist()):
                cuts.append(_Cut(peer.address, segments[number : number + 1], position, position + 1))
        else:
            cuts.append(_Cut(peer.address, segments, peer.start, peer.stop))
    bodies = _gather(_Bodies(schema, allocate), sources, table, order, cuts)
    return [
        (cut.address, Header(Kind.FRAME, (input_partition,), cut.segments, body.nbytes, schema.token), body)
        for cut, body in zip(cuts, bodies, strict=True)
    ]


class _Cut(NamedTuple):
    """What goes into one body: the rows of the positions from ``start`` to ``stop``."""

    address: str
    segments: npt.NDArray[np.int64]
    start: int
    stop: int


def _values(series: Any) -> npt.NDArray[Any]:
    import pandas as pd

    if isinstance(series, pd.RangeIndex):
        # Its own values, once made, would stay.
        return np.arange(series.start, series.stop, series.step, dtype=series.dtype)
    values: npt.NDArray[Any] = series.to_numpy()
    return values


def _gather(
    bodies: _Bodies, sources: Sequence[npt.NDArray[Any]], table: pa.Table | None, order: RowOrder, cuts: Sequence[_Cut]
) -> list[memoryview]:
    """Make a body of each cut."""
    import pyarrow as pa

    made = []
    for cut in cuts:
        part = None if table is None else table.take(pa.array(order.rows_of(cut.start, cut.stop)))
        made.append(bodies.make(int(order.bounds[cut.stop] - order.bounds[cut.start]), part))
    # To scatter a column reads it in order, and writes each output partition in order, which is faster than to gather each.
    scatter = _Scatter(order, order.kernels, cuts, [body for _, body in made]) if order.kernels is not None else None
    scratch: dict[np.dtype[Any], npt.NDArray[Any]] = {}
    offset = 0
    for number, source in enumerate(sources):
        itemsize = source.dtype.itemsize
        if scatter is not None and itemsize in _WORDS:
            scatter(source, offset)
        else:
            # NumPy can scatter into one array only.
            column = scratch.get(source.dtype)
            if column is None:
                column = scratch[source.dtype] = np.empty(len(source), source.dtype)
            column[order.places] = source
            for cut, (columns, _) in zip(cuts, made, strict=True):
                columns[number][...] = column[order.bounds[cut.start] : order.bounds[cut.stop]]
        offset += itemsize
    return [body for _, body in made]


_WORDS: dict[int, np.dtype[Any]] = {nbytes: np.dtype(f"u{nbytes}") for nbytes in (1, 2, 4, 8)}


class _Scatter:
    """Scatters columns into the bodies of all cuts at once."""

    def __init__(
        self, order: RowOrder, kernels: ScatterKernels, cuts: Sequence[_Cut], bodies: Sequence[memoryview]
    ) -> None:
        self._order = order
        self._kernel = kernels.scatter
        self._addresses = np.array([_address_of(body) for body in bodies], np.int64)
        self._ends = max(address + body.nbytes for address, body in zip(self._addresses.tolist(), bodies, strict=True))
        # Of each position: which body it goes to, the rows of that body, and those before it there. A position that
        # has no rows is in none, and nothing is written to where it points.
        self._body = np.zeros(order.count, np.intp)
        for number, cut in enumerate(cuts):
            self._body[cut.start : cut.stop] = number
        starts = np.array([order.bounds[cut.start] for cut in cuts], np.int64)
        stops = np.array([order.bounds[cut.stop] for cut in cuts], np.int64)
        self._rows = (stops - starts)[self._body]
        self._before = order.bounds[:-1] - starts[self._body]

    def __call__(self, source: npt.NDArray[Any], offset: int) -> None:
        """Scatter a column that is ``offset`` bytes into each row."""
        word = _WORDS[source.dtype.itemsize]
        starts = self._addresses[self._body] + self._rows * offset + self._before * word.itemsize
        origin = int(self._addresses.min())
        bases, left = np.divmod(starts - origin, word.itemsize)
        assert not left.any(), "bodies begin at multiples of a word"
        # One array over all bodies, and over what lies between them: only by ``bases`` is it known what is ours.
        out = np.asarray(_Memory(origin, word, (self._ends - origin) // word.itemsize))
        order = self._order
        self._kernel(np.ascontiguousarray(source).view(word), order.positions, order.count, order.ranks, bases, out)


class _Memory:
    """A range of addresses as NumPy understands it."""

    def __init__(self, address: int, dtype: np.dtype[Any], size: int) -> None:
        self.__array_interface__ = {"data": (address, False), "typestr": dtype.str, "shape": (size,), "version": 3}


def _address_of(body: memoryview) -> int:
    address: int = np.frombuffer(body, np.uint8).__array_interface__["data"][0]
    return address


class _Bodies(NamedTuple):
    """Makes bodies."""

    schema: Schema
    allocate: Allocate

    def make(self, rows: int, table: pa.Table | None) -> tuple[list[npt.NDArray[Any]], memoryview]:
        """Make a body with ``table`` in it; its plain columns are yet to be filled."""
        start = self.schema.stream_start(rows)
        nbytes = 0 if table is None else _stream_nbytes(table)
        body = self.allocate(start + nbytes)
        if table is not None:
            _write_stream(table, body[start:])
        return self.schema.columns(body, rows), body


def _rest_of(frame: pd.DataFrame, schema: Schema, meta: pd.DataFrame) -> pa.Table:
    """Make an Arrow table of what is not plain."""
    places = list(schema.rest)
    return _to_table(frame.iloc[:, places], meta.iloc[:, places], index=not schema.has_index)


def _to_table(frame: pd.DataFrame, meta: pd.DataFrame, *, index: bool = True) -> pa.Table:
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


def encode_table(table: pa.Table) -> memoryview:
    """Write an Arrow IPC stream into a buffer of just its size."""
    view = np.empty(_stream_nbytes(table), np.uint8).data
    _write_stream(table, view)
    return view


def _stream_nbytes(table: pa.Table) -> int:
    import pyarrow as pa

    size = pa.MockOutputStream()
    with pa.ipc.new_stream(size, table.schema) as writer:
        writer.write_table(table)
    return int(size.size())


def _write_stream(table: pa.Table, view: memoryview) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(pa.FixedSizeBufferWriter(pa.py_buffer(view)), table.schema) as writer:
        writer.write_table(table)


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
    schema = Schema.parse(header.extra)
    end = schema.stream_start(int(header.segments[:, 1].sum()))
    if header.body_nbytes < end or (not schema.stream and header.body_nbytes != end):
        raise WireError(f"{end} bytes of columns were expected, and the body has {header.body_nbytes}")


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
    order = np.argsort(segments[:, 0], kind="stable")
    rows = [int(parcel.header.segments[:, 1].sum()) for parcel in parcels]
    starts = np.cumsum(segments[:, 1]) - segments[:, 1]
    gathered = gather_ranges(starts[order], segments[order, 1])
    views = [schema.columns(parcel.body, count) for parcel, count in zip(parcels, rows, strict=True)]
    columns = [np.concatenate(column)[gathered] for column in zip(*views, strict=True)]
    table = None
    if schema.stream:
        tables = [schema.table(parcel.body, count) for parcel, count in zip(parcels, rows, strict=True)]
        table = _arrange(tables, segments[:, 1], order)
    partitions, sizes, inputs = segments[order, 0], segments[order, 1], inputs[order]
    edges = np.flatnonzero(np.diff(partitions, prepend=partitions[0] - 1, append=partitions[-1] + 1))
    ends = np.concatenate([[0], np.cumsum(sizes)])
    own = np.stack([inputs, sizes], axis=1)
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        begin, end = int(ends[first]), int(ends[last])
        partition = int(partitions[first])
        body: Buffer
        if table is None:
            body = b"".join([column[begin:end].view(np.uint8).data for column in columns])
        else:
            outs, body = _Bodies(schema, _allocate).make(end - begin, table.slice(begin, end - begin))
            for out, column in zip(outs, columns, strict=True):
                out[...] = column[begin:end]
        head = _packed_header(partition, own[first:last], memoryview(body).nbytes, schema.token)
        yield partition, [head, body]


def join(buffers: Sequence[Buffer], meta: pd.DataFrame, *, allocate: Allocate = _allocate) -> pd.DataFrame:
    """Make the output frame of the packed shards of an output partition.

    ``meta`` is an empty output frame, which says what is expected. ``allocate`` lends the memory of the plain columns.

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
        if header.kind is not Kind.FRAME or header.segments.shape[1] != 2 or not len(header.segments):
            raise WireError(f"shards of a frame were expected, got {header.kind!r}")
        pieces.append((header, body))
    # Mostly this alone puts all of them in order.
    pieces.sort(key=lambda piece: int(piece[0].segments[0, 0]))
    if all(header.extra == pieces[0][0].extra for header, _ in pieces):
        return _join_alike(pieces, meta, allocate)
    # By way of Arrow, which knows how to make one type of two as stock does.
    tables = [_to_table(_join_alike([piece], meta, _allocate, cast=False), meta) for piece in pieces]
    segments = np.concatenate([header.segments for header, _ in pieces])
    return to_frame(_arrange(tables, segments[:, 1], np.argsort(segments[:, 0], kind="stable")), meta)


def _join_alike(
    pieces: Sequence[tuple[Header, Buffer]], meta: pd.DataFrame, allocate: Allocate, *, cast: bool = True
) -> pd.DataFrame:
    import pandas as pd

    schema = Schema.parse(pieces[0][0].extra)
    if len(schema.plain) - schema.has_index + len(schema.rest) != len(meta.columns):
        raise WireError(f"{len(meta.columns)} columns were expected")
    segments = np.concatenate([header.segments for header, _ in pieces])
    counts = [int(header.segments[:, 1].sum()) for header, _ in pieces]
    order = np.argsort(segments[:, 0], kind="stable")
    views = [schema.columns(body, rows) for (_, body), rows in zip(pieces, counts, strict=True)]
    blocks = {}
    for dtype in dict.fromkeys(dtype for _, dtype in schema.plain):
        numbers = [n for n, (_, other) in enumerate(schema.plain) if other == dtype]
        shape = len(numbers), sum(counts)
        block = np.frombuffer(allocate(shape[0] * shape[1] * dtype.itemsize), dtype).reshape(shape)
        for out, number in zip(block, numbers, strict=True):
            _fill(out, [view[number] for view in views], segments[:, 1], order)
        blocks[dtype] = ([schema.plain[number][0] for number in numbers], block)
    rest = None
    if schema.stream:
        tables = [schema.table(body, rows) for (_, body), rows in zip(pieces, counts, strict=True)]
        rest = to_frame(_arrange(tables, segments[:, 1], order), meta.iloc[:, list(schema.rest)], cast=cast)
    index: pd.Index
    if schema.has_index:
        values = next(block[places.index(_INDEX)] for places, block in blocks.values() if _INDEX in places)
        index = pd.Index(values, name=schema.index_name, copy=False)
    else:
        assert rest is not None
        index = rest.index
    frame = _assemble(list(blocks.values()), schema.rest, rest, index).set_axis(meta.columns, axis=1)
    _name_index(frame, meta)
    return _cast(frame, meta) if cast else frame


def _fill(
    out: npt.NDArray[Any], pieces: Sequence[npt.NDArray[Any]], sizes: npt.NDArray[np.int64], order: npt.NDArray[np.intp]
) -> None:
    """Concatenate ``pieces``, and put their consecutive segments of ``sizes`` rows into ``order``."""
    if bool((np.diff(order) > 0).all()):
        np.concatenate(pieces, out=out)
        return
    starts = np.cumsum(sizes) - sizes
    np.take(np.concatenate(pieces), gather_ranges(starts[order], sizes[order]), out=out, mode="clip")


def _assemble(
    blocks: Sequence[tuple[list[int], npt.NDArray[Any]]],
    places: Sequence[int],
    rest: pd.DataFrame | None,
    index: pd.Index,
) -> pd.DataFrame:
    """Make a frame of blocks (their places, one of which may be the index's, and an array of a row each) and a rest."""
    import pandas as pd

    parts: list[tuple[Any, npt.NDArray[np.intp]]] = []
    for block_places, block in blocks:
        kept = [number for number, place in enumerate(block_places) if place != _INDEX]
        if kept:
            # The index is the last of them: what is left is a slice, no copy.
            parts.append((block[: len(kept)], np.array([block_places[number] for number in kept], dtype=np.intp)))
    for number, place in enumerate(places):
        assert rest is not None
        column = rest.iloc[:, number]
        values = column.to_numpy()[None, :] if isinstance(column.dtype, np.dtype) else column.array
        parts.append((values, np.array([place], dtype=np.intp)))
    columns = pd.RangeIndex(sum(len(numbers) for _, numbers in parts))
    if hasattr(pd.api, "internals"):
        from pandas.api.internals import create_dataframe_from_blocks

        frame: pd.DataFrame = create_dataframe_from_blocks(parts, index=index, columns=columns)
        return frame
    # Before pandas 3: a block for each column.
    arrays = {
        int(place): values[n] if getattr(values, "ndim", 1) == 2 else values
        for values, numbers in parts
        for n, place in enumerate(numbers)
    }
    return pd.DataFrame({place: arrays[place] for place in sorted(arrays)}, index=index, columns=columns, copy=False)


def _name_index(frame: pd.DataFrame, meta: pd.DataFrame) -> None:
    """Give the index the names that do not go over the wire."""
    if not all(name is None or isinstance(name, str) for name in meta.index.names):
        frame.index.names = meta.index.names


def _cast(frame: pd.DataFrame, meta: pd.DataFrame) -> pd.DataFrame:
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


def _arrange(tables: Sequence[pa.Table], sizes: npt.NDArray[np.int64], order: npt.NDArray[np.intp]) -> pa.Table:
    """Concatenate tables, and put their consecutive segments of ``sizes`` rows into ``order``."""
    import pyarrow as pa

    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
    if bool((np.diff(order) > 0).all()):
        return table
    starts = np.cumsum(sizes) - sizes
    if int(sizes.sum()) <= SMALL_ROWS * len(sizes):
        # A take needs one dictionary for all chunks of a column.
        return table.unify_dictionaries().take(pa.array(gather_ranges(starts[order], sizes[order])))
    return pa.concat_tables(
        [table.slice(start, size) for start, size in zip(starts[order].tolist(), sizes[order].tolist(), strict=True)]
    )


def to_frame(table: pa.Table, meta: pd.DataFrame, *, cast: bool = True) -> pd.DataFrame:
    """Make a frame of a table; ``meta`` is the empty frame that says what is expected."""
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
    _name_index(frame, meta)
    return _cast(frame, meta) if cast else frame
