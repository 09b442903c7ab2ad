"""Takes the pictures in docs/images: ``python tests/screenshots.py``, with Chromium on this machine.

Covers: the dashboard of two workers at real work, light; that of 200 workers with simulated figures, dark; a report of the real work.
Does not cover: whether the pictures are good, for which somebody has to look at them.
"""

from __future__ import annotations

import asyncio
import io
import math
import tempfile
import threading
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from browser import Browser
from clusters import local_cluster
from distributed import Client, wait
from distributed.metrics import time
from PIL import Image

import dask_gpurt
from dask_gpurt.demo.frames import Tables
from dask_gpurt.observe.board import LENGTH, ClusterReport, Placing, WorkerState
from dask_gpurt.observe.journal import Journal
from dask_gpurt.observe.reports import RunReport, TierReport, WorkerReport

IMAGES = Path(__file__).parents[1] / "docs" / "images"
GIB = 2**30
#: Of the pictures, in pixels.
WIDTH = 1024


def work(full: threading.Event) -> None:
    """Do what a user might, larger than the memory that is there; set ``full`` when it is."""
    tables = Tables.of(300 * 2**20, parts=24)
    tables.shuffle()
    tables.merge()
    x = da.random.random((11_000, 11_000), chunks=(1_000, 1_000)).persist()
    wait(x)
    full.set()
    (x + x.T).mean().compute()
    (x @ x[:, :4000]).sum().compute()


def recorded(path: Path, full: threading.Event) -> None:
    """Work, and make a report of it."""
    with dask_gpurt.report(path):
        work(full)


async def picture(browser: Browser, name: str) -> None:
    """Take a picture, in the size of the documentation."""
    with Image.open(io.BytesIO(await browser.picture())) as image:
        height = round(image.height * WIDTH / image.width)
        image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(
            256, Image.Quantize.FASTOCTREE
        ).save(IMAGES / name, optimize=True)
    assert not browser.errors, browser.errors


async def real(client: Client, path: Path) -> None:
    """Take pictures of the page in the middle of real work, and of a report of it."""
    full = threading.Event()
    async with Browser("light", (1400, 1500)) as browser:
        await browser.open(page(client))
        working = asyncio.create_task(asyncio.to_thread(recorded, path, full))
        await asyncio.to_thread(full.wait)
        await browser.wait_for("Bokeh.documents[0].get_model_by_name('flow').title.text.includes('/s')")
        await picture(browser, "dashboard-light.png")
        await working
    async with Browser("light", (1300, 2300)) as browser:
        await browser.open(path.as_uri())
        await browser.wait_for("Bokeh.documents[0].roots().filter(root => root.inner_width > 100).length >= 6")
        await picture(browser, "report.png")


def page(client: Client) -> str:
    """Return the address of the page."""
    return str(client.dashboard_link).replace("/status", "/gpurt")


class Simulated:
    """The figures of 200 workers in 25 hosts, in the middle of a large job."""

    def __init__(self, observer: Any) -> None:
        self.random = np.random.default_rng(0)
        self.names = {f"tcp://10.0.{i // 8}.{i % 8}:9000": f"node{i // 8}-{i % 8}" for i in range(200)}
        self.moved_s = 0.0
        observer.look = lambda: self.at(time())
        observer.journals = self.journals
        observer.names = lambda: self.names
        now_s = time()
        for age in range(LENGTH, 0, -1):
            observer.board.observe(now_s - age, self.at(now_s - age))

    def at(self, now_s: float) -> ClusterReport:
        """Say what is known at a time."""
        workers = []
        for number, (address, name) in enumerate(self.names.items()):
            wave = math.sin(now_s / 30 + number / 40)
            device, host = (0.75 + 0.2 * wave) * 70 * GIB, (0.5 + 0.3 * wave) * 96 * GIB
            spilled = max(0.0, 40 * GIB * math.sin(now_s / 60 + number // 8))
            elapsed_s = now_s % 10_000
            report = WorkerReport(
                tiers={
                    "device": TierReport(int(device), 2 * GIB, 80 * GIB),
                    "host": TierReport(int(host), GIB, 96 * GIB),
                    "disk": TierReport(int(spilled), 0, None),
                    "object": TierReport(int(spilled / 4), 0, None),
                },
                moves={
                    ("device", "host"): int(elapsed_s * 2e8),
                    ("host", "device"): int(elapsed_s * 1.8e8),
                    ("host", "disk"): int(elapsed_s * 5e7),
                },
                sent={
                    "ucx": int(elapsed_s * 8e8),
                    "comm": int(elapsed_s * 2e6),
                    "inputs": int(elapsed_s * 3e7),
                    "local": 0,
                },
                received_nbytes=int(elapsed_s * 8e8),
                shuffles=4,
                runs=tuple(
                    RunReport(
                        f"{run}f3a9c21",
                        run,
                        "transfer" if run == 4 else "unpack",
                        False,
                        12,
                        run,
                        20,
                        10**10,
                        10**8,
                        10**10,
                        2,
                        0.4,
                        run,
                    )
                    for run in (3, 4)
                ),
            )
            loop_s = 0.02 + 0.3 * (number == 77) + float(self.random.exponential(0.004))
            workers.append(WorkerState(address, name, now_s, loop_s, report))
        reasons = {"planned": 48_210, "most-bytes": 11_922, "only-holder": 9_120, "idle": 312, "steal-allowed": 87}
        latest = [Placing(f"('read-parquet-{i}', {i})", "planned", f"node{i}-{i % 8}") for i in range(12)]
        return ClusterReport(workers, 0.03, reasons, 0, 12_400, 3_100, latest)

    async def journals(self) -> dict[str, Journal]:
        """Say who has sent what: everybody to all, more within a host, and one too much."""
        found = {}
        for number, address in enumerate(self.names):
            sent = {}
            for other, peer in enumerate(self.names):
                if other != number:
                    near = number // 8 == other // 8
                    nbytes = int(self.random.uniform(0.8, 1.2) * (3 if near else 1) * (2 if other == 77 else 1) * 4e8)
                    sent[peer, "ucx"] = nbytes
                    sent[peer, "inputs"] = nbytes // 20
            found[address] = Journal(sent=sent)
        return found


async def simulated(client: Client) -> None:
    """Take a picture of the page of 200 workers."""
    async with Browser("dark", (1400, 1500)) as browser:
        await browser.open(page(client))
        await browser.wait_for("Bokeh.documents[0].get_model_by_name('matrix').title.text.includes('TiB')")
        await picture(browser, "dashboard-dark.png")


def main() -> None:
    """Take all pictures."""
    with local_cluster(1, processes=False) as cluster, Client(cluster) as client:
        dask_gpurt.install(client)
        Simulated(cluster.scheduler.plugins["gpurt"].observer)
        asyncio.run(simulated(client))
    with (
        local_cluster(2, memory_limit="2 GiB") as cluster,
        Client(cluster) as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        dask_gpurt.install(client, config={"memory.host-limit": "500 MiB"})
        asyncio.run(real(client, Path(folder) / "run.html"))


if __name__ == "__main__":
    main()
