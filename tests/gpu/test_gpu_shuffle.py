"""CuPy and cuDF through the shuffle on a real GPU: two workers on the same device, answers against NumPy and pandas."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from device_exchange import exchange_between_two
from distributed import Client, wait
from distributed.client import futures_of

import dask_gpurt
from dask_gpurt.memory import codec
from dask_gpurt.seams import split_axes
from dask_gpurt.shuffle import bricks
from dask_gpurt.shuffle.device import DeviceBody, allocate, library_named, library_of
from dask_gpurt.shuffle.shelf import Parcel

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.gpu

SHAPE = (4096, 4096)
ROWS, COLUMNS = (512, 4096), (4096, 512)
NBYTES = 8 * SHAPE[0] * SHAPE[1]


@contextmanager
def workers(**config: object) -> Iterator[Client]:
    with (
        local_cluster(2) as cluster,
        Client(cluster) as client,
    ):
        answer = dask_gpurt.install(client, placement=False, config=config)
        assert answer.installed("shuffle"), str(answer)
        yield client


def figures(dask_worker: Any) -> dict[str, Any]:
    part = dask_worker.extensions["gpurt"]
    reserved = sum(part.memory.ledger.reserved(tier) for tier in ("device", "host"))
    return {"reserved": reserved, **part.shuffle.metrics(), **part.memory.metrics()}


def total(client: Client, what: str) -> float:
    return sum(float(each[what]) for each in client.run(figures).values())


def rechunk(client: Client, cupy: Any, dtype: str = "f8", chunks: Any = COLUMNS) -> None:
    """Rechunk a CuPy array, and compare it with NumPy's."""
    host = np.random.default_rng(5).integers(0, 2**31, SHAPE).astype(dtype)
    source = client.persist(da.from_array(host, chunks=ROWS).map_blocks(cupy.asarray))
    wait(source)
    # Otherwise Dask joins bands before they are rechunked.
    with dask.config.set({"array.chunk-size": "16 MiB"}):
        found = client.persist(source.rechunk(chunks, method="p2p"))
    wait(found, timeout=60)
    kinds = client.gather(client.map(lambda block: type(block).__module__, futures_of(found)))
    assert {kind.partition(".")[0] for kind in kinds} == {"cupy"}
    np.testing.assert_array_equal(found.map_blocks(cupy.asnumpy).compute(), host)


@pytest.mark.parametrize("dtype", ["f8", "f4", "i2", "c16", "?"])
def test_a_chunk_is_cut_and_joined_on_the_device(dtype: str) -> None:
    cupy = pytest.importorskip("cupy")
    host = np.random.default_rng(7).integers(0, 2, (600, 700)).astype(dtype)
    chunk = cupy.asarray(host)
    assert library_of(chunk) is library_named("cupy")
    axes = split_axes(((600,), (700,)), ((600,), (300, 390, 10)))
    shards = bricks.split(chunk.T.copy().T, (0, 0), axes, {(0, part): "peer" for part in range(3)})
    assert any(isinstance(body, DeviceBody) for _, _, body in shards)
    parcels = [Parcel(header, body, header.body_nbytes) for _, header, body in shards]
    packed: dict[Any, list[Any]] = {}
    for on_device in (True, False):
        some = [parcel for parcel in parcels if isinstance(parcel.body, DeviceBody) is on_device]
        for target, buffers in bricks.pack(some).items():
            packed.setdefault(target, []).extend(buffers)
    for part, where in enumerate((slice(0, 300), slice(300, 690), slice(690, 700))):
        output = bricks.unpack(packed[0, part])
        assert type(output) is cupy.ndarray
        assert output.dtype == host.dtype
        np.testing.assert_array_equal(cupy.asnumpy(output), host[:, where])


def test_a_body_goes_to_the_host_and_back() -> None:
    cupy = pytest.importorskip("cupy")
    (body,) = allocate([("cupy", 100_000)])
    body.array[...] = cupy.arange(100_000) % 251
    header, frames = codec.encode(body)
    back = codec.decode(header, frames)
    assert isinstance(back, DeviceBody)
    assert bool((back.array == body.array).all())
    assert codec.footprint(body)[1:] == (100_000, 100_000)


