"""Encryption of what goes to DISK and OBJECT: AES-256-GCM, by the library ``cryptography``, with a key of this process.

Theory of operation
-------------------
What is spilled never outlives its process, so neither does the key: it is made when the store starts, is written nowhere, and
without it what was left behind by a process that was killed is noise. Each frame is sealed as it would be written, compressed or
not, in pieces of :data:`PIECE_NBYTES` at most, each with a number of its own that is never used again. The numbers stay in
memory with the copy. So a frame that was changed, or exchanged for another one of this process, is not opened.

A sealed frame is another buffer of its size, held for as long as it is written.

Covers: :class:`Cipher`.
Does not cover: what stays in memory, and may be swapped out by the system; what stock Dask spills.

Thread-safe. The methods of :class:`Cipher` block.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dask_gpurt.errors import CorruptDataError, InstallError
from dask_gpurt.memory.store import Buffer, flat

__all__ = ["PIECE_NBYTES", "Cipher", "refusal"]

#: The library takes no more than 2 GiB at a time.
PIECE_NBYTES = 2**30
_TAG_NBYTES = 16


def refusal() -> str | None:
    """Say why nothing can be encrypted here, if so."""
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        return f"cryptography cannot be imported: {error}"
    return None if hasattr(AESGCM, "encrypt_into") else "cryptography is too old: it has no AESGCM.encrypt_into"


class Cipher:
    """A key, and what is done with it.

    Parameters
    ----------
    lease
        Lends memory.

    Raises
    ------
    InstallError
        If the library is not there.
    """

    def __init__(self, lease: Callable[[int], memoryview]) -> None:
        if (reason := refusal()) is not None:
            raise InstallError(f"gpurt.memory.encryption is on, and {reason}")
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._lease = lease
        self._aes: Any = AESGCM(AESGCM.generate_key(256))
        self._lock = threading.Lock()
        self._next = 0

    def __repr__(self) -> str:
        return "<Cipher>"

    def seal(self, frames: Sequence[Buffer]) -> tuple[list[memoryview], int]:
        """Return ``frames`` encrypted, and the number by which they are opened."""
        views = [flat(frame) for frame in frames]
        count = sum(len(range(0, max(view.nbytes, 1), PIECE_NBYTES)) for view in views)
        with self._lock:
            first, self._next = self._next, self._next + count
        nonces = _nonces(first)
        return [self._sealed(view, nonces) for view in views], first

    def _sealed(self, view: memoryview, nonces: Iterator[bytes]) -> memoryview:
        starts = range(0, max(view.nbytes, 1), PIECE_NBYTES)
        sealed = self._lease(view.nbytes + _TAG_NBYTES * len(starts))
        for number, start in enumerate(starts):
            piece = view[start : start + PIECE_NBYTES]
            at = start + _TAG_NBYTES * number
            self._aes.encrypt_into(next(nonces), piece, None, sealed[at : at + piece.nbytes + _TAG_NBYTES])
        return sealed

    def open(self, frames: Sequence[Buffer], first: int) -> list[memoryview]:
        """Undo :meth:`seal`.

        Raises
        ------
        CorruptDataError
            If they are not what was sealed.
        """
        nonces = _nonces(first)
        return [self._opened(flat(frame), nonces) for frame in frames]

    def _opened(self, sealed: memoryview, nonces: Iterator[bytes]) -> memoryview:
        from cryptography.exceptions import InvalidTag

        step = PIECE_NBYTES + _TAG_NBYTES
        starts = range(0, sealed.nbytes, step)
        view = self._lease(sealed.nbytes - _TAG_NBYTES * len(starts))
        for number, start in enumerate(starts):
            piece = sealed[start : start + step]
            at = start - _TAG_NBYTES * number
            try:
                self._aes.decrypt_into(next(nonces), piece, None, view[at : at + piece.nbytes - _TAG_NBYTES])
            except InvalidTag:
                raise CorruptDataError("a frame is not what was encrypted") from None
        return view


def _nonces(first: int) -> Iterator[bytes]:
    return (number.to_bytes(12, "little") for number in itertools.count(first))
