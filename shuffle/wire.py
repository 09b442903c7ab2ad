"""The header that goes before every body of shards, on the wire and in the store, and what is said of a message.

Covers: encoding and decoding of :class:`Header`; what a peer says of a message beside it. Decoding checks every length against the buffer and against limits;
nothing that a peer can put into a header makes it allocate more than the header's own size.
Does not cover: what the segments and the body mean; see :mod:`dask_gpurt.shuffle.frames` and
:mod:`dask_gpurt.shuffle.bricks`. Bodies are never pickled.

Layout, little endian: magic (4 bytes), version (1), kind (1), dimensions of the input id (2), bytes of ``extra`` (4),
columns of a segment (4), segments (8), bytes of the body (8); then the input id (8 each), the segments (8 an entry, row
by row), and ``extra``.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dask_gpurt import codecs
from dask_gpurt.codecs import Packed
from dask_gpurt.errors import GpurtError
from dask_gpurt.memory.store import Buffer, DeviceBuffer, buffer_nbytes

__all__ = [
    "MAX_COLUMNS",
    "MAX_EXTRA_NBYTES",
    "MAX_NDIM",
    "MAX_SEGMENTS",
    "MESSAGE_NBYTES_MAX",
    "Header",
    "Kind",
    "NotHeldError",
    "WireError",
    "check_epoch",
    "check_nbytes",
    "check_sizes",
    "decode",
    "encode",
    "input_id",
    "pack_list",
]

_MAGIC = b"GPSH"
_VERSION = 1
_PREFIX = struct.Struct("<4sBBHIIQQ")

#: Dimensions of an input id; what NumPy allows an array.
MAX_NDIM = 64
#: Columns of a segment: three numbers a dimension.
MAX_COLUMNS = 3 * MAX_NDIM
#: Segments of one body. Dask runs out of tasks long before that many output partitions.
MAX_SEGMENTS = 2**24
#: Bytes of a message: far more than a worker has memory for, and far less than what makes a number overflow.
MESSAGE_NBYTES_MAX = 2**42
#: Repairs of a run: a worker is lost in each.
EPOCH_MAX = 2**20
#: Bytes of ``extra``, which holds the description of a dtype.
MAX_EXTRA_NBYTES = 2**16


class WireError(GpurtError, ValueError):
    """A header or a body is not what its format says."""


class NotHeldError(WireError):
    """A shard is for an output partition that another worker makes."""


class Kind(enum.IntEnum):
    """What the body holds."""

    #: An Arrow IPC stream.
    FRAME = 1
    #: Raw array elements.
    BRICK = 2
    #: A table on a device, as its library packs it.
    TABLE = 3


@dataclass(frozen=True, eq=False)
class Header:
    """What is known about a body without reading it.

    Parameters
    ----------
    kind
        What the body holds.
    input_id
        Input partition that the body was made of; in the store: the output partition that it is for.
    segments
        One row of integers for each shard in the body, in their order.
    body_nbytes
        Size of the body.
    extra
        More about the body.
    """

    kind: Kind
    input_id: tuple[int, ...]
    segments: npt.NDArray[np.int64]
    body_nbytes: int
    extra: bytes = b""


def encode(header: Header) -> bytes:
    """Encode a header.

    Raises
    ------
    WireError
        If the header exceeds a limit of the format.
    """
    rows, columns = header.segments.shape
    if (
        len(header.input_id) > MAX_NDIM
        or columns > MAX_COLUMNS
        or rows > MAX_SEGMENTS
        or len(header.extra) > MAX_EXTRA_NBYTES
    ):
        raise WireError(
            f"a header with {len(header.input_id)} dimensions, {rows} segments of {columns} numbers and "
            f"{len(header.extra)} bytes of extra exceeds the limits of the format"
        )
    prefix = _PREFIX.pack(
        _MAGIC,
        _VERSION,
        header.kind,
        len(header.input_id),
        len(header.extra),
        columns,
        rows,
        header.body_nbytes,
    )
    numbers = struct.pack(f"<{len(header.input_id)}q", *header.input_id)
    return b"".join((prefix, numbers, header.segments.astype("<i8", copy=False).tobytes(), header.extra))


def decode(buffer: Buffer, body: Buffer | DeviceBuffer) -> Header:
    """Decode the header in ``buffer``, and check it against the size of ``body``.

    Raises
    ------
    WireError
        If it is not a header, or not one of this body.
    """
    view = memoryview(buffer)
    if view.nbytes < _PREFIX.size:
        raise WireError(f"a header has at least {_PREFIX.size} bytes, got {view.nbytes}")
    view = view.cast("B")
    magic, version, kind, ndim, extra_nbytes, columns, rows, body_nbytes = _PREFIX.unpack_from(view)
    if magic != _MAGIC:
        raise WireError(f"this is not a header of shards: it begins with {magic!r}")
    if version != _VERSION:
        raise WireError(f"version {version} of the format is not known here; this is version {_VERSION}")
    if kind not in set(Kind):
        raise WireError(f"bodies of kind {kind} are not known here")
    if ndim > MAX_NDIM or columns > MAX_COLUMNS or rows > MAX_SEGMENTS or extra_nbytes > MAX_EXTRA_NBYTES:
        raise WireError(
            f"{ndim} dimensions, {rows} segments of {columns} numbers, {extra_nbytes} bytes: over the limits"
        )
    ids_end = _PREFIX.size + 8 * ndim
    segments_end = ids_end + 8 * columns * rows
    if len(view) != segments_end + extra_nbytes:
        raise WireError(f"the header says it has {segments_end + extra_nbytes} bytes, and has {len(view)}")
    found_nbytes = buffer_nbytes(body)
    if found_nbytes != body_nbytes:
        raise WireError(f"the header says the body has {body_nbytes} bytes, and it has {found_nbytes}")
    input_id = struct.unpack_from(f"<{ndim}q", view, _PREFIX.size)
    # Copied: a view would keep the message alive, and may not be aligned.
    segments = np.frombuffer(bytes(view[ids_end:segments_end]), dtype="<i8").astype(np.int64, copy=False)
    if segments.size and int(segments.min()) < 0:
        raise WireError("a segment has a negative number")
    return Header(Kind(kind), input_id, segments.reshape(rows, columns), body_nbytes, bytes(view[segments_end:]))


def input_id(buffer: Buffer) -> tuple[int, ...]:
    """Read the input id of an encoded header of our own.

    Examples
    --------
    >>> input_id(encode(Header(Kind.BRICK, (3, 4), np.zeros((1, 6), np.int64), 0)))
    (3, 4)
    """
    ndim = _PREFIX.unpack_from(buffer)[3]
    return struct.unpack_from(f"<{ndim}q", buffer, _PREFIX.size)


def check_nbytes(nbytes: object) -> int:
    """Check what a peer says is the size of a message, and return it.

    Raises
    ------
    WireError
        If no message has that size.
    """
    if type(nbytes) is not int or not 0 <= nbytes <= MESSAGE_NBYTES_MAX:
        raise WireError(f"a message has no {nbytes!r:.40} bytes")
    return nbytes


def check_epoch(epoch: object) -> None:
    """Check what a peer says is the number of repairs that it knows of.

    Raises
    ------
    WireError
        If that cannot be so.
    """
    if type(epoch) is not int or not 0 <= epoch <= EPOCH_MAX:
        raise WireError(f"a run is not repaired {epoch!r:.40} times")


def check_sizes(sizes: object, libraries: object, buffers: int) -> None:
    """Check what a peer says of a message of so many ``buffers``: the sizes of those to come, and whose memory they are.

    Raises
    ------
    WireError
        If that cannot be so.
    """
    if not isinstance(sizes, list | tuple) or len(sizes) != buffers:
        raise WireError(f"the sizes of {buffers} buffers were expected")
    if any(type(nbytes) is not int or nbytes < 0 for nbytes in sizes):
        raise WireError("a size that was announced is none")
    check_nbytes(sum(sizes))
    if libraries is None:
        return
    if not isinstance(libraries, list | tuple) or [type(name) for name in libraries] != [str] * buffers:
        raise WireError(f"the libraries of {buffers} buffers were expected")


def pack_list(message: object, buffers: int) -> list[Packed]:
    """Read what a peer says about its compressed buffers, of so many ``buffers``.

    Raises
    ------
    WireError
        If that cannot be so.
    """
    if not isinstance(message, list | tuple):
        raise WireError(f"a list of compressed buffers was expected, got {type(message).__name__}")
    packed = []
    for entry in message:
        if not isinstance(entry, list | tuple) or [type(item) for item in entry] != [int, str, int, int]:
            raise WireError(f"this does not describe a compressed buffer: {str(entry)[:100]}")
        number, codec, nbytes, digest = entry
        if codec not in codecs.CODECS:
            raise WireError(f"buffers compressed by {codec[:20]!r} are not known here")
        if not 0 <= number < buffers or not codecs.MIN_NBYTES <= nbytes <= codecs.RAW_NBYTES_MAX:
            raise WireError(f"buffer {number} of {buffers}, of {nbytes} bytes, cannot be a compressed one")
        packed.append(Packed(number, codec, nbytes, digest))
    if len({each.number for each in packed}) != len(packed):
        raise WireError("a buffer is described as compressed twice")
    return packed
