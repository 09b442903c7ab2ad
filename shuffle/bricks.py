"""Array chunks as shards: split by output chunk, pack, unpack.

Covers: arrays of plain dtypes, NumPy's and those of libraries for devices (:mod:`dask_gpurt.shuffle.device`). All functions
are pure and run in threads.
Does not cover: object arrays and arrays of other libraries; :func:`dtype_token` says no to the first, and both go stock.
See also: :mod:`dask_gpurt.shuffle.frames`, the same for data frames; the theory of rechunking in
:mod:`distributed.shuffle._rechunk`, whose ``split_axes`` says how an input chunk is cut.

Theory of operation: a body is raw elements. A large shard has a body of its own; the small ones of a chunk that go to one
peer are copied one behind the other into one. A segment is (output chunk, place among the shards of that chunk, shape), a
number for each dimension each. Packed for the store, a body holds shards of one output chunk; its segments are (place,
shape). The output is allocated once, and every shard is copied to where its place says.

What a device's library made is cut, packed and put together by the device, and the header names the library. A body of it
that lies on the host, for it came that way, is copied to the device where the output is made.
"""

from __future__ import annotations

import ast
import itertools
import math
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dask_gpurt.memory.store import Buffer, buffer_nbytes
from dask_gpurt.shuffle.device import ArrayLibrary, DeviceBody, finish, library_named, library_of
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, NotHeldError, WireError, decode, encode

__all__ = ["LARGE_NBYTES", "check_parcel", "cut", "dtype_of", "dtype_token", "pack", "ready", "split", "unpack"]

#: From this size on a shard has a body of its own; see :data:`dask_gpurt.shuffle.frames.LARGE_NBYTES`.
LARGE_NBYTES = 2**18

#: Lends so many bytes of memory with any content, for as long as somebody refers to the view.
Allocate = Callable[[int], memoryview]
Index = tuple[int, ...]
#: For each axis, for each input chunk: (output chunk, place, slice) of its pieces.
SplitAxes = Sequence[Sequence[Sequence[tuple[int, int, slice]]]]


def dtype_token(dtype: np.dtype[Any]) -> bytes | None:
    """Describe a dtype in the way of the ``.npy`` format; None if elements of it are not plain bytes."""
    plain = (
        dtype.kind in "biufcmMSUV"
        and not dtype.hasobject
        and dtype.itemsize > 0
        and dtype.isbuiltin != 2
        and dtype.metadata is None
    )
    if not plain:
        return None
    token = repr(np.lib.format.dtype_to_descr(dtype)).encode()
    return token if dtype_of(token) == dtype else None


def dtype_of(token: bytes) -> np.dtype[Any]:
    """Invert :func:`dtype_token`.

    Raises
    ------
    WireError
        If this is no description of a plain dtype.

    Examples
    --------
    >>> dtype_of(dtype_token(np.dtype("M8[ms]")))
    dtype('<M8[ms]')
    """
    try:
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(ast.literal_eval(token.decode()))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, IndexError, KeyError) as error:
        raise WireError(f"this does not describe a dtype: {token[:100]!r}") from error
    if dtype.hasobject or not dtype.itemsize:
        raise WireError(f"elements of {dtype} are not plain bytes")
    return dtype


def _allocate(nbytes: int) -> memoryview:
    return np.empty(nbytes, np.uint8).data


def _tag(library: ArrayLibrary | None, token: bytes) -> bytes:
    """Add the name of a library to the description of a dtype, which begins with a quote or a bracket."""
    return token if library is None else library.name.encode() + b" " + token


@lru_cache(maxsize=1000)
def _element(extra: bytes) -> tuple[str, np.dtype[Any]]:
    """Invert :func:`_tag`: the name of a library, or nothing, and a dtype."""
    if extra[:1] in (b"'", b"["):
        return "", dtype_of(extra)
    name, _, token = extra.partition(b" ")
    return name.decode(errors="replace"), dtype_of(token)


