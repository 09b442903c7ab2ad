"""The DISK tier: files that nobody else can read, checked when they are read.

Theory of operation
-------------------
A :class:`SpillFolder` is a folder of one process (mode 0700), with one file a copy (mode 0600). A file holds the frames
of a copy, as :mod:`dask_gpurt.memory.files` lays them out; their lengths and checksums (xxh3, 64 bits) stay in memory with
the :class:`DiskCopy`, so that a file which was damaged, cut off, or exchanged cannot vouch for itself.

Files of :data:`DIRECT_NBYTES_MIN` and more go past the page cache, where the file system lets them, and while the disk
takes :data:`DIRECT_RATE_MIN`. A slower one is better off with a cache before it, as far as there is memory for that: one file
in :data:`DIRECT_PROBE` then finds out whether it is still slow.

Beside the folder lies a lock file, held locked (flock) as long as the process lives. A folder whose lock can be taken
belonged to a process that is dead: it is removed when the next folder is made beside it. The lock is created and taken
before the folder, so that no folder of the living is ever found without one.

To remove a large file is slow: the file system waits until what it is still writing of it has reached the disk, to throw it
away then. So files of :data:`IDLE_FILE_NBYTES_MIN` and more are kept when their copy is no more, and written over by the next
copy of about that size; :meth:`SpillFolder.decay` removes those that were not needed for a while. They never make the
folder larger than it was before.

Covers: files, checksums, errors, left-overs.
Does not cover: what the frames mean (:mod:`dask_gpurt.memory.codec`); which thread does it
(:mod:`dask_gpurt.memory.mover`).

Every method blocks. They may be called from several threads.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import fcntl
import itertools
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from dask_gpurt.errors import CorruptDataError, SpillError
from dask_gpurt.memory import files
from dask_gpurt.memory.files import Layout
from dask_gpurt.memory.packing import Meter
from dask_gpurt.memory.store import flat

if TYPE_CHECKING:
    from dask_gpurt.memory.blocks import BlockPool
    from dask_gpurt.memory.store import Buffer

__all__ = ["DiskCopy", "SpillFolder", "remove_leftovers", "takes_direct"]

logger = logging.getLogger(__name__)

_PREFIX = "gpurt-spill-"
_LOCK = ".lock"
_IDLE = ".idle"

#: Smaller files are removed at once.
IDLE_FILE_NBYTES_MIN = 2**17
#: An idle file may be larger than what is written to it by this factor. It is cut off then.
_FIT = 2.0
#: Bytes of idle files that one decay removes at most, for it keeps a thread busy.
_DECAY_NBYTES_MAX = 256 * 2**20
#: How long closing may take. A nanny gives its worker four seconds for all that there is to close.
CLOSE_S = 0.5

#: Smaller files are not worth the time that a disk takes for any; memory for them need not begin at a page, either.
DIRECT_NBYTES_MIN = 2**18
#: Bytes per second of a disk that is written to directly. Copying to the page cache gives two to five times as much, and
#: takes all of a core for it.
DIRECT_RATE_MIN = 5e8
#: On a slower disk, one file in so many.
DIRECT_PROBE = 64


class DiskCopy:
    """A copy in a file: where it lies, and what it has to be."""

    __slots__ = ("digests", "direct", "folder", "layout", "path", "removed")

    def __init__(self, folder: SpillFolder, path: str, layout: Layout, digests: tuple[int, ...]) -> None:
        self.folder = folder
        self.path = path
        self.layout = layout
        self.digests = digests
        #: Whether it was written past the page cache.
        self.direct = False
        self.removed = False

    def __repr__(self) -> str:
        return f"<DiskCopy {self.path} {len(self.digests)} frames, {self.nbytes} bytes>"

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self.layout.nbytes

    def read(self) -> list[memoryview]:
        """Read and check; see :meth:`SpillFolder.read`."""
        return self.folder.read(self)

    def remove(self) -> None:
        """Remove the file; it may be gone already."""
        self.folder.remove(self)


class SpillFolder:
    """A folder for the copies of this process.

    Parameters
    ----------
    parent
        Where to make it. The parent is made if it is not there; left-overs of dead processes in it are removed.
    pool
        Lends the memory that is read into.

    Raises
    ------
    SpillError
        If the folder cannot be made or written.
    """

    def __init__(self, parent: str, pool: BlockPool) -> None:
        self._pool = pool
        self._numbers = itertools.count()
        try:
            os.makedirs(parent, exist_ok=True)
            remove_leftovers(parent)
            self._lock_fd, lock = tempfile.mkstemp(prefix=_PREFIX, suffix=_LOCK, dir=parent)
        except OSError as error:
            raise _refused(error, f"cannot keep spilled data in {parent}") from error
        try:
            # Whoever looks for left-overs may hold it for a moment.
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
            self.path = lock.removesuffix(_LOCK)
            os.mkdir(self.path, 0o700)
        except OSError as error:
            os.close(self._lock_fd)
            os.unlink(lock)
            raise _refused(error, f"cannot keep spilled data in {parent}") from error
        self._pace = _Pace(takes_direct(self.path))
        #: The price of the disk, as far as files go past the page cache.
        self.meter = Meter()
        self._guard = threading.Lock()
        self._closed = False
        #: Idle files: (bytes, path), the smallest first; their bytes, and the least of these since the last decay.
        self._idle: list[tuple[int, str]] = []
        self._idle_nbytes = 0
        self._spare_nbytes = 0
        #: Bytes of files that have copies, and the most there ever were.
        self._used_nbytes = 0
        self._most_nbytes = 0

    def __repr__(self) -> str:
        return f"<SpillFolder {self.path}>"

    @property
    def idle_nbytes(self) -> int:
        """Bytes of files that wait for their next copy."""
        return self._idle_nbytes

    @property
    def idle_files(self) -> int:
        """Number of these files."""
        return len(self._idle)

    def write(self, frames: Sequence[Buffer]) -> DiskCopy:
        """Write ``frames`` to a new file, from where they lie.

        Raises
        ------
        SpillError
            If the disk does not take them; nothing is left behind then.
        """
        views = [flat(frame) for frame in frames]
        digests = tuple(xxhash.xxh3_64_intdigest(view) for view in views)
        path = os.path.join(self.path, f"{next(self._numbers)}.blk")
        copy = DiskCopy(self, path, files.layout_of(views), digests)
        try:
            old = self._begin_file(copy.nbytes)
            if old is not None:
                os.rename(old, path)
            copy.direct = copy.nbytes >= DIRECT_NBYTES_MIN and self._pace.direct()
            flags = os.O_WRONLY | (0 if old else os.O_CREAT | os.O_EXCL) | os.O_CLOEXEC
            fd = os.open(path, flags | (os.O_DIRECT if copy.direct else 0), 0o600)
            try:
                started = time.perf_counter()
                # What goes to the page cache says nothing about the disk.
                with self.meter.transfer(copy.nbytes) if copy.direct else contextlib.nullcontext():
                    files.write(fd, views, copy.layout)
                if copy.direct:
                    self._pace.note(copy.nbytes, time.perf_counter() - started)
            finally:
                os.close(fd)
        except OSError as error:
            # Whatever is wrong with it, nobody is to write over it.
            with self._guard:
                self._used_nbytes -= copy.nbytes
            _unlink(path)
            raise _refused(error, f"cannot write {copy.nbytes} bytes to {path}") from error
        return copy

    def _begin_file(self, nbytes: int) -> str | None:
        """Take an idle file to write over; None: a new one is to be made, for which there is room now."""
        surplus = []
        with self._guard:
            number = bisect.bisect_left(self._idle, (nbytes, ""))
            found = number < len(self._idle) and self._idle[number][0] <= _FIT * nbytes
            old = self._take_idle(number) if found else None
            self._used_nbytes += nbytes
            self._most_nbytes = max(self._most_nbytes, self._used_nbytes)
            while self._idle and self._used_nbytes + self._idle_nbytes > self._most_nbytes:
                surplus.append(self._take_idle(-1))
        for path in surplus:
            _unlink(path)
        return old

    def _take_idle(self, number: int) -> str:
        nbytes, path = self._idle.pop(number)
        self._idle_nbytes -= nbytes
        self._spare_nbytes = min(self._spare_nbytes, self._idle_nbytes)
        return path

    def read(self, copy: DiskCopy) -> list[memoryview]:
        """Read the frames back, into memory that can be written to.

        Raises
        ------
        CorruptDataError
            If the file is not there, is too short or too long, or does not match its checksums.
        SpillError
            If the disk fails.
        """
        try:
            frames = self._read(copy)
        except FileNotFoundError as error:
            raise CorruptDataError(error.errno, f"{copy.path}: the file is gone") from error
        except CorruptDataError:
            raise
        except OSError as error:
            raise _refused(error, f"cannot read {copy.nbytes} bytes from {copy.path}") from error
        for number, (frame, digest) in enumerate(zip(frames, copy.digests, strict=True)):
            if xxhash.xxh3_64_intdigest(frame) != digest:
                raise CorruptDataError(f"{copy.path}: frame {number} of {len(frames)} does not match its checksum")
        return frames

    def _read(self, copy: DiskCopy) -> list[memoryview]:
        fd = os.open(copy.path, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if copy.direct else 0))
        try:
            size = os.fstat(fd).st_size
            if size != copy.nbytes:
                raise CorruptDataError(f"{copy.path}: {size} bytes, {copy.nbytes} were written")
            frames = files.read(fd, copy.layout, self._pool.lease, direct=copy.direct)
        finally:
            os.close(fd)
        if frames is None:
            raise CorruptDataError(f"{copy.path}: ends early")
        return frames

    def remove(self, copy: DiskCopy) -> None:
        """Remove the file of ``copy``; it may be gone already."""
        with self._guard:
            if copy.removed:
                return
            copy.removed = True
            self._used_nbytes -= copy.nbytes
        keep = copy.nbytes >= IDLE_FILE_NBYTES_MIN
        idle = f"{copy.path}{_IDLE}"
        try:
            if keep:
                os.rename(copy.path, idle)
            else:
                os.unlink(copy.path)
        except FileNotFoundError:
            keep = False
        except OSError as error:
            raise _refused(error, f"cannot remove {copy.path}") from error
        if keep:
            with self._guard:
                bisect.insort(self._idle, (copy.nbytes, idle))
                self._idle_nbytes += copy.nbytes

    def decay(self) -> None:
        """Remove files that were not needed since the last call, some of them."""
        unneeded = []
        nbytes = 0
        with self._guard:
            while self._idle and self._idle[-1][0] <= self._spare_nbytes and nbytes < _DECAY_NBYTES_MAX:
                nbytes += self._idle[-1][0]
                self._spare_nbytes -= self._idle[-1][0]
                unneeded.append(self._take_idle(-1))
            self._spare_nbytes = self._idle_nbytes
            self._most_nbytes = self._used_nbytes + self._idle_nbytes
        for path in unneeded:
            _unlink(path)

    def close(self, aside: str | None = None) -> None:
        """Remove everything; calling it again does nothing.

        Parameters
        ----------
        aside
            Where to leave what is not removed within :data:`CLOSE_S`, a folder on the same file system; a process of its own
            removes it there. None: remove all of it now. Who closes a worker waits for some seconds, and kills it then.
        """
        with self._guard:
            if self._closed:
                return
            self._closed = True
        try:
            if not _remove_files(self.path, math.inf if aside is None else time.monotonic() + CLOSE_S):
                _unlink(self.path + _LOCK)
            elif aside is not None:
                self._move(aside)
                _remove_later(self.path)
        finally:
            os.close(self._lock_fd)

    def _move(self, to: str) -> None:
        path = os.path.join(to, os.path.basename(self.path))
        try:
            # The lock first, so that no folder is ever there without one.
            os.rename(self.path + _LOCK, path + _LOCK)
            os.rename(self.path, path)
        except OSError as error:
            logger.debug("%s stays where it is: %s", self.path, error)
            return
        self.path = path


def _remove_files(folder: str, deadline: float) -> bool:
    """Remove ``folder``; whether something is left, because it took until ``deadline``, or cannot be removed."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if time.monotonic() > deadline:
                    return True
                _unlink(entry.path)
        os.rmdir(folder)
    except FileNotFoundError:
        # Somebody else was first.
        return False
    except OSError as error:
        logger.debug("%s is not removed: %s", folder, error)
        return True
    return False


