"""What all tests share: clusters on the loopback address, and the rule for GPU tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import dask
import pytest
from distributed import Client, LocalCluster

if TYPE_CHECKING:
    from s3_server import S3Server

#: Imported by tests, under its own name; to look for examples in it, pytest would import it once more under another.
collect_ignore = ["device_standin.py", "s3_server.py"]


def _gpus() -> int:
    """Count the CUDA devices of this machine without loading CUDA."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False, timeout=30)
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not _gpus():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine (nvidia-smi lists none)"))


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Two worker processes with one thread and 1 GiB each, validating their state machines."""
    with (
        dask.config.set({"distributed.scheduler.validate": True, "distributed.worker.validate": True}),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            memory_limit="1 GiB",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
        ) as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """A real S3 server with one bucket, which this process and its children find."""
    pytest.importorskip("moto", reason="moto brings the S3 server")
    from s3_server import serving

    with serving() as server:
        yield server
