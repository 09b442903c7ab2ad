"""The DEVICE tier on the emulated CUDA driver: copies, their order, failures, page-locked memory.

What is shown here is that the driver is asked for the right things; see tests/emulated_cuda/README.md.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import importlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_emulation import counted, emulated, set_driver

from dask_gpurt.errors import CorruptDataError, DeviceFullError
from dask_gpurt.memory import codec, cuda
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cuda import Copier, Device, Pinner, is_out_of_memory
from dask_gpurt.memory.device import PIECE_NBYTES, device_mover, pinned_pool
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.shards import DeviceShardStore
from dask_gpurt.memory.spiller import Spiller
from dask_gpurt.shuffle.device import DeviceBody, register

pytest.importorskip("numba_cuda", reason="numba-cuda makes the arrays")

MIB = 2**20


class Nothing:
    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [IDLE] * len(names)


class Tiers(NamedTuple):
    ledger: Ledger
    device: Mover
    host: Mover
    pool: BlockPool
    lost: list[Any]

    async def down(self) -> None:
        """Move everything away."""
        limit = self.ledger.limit(Tier.DEVICE)
        self.device.set_limit(0)
        await self.device.settle()
        self.device.set_limit(limit)

    async def get(self, name: Hashable) -> Any:
        """Bring a value to the device, and copy it to the host."""
        pinned = await self.device.ensure([name])
        value: Any = self.device.get(name)
        self.device.unpin(pinned)
        return value.copy_to_host()


@asynccontextmanager
async def tiers(path: Path, device_nbytes: int | None = None, host_nbytes: int | None = None) -> AsyncIterator[Tiers]:
    gpu = Device.find()
    assert gpu is not None
    pool = pinned_pool(gpu, 256 * MIB)
    folder = SpillFolder(str(path), BlockPool(MIB))
    ledger = Ledger({Tier.DEVICE: device_nbytes, Tier.HOST: host_nbytes})
    lost: list[Any] = []
    loop = asyncio.get_running_loop()
    host = Mover(Spiller(ledger, Nothing()), DiskStore(folder), loop, lambda *a: lost.append(a))
    device = device_mover(host, Nothing(), loop, lambda *a: lost.append(a), device=gpu, lease=pool.lease)
    try:
        yield Tiers(ledger, device, host, pool, lost)
        for name in device.names():
            device.delete(name)
        for mover in (device, host):
            await mover.settle()
        assert not any(ledger.used(tier) for tier in Tier), ledger
    finally:
        await device.close()
        await host.close()
        folder.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def numba_cuda() -> Any:
    return importlib.import_module("numba.cuda")


def to_device(array: Any, **options: Any) -> Any:
    return numba_cuda().to_device(array, **options)


def collected() -> None:
    """Have Numba free what nobody refers to."""
    gc.collect()
    numba_cuda().current_context().memory_manager.deallocations.clear()


@emulated()
def test_arrays_come_back_as_they_were_from_the_host_and_from_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays: list[Any] = [
        rng.random(5),
        rng.integers(0, 255, (300, 500), "u1"),
        np.asfortranarray(rng.random((200, 300))),
        rng.random((0, 3)),
        rng.random(10**6).astype("f4"),
        (rng.random(PIECE_NBYTES * 2 // 8 + 3) * 2**62).astype("i8"),
        np.array([1 + 2j, -3]),
    ]

    async def main(host_nbytes: int | None) -> None:
        async with tiers(tmp_path, host_nbytes=host_nbytes) as t:
            for _ in range(2):
                for number, array in enumerate(arrays):
                    t.device.put(number, to_device(array))
                set_driver(copies=0, pinned_copies=0)
                await t.down()
                await t.host.settle()
                assert len(t.device.absent) == sum(array.size > 0 for array in arrays)
                assert counted("pinned_copies") >= 5, "large ones go to page-locked memory, small ones need none"
                assert counted("copies") >= 8, "the largest in pieces"
                assert t.ledger.held(Tier.DEVICE) == 0
                if host_nbytes is None:
                    assert t.ledger.held(Tier.HOST) == sum(array.nbytes for array in arrays)
                    collected()
                    assert counted("used") == 0
                else:
                    assert t.ledger.held(Tier.DISK) >= sum(array.nbytes for array in arrays) - host_nbytes
                for number, array in enumerate(arrays):
                    back = await t.get(number)
                    np.testing.assert_array_equal(back, array, strict=True)
                    assert back.strides == array.strides or not array.size
                assert not t.lost
        assert counted("pinned") > 0, "blocks wait, locked, for their next use"
        t.pool.trim()
        assert counted("pinned") == 0

    run(main(None))
    run(main(MIB))
    collected()
    assert counted("used") == 0


@emulated(capacity=32 * MIB)
def test_the_ledger_keeps_the_device_below_its_limit(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path, device_nbytes=4 * MIB) as t:
            for number in range(16):
                t.device.put(number, to_device(np.full(MIB, number, "u1")))
                (await t.device.reserve(0)).release()
                assert t.ledger.held(Tier.DEVICE) <= 4 * MIB
            for number in range(16):
                assert (await t.get(number) == number).all()
                assert t.ledger.used(Tier.DEVICE) <= 4 * MIB

    run(main())


def comes_after(tmp_path: Path, *, blocking: bool, patience_s: float = 0.3) -> bool:
    """Whether an array goes down as a stream left it that is held up, for so long if need be."""
    from cuda.bindings import driver

    numba = numba_cuda()
    numba.current_context()
    flags = driver.CUstream_flags
    handle = int(driver.cuStreamCreate(flags.CU_STREAM_DEFAULT if blocking else flags.CU_STREAM_NON_BLOCKING)[1])
    stream = numba.external_stream(handle)
    gate = threading.Event()
    held_up = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: gate.wait(100))

    async def main() -> bool:
        async with tiers(tmp_path) as t:
            # Not pageable: the driver would copy it at once.
            source = np.frombuffer(t.pool.lease(MIB), "u1")
            source[:] = 7
            value = numba.device_array(MIB, "u1", stream=0 if blocking else stream)
            assert ctypes.CDLL("libcuda.so.1").cuLaunchHostFunc(ctypes.c_void_p(handle), held_up, None) == 0
            value.copy_to_device(source, stream=stream)
            t.device.put("a", value)
            t.device.set_limit(0)
            going = asyncio.ensure_future(t.device.settle())
            early, _ = await asyncio.wait([going], timeout=patience_s)
            gate.set()
            await going
            t.device.set_limit(None)
            right = bool((await t.get("a") == 7).all())
            return right and not early

    return asyncio.run(main())


@emulated()
def test_a_copy_comes_after_what_was_asked_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert comes_after(tmp_path, blocking=True), "the legacy default stream is waited for"
    assert comes_after(tmp_path, blocking=False), "the stream that the array names is waited for"
    come_after = Copier.come_after
    monkeypatch.setattr(
        Copier, "come_after", lambda self, stream: come_after(self, stream) if stream == cuda.LEGACY_STREAM else None
    )
    assert comes_after(tmp_path, blocking=True)
    assert not comes_after(tmp_path, blocking=False, patience_s=60), "this test finds it missing"
    monkeypatch.setattr(Copier, "come_after", lambda self, stream: None)
    assert not comes_after(tmp_path, blocking=True, patience_s=60), "and this"


@emulated(lag_us=3000)
def test_nobody_hears_of_a_copy_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: not waiting for the copies."""

    async def main() -> list[Any]:
        async with tiers(tmp_path) as t:
            for number in range(30):
                t.device.put(number, to_device(np.full(MIB, number, "u1")))
            await t.down()
            for number in range(30):
                try:
                    assert (await t.get(number) == number).all()
                except CorruptDataError as error:
                    t.lost.append(error)
            await t.device.settle()
            return t.lost

    assert asyncio.run(main()) == []
    monkeypatch.setattr(Copier, "wait", lambda self, mark: None)
    assert asyncio.run(main()) != [], "the checksum of what was not there yet"


