"""Data frames on a device as shards: split by output partition, pack, join.

Covers: what the shuffle asks of a library of such frames (:class:`FrameLibrary`), the register of libraries, cuDF.
Does not cover: pandas frames (:mod:`dask_gpurt.shuffle.frames`); the memory of bodies (:mod:`dask_gpurt.shuffle.device`).

Theory of operation
    A body is one shard, as its library packs a table: a contiguous piece of device memory, and a description in bytes,
    which goes into the header, behind the name of the library. No pickle is involved. The segment of a body that is sent
    is (output partition, rows), that of a packed one (input partition, rows). Each shard has a body of its own, however
    small it is: to pack small ones together would cost as many steps on the device as it saves messages. Small
    bodies go by the host. An output has its rows in the order of the input partitions.

    Descriptions are made and read by the library. What a peer sends is checked before it is taken in: its place, its size,
    its library, and by :meth:`FrameLibrary.check` that rows and columns are those that were agreed on and that nothing points
    out of the body. What is within the memory of the device nobody looks at.

    What a library cannot pack and get back as it was (cuDF: categories, time zones, nested types, decimals) is left to
    stock's data plane.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from dask_gpurt.shuffle import packed
from dask_gpurt.shuffle.device import Allocate, ArrayLibrary, DeviceBody, finish, library_named
from dask_gpurt.shuffle.libraries import Registry
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import MAX_EXTRA_NBYTES, Header, Kind, NotHeldError, WireError, decode, encode

__all__ = [
    "CudfLibrary",
    "FrameLibrary",
    "Piece",
    "UnsupportedFrameError",
    "check_parcel",
    "frames_named",
    "frames_of",
    "join",
    "pack",
    "ready",
    "register_frames",
    "split",
]

#: From this size on a body goes into the store as it is; see :data:`dask_gpurt.shuffle.frames.LARGE_NBYTES`.
LARGE_NBYTES = 2**18


class UnsupportedFrameError(TypeError):
    """A frame that its library cannot split."""


class Piece(NamedTuple):
    """The rows of one output partition, packed.

    Parameters
    ----------
    partition
        The output partition.
    rows
        How many there are.
    description
        By which the library reads ``array``.
    array
        A flat array of bytes, of the library's :attr:`FrameLibrary.arrays`.
    """

    partition: int
    rows: int
    description: bytes
    array: Any


class FrameLibrary(Protocol):
    """What the shuffle asks of a library of frames on a device.

    Attributes
    ----------
    name
        Name of the package of its frames.
    arrays
        Library of the arrays that packed frames are.
    """

    name: str
    arrays: ArrayLibrary

    def owns(self, value: object) -> bool:
        """Whether ``value`` is a frame of this library."""

    def supports(self, meta: Any) -> bool:
        """Whether frames like this empty one come back from being packed as they were."""

    def split(self, frame: Any, column: Hashable, partitions: Sequence[int], meta: Any) -> list[Piece]:
        """Split a frame by the partition ids in ``column``, into the columns of ``meta``; empty pieces are left out.

        Rows of other partitions are dropped, and the order within a partition is kept.

        Raises
        ------
        UnsupportedFrameError
            If that cannot be done with this frame.
        """

    def check(self, description: bytes, rows: int, nbytes: int, meta: Any) -> None:
        """Check the description of so many rows, packed into ``nbytes``, of a frame like ``meta``. Does not need the bytes.

        Raises
        ------
        WireError
            If the library could be misled by it.
        """

    def join(self, pieces: Sequence[tuple[bytes, Any]], meta: Any) -> Any:
        """Make a frame like ``meta`` of (description, flat array of bytes), one at least."""


class CudfLibrary:
    """cuDF, by way of pylibcudf.

    The columns travel by place, with the index behind them.
    """

    name = "cudf"

    def __init__(self) -> None:
        self._cudf: Any = importlib.import_module("cudf")
        self._plc: Any = importlib.import_module("pylibcudf")
        self._cupy: Any = importlib.import_module("cupy")
        self.arrays: ArrayLibrary = library_named("cupy")

    def owns(self, value: object) -> bool:
        """Whether ``value`` is a cuDF frame."""
        return type(value) is self._cudf.DataFrame

    def supports(self, meta: Any) -> bool:
        """Whether all columns, and an index of one level, are numbers, times without a zone, or strings."""
        return meta.index.nlevels == 1 and all(map(_is_flat, [*meta.dtypes, meta.index.dtype]))

    def split(self, frame: Any, column: Hashable, partitions: Sequence[int], meta: Any) -> list[Piece]:
        """Partition on the device, and pack each part."""
        if not len(frame) or not partitions:
            return []
        if not self.supports(frame):
            raise UnsupportedFrameError(f"columns of {set(map(str, frame.dtypes))} are not packed")
        table = self._flat(frame[list(meta.columns)])
        count = len(partitions)
        positions = self._cudf.Series(self._positions(frame[column], partitions))
        # cuDF need not use the stream of CuPy.
        self.arrays.synchronize()
        ordered, starts = self._plc.partitioning.partition(table, positions.to_pylibcudf()[0], count + 1)
        present = [place for place in range(count) if starts[place] < starts[place + 1]]
        edges = [edge for place in present for edge in (starts[place], starts[place + 1])]
        pieces = []
        for place, part in zip(present, self._plc.copying.slice(ordered, edges), strict=True):
            description, memory = self._plc.contiguous_split.pack(part).release()
            array = self._cupy.asarray(memory).view(np.uint8)
            pieces.append(Piece(int(partitions[place]), part.num_rows(), bytes(description), array))
        return pieces

    def check(self, description: bytes, rows: int, nbytes: int, meta: Any) -> None:
        """Check it against the layout that libcudf is known to have; see :mod:`dask_gpurt.shuffle.packed`."""
        packed.check(description, columns=len(meta.columns) + 1, rows=rows, nbytes=nbytes)

    def join(self, pieces: Sequence[tuple[bytes, Any]], meta: Any) -> Any:
        """Unpack and concatenate."""
        tables = [
            self._plc.contiguous_split.unpack_from_memoryviews(memoryview(description), self._plc.gpumemoryview(array))
            for description, array in pieces
        ]
        table = tables[0] if len(tables) == 1 else self._plc.concatenate.concatenate(tables)
        names = [str(place) for place in range(len(meta.columns) + 1)]
        flat = self._cudf.DataFrame.from_pylibcudf(table, {"columns": names})
        frame = flat.set_index(names[-1])
        frame.columns = meta.columns
        frame.index.name = meta.index.name
        differing = {name: dtype for name, dtype in meta.dtypes.items() if frame[name].dtype != dtype}
        return frame.astype(differing) if differing else frame

    def _flat(self, frame: Any) -> Any:
        columns = frame.reset_index(drop=True)
        columns.columns = [str(place) for place in range(len(frame.columns))]
        columns[str(len(frame.columns))] = self._cudf.Series(frame.index)
        return columns.to_pylibcudf()[0]

    def _positions(self, codes: Any, partitions: Sequence[int]) -> Any:
        """Place of each row's partition among ``partitions``, which are sorted; of others, their number."""
        if codes.dtype.kind not in "iu" or bool(codes.isnull().any()):
            raise UnsupportedFrameError(f"partition ids of {codes.dtype} are not known")
        cupy, values = self._cupy, codes.values
        ids = cupy.asarray(np.array(partitions, dtype=np.int64))
        found = cupy.minimum(cupy.searchsorted(ids, values), len(partitions) - 1)
        return cupy.where(ids[found] == values, found, len(partitions)).astype(np.int32)


