"""Compressed buffers: how they are made, what is told of them, and how they are read without trusting where they were.

Covers: :func:`compress`, :func:`decompress`, :func:`sample`, and :class:`Packed`, which goes with each compressed buffer.
All functions are called in threads, and give up the GIL while they compress.
Does not cover: whether to compress (:mod:`dask_gpurt.compression`).

Theory of operation
    Buffers are compressed one by one, by the codecs of pyarrow's wheel: LZ4, and Zstandard at its fastest level. One
    that is small, or does not become smaller by a tenth, stays as it is. With a compressed buffer go its number in the
    message, the codec, the raw size, and a checksum of the compressed bytes, for neither codec notices all damage.

    Who decompresses has memory for the raw sizes, and decompresses right into it. So a size that is not true is a
    :class:`CodecError`, whatever the stream would have grown to.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from dask_gpurt.compression import Figures
from dask_gpurt.errors import GpurtError
from dask_gpurt.memory.store import Buffer

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "CODECS",
    "MIN_NBYTES",
    "RAW_NBYTES_MAX",
    "SAMPLE_NBYTES",
    "CodecError",
    "Compressed",
    "Packed",
    "available",
    "compress",
    "compressible",
    "decompress",
    "plain",
    "sample",
]

#: Codec to its level; None: it has none. Both find out where a stream ends by themselves.
CODECS: dict[str, int | None] = {"lz4": None, "zstd": 1}
#: Smaller buffers, headers among them, stay as they are.
MIN_NBYTES = 16 * 2**10
#: Larger buffers stay as they are too: beside them another one of their size would have to be held.
RAW_NBYTES_MAX = 2**30
#: Bytes of a message that are tried, in pieces from all over it, each as large as what LZ4 looks back at a time.
SAMPLE_NBYTES, _PIECES = 64 * 2**10, 8
#: What does not become smaller than this stays as it is.
_RATIO_MAX = 0.9


class CodecError(GpurtError, ValueError):
    """A compressed buffer was damaged, or is not what was told of it."""


@dataclass(frozen=True)
class Packed:
    """What goes with a compressed buffer.

    Parameters
    ----------
    number
        Which buffer of the message.
    codec
        What it was compressed by.
    nbytes
        Its raw size.
    digest
        XXH3 of the compressed bytes.
    """

    number: int
    codec: str
    nbytes: int
    digest: int


@dataclass(frozen=True)
class Compressed:
    """A message some of whose buffers are compressed.

    Parameters
    ----------
    buffers
        As they are sent; those in the memory of a device never are compressed.
    packed
        One for each compressed buffer.
    raw_nbytes, wire_nbytes
        Of the compressed buffers, before and after.
    elapsed_s
        What that took by the clock.
    """

    buffers: list[Any]
    packed: list[Packed]
    raw_nbytes: int
    wire_nbytes: int
    elapsed_s: float


def plain(buffers: Sequence[Any]) -> Compressed:
    """Return a message as it is."""
    return Compressed(list(buffers), [], 0, 0, 0.0)


def available() -> bool:
    """Whether there are codecs: arrays are shuffled without pyarrow, too."""
    return importlib.util.find_spec("pyarrow") is not None


def _codec(name: str) -> pa.Codec:
    import pyarrow as pa

    return pa.Codec(name, compression_level=CODECS[name])


def compressible(buffer: object) -> bool:
    """Whether it lies in host memory, and is of a size that is compressed."""
    return (
        isinstance(buffer, bytes | bytearray | memoryview) and MIN_NBYTES <= memoryview(buffer).nbytes <= RAW_NBYTES_MAX
    )


def sample(buffers: Sequence[Buffer]) -> tuple[dict[str, Figures], float]:
    """Try all codecs on a small part of a message; returns what they made of it, and the processor time that took."""
    codecs = {name: _codec(name) for name in CODECS}
    started = time.thread_time()
    views = [memoryview(buffer).cast("B") for buffer in buffers if compressible(buffer)]
    total = sum(view.nbytes for view in views)
    if not total:
        return {}, time.thread_time() - started
    # Pieces that overlap would be found to be alike.
    piece = min(SAMPLE_NBYTES, total) // _PIECES
    # Evenly spread over all of it, as if the buffers lay one behind the other.
    starts = [total * number // _PIECES for number in range(_PIECES)]
    pieces, begin = [], 0
    for view in views:
        pieces += [
            view[start - begin : start - begin + piece] for start in starts if begin <= start < begin + view.nbytes
        ]
        begin += view.nbytes
    data = b"".join(pieces)
    figures = {}
    for name, codec in codecs.items():
        # The first time costs several times as much, for memory of its own.
        codec.decompress(codec.compress(data[:piece]), decompressed_size=piece)
        begun = time.thread_time()
        packed = codec.compress(data)
        packed_by = time.thread_time()
        codec.decompress(packed, decompressed_size=len(data))
        figures[name] = Figures(
            ratio=packed.size / len(data),
            compress_speed=len(data) / max(packed_by - begun, 1e-9),
            decompress_speed=len(data) / max(time.thread_time() - packed_by, 1e-9),
        )
    return figures, time.thread_time() - started


def compress(buffers: Sequence[Buffer], name: str) -> Compressed:
    """Compress those buffers of a message that become smaller by it."""
    started_s = time.perf_counter()
    codec = _codec(name)
    message = list(buffers)
    packed = []
    raw_nbytes = wire_nbytes = 0
    for number, buffer in enumerate(buffers):
        if not compressible(buffer):
            continue
        nbytes = memoryview(buffer).nbytes
        # A slice, because the buffer itself goes on to tell the shape that it had before it was cut to its size.
        small = memoryview(codec.compress(buffer).slice())
        if small.nbytes > _RATIO_MAX * nbytes:
            continue
        packed.append(Packed(number, name, nbytes, xxhash.xxh3_64_intdigest(small)))
        message[number] = small
        raw_nbytes += nbytes
        wire_nbytes += small.nbytes
    return Compressed(message, packed, raw_nbytes, wire_nbytes, max(time.perf_counter() - started_s, 1e-9))


def decompress(
    buffers: Sequence[Buffer], packed: Sequence[Packed], allocate: Callable[[int], memoryview]
) -> list[Buffer]:
    """Give the raw buffers of a message. ``allocate`` lends the memory of those that were compressed.

    Raises
    ------
    CodecError
        If a buffer was damaged, or is not of the size that was told.
    """
    import pyarrow as pa

    message = list(buffers)
    for each in packed:
        wire: Any = message[each.number]
        if xxhash.xxh3_64_intdigest(wire) != each.digest:
            raise CodecError(f"buffer {each.number} of a message was damaged on its way: its checksum is another one")
        raw = allocate(each.nbytes)
        try:
            with pa.CompressedInputStream(pa.BufferReader(pa.py_buffer(wire)), each.codec) as stream:
                found_nbytes = stream.readinto(raw)
                more = stream.read(1) if found_nbytes == each.nbytes else b""
        except OSError as error:
            # Arrow's way to say that it is no such stream. As an OSError it would be taken for a broken connection.
            raise CodecError(f"buffer {each.number} of a message cannot be decompressed: {error}") from error
        if found_nbytes != each.nbytes or more:
            raise CodecError(
                f"buffer {each.number} of a message has {'more than ' if more else ''}{found_nbytes} bytes, "
                f"{each.nbytes} were announced"
            )
        message[each.number] = raw
    return message