def _remove_later(folder: str) -> None:
    """Have a process of its own remove ``folder`` and its lock file. It outlives this one."""
    code = (
        "import os, shutil, sys; shutil.rmtree(sys.argv[1], ignore_errors=True); "
        "os.path.exists(sys.argv[1]) or os.unlink(sys.argv[2])"
    )
    argv = [sys.executable, "-I", "-S", "-c", code, folder, folder + _LOCK]
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    try:
        # Not waited for: this process ends.
        os.posix_spawn(sys.executable, argv, os.environ, file_actions=quiet, setsid=True)
    except OSError as error:
        logger.warning("%s is left for the next worker that starts here to remove: %s", folder, error)


class _Pace:
    """Says which files go past the page cache."""

    def __init__(self, possible: bool) -> None:
        self._possible = possible
        self._numbers = itertools.count()
        #: Bytes per second, the newest counting most; at first the disk is believed to be fast.
        self._rate = 2 * DIRECT_RATE_MIN

    def direct(self) -> bool:
        number = next(self._numbers)
        return self._possible and (self._rate >= DIRECT_RATE_MIN or number % DIRECT_PROBE == 0)

    def note(self, nbytes: int, elapsed_s: float) -> None:
        # A fast file is believed at once as little as a slow one: others may have kept the disk busy, or let it rest.
        self._rate += (nbytes / max(elapsed_s, 1e-9) - self._rate) / 8