def split(
    chunk: Any,
    index: Index,
    axes: SplitAxes,
    worker_for: Mapping[Index, str],
    *,
    alone: Container[Index] = (),
    allocate: Allocate = _allocate,
) -> list[tuple[str, Header, Any]]:
    """Cut a chunk: for each peer headers and bodies. ``allocate`` lends the memory of those on the host.

    Shards for output chunks in ``alone`` have a body each.

    Raises
    ------
    TypeError
        If the elements of ``chunk`` are not plain bytes.
    """
    token = dtype_token(chunk.dtype)
    if token is None:
        raise TypeError(f"elements of {chunk.dtype} are not plain bytes")
    library = library_of(chunk)
    extra = _tag(library, token)
    bodies: dict[tuple[str, Index | None], list[tuple[Index, Index, Any]]] = {}
    for pieces in itertools.product(*(axis[i] for axis, i in zip(axes, index, strict=True))):
        target, place, where = zip(*pieces, strict=True)
        shard = chunk[where]
        # Large ones stay by themselves.
        key = (worker_for[target], target if shard.nbytes >= LARGE_NBYTES or target in alone else None)
        bodies.setdefault(key, []).append((target, place, shard))
    parts = []
    for (address, _), shards in bodies.items():
        segments = np.array([target + place + shard.shape for target, place, shard in shards], dtype=np.int64)
        data = _new(library, sum(shard.nbytes for _, _, shard in shards), allocate)
        body = _elements(data, chunk.dtype)
        offset = 0
        for _, _, shard in shards:
            body[offset : offset + shard.size].reshape(shard.shape)[...] = shard
            offset += shard.size
        parts.append((address, Header(Kind.BRICK, index, segments, data.nbytes, extra), data))
    return parts if library is None else finish(library, parts, allocate)


def check_parcel(header: Header, wanted: Callable[[Hashable], bool]) -> None:
    """Check what a peer has sent before it is taken in.

    Raises
    ------
    WireError
        If it is no array, for chunks that nobody unpacks here, or not of the size that its shapes say.
    LibraryMissingError
        If the output cannot be made here.
    """
    ndim = len(header.input_id)
    if header.kind is not Kind.BRICK or not ndim or header.segments.shape[1] != 3 * ndim:
        raise WireError(f"shards of an array were expected, got {header.kind!r} for {header.input_id}")
    size = 0
    for segment in header.segments.tolist():
        if not wanted(tuple(segment[:ndim])):
            raise NotHeldError(f"output chunk {tuple(segment[:ndim])} is not held here")
        size += math.prod(segment[2 * ndim :])
    name, dtype = _element(header.extra)
    if name:
        library_named(name)
    if size * dtype.itemsize != header.body_nbytes:
        raise WireError(f"shards of {size} elements were expected, got {header.body_nbytes} bytes")


def cut(parcel: Parcel) -> list[tuple[Index, Header, Any]]:
    """Cut a parcel into shards by themselves: for each its output chunk, and the header and body that it is sent with."""
    header = parcel.header
    ndim = len(header.input_id)
    itemsize = _element(header.extra)[1].itemsize
    body = _bytes_of(parcel.body)
    shards = []
    offset = 0
    for number, segment in enumerate(header.segments.tolist()):
        nbytes = math.prod(segment[2 * ndim :]) * itemsize
        one = Header(Kind.BRICK, header.input_id, header.segments[number : number + 1], nbytes, header.extra)
        piece = body[offset : offset + nbytes]
        if isinstance(parcel.body, DeviceBody):
            piece = DeviceBody(parcel.body.library, piece)
        shards.append((tuple(segment[:ndim]), one, piece))
        offset += nbytes
    return shards


def ready(parcel: Parcel) -> tuple[Index, list[Any]] | None:
    """Give the packed form of a parcel that needs no packing; None for the others."""
    header = parcel.header
    if len(header.segments) != 1 or parcel.nbytes < LARGE_NBYTES:
        return None
    ndim = len(header.input_id)
    target = tuple(header.segments[0, :ndim].tolist())
    packed = Header(Kind.BRICK, target, header.segments[:, ndim:], parcel.nbytes, header.extra)
    return target, [encode(packed), parcel.body]


def pack(parcels: Sequence[Parcel]) -> dict[Hashable, list[Any]]:
    """Regroup parcels by output chunk, those on the host or those on a device. Parcels of different dtypes stay apart."""
    groups: dict[tuple[Index, bytes, ArrayLibrary | None], list[tuple[list[int], Any, bool]]] = {}
    for parcel in parcels:
        header = parcel.header
        ndim = len(header.input_id)
        itemsize = _element(header.extra)[1].itemsize
        body = _bytes_of(parcel.body)
        library = parcel.body.library if isinstance(parcel.body, DeviceBody) else None
        offset = 0
        for segment in header.segments.tolist():
            nbytes = math.prod(segment[2 * ndim :]) * itemsize
            shards = groups.setdefault((tuple(segment[:ndim]), header.extra, library), [])
            shards.append((segment[ndim:], body[offset : offset + nbytes], len(header.segments) == 1))
            offset += nbytes
    packed: dict[Hashable, list[Any]] = {}
    for (target, extra, library), shards in groups.items():
        views = [view for _, view, _ in shards]
        # Joined, they own their memory; a body that is this one shard already does.
        whole = len(shards) == 1 and shards[0][2]
        joined: Buffer | DeviceBody
        if library is None:
            joined = views[0] if whole else b"".join(views)
        else:
            joined = DeviceBody(library, views[0] if whole else library.concatenate(views))
        segments = np.array([segment for segment, _, _ in shards], dtype=np.int64)
        header = Header(Kind.BRICK, target, segments, buffer_nbytes(joined), extra)
        packed.setdefault(target, []).extend((encode(header), joined))
    for library in {library for _, _, library in groups if library is not None}:
        library.synchronize()
    return packed