@emulated(capacity=8 * MIB)
def test_what_comes_up_to_a_full_device_makes_room_or_stays_below(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path) as t:
            for number in range(6):
                t.device.put(number, to_device(np.full(MIB, number, "u1")))
            await t.down()
            collected()
            others = to_device(np.zeros(5 * MIB, "u1"))
            # The ledger knows no limit: it is the device that has room for three of them only.
            for number in (0, 1, 2, 3, 4, 5, 0, 3):
                assert (await t.get(number) == number).all()
            assert counted("failed_allocs") > 0
            assert not t.lost
            # In use, all of them: nothing can go.
            pinned = await t.device.ensure([3, 4, 5])
            with pytest.raises(
                DeviceFullError, match=r"the device has no room for 1048576 bytes of 0: .*OUT_OF_MEMORY"
            ):
                await t.get(0)
            with pytest.raises(MemoryError):
                # And so for those who cannot wait.
                t.device.get(0)
            t.device.unpin(pinned)
            assert not t.lost
            assert 0 in t.device.absent
            assert (await t.get(0) == 0).all()
            del others
            for number in range(6):
                assert (await t.get(number) == number).all()
            assert not t.lost

    run(main())


class NumbaLibrary:
    """Numba's arrays as those of the shuffle, as far as they go down and up."""

    name = "numba"
    transports = frozenset({"cuda_copy"})

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked of the library")