def _is_flat(dtype: Any) -> bool:
    if isinstance(dtype, np.dtype):
        # An object column of cuDF's is one of strings.
        return dtype.kind in "biufmMO"
    import pandas as pd

    return isinstance(dtype, pd.StringDtype)


_libraries: Registry[FrameLibrary] = Registry("frames", CudfLibrary.name, CudfLibrary)


def register_frames(library: FrameLibrary) -> None:
    """Make a library known in this process, in place of one of that name."""
    _libraries.add(library)


def frames_named(name: str) -> FrameLibrary:
    """Return a library; see :meth:`~dask_gpurt.shuffle.libraries.Registry.named`."""
    return _libraries.named(name)


def frames_of(value: object) -> FrameLibrary | None:
    """Return the library whose frame ``value`` is; None if it is none that is known here.

    Examples
    --------
    >>> frames_of({}) is None
    True
    """
    return _libraries.of(value)


def split(
    library: FrameLibrary,
    frame: Any,
    input_partition: int,
    column: Hashable,
    *,
    worker_for: Mapping[int, str],
    meta: Any,
    allocate: Allocate,
) -> list[tuple[str, Header, Any]]:
    """Split a frame: bodies for the peers, with their addresses and headers.

    ``meta`` is an empty output frame. ``allocate`` lends the memory of bodies on the host.

    Raises
    ------
    UnsupportedFrameError
        If the library cannot split it.
    """
    shards = []
    for piece in library.split(frame, column, sorted(worker_for), meta):
        extra = library.name.encode() + b" " + piece.description
        if len(extra) > MAX_EXTRA_NBYTES:
            raise UnsupportedFrameError(f"the description of a shard has {len(extra)} bytes")
        body = DeviceBody(library.arrays, piece.array)
        try:
            library.check(piece.description, piece.rows, body.nbytes, meta)
        except WireError as reason:
            raise UnsupportedFrameError(f"no peer would take it: {reason}") from reason
        segments = np.array([[piece.partition, piece.rows]], dtype=np.int64)
        header = Header(Kind.TABLE, (input_partition,), segments, body.nbytes, extra)
        shards.append((worker_for[piece.partition], header, body))
    return finish(library.arrays, shards, allocate)


