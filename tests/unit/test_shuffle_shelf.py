"""The shelf: staging, packing, taking, moving, and what it does when the store cannot."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pytest

from dask_gpurt.errors import SpillError
from dask_gpurt.memory.store import Buffer, DictBufferStore, Reservation
from dask_gpurt.seams import P2POutOfDiskError
from dask_gpurt.shuffle.shelf import STAGE_NBYTES, Parcel, Shelf
from dask_gpurt.shuffle.wire import Header, Kind

WHOLE_NBYTES = 77


class CountingStore(DictBufferStore):
    """A store that knows what is reserved, and can be made to wait or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved: list[Reservation] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None

    async def reserve(self, nbytes: int) -> Reservation:
        await self.open.wait()
        if self.error is not None:
            raise self.error
        reservation = await super().reserve(nbytes)
        self.reserved.append(reservation)
        return reservation

    @property
    def reserved_nbytes(self) -> int:
        return sum(reservation.nbytes for reservation in self.reserved)

    @property
    def names(self) -> set[str]:
        return set(self._held)


def parcel(number: int, partitions: Sequence[int], nbytes: int = 10) -> Parcel:
    segments = np.array([[partition, 1] for partition in partitions])
    return Parcel(Header(Kind.FRAME, (number,), segments, nbytes), b"x" * nbytes, nbytes)


def ready(item: Parcel) -> tuple[Hashable, list[Buffer]] | None:
    return (item.header.segments[0, 0].item(), [b"whole"]) if item.nbytes == WHOLE_NBYTES else None


def pack(parcels: Sequence[Parcel]) -> dict[Hashable, list[Buffer]]:
    packed: dict[Hashable, list[Buffer]] = {}
    for item in parcels:
        for partition in item.header.segments[:, 0].tolist():
            packed.setdefault(partition, []).append(b"%d" % item.header.input_id[0])
    return packed


async def offload(function: Any, *args: Any) -> Any:
    return await asyncio.to_thread(function, *args)


def shelf_of(store: DictBufferStore) -> Shelf:
    return Shelf(store, ready=ready, pack=pack, offload=offload, name="id-1", ranks={0: 0, 1: 1, (2, 3): 2})


def test_parcels_are_staged_then_packed_by_partition() -> None:
    async def main() -> None:
        store = CountingStore()
        shelf = shelf_of(store)
        await shelf.add([parcel(0, [0, 1])])
        await shelf.add([parcel(1, [1])])
        assert (shelf.staged_nbytes, store.reserved_nbytes, store.names) == (20, 20, set())
        await shelf.flush()
        assert (shelf.staged_nbytes, store.reserved_nbytes, store.names) == (0, 0, {"id-1-0", "id-1-1"})
        assert await shelf.take(1) == [b"0", b"1"]
        assert await shelf.take(1) == []
        assert shelf.partitions == 1
        await shelf.close()
        assert store.names == set()

    asyncio.run(main())


def test_large_parcels_are_packed_at_once() -> None:
    async def main() -> None:
        store = CountingStore()
        shelf = shelf_of(store)
        await shelf.add([parcel(0, [0], STAGE_NBYTES)])
        assert store.names == {"id-1-0"}
        assert store.reserved_nbytes == 0

    asyncio.run(main())


def test_what_is_ready_is_not_packed() -> None:
    async def main() -> None:
        store = CountingStore()
        shelf = shelf_of(store)
        await shelf.add([parcel(0, [0], WHOLE_NBYTES), parcel(1, [1]), parcel(2, [1], WHOLE_NBYTES)])
        assert (shelf.staged_nbytes, store.names) == (10, {"id-1-0", "id-1-1"})
        await shelf.flush()
        assert store.reserved_nbytes == 0
        assert await shelf.take(0) == [b"whole"]
        assert await shelf.take(1) == [b"whole", b"1"]

    asyncio.run(main())


def test_flush_waits_for_parcels_that_are_coming_in() -> None:
    async def main() -> None:
        store = CountingStore()
        shelf = shelf_of(store)
        store.open.clear()
        adding = asyncio.create_task(shelf.add([parcel(7, [0])]))
        await asyncio.sleep(0)
        flushing = asyncio.create_task(shelf.flush())
        await asyncio.sleep(0)
        assert not flushing.done()
        store.open.set()
        await asyncio.gather(adding, flushing)
        assert await shelf.take(0) == [b"7"]

    asyncio.run(main())


def test_everything_moves_to_another_store() -> None:
    async def main() -> None:
        first, second = CountingStore(), CountingStore()
        shelf = shelf_of(first)
        await shelf.add([parcel(0, [0, 1])])
        await shelf.flush()
        await shelf.add([parcel(1, [1])])
        await shelf.move(second)
        assert (first.names, second.names) == (set(), {"id-1-0", "id-1-1"})
        await shelf.add([parcel(2, [0])])
        await shelf.flush()
        assert await shelf.take(0) == [b"0", b"2"]
        assert await shelf.take(1) == [b"0", b"1"]

    asyncio.run(main())


def test_what_comes_after_the_end_is_not_kept() -> None:
    async def main() -> None:
        store = CountingStore()
        shelf = shelf_of(store)
        await shelf.add([parcel(0, [0])])
        store.open.clear()
        late = asyncio.create_task(shelf.add([parcel(1, [0])]))
        await asyncio.sleep(0)
        closing = asyncio.create_task(shelf.close())
        await asyncio.sleep(0)
        store.open.set()
        await asyncio.gather(late, closing)
        assert (store.names, store.reserved_nbytes, shelf.staged_nbytes) == (set(), 0, 0)

    asyncio.run(main())


def test_a_full_disk_is_what_distributed_calls_it() -> None:
    async def main() -> None:
        store = CountingStore()
        shelf = shelf_of(store)
        store.error = SpillError(errno.ENOSPC, "full")
        with pytest.raises(P2POutOfDiskError):
            await shelf.add([parcel(0, [0])])
        store.error = SpillError("broken")
        with pytest.raises(SpillError, match="broken"):
            await shelf.add([parcel(0, [0])])

    asyncio.run(main())


def test_a_failed_packing_gives_the_reservations_back() -> None:
    async def main() -> None:
        def fail(parcels: Sequence[Parcel]) -> dict[Hashable, list[Buffer]]:
            raise ValueError(f"{len(parcels)} cannot be packed")

        store = CountingStore()
        shelf = Shelf(store, ready=ready, pack=fail, offload=offload, name="id-1", ranks={})
        await shelf.add([parcel(0, [0])])
        with pytest.raises(ValueError, match="1 cannot be packed"):
            await shelf.flush()
        assert store.reserved_nbytes == 0

    asyncio.run(main())
