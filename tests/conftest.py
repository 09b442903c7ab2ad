"""What all tests share: clusters on the loopback address, and the rule for GPU tests."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dask
import pytest
from browser import chromium
from clusters import local_cluster
from cuda_emulation import build
from distributed import Client, LocalCluster
from hypothesis import settings

if TYPE_CHECKING:
    from s3_server import S3Server

#: Imported by tests, under its own name; to look for examples in it, pytest would import it once more under another.
collect_ignore = [
    "browser.py",
    "clusters.py",
    "cuda_emulation.py",
    "device_exchange.py",
    "device_standin.py",
    "emulated_cuda",
    "kubernetes_schemas.py",
    "mutations.py",
    "placement_nodes.py",
    "rmm_standin.py",
    "s3_server.py",
    "screenshots.py",
    "simulated_workers.py",
]


NO_BROWSER = "there is no Chromium on this machine (Debian, Ubuntu: apt install chromium)"

# How long an example takes says more about what else the machine does; each test has its own limit (pytest-timeout).
settings.register_profile("dask-gpurt", deadline=None)
settings.load_profile("dask-gpurt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=20, help="how many seeds of chaos run in the simulator")
    parser.addoption("--stock", action="store_true", help="faults of the machine on Dask as it is, to compare")
    parser.addoption("--fuzz-minutes", type=float, default=0, help="how long parsers are fuzzed beyond the usual")


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what wants a browser where there is none; where CI is set, that is a failure: a green run has to mean that it was looked."""
    if item.get_closest_marker("browser") and chromium() is None:
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(f"{NO_BROWSER}; where CI is set, that is no reason to skip", pytrace=False)
        pytest.skip(NO_BROWSER)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unseen = [report for report in terminalreporter.getreports("skipped") if NO_BROWSER in str(report.longrepr)]
    if unseen:
        terminalreporter.section("not tested", sep="=", yellow=True, bold=True)
        terminalreporter.line(f"{len(unseen)} of the dashboard and of reports in a browser: {NO_BROWSER}", yellow=True)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    """Two worker processes with one thread and 1 GiB each, validating their state machines."""
    with (
        dask.config.set({"distributed.scheduler.validate": True, "distributed.worker.validate": True}),
        local_cluster(2, memory_limit="1 GiB") as cluster,
    ):
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client


@pytest.fixture(scope="session")
def gpus() -> int:
    """The number of CUDA devices of this machine. Asked of the system, not of what is tested."""
    return _gpus()


@pytest.fixture
def direct(tmp_path: Path) -> int:
    """The flag of files that are read and written past the page cache. Asked of the system, not of what is tested."""
    try:
        fd = os.open(tmp_path / "asked", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip(f"the file system of {tmp_path} refuses O_DIRECT")
    try:
        os.pwrite(fd, mmap.mmap(-1, mmap.PAGESIZE), 0)
    finally:
        os.close(fd)
        os.unlink(tmp_path / "asked")
    return os.O_DIRECT


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """A real S3 server with one bucket, which this process and its children find."""
    pytest.importorskip("moto", reason="moto brings the S3 server")
    from s3_server import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the emulated CUDA driver; see tests/emulated_cuda/README.md."""
    if shutil.which("cc") is None:
        # Not skipped: a green run has to mean that the path of the GPU was taken.
        pytest.fail("the tests of the GPU's path build an emulated CUDA driver, which needs a C compiler (cc)")
    folder = tmp_path_factory.mktemp("emulated-cuda")
    build(folder)
    return folder
