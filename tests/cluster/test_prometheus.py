"""Metrics on Dask's own endpoints, as Prometheus reads them; and the Grafana dashboard, which asks for nothing else."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, wait
from prometheus_client.parser import text_string_to_metric_families

import dask_gpurt
from dask_gpurt.observe.prometheus import collectors

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DOCS = Path(__file__).parents[2] / "docs"
GRAFANA, DOCUMENTATION = DOCS / "grafana" / "dask-gpurt.json", DOCS / "dashboard.md"
CHUNK_NBYTES, CHUNKS = 8 * 2_000_000, 16

#: Name and labels of a sample to its value.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_cluster(2, memory_limit="1 GiB") as cluster, Client(cluster) as client:
        yield client


def port(dask_worker: Any) -> Any:
    # Dask gives the scheduler under this name, too, to what runs there.
    return dask_worker.http_server.port


async def settle(dask_worker: Any) -> None:
    """Wait until what is on its way down has arrived."""
    await dask_worker.extensions["gpurt"].memory._host.settle()


def scrape(client: Client) -> dict[str, list[Any]]:
    """Address of each server to its families, ours and Dask's; read as Prometheus reads them."""
    ports = {"scheduler": client.run_on_scheduler(port), **client.run(port)}
    found = {}
    for server, number in ports.items():
        with urllib.request.urlopen(f"http://127.0.0.1:{number}/metrics", timeout=30) as answer:
            found[server] = list(text_string_to_metric_families(answer.read().decode()))
    return found


def samples(families: list[Any]) -> Samples:
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def total(scraped: dict[str, list[Any]], name: str, **labels: str) -> float:
    """Sum a metric over servers, and over all labels but these."""
    wanted = labels.items()
    return sum(
        value
        for families in scraped.values()
        for (found, of), value in samples(families).items()
        if found == name and wanted <= of
    )


def ours(scraped: dict[str, list[Any]]) -> set[str]:
    return {family.name for families in scraped.values() for family in families if "gpurt" in family.name}


def test_metrics_come_go_and_agree_with_what_was_done(client: Client) -> None:
    assert not ours(scrape(client))
    dask_gpurt.install(client, config={"memory.host-limit": "64 MiB", "memory.compression": "off"})
    before = scrape(client)
    assert total(before, "dask_scheduler_gpurt_workers", part="memory", state="installed") == 2
    assert total(before, "dask_scheduler_gpurt_workers", state="stock") == 0
    assert total(before, "dask_worker_gpurt_tier_limit_bytes", tier="host") == 2 * 64 * 2**20
    frame = pd.DataFrame({"key": np.arange(100_000) % 1000, "value": np.ones(100_000)})
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        assert len(dd.from_pandas(frame, npartitions=4).shuffle("key").compute()) == len(frame)
    array = da.arange(CHUNKS * CHUNK_NBYTES // 8, chunks=CHUNK_NBYTES // 8, dtype="f8").persist()
    wait(array)
    array.sum().compute()
    client.run(settle)
    after = scrape(client)
    held = sum(total(after, "dask_worker_gpurt_tier_bytes", tier=tier) for tier in ("host", "disk"))
    assert held >= CHUNKS * CHUNK_NBYTES
    assert total(after, "dask_worker_gpurt_moved_bytes_total", source="host", target="disk") >= held - 2 * 64 * 2**20
    assert total(after, "dask_worker_gpurt_shuffle_runs_total") == 2
    sent = sum(total(after, "dask_worker_gpurt_shuffle_sent_bytes_total", path=path) for path in ("ucx", "comm"))
    assert sent > 0
    # What is sent has headers.
    assert 0.99 * sent < total(after, "dask_worker_gpurt_shuffle_received_bytes_total") <= sent
    assert total(after, "dask_scheduler_gpurt_placement_decisions_total") > 0
    assert total(after, "dask_worker_gpurt_lost_blocks_total") == 0
    for name in ours(after):
        if name.endswith("_bytes") and "tier" not in name:
            assert total(after, f"{name}_total") >= total(before, f"{name}_total")
    dask_gpurt.uninstall(client)
    assert not ours(scrape(client))


def test_names_are_as_dask_makes_its_own(client: Client) -> None:
    dask_gpurt.install(client)
    scraped = scrape(client)
    for server, families in scraped.items():
        prefix = "dask_scheduler_gpurt_" if server == "scheduler" else "dask_worker_gpurt_"
        found = [family for family in families if "gpurt" in family.name]
        assert found
        for family in found:
            assert family.name.startswith(prefix)
            assert family.documentation
            assert family.type in ("gauge", "counter")
            assert all(sample.name.endswith("_total") == (family.type == "counter") for sample in family.samples)
    dask_gpurt.uninstall(client)


def test_the_grafana_dashboard_asks_for_metrics_that_exist(client: Client) -> None:
    dask_gpurt.install(client)
    families = [family for found in scrape(client).values() for family in found]
    there = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads(GRAFANA.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    asked = {name for query in queries for name in re.findall(r"\bdask_\w+", query)}
    assert asked
    assert asked <= there
    gpurt = {name for name in there if "gpurt" in name}
    assert len(asked & gpurt) >= len(gpurt) / 2
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            # What a legend names is among the labels, of what has samples already.
            (name, *_) = re.findall(r"\bdask_\w+", target["expr"])
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"])) - {"instance"}
            assert name not in labels or shown <= labels[name]
    dask_gpurt.uninstall(client)


def test_the_documentation_lists_what_there_is(client: Client) -> None:
    dask_gpurt.install(client)
    families = [family for found in scrape(client).values() for family in found if "gpurt" in family.name]
    there = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    told = set(re.findall(r"\bdask_(?:worker|scheduler)_gpurt_\w+", DOCUMENTATION.read_text()))
    # That one is there with a GPU.
    assert told - there == {"dask_worker_gpurt_allocation_failures_total"}
    assert there <= told
    dask_gpurt.uninstall(client)


def test_two_workers_in_one_process_have_their_own() -> None:
    with local_cluster(2, processes=False) as cluster, Client(cluster) as client:
        dask_gpurt.install(client, config={"memory.host-limit": "64 MiB"})
        where = min(cluster.workers.values(), key=lambda worker: worker.address)
        value = client.submit(np.ones, 10**6, workers=[where.address])
        wait(value)
        held = {
            server: samples(families)["dask_worker_gpurt_tier_bytes", frozenset({("tier", "host")})]
            for server, families in scrape(client).items()
            if server != "scheduler"
        }
        assert held.pop(where.address) == 8 * 10**6
        assert set(held.values()) == {0}
    # Nothing is left in this process, though nobody has uninstalled it.
    assert collectors.idle
