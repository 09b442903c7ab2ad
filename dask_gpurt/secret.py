"""What the members of one installation know, and nobody else: by it they prove to each other who they are.

Covers: :class:`Secret`: signing, checking, and keys that are made of it.
Does not cover: how peers prove that they know it; see :mod:`dask_gpurt.shuffle.transport.handshake`.

The scheduler makes one for each installation, and gives it to the workers with the worker plugin, by Dask's own comms. It
is never written anywhere, and no ``repr`` shows it.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from typing import Self

__all__ = ["SEAL_NBYTES", "Secret"]

#: Size of what :meth:`Secret.sign` returns.
SEAL_NBYTES = 16
_KEY_NBYTES = 32


class Secret:
    """A key, and what is done with it: keyed BLAKE2b.

    Parameters
    ----------
    key
        32 bytes that nobody can guess.

    Examples
    --------
    >>> secret = Secret.new()
    >>> seal = secret.sign("greeting", b"who", b"whom")
    >>> secret.verifies(seal, "greeting", b"who", b"whom"), secret.verifies(seal, "greeting", b"whow", b"hom")
    (True, False)
    >>> secret
    <Secret>
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_NBYTES:
            # Not the key: it would stand in a log.
            raise ValueError(f"a secret has {_KEY_NBYTES} bytes, not {len(key)}")
        self._key = bytes(key)

    @classmethod
    def new(cls) -> Self:
        """Make one."""
        return cls(secrets.token_bytes(_KEY_NBYTES))

    def __repr__(self) -> str:
        return "<Secret>"

    def __reduce__(self) -> tuple[type[Secret], tuple[bytes]]:
        return Secret, (self._key,)

    def sign(self, purpose: str, *parts: bytes) -> bytes:
        """Return a seal for ``parts``, which is good for this purpose only."""
        return self._digest(purpose, parts, SEAL_NBYTES)

    def verifies(self, seal: bytes, purpose: str, *parts: bytes) -> bool:
        """Whether ``seal`` is that of ``parts``. Takes the same time whatever is wrong."""
        return hmac.compare_digest(seal, self._digest(purpose, parts, SEAL_NBYTES))

    def derive(self, purpose: str, *parts: bytes) -> Secret:
        """Return another secret, which says nothing about this one."""
        return Secret(self._digest(purpose, parts, _KEY_NBYTES))

    def _digest(self, purpose: str, parts: tuple[bytes, ...], nbytes: int) -> bytes:
        digest = hashlib.blake2b(key=self._key, person=purpose.encode(), digest_size=nbytes)
        for part in parts:
            # With its length: no two lists of parts are the same bytes.
            digest.update(struct.pack("<Q", len(part)))
            digest.update(part)
        return digest.digest()
