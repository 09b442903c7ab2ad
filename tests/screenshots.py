"""Takes the pictures in docs/images: ``python tests/screenshots.py``, with Chromium on this machine.

Covers: the dashboard of two workers at real work, light; that of 200 workers with simulated figures, dark; a report of the real work.
Does not cover: whether the pictures are good, for which somebody has to look at them.
"""

from __future__ import annotations

import asyncio
import io
import tempfile
import threading
from pathlib import Path

import dask.array as da
from browser import Browser
from clusters import local_cluster
from distributed import Client, wait
from PIL import Image
from simulated_workers import Simulated

import dask_gpurt
from dask_gpurt.demo.frames import Tables

IMAGES = Path(__file__).parents[1] / "docs" / "images"
#: Of the pictures, in pixels.
WIDTH = 1024
#: Whether there is something to see: data goes to disk, and both workers are at it. Then the page stands still for its picture.
MOVING = """(() => {
    const [flow, moves] = ["flow", "moves"].map(name => Bokeh.documents[0].get_model_by_name(name));
    const {what, rate} = flow.renderers[0].data_source.data;
    return rate[what.indexOf("host to disk")] > 0 && rate[what.indexOf("disk to host")] > 0 && moves.y_range.factors.length === 2;
})()"""


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
        await browser.wait_for(f"({MOVING}) && ((Bokeh.documents[0].apply_json_patch = () => {{}}), true)")
        await picture(browser, "dashboard-light.png")
        await working
    async with Browser("light", (1300, 2300)) as browser:
        await browser.open(path.as_uri())
        await browser.wait_for("Bokeh.documents[0].roots().filter(root => root.inner_width > 100).length >= 6")
        await picture(browser, "report.png")


def page(client: Client) -> str:
    """Return the address of the page."""
    return str(client.dashboard_link).replace("/status", "/gpurt")


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
        Simulated(cluster.scheduler.plugins["gpurt"].observer, count=200)
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
