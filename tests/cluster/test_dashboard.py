"""The pages on a real cluster, in a real browser: they come, show what happens, and go without a trace."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from browser import Browser
from clusters import beat, local_cluster
from distributed import Client, LocalCluster, wait
from simulated_workers import Simulated

import dask_gpurt
from dask_gpurt.observe.board import Board

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PANELS = ("tiers", "flow", "workers", "moves", "event_loop", "shuffles", "placement", "decisions")
#: The text of a panel that is made of text: of the element that Bokeh made for it, behind which is one more document.
TEXT = """[...document.querySelectorAll('[data-root-id]')].map(root => root.firstElementChild)
    .find(view => view.shadowRoot.textContent.includes('{title}')).shadowRoot.querySelector('.bk-clearfix').textContent"""
ROOT = "Bokeh.documents[0].get_model_by_name('{name}')"
#: Whether all that a page has is drawn, and has room: a plot is no mere stripe, its title is not cut off, text is there.
DRAWN = """(() => {
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = "bold 13px Helvetica, Arial, sans-serif";
    const roots = Bokeh.documents[0].roots();
    const plots = roots.flatMap(root => root.children ?? [root]).filter(root => root.title && root.visible);
    const texts = [...document.querySelectorAll("[data-root-id]")].map(root => root.firstElementChild.shadowRoot.textContent);
    return roots.length > 0 && plots.every(plot => plot.inner_width > 60 && plot.inner_height > 60
            && plot.title.text.split("\\n").every(line => pen.measureText(line).width < plot.inner_width + 22))
        && roots.filter(root => root.text !== undefined).every(root => texts.some(text => text.includes("run") || text.includes("task")))
        && document.documentElement.scrollWidth <= window.innerWidth;
})()"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(2, memory_limit="1 GiB") as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        yield client
        dask_gpurt.uninstall(client)


def fetch(client: Client, path: str) -> str:
    base = client.dashboard_link.removesuffix("/status")
    with urllib.request.urlopen(base + path, timeout=30) as answer:
        return str(answer.read().decode())


def pages(client: Client) -> tuple[str, list[str], Any]:
    """What the dashboard offers: the menu, the panels for JupyterLab, and what is served."""
    menu = [line.strip() for line in fetch(client, "/system").splitlines() if "<a href=" in line]
    return fetch(client, "/individual-plots.json"), menu, client.run_on_scheduler(served)


def served(dask_scheduler: Any) -> Any:
    applications = dask_scheduler.http_application.applications
    metrics = sorted(dask_scheduler.periodic_callbacks)
    return len(applications), [sorted(a.app_paths) for a in applications if hasattr(a, "app_paths")], metrics


#: So little that some of the work is spilled, as it is.
LITTLE = {"memory.host-limit": "100 MiB", "memory.compression": "off"}


def some_work() -> list[Any]:
    """Spill, shuffle, and place; it lasts as long as what is returned."""
    frame = pd.DataFrame({"key": np.arange(200_000) % 1000, "value": np.ones(200_000)})
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        shuffled = dd.from_pandas(frame, npartitions=8).shuffle("key").persist()
    array = da.arange(48_000_000, chunks=4_000_000, dtype="f8").persist()
    wait([shuffled, array])
    assert float(array.sum().compute()) == 48e6 * (48e6 - 1) / 2
    assert int(shuffled.value.sum().compute()) == 200_000
    return [shuffled, array]


def test_the_page_comes_and_goes_without_a_trace(client: Client) -> None:
    before = pages(client)
    dask_gpurt.install(client)
    plots, menu, _ = pages(client)
    assert "/individual-gpurt-tiers" in json.loads(plots).values()
    assert '<a href="gpurt">Gpurt</a>' in menu
    assert any("individual-gpurt-flow" in line for line in menu)
    assert "Bokeh" in fetch(client, "/gpurt")
    dask_gpurt.install(client)
    assert sorted(pages(client)[0]) == sorted(plots)
    dask_gpurt.uninstall(client)
    assert pages(client) == before
    with pytest.raises(HTTPError, match="404") as refused:
        fetch(client, "/gpurt")
    refused.value.close()


