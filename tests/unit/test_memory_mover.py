"""The mover, its codec and the mapping, without a worker: faults, races, and a dict as the model."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest
from distributed.protocol.serialize import dask_deserialize, dask_serialize
from fsspec.implementations.memory import MemoryFileSystem

from dask_gpurt.errors import CorruptDataError, SpillError
from dask_gpurt.memory import codec
from dask_gpurt.memory import events as ev
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.device import HostFrames, on_device
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import DYING, FAR, IDLE, RUNNING, Kind, Snapshot, Use, Word, next_use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore, ObjectStore
from dask_gpurt.memory.mapping import TieredMapping, serving
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.memory.policy import Candidate, cost_per_byte, order
from dask_gpurt.memory.spiller import Spiller, State

CHUNK = 100_000


class Seen:
    """A horizon that is told."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Use] = {}

    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [self.known.get(name, IDLE) for name in names]


@dataclass
class Rig:
    mover: Mover
    folder: SpillFolder
    horizon: Seen
    lost: list[tuple[Hashable, Exception]] = field(default_factory=list)

    def state(self, name: Hashable) -> State:
        return self.mover.spiller.blocks[name].state

    @property
    def held(self) -> int:
        return self.mover.ledger.held(Tier.HOST)

    def files(self) -> list[str]:
        return [os.path.join(self.folder.path, name) for name in sorted(os.listdir(self.folder.path))]


@asynccontextmanager
async def rig(
    path: Path, limit: int | None = 3 * CHUNK, disk: int | None = None, url: str | None = None
) -> AsyncIterator[Rig]:
    folder = SpillFolder(str(path), BlockPool(2**24))
    objects = None if url is None else ObjectFolder(url, BlockPool(2**24))
    horizon = Seen()
    lost: list[tuple[Hashable, Exception]] = []
    ledger = Ledger({Tier.HOST: limit, Tier.DISK: disk})
    mover = Mover(
        Spiller(ledger, horizon, overflow=Tier.OBJECT if objects else None),
        DiskStore(folder),
        asyncio.get_running_loop(),
        lambda n, e: lost.append((n, e)),
        overflow=ObjectStore(objects) if objects else None,
    )
    try:
        yield Rig(mover, folder, horizon, lost)
    finally:
        await mover.close()
        folder.close()
        if objects is not None:
            objects.close()
    assert os.listdir(path) == []


@pytest.fixture
def url() -> Iterator[str]:
    yield "memory://overflow"
    fsspec.filesystem("memory").store.clear()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def chunk(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full(CHUNK, number, dtype="u1")


async def filled(r: Rig, count: int) -> None:
    for number in range(count):
        r.mover.put(number, chunk(number))
        await r.mover.settle()


# Moving


def test_what_does_not_fit_goes_down_and_comes_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 10)
            assert r.held <= 3 * CHUNK
            assert len(r.mover.absent) == 7
            assert len(r.files()) == 7
            for number in range(10):
                pinned = await r.mover.ensure([number])
                value: Any = r.mover.get(number)
                r.mover.unpin(pinned)
                assert (value == number).all()
                assert value.flags.writeable
                assert r.held <= 3 * CHUNK
            for number in range(10):
                r.mover.delete(number)
            await r.mover.settle()
            assert r.held == 0
            assert r.files() == []

    run(main())


def test_a_clean_copy_is_not_written_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=CHUNK) as r:
            await filled(r, 2)
            written = r.mover.written_nbytes
            for number in [0, 1, 0, 1]:
                r.mover.unpin(await r.mover.ensure([number]))
                await r.mover.settle()
            assert r.mover.written_nbytes <= written + CHUNK + 1000
            assert r.mover.spiller.dropped_clean_nbytes >= 2 * CHUNK

    run(main())


