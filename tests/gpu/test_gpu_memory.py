"""The DEVICE tier on a real GPU, with CuPy, Numba, RMM and cuDF: round trips, the order of copies and kernels, a full device.

The same code runs on an emulated driver in tests/unit/test_memory_device.py, without these libraries, and without kernels.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import dask.array as da
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cuda import Device
from dask_gpurt.memory.device import PIECE_NBYTES, device_mover, pinned_pool
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.spiller import Spiller

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.gpu

MIB = 2**20


class Nothing:
    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [IDLE] * len(names)


class Tiers(NamedTuple):
    device: Mover
    lost: list[Any]

    async def down(self) -> None:
        """Move everything away."""
        self.device.set_limit(0)
        await self.device.settle()
        self.device.set_limit(None)

    async def up(self, name: Hashable) -> Any:
        """Bring a value back."""
        pinned = await self.device.ensure([name])
        value = self.device.get(name)
        self.device.unpin(pinned)
        return value


@asynccontextmanager
async def tiers(path: Path, host_nbytes: int | None = None) -> AsyncIterator[Tiers]:
    gpu = Device.find()
    assert gpu is not None
    pool = pinned_pool(gpu, None)
    folder = SpillFolder(str(path), BlockPool(MIB))
    loop = asyncio.get_running_loop()
    lost: list[Any] = []
    host = Mover(
        Spiller(Ledger({Tier.HOST: host_nbytes}), Nothing()), DiskStore(folder), loop, lambda *a: lost.append(a)
    )
    device = device_mover(host, Nothing(), loop, lambda *a: lost.append(a), device=gpu, lease=pool.lease)
    try:
        yield Tiers(device, lost)
        assert not lost
    finally:
        await device.close()
        await host.close()
        folder.close()
        pool.trim()


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 60))


def cupy_arrays() -> tuple[list[Any], Callable[[Any], Any]]:
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(1)
    host = [
        rng.random(5),
        rng.integers(0, 255, (300, 500), "u1"),
        np.asfortranarray(rng.random((200, 300))),
        rng.random((0, 3)),
        rng.random(2 * PIECE_NBYTES // 8 + 3),
        rng.random((50, 60)).astype("c16"),
    ]
    arrays = [cupy.asarray(array) for array in host]
    # Views: contiguous, and with gaps.
    return [*arrays, arrays[1][10:20], arrays[1][::2, ::3]], cupy.asnumpy


def numba_arrays() -> tuple[list[Any], Callable[[Any], Any]]:
    cuda = pytest.importorskip("numba.cuda")
    arrays = [cuda.to_device(np.random.default_rng(2).random(shape)) for shape in ((7,), (300, 500), (10**6,))]
    return arrays, lambda array: array.copy_to_host()


def rmm_buffers() -> tuple[list[Any], Callable[[Any], Any]]:
    rmm = pytest.importorskip("rmm")
    rng = np.random.default_rng(3)
    buffers = [rmm.DeviceBuffer.to_device(rng.bytes(nbytes)) for nbytes in (1, 100_000, PIECE_NBYTES + 1)]
    return buffers, lambda buffer: np.frombuffer(buffer.tobytes(), "u1")


@pytest.mark.parametrize("host_nbytes", [None, MIB], ids=["host", "disk"])
@pytest.mark.parametrize("made", [cupy_arrays, numba_arrays, rmm_buffers])
def test_what_lies_on_the_device_comes_back_as_it_was(
    made: Callable[[], tuple[list[Any], Callable[[Any], Any]]], host_nbytes: int | None, tmp_path: Path
) -> None:
    values, to_host = made()
    expected = [to_host(value) for value in values]
    kinds = [type(value) for value in values]

    async def main() -> None:
        async with tiers(tmp_path, host_nbytes) as t:
            for _ in range(2):
                for number in range(len(expected)):
                    t.device.put(number, values.pop(0))
                await t.down()
                assert len(t.device.absent) == sum(array.nbytes > 0 for array in expected)
                values.extend([await t.up(number) for number in range(len(expected))])
                for value, array, kind in zip(values, expected, kinds, strict=True):
                    assert type(value) is kind
                    np.testing.assert_array_equal(to_host(value), array, strict=True)

    run(main())


def test_a_frame_of_cudf_comes_back_as_it_was(tmp_path: Path) -> None:
    cudf = pytest.importorskip("cudf")
    rows = 200_000
    rng = np.random.default_rng(4)
    host = pd.DataFrame({"a": rng.random(rows), "s": rng.choice(["x", "yz", ""], rows), "n": rng.integers(0, 9, rows)})
    host.loc[::7, "a"] = np.nan
    expected = cudf.from_pandas(host).to_pandas()

    async def main() -> None:
        async with tiers(tmp_path) as t:
            t.device.put("frame", cudf.from_pandas(host))
            await t.down()
            assert "frame" in t.device.absent
            pd.testing.assert_frame_equal((await t.up("frame")).to_pandas(), expected)

    run(main())


@contextmanager
def stream_of(cupy: Any, kind: str) -> Iterator[Any]:
    stream = {"null": cupy.cuda.Stream.null, "per-thread": cupy.cuda.Stream.ptds}.get(kind) or cupy.cuda.Stream()
    with stream:
        yield stream


@pytest.mark.parametrize("kind", ["null", "per-thread", "blocking"])
def test_no_copy_is_made_before_a_kernel_is_done(kind: str, tmp_path: Path) -> None:
    """Kernels take milliseconds; what they have not written yet is poison."""
    cupy = pytest.importorskip("cupy")
    poison, rounds = 0xDD, 30

    async def main() -> None:
        async with tiers(tmp_path) as t:
            busy = cupy.random.random((4096, 4096), dtype="f4")
            for number in range(rounds):
                array = cupy.full(8 * MIB, poison, "u1")
                cupy.cuda.Device().synchronize()
                with stream_of(cupy, kind):
                    for _ in range(3):
                        cupy.matmul(busy, busy)
                    array[...] = number
                t.device.put(number, array)
                del array
                await t.down()
                assert number in t.device.absent
            for number in range(rounds):
                # And up: memory that was freed may still be written by a kernel that was asked for before.
                with stream_of(cupy, kind):
                    scratch = cupy.full(8 * MIB, poison, "u1")
                    cupy.matmul(busy, busy)
                    scratch[...] = poison
                    del scratch
                    value = await t.up(number)
                    assert bool((value == number).all())
                    del value
                t.device.delete(number)

    run(main())


def test_what_comes_up_to_a_full_device_makes_room(tmp_path: Path) -> None:
    """RMM's limit stands for the end of the device."""
    rmm = pytest.importorskip("rmm")
    before = rmm.mr.get_current_device_resource()
    limited = rmm.mr.LimitingResourceAdaptor(rmm.mr.CudaMemoryResource(), 64 * MIB)

    async def main() -> None:
        async with tiers(tmp_path) as t:
            for number in range(12):
                t.device.put(number, rmm.DeviceBuffer.to_device(bytes([number]) * (4 * MIB)))
            await t.down()
            hog = rmm.DeviceBuffer(size=40 * MIB)
            for number in (*range(12), 3, 7):
                # Six of them have room at a time.
                assert (await t.up(number)).tobytes() == bytes([number]) * (4 * MIB)
            assert limited.get_allocated_bytes() <= 64 * MIB
            del hog

    rmm.mr.set_current_device_resource(limited)
    try:
        run(main())
    finally:
        rmm.mr.set_current_device_resource(before)


