"""What a run tells of itself: Dask's shuffle page, spans, and the counters of the workers agree, and with what was moved."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import cloudpickle
import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import beat, local_cluster
from distributed import Client, wait

import dask_gpurt

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, PARTITIONS = 60_000, 8


def part(number: int) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    columns = {f"c{i}": rng.random(ROWS) for i in range(5)}
    return pd.DataFrame({"key": rng.integers(0, 1 << 40, ROWS), "id": np.arange(ROWS) + number * ROWS, **columns})


#: Key, id and columns; there is no index but the default, which takes 8 bytes in a shard.
ROW_NBYTES = 8 * 8


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        local_cluster(2, memory_limit="1 GiB", silence_logs=False) as cluster,
        Client(cluster) as client,
    ):
        yield client


async def open_ucx(dask_worker: Any) -> None:
    carrier = dask_worker.extensions["gpurt"].shuffle.carrier
    assert (await carrier.address() is None) == (carrier.without_ucx is not None)


def metrics_of(dask_worker: Any) -> Any:
    return dask_worker.extensions["gpurt"].shuffle.metrics()


def page(dask_scheduler: Any) -> tuple[dict[str, list[Any]], dict[str, float], str]:
    """Return what Dask's own page shows, by worker and in total, and the id of the shuffle's span."""
    from distributed.dashboard.components.scheduler import Shuffling

    shuffling: Any = Shuffling(dask_scheduler)
    shuffling.update()
    totals = shuffling.totals_source.data
    (active,) = dask_scheduler.plugins["shuffle"].active_shuffles.values()
    shown = {name: list(column) for name, column in shuffling.source.data.items()}
    return shown, dict(zip(totals["x"], totals["values"], strict=True)), active.run_spec.span_id


def spent_on(dask_scheduler: Any, span_id: str) -> dict[Any, float]:
    return dict(dask_scheduler.extensions["spans"].spans[span_id].cumulative_worker_metrics)


def shuffled(client: Client, **settings: Any) -> tuple[Any, Any, Any, dict[Any, float]]:
    """Shuffle, and look before it is forgotten; returns the workers' counters, the page, its totals, and the span's."""
    with dask.config.set({f"gpurt.{key}": value for key, value in settings.items()}):
        dask_gpurt.install(client, placement=False)
    try:
        # The first run may end before UCX is there.
        client.run(open_ucx)
        source = dd.from_map(part, range(PARTITIONS), meta=part(0).iloc[:0])
        result = source.shuffle("key", npartitions=PARTITIONS, shuffle_method="p2p").optimize()
        graph = dict(result.__dask_graph__())
        (barrier,) = [key for key in graph if str(key).startswith("shuffle-barrier")]
        # As long as somebody wants the barrier, the shuffle is not forgotten.
        *made, kept = client.get(graph, [*result.__dask_keys__(), barrier], sync=False)
        wait([*made, kept])
        client.run(beat)
        shown, totals, span_id = client.run_on_scheduler(page)
        each = client.run(metrics_of)
        spent = client.run_on_scheduler(spent_on, span_id=span_id)
        kept.release()
        found = pd.concat(client.gather(made)).sort_values("id", ignore_index=True)
        expected = pd.concat([part(number) for number in range(PARTITIONS)], ignore_index=True)
        pd.testing.assert_frame_equal(found, expected)
        return each, shown, totals, spent
    finally:
        dask_gpurt.uninstall(client)


def by_activity(spent: dict[Any, float]) -> dict[tuple[str, str], float]:
    """Sum what was spent on shuffles, by activity and unit."""
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    for (context, _, activity, unit), value in spent.items():
        if context == "p2p":
            found[activity, unit] += value
    return found


@pytest.mark.parametrize("transport", ["auto", "dask"])
def test_page_span_and_counters_agree(client: Client, transport: str) -> None:
    if transport == "auto":
        pytest.importorskip("ucxx", reason="ucxx is not installed")
    each, shown, totals, spent = shuffled(client, **{"shuffle.transport": transport})
    of = {name: sum(worker[name] for worker in each.values()) for name in next(iter(each.values()))}
    activity = by_activity(spent)
    total_nbytes = PARTITIONS * ROWS * ROW_NBYTES
    assert of["bytes_sent"] + of["bytes_local"] == pytest.approx(total_nbytes, rel=0.15)
    # The page.
    assert totals == {
        "Network Send": of["bytes_sent"],
        "Network Receive": of["bytes_received"],
        "Disk Write": 0,
        "Disk Read": 0,
    }
    assert dict(zip(shown["worker"], shown["comm_read"], strict=True)) == {
        address: worker["bytes_received"] for address, worker in each.items()
    }
    assert all(size > 0 for size in shown["comm_avg_size"])
    assert all(0 < duration_s < 60 for duration_s in shown["comm_avg_duration"])
    # All is sent, and all outputs are made: nothing waits.
    assert shown["comm_memory"] == shown["disk_memory"] == shown["comm_buckets"] == shown["disk_buckets"] == [0, 0]
    assert set(shown["comm_color"] + shown["disk_color"]) == {"blue"}
    assert all(limit > 0 for limit in shown["comm_memory_limit"] + shown["disk_memory_limit"])
    # The span.
    for name in ("shard-partition-cpu", "get-output-cpu", "send", "credit-wait"):
        assert activity[name, "seconds"] > 0, name
    assert activity["send", "count"] == of["messages"]
    assert activity["shards", "bytes"] == pytest.approx(of["bytes_sent"] + of["bytes_local"], rel=0.01)
    assert activity["send-ucx", "bytes"] == of["bytes_sent_ucx"]
    assert activity["send-comm", "bytes"] == activity["receive-comm", "bytes"] == of["bytes_sent_comm"]
    assert activity["receive-ucx", "bytes"] == of["bytes_sent_ucx"]
    assert (activity["receive", "seconds"] > 0) == (of["bytes_sent_ucx"] > 0)
    assert activity["credit-wait", "seconds"] == pytest.approx(of["credit_wait_s"])
    assert of["bytes_sent_ucx"] > 0 or transport == "dask"
    assert ("disk-write", "bytes") not in activity
    # What is done aside is not the tasks'.
    tasks = {activity for context, _, activity, _ in spent if context == "execute"}
    assert not tasks & {"send", "credit-wait", "receive"}


def test_what_goes_to_disk_is_shown(client: Client) -> None:
    _, shown, totals, spent = shuffled(client, **{"memory.host-limit": "6 MB"})
    activity = by_activity(spent)
    assert totals["Disk Write"] == sum(shown["disk_written"]) > 0
    assert totals["Disk Read"] == sum(shown["disk_read"]) > 0
    assert activity["disk-write", "bytes"] == totals["Disk Write"]
    assert activity["disk-read", "bytes"] == totals["Disk Read"]
    assert activity["disk-write", "count"] >= 1
    assert shown["disk_memory_limit"] == [6_000_000] * 2
    # Each byte that was read had been written; frames on DISK have a few bytes more than what they were made of.
    assert totals["Disk Read"] <= totals["Disk Write"] <= 1.1 * PARTITIONS * ROWS * ROW_NBYTES
