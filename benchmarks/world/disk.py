"""Disks of the simulated world: real files, through calls that fill, fail, take their time, and change bits.

Covers: :class:`Disk`, which takes the place of the module ``os`` in :mod:`dask_gpurt.memory.files`, and of ``open`` where Dask spills
and shuffles by itself.
Does not cover: opening, renaming, removing, which always succeed; what the page cache holds when a machine loses its power; the time
that the disk takes from Dask's event loop, on which it writes its files.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import distributed.shuffle._disk
import zict.file

from benchmarks.world.machine import HOST, VirtualLoop
from dask_gpurt.memory import files

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

    def _written(self, buffers: Sequence[Any]) -> Sequence[Any]:
        """Return what is written when this is to be."""
        faults = self._begin(sum(memoryview(piece).nbytes for piece in buffers))
        if faults.full:
            self.counts["full"] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if faults.flips and self._random.random() < faults.flips:
            self.counts["flip"] += 1
            data = bytearray(b"".join(bytes(piece) for piece in buffers))
            data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)
            return [data]
        return buffers

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Write as the system does, unless the disk is at fault."""
        return os.pwritev(fd, self._written(buffers), offset)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Read as the system does, unless the disk is at fault."""
        self._begin(sum(memoryview(piece).nbytes for piece in buffers))
        return os.preadv(fd, buffers, offset)

    def open(self, path: Any, mode: str) -> _File:
        """Open a file as Dask does."""
        return _File(self, path, mode)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Be the disk of all that reads and writes."""
        stock_read = distributed.shuffle._disk.DiskShardsBuffer.read

        def read(buffer: Any, id: str) -> Any:  # noqa: A002  stock's signature
            # These files are mapped, or read by others.
            self._begin(0)
            return stock_read(buffer, id)

        modules: list[Any] = [zict.file, distributed.shuffle._disk]
        ours: Any = files
        shards: Any = distributed.shuffle._disk.DiskShardsBuffer
        ours.os, shards.read = self, read
        for module in modules:
            module.open = self.open
        try:
            yield
        finally:
            ours.os, shards.read = os, stock_read
            for module in modules:
                del module.open


class _File:
    """A file as Dask writes and reads it."""

    def __init__(self, disk: Disk, path: Any, mode: str) -> None:
        self._disk = disk
        # Where it fails to be written, that is seen by who writes, and not when the rest of it is closed.
        self._file: Any = open(path, mode, buffering=0)  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        return int(self._file.fileno())

    def write(self, piece: Any) -> None:
        self.writelines([piece])

    def writelines(self, pieces: Iterable[Any]) -> None:
        for piece in self._disk._written(list(pieces)):
            self._file.write(piece)

    def readinto(self, buffer: Any) -> int:
        self._disk._begin(memoryview(buffer).nbytes)
        return int(self._file.readinto(buffer))
