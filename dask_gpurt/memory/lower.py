"""Tiers below memory, as the mover sees them: a value goes in, a copy of it comes out.

Covers: the protocols :class:`Lower` and :class:`Copy`; :class:`FrameStore`, which makes frames of values, and puts them into
a folder of files (:mod:`dask_gpurt.memory.disk`) or of objects (:mod:`dask_gpurt.memory.objects`).
Does not cover: copies of what lies on a device (:mod:`dask_gpurt.memory.device`).

All methods block, and may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from dask_gpurt.memory import codec
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.store import Buffer

__all__ = ["Copy", "DiskStore", "Folder", "FrameStore", "Lower", "ObjectStore", "RawName"]


class RawName:
    """Base of names whose values are lists of buffers, kept as they are."""

    __slots__ = ()


class Copy(Protocol):
    """A copy below. All methods block."""

    #: Where it lies.
    tier: Tier
    nbytes: int

    def load(self) -> object:
        """Make the value of it; raises SpillError if it cannot be read."""

    def frames(self) -> tuple[bytes, list[Any]] | None:
        """Header and frames as they lie; None if it has none."""

    def remove(self) -> None:
        """Remove it."""


class Lower(Protocol):
    """The tier below."""

    def store(self, name: Hashable, value: object) -> Copy:
        """Copy ``value``; blocks. SpillError: the tier refused; anything else: the value cannot be copied."""


class _Kept(Protocol):
    """Frames that a folder keeps."""

    @property
    def nbytes(self) -> int:
        """Bytes that they take there."""

    def read(self) -> list[memoryview]:
        """Read and check; raises SpillError."""

    def remove(self) -> None:
        """Remove them; they may be gone already."""


class Folder(Protocol):
    """Keeps frames."""

    def write(self, frames: Sequence[Buffer]) -> _Kept:
        """Keep ``frames``; raises SpillError."""


class _FrameCopy:
    __slots__ = ("_header", "_kept", "nbytes", "tier")

    def __init__(self, tier: Tier, header: bytes | None, kept: _Kept) -> None:
        self.tier = tier
        self.nbytes = kept.nbytes
        self._header = header
        self._kept = kept

    def load(self) -> object:
        frames = self._kept.read()
        return frames if self._header is None else codec.decode(self._header, frames)

    def frames(self) -> tuple[bytes, list[Any]] | None:
        return None if self._header is None else (self._header, list(self._kept.read()))

    def remove(self) -> None:
        self._kept.remove()


class FrameStore:
    """A tier that keeps frames, as :class:`Lower`.

    Parameters
    ----------
    folder
        Where.
    """

    tier: Tier

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def store(self, name: Hashable, value: Any) -> Copy:
        """Serialize and write."""
        header, frames = (None, value) if isinstance(name, RawName) else codec.encode(value)
        return _FrameCopy(self.tier, header, self.folder.write(frames))


class DiskStore(FrameStore):
    """The DISK tier."""

    tier = Tier.DISK


class ObjectStore(FrameStore):
    """The OBJECT tier."""

    tier = Tier.OBJECT
