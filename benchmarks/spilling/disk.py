"""The files that spilled data goes to, beside the bare disk.

Theory of operation
-------------------
Ours is the store of the DISK tier (:class:`~dask_gpurt.memory.disk.SpillFolder`), with its checksums, its files that are
written over, and the pool it reads into. The peer writes and reads as many bytes of files of the same size past the page
cache (O_DIRECT), each by one call, from and to memory of such a pool, which has huge pages; nothing is checked. Both have as
many threads as the mover has, and files that are there already.

Covers: :func:`file_store`.
Does not cover: serialization; see :mod:`benchmarks.spilling.clusters`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import dask
import numpy as np

from benchmarks.frame import turns
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.disk import DiskCopy, SpillFolder

__all__ = ["Rates", "file_store"]

#: As the mover has.
THREADS = 2

VALUE_NBYTES = 32 * 2**20


@dataclass(frozen=True)
class Rates:
    """Bytes per second, of each round."""

    ours: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)

    def add(self, is_ours: bool, rate: float) -> None:
        """Add a round."""
        (self.ours if is_ours else self.raw).append(rate)


class _OurFiles:
    def __init__(self, folder: SpillFolder, count: int) -> None:
        self._folder = folder
        self._values = [np.random.default_rng(number).random(VALUE_NBYTES // 8) for number in range(count)]
        self._copies: list[DiskCopy] = []

    def write(self) -> Sequence[Callable[[], object]]:
        """Return what writes them, over the files of before."""
        for copy in self._copies:
            copy.remove()
        self._copies = []
        return [functools.partial(self._write, value) for value in self._values]

    def _write(self, value: np.ndarray) -> None:
        self._copies.append(self._folder.write([value.data]))

    def read(self) -> Sequence[Callable[[], object]]:
        """Return what reads them."""
        return [copy.read for copy in self._copies]


class _RawFiles:
    def __init__(self, folder: str, pool: BlockPool, count: int) -> None:
        self._paths = [os.path.join(folder, f"raw-{number}") for number in range(count)]
        self._memory = [pool.lease(VALUE_NBYTES) for _ in self._paths]
        for memory in self._memory:
            memory[:] = os.urandom(2**20) * (VALUE_NBYTES // 2**20)

    def write(self) -> Sequence[Callable[[], object]]:
        return [functools.partial(self._move, *each, os.O_WRONLY) for each in self._each()]

    def read(self) -> Sequence[Callable[[], object]]:
        return [functools.partial(self._move, *each, os.O_RDONLY) for each in self._each()]

    def _each(self) -> Iterator[tuple[str, memoryview]]:
        return zip(self._paths, self._memory, strict=True)

    @staticmethod
    def _move(path: str, memory: memoryview, access: int) -> None:
        fd = os.open(path, access | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            move = os.preadv if access == os.O_RDONLY else os.pwritev
            moved = move(fd, [memory], 0)
        finally:
            os.close(fd)
        if moved != len(memory):
            raise OSError(f"{moved} bytes of {len(memory)}")


def file_store(total_nbytes: int, pairs: int) -> tuple[Rates, Rates] | None:
    """Measure writing and reading in turns; None where the file system of the workers' folders does not do O_DIRECT."""
    writes, reads = Rates(), Rates()
    count = total_nbytes // VALUE_NBYTES
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(tempfile.TemporaryDirectory(dir=dask.config.get("temporary-directory", None)))
        pool = BlockPool(total_nbytes)
        folder = SpillFolder(parent, pool)
        stack.callback(folder.close)
        sides: dict[bool, _OurFiles | _RawFiles] = {
            True: _OurFiles(folder, count),
            False: _RawFiles(parent, pool, count),
        }
        threads = stack.enter_context(ThreadPoolExecutor(THREADS))
        # Files and memory are made here.
        try:
            _seconds(threads, sides[False].write())
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return None
        _seconds(threads, sides[True].write())
        for side in sides.values():
            _seconds(threads, side.read())
        for _, is_ours in turns(pairs):
            side = sides[is_ours]
            writes.add(is_ours, count * VALUE_NBYTES / _seconds(threads, side.write()))
            reads.add(is_ours, count * VALUE_NBYTES / _seconds(threads, side.read()))
    return writes, reads


def _seconds(threads: ThreadPoolExecutor, work: Sequence[Callable[[], object]]) -> float:
    started = time.perf_counter()
    for future in [threads.submit(one) for one in work]:
        future.result()
    return time.perf_counter() - started
