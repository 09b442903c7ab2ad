"""Workers that get short of memory are told by the scheduler what they will need, and are let alone otherwise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, Event, wait

import dask_gpurt
from dask_gpurt.memory.horizon import TELL
from dask_gpurt.memory.manager import WATCH_FRACTION

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

LIMIT_NBYTES = 20_000_000


@pytest.fixture
def client() -> Iterator[Client]:
    """Two processes with all of dask-gpurt's memory part and nothing else of it."""
    with (
        local_cluster(2, memory_limit="2 GiB") as cluster,
        Client(cluster) as client,
    ):
        with dask.config.set({"gpurt.memory.host-limit": LIMIT_NBYTES}):
            dask_gpurt.install(client, placement=False, shuffle=False)
        yield client
        dask_gpurt.uninstall(client)


def heard(dask_worker: Any) -> tuple[bool, int]:
    """Whether a worker watches, and how many keys it has heard of."""
    manager = dask_worker.extensions["gpurt"].memory
    return manager._watch.on, len(manager._horizon)


def told(dask_scheduler: Any) -> tuple[int, int, bool]:
    """Count what was said, and whether transitions are listened to."""
    horizon = dask_scheduler.plugins["gpurt"].horizon
    return horizon.messages, horizon.words, "gpurt-horizon" in dask_scheduler.plugins


async def decay(dask_worker: Any) -> None:
    """Do what is done once a minute, and wait until the scheduler knows."""
    manager = dask_worker.extensions["gpurt"].memory
    await manager._decay()
    await manager._watch.settled()


def test_nobody_is_told_anything_while_there_is_room(client: Client) -> None:
    array = da.ones((400, 400), chunks=(100, 100)).persist()
    assert (array + array.T).sum().compute() == 320_000
    assert set(client.run(heard).values()) == {(False, 0)}
    assert client.run_on_scheduler(told) == (0, 0, False)


def halves(client: Client) -> Any:
    """Have each of the two workers make a half of an array: 72 MB in 40 MB."""
    rng = da.random.default_rng(0)
    made = [
        client.persist(rng.random((1500, 3000), chunks=(500, 500)), workers=[worker])
        for worker in client.scheduler_info()["workers"]
    ]
    wait(made)
    return da.concatenate(made)


def test_who_is_short_of_memory_is_told_what_is_ahead(client: Client) -> None:
    array = halves(client)
    total = (array @ array.T).sum().compute()
    values = array.compute()
    np.testing.assert_allclose(total, (values @ values.T).sum())
    messages, words, plugged = client.run_on_scheduler(told)
    assert 0 < messages <= words
    assert plugged
    assert all(watching and known for watching, known in client.run(heard).values())

    # The array is still there; once it is gone, they are let alone.
    client.run(decay)
    assert all(watching for watching, _ in client.run(heard).values())
    del array
    client.run_on_scheduler(gone)
    assert all(fraction < WATCH_FRACTION / 2 for fraction in client.run(filled).values())
    client.run(decay)
    assert set(client.run(heard).values()) == {(False, 0)}
    assert not client.run_on_scheduler(told)[2]


async def gone(dask_scheduler: Any) -> None:
    """Wait until no worker holds anything."""
    import asyncio

    async def empty() -> None:
        while any(worker.has_what for worker in dask_scheduler.workers.values()):  # noqa: ASYNC110 - nobody reports it
            await asyncio.sleep(0.01)
        # What the workers are sent now they take after the order to forget their keys.
        await dask_scheduler.broadcast(msg={"op": "identity"})

    await asyncio.wait_for(empty(), 10)


async def filled(dask_worker: Any) -> float:
    """Wait until a worker has nothing; say how full it is."""
    import asyncio

    async def empty() -> None:
        while len(dask_worker.data):  # noqa: ASYNC110 - nobody reports it
            await asyncio.sleep(0.01)

    await asyncio.wait_for(empty(), 10)
    return float(dask_worker.extensions["gpurt"].memory._filled())


def test_it_is_taken_away_while_workers_are_told(client: Client) -> None:
    before = client.run(os.getpid)
    array = halves(client)
    assert all(watching for watching, _ in client.run(heard).values())
    total = client.compute((array @ array.T).sum())
    dask_gpurt.uninstall(client)
    assert not any(client.run(listens).values())
    # A message that nobody listens to would have ended the worker.
    values = array.compute()
    np.testing.assert_allclose(total.result(timeout=60), (values @ values.T).sum())
    assert client.run(os.getpid) == before


def listens(dask_worker: Any) -> bool:
    return TELL in dask_worker.stream_handlers


def hold(name: str) -> None:
    """Run until the event of that name."""
    Event(f"{name} runs").set()
    Event(name).wait()


def holders(key: str, dask_scheduler: Any) -> set[str]:
    """Say who holds a key."""
    return {worker.address for worker in dask_scheduler.tasks[key].who_has or ()}


def taken(dask_scheduler: Any) -> int:
    """Count the copies that were taken back."""
    count = dask_scheduler.plugins["gpurt"].horizon.taken
    assert isinstance(count, int)
    return count


def test_a_copy_that_only_a_peer_needs_is_taken_back(client: Client) -> None:
    here, there = client.scheduler_info()["workers"]
    # Enough for it to watch.
    filling = client.map(np.full, [250_000] * 6, range(6), workers=[here], pure=False)
    wait(filling)
    busy = client.submit(hold, "go", workers=[there], pure=False)
    Event("go runs", client=client).wait(timeout=20)
    made = client.submit(np.full, 250_000, 1.0, workers=[here], pure=False)
    wait(made)
    used = client.submit(np.sum, made, workers=[there], pure=False)
    key = made.key
    del made
    deadline = time.monotonic() + 20
    while (found := client.run_on_scheduler(holders, key)) != {there}:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert client.run_on_scheduler(taken) == 1
    assert not any(name == key for name in client.run(lambda dask_worker: list(dask_worker.data), workers=[here])[here])
    Event("go", client=client).set()
    assert used.result() == 250_000
    wait(busy)
