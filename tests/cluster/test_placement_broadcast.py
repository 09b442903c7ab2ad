"""One result that all workers take: it is passed on by those who have it, and links are measured on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import dask
import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, LocalCluster, wait

import dask_gpurt
from dask_gpurt.plugins import serving, turns

WORKERS = 6
#: Numbers of the result: 64 MB.
LENGTH = 8_000_000


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """Workers in this process, that send peers away whenever there are two, once the scheduler has heard of the copy."""
    monkeypatch.setattr(turns, "WORTH_S", 0.0)
    with (
        dask.config.set({"distributed.scheduler.validate": True, "distributed.worker.validate": True}),
        local_cluster(WORKERS, processes=False, memory_limit=0) as cluster,
    ):
        scheduler: Any = cluster.scheduler
        send_away = serving._send_away

        def send_away_once_it_is_known(away: Any) -> None:
            if any(len(task.who_has) > 1 for task in scheduler.tasks.values()):
                send_away(away)
            else:
                asyncio.get_running_loop().call_later(0.01, send_away_once_it_is_known, away)

        monkeypatch.setattr(serving, "_send_away", send_away_once_it_is_known)
        yield cluster


def hold_back(cluster: LocalCluster, address: str, until: Callable[[Any], bool]) -> None:
    """Let a worker begin to send only when something is true of how it serves, which it is when all others have asked for it."""
    (worker,) = (worker for worker in cluster.workers.values() if worker.address == address)
    found = worker.extensions["gpurt"].serving
    stock = found._stock

    async def late(*args: Any, **options: Any) -> Any:
        async with asyncio.timeout(30):
            while not until(found):  # noqa: ASYNC110 - counts set no event
                await asyncio.sleep(0.01)
        return await stock(*args, **options)

    found._stock = late


def make(length: int = LENGTH) -> Any:
    return np.arange(length, dtype="f8")


def total(values: Any, times: int) -> float:
    return float(values[::1000].sum() * times)


def first_of(client: Client) -> str:
    address, *_ = client.scheduler_info(n_workers=-1)["workers"]
    return str(address)


def take_everywhere(client: Client) -> tuple[Any, list[Any]]:
    """Make a result on one worker, and have all others take it at once."""
    first, *others = client.scheduler_info(n_workers=-1)["workers"]
    made = client.submit(make, workers=[first])
    wait(made)
    return made, [client.submit(total, made, i, workers=[address]) for i, address in enumerate(others, 1)]


def test_those_who_have_a_result_pass_it_on(near: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody is served beside others, however long a copy takes.
    monkeypatch.setattr(serving, "PATIENCE_S", 60.0)
    with Client(near) as client:
        dask_gpurt.install(client, memory=False)
        hold_back(near, first_of(client), lambda found: found.waited >= WORKERS - 2)
        made, totals = take_everywhere(client)
        expected = float(make()[::1000].sum())
        assert client.gather(totals) == [expected * i for i in range(1, WORKERS)]
        holders = dict.fromkeys(client.who_has(made)[made.key], 0)
        assert len(holders) == WORKERS
        for worker in near.workers.values():
            for sent in worker.transfer_outgoing_log:
                holders[worker.address] += made.key in sent["keys"]
        assert sum(holders.values()) == WORKERS - 1, "it was sent once to each"
        # First to one; then half of the other four are sent away, to the copy.
        assert max(holders.values()) <= 3
        assert sum(copies > 0 for copies in holders.values()) >= 2
        served = [worker.extensions["gpurt"].serving for worker in near.workers.values()]
        assert sum(serving.waited for serving in served) >= WORKERS - 2
        assert sum(serving.sent_away for serving in served) >= 2


def test_nobody_waits_long_for_a_peer_that_takes_long(near: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    # No copy ends in no time.
    monkeypatch.setattr(serving, "PATIENCE", 0)
    monkeypatch.setattr(serving, "PATIENCE_S", 0.0)
    with Client(near) as client:
        dask_gpurt.install(client, memory=False)
        hold_back(near, first_of(client), lambda found: found.impatient > 0)
        _, totals = take_everywhere(client)
        expected = float(make()[::1000].sum())
        assert client.gather(totals) == [expected * i for i in range(1, WORKERS)]
        served = [worker.extensions["gpurt"].serving for worker in near.workers.values()]
        # In the moment in which a request's patience ends, its turn may come.
        assert 0 < sum(serving.impatient for serving in served) <= sum(serving.waited for serving in served)


def test_requests_that_wait_are_answered_when_it_is_uninstalled(near: LocalCluster) -> None:
    with Client(near) as client:
        dask_gpurt.install(client, memory=False)
        _, totals = take_everywhere(client)
        dask_gpurt.uninstall(client)
        expected = float(make()[::1000].sum())
        assert client.gather(totals) == [expected * i for i in range(1, WORKERS)]


def test_links_between_processes_are_measured_before_anything_is_moved() -> None:
    with local_cluster(3, memory_limit=0) as cluster, Client(cluster) as client:
        scheduler: Any = cluster.scheduler

        async def measured() -> float:
            plugin = scheduler.plugins["gpurt"]
            await plugin.prober.settled()
            plugin.placement.prices.refresh(scheduler.bandwidth)
            return float(plugin.placement.prices.bandwidth)

        dask_gpurt.install(client)
        bandwidth = cluster.sync(measured, callback_timeout=30)
        # Dask assumes 100 MB/s. What it is here depends on what else the machine does.
        assert bandwidth != scheduler.bandwidth
        assert 1e6 < bandwidth < 1e12
        _, totals = take_everywhere(client)
        expected = float(make()[::1000].sum())
        assert client.gather(totals) == [expected, 2 * expected]
        dask_gpurt.uninstall(client)
