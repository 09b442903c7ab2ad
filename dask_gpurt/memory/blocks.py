"""Blocks of host memory that are used again.

Theory of operation
-------------------
Fresh memory is slow: the kernel zeroes and maps each page at its first touch, which costs more than reading the file
that is to go there. So what is read back goes into *slabs* that were used before. A slab is leased as a memoryview;
when the last array that lies in it is gone, it returns by itself and waits to be leased again. What waits is bounded:
beyond that, slabs go back to the system. What has waited in vain for a while goes back too (:meth:`BlockPool.decay`).

Sizes are rounded up in steps of an eighth, so that a slab fits again when sizes vary a little, at most 12.5 % is
wasted, and pages that a value does not reach are never touched. Slabs begin at a page, as O_DIRECT and Arrow like it;
large ones at a huge page, which the kernel is asked for: memory that is touched for the first time is then three to five
times as fast as with small pages.

Where there is a GPU, slabs for what goes to it and comes from it are page-locked (:class:`~dask_gpurt.memory.cuda.Pinner`). That
takes longer than any copy, so that to use a slab again is worth all the more: it stays locked until it goes back to the system.

Covers: reuse, and its bound.
Does not cover: how much may be in use, see :mod:`dask_gpurt.memory.ledger`.

Thread-safe. A slab may return at any moment, also from within a garbage collection while the pool is at work: returning
takes no lock.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from typing import NamedTuple, Protocol

import numpy as np

__all__ = ["BlockPool", "Pins", "size_class"]

#: Smaller leases are not worth a slab: the allocator keeps pages of that size itself.
SLAB_NBYTES_MIN = 128 * 2**10
#: Size of a huge page, on x86 and most of ARM. Where it is another one, memory is only slower at first.
HUGE_PAGE_NBYTES = 2 * 2**20


class Pins(Protocol):
    """Page-locks memory."""

    def pin(self, memory: mmap.mmap, offset: int, nbytes: int) -> object | None:
        """Lock it until what is returned is no more; None: it stays pageable."""


class _Slab(NamedTuple):
    memory: mmap.mmap
    #: Where in ``memory`` it begins.
    offset: int
    nbytes: int
    #: Keeps it page-locked, if it is.
    pinned: object | None


def _new_slab(nbytes: int, pins: Pins | None = None) -> _Slab:
    memory, offset = _map(nbytes)
    return _Slab(memory, offset, nbytes, None if pins is None else pins.pin(memory, offset, nbytes))


def _map(nbytes: int) -> tuple[mmap.mmap, int]:
    """Map memory that ``nbytes`` fit into from the offset on that is returned with it."""
    # Of the process alone: memory that may be shared is zeroed page by page, and has no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if nbytes < HUGE_PAGE_NBYTES:
        return mmap.mmap(-1, nbytes, flags=flags), 0
    # What lies before the beginning is never touched, and takes no memory.
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_NBYTES, flags=flags)
    with contextlib.suppress(OSError):
        # A kernel without them refuses.
        memory.madvise(mmap.MADV_HUGEPAGE)
    address: int = np.frombuffer(memory, dtype=np.uint8, count=1).__array_interface__["data"][0]
    return memory, -address % HUGE_PAGE_NBYTES


def size_class(nbytes: int) -> int:
    """Round up to whole pages in steps of an eighth.

    Examples
    --------
    >>> size_class(2**20), size_class(2**20 + 1)
    (1048576, 1179648)
    """
    step = max(mmap.PAGESIZE, 1 << max(0, (nbytes - 1).bit_length() - 4))
    return -(-nbytes // step) * step


class BlockPool:
    """Lends writable memory.

    Parameters
    ----------
    idle_limit_nbytes
        Bytes of slabs that may wait for their next use.
    pins
        Page-locks slabs; None: they are pageable.

    Examples
    --------
    >>> pool = BlockPool(2**20)
    >>> lease = pool.lease(2**20)
    >>> lease.nbytes, pool.idle_nbytes
    (1048576, 0)
    >>> del lease
    >>> pool.idle_nbytes
    1048576
    """

    def __init__(self, idle_limit_nbytes: int, pins: Pins | None = None) -> None:
        self.idle_limit_nbytes = idle_limit_nbytes
        self._pins = pins
        #: Leases that were served from a slab that was used before, and those that were not.
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._returned: deque[_Slab] = deque()
        self._idle: dict[int, list[_Slab]] = {}
        self._idle_nbytes = 0
        #: The least that was idle since the last decay.
        self._spare_nbytes = 0

    @property
    def idle_nbytes(self) -> int:
        """Bytes of slabs that wait for their next use."""
        with self._lock:
            self._sort()
            return self._idle_nbytes

    def lease(self, nbytes: int) -> memoryview:
        """Lend ``nbytes`` of memory with any content, for as long as somebody refers to the view."""
        if nbytes < SLAB_NBYTES_MIN:
            return memoryview(bytearray(nbytes))
        size = size_class(nbytes)
        with self._lock:
            self._sort()
            idle = self._idle.get(size)
            slab = idle.pop() if idle else None
            if slab is None:
                self.misses += 1
            else:
                self.hits += 1
                self._idle_nbytes -= size
                self._spare_nbytes = min(self._spare_nbytes, self._idle_nbytes)
        if slab is None:
            slab = _new_slab(size, self._pins)
        array = np.frombuffer(slab.memory, dtype=np.uint8, count=nbytes, offset=slab.offset)
        # Whatever is made of the view refers to the array; the slab outlives it.
        weakref.finalize(array, self._returned.append, slab).atexit = False
        view: memoryview = array.data
        return view

    def set_idle_limit(self, nbytes: int) -> None:
        """Let so many bytes wait for their next use from now on, and give back what is more."""
        with self._lock:
            self._sort()
            self.idle_limit_nbytes = nbytes
            for size in sorted(self._idle, reverse=True):
                while self._idle_nbytes > nbytes and self._idle[size]:
                    self._idle[size].pop()
                    self._idle_nbytes -= size
            self._spare_nbytes = min(self._spare_nbytes, self._idle_nbytes)

    def trim(self) -> None:
        """Give all idle slabs back to the system."""
        with self._lock:
            self._sort()
            self._idle.clear()
            self._idle_nbytes = self._spare_nbytes = 0

    def decay(self) -> None:
        """Give back what was not needed since the last call."""
        with self._lock:
            self._sort()
            for size in sorted(self._idle, reverse=True):
                slabs = self._idle[size]
                while slabs and size <= self._spare_nbytes:
                    slabs.pop()
                    self._spare_nbytes -= size
                    self._idle_nbytes -= size
                if not slabs:
                    del self._idle[size]
            self._spare_nbytes = self._idle_nbytes

    def _sort(self) -> None:
        while self._returned:
            slab = self._returned.popleft()
            if self._idle_nbytes + slab.nbytes <= self.idle_limit_nbytes:
                self._idle.setdefault(slab.nbytes, []).append(slab)
                self._idle_nbytes += slab.nbytes