def unpack(buffers: Sequence[Any], *, allocate: Allocate = _allocate) -> Any:
    """Put the packed shards of one output chunk together. ``allocate`` lends its memory, if that is on the host."""
    if not buffers or len(buffers) % 2:
        raise WireError(f"headers and bodies alternate, got {len(buffers)} buffers")
    pieces = [(decode(head, body), body) for head, body in zip(buffers[::2], buffers[1::2], strict=True)]
    name = next(filter(None, (_element(header.extra)[0] for header, _ in pieces)), "")
    library = library_named(name) if name else None
    output = _unpack(pieces, library, allocate)
    if library is not None:
        # The bodies are free when this returns.
        library.synchronize()
    return output


def _unpack(pieces: Sequence[tuple[Header, Any]], library: ArrayLibrary | None, allocate: Allocate) -> Any:
    shards: dict[Index, Any] = {}
    for header, body in pieces:
        ndim = len(header.input_id)
        if header.kind is not Kind.BRICK or header.segments.shape[1] != 2 * ndim:
            raise WireError(f"shards of an array were expected, got {header.kind!r}")
        there = body if library is None or isinstance(body, DeviceBody) else DeviceBody.of_host(library, body)
        elements = _elements(there, _element(header.extra)[1])
        offset = 0
        for segment in header.segments.tolist():
            shape = tuple(segment[ndim:])
            size = math.prod(shape)
            if tuple(segment[:ndim]) in shards:
                raise WireError(f"the shard at place {tuple(segment[:ndim])} is there twice")
            shards[tuple(segment[:ndim])] = elements[offset : offset + size].reshape(shape)
            offset += size
    ndim = len(next(iter(shards)))
    # The length of a place along an axis is the same in all shards that have it.
    lengths: list[dict[int, int]] = [{} for _ in range(ndim)]
    for place, shard in shards.items():
        for axis, (number, length) in enumerate(zip(place, shard.shape, strict=True)):
            if lengths[axis].setdefault(number, length) != length:
                raise WireError(
                    f"shards at place {number} of axis {axis} have lengths {lengths[axis][number]} and {length}"
                )
    if math.prod(map(len, lengths)) != len(shards):
        raise WireError(f"{math.prod(map(len, lengths))} shards were expected, got {len(shards)}")
    offsets = [
        dict(
            zip(sorted(axis), itertools.accumulate((axis[number] for number in sorted(axis)), initial=0), strict=False)
        )
        for axis in lengths
    ]
    extent = [sum(axis.values()) for axis in lengths]
    dtype = shards[min(shards)].dtype
    nbytes = math.prod(extent) * dtype.itemsize
    output = _elements(_new(library, nbytes, allocate), dtype).reshape(extent)
    for place, shard in shards.items():
        where = tuple(
            slice(offsets[axis][number], offsets[axis][number] + length)
            for axis, (number, length) in enumerate(zip(place, shard.shape, strict=True))
        )
        output[where] = shard
    return output


def _new(library: ArrayLibrary | None, nbytes: int, allocate: Allocate) -> Any:
    return allocate(nbytes) if library is None else DeviceBody(library, library.empty(nbytes))


def _elements(body: Any, dtype: np.dtype[Any]) -> Any:
    """View a body as the elements that it holds."""
    if isinstance(body, DeviceBody):
        return body.array.view(dtype)
    view = memoryview(body)
    return np.frombuffer(view, dtype) if view.nbytes else np.empty(0, dtype)


def _bytes_of(body: Any) -> Any:
    """View a body as bytes that can be sliced."""
    if isinstance(body, DeviceBody):
        return body.array
    view = memoryview(body)
    # A view with a zero in its shape cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
