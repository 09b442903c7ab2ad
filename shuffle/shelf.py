"""Shards that have arrived, until their output partition is unpacked.

Covers: the way of a parcel (what one input partition holds for this worker) into the buffer store, where its shards lie
by output partition.
Does not cover: the store and its tiers; see :mod:`dask_gpurt.memory.store`. The packing itself is given to the
constructor; see :mod:`dask_gpurt.shuffle.frames` and :mod:`dask_gpurt.shuffle.bricks`.

Theory of operation: a parcel that is one large shard goes into the store as it is. The others are *staged* until they have
:data:`STAGE_NBYTES`, then *packed* together, off the event loop: one buffer for each output partition. So a partition
has few buffers however many inputs there are, each of which owns its memory. Bytes are reserved in the store before they are staged, and given back right before the packed bytes are reserved: nothing waits
for a reservation while it holds another one, so that no two of them can wait for each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from dask_gpurt.errors import SpillError
from dask_gpurt.memory.store import BufferStore, Meter, Reservation, buffer_nbytes
from dask_gpurt.seams import P2POutOfDiskError
from dask_gpurt.shuffle.wire import Header

__all__ = ["STAGE_NBYTES", "Pack", "Parcel", "Ready", "Shelf"]

#: Parcels are packed once so much is staged. With 500 output partitions a packed buffer still has some ten kilobytes.
STAGE_NBYTES = 16 * 2**20


@dataclass(frozen=True, eq=False)
class Parcel:
    """What one input partition holds for this worker.

    Parameters
    ----------
    header
        Its shards.
    body
        A buffer, of the host or of a device.
    nbytes
        Size of the body in memory.
    """

    header: Header
    body: Any
    nbytes: int


#: Gives the output partition of a parcel that needs no packing, and the buffers that go into the store; or None.
Ready = Callable[[Parcel], tuple[Hashable, list[Any]] | None]
#: Packs parcels by output partition: for each, the buffers that go into the store. Runs in a thread.
Pack = Callable[[Sequence[Parcel]], dict[Hashable, list[Any]]]


class Shelf:
    """The arrived shards of one run. Used on one event loop only.

    Parameters
    ----------
    store
        Where packed shards lie.
    ready, pack
        How parcels are packed, if they have to be.
    offload
        Runs a function in a thread.
    name
        Prefix of the names in the store.
    ranks
        Output partition to the order in which it will be unpacked.
    meter
        Is told what goes to DISK and comes back.
    """

    def __init__(
        self,
        store: BufferStore,
        *,
        ready: Ready,
        pack: Pack,
        offload: Callable[..., Awaitable[Any]],
        name: str,
        ranks: dict[Any, int],
        meter: Meter | None = None,
    ) -> None:
        self._store = store
        self._meter = meter
        self._ready = ready
        self._pack = pack
        self._offload = offload
        self._name = name
        self._ranks = ranks
        self._staged: list[tuple[Parcel, Reservation]] = []
        self._held: set[Any] = set()
        # Adding and taking go side by side; whoever needs all of it at rest holds the lock, and waits for the others.
        self._busy = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._alone = asyncio.Lock()
        self._closed = False
        self.staged_nbytes = 0
        #: Bytes ever put into the store, and taken from it.
        self.put_nbytes = 0
        self.taken_nbytes = 0

    def __repr__(self) -> str:
        return f"<Shelf {self._name}: {len(self._staged)} parcels staged, {len(self._held)} partitions held>"

    @property
    def partitions(self) -> int:
        """Output partitions of which something is held."""
        return len(self._held)

    async def add(self, parcels: Sequence[Parcel], paid: Reservation | None = None) -> None:
        """Take parcels in; when this returns, their bytes are the store's, or staged and reserved.

        ``paid`` is what was reserved for them; what is left of it stays the caller's, or is given back.
        """
        async with self._shared():
            finished: list[tuple[Hashable, list[Any]]] = []
            for parcel in parcels:
                if (done := self._ready(parcel)) is not None:
                    finished.append(done)
                    continue
                reservation = await self._reserve(parcel.nbytes, paid)
                if self._closed:
                    reservation.release()
                    return
                self._staged.append((parcel, reservation))
                self.staged_nbytes += parcel.nbytes
            del parcels
            await self._put(finished, paid)
            if self.staged_nbytes >= STAGE_NBYTES:
                if paid is not None:
                    paid.release()
                await self._pack_staged()

    async def _reserve(self, nbytes: int, paid: Reservation | None) -> Reservation:
        if paid is not None:
            return paid.split(nbytes)
        with _out_of_disk():
            return await self._store.reserve(nbytes)

    async def _put(self, packed: Sequence[tuple[Hashable, list[Any]]], paid: Reservation | None = None) -> None:
        nbytes = sum(buffer_nbytes(buffer) for _, buffers in packed for buffer in buffers)
        if not nbytes:
            return
        reservation = await self._reserve(nbytes, paid)
        if self._closed:
            reservation.release()
            return
        items = [(self._name_of(partition), buffers, self._ranks[partition]) for partition, buffers in packed]
        self._store.put_all(items, reservation, meter=self._meter)
        self._held.update(partition for partition, _ in packed)
        self.put_nbytes += nbytes

    async def flush(self) -> None:
        """Pack all that is staged."""
        if not self._staged and not self._busy and not self._alone.locked():
            return
        async with self._at_rest():
            await self._pack_staged()

    async def take(self, partition: Any) -> list[Any]:
        """Remove the shards of an output partition; header and body alternate. Call :meth:`flush` before."""
        async with self._shared():
            self._held.discard(partition)
            with _out_of_disk():
                buffers = await self._store.take(self._name_of(partition))
        self.taken_nbytes += sum(buffer_nbytes(buffer) for buffer in buffers)
        return buffers

    async def move(self, store: BufferStore) -> None:
        """Move everything to another store."""
        async with self._at_rest():
            await self._pack_staged()
            for partition in sorted(self._held, key=lambda partition: self._ranks[partition]):
                name = self._name_of(partition)
                buffers = await self._store.take(name)
                nbytes = sum(buffer_nbytes(buffer) for buffer in buffers)
                reservation = await store.reserve(nbytes)
                store.put(name, buffers, reservation, rank=self._ranks[partition], meter=self._meter)
            self._store = store

    async def close(self) -> None:
        """Forget everything."""
        self._closed = True
        for _, reservation in self._staged:
            reservation.release()
        self._staged.clear()
        self.staged_nbytes = 0
        async with self._at_rest():
            for partition in self._held:
                self._store.discard(self._name_of(partition))
            self._held.clear()

    def _name_of(self, partition: Any) -> str:
        part = "_".join(map(str, partition)) if isinstance(partition, tuple) else str(partition)
        return f"{self._name}-{part}"

    @contextlib.asynccontextmanager
    async def _shared(self) -> AsyncGenerator[None]:
        async with self._alone:
            self._busy += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def _at_rest(self) -> AsyncGenerator[None]:
        async with self._alone:
            # Newcomers wait for the lock; those who are at it need nothing that is held here.
            await self._idle.wait()
            yield

    async def _pack_staged(self) -> None:
        staged, self._staged = self._staged, []
        self.staged_nbytes = 0
        if not staged:
            return
        try:
            packed = await self._offload(self._pack, [parcel for parcel, _ in staged])
        finally:
            for _, reservation in staged:
                reservation.release()
        staged.clear()
        while packed:
            await self._put([packed.popitem()])


@contextlib.contextmanager
def _out_of_disk() -> Generator[None]:
    """Raise a full disk as the error that distributed knows."""
    try:
        yield
    except SpillError as error:
        cause = error.__cause__
        if errno.ENOSPC in (error.errno, cause.errno if isinstance(cause, OSError) else None):
            raise P2POutOfDiskError from error
        raise