def test_without_a_dashboard_everything_else_is_installed() -> None:
    options: dict[str, Any] = {"dashboard_address": None, "scheduler_kwargs": {"dashboard": False}}
    with local_cluster(1, processes=False, **options) as cluster, Client(cluster) as client:
        assert dask_gpurt.install(client).installed("placement")


def test_below_a_prefix() -> None:
    with (
        dask.config.set({"distributed.dashboard.link": "{scheme}://{host}:{port}/status"}),
        local_cluster(1, processes=False, scheduler_kwargs={"http_prefix": "/below"}) as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client)
        assert "Bokeh" in fetch(client, "/below/gpurt")
        assert "Bokeh" in fetch(client, "/below/individual-gpurt-tiers")


def test_heartbeats_tell_of_the_tiers_and_the_table_of_workers_shows_them(client: Client) -> None:
    dask_gpurt.install(client, config=LITTLE)
    held = some_work()
    client.run(beat)

    def table(dask_scheduler: Any) -> Any:
        from distributed.dashboard.components.scheduler import WorkerTable

        shown: Any = WorkerTable(dask_scheduler)
        shown.update()
        return {name: list(column) for name, column in shown.source.data.items()}

    shown = client.run_on_scheduler(table)
    # The first row is for all workers together.
    assert all(text.endswith("of 100.00 MiB") for text in shown["gpurt host"][1:])
    assert any(nbytes > 0 for nbytes in shown["memory_spilled"])
    del held
    dask_gpurt.uninstall(client)
    client.run(beat)
    assert not any(name.startswith("gpurt") for name in client.run_on_scheduler(table))
    assert not any(client.run(lambda dask_worker: [n for n in dask_worker.metrics if "gpurt" in n]).values())


async def spill_shards(dask_worker: Any) -> tuple[float, float]:
    memory = dask_worker.extensions["gpurt"].memory
    names = [f"shards-{number}" for number in range(40)]
    for rank, name in enumerate(names):
        memory.store.put(name, [bytearray(2**22)], await memory.store.reserve(2**22), rank=rank)
    (await memory.store.reserve(2**26)).release()
    spilled = tuple(dask_worker.data.spilled_total)
    for name in names:
        memory.store.discard(name)
    return spilled


def test_dasks_bars_do_not_take_shards_for_spilled_keys(client: Client) -> None:
    dask_gpurt.install(client, config=LITTLE)
    for keys_nbytes, disk_nbytes in client.run(spill_shards).values():
        assert keys_nbytes == 0
        assert disk_nbytes > 2**26


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_what_happens(client: Client, scheme: str) -> None:
    dask_gpurt.install(client, config=LITTLE)

    async def look() -> None:
        async with Browser(scheme) as browser:
            await browser.open(client.dashboard_link.replace("/status", "/gpurt"))
            for name in PANELS:
                assert await browser.wait_for(f"!!{ROOT.format(name=name)}")
            held = await asyncio.to_thread(some_work)
            assert "HOST" in await browser.wait_for(
                f"{ROOT.format(name='tiers')}.title.text.includes('DISK') && {ROOT.format(name='tiers')}.title.text"
            )
            counts = f"{ROOT.format(name='flow')}.renderers[0].data_source.data"
            await browser.wait_for(f"{counts}.count[{counts}.what.indexOf('host to disk')] > 100e6")
            assert await browser.wait_for(f"{ROOT.format(name='placement')}.renderers[0].data_source.data.count[0] > 0")
            # Tables may still be as they were before the end of the work.
            assert await browser.wait_for(f"({TEXT.format(title='Latest decisions')}).includes('only-holder')")
            assert await browser.wait_for(f"({TEXT.format(title='Shuffles')}).includes('1 so far')")
            assert await browser.wait_for(f"{ROOT.format(name='event_loop')}.inner_width > 100")
            light = await browser.wait_for("getComputedStyle(document.body).backgroundColor")
            assert light == ("rgb(250, 250, 250)" if scheme == "light" else "rgb(27, 27, 27)")
            assert not browser.errors
            del held

    asyncio.run(look())


