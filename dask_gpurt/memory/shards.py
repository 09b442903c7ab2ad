"""The shuffle's shards in the tiers: :class:`~dask_gpurt.memory.store.BufferStore` over the worker's own mover.

Theory of operation
-------------------
Shards and the values of Dask's keys lie in the same ledger, under the same limit, on the same disk, and go by the same
policy. What is put under one name is gathered into *chunks*: a chunk grows while it is small and in memory, so that many
small shards make few files. A shard that was cut from a larger piece of memory (a network message) is a chunk by itself,
and shares that memory with the others: it counts once, and is free when the last of them has gone. The rank of a name is
its distance to the next use.

Shards in the memory of a device are values of the DEVICE mover, one a buffer: they count in its account, and go down to
HOST, and on to DISK, as any device object does. Their headers, which are small and lie on the host, stay where they are.

Covers: names, chunks, ranks.
Does not cover: moving; see :mod:`dask_gpurt.memory.mover`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dask_gpurt.memory.horizon import Kind, Use
from dask_gpurt.memory.ledger import Reservation as LedgerReservation
from dask_gpurt.memory.lower import RawName
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.store import Buffer, DeviceBuffer, Meter, Reservation, buffer_nbytes

__all__ = ["ChunkName", "DeviceChunkName", "DeviceShardStore", "ShardStore"]

#: A chunk that is at least as large is not added to. Enough that a file of it is written at the speed of the disk.
CHUNK_NBYTES = 4 * 2**20


class DeviceChunkName:
    """Name of a buffer on a device to its mover; equal only to itself."""

    __slots__ = ("name", "rank")

    def __init__(self, name: str, rank: int) -> None:
        self.name = name
        self.rank = rank

    def __repr__(self) -> str:
        return f"<chunk of {self.name!r}>"

    @property
    def use(self) -> Use:
        """The next use."""
        return Use(Kind.NEXT, 1.0 + max(0, self.rank))


class ChunkName(DeviceChunkName, RawName):
    """Name of a chunk of host buffers to the mover; equal only to itself."""

    __slots__ = ("meter",)

    def __init__(self, name: str, rank: int, meter: Meter | None = None) -> None:
        super().__init__(name, rank)
        self.meter = meter


class ShardStore:
    """Byte buffers by name.

    Parameters
    ----------
    mover
        Holds the chunks.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        #: Name -> its chunks in order, and the bytes of the last one.
        self._chunks: dict[str, list[ChunkName]] = {}
        self._last_nbytes: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<ShardStore {len(self._chunks)} names, {self._mover.ledger!r}>"

    @property
    def limit_nbytes(self) -> int | None:
        """The limit of the tier."""
        return self._mover.ledger.limit(self._mover.tier)

    async def reserve(self, nbytes: int) -> Reservation:
        """Wait until ``nbytes`` may be held; see :class:`~dask_gpurt.memory.store.BufferStore`."""
        return await self._mover.reserve(nbytes)

    def put(
        self,
        name: str,
        buffers: Sequence[Buffer],
        reservation: Reservation,
        *,
        rank: int = 0,
        meter: Meter | None = None,
    ) -> None:
        """Hold ``buffers`` under ``name``, after what is there."""
        assert isinstance(reservation, LedgerReservation), reservation
        nbytes = _nbytes(buffers)
        chunks = self._chunks.setdefault(name, [])
        if chunks and self._last_nbytes[name] < CHUNK_NBYTES:
            chunks[-1].rank = rank
            if self._mover.grow(chunks[-1], buffers, reservation):
                self._last_nbytes[name] += nbytes
                return
        chunk = ChunkName(name, rank, meter)
        chunks.append(chunk)
        self._last_nbytes[name] = nbytes
        self._mover.put(chunk, list(buffers), reservation)

    def put_all(
        self,
        items: Iterable[tuple[str, Sequence[Buffer], int]],
        reservation: Reservation,
        *,
        meter: Meter | None = None,
    ) -> None:
        """Hold several; see :class:`~dask_gpurt.memory.store.BufferStore`."""
        assert isinstance(reservation, LedgerReservation), reservation
        seen: set[int] = set()
        for name, buffers, rank in items:
            nbytes = _nbytes(buffers)
            memory, memory_nbytes = _memory_of(buffers)
            if memory_nbytes <= nbytes:
                self.put(name, buffers, reservation.split(nbytes), rank=rank, meter=meter)
                continue
            # Paid for as a whole by the first of them.
            share = reservation.split(0 if memory in seen else memory_nbytes)
            seen.add(memory)
            chunk = ChunkName(name, rank, meter)
            self._chunks.setdefault(name, []).append(chunk)
            self._last_nbytes[name] = CHUNK_NBYTES
            self._mover.put(chunk, list(buffers), share, buffer=(memory, memory_nbytes))
        reservation.release()

    async def take(self, name: str) -> list[Buffer]:
        """Remove ``name`` and return its buffers in order; see :class:`~dask_gpurt.memory.store.BufferStore`."""
        chunks = self._chunks.pop(name, [])
        self._last_nbytes.pop(name, None)
        taken: list[Buffer] = []
        try:
            while chunks:
                pinned = await self._mover.ensure(chunks[:1])
                taken.extend(self._mover.get(chunks[0]))  # type: ignore[arg-type]
                self._mover.unpin(pinned)
                self._mover.delete(chunks.pop(0))
        finally:
            for chunk in chunks:
                if chunk in self._mover:
                    self._mover.delete(chunk)
        return taken

    def discard(self, name: str) -> None:
        """Forget ``name``, wherever it lies."""
        self._last_nbytes.pop(name, None)
        for chunk in self._chunks.pop(name, ()):
            if chunk in self._mover:
                self._mover.delete(chunk)


