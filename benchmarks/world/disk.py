"""Disks of the simulated world: real files, through calls that fill, fail, take their time, and change bits.

Covers: :class:`Disk`, which takes the place of the module ``os`` in :mod:`dask_gpurt.memory.files`.
Does not cover: opening, renaming, removing, which always succeed; what the page cache holds when a machine loses its power.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.world.machine import HOST, VirtualLoop

__all__ = ["Disk", "DiskFaults"]

#: Seconds that a call takes in the mean, and bytes per second.
CALL_S = 0.0005
BANDWIDTH = 2e8


@dataclass
class DiskFaults:
    """What is wrong with the disk of one host."""

    #: Writes find it full.
    full: bool = False
    #: Part of the calls that fail (EIO), and of the writes of which one bit changes.
    errors: float = 0.0
    flips: float = 0.0
    #: How many times as long it takes.
    slowness: float = 1.0


class Disk:
    """The calls of the module ``os`` that files are read and written by.

    Attributes
    ----------
    faults
        By name of a host.
    counts
        What was injected, how often.
    """

    def __init__(self, loop: VirtualLoop, random: Any) -> None:
        self._loop = loop
        self._random = random
        self.faults: dict[str, DiskFaults] = {}
        self.counts = {"full": 0, "error": 0, "flip": 0}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _begin(self, nbytes: int) -> DiskFaults:
        host = HOST.get()
        faults = DiskFaults() if host is None else self.faults.get(host.name, DiskFaults())
        if self._loop.threads.current is not None:
            mean_s = (CALL_S + nbytes / BANDWIDTH) * faults.slowness
            self._loop.threads.wait(None, self._random.expovariate(1 / mean_s))
        if faults.errors and self._random.random() < faults.errors:
            self.counts["error"] += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return faults

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Write as the system does, unless the disk is at fault."""
        faults = self._begin(sum(memoryview(piece).nbytes for piece in buffers))
        if faults.full:
            self.counts["full"] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if faults.flips and self._random.random() < faults.flips:
            self.counts["flip"] += 1
            data = bytearray(b"".join(bytes(piece) for piece in buffers))
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            buffers = [data]
        return os.pwritev(fd, buffers, offset)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Read as the system does, unless the disk is at fault."""
        self._begin(sum(memoryview(piece).nbytes for piece in buffers))
        return os.preadv(fd, buffers, offset)
