"""Shards on a device in the tiers: their account is DEVICE's, and they go down to HOST and DISK as anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import device_standin
import numpy as np

from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.device import DeviceFrames, HostFrames
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.shards import DeviceChunkName, DeviceShardStore, ShardStore
from dask_gpurt.memory.spiller import Spiller
from dask_gpurt.memory.store import DictBufferStore
from dask_gpurt.shuffle.device import DeviceBody
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.shelves import Shelves, TieredReservation
from dask_gpurt.shuffle.wire import Header, Kind

BODY_NBYTES = 100_000


class Ranks:
    """The order in which names are used, also of those that have gone down."""

    def uses(self, names: Sequence[Any]) -> list[Use]:
        keys = [name.key if isinstance(name, DeviceFrames) else name for name in names]
        return [key.use if isinstance(key, DeviceChunkName) else IDLE for key in keys]


class Tiers(NamedTuple):
    ledger: Ledger
    device: Mover
    host: Mover
    store: DeviceShardStore


@asynccontextmanager
async def tiers(path: Path, device_nbytes: int, host_nbytes: int = 2**30) -> AsyncIterator[Tiers]:
    folder = SpillFolder(str(path), BlockPool(2**20))
    ledger = Ledger({Tier.DEVICE: device_nbytes, Tier.HOST: host_nbytes})
    lost: list[object] = []
    loop = asyncio.get_running_loop()
    host = Mover(Spiller(ledger, Ranks()), DiskStore(folder), loop, lambda *a: lost.append(a))
    spiller = Spiller(ledger, Ranks(), upper=Tier.DEVICE, lower=None)
    device = Mover(spiller, HostFrames(host), loop, lambda *a: lost.append(a), threads=1)
    try:
        yield Tiers(ledger, device, host, DeviceShardStore(device))
        assert not lost
        for mover in (device, host):
            await mover.settle()
        assert not any(ledger.used(tier) for tier in Tier), ledger
    finally:
        await device.close()
        await host.close()
        folder.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def body(number: int) -> DeviceBody:
    library = device_standin.library()
    return DeviceBody(library, device_standin.asarray(np.full(BODY_NBYTES, number, np.uint8)))


def value(found: Any) -> int:
    assert isinstance(found, DeviceBody)
    (number,) = np.unique(device_standin.asnumpy(found.array)).tolist()
    return int(number)


def test_bodies_count_on_the_device_and_headers_stay_on_the_host(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path, 10 * BODY_NBYTES) as (ledger, _, _, store):
            store.put("a", [b"head", body(1)], await store.reserve(BODY_NBYTES + 4))
            assert (ledger.held(Tier.DEVICE), ledger.reserved(Tier.DEVICE)) == (BODY_NBYTES, 0)
            assert ledger.used(Tier.HOST) == 0
            head, found = await store.take("a")
            assert (head, value(found)) == (b"head", 1)
            assert await store.take("a") == []

    run(main())


def test_under_pressure_they_go_down_and_come_back_as_they_were(tmp_path: Path) -> None:
    async def main() -> None:
        library = device_standin.library()
        # A third of them fits on the device, a third on the host.
        async with tiers(tmp_path, 3 * BODY_NBYTES, 3 * BODY_NBYTES) as (ledger, device, host, store):
            before = library.downs
            for number in range(9):
                paid = await store.reserve(BODY_NBYTES)
                store.put_all([(f"{number}", [b"head", body(number)], number)], paid)
                await device.settle()
                await host.settle()
                assert ledger.used(Tier.DEVICE) <= 3 * BODY_NBYTES
            assert ledger.held(Tier.DISK) > 0
            assert library.downs - before >= 6
            # What is needed last went first.
            assert device.absent
            assert min(chunk.rank for chunk in device.absent if isinstance(chunk, DeviceChunkName)) > 0
            for number in range(9):
                _, found = await store.take(f"{number}")
                assert value(found) == number

    run(main())


def test_a_body_that_cannot_come_up_is_taken_from_the_host(tmp_path: Path) -> None:
    async def main() -> None:
        library = device_standin.library()
        async with tiers(tmp_path, BODY_NBYTES) as (_, device, _, store):
            for number in range(2):
                store.put(f"{number}", [b"head", body(number)], await store.reserve(BODY_NBYTES), rank=number)
            await device.settle()
            (absent,) = device.absent
            assert isinstance(absent, DeviceChunkName)
            library.failing = 1
            _, found = await store.take(absent.name)
            assert library.failing == 0
            assert isinstance(found, memoryview)
            assert bytes(found) == bytes([absent.rank]) * BODY_NBYTES
            # And the other one was not touched.
            (kept,) = {"0", "1"} - {absent.name}
            assert value((await store.take(kept))[1]) == int(kept)

    run(main())


def test_what_is_discarded_is_gone_from_all_tiers(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path, 1) as (ledger, device, _, store):
            for number in range(4):
                store.put("a", [b"head", body(number)], await store.reserve(BODY_NBYTES))
            await device.settle()
            assert ledger.held(Tier.HOST) > 0
            store.discard("a")
            store.discard("a")

    run(main())


def parcel(number: int, content: Any, nbytes: int) -> Parcel:
    return Parcel(Header(Kind.BRICK, (number,), np.array([[number, 0, 1]]), nbytes), content, nbytes)


def shelves(host: Any, device: Any) -> Shelves:
    async def offload(function: Any, *args: Any) -> Any:
        return function(*args)

    return Shelves(
        host,
        device,
        ready=lambda parcel: (0, [b"", parcel.body]),
        pack=lambda parcels: {0: [parcel.body for parcel in parcels]},
        offload=offload,
        name="run",
        ranks={0: 0},
    )


def test_each_body_is_paid_for_where_it_lies(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path, 2**30) as (ledger, _, host, store):
            both = shelves(ShardStore(host), store)
            paid = TieredReservation(await host.reserve(5), await store.reserve(BODY_NBYTES))
            await both.add([parcel(0, b"shard", 5), parcel(1, body(7), BODY_NBYTES)], paid)
            assert (paid.host.nbytes, paid.device.nbytes) == (0, 0)
            assert (ledger.used(Tier.HOST), ledger.used(Tier.DEVICE)) == (5, BODY_NBYTES)
            assert both.put_nbytes == 5 + BODY_NBYTES
            # Uninstalled in between, nothing is lost.
            await both.move(DictBufferStore(), DictBufferStore())
            assert (ledger.used(Tier.HOST), ledger.used(Tier.DEVICE)) == (0, 0)
            await both.flush()
            empty, shard, head, found = await both.take(0)
            assert (empty, shard, head, value(found)) == (b"", b"shard", b"", 7)
            await both.close()

    run(main())


def test_what_arrives_after_the_end_is_dropped(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path, 2**30) as (_, _, host, store):
            both = shelves(ShardStore(host), store)
            await both.close()
            await both.add([parcel(0, body(1), BODY_NBYTES)])

    run(main())
