"""The OBJECT tier under real workers, on a real S3 server; and a worker that is killed while it spills."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import fsspec
import numpy as np
import pytest
from clusters import WITHOUT_MONITOR, local_cluster, workers_getting_ready
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.errors import CorruptDataError, GpurtError

pytest.importorskip("moto", reason="moto brings the S3 server")

from s3_server import Fault, S3Server, serving

HOST, DISK = 1_000_000, 1_000_000


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with serving() as server:
        yield server


@pytest.fixture
def s3(server: S3Server, client: Client) -> Iterator[S3Server]:
    """The server, without faults, and with nothing in it that is left behind."""
    yield server
    server.fault = None
    dask_gpurt.uninstall(client)
    assert listed(server) == []


@pytest.fixture(scope="module")
def client(server: S3Server) -> Iterator[Client]:  # noqa: ARG001, RUF100 - workers inherit its environment
    """Two processes, and stock's memory monitor kept out, so that only managed memory decides."""
    with (
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(2, memory_limit="50 MB") as cluster,
        Client(cluster) as client,
    ):
        yield client


def install(client: Client, s3: S3Server, **config: Any) -> None:
    # Whether compression is worth it, and so how much there is of what, depends on how fast disk and server are today.
    given = {
        "host-limit": HOST,
        "disk-limit": DISK,
        "object-url": f"s3://{s3.bucket}/folder",
        "compression": "off",
        **config,
    }
    answer = dask_gpurt.install(client, config={f"memory.{key}": value for key, value in given.items()})
    assert answer.installed("memory"), str(answer)


def metrics(dask_worker: Any = None) -> dict[str, int]:
    found: dict[str, int] = dask_worker.extensions["gpurt"].memory.metrics()
    return found


def total(client: Client, figure: str) -> int:
    return sum(m[figure] for m in client.run(metrics).values())


def listed(s3: S3Server, suffix: str = "") -> list[str]:
    fs = fsspec.filesystem("s3")
    fs.invalidate_cache()
    return [path for path in sorted(fs.find(s3.bucket)) if path.endswith(suffix)]


async def settle(dask_worker: Any = None) -> None:
    """Wait until what is on its way down has arrived."""
    await dask_worker.extensions["gpurt"].memory._host.settle()


def persisted(client: Client, nbytes: int = 8_000_000) -> Any:
    x = da.arange(nbytes // 8, dtype="f8", chunks=25_000).persist()
    wait(x)
    client.run(settle)
    return x


def test_an_array_larger_than_memory_and_disk(client: Client, s3: S3Server) -> None:
    install(client, s3)
    n = 1000
    expected = np.arange(n * n, dtype="f8").reshape(n, n)
    x = da.arange(n * n, dtype="f8", chunks=n * 125).reshape(n, n).rechunk((125, 125)).persist()
    wait(x)
    client.run(settle)
    assert total(client, "object_held_nbytes") > 3_000_000
    assert total(client, "disk_held_nbytes") <= 2 * DISK
    assert listed(s3, ".blk")
    np.testing.assert_array_equal((x + x.T).compute(), expected + expected.T)
    # What is uninstalled leaves nothing, and loses nothing.
    dask_gpurt.uninstall(client)
    assert listed(s3) == []
    np.testing.assert_array_equal(x.compute(), expected)


def test_objects_that_were_damaged_are_computed_again(client: Client, s3: S3Server) -> None:
    install(client, s3)
    x = persisted(client)
    fs = fsspec.filesystem("s3")
    paths = listed(s3, ".blk")
    assert len(paths) >= 15
    for number, path in enumerate(paths):
        body = fs.cat_file(path)
        match number % 3:
            case 0:
                fs.rm_file(path)
            case 1:
                fs.pipe_file(path, body[: len(body) // 2])
            case _:
                fs.pipe_file(path, body[:100] + b"\xff\xff\xff" + body[103:])
    np.testing.assert_array_equal(x.compute(), np.arange(1_000_000.0))
    assert total(client, "host_corrupt_blocks") >= len(paths) // 2


def test_a_store_that_fails_is_survived(client: Client, s3: S3Server) -> None:
    install(client, s3)
    x = persisted(client)
    s3.fault = Fault("GET", "status", 403)
    np.testing.assert_array_equal(x.compute(), np.arange(1_000_000.0))
    # Nor does it take anything now. All is held in memory, which is too much, and nothing is lost.
    s3.fault = Fault("PUT", "status", 403)
    y = (x[:250_000] + 1).persist()
    wait(y)
    np.testing.assert_array_equal(y.compute(), np.arange(250_000.0) + 1)
    assert total(client, "host_write_failures") > 0


def double(value: Any) -> Any:
    return value * 2


def test_scattered_data_that_is_gone_fails_clearly(client: Client, s3: S3Server) -> None:
    install(client, s3, **{"disk-limit": 1})
    futures = client.scatter([np.full(100_000, n, dtype="f8") for n in range(10)])
    wait(futures)
    client.run(settle)
    fs = fsspec.filesystem("s3")
    for path in listed(s3, ".blk"):
        fs.rm_file(path)
    statuses = set()
    for number, future in enumerate(futures):
        result = client.submit(double, future, pure=False)
        wait(result, timeout=30)
        statuses.add(result.status)
        if result.status == "finished":
            assert (result.result() == number * 2).all()
        else:
            assert isinstance(result.exception(), CorruptDataError)
            with pytest.raises(GpurtError, match="cannot be computed again"):
                future.result(timeout=10)
    assert statuses == {"finished", "error"}


def die_at_write(number: int, dask_worker: Any = None) -> int:
    """Kill this process in the middle of the file that it writes then; returns its pid."""
    honest = os.pwritev
    writes = 0

    def pwritev(fd: int, pieces: list[Any], offset: int) -> int:
        nonlocal writes
        writes += 1
        if writes == number:
            honest(fd, [pieces[0][: len(pieces[0]) // 2]], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(fd, pieces, offset)

    os.pwritev = pwritev  # type: ignore[assignment]
    return os.getpid()


def folder_of(dask_worker: Any = None) -> str:
    path: str = dask_worker.extensions["gpurt"].memory._folder.path
    return path


def test_a_worker_that_is_killed_while_it_spills(client: Client, s3: S3Server, tmp_path: Path) -> None:
    install(client, s3, directory=str(tmp_path), **{"disk-limit": None, "object-url": None})
    folders = client.run(folder_of)
    victim, dead = next(iter(folders.items()))
    (pid,) = client.run(die_at_write, 5, workers=[victim]).values()
    n = 1000
    expected = np.arange(n * n, dtype="f8").reshape(n, n)
    with workers_getting_ready(client, 1):
        # Four times what the victim may hold, whichever of the two makes more of the rest.
        given: dict[str, Any] = {"workers": [victim], "allow_other_workers": True, "pure": False}
        pieces = [client.submit(np.full, 25_000, float(number), **given) for number in range(20)]
        x = da.arange(n * n, dtype="f8", chunks=n * 125).reshape(n, n).rechunk((125, 125)).persist()
        np.testing.assert_array_equal((x + x.T).compute(), expected + expected.T)
        for number, piece in enumerate(client.gather(pieces)):
            np.testing.assert_array_equal(piece, np.full(25_000, float(number)))
    assert not os.path.exists(f"/proc/{pid}"), "it should have died"
    # The nanny has started another one in its place, which begins with removing what it left.
    living = client.run(folder_of)
    assert len(living) == 2
    assert dead not in living.values()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        os.path.basename(path) + suffix for path in living.values() for suffix in ("", ".lock")
    )
    np.testing.assert_array_equal(x.compute(), expected)