def test_a_rechunk_stays_on_the_device() -> None:
    cupy = pytest.importorskip("cupy")
    with workers() as client:
        rechunk(client, cupy)
        assert total(client, "runs") == 2, "it was not declined"
        if importlib.util.find_spec("ucxx") is not None:
            # All but headers is sent from the device.
            assert total(client, "bytes_sent_device") > 0.99 * total(client, "bytes_sent") > 0
        # And shards that go together.
        rechunk(client, cupy, "f4", (4096, 32))
        assert total(client, "runs") == 4
        assert total(client, "reserved") == 0


def test_two_workers_on_one_gpu_exchange_by_cuda_ipc(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy")
    pytest.importorskip("ucxx", reason="ucxx is not installed", exc_type=ImportError)
    # Nothing else that could carry the memory of a device from one process to another without a copy on the host.
    monkeypatch.setenv("UCX_TLS", "self,tcp,cuda_copy,cuda_ipc")
    with local_cluster(2) as cluster, Client(cluster) as client:
        exchange_between_two(client, "cupy", "cuda_ipc")


def test_a_rechunk_by_dasks_comms() -> None:
    cupy = pytest.importorskip("cupy")
    with workers(**{"shuffle.transport": "dask"}) as client:
        rechunk(client, cupy)
        assert total(client, "runs") == 2
        assert total(client, "bytes_sent_device") == 0
        assert total(client, "reserved") == 0


def test_a_rechunk_of_more_than_the_device_may_hold() -> None:
    cupy = pytest.importorskip("cupy")
    with workers(**{"memory.device-limit": NBYTES // 4}) as client:
        rechunk(client, cupy)
        assert total(client, "runs") == 2
        assert total(client, "device_written_nbytes") > 0
        assert total(client, "reserved") == 0


def table(number: int, name: str = "x") -> pd.DataFrame:
    rng = np.random.default_rng([number, len(name)])
    rows = 200_000
    frame = pd.DataFrame(
        {
            "key": rng.integers(0, 100_000, rows),
            name: rng.random(rows),
            f"{name}_s": rng.choice(["a", "bc", "", "déf"], rows),
            f"{name}_t": pd.to_datetime(rng.integers(0, 10**18, rows)),
        },
        index=np.arange(rows) + number * rows,
    )
    frame.loc[frame.index[::7], name] = np.nan
    return frame


def on_gpu(number: int, name: str = "x") -> Any:
    import cudf

    return cudf.from_pandas(table(number, name))


def test_a_shuffle_and_a_merge_of_cudf() -> None:
    cudf = pytest.importorskip("cudf")
    pytest.importorskip("dask_cudf")
    with workers() as client:
        left, right = (
            client.persist(dd.from_map(on_gpu, range(4), name=name, meta=on_gpu(0, name).iloc[:0]))
            for name in ("x", "other")
        )
        expected, other = (pd.concat([table(number, name) for number in range(4)]) for name in ("x", "other"))
        shuffled = client.persist(left.shuffle("key", npartitions=5, shuffle_method="p2p"))
        wait(shuffled, timeout=60)
        parts = client.gather(client.compute(shuffled.to_delayed()))
        assert all(type(part) is cudf.DataFrame for part in parts)
        found = pd.concat([part.to_pandas() for part in parts]).sort_index()
        pd.testing.assert_frame_equal(found, cudf.from_pandas(expected).to_pandas())
        seen: set[int] = set()
        for part in parts:
            keys = set(part["key"].to_pandas())
            assert not keys & seen
            seen |= keys
        assert total(client, "runs") == 2, "it was not declined"
        if importlib.util.find_spec("ucxx") is not None:
            assert total(client, "bytes_sent_device") > 0
        merged = left.merge(right, on="key", shuffle_method="p2p").compute().to_pandas()
        order = ["key", "x", "x_t", "other", "other_t"]
        pd.testing.assert_frame_equal(
            merged.sort_values(order, ignore_index=True),
            cudf.from_pandas(expected.merge(other, on="key")).to_pandas().sort_values(order, ignore_index=True),
        )
        assert total(client, "reserved") == 0