@pytest.fixture(scope="module")
def simulated() -> Iterator[Client]:
    """What looks like a cluster of 200 workers to the pages."""
    with local_cluster(1, processes=False) as cluster, Client(cluster) as client:
        dask_gpurt.install(client)
        Simulated(cluster.scheduler.plugins["gpurt"].observer, count=200)
        yield client


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_200_workers_have_room(simulated: Client, scheme: str) -> None:
    async def look() -> None:
        async with Browser(scheme) as browser:
            await browser.open(simulated.dashboard_link.replace("/status", "/gpurt"))
            await browser.wait_for(f"{ROOT.format(name='matrix')}.title.text.includes('TiB')")
            assert await browser.wait_for(DRAWN)
            host = f"{ROOT.format(name='workers')}.children[1]"
            assert await browser.wait_for(f"{host}.renderers[0].data_source.data.rows[0] === 200")
            # Two hundred names would be no more than a grey bar; the busiest few have theirs.
            assert await browser.wait_for(f"{host}.left[0].major_label_overrides.size === 0")
            assert await browser.wait_for(f"{ROOT.format(name='moves')}.y_range.factors.length === 12")
            # The history is that of three minutes, whoever begins to look.
            used = f"{ROOT.format(name='tiers')}.renderers[0].data_source.data.host"
            assert await browser.wait_for(f"{used}.every(Number.isFinite)")
            assert not browser.errors

    asyncio.run(look())


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_panel_of_jupyterlab_is_small(simulated: Client, scheme: str) -> None:
    """Its extension shows whatever ``/individual-plots.json`` names, each in a frame of its own."""
    mine = {
        name: path for name, path in json.loads(fetch(simulated, "/individual-plots.json")).items() if "gpurt" in path
    }
    assert {path.removeprefix("/individual-gpurt-").replace("-", "_") for path in mine.values()} == {*PANELS, "matrix"}
    assert all(name.startswith("Individual Gpurt ") for name in mine)

    async def look() -> None:
        async with Browser(scheme, size=(460, 320)) as browser:
            for path in mine.values():
                await browser.open(simulated.dashboard_link.replace("/status", path))
                assert await browser.wait_for(DRAWN), path
                assert not browser.errors
            # The check is one: it sees a title that does not fit.
            await browser.open(simulated.dashboard_link.replace("/status", "/individual-gpurt-placement"))
            assert await browser.wait_for(DRAWN)
            await browser.wait_for(f"{ROOT.format(name='placement')}.title.text = 'much too long '.repeat(9)")
            assert await browser.wait_for(f"!{DRAWN}")

    asyncio.run(look())


@pytest.mark.browser
def test_dasks_own_pages_tell_of_tiers(client: Client) -> None:
    dask_gpurt.install(client, config=LITTLE)
    held = some_work()
    client.run(beat)

    async def look() -> None:
        async with Browser() as browser:
            await browser.open(client.dashboard_link.replace("/status", "/workers"))
            cells = """[...Bokeh.documents[0].roots()].flatMap(root => [...root.select({type: "ColumnDataSource"})])
                .map(source => source.data["gpurt host"]).filter(Boolean).map(String).join()"""
            await browser.wait_for(f"({cells}).includes('of 100.00 MiB')")
            await browser.open(client.dashboard_link)
            await browser.wait_for("JSON.stringify(Bokeh.documents[0].to_json()).includes('spilled to disk')")
            assert not browser.errors

    asyncio.run(look())
    del held


@pytest.mark.browser
def test_an_open_page_stands_still_after_an_uninstall(client: Client) -> None:
    # Dask keeps the schedulers that this process had before.
    before = client.run_on_scheduler(boards)
    dask_gpurt.install(client)

    async def look() -> None:
        async with Browser() as browser:
            await browser.open(client.dashboard_link.replace("/status", "/individual-gpurt-tiers"))
            await browser.wait_for(f"{ROOT.format(name='tiers')}.inner_height > 100")
            await asyncio.to_thread(dask_gpurt.uninstall, client)
            assert not browser.errors

    asyncio.run(look())
    # Once the scheduler has heard that the browser is gone, nothing is left of the page.
    deadline_s = time.monotonic() + 60
    while client.run_on_scheduler(boards) > before:
        assert time.monotonic() < deadline_s, "something of the page is left"


def boards(dask_scheduler: Any) -> int:
    gc.collect()
    return sum(isinstance(thing, Board) for thing in gc.get_objects())