def figures(dask_worker: Any) -> dict[str, int]:
    found: dict[str, int] = dask_worker.extensions["gpurt"].memory.metrics()
    return found


def array_job(client: Client) -> None:
    """Compute with 512 MiB of CuPy arrays, and compare with NumPy."""
    cupy = importlib.import_module("cupy")
    host = np.random.default_rng(5).random((8192, 8192))
    x = client.persist(da.from_array(host, chunks=(1024, 1024)).map_blocks(cupy.asarray))
    wait(x)
    found = (x + x.T).sum(axis=0).map_blocks(cupy.asnumpy).compute()
    np.testing.assert_allclose(found, (host + host.T).sum(axis=0))
    # Values that went down and came back, to the bit.
    np.testing.assert_array_equal(x.map_blocks(cupy.asnumpy).compute(), host)
    all_figures = list(client.run(figures).values())
    assert sum(each["device_written_nbytes"] for each in all_figures) > 0, all_figures
    assert sum(each["device_corrupt_blocks"] for each in all_figures) == 0, all_figures


@pytest.mark.parametrize("pool", [None, "1 GiB"], ids=["no pool", "pool"])
def test_a_job_on_dask_cudas_cluster(pool: str | None) -> None:
    pytest.importorskip("cupy")
    dask_cuda = pytest.importorskip("dask_cuda")
    with (
        dask_cuda.LocalCUDACluster(
            CUDA_VISIBLE_DEVICES="0",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            device_memory_limit="192 MiB",
            rmm_pool_size=pool,
        ) as cluster,
        Client(cluster) as client,
    ):
        assert dask_gpurt.install(client).installed("memory")
        array_job(client)