@emulated(capacity=8 * MIB)
def test_bodies_of_shards_go_by_the_driver_and_stay_on_the_host_if_they_must(tmp_path: Path) -> None:
    library: Any = NumbaLibrary()
    register(library)

    async def main() -> None:
        async with tiers(tmp_path) as t:
            store = DeviceShardStore(t.device)
            expected = [np.full(MIB, number, "u1") for number in range(5)]
            for number, array in enumerate(expected):
                body = DeviceBody(library, to_device(array))
                store.put("shards", [b"header", body], await store.reserve(body.nbytes), rank=number)
            del body
            await t.down()
            collected()
            assert counted("used") == 0
            hog = to_device(np.zeros(5 * MIB, "u1"))
            taken = await store.take("shards")
            assert taken[::2] == [b"header"] * 5
            bodies: list[Any] = taken[1::2]
            kinds = [type(body) for body in bodies]
            # Room for three, and whoever takes a body holds it.
            assert kinds == [DeviceBody] * 3 + [memoryview] * 2
            for body, array in zip(bodies, expected, strict=True):
                found = body.array.copy_to_host() if isinstance(body, DeviceBody) else np.frombuffer(body, "u1")
                np.testing.assert_array_equal(found, array)
            del hog
            assert not t.lost

    run(main())


@emulated(capacity=16 * MIB)
def test_threads_that_need_room_at_once_all_get_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path) as t:
            for number in range(12):
                t.device.put(number, to_device(np.full(MIB, number, "u1")))
            await t.down()
            collected()
            hog = to_device(np.zeros(12 * MIB, "u1"))
            rng = np.random.default_rng(3)
            for _ in range(20):
                names = [int(name) for name in rng.choice(12, 3, replace=False)]

                def read(name: int) -> bool:
                    value: Any = t.device.get(name)
                    return bool((value.copy_to_host() == name).all())

                # Two threads beside the mover's own, for four that have room.
                *rights, back = await asyncio.gather(
                    *(asyncio.to_thread(read, name) for name in names[:2]), t.get(names[2])
                )
                assert rights == [True, True]
                assert (back == names[2]).all()
            del hog
            assert not t.lost

    run(main())


@emulated()
def test_a_block_that_was_damaged_on_the_host_is_never_returned(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path) as t:
            t.device.put("a", to_device(np.arange(10**6)))
            t.device.put("b", to_device(np.arange(10**6)))
            await t.down()
            frames: Any = next(t.host.get(name) for name in t.host.names() if getattr(name, "key", None) == "a")
            frames[0][12345] ^= 1
            with pytest.raises(CorruptDataError, match="frame 0 of 'a' does not match its checksum"):
                await t.device.ensure(["a"])
            await t.device.settle()
            assert [name for name, _ in t.lost] == ["a"]
            assert ((await t.get("b")) == np.arange(10**6)).all()

    run(main())


