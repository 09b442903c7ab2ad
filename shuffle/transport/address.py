"""Who a peer is and how a delivery is named: addresses, incarnations, tags.

Covers: the encoding of an :class:`Address`, the layout of a tag, the :class:`Manifest` that goes before the frames of a
delivery, and the errors of the transport. Pure: no I/O.
Does not cover: what happens to a message with a given tag; see :mod:`dask_gpurt.shuffle.transport.inbox`.

Layout
    A *tag* has 64 bits: 2 for what the message is (:class:`Part`), 38 that name the incarnation of the sender, 24 that
    count its deliveries. So no two senders use the same tag, a tag says by itself whose it is, and one that a worker
    used before it was restarted on the same address is not taken for one of its successor's. Among 1,000 workers, two
    incarnations are the same with a probability of 2e-6.

    An *address* is magic (4 bytes), version (1), incarnation (8), then what UCX calls the address of a worker, then a seal
    (16) by the secret of the installation: an address that no member has made never reaches UCX.

    A *manifest* is the number of frames (8 bytes) and a hash of their sizes (8). It makes the check that both sides
    mean the same delivery independent of how many frames there are.
"""

from __future__ import annotations

import enum
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import xxhash

from dask_gpurt.errors import GpurtError
from dask_gpurt.secret import SEAL_NBYTES, Secret

__all__ = [
    "ADDRESS_NBYTES_MAX",
    "TAG_BITS",
    "Address",
    "Manifest",
    "Part",
    "TagCounter",
    "TransportError",
    "TransportUnavailable",
    "owner_of",
]

_MAGIC = b"GPUX"
_VERSION = 2
_PREFIX = struct.Struct("<4sBQ")
_MANIFEST = struct.Struct("<QQ")

#: An encoded address is no larger. UCX takes some 30 bytes for each device and transport.
ADDRESS_NBYTES_MAX = 4000

_COUNTER_BITS = 24
_OWNER_BITS = 38
_PART_SHIFT = _COUNTER_BITS + _OWNER_BITS
#: Bits of the tag of a delivery.
TAG_BITS = _PART_SHIFT


class TransportError(GpurtError, OSError):
    """A delivery did not arrive: the peer is gone, has withdrawn or refused it, or sent something else."""


class TransportUnavailable(GpurtError, RuntimeError):  # noqa: N818  a fact about this machine, as ModuleNotFoundError is
    """The transport cannot be used here; the message says why."""


class Part(enum.IntEnum):
    """What a message is in its delivery."""

    #: One of the buffers.
    FRAME = 0
    #: How many frames follow, and of what sizes.
    MANIFEST = 1
    #: The sender has given up: what was not taken yet is to be refused.
    WITHDRAWAL = 2
    #: Of no delivery: peers prove who they are.
    GREETING = 3


@dataclass(frozen=True)
class Address:
    """Where a peer is reached, and which incarnation of it.

    Parameters
    ----------
    incarnation
        Chosen at random when the transport was opened.
    ucx
        Address of its UCX worker.
    """

    incarnation: int
    ucx: bytes

    @classmethod
    def new(cls, ucx: bytes) -> Self:
        """Return the address of a new incarnation."""
        return cls(secrets.randbits(_OWNER_BITS), ucx)

    def encode(self, secret: Secret) -> bytes:
        """Return the form that travels over Dask's comms, and in greetings."""
        body = _PREFIX.pack(_MAGIC, _VERSION, self.incarnation) + self.ucx
        return body + secret.sign("address", body)

    @classmethod
    def decode(cls, encoded: bytes, secret: Secret) -> Self:
        """Read what :meth:`encode` wrote.

        Raises
        ------
        TransportError
            If it is not an address of this version, or nobody who knows the secret has made it.

        Examples
        --------
        >>> secret = Secret.new()
        >>> Address.decode(Address(7, b"ucx").encode(secret), secret)
        Address(incarnation=7, ucx=b'ucx')
        """
        if not isinstance(encoded, bytes | bytearray | memoryview):
            raise TransportError(f"a {type(encoded).__name__} is no address")
        encoded = bytes(encoded)
        if not _PREFIX.size + SEAL_NBYTES < len(encoded) <= ADDRESS_NBYTES_MAX:
            raise TransportError(f"{len(encoded)} bytes are no address")
        magic, version, incarnation = _PREFIX.unpack_from(encoded)
        if (magic, version) != (_MAGIC, _VERSION) or incarnation >> _OWNER_BITS:
            raise TransportError(f"not an address of version {_VERSION}: {encoded[: _PREFIX.size]!r}")
        if not secret.verifies(encoded[-SEAL_NBYTES:], "address", encoded[:-SEAL_NBYTES]):
            raise TransportError("the address is none of this installation")
        return cls(incarnation, encoded[_PREFIX.size : -SEAL_NBYTES])


class TagCounter:
    """Numbers the deliveries of one incarnation."""

    def __init__(self, incarnation: int) -> None:
        self._owner = incarnation << _COUNTER_BITS
        self._next = 0

    def next(self) -> int:
        """Return a tag that no delivery under way has; numbers are used again after 16 million deliveries."""
        tag = self._owner | self._next
        self._next = (self._next + 1) % (1 << _COUNTER_BITS)
        return tag


def owner_of(tag: int) -> int:
    """Return the incarnation that a tag belongs to.

    Examples
    --------
    >>> counter = TagCounter(5)
    >>> owner_of(counter.next()), owner_of(counter.next())
    (5, 5)
    """
    return (tag >> _COUNTER_BITS) & ((1 << _OWNER_BITS) - 1)


def on_wire(tag: int, part: Part) -> int:
    """Return the tag of a message from the tag of its delivery."""
    return tag | (part << _PART_SHIFT)


def off_wire(wire_tag: int) -> tuple[int, int]:
    """Return the tag of the delivery, and what the message is."""
    return wire_tag & ((1 << _PART_SHIFT) - 1), wire_tag >> _PART_SHIFT


@dataclass(frozen=True)
class Manifest:
    """How many frames a delivery has, and a hash of their sizes."""

    count: int
    digest: int

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Self:
        """Return the manifest of frames of these sizes."""
        return cls(len(sizes), xxhash.xxh3_64_intdigest(struct.pack(f"<{len(sizes)}Q", *sizes)))

    def encode(self) -> bytes:
        """Return the form that is sent."""
        return _MANIFEST.pack(self.count, self.digest)

    @classmethod
    def decode(cls, encoded: bytes) -> Self:
        """Read what :meth:`encode` wrote."""
        return cls(*_MANIFEST.unpack(encoded))


#: Size of an encoded manifest.
MANIFEST_NBYTES = _MANIFEST.size