def test_the_farthest_goes_first_and_the_running_stay(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.horizon.known = {
                0: Use(Kind.NEXT, 1), 1: Use(Kind.NEXT, 50), 2: RUNNING, 3: Use(Kind.NEXT, 2),
            }  # fmt: skip
            await filled(r, 4)
            assert set(r.mover.absent) == {1}

    run(main())


def test_views_of_one_array_count_once_and_go_together(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            base = chunk(7)
            r.mover.put("whole", base)
            r.mover.put("half", base[: CHUNK // 2])
            r.mover.put("other half", base[CHUNK // 2 :])
            assert r.held == CHUNK
            del base
            r.mover.press(CHUNK)
            await r.mover.settle()
            assert set(r.mover.absent) == {"whole", "half", "other half"}
            assert r.held == 0
            value: Any = r.mover.get("half")
            assert (value == 7).all()
            assert value.shape == (CHUNK // 2,)

    run(main())


def test_inputs_larger_than_the_limit_are_forced_through(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 8)
            tasks = [asyncio.create_task(r.mover.ensure(range(n, 8))) for n in range(3)]
            for task in asyncio.as_completed(tasks):
                pinned = await task
                assert not r.mover.absent & set(pinned)
                r.mover.unpin(pinned)
            await r.mover.settle()

    run(main())


def test_who_fetches_ahead_holds_up_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 8)
            absent = [name for name in range(8) if name in r.mover.absent]
            # More than may ever be held is not waited for.
            with pytest.raises(MemoryError, match="more than host may hold"):
                await r.mover.ensure(absent[:4], forceable=False)
            assert not any(block.pins for block in r.mover.spiller.blocks.values())
            # Somebody fetches ahead, and there is nothing that could go.
            held = await r.mover.ensure([name for name in range(8) if name not in r.mover.absent])
            ahead = asyncio.create_task(r.mover.ensure(absent[:2], forceable=False))
            await asyncio.sleep(0)
            assert r.mover.ledger.waiting(Tier.HOST) == 1
            # Half of what it wants becomes free, and a task takes that.
            r.mover.delete(held[0])
            waits = r.mover.waits
            reservation = await r.mover.reserve(CHUNK)
            assert not reservation.forced
            assert r.mover.waits == waits
            assert not ahead.done()
            reservation.release()
            r.mover.unpin(held[1:])
            r.mover.unpin(await ahead)

    run(main())


def test_values_of_many_kinds_come_back_equal(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "frame": pd.DataFrame({"a": range(1000), "b": ["x", "yy"] * 500}),
        "series": pd.Series(range(100), dtype="f4"),
        "list": [np.arange(10), "text", None],
        "dict": {"a": np.arange(5), "b": {1, 2}},
        "bytes": b"abc" * 100,
        "text": "words",
        "none": None,
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "strided": np.arange(100)[::3],
        "empty": np.zeros((0, 3)),
        "scalar": np.float64(3.5),
        "object": np.array([1, "two", None], dtype=object),
        "dates": np.array(["2020-01-01"], dtype="M8[D]"),
        "masked": np.ma.masked_array([1, 2, 3], mask=[False, True, False]),
        "broadcast": np.broadcast_to(np.arange(3), (1000, 3)),
        "exception": ValueError("kept"),
    }

    async def main() -> None:
        async with rig(tmp_path, limit=None) as r:
            for name, value in values.items():
                r.mover.put(name, value)
            r.mover.press(10**9)
            await r.mover.settle()
            for _ in range(30):
                r.mover.press(10**9)
                await r.mover.settle()
            assert r.mover.absent >= {"frame", "list", "dict", "strided", "masked", "object"}
            for name, value in values.items():
                got: Any = r.mover.get(name)
                assert type(got) is type(value), name
                if isinstance(value, pd.DataFrame | pd.Series):
                    assert got.equals(value)
                elif isinstance(value, np.ndarray):
                    np.testing.assert_array_equal(got, value)
                    assert got.dtype == value.dtype
                    assert got.flags.writeable == value.flags.writeable, name
                else:
                    assert repr(got) == repr(value)

    run(main())


class LyingSize:
    def __init__(self, nbytes: float) -> None:
        self.nbytes = nbytes

    def __sizeof__(self) -> int:
        return int(self.nbytes)


class BrokenSize:
    def __sizeof__(self) -> int:
        raise RuntimeError("no")


@pytest.mark.filterwarnings("ignore:Sizeof calculation")
def test_sizes_that_lie_do_no_harm(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.mover.put("broken", BrokenSize())
            r.mover.put("huge", LyingSize(10**12))
            r.mover.put("small", LyingSize(0))
            await r.mover.settle()
            got: Any = r.mover.get("huge")
            assert got.nbytes == 10**12
            for name in r.mover.names():
                r.mover.delete(name)
            assert r.held == 0

    run(main())


# Faults


class Unpicklable:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __sizeof__(self) -> int:
        return CHUNK


def test_what_cannot_be_serialized_stays_and_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            r.mover.put("stubborn", value := Unpicklable())
            await filled(r, 6)
            r.mover.press(10**9)
            await r.mover.settle()
            assert r.mover.get("stubborn") is value
            assert sum("Failed to serialize 'stubborn'" in m for m in caplog.messages) == 1
            assert set(r.mover.absent) == set(range(6))

    run(main())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_everything_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    honest = os.pwritev
    full = True

    def pwritev(fd: int, pieces: list[memoryview], offset: int) -> int:
        if full:
            raise OSError(number, os.strerror(number))
        return honest(fd, pieces, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr("dask_gpurt.memory.mover.RETRY_S", 0.02)

    async def main() -> None:
        nonlocal full
        loop = asyncio.get_running_loop()
        async with rig(tmp_path) as r:
            await filled(r, 8)
            assert not r.mover.absent
            assert r.files() == []
            assert r.mover.write_failures >= 1
            assert sum("Cannot spill" in m for m in caplog.messages) == 1
            # Nobody hangs: what is asked for is forced through.
            (await asyncio.wait_for(r.mover.reserve(CHUNK), 5)).release()
            full = False
            retried = asyncio.Event()
            honest_store = r.mover.lower.store

            def store(name: Hashable, value: object) -> Any:
                loop.call_soon_threadsafe(retried.set)
                return honest_store(name, value)

            r.mover.lower.store = store  # type: ignore[method-assign]
            await asyncio.wait_for(retried.wait(), 5)
            await r.mover.settle()
            assert r.mover.absent
            for n in range(8):
                assert (np.asarray(r.mover.get(n)) == n).all()

    run(main())


async def ask(r: Rig, name: Hashable, how: str) -> None:
    if how == "get":
        r.mover.get(name)
    elif how == "ensure":
        await r.mover.ensure([name, "unknown"])
    else:
        await r.mover.frames(name)


def flip(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(500)
        file.write(b"\xff\xfe")


@pytest.mark.parametrize("damage", [flip, os.unlink, lambda p: os.truncate(p, 100)])
@pytest.mark.parametrize("how", ["ensure", "get", "frames"])
def test_a_damaged_copy_is_never_returned(tmp_path: Path, damage: Any, how: str) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 5)
            victims = sorted(r.mover.absent, key=str)
            for path in r.files():
                damage(path)

            for name in victims:
                with pytest.raises(CorruptDataError):
                    await ask(r, name, how)
            await asyncio.sleep(0)
            assert sorted((n for n, _ in r.lost), key=str) == victims
            assert not any(name in r.mover for name in victims)
            for name in r.mover.names():
                assert (np.asarray(r.mover.get(name)) == name).all()

    run(main())


@pytest.mark.parametrize("tier", [Tier.DISK, Tier.OBJECT])
def test_a_tier_that_cannot_be_read_is_given_nothing_more(
    tmp_path: Path, url: str, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dask_gpurt.memory.objects.PAUSES_S", ())
    monkeypatch.setattr("dask_gpurt.memory.mover.RETRY_S", 60.0)

    async def main() -> None:
        async with rig(
            tmp_path, disk=1 if tier is Tier.OBJECT else None, url=url if tier is Tier.OBJECT else None
        ) as r:
            await filled(r, 4)
            (name,) = r.mover.absent
            with monkeypatch.context() as patch:
                patch.setattr(os, "preadv", refuse)
                patch.setattr(MemoryFileSystem, "cat_file", refuse)
                with pytest.raises(SpillError):
                    await r.mover.ensure([name])
                # What was moved away for it to come.
                below = set(r.mover.absent)
                for number in range(10, 14):
                    r.mover.put(number, chunk(number))
                    await r.mover.settle()
                assert r.mover.absent == below
            r.mover._retry_now()
            await r.mover.settle()
            assert r.held <= 3 * CHUNK
            for kept in r.mover.names():
                assert (np.asarray(r.mover.get(kept)) == kept).all()
            assert [n for n, _ in r.lost] == [name]

    run(main())


class Bomb:
    def __init__(self) -> None:
        self.payload = b"x" * CHUNK

    def __sizeof__(self) -> int:
        return CHUNK

    def __reduce__(self) -> Any:
        return explode, ()


def explode() -> None:
    raise ZeroDivisionError("in a constructor")


def test_what_does_not_deserialize_is_reported(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=None) as r:
            r.mover.put("bomb", Bomb())
            r.mover.press(CHUNK)
            await r.mover.settle()
            assert r.mover.absent == {"bomb"}
            with pytest.raises(CorruptDataError, match="ZeroDivisionError"):
                await r.mover.ensure(["bomb"])

    run(main())


# The overflow


def objects_of(r: Rig) -> list[str]:
    lower = r.mover.overflow
    assert isinstance(lower, ObjectStore)
    assert isinstance(lower.folder, ObjectFolder)
    fs = fsspec.filesystem("memory")
    return [path for path in fs.find(lower.folder.path) if path.endswith(".blk")]


def test_what_the_disk_may_not_hold_overflows(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, disk=2 * CHUNK, url=url) as r:
            await filled(r, 10)
            assert (len(r.files()), len(objects_of(r))) == (2, 5)
            assert r.mover.ledger.held(Tier.DISK) == 2 * CHUNK
            assert r.mover.ledger.held(Tier.OBJECT) == 5 * CHUNK
            host, disk, below = Tier.HOST, Tier.DISK, Tier.OBJECT
            assert r.mover.moves == {(host, disk): 2 * CHUNK, (host, below): 5 * CHUNK}
            for number in range(10):
                pinned = await r.mover.ensure([number])
                value: Any = r.mover.get(number)
                r.mover.unpin(pinned)
                assert (value == number).all()
                assert value.flags.writeable
            assert r.mover.moves[disk, host] + r.mover.moves[below, host] == r.mover.read_nbytes >= 7 * CHUNK
            assert r.mover.moves[disk, host] >= 2 * CHUNK
            assert r.mover.moves[below, host] > 0
            name = next(n for n in sorted(r.mover.absent, key=str) if r.mover.spiller.blocks[n].tier is Tier.OBJECT)
            found = await r.mover.frames(name)
            assert found is not None
            assert [bytes(frame) for frame in found[1]] == [bytes([int(str(name))]) * CHUNK]
            for number in range(10):
                r.mover.delete(number)
            await r.mover.settle()
            assert not any(r.mover.ledger.used(tier) for tier in Tier)
            assert (r.files(), objects_of(r)) == ([], [])
            assert not r.lost

    run(main())


def test_both_below_are_full(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, disk=2 * CHUNK, url=url) as r:
            r.mover.ledger.set_limit(Tier.OBJECT, CHUNK)
            await filled(r, 10)
            assert (len(r.files()), len(objects_of(r)), r.held) == (2, 1, 7 * CHUNK)
            for number in range(10):
                assert (np.asarray(r.mover.get(number)) == number).all()

    run(main())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_the_disk_refuses_overflows(
    tmp_path: Path, url: str, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", refuse)
    monkeypatch.setattr("dask_gpurt.memory.mover.RETRY_S", 60.0)

    async def main() -> None:
        async with rig(tmp_path, url=url) as r:
            await filled(r, 10)
            assert r.files() == []
            assert len(objects_of(r)) == 7
            assert r.mover.write_failures == 1
            for n in range(10):
                assert (np.asarray(r.mover.get(n)) == n).all()

    run(main())
    assert "Cannot spill to disk, data stays in memory, or overflows" in caplog.text


def test_nothing_is_lost_while_no_tier_takes_anything(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dask_gpurt.memory.mover.RETRY_S", 60.0)
    monkeypatch.setattr("dask_gpurt.memory.objects.PAUSES_S", ())

    async def main() -> None:
        async with rig(tmp_path, url=url) as r:
            with monkeypatch.context() as patch:
                patch.setattr(os, "pwritev", refuse)
                patch.setattr(MemoryFileSystem, "pipe_file", refuse)
                await filled(r, 8)
                assert not r.mover.absent
                assert r.mover.spiller.blocked == {Tier.DISK, Tier.OBJECT}
                (await asyncio.wait_for(r.mover.reserve(CHUNK), 5)).release()
            r.mover._retry_now()
            await r.mover.settle()
            assert r.held <= 3 * CHUNK
            for n in range(8):
                assert (np.asarray(r.mover.get(n)) == n).all()

    run(main())
    assert sum("Cannot spill" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("how", ["ensure", "get", "frames"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_object_is_never_returned(
    tmp_path: Path, url: str, damage: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dask_gpurt.memory.objects.PAUSES_S", ())

    async def main() -> None:
        async with rig(tmp_path, disk=CHUNK, url=url) as r:
            await filled(r, 6)
            blocks = r.mover.spiller.blocks
            victims = [n for n in sorted(r.mover.absent, key=str) if blocks[n].tier is Tier.OBJECT]
            assert len(victims) == 2
            fs = fsspec.filesystem("memory")
            for path in objects_of(r):
                body = fs.cat_file(path)
                if damage == "remove":
                    fs.rm_file(path)
                else:
                    fs.pipe_file(path, body[:-1] + bytes([body[-1] ^ 1]) if damage == "flip" else body[:-1])
            for name in victims:
                with pytest.raises(CorruptDataError):
                    await ask(r, name, how)
            await asyncio.sleep(0)
            assert [n for n, _ in r.lost] == victims
            assert not any(name in r.mover for name in victims)
            for name in r.mover.names():
                assert (np.asarray(r.mover.get(name)) == name).all()

    run(main())


def test_a_slow_overflow_does_not_hold_up_the_disk(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, disk=CHUNK, url=url) as r:
            go = threading.Event()
            overflow = r.mover.overflow
            assert overflow is not None
            honest = overflow.store

            def slow(name: Hashable, value: object) -> Any:
                go.wait(10)
                return honest(name, value)

            overflow.store = slow  # type: ignore[method-assign]
            # More writes under way there than it has threads, and than the disk has.
            for number in range(4 + 3):
                r.mover.put(number, chunk(number))
            on_disk = next(n for n, block in r.mover.spiller.blocks.items() if block.tier is Tier.DISK)
            while r.state(on_disk) is State.WRITING:
                await asyncio.wait([asyncio.wrap_future(f) for f in r.mover._pending], return_when="FIRST_COMPLETED")
                await asyncio.sleep(0)
            assert r.state(on_disk) is State.SPILLED
            assert any(block.state is State.WRITING for block in r.mover.spiller.blocks.values())
            assert await asyncio.wait_for(r.mover.frames(on_disk), 5)
            assert not go.is_set()
            go.set()
            await r.mover.settle()

    run(main())


# Races, as numbered interleavings


def test_1_write_2_delete_3_put_again_4_written(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=None) as r:
            go = threading.Event()
            honest = r.mover.lower.store

            def slow(name: Hashable, value: object) -> Any:
                go.wait(10)
                return honest(name, value)

            r.mover.lower.store = slow  # type: ignore[method-assign]
            r.mover.put("a", chunk(1))
            r.mover.press(CHUNK)
            assert r.state("a") is State.WRITING
            r.mover.delete("a")
            r.mover.put("a", chunk(2))
            go.set()
            await r.mover.settle()
            assert r.state("a") is State.RESIDENT
            assert (np.asarray(r.mover.get("a")) == 2).all()
            assert r.files() == []

    run(main())


def test_1_write_2_pin_3_written(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=None) as r:
            r.mover.put("a", chunk(1))
            r.mover.press(CHUNK)
            pinned = await r.mover.ensure(["a"])
            await r.mover.settle()
            assert r.state("a") is State.CLEAN
            r.mover.unpin(pinned)

    run(main())


def test_1_read_2_delete_3_raised(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 5)
            name = next(iter(r.mover.absent))
            waiting = asyncio.create_task(r.mover.ensure([name]))
            await asyncio.sleep(0)
            r.mover.delete(name)
            await waiting
            await r.mover.settle()
            assert name not in r.mover
            assert r.mover.ledger.reserved(Tier.HOST) == 0
            assert not r.lost

    run(main())


def test_1_wait_for_room_2_cancel(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 3)
            reservation = await r.mover.reserve(2 * CHUNK)
            waiting = asyncio.create_task(r.mover.ensure(list(r.mover.absent)))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            reservation.release()
            await r.mover.settle()
            assert r.mover.ledger.reserved(Tier.HOST) == 0
            assert not any(block.pins for block in r.mover.spiller.blocks.values())

    run(main())


def test_1_wait_for_room_2_close(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            await filled(r, 5)
            (below, *_) = [name for name in range(5) if name in r.mover.absent]
            # As a worker does that gives everything back: whoever waits for room then goes on, to find the values elsewhere.
            room = await r.mover.reserve(3 * CHUNK)
            waiting = asyncio.create_task(r.mover.ensure([below]))
            while not r.mover.waits:  # noqa: ASYNC110 - it is a turn of this very loop
                await asyncio.sleep(0)
            r.mover.set_limit(None)
            await r.mover.close()
            r.mover.unpin(await waiting)
            assert below in r.mover.absent
            assert await r.mover.frames(below) is None
            r.mover.unpin(await r.mover.ensure([below]))
            room.release()

    run(main())


def test_a_thread_that_reads_while_the_loop_moves(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=2 * CHUNK) as r:
            await filled(r, 6)

            enough = threading.Event()
            read = 0

            def reader() -> None:
                nonlocal read
                while read < 20 or not enough.is_set():
                    for number in range(6):
                        assert (np.asarray(r.mover.get(number)) == number).all()
                    read += 1

            work = asyncio.get_running_loop().run_in_executor(None, reader)
            # Pairs in turn: each time something has to move. A loop that found all in place would do nothing but take
            # the lock, and a lock is not fair: the thread would hardly get it.
            for pair in [(0, 3), (1, 4), (2, 5)] * 30:
                r.mover.unpin(await r.mover.ensure(pair))
            enough.set()
            await work
            await r.mover.settle()
            assert not r.lost

    run(main())


# The DEVICE tier, with a device that is not there


class DeviceArray:
    """Holds its bytes where only its own serialization finds them."""

    def __init__(self, number: int) -> None:
        self.number = number

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (CHUNK,), "typestr": "|u1", "data": (0, False), "version": 3}

    def __sizeof__(self) -> int:
        return CHUNK

    def __reduce__(self) -> Any:
        raise TypeError("device memory is not pickled")


@pytest.fixture
def device_serialization() -> None:
    dask_serialize.register(DeviceArray, lambda x: ({}, [chunk(x.number).data]))
    dask_deserialize.register(DeviceArray, lambda header, frames: DeviceArray(int(frames[0][0])))


@pytest.mark.usefixtures("device_serialization")
def test_device_objects_go_to_host_and_on_to_disk(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=2 * CHUNK) as r:
            assert on_device(DeviceArray(0))
            ledger = r.mover.ledger
            ledger.set_limit(Tier.DEVICE, 2 * CHUNK + 1000)
            spiller = Spiller(ledger, r.horizon, upper=Tier.DEVICE, lower=None)
            device = Mover(spiller, HostFrames(r.mover), asyncio.get_running_loop(), lambda *a: r.lost.append(a))
            mapping = TieredMapping(r.mover, lambda: 0, device=device, on_device=on_device)
            for number in range(8):
                mapping[number] = DeviceArray(number)
                await device.settle()
                await r.mover.settle()
            mapping["host"] = chunk(9)
            assert ledger.held(Tier.DEVICE) <= 2 * CHUNK + 1000
            assert ledger.held(Tier.HOST) <= 3 * CHUNK
            assert len(device.absent) == 6
            assert len(r.files()) >= 3
            for number in range(8):
                pinned = await device.ensure([number])
                assert mapping[number].number == number  # type: ignore[attr-defined]
                device.unpin(pinned)
                assert ledger.held(Tier.DEVICE) <= 2 * CHUNK + 1000
            for key in list(mapping):
                del mapping[key]
            await device.close()
            await r.mover.settle()
            assert ledger.used(Tier.HOST) == 0
            assert r.files() == []
            assert not r.lost

    run(main())


# The mapping


def test_the_mapping_behaves_as_a_dict(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            mapping = TieredMapping(r.mover, lambda: 0)
            model: dict[Hashable, Any] = {}
            rng = np.random.default_rng(0)
            for step in range(300):
                key = ("k", int(rng.integers(12)))
                match rng.integers(4):
                    case 0 | 1:
                        mapping[key] = model[key] = chunk(step % 256)
                    case 2 if key in model:
                        del mapping[key]
                        del model[key]
                    case 2:
                        with pytest.raises(KeyError):
                            del mapping[key]
                    case _:
                        assert (key in mapping) == (key in model)
                        if key in model:
                            np.testing.assert_array_equal(np.asarray(mapping[key]), model[key])
                        else:
                            with pytest.raises(KeyError):
                                mapping[key]
                if step % 3 == 0:
                    await r.mover.settle()
                assert len(mapping) == len(model)
                assert set(mapping) == set(model)
            assert r.mover.written_nbytes > 0
            assert {k: v.tolist() for k, v in mapping.items()} == {k: v.tolist() for k, v in model.items()}  # type: ignore[attr-defined]

    run(main())


def test_the_memory_monitor_is_never_kept_spinning(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=None) as r:
            mapping = TieredMapping(r.mover, lambda: r.held - 3 * CHUNK)
            for number in range(5):
                mapping[number] = chunk(number)
            assert mapping.fast
            assert mapping.evict() == -1, "a write takes its time"
            await descended(mapping)
            assert len(mapping.slow) == 2
            assert mapping.spilled_total.memory == 2 * CHUNK
            assert mapping.spilled_total.disk >= 2 * CHUNK
            r.mover.unpin(await r.mover.ensure(mapping.slow))
            assert mapping.evict() == CHUNK, "clean copies are gone at once"
            await descended(mapping)
            assert len(mapping.slow) == 2

    run(main())


@pytest.mark.parametrize(("least", "spilled"), [(14, 1), (8, 7), (0, 15)])
def test_a_process_that_is_too_large_is_measured_while_values_go(tmp_path: Path, least: int, spilled: int) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            # Each takes much more than it says.
            mapping = TieredMapping(r.mover, lambda: 50_000_000 * (len(mapping.fast) - least))
            for number in range(15):
                mapping[number] = {number}
            while len(mapping.fast) > least:
                mapping.evict()
                await descended(mapping)
            assert len(mapping.slow) == spilled

    run(main())


async def descended(mapping: TieredMapping) -> None:
    assert mapping._descent is not None
    await mapping._descent


def test_keys_that_look_alike_are_two(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path, limit=None) as r:
            mapping = TieredMapping(r.mover, lambda: r.held)
            mapping[1], mapping["1"] = chunk(10), chunk(20)
            mapping.evict()
            await descended(mapping)
            assert mapping.slow == {1, "1"}
            assert [np.asarray(mapping[key])[0] for key in (1, "1")] == [10, 20]
            assert mapping.pop("1", None) is not None
            assert set(mapping) == {1}

    run(main())


def test_peers_are_served_the_copy_as_it_lies(tmp_path: Path) -> None:
    async def main() -> None:
        async with rig(tmp_path) as r:
            mapping = TieredMapping(r.mover, lambda: 0)
            for number in range(5):
                mapping[number] = chunk(number)
                await r.mover.settle()
            key = next(iter(mapping.slow))
            found = await r.mover.frames(key)
            assert found is not None
            with serving({key: codec.serialized(*found)}):
                served: Any = mapping[key]
                assert [bytes(f) for f in served.frames] == [bytes(chunk(int(str(key))))]
            assert key in mapping.slow
            assert await r.mover.frames(next(iter(mapping.fast))) is None

    run(main())


# Pure parts


def test_next_uses() -> None:
    snapshot = Snapshot((0, 1, 10), [(0, 1, 11), (0, 1, 15)], 2)
    assert next_use([], snapshot) is IDLE
    assert next_use([("memory", (0, 1, 3)), ("erred", (0, 1, 3)), ("waiting", None)], snapshot) is IDLE
    assert next_use([("waiting", (0, 1, 30)), ("executing", (0, 1, 10))], snapshot) is RUNNING
    assert next_use([("waiting", (0, 1, 30)), ("ready", (0, 1, 11))], snapshot) == Use(Kind.NEXT, 1)
    # What waits here for inputs to be fetched comes in its turn.
    assert next_use([("waiting", (0, 1, 30))], snapshot) == Use(Kind.NEXT, 2)
    assert next_use([("waiting", (0, 1, 5))], snapshot) == Use(Kind.NEXT, 0)
    assert next_use([], snapshot, Word((0, 1, 30), wanted=True)) == Use(Kind.NEXT, 10)
    assert next_use([], snapshot, Word((0, 2, 0), wanted=True)) == Use(Kind.NEXT, FAR)
    assert next_use([("ready", (0, 1, 15))], snapshot, Word((0, 1, 30), wanted=False)) == Use(Kind.NEXT, 2)
    assert next_use([("ready", (0, 1, 15))], Snapshot(None, [(0, 1, 11), (0, 1, 15)])) == Use(Kind.NEXT, 2)


def test_the_order_of_eviction() -> None:
    def candidate(name: str, use: Use, *, dirty: bool, recency: int = 0, nbytes: int = 10) -> Candidate:
        return Candidate((name,), nbytes, nbytes if dirty else 0, use, recency)

    candidates = [
        candidate("running", RUNNING, dirty=False),
        candidate("near clean", Use(Kind.NEXT, 3), dirty=False),
        candidate("far dirty", Use(Kind.NEXT, 9), dirty=True),
        candidate("far dirty, larger", Use(Kind.NEXT, 9), dirty=True, nbytes=20),
        candidate("idle dirty, older", IDLE, dirty=True, recency=1),
        candidate("idle dirty", IDLE, dirty=True, recency=2),
        candidate("idle clean", IDLE, dirty=False),
        candidate("dying", Use(Kind.DYING), dirty=True),
    ]
    assert [c.names[0] for c in order(candidates)] == [
        "dying", "idle clean", "idle dirty", "idle dirty, older", "far dirty, larger", "far dirty", "near clean",
    ]  # fmt: skip


def test_slices_that_are_left_of_a_large_buffer_are_cheap_to_move() -> None:
    # 16 MB, of which 1 MB is needed: that is written and read, and 16 become free.
    slices = Candidate(("slices",), 2**24, 2**20, Use(Kind.NEXT, 3), 0, wanted_nbytes=2**20, writes=2, reads=2)
    whole = Candidate(("whole",), 2**24, 2**24, Use(Kind.NEXT, 9), 0)
    assert cost_per_byte(slices) == 1 / 8
    assert cost_per_byte(whole) == 2
    assert order([whole, slices]) == [slices, whole]
    # Thousands of them are no longer cheap.
    many = slices._replace(writes=1000, reads=1000)
    assert order([whole, many]) == [whole, many]


def test_of_a_buffer_only_what_will_be_needed_is_written() -> None:
    uses = {"gone": DYING, "soon": Use(Kind.NEXT, 2.0), "late": Use(Kind.NEXT, 10.0), "crumb": DYING, "other": RUNNING}
    horizon = SimpleNamespace(uses=lambda names: [uses[name] for name in names])
    ledger = Ledger({Tier.HOST: 100_000})
    spiller = Spiller(ledger, horizon, unwritten_min_nbytes=4096)
    sizes = {"gone": 60_000, "soon": 10_000, "late": 30_000, "crumb": 10}
    for name, nbytes in sizes.items():
        assert spiller.handle(ev.Put(name, "whole", 100_000, nbytes)) == []
    (candidate,) = spiller._candidates()
    assert candidate.dying == ("gone",)
    assert candidate.dirty_nbytes == 40_010
    assert candidate.wanted_nbytes == 40_000
    assert candidate.use == Use(Kind.NEXT, 8.0)
    todo = spiller.handle(ev.Put("other", "own", 50_000, 50_000))
    written = {each.name: each.epoch for each in todo if isinstance(each, ev.Write)}
    assert written.keys() == {"soon", "late", "crumb"}
    assert [each.name for each in todo if isinstance(each, ev.Drop)] == ["gone"]
    assert ledger.held(Tier.HOST) == 150_000
    for each, epoch in written.items():
        spiller.handle(ev.Written(each, epoch, sizes[str(each)]))
    assert ledger.held(Tier.HOST) == 50_000
    assert spiller.dropped_unwritten_nbytes == 60_000


def test_footprints() -> None:
    base = np.zeros((10, CHUNK), dtype="u1")
    message = bytearray(1000)
    a, b = (np.frombuffer(memoryview(message)[i : i + 500], dtype="u1") for i in (0, 500))
    assert codec.footprint(base)[0] == codec.footprint(base[3, 5:7])[0] == codec.footprint(base.T)[0]
    assert codec.footprint(base[3])[1:] == (10 * CHUNK, CHUNK)
    assert codec.footprint(a)[0] == codec.footprint(b)[0]
    assert codec.footprint(a)[1:] == (1000, 500)
    assert codec.footprint(None)[0] is None
    frame = pd.DataFrame({"a": range(10_000)})
    assert codec.footprint(frame)[0] == id(frame)


def test_views_on_a_device_count_once() -> None:
    class View:
        __cuda_array_interface__: Any = None

        def __init__(self, nbytes: int, base: View | None = None) -> None:
            self.nbytes = nbytes
            self.base = base

        def __sizeof__(self) -> int:
            return self.nbytes

    base = View(10**6)
    assert codec.footprint(base)[0] == id(base)
    assert codec.footprint(View(1000, base))[:2] == (id(base), 10**6)


def test_errors_of_the_disk_are_not_taken_for_errors_of_the_value() -> None:
    assert issubclass(CorruptDataError, SpillError)
    assert issubclass(SpillError, OSError)


# Moves from one tier below to the other


async def crowded(r: Rig) -> None:
    """Fill memory with what will be needed, and the disk with what a client holds."""
    for number in range(6):
        r.horizon.known[number] = IDLE
    await filled(r, 6)
    for number in range(10, 14):
        r.horizon.known[number] = Use(Kind.NEXT, float(number))
    r.mover.spiller._dearness = lambda: 10.0


async def needed(r: Rig) -> None:
    for number in range(10, 14):
        r.mover.put(number, chunk(number))
        await r.mover.settle()


def where(r: Rig, name: Hashable) -> Tier | None:
    copy = r.mover.copy_of(name)
    return None if copy is None else copy.tier


def test_what_nobody_needs_goes_from_disk_to_the_overflow(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, disk=4 * CHUNK, url=url) as r:
            await crowded(r)
            await needed(r)
            assert r.mover.spiller.moved_nbytes > 0
            assert r.mover.moves[Tier.DISK, Tier.OBJECT] == r.mover.spiller.moved_nbytes
            ledger = r.mover.ledger
            assert ledger.held(Tier.OBJECT) == sum(c.nbytes for c in r.mover._copies.values() if c.tier is Tier.OBJECT)
            assert ledger.held(Tier.DISK) == sum(c.nbytes for c in r.mover._copies.values() if c.tier is Tier.DISK)
            assert ledger.reserved(Tier.OBJECT) == 0
            # One may have come before there was room.
            assert sum(where(r, number) is Tier.OBJECT for number in range(10, 14)) <= 1
            for name in [*range(6), *range(10, 14)]:
                np.testing.assert_array_equal(np.asarray(r.mover.get(name)), chunk(name))
            assert r.lost == []

    run(main())


@pytest.mark.parametrize("meanwhile", ["get", "delete", "frames", "put"])
def test_a_block_that_is_wanted_while_it_is_moved(tmp_path: Path, url: str, meanwhile: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, disk=4 * CHUNK, url=url) as r:
            await crowded(r)
            begun, go_on = threading.Event(), threading.Event()
            overflow: Any = r.mover.overflow
            take_over = overflow.take_over

            def slowly(copy: Any) -> Any:
                begun.set()
                assert go_on.wait(30)
                return take_over(copy)

            overflow.take_over = slowly
            for number in range(10, 14):
                r.mover.put(number, chunk(number))
                await asyncio.sleep(0)
            await asyncio.to_thread(begun.wait, 30)
            name = next(n for n, block in r.mover.spiller.blocks.items() if block.fare is not None)
            assert isinstance(name, int)
            expected = chunk(name)
            if meanwhile == "get":
                np.testing.assert_array_equal(np.asarray(r.mover.get(name)), expected)
            elif meanwhile == "delete":
                r.mover.delete(name)
            elif meanwhile == "put":
                r.mover.put(name, expected)
            else:
                # The copy is read, slowly, from where it was, which is gone when it comes to that.
                copy: Any = r.mover.copy_of(name)
                overflow.take_over = take_over
                frames = copy.frames

                def after_the_move() -> Any:
                    go_on.set()
                    assert gone.wait(30)
                    return frames()

                gone = threading.Event()
                folder_remove = r.folder.remove

                def removing(copy: Any) -> None:
                    folder_remove(copy)
                    gone.set()

                r.folder.remove = removing  # type: ignore[method-assign]
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(
                        type(copy), "frames", lambda self: after_the_move() if self is copy else _frames(self)
                    )
                    found = await r.mover.frames(name)
                assert found is not None
                assert where(r, name) is Tier.OBJECT
                np.testing.assert_array_equal(np.asarray(codec.decode(*found)), expected)
            go_on.set()
            await r.mover.settle()
            for number in [*range(6), *range(10, 14)]:
                if number in r.mover:
                    np.testing.assert_array_equal(np.asarray(r.mover.get(number)), chunk(number))
            assert (name in r.mover) == (meanwhile != "delete")
            await r.mover.settle()
            kept = [copy for copy in r.mover._copies.values() if copy.tier is Tier.OBJECT]
            assert len([path for path in MemoryFileSystem.store if path.endswith(".blk")]) == len(kept)
            assert r.lost == []

    run(main())


def _frames(copy: Any) -> Any:
    return copy.header, copy._unpacked()


def test_a_copy_that_cannot_be_moved_stays(tmp_path: Path, url: str) -> None:
    async def main() -> None:
        async with rig(tmp_path, disk=4 * CHUNK, url=url) as r:
            await crowded(r)

            def refuse(copy: Any) -> Any:
                raise SpillError(errno.EIO, f"{copy} is not taken")

            overflow: Any = r.mover.overflow
            overflow.take_over = refuse
            await needed(r)
            assert r.mover.spiller.moved_nbytes == 0
            assert r.mover.spiller._moves == 0
            assert any(block.unmovable for block in r.mover.spiller.blocks.values())
            for name in [*range(6), *range(10, 14)]:
                np.testing.assert_array_equal(np.asarray(r.mover.get(name)), chunk(name))

    run(main())