def test_two_workers_on_one_gpu() -> None:
    pytest.importorskip("cupy")
    with (
        local_cluster(2) as cluster,
        Client(cluster) as client,
    ):
        assert dask_gpurt.install(client, config={"memory.device-limit": "96 MiB"}).installed("memory")
        array_job(client)


def save(number: int, folder: str) -> int:
    """Write an array from the device to a file."""
    import cupy
    import kvikio

    with kvikio.CuFile(f"{folder}/{number}", "w") as file:
        return int(file.write(cupy.full(16 * MIB, number, "u1")))


def load(number: int, folder: str) -> Any:
    """Read it back."""
    import cupy
    import kvikio

    array = cupy.empty(16 * MIB, "u1")
    with kvikio.CuFile(f"{folder}/{number}", "r") as file:
        assert file.read(array) == array.nbytes
    return array


def check(array: Any, number: int) -> bool:
    return bool((array == number).all())


def test_arrays_that_kvikio_reads_go_down_and_come_back(tmp_path: Path) -> None:
    """By cuFile where there is one, and else by KvikIO's compatibility mode: the tier is to see no difference."""
    pytest.importorskip("cupy")
    pytest.importorskip("kvikio")
    with local_cluster(1) as cluster, Client(cluster) as client:
        assert dask_gpurt.install(client, config={"memory.device-limit": "64 MiB"}).installed("memory")
        numbers = range(12)
        saved = client.gather(client.map(save, numbers, folder=str(tmp_path)))
        assert saved == [16 * MIB] * 12
        arrays = client.map(load, numbers, folder=str(tmp_path))
        wait(arrays)
        (found,) = client.run(figures).values()
        assert found["device_written_nbytes"] >= 7 * 16 * MIB, found
        assert all(client.gather(client.map(check, arrays, numbers)))


def hold(number: int) -> Any:
    import cupy

    return cupy.full(16 * MIB, number, "u1")


def limit_rmm(limit_nbytes: int) -> None:
    """Let CuPy allocate by RMM, so much."""
    import cupy
    import rmm
    from rmm.allocators.cupy import rmm_cupy_allocator

    rmm.mr.set_current_device_resource(rmm.mr.LimitingResourceAdaptor(rmm.mr.CudaMemoryResource(), limit_nbytes))
    cupy.cuda.set_allocator(rmm_cupy_allocator)


def need(nbytes: int) -> int:
    import cupy

    return int(cupy.ones(nbytes, "u1").sum())


def test_a_full_device_does_not_end_the_worker() -> None:
    pytest.importorskip("cupy")
    pytest.importorskip("rmm")
    with (
        local_cluster(1) as cluster,
        Client(cluster) as client,
    ):
        # The ledger allows more than there is.
        assert dask_gpurt.install(client, config={"memory.device-limit": "1 GiB"}).installed("memory")
        client.run(limit_rmm, 256 * MIB)
        held = client.map(hold, range(12))
        wait(held)
        assert client.submit(need, 128 * MIB).result(timeout=60) == 128 * MIB, "after some have gone down"
        with pytest.raises(MemoryError):
            client.submit(need, 512 * MIB).result(timeout=60)
        assert client.submit(need, MIB).result(timeout=60) == MIB
        firsts = client.gather(client.map(lambda array: int(array[-1]), held))
        assert firsts == list(range(12))
