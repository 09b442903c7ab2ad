"""A run that a peer keeps waiting is reported with its state, goes on, and is right."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client

import dask_gpurt

ROWS = 200_000  # Messages that are too large to go without a credit.
LOGGER = "dask_gpurt.shuffle.worker"


class Said(logging.Handler):
    """Keeps what is logged, and tells.

    Where the machine does something else, a worker may make no progress before anything is withheld, too: then it is stuck, goes on,
    and is stuck again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []
        #: Run of a worker to whether it is stuck.
        self.stuck: dict[str, bool] = {}
        self.repeated: list[str] = []
        self.news = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        stuck = record.levelno >= logging.WARNING
        run, *_ = text.split(" makes no progress since " if stuck else " goes on again")
        if self.stuck.get(run, False) is stuck:
            self.repeated.append(text)
        self.stuck[run] = stuck
        if stuck:
            self.warnings.append(text)
        self.news.set()

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self.news.clear()
            await self.news.wait()


@pytest.fixture
def level() -> Any:
    logger = logging.getLogger(LOGGER)
    before, logger.propagate = (logger.level, logger.propagate), False
    logger.setLevel(logging.INFO)
    yield
    logger.setLevel(before[0])
    logger.propagate = before[1]


@pytest.mark.usefixtures("level")
def test_a_run_whose_credit_is_withheld_is_reported_and_goes_on() -> None:
    async def main() -> None:
        async with (
            local_cluster(2, processes=False, asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            with dask.config.set({"gpurt.shuffle.transport": "dask", "gpurt.shuffle.watchdog": "1s"}):
                await dask_gpurt.install(client, placement=False)  # type: ignore[misc]
            workers: list[Any] = list(cluster.workers.values())
            receiver, sender = workers
            store = receiver.extensions["gpurt"].shuffle.store
            reserve, allowed = store.reserve, asyncio.Event()

            async def reserve_when_allowed(nbytes: int) -> Any:
                await allowed.wait()
                return await reserve(nbytes)

            store.reserve = reserve_when_allowed
            events: list[dict[str, Any]] = []
            told = asyncio.Event()

            def tell(event: tuple[float, dict[str, Any]]) -> None:
                events.append(event[1])
                told.set()

            client.subscribe_topic("gpurt", tell)
            said = Said()
            logging.getLogger(LOGGER).addHandler(said)
            try:
                rng = np.random.default_rng(0)
                data = pd.DataFrame({"key": rng.integers(0, 1000, ROWS), "value": rng.random(ROWS)})
                source = dd.from_pandas(data, npartitions=2, sort=False)
                future = client.compute(source.shuffle("key", npartitions=4, shuffle_method="p2p"))
                waiting = f"waiting for {receiver.address} since"
                await said.until(lambda: any(waiting in text for text in said.warnings))
                wanted = "credits: 0 granted (0 bytes not used yet), 1 wanted"
                await said.until(lambda: any(wanted in text for text in said.warnings))
                await said.until(lambda: list(said.stuck.values()) == [True, True])
                text = [text for text in said.warnings if waiting in text][-1]
                assert f"on {sender.address} makes no progress since" in text
                assert "phase: transfer" in text
                assert "status running" in text
                assert "<Ledger " in text
                assert not future.done()
                allowed.set()
                pd.testing.assert_frame_equal((await future).sort_index(), data)
                await said.until(lambda: not any(said.stuck.values()))
                assert not said.repeated
                reported = len(said.warnings)
                while sum(event.get("action") == "shuffle-goes-on" for event in events) < reported:
                    told.clear()
                    await told.wait()
                stuck = [event for event in events if event.get("action") == "shuffle-stuck"]
                assert len(stuck) == reported
                assert any(one["peer"] == receiver.address for event in stuck for one in event["state"]["unanswered"])
                assert all(event["still_s"] >= 1 for event in stuck)
            finally:
                logging.getLogger(LOGGER).removeHandler(said)
                allowed.set()

    asyncio.run(asyncio.wait_for(main(), 100))


def test_null_turns_it_off() -> None:
    async def main() -> None:
        async with (
            local_cluster(1, 2, processes=False, asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            for patience, watched in (("1s", True), (None, False)):
                with dask.config.set({"gpurt.shuffle.watchdog": patience}):
                    await dask_gpurt.install(client, placement=False, memory=False)  # type: ignore[misc]
                [worker] = cluster.workers.values()
                assert ("gpurt-shuffle-watchdog" in worker.periodic_callbacks) is watched
                await dask_gpurt.uninstall(client)  # type: ignore[misc]
                assert "gpurt-shuffle-watchdog" not in worker.periodic_callbacks

    asyncio.run(asyncio.wait_for(main(), 100))
