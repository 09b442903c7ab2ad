"""Where a shuffle keeps the shards it has received until they are unpacked: the protocol, and a fake of it.

Covers: :class:`BufferStore`, which the memory manager implements over its tiers, and :class:`DictBufferStore`, which
holds everything in a dict (tests, and workers on which the tiers cannot start).
Does not cover: the values of Dask's own keys; see :mod:`dask_gpurt.memory.mapping`.

All methods are called on the event loop of the worker. None of them blocks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

__all__ = ["Buffer", "BufferStore", "DeviceBuffer", "DictBufferStore", "Meter", "Reservation", "buffer_nbytes", "flat"]

Buffer = bytes | bytearray | memoryview

#: Called with "write" or "read", and the bytes that went to DISK or came from there.
Meter = Callable[[str, int], None]


class DeviceBuffer:
    """Base of contiguous buffers in the memory of a device, which are no :data:`Buffer`: nothing on the host can read them.

    They have to be values that distributed can serialize. One that went down may come back as a buffer of the host, where the
    device has no room for it.
    """

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def buffer_nbytes(buffer: Buffer | DeviceBuffer) -> int:
    """Bytes of a buffer, wherever it lies.

    Examples
    --------
    >>> buffer_nbytes(b"abc"), buffer_nbytes(DeviceBuffer(5))
    (3, 5)
    """
    return buffer.nbytes if isinstance(buffer, DeviceBuffer) else memoryview(buffer).nbytes


def flat(buffer: Buffer) -> memoryview:
    """View a buffer of any shape as bytes.

    Examples
    --------
    >>> import numpy as np
    >>> flat(np.ones((2, 3)).data).shape, flat(np.ones((0, 3)).data).shape
    ((48,), (0,))
    """
    view = memoryview(buffer)
    # A view without elements cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


class Reservation(Protocol):
    """The right to hold so many bytes. It is given back by :meth:`release`, or with the data that it became."""

    nbytes: int

    def release(self) -> None:
        """Give back what is left of the reservation; calling it again does nothing."""

    def split(self, nbytes: int) -> Reservation:
        """Move up to ``nbytes`` of it into a reservation of its own."""


class BufferStore(Protocol):
    """A store of byte buffers by name that goes down the tiers under pressure.

    One for buffers in the memory of a device takes those of the host among them too, which are to be small.
    """

    @property
    def limit_nbytes(self) -> int | None:
        """How much of this and of all else in its tier is held at most; None: there is no limit."""

    async def reserve(self, nbytes: int) -> Reservation:
        """Wait until ``nbytes`` may be held, spilling if need be.

        A single request that is larger than the limit is granted once nothing else can be moved away: a worker whose
        limit is too small becomes slow, and does not hang.
        """

    def put(
        self,
        name: str,
        buffers: Sequence[Any],
        reservation: Reservation,
        *,
        rank: int = 0,
        meter: Meter | None = None,
    ) -> None:
        """Hold ``buffers`` under ``name``, appended to what is there. The reservation is consumed.

        ``rank`` orders the names by next use: of two names, the one with the higher rank is needed later, and is
        spilled first. ``meter``, one for a name, is told on the event loop what of buffers of the host goes to DISK and
        comes back; it must not call the store.
        """

    def put_all(
        self,
        items: Iterable[tuple[str, Sequence[Any], int]],
        reservation: Reservation,
        *,
        meter: Meter | None = None,
    ) -> None:
        """Put several (name, buffers, rank) that may lie in one piece of memory, which is counted once."""

    async def take(self, name: str) -> list[Any]:
        """Remove ``name`` and return all its buffers in the order in which they were put; empty if there are none.

        Raises
        ------
        SpillError
            If a buffer cannot be read back, or is not what was written (:class:`CorruptDataError`).
        """

    def discard(self, name: str) -> None:
        """Forget ``name``, wherever it lies."""


class _Token:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes

    def release(self) -> None:
        self.nbytes = 0

    def split(self, nbytes: int) -> Reservation:
        nbytes = min(nbytes, self.nbytes)
        self.nbytes -= nbytes
        return _Token(nbytes)


class DictBufferStore:
    """A :class:`BufferStore` without tiers and without a limit.

    Examples
    --------
    >>> import asyncio
    >>> async def main():
    ...     store = DictBufferStore()
    ...     store.put("a", [b"x"], await store.reserve(1))
    ...     store.put("a", [b"y"], await store.reserve(1))
    ...     return await store.take("a"), await store.take("a")
    >>> asyncio.run(main())
    ([b'x', b'y'], [])
    """

    def __init__(self) -> None:
        self._held: dict[str, list[Any]] = {}

    @property
    def limit_nbytes(self) -> int | None:
        """There is none."""
        return None

    async def reserve(self, nbytes: int) -> Reservation:
        """Grant at once."""
        return _Token(nbytes)

    def put(
        self,
        name: str,
        buffers: Sequence[Any],
        reservation: Reservation,
        *,
        rank: int = 0,  # noqa: ARG002
        meter: Meter | None = None,  # noqa: ARG002
    ) -> None:
        """Hold the buffers in memory."""
        self._held.setdefault(name, []).extend(buffers)
        reservation.release()

    def put_all(
        self,
        items: Iterable[tuple[str, Sequence[Any], int]],
        reservation: Reservation,
        *,
        meter: Meter | None = None,
    ) -> None:
        """Hold the buffers in memory."""
        for name, buffers, rank in items:
            self.put(name, buffers, reservation, rank=rank, meter=meter)

    async def take(self, name: str) -> list[Any]:
        """Hand the buffers out."""
        return self._held.pop(name, [])

    def discard(self, name: str) -> None:
        """Forget the buffers."""
        self._held.pop(name, None)