def takes_direct(folder: str) -> bool:
    """Whether files of ``folder`` can be written past the page cache; those of a tmpfs, for one, cannot."""
    path = os.path.join(folder, "direct")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError:
        _unlink(path)
        return False
    try:
        files.write(fd, [memoryview(bytes(files.PAGE_NBYTES))], Layout([files.PAGE_NBYTES]))
    except OSError as error:
        # Of a full disk, say, whoever writes hears.
        return error.errno != errno.EINVAL
    finally:
        os.close(fd)
        _unlink(path)
    return True


def remove_leftovers(parent: str) -> list[str]:
    """Remove the folders of dead processes in ``parent``; returns their paths.

    Folders of other users, and of processes that are alive, are left alone.
    """
    removed = []
    for lock in Path(parent).glob(f"{_PREFIX}*{_LOCK}"):
        try:
            if lock.lstat().st_uid != os.getuid():
                continue
            fd = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            # Gone meanwhile, or not ours to judge.
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A lock file that nobody has locked yet is younger than its folder, which is not there.
            folder = str(lock).removesuffix(_LOCK)
            if os.path.isdir(folder) and not os.path.islink(folder):
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
                removed.append(folder)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    return removed


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _refused(error: OSError, story: str) -> SpillError:
    return SpillError(error.errno, f"{story}: {error.strerror or error}")