@emulated()
def test_a_copy_that_fails_loses_nothing_on_its_way_down(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with tiers(tmp_path) as t:
            t.device.put("a", to_device(np.arange(10**6)))
            set_driver(fail_copy=1)
            with caplog.at_level(logging.WARNING):
                await t.down()
            assert "cannot copy DeviceNDArray from the device: CUDA_ERROR_ECC_UNCORRECTABLE (214)" in caplog.text
            assert t.device.write_failures == 1
            assert not t.device.absent
            assert ((await t.get("a")) == np.arange(10**6)).all()
            assert not t.lost

    run(main())


@emulated(devices=2)
def test_what_lies_on_another_device_goes_down_by_its_library(tmp_path: Path) -> None:
    async def main() -> None:
        async with tiers(tmp_path) as t:
            with numba_cuda().gpus[1]:
                t.device.put("a", to_device(np.arange(10**6)))
            set_driver(pinned_copies=0)
            await t.down()
            assert t.device.absent == {"a"}
            assert counted("pinned_copies") == 0
            np.testing.assert_array_equal(await t.get("a"), np.arange(10**6), strict=True)

    run(main())


@emulated()
def test_an_array_that_would_not_come_back_as_it_was_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = np.array([(1, 1.5)] * 7, dtype=[("a", "u1"), ("b", "f8")])

    async def main() -> None:
        async with tiers(tmp_path) as t:
            t.device.put("rows", to_device(rows))
            t.device.put("numbers", to_device(np.arange(7)))
            with caplog.at_level(logging.ERROR):
                await t.down()
            assert "distributed's serialization would lose the fields of" in caplog.text
            assert t.device.absent == {"numbers"}
            np.testing.assert_array_equal(await t.get("rows"), rows, strict=True)

    run(main())


@emulated()
def test_a_view_that_cannot_be_put_together_on_a_full_device_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encode = codec.encode
    full = True

    def refused(value: object, **options: Any) -> Any:
        if full:
            raise MemoryError("std::bad_alloc: out_of_memory")
        return encode(value, **options)

    async def main() -> None:
        nonlocal full
        monkeypatch.setattr(codec, "encode", refused)
        async with tiers(tmp_path) as t:
            t.device.put("view", to_device(np.arange(10**6)))
            with caplog.at_level(logging.WARNING):
                await t.down()
            assert "cannot take 'view' from the device, which is full" in caplog.text
            assert not t.device.absent
            full = False
            t.device.set_limit(0)
            while not t.device.absent:  # noqa: ASYNC110  tried again a second later
                await asyncio.sleep(0.01)
            t.device.set_limit(None)
            np.testing.assert_array_equal(await t.get("view"), np.arange(10**6), strict=True)

    run(main())


@emulated(pinned_limit=2 * MIB)
def test_memory_that_cannot_be_page_locked_stays_pageable(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with tiers(tmp_path) as t:
            for number in range(6):
                t.device.put(number, to_device(np.full(MIB, number, "u1")))
            with caplog.at_level(logging.WARNING):
                await t.down()
            warnings = [record.getMessage() for record in caplog.records]
            assert len(warnings) == 1
            assert "Memory cannot be page-locked, copies to and from the device are slower" in warnings[0]
            assert "CUDA_ERROR_OUT_OF_MEMORY" in warnings[0]
            for number in range(6):
                assert (await t.get(number) == number).all()

    run(main())


@emulated()
def test_as_much_is_page_locked_as_may_be_and_let_go_before_it_is_unmapped() -> None:
    device = Device.find()
    assert device is not None
    pinner = Pinner(device, 3 * MIB)
    pool = BlockPool(2 * MIB, pinner)
    leases = [pool.lease(MIB) for _ in range(5)]
    assert counted("pinned") == pinner.nbytes == 3 * MIB
    for lease in leases:
        lease[:] = bytes(MIB)
    leases.clear()
    # The driver ends the process when memory is unmapped first.
    assert pool.idle_nbytes == 2 * MIB
    pool.trim()
    assert counted("pinned") == pinner.nbytes == 0


@emulated()
def test_the_event_loop_goes_on_while_something_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[bool] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def after_a_turn(method: Callable[..., Any]) -> Callable[..., Any]:
            def copy(*args: Any) -> Any:
                turned = threading.Event()
                loop.call_soon_threadsafe(turned.set)
                turns.append(turned.wait(20))
                return method(*args)

            return copy

        # What begins a copy may wait for the end of it, too.
        for name in ("to_host", "to_device", "wait", "finish"):
            monkeypatch.setattr(Copier, name, after_a_turn(getattr(Copier, name)))
        async with tiers(tmp_path) as t:
            t.device.put("a", to_device(np.ones(4 * MIB, "u1")))
            set_driver(copy_rate=64 * MIB)
            for move in (t.down, lambda: t.device.ensure(["a"])):
                before = len(turns)
                await move()
                assert len(turns) > before + 1

    run(main())
    assert all(turns), "the event loop does nothing else while something is copied"


def test_out_of_memory_is_known_whoever_says_it() -> None:
    class CudaAPIError(Exception):
        def __init__(self, code: int) -> None:
            self.code = code

    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**62, "u1")
    errors: list[tuple[BaseException, bool]] = [
        (of_numpy.value, False),
        (CudaAPIError(2), True),
        (CudaAPIError(700), False),
        (MemoryError("std::bad_alloc"), True),
        (ValueError(2), False),
    ]
    assert [is_out_of_memory(error) for error, _ in errors] == [expected for _, expected in errors]


def test_without_a_driver_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Callable[[], None]:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert Device.find() is None
