"""Frames in a file, past the page cache where that pays.

Theory of operation
-------------------
The page cache copies every byte, takes a page of memory for each 4 KiB, and writes all of it to the disk in the end. What
is spilled is read once, much later, and then removed. So it goes straight to the disk (``O_DIRECT``), which takes a
tenth of the processor's time, and leaves the cache to those who need it. The kernel wants file offsets, lengths and addresses
that are multiples of a block for that. *Large* frames are written from where they lie: in the file they begin as far into a
page as in memory, so that what are whole pages there are whole pages here; only the pages in which they begin and end
go by way of a *stage*, a buffer of the thread. The others are gathered there.

In the file each large frame, and each run of others, is a *segment* that begins at a page; within a run frames begin at
multiples of 64 bytes, as arrays like it. A segment is read into a lease of its own, where its frames stay.

Covers: layout, reading, writing.
Does not cover: names, checksums and errors (:mod:`dask_gpurt.memory.disk`).

The functions block, and let other threads run meanwhile. They raise OSError as the system does.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LARGE_NBYTES", "PAGE_NBYTES", "Layout", "layout_of", "read", "write"]

#: What O_DIRECT takes on all that is in use: disks have blocks of 512 or 4096 bytes.
PAGE_NBYTES = 4096
#: A frame that is at least as large is a segment by itself.
LARGE_NBYTES = 2**20
_FRAME_ALIGNMENT = 64
#: Large enough for the speed of the disk, small enough that what is gathered is still in a cache when it is written.
_STAGE_NBYTES = 4 * 2**20

Bytes = npt.NDArray[np.uint8]


def _up(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step


class Layout:
    """Where frames lie in a file.

    Parameters
    ----------
    lengths
        Bytes of the frames, in order.
    skews
        How far into a page each of them begins in memory; counts for large ones only. None: they begin at pages.

    Examples
    --------
    >>> layout = Layout([100, 10, 2**20, 5])
    >>> layout.offsets, layout.nbytes
    ((0, 128, 4096, 1052672), 1052677)
    >>> Layout([100, 2**20], [32, 16]).offsets
    (0, 4112)
    """

    __slots__ = ("lengths", "nbytes", "offsets", "segments")

    def __init__(self, lengths: Sequence[int], skews: Sequence[int] | None = None) -> None:
        self.lengths = tuple(lengths)
        offsets: list[int] = []
        #: (first frame, one after the last) of each segment.
        segments: list[tuple[int, int]] = []
        end = 0
        apart = True
        for number, length in enumerate(self.lengths):
            large = length >= LARGE_NBYTES
            if large or apart:
                end = _up(end, PAGE_NBYTES)
                segments.append((number, number + 1))
            else:
                end = _up(end, _FRAME_ALIGNMENT)
                segments[-1] = (segments[-1][0], number + 1)
            if large and skews is not None:
                end += skews[number]
            apart = large
            offsets.append(end)
            end += length
        self.offsets = tuple(offsets)
        self.segments = tuple(segments)
        #: Size of the file.
        self.nbytes = end


def layout_of(frames: Sequence[memoryview]) -> Layout:
    """Lay out ``frames`` such that they can be written from where they lie."""
    return Layout([frame.nbytes for frame in frames], [_address(frame) % PAGE_NBYTES for frame in frames])


class _Stage(threading.local):
    """A page-aligned buffer for each thread."""

    def __init__(self) -> None:
        self.memory: Bytes = np.frombuffer(mmap.mmap(-1, _STAGE_NBYTES), dtype=np.uint8)


_stage = _Stage()


def write(fd: int, frames: Sequence[Any], layout: Layout) -> None:
    """Write ``frames`` to the open file ``fd``, and make it as long as ``layout`` says. It may be longer before."""
    stage = _stage.memory
    begin = fill = 0

    def flush() -> None:
        nonlocal begin, fill
        _write_all(fd, [stage[: _up(fill, PAGE_NBYTES)]], begin)
        begin += _up(fill, PAGE_NBYTES)
        fill = 0

    for frame, offset in zip(frames, layout.offsets, strict=True):
        data: Bytes = np.frombuffer(frame, dtype=np.uint8) if frame.nbytes else np.empty(0, dtype=np.uint8)
        large = data.nbytes >= LARGE_NBYTES
        if large or offset >= begin + _up(fill, PAGE_NBYTES):
            # A new segment. The rest of the page before is whatever the stage had there, zeros or other frames of ours.
            if fill:
                flush()
            begin = offset - offset % PAGE_NBYTES
            if large and (offset - _address(data.data)) % PAGE_NBYTES == 0:
                _write_all(fd, _pages(data, stage), begin)
                continue
        fill = offset - begin
        while data.nbytes:
            count = min(data.nbytes, stage.nbytes - fill)
            np.copyto(stage[fill : fill + count], data[:count])
            fill, data = fill + count, data[count:]
            if fill == stage.nbytes:
                flush()
    if fill:
        flush()
    os.ftruncate(fd, layout.nbytes)


def read(fd: int, layout: Layout, lease: Callable[[int], memoryview], *, direct: bool) -> list[memoryview] | None:
    """Read the frames from the open file ``fd``; None if it ends early.

    Parameters
    ----------
    fd, layout
        The file, and where the frames are in it.
    lease
        Lends memory.
    direct
        Whether the file was opened with ``O_DIRECT``.
    """
    frames: list[memoryview] = []
    for first, last in layout.segments:
        begin = layout.offsets[first] - layout.offsets[first] % PAGE_NBYTES
        nbytes = layout.offsets[last - 1] + layout.lengths[last - 1] - begin
        segment = _lease_pages(_up(nbytes, PAGE_NBYTES), lease) if direct else lease(nbytes)
        done = 0
        while done < nbytes:
            # A direct read that was cut short goes on at the page in which it ended.
            at = done - done % PAGE_NBYTES if direct else done
            count = os.preadv(fd, [segment[at:]], begin + at)
            if at + count <= done:
                return None
            done = at + count
        for offset, length in zip(layout.offsets[first:last], layout.lengths[first:last], strict=True):
            frames.append(segment[offset - begin : offset - begin + length])
    return frames


def _lease_pages(nbytes: int, lease: Callable[[int], memoryview]) -> memoryview:
    """Lease memory that begins at a page."""
    segment = lease(nbytes)
    if _address(segment) % PAGE_NBYTES == 0:
        return segment
    # A small one, from the allocator.
    segment = memoryview(bytearray(nbytes + PAGE_NBYTES))
    begin = -_address(segment) % PAGE_NBYTES
    return segment[begin : begin + nbytes]


def _address(view: memoryview) -> int:
    address: int = np.frombuffer(view, dtype=np.uint8).__array_interface__["data"][0] if view.nbytes else 0
    return address


def _pages(data: Bytes, stage: Bytes) -> list[Bytes]:
    """Return the pages that ``data`` lies in: those at its ends by way of the stage, the others as they are."""
    head = min(-_address(data.data) % PAGE_NBYTES, data.nbytes)
    tail = (data.nbytes - head) % PAGE_NBYTES
    pages = []
    if head:
        np.copyto(stage[PAGE_NBYTES - head : PAGE_NBYTES], data[:head])
        pages.append(stage[:PAGE_NBYTES])
    pages.append(data[head : data.nbytes - tail])
    if tail:
        np.copyto(stage[PAGE_NBYTES : PAGE_NBYTES + tail], data[data.nbytes - tail :])
        pages.append(stage[PAGE_NBYTES : 2 * PAGE_NBYTES])
    return pages


def _write_all(fd: int, pages: Sequence[Bytes], offset: int) -> None:
    left = list(pages)
    while left:
        count = os.pwritev(fd, [piece.data for piece in left], offset) // PAGE_NBYTES * PAGE_NBYTES
        if not count:
            # The disk has taken less than a page: there is no room for more.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        offset += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if count:
            left[0] = left[0][count:]
