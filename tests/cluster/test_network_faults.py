"""Networks between workers that are slow, lose packets, are cut for a while or for good: right answers, and soon after.

With ``--stock``, Dask without dask-gpurt is put through the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import network_site
import pytest
import wire
from wire import Wire

pytestmark = pytest.mark.timeout(600)

#: UCX would find that both namespaces are one machine, and go by its memory.
UCX_BY_THE_CABLE = {"UCX_TLS": "tcp,self", "UCX_LOG_LEVEL": "fatal"}

BAD: list[dict[str, Any]] = [{"delay_s": 0.2}, {"loss": 0.05}, {"rate_nbytes": 1e6}]
AWFUL: dict[str, Any] = {"delay_s": 0.05, "loss": 0.02, "rate_nbytes": 5e6}

#: What each work sends is ten times as much.
UNDER_WAY_NBYTES = 300_000

#: Beside the time that the cable is cut: Dask closes a connection 30 seconds after it went dead, tries for as long to open
#: another, and a nanny starts a worker anew.
LIMIT_S = 150


class Site:
    """A cluster on both hosts; see :mod:`network_site`."""

    def __init__(self, cable: Wire, process: subprocess.Popen[str]) -> None:
        self.cable = cable
        self._process = process

    def hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster's process has ended"
        said: dict[str, Any] = json.loads(line)
        return said

    def begin(self, work: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(work + "\n")
        self._process.stdin.flush()
        assert self.hear() == {"begun": True}

    def right(self, limit_s: float = LIMIT_S) -> None:
        said = self.hear()
        assert said.pop("elapsed_s") < limit_s
        assert said == {"right": True}

    def end(self) -> int:
        """Let it end, and say how many bytes went by UCX."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        nbytes: int = self.hear()["by_ucx_nbytes"]
        return nbytes


@contextlib.contextmanager
def site(folder: Path, transport: str) -> Iterator[Site]:
    with Wire() as cable:
        module = Path(network_site.__file__)
        process = subprocess.Popen(
            ["ip", "netns", "exec", cable.near, sys.executable, str(module), cable.far, str(folder), transport],
            env={**os.environ, **UCX_BY_THE_CABLE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Nothing waits for ever: whoever reads from a process that was killed has read all.
        watchdog = threading.Timer(500, process.kill)
        watchdog.start()
        try:
            found = Site(cable, process)
            assert len(found.hear()["ready"]) == 2
            yield found
            cable.set()
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            watchdog.cancel()
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


@pytest.fixture(params=["dask", "auto"])
def transport(request: pytest.FixtureRequest) -> str:
    if reason := wire.unavailable():
        pytest.skip(reason)
    if request.config.getoption("--stock"):
        return "stock"
    if request.param == "auto" and importlib.util.find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    found: str = request.param
    return found


def cut_within(cluster: Site, work: str, cut_s: float) -> None:
    """Cut the cable while the work is under way, which it is for seconds: it is slow."""
    cluster.cable.set(rate_nbytes=2e6)
    cluster.begin(work)
    cluster.cable.carry(UNDER_WAY_NBYTES)
    cluster.cable.set(cut=True)
    # So long is the fault.
    time.sleep(cut_s)
    cluster.cable.set()
    cluster.right(cut_s + LIMIT_S)


@pytest.mark.parametrize("transport", ["auto"], indirect=True)
def test_a_network_that_is_slow_and_loses_packets_and_is_cut(tmp_path: Path, transport: str) -> None:
    with site(tmp_path, transport) as cluster:
        cluster.begin("shuffle")
        cluster.right()
        cluster.cable.set(**AWFUL)
        for work in network_site.WORK:
            cluster.begin(work)
            cluster.right()
        cut_within(cluster, "shuffle", 2.0)
        assert transport == "stock" or cluster.end() > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("work", sorted(network_site.WORK))
@pytest.mark.parametrize("transport", ["dask", "auto"], indirect=True)
def test_a_cable_is_bad_in_one_way(tmp_path: Path, transport: str, work: str) -> None:
    with site(tmp_path, transport) as cluster:
        for bad in BAD:
            cluster.cable.set(**bad)
            cluster.begin(work)
            cluster.right()


# Dask takes a connection for dead after half a minute.
@pytest.mark.exhaustive
@pytest.mark.parametrize("cut_s", [5.0, 20.0, 60.0])
@pytest.mark.parametrize("work", sorted(network_site.WORK))
@pytest.mark.parametrize("transport", ["dask", "auto"], indirect=True)
def test_a_cable_is_cut_for_a_while(tmp_path: Path, transport: str, work: str, cut_s: float) -> None:
    with site(tmp_path, transport) as cluster:
        cut_within(cluster, work, cut_s)
        cluster.begin("shuffle")
        cluster.right()


@pytest.mark.exhaustive
@pytest.mark.parametrize("work", sorted(network_site.WORK))
@pytest.mark.parametrize("transport", ["dask", "auto"], indirect=True)
def test_a_cable_is_cut_until_the_work_is_done_without_it(tmp_path: Path, transport: str, work: str) -> None:
    with site(tmp_path, transport) as cluster:
        cluster.cable.set(rate_nbytes=2e6)
        cluster.begin(work)
        cluster.cable.carry(UNDER_WAY_NBYTES)
        cluster.cable.set(cut=True)
        cluster.right()
        cluster.cable.set()
        cluster.begin("shuffle")
        cluster.right()
