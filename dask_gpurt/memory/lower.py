"""Tiers below memory, as the mover sees them: a value goes in, a copy of it comes out.

Theory of operation
-------------------
What cannot be read back is lost, and computed again. If it went to the same place again, and could not be read again, that
would never end, and scattered data would all be lost there. So a store that failed to read something is *distrusted*: what
is written to it is read back at once, while the value is still in memory, until that has succeeded. What cannot be read back
was not written.

Covers: the protocols :class:`Lower` and :class:`Copy`; :class:`FrameStore`, which makes frames of values, and puts them into
a folder of files (:mod:`dask_gpurt.memory.disk`) or of objects (:mod:`dask_gpurt.memory.objects`).
Does not cover: whether they are compressed (:mod:`dask_gpurt.memory.packing`), how they are encrypted
(:mod:`dask_gpurt.memory.cipher`); copies of what lies on a device (:mod:`dask_gpurt.memory.device`).

All methods block, and may be called from several threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from dask_gpurt.codecs import Packed
from dask_gpurt.errors import SpillError
from dask_gpurt.memory import codec
from dask_gpurt.memory.cipher import Cipher
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.packing import Packer, kind_of
from dask_gpurt.memory.store import Buffer, Meter

__all__ = ["Copy", "DiskStore", "Folder", "FrameStore", "Lower", "ObjectStore", "RawName"]


class RawName:
    """Base of names whose values are lists of buffers, kept as they are."""

    __slots__ = ()
    #: Is told what of it goes to a tier below, and comes from there.
    meter: Meter | None = None


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
    __slots__ = ("_kept", "_store", "header", "nbytes", "packed", "sealed", "tier")

    def __init__(
        self, store: FrameStore, header: bytes | None, kept: _Kept, packed: Sequence[Packed], sealed: int
    ) -> None:
        self.tier = store.tier
        self.nbytes = kept.nbytes
        self.header = header
        self.packed = packed
        #: By what it is decrypted, if it is encrypted.
        self.sealed = sealed
        self._store = store
        self._kept = kept

    def load(self) -> object:
        frames = self._unpacked()
        return frames if self.header is None else codec.decode(self.header, frames)

    def frames(self) -> tuple[bytes, list[Any]] | None:
        return None if self.header is None else (self.header, self._unpacked())

    def read(self) -> list[memoryview]:
        """The frames as they lie, checked."""
        try:
            return self._kept.read()
        except SpillError:
            self._store.distrusted = True
            raise

    def _unpacked(self) -> list[Any]:
        frames = self.read()
        try:
            return self._store.unpack(frames, self.packed, self.sealed)
        except SpillError:
            self._store.distrusted = True
            raise

    def remove(self) -> None:
        self._kept.remove()


class FrameStore:
    """A tier that keeps frames, as :class:`Lower`.

    Parameters
    ----------
    folder
        Where.
    packer
        Compresses what goes there; None: nothing is compressed.
    cipher
        Encrypts what goes there; None: nothing is encrypted. That of a store whose copies are taken over is the same.
    """

    tier: Tier

    def __init__(self, folder: Folder, packer: Packer | None = None, cipher: Cipher | None = None) -> None:
        self.folder = folder
        self.packer = packer
        self.cipher = cipher
        #: Whether what is written is read back.
        self.distrusted = False

    def store(self, name: Hashable, value: Any) -> Copy:
        """Serialize, compress if that pays, encrypt if that is wanted, and write."""
        raw = isinstance(name, RawName)
        header, frames = (None, value) if raw else codec.encode(value)
        packed: Sequence[Packed] = ()
        if self.packer is not None:
            frames, packed = self.packer.pack(kind_of(name, value, raw=raw), frames)
        sealed = 0
        if self.cipher is not None:
            frames, sealed = self.cipher.seal(frames)
        return _FrameCopy(self, header, self._keep(frames), packed, sealed)

    def take_over(self, copy: Copy) -> Copy:
        """Copy what another tier keeps, as it lies there.

        Raises
        ------
        SpillError
            If it cannot be read there, or not be written here.
        TypeError
            If it is not made of frames.
        """
        if not isinstance(copy, _FrameCopy):
            raise TypeError(f"{copy!r} cannot be moved")
        return _FrameCopy(self, copy.header, self._keep(copy.read()), copy.packed, copy.sealed)

    def _keep(self, frames: Sequence[Any]) -> _Kept:
        kept = self.folder.write(frames)
        if self.packer is not None:
            self.packer.wrote(kept.nbytes)
        if self.distrusted:
            try:
                kept.read()
            except SpillError:
                with contextlib.suppress(SpillError):
                    kept.remove()
                raise
            self.distrusted = False
        return kept

    def unpack(self, frames: Sequence[Buffer], packed: Sequence[Packed], sealed: int = 0) -> list[Any]:
        """Return frames as they were before they were compressed and encrypted; raises CorruptDataError."""
        if self.cipher is not None:
            frames = self.cipher.open(frames, sealed)
        if not packed:
            return list(frames)
        assert self.packer is not None
        return self.packer.unpack(frames, packed)


class DiskStore(FrameStore):
    """The DISK tier."""

    tier = Tier.DISK


class ObjectStore(FrameStore):
    """The OBJECT tier."""

    tier = Tier.OBJECT
