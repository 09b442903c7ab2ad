"""What every BufferStore does: the fake, and the tiers with room, without room, with hardly any, and with more of them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore, ObjectStore
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.memory.shards import ChunkName, ShardStore
from dask_gpurt.memory.spiller import Spiller
from dask_gpurt.memory.store import Buffer, BufferStore, DictBufferStore

Make = Callable[[], AbstractAsyncContextManager[BufferStore]]
LIMITS = {"roomy": 2**30, "tight": 200_000, "tiny": 1}


class Ranks:
    def uses(self, names: Sequence[Any]) -> list[Use]:
        return [name.use if isinstance(name, ChunkName) else IDLE for name in names]


#: What DISK may hold where there is an OBJECT tier, and where that is.
BELOW = {"objects": (1, "file"), "disk and objects": (150_000, "memory"), "s3": (1, "s3")}


@pytest.fixture(params=["dict", *LIMITS, *BELOW])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    server = request.getfixturevalue("s3") if request.param == "s3" else None

    @asynccontextmanager
    async def opened() -> Any:
        if request.param == "dict":
            yield DictBufferStore()
            return
        pool = BlockPool(2**20)
        folder = SpillFolder(str(tmp_path), pool)
        disk_nbytes, protocol = BELOW.get(request.param, (None, ""))
        objects = None
        if protocol:
            place = {"file": tmp_path, "memory": "spilled", "s3": f"{getattr(server, 'bucket', '')}/folder"}[protocol]
            objects = ObjectFolder(f"{protocol}://{place}", pool)
        ledger = Ledger({Tier.HOST: LIMITS.get(request.param, LIMITS["tight"]), Tier.DISK: disk_nbytes})
        lost: list[object] = []
        loop = asyncio.get_running_loop()
        mover = Mover(
            Spiller(ledger, Ranks(), overflow=Tier.OBJECT if objects else None),
            DiskStore(folder),
            loop,
            lambda *a: lost.append(a),
            overflow=ObjectStore(objects) if objects else None,
        )
        try:
            yield ShardStore(mover)
            assert not lost
            await mover.settle()
            assert ledger.used(Tier.HOST) == 0, "everything was taken or discarded"
            assert ledger.used(Tier.DISK) == 0
            assert ledger.used(Tier.OBJECT) == 0
        finally:
            await mover.close()
            folder.close()
            if objects is not None:
                objects.close()
        assert os.listdir(tmp_path) == []

    return opened


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def test_what_goes_to_disk_and_comes_back_is_told(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            told: dict[str, int] = {"write": 0, "read": 0}

            def meter(action: str, nbytes: int) -> None:
                told[action] += nbytes

            names = [f"n{number}" for number in range(20)]
            for number, name in enumerate(names):
                store.put(name, [os.urandom(50_000)], await store.reserve(50_000), rank=number, meter=meter)
                await put(store, "others", b"x")
            for name in names:
                assert sum(len(buffer) for buffer in await store.take(name)) == 50_000
            await store.take("others")
            if store.limit_nbytes is None or store.limit_nbytes > 20 * 50_000:
                assert told == {"write": 0, "read": 0}
            else:
                assert 0 < told["read"] <= told["write"] < 2 * 20 * 50_000

    run(main())


async def put(store: BufferStore, name: str, *buffers: Buffer, rank: int = 0) -> None:
    reservation = await store.reserve(sum(memoryview(b).nbytes for b in buffers))
    store.put(name, buffers, reservation, rank=rank)


def joined(buffers: list[Buffer]) -> bytes:
    return b"".join(bytes(b) for b in buffers)


def test_taking_returns_everything_in_order_and_removes_it(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            await put(store, "a", b"one", bytearray(b"two"))
            await put(store, "a", memoryview(b"three"))
            assert [bytes(b) for b in await store.take("a")] == [b"one", b"two", b"three"]
            assert await store.take("a") == []
            assert await store.take("never") == []

    run(main())


def test_names_do_not_mix(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            for number in range(50):
                await put(store, str(number % 7), number.to_bytes(2, "little") * 5000, rank=number)
            for name in range(7):
                expected = b"".join(n.to_bytes(2, "little") * 5000 for n in range(50) if n % 7 == name)
                assert joined(await store.take(str(name))) == expected

    run(main())


def test_large_and_empty_buffers(make: Make) -> None:
    async def main() -> None:
        large = bytes(range(256)) * 4096 * 6
        async with make() as store:
            await put(store, "a", b"", large, b"")
            await put(store, "a", large[:-1])
            await put(store, "empty")
            taken = await store.take("a")
            assert [memoryview(b).nbytes for b in taken] == [0, len(large), 0, len(large) - 1]
            assert joined(taken) == large + large[:-1]
            assert await store.take("empty") == []

    run(main())


def test_discarding(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            await put(store, "a", b"x" * 100_000)
            await put(store, "b", b"y" * 100_000)
            store.discard("a")
            store.discard("a")
            store.discard("never")
            assert await store.take("a") == []
            assert joined(await store.take("b")) == b"y" * 100_000

    run(main())


def test_a_name_can_be_used_again(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            for round_ in range(3):
                await put(store, "a", bytes([round_]) * 150_000)
                assert joined(await store.take("a")) == bytes([round_]) * 150_000

    run(main())


def test_a_reservation_can_be_given_back_twice(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            reservation = await store.reserve(100)
            assert reservation.nbytes == 100
            reservation.release()
            reservation.release()

    run(main())


def test_more_requests_than_room_all_end(make: Make) -> None:
    async def main() -> None:
        async with make() as store:

            async def one(number: int) -> None:
                await put(store, str(number), bytes([number]) * 60_000, rank=number)

            await asyncio.gather(*(one(number) for number in range(20)))
            for number in range(20):
                assert joined(await store.take(str(number))) == bytes([number]) * 60_000

    run(main())


def test_a_request_that_is_cancelled_leaves_nothing(make: Make) -> None:
    async def main() -> None:
        async with make() as store:
            first = await store.reserve(10**6)
            waiting = asyncio.ensure_future(store.reserve(10**6))
            await asyncio.sleep(0)
            if waiting.done():
                waiting.result().release()
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            first.release()
            await put(store, "a", b"z" * 1000)
            assert joined(await store.take("a")) == b"z" * 1000

    run(main())