def _parse(extra: bytes) -> tuple[str, bytes]:
    name, _, description = extra.partition(b" ")
    return name.decode(errors="replace"), description


def check_parcel(header: Header, wanted: Callable[[Hashable], bool], meta: Any) -> None:
    """Check what a peer has sent before it is taken in; ``meta`` is an empty output frame.

    Raises
    ------
    WireError
        If it is no shard of such a frame on a device, or for a partition that nobody unpacks here.
    LibraryMissingError
        If the output cannot be made here.
    """
    if header.kind is not Kind.TABLE or len(header.input_id) != 1 or header.segments.shape != (1, 2):
        raise WireError(f"a shard of a table was expected, got {header.kind!r} for {header.input_id}")
    partition, rows = header.segments[0].tolist()
    if not wanted(partition):
        raise NotHeldError(f"output partition {partition} is not held here")
    name, description = _parse(header.extra)
    library = frames_named(name)
    if not library.owns(meta):
        raise WireError(f"a shard of a {type(meta).__name__} was expected, got one of {name}")
    library.check(description, rows, header.body_nbytes, meta)


def ready(parcel: Parcel) -> tuple[int, list[Any]] | None:
    """Give the packed form of a large parcel; None for the others, which are put into the store together."""
    return _packed(parcel, parcel.body) if parcel.nbytes >= LARGE_NBYTES else None


def pack(parcels: Sequence[Parcel]) -> dict[Hashable, list[Any]]:
    """Regroup parcels by output partition."""
    packed: dict[Hashable, list[Any]] = {}
    for parcel in parcels:
        # On the host, it may be a piece of a message, which it would keep.
        body = parcel.body if isinstance(parcel.body, DeviceBody) else bytes(parcel.body)
        partition, buffers = _packed(parcel, body)
        packed.setdefault(partition, []).extend(buffers)
    return packed


def _packed(parcel: Parcel, body: Any) -> tuple[int, list[Any]]:
    header = parcel.header
    partition, rows = header.segments[0].tolist()
    segments = np.array([[header.input_id[0], rows]], dtype=np.int64)
    return partition, [encode(Header(Kind.TABLE, (partition,), segments, parcel.nbytes, header.extra)), body]


def join(buffers: Sequence[Any], meta: Any) -> Any:
    """Make the output frame of the packed shards of an output partition; ``meta`` is an empty one.

    Raises
    ------
    WireError
        If these are no packed shards of one library.
    """
    if not buffers or len(buffers) % 2:
        raise WireError(f"headers and bodies alternate, got {len(buffers)} buffers")
    pieces = [(decode(head, body), body) for head, body in zip(buffers[::2], buffers[1::2], strict=True)]
    if any(header.kind is not Kind.TABLE or header.segments.shape != (1, 2) for header, _ in pieces):
        raise WireError("shards of tables were expected")
    pieces.sort(key=lambda piece: int(piece[0].segments[0, 0]))
    names = {_parse(header.extra)[0] for header, _ in pieces}
    if len(names) != 1:
        raise WireError(f"shards of one library were expected, got {sorted(names)}")
    library = frames_named(names.pop())
    foreign = {body.library.name for _, body in pieces if isinstance(body, DeviceBody)} - {library.arrays.name}
    if foreign:
        raise WireError(f"shards in the memory of {library.arrays.name} were expected, got {sorted(foreign)}")
    bodies = [body if isinstance(body, DeviceBody) else DeviceBody.of_host(library.arrays, body) for _, body in pieces]
    # The library need not use the stream on which they were copied.
    library.arrays.synchronize()
    output = library.join(
        [(_parse(header.extra)[1], body.array) for (header, _), body in zip(pieces, bodies, strict=True)], meta
    )
    # The bodies are free when this returns.
    library.arrays.synchronize()
    return output