class DeviceShardStore:
    """Buffers on a device by name, with those of the host that are among them.

    Parameters
    ----------
    mover
        The DEVICE mover.
    """

    def __init__(self, mover: Mover) -> None:
        self._mover = mover
        #: Name -> what is held, in order: a buffer of the host, or the name of one on the device.
        self._held: dict[str, list[Buffer | DeviceChunkName]] = {}

    def __repr__(self) -> str:
        return f"<DeviceShardStore {len(self._held)} names, {self._mover.ledger!r}>"

    @property
    def limit_nbytes(self) -> int | None:
        """The limit of the tier."""
        return self._mover.ledger.limit(self._mover.tier)

    async def reserve(self, nbytes: int) -> Reservation:
        """Wait until ``nbytes`` may be held; see :class:`~dask_gpurt.memory.store.BufferStore`."""
        return await self._mover.reserve(nbytes)

    def put(
        self,
        name: str,
        buffers: Sequence[Buffer | DeviceBuffer],
        reservation: Reservation,
        *,
        rank: int = 0,
        meter: Meter | None = None,  # noqa: ARG002  this tier is not above DISK
    ) -> None:
        """Hold ``buffers`` under ``name``, after what is there."""
        assert isinstance(reservation, LedgerReservation), reservation
        held = self._held.setdefault(name, [])
        for buffer in buffers:
            if not isinstance(buffer, DeviceBuffer):
                held.append(buffer)
                continue
            chunk = DeviceChunkName(name, rank)
            self._mover.put(chunk, buffer, reservation.split(buffer.nbytes))
            held.append(chunk)
        reservation.release()

    def put_all(
        self,
        items: Iterable[tuple[str, Sequence[Buffer | DeviceBuffer], int]],
        reservation: Reservation,
        *,
        meter: Meter | None = None,
    ) -> None:
        """Hold several; see :class:`~dask_gpurt.memory.store.BufferStore`."""
        for name, buffers, rank in items:
            self.put(name, buffers, reservation.split(sum(map(buffer_nbytes, buffers))), rank=rank, meter=meter)
        reservation.release()

    async def take(self, name: str) -> list[object]:
        """Remove ``name`` and return its buffers in order; see :class:`~dask_gpurt.memory.store.BufferStore`."""
        held = self._held.pop(name, [])
        taken: list[object] = []
        try:
            while held:
                chunk = held[0]
                if isinstance(chunk, DeviceChunkName):
                    pinned = await self._mover.ensure([chunk])
                    taken.append(self._mover.get(chunk))
                    self._mover.unpin(pinned)
                    self._mover.delete(chunk)
                else:
                    taken.append(chunk)
                del held[0]
        finally:
            self._delete(held)
        return taken

    def discard(self, name: str) -> None:
        """Forget ``name``, wherever it lies."""
        self._delete(self._held.pop(name, []))

    def _delete(self, held: Iterable[Buffer | DeviceChunkName]) -> None:
        for chunk in held:
            if isinstance(chunk, DeviceChunkName) and chunk in self._mover:
                self._mover.delete(chunk)


def _nbytes(buffers: Sequence[Buffer]) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def _memory_of(buffers: Sequence[Buffer]) -> tuple[int, int]:
    """Identity and size of the memory that the largest of ``buffers`` keeps alive."""
    largest = max((memoryview(buffer) for buffer in buffers), key=lambda view: view.nbytes)
    owner = largest.obj
    return id(owner), memoryview(owner).nbytes
