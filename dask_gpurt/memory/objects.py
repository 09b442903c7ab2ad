"""The OBJECT tier: objects of a store that fsspec opens, such as S3, checked when they are read.

Theory of operation
-------------------
An :class:`ObjectFolder` has a prefix of its own below the configured URL, under a name that nobody can guess and no key has a
part in, with one object a copy. An object holds the frames of a copy, one behind the other. Their lengths and a digest stay in
memory with the :class:`ObjectCopy`. The digest is a keyed one (BLAKE2b, with a key of this process): others may write to
the store, and what is deserialized must be what was written, not what somebody made to look like it.

A store is far away and now and then busy. What fails is tried again, :data:`PAUSES_S` apart, until the time is up that
an operation of its size may take; that a store says no (no such object, no permission) is final. An object that does not match
its digest is fetched once more: it may have been damaged on its way. Failures are :class:`~dask_gpurt.errors.SpillError`.

Beside the prefix lies an *owner*, an empty object that :meth:`ObjectFolder.renew` writes anew every minute. An owner that was
not renewed for :data:`STALE_S` is dead, and is removed with all its objects: by whoever lives, when that begins and once in
that time. The times are those that the store gives, of the other owner and of one's own, so that no clock of a worker
matters. A worker that was stopped so long and goes on finds its objects gone, as if they were lost. One that closes while the
store does not answer is killed by its nanny, and its objects wait for another one, too.

Covers: objects, digests, errors, left-overs.
Does not cover: credentials and options, which fsspec and its file systems read from their own configuration
(https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration), in each worker; who else may read.
See also: :mod:`dask_gpurt.memory.disk`.

Every method blocks. They may be called from several threads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dask_gpurt.errors import CorruptDataError, SpillError
from dask_gpurt.memory.packing import Meter
from dask_gpurt.memory.store import flat
from dask_gpurt.urls import Veil, shown

if TYPE_CHECKING:
    from dask_gpurt.memory.blocks import BlockPool
    from dask_gpurt.memory.store import Buffer

__all__ = ["ObjectCopy", "ObjectFolder"]

logger = logging.getLogger(__name__)

_PREFIX = "gpurt-spill-"
_OWNER = ".owner"
#: Names of owners: whatever else lies there is not ours to remove, nor may it name what is.
_OWNERS = re.compile(rf"{_PREFIX}[0-9a-f]{{32}}\{_OWNER}", re.ASCII)

#: Seconds between one try and the next.
PAUSES_S = (0.1, 0.5, 2.0)
#: What an operation may take in all: so many seconds, and those that its bytes take at so many bytes per second.
DEADLINE_S = 30.0
RATE_MIN = 2**20
#: Seconds for the removal of everything. A nanny gives its worker four for all that there is to close.
CLOSE_S = 2.0
#: Seconds after which an owner that was not renewed is dead. It is renewed every minute.
STALE_S = 3600.0
_DIGEST_NBYTES = 16

T = TypeVar("T")


class ObjectCopy:
    """A copy in an object: where it lies, and what it has to be."""

    __slots__ = ("digest", "folder", "lengths", "nbytes", "path")

    def __init__(self, folder: ObjectFolder, path: str, lengths: tuple[int, ...], digest: bytes) -> None:
        self.folder = folder
        self.path = path
        self.lengths = lengths
        self.digest = digest
        #: Size of the object.
        self.nbytes = sum(lengths)

    def __repr__(self) -> str:
        return self.folder.veil(f"<ObjectCopy {self.path} {len(self.lengths)} frames, {self.nbytes} bytes>")

    def read(self) -> list[memoryview]:
        """Read and check; see :meth:`ObjectFolder.read`."""
        return self.folder.read(self)

    def remove(self) -> None:
        """Remove the object; it may be gone already."""
        self.folder.remove(self)


class ObjectFolder:
    """A prefix for the copies of this process.

    Parameters
    ----------
    url
        What it lies below: a bucket or folder that exists. Nothing is done there before :meth:`begin`.
    pool
        Lends the memory that is read into.

    Raises
    ------
    SpillError
        If fsspec has no file system for the URL.
    """

    def __init__(self, url: str, pool: BlockPool) -> None:
        import fsspec

        self.veil = Veil(url)
        try:
            self._fs, self._base = fsspec.core.url_to_fs(url)
        except Exception as error:  # noqa: BLE001 - some file systems connect already now, each has errors of its own
            story = self.veil(f"cannot keep spilled data at {shown(url)}: {error}")
            raise SpillError(_errno(error, errno.EINVAL), story) from self._cause(error)
        self.path = f"{self._base.rstrip('/')}/{_PREFIX}{secrets.token_hex(16)}"
        self._owner = self.path + _OWNER
        self._pool = pool
        #: The price of the store.
        self.meter = Meter()
        self._key = secrets.token_bytes(32)
        self._numbers = itertools.count()
        self._guard = threading.Lock()
        self._begun = False
        #: When it was last looked for left-overs.
        self._looked_s = -math.inf
        self._closing = threading.Event()

    def __repr__(self) -> str:
        return self.veil(f"<ObjectFolder {self.path}>")

    # The beginning and the end

    def begin(self) -> None:
        """Make the prefix; calling it again does nothing.

        Raises
        ------
        SpillError
            If the store cannot be written.
        """
        with self._guard:
            if self._begun:
                return
            if self._closing.is_set():
                raise SpillError(errno.EBADF, self.veil(f"{self.path} is closed"))
            self._try(f"cannot keep spilled data in {self._base}", self._make, 0)
            self._begun = True

    def _make(self, **options: Any) -> None:
        # For a store that has folders. It does not make what the URL names: a bucket would cost, and belong to somebody.
        with contextlib.suppress(FileExistsError):
            self._fs.mkdir(self.path, create_parents=False, **options)
        self._fs.pipe_file(self._owner, b"", **options)

    def renew(self) -> None:
        """Tell others that this process lives, and at first, and once in a while, remove what dead ones have left."""
        if not self._begun:
            return
        try:
            self._try(
                f"cannot renew {self._owner}", lambda **options: self._fs.pipe_file(self._owner, b"", **options), 0
            )
        except SpillError as error:
            # Whoever reads or writes hears of it, and many more renewals come before it matters.
            logger.debug("%s", error)
            return
        if time.monotonic() - self._looked_s > STALE_S:
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        self._looked_s = time.monotonic()
        try:
            self._fs.invalidate_cache()
            now = self._fs.modified(self._owner)
            for path in self._fs.ls(self._base, detail=False):
                name = path.rstrip("/").rpartition("/")[2]
                if _OWNERS.fullmatch(name) is None or path.endswith(self._owner):
                    continue
                with contextlib.suppress(FileNotFoundError):  # another one removes it, too
                    if (now - self._fs.modified(path)).total_seconds() > STALE_S:
                        logger.info("%s has left objects behind, they are removed", self.veil(path))
                        self._remove_all(path.removesuffix(_OWNER))
        except Exception as error:  # noqa: BLE001 - each store has errors of its own; NotImplementedError: no times
            logger.warning(self.veil(f"What dead workers may have left in {self._base} is not removed: {error!r}"))

    def _remove_all(self, path: str, **options: Any) -> None:
        # The owner last: what has none would never be found.
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True, **options)
        self._fs.rm_file(path + _OWNER, **options)

    def close(self) -> None:
        """Remove everything; calling it again does nothing. Operations under way are not tried again."""
        with self._guard:
            begun, self._begun = self._begun, False
            self._closing.set()
        if not begun:
            return
        try:
            self._fs.invalidate_cache()
            self._remove_all(self.path, **self._timeout(CLOSE_S))
        except Exception as error:  # noqa: BLE001 - each store has errors of its own
            story = f"{self.path} is left for another worker, which removes it in an hour or later: {error!r}"
            logger.warning(self.veil(story))

    # Copies

    def write(self, frames: Sequence[Buffer]) -> ObjectCopy:
        """Write ``frames`` to a new object.

        Raises
        ------
        SpillError
            If the store does not take them.
        """
        self.begin()
        views = [flat(frame) for frame in frames]
        body = b"".join(views)
        path = f"{self.path}/{next(self._numbers)}.blk"
        copy = ObjectCopy(self, path, tuple(view.nbytes for view in views), self._digest(body))
        try:
            self._try(
                f"cannot write {copy.nbytes} bytes to {path}",
                lambda **options: self._put(path, body, **options),
                copy.nbytes,
            )
        except SpillError as error:
            if error.errno == errno.ENOENT:
                # Somebody has removed the prefix. The next one makes it anew.
                self._begun = False
            raise
        return copy

    def _put(self, path: str, body: bytes, **options: Any) -> None:
        with self.meter.transfer(len(body)):
            self._fs.pipe_file(path, body, **options)

    def read(self, copy: ObjectCopy) -> list[memoryview]:
        """Read the frames back, into memory that can be written to.

        Raises
        ------
        CorruptDataError
            If the object is not there, or does not match its digest.
        SpillError
            If the store fails.
        """
        body = self._fetch(copy)
        if self._flaw(copy, body) and (flaw := self._flaw(copy, body := self._fetch(copy))):
            raise CorruptDataError(self.veil(f"{copy.path}: {flaw}"))
        frames = []
        begin = 0
        for length in copy.lengths:
            frame = self._pool.lease(length)
            frame[:] = memoryview(body)[begin : begin + length]
            frames.append(frame)
            begin += length
        return frames

    def _fetch(self, copy: ObjectCopy) -> bytes:
        try:
            body: bytes = self._try(
                f"cannot read {copy.nbytes} bytes from {copy.path}",
                lambda **options: self._fs.cat_file(copy.path, **options),
                copy.nbytes,
            )
        except SpillError as error:
            if error.errno != errno.ENOENT:
                raise
            raise CorruptDataError(error.errno, self.veil(f"{copy.path}: the object is gone")) from error
        return body

    def _flaw(self, copy: ObjectCopy, body: bytes) -> str | None:
        if len(body) != copy.nbytes:
            return f"{len(body)} bytes, {copy.nbytes} were written"
        return None if self._digest(body) == copy.digest else "does not match its digest"

    def _digest(self, body: bytes) -> bytes:
        return hashlib.blake2b(body, digest_size=_DIGEST_NBYTES, key=self._key).digest()

    def remove(self, copy: ObjectCopy) -> None:
        """Remove the object of ``copy``; it may be gone already.

        Raises
        ------
        SpillError
            If the store fails. It goes with the rest then, when the folder is closed.
        """
        try:
            self._try(f"cannot remove {copy.path}", lambda **options: self._fs.rm_file(copy.path, **options), 0)
        except SpillError as error:
            if error.errno != errno.ENOENT:
                raise

    # Trying again

    def _try(self, story: str, operation: Callable[..., T], nbytes: int) -> T:
        deadline = time.monotonic() + DEADLINE_S + nbytes / RATE_MIN
        for pause_s in (*PAUSES_S, None):
            try:
                return operation(**self._timeout(deadline - time.monotonic()))
            except Exception as error:  # noqa: BLE001 - each file system has its own, and not all are OSErrors
                no = isinstance(error, FileNotFoundError | PermissionError)
                if no or pause_s is None or self._closing.is_set() or time.monotonic() + pause_s > deadline:
                    raise SpillError(_errno(error), self.veil(f"{story}: {error!r}")) from self._cause(error)
            self._closing.wait(pause_s)
        raise AssertionError  # the last try returns or raises

    def _cause(self, error: Exception) -> Exception | None:
        # It would show in a traceback, with all that it says.
        return None if self.veil else error

    def _timeout(self, seconds: float) -> dict[str, float]:
        # Those that are asynchronous inside take it with any operation. Others have to see for themselves.
        return {"timeout": max(seconds, 0.001)} if self._fs.async_impl else {}


def _errno(error: Exception, default: int = errno.EIO) -> int:
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    return getattr(error, "errno", None) or default
