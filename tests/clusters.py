"""Clusters of this machine alone: every socket listens on the loopback address, and dashboards take any free port."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import cloudpickle
from distributed import Client, LocalCluster

__all__ = ["WITHOUT_MONITOR", "beat", "hearing", "local_cluster", "workers_getting_ready"]

# Worker processes cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Stock's memory monitor is kept out, so that only managed memory decides.
WITHOUT_MONITOR = {
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}


def local_cluster(n_workers: int, threads_per_worker: int = 1, **options: Any) -> LocalCluster:
    """Return a cluster of processes, or, with ``processes=False``, of workers in this process that talk over TCP all the same."""
    options = {"protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", **options}
    return LocalCluster(n_workers=n_workers, threads_per_worker=threads_per_worker, **options)


@contextlib.contextmanager
def hearing(client: Client, topic: str, action: str, count: int) -> Iterator[list[dict[str, Any]]]:
    """Return from the block only once the scheduler has logged ``count`` such events, counted from its beginning."""
    counted = threading.Semaphore(0)
    events: list[dict[str, Any]] = []

    def heard(event: tuple[float, dict[str, Any]]) -> None:
        if event[1]["action"] == action:
            events.append(event[1])
            counted.release()

    client.subscribe_topic(topic, heard)
    try:
        yield events
        for _ in range(count):
            assert counted.acquire(timeout=60), f"{count} times {action} was expected"
    finally:
        client.unsubscribe_topic(topic)


def workers_getting_ready(client: Client, count: int) -> contextlib.AbstractContextManager[list[dict[str, Any]]]:
    """Return from the block only once ``count`` workers have reported, counted from its beginning."""
    return hearing(client, "gpurt", "worker-ready", count)


async def beat(dask_worker: Any) -> None:
    """Wait for a heartbeat of the worker's own that begins after this; to be run on a worker.

    One more, beside the regular ones, would close the worker if it met one: Dask's spans take the metrics of one at a time.
    """
    regular = dask_worker.periodic_callbacks["heartbeat"]
    heartbeat = regular.callback
    answered = asyncio.get_running_loop().create_future()

    async def noted() -> None:
        await heartbeat()
        if not answered.done():
            answered.set_result(None)

    regular.callback = noted
    try:
        await asyncio.wait_for(answered, 30)
    finally:
        regular.callback = heartbeat
