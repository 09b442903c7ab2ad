"""What the next task takes is in memory when that starts, although it was not when the task came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from clusters import WITHOUT_MONITOR, local_cluster
from distributed import Client, Event, wait
from distributed.core import Status
from distributed.utils_test import gen_test

from dask_gpurt.config import Settings
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.manager import MemoryManager
from dask_gpurt.plugins.worker import GpurtWorkerPlugin

VALUE_NBYTES = 400_000
#: In memory at a time.
ROOM = 3
VALUES = 8


async def poll(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is looked for sets no event
            await asyncio.sleep(0.01)


def hold(name: str, *_: Any) -> None:
    """Run until the event of that name."""
    Event(f"{name} runs").set()
    Event(name).wait()


@dataclass
class Site:
    """A worker of one thread with more values than it has room for."""

    client: Client
    worker: Any
    values: list[Any]

    @property
    def memory(self) -> MemoryManager:
        found: MemoryManager = self.worker.extensions["gpurt"].memory
        return found

    @property
    def absent(self) -> list[Any]:
        """Those that are on DISK."""
        assert self.memory._host is not None
        return [value for value in self.values if value.key in self.memory._host.absent]

    def is_absent(self, value: Any) -> bool:
        return value in self.absent

    async def make_room(self) -> None:
        """Let go of a value that is in memory."""
        gone = next(value for value in self.values if not self.is_absent(value))
        self.values.remove(gone)
        key = gone.key
        gone.release()
        await poll(lambda: key not in self.worker.data)

    async def busy(self, name: str, *inputs: Any) -> Any:
        """Keep the only thread busy until the event of that name."""
        future = self.client.submit(hold, name, *inputs, pure=False)
        await Event(f"{name} runs", client=self.client).wait(timeout=10)
        return future


@asynccontextmanager
async def site() -> AsyncIterator[Site]:
    settings = Settings.load({"memory.host-limit": ROOM * VALUE_NBYTES, "shuffle.enabled": False})
    with dask.config.set(WITHOUT_MONITOR):
        async with (
            local_cluster(1, processes=False, memory_limit="4 GB", asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            worker = cluster.workers[0]
            await worker.plugin_add(GpurtWorkerPlugin(settings, report=False), name="gpurt")
            values = [client.submit(np.full, VALUE_NBYTES // 8, number) for number in range(VALUES)]
            await wait(values)
            found = Site(client, worker, values)
            await poll(lambda: len(found.absent) >= VALUES - ROOM)
            yield found


def first(value: Any) -> float:
    return float(value[0])


@gen_test(timeout=60)
async def test_what_comes_while_another_runs_is_fetched_into_free_room() -> None:
    async with site() as s:
        value = s.absent[0]
        expected = s.values.index(value)
        await s.make_room()
        done = await s.busy("go")
        result = s.client.submit(first, value)
        await poll(lambda: not s.is_absent(value))
        assert not done.done(), "it was not fetched because the task began"
        await Event("go", client=s.client).set()
        assert await result == expected


@gen_test(timeout=60)
async def test_nothing_goes_for_a_task_that_has_come() -> None:
    async with site() as s:
        done = await s.busy("go")
        held = set(s.values) - set(s.absent)
        value = s.absent[0]
        result = s.client.submit(first, value)
        await poll(lambda: result.key in s.worker.state.tasks and not s.memory._looking)
        assert s.memory._prefetching is None
        assert set(s.values) - set(s.absent) == held
        await Event("go", client=s.client).set()
        assert await result == s.values.index(value)
        await done


@gen_test(timeout=60)
async def test_local_inputs_are_fetched_while_a_task_waits_for_those_of_peers() -> None:
    async with site() as s:
        client: Any = s.client
        cluster = client.cluster
        cluster.scale(2)
        await client.wait_for_workers(2)
        (peer,) = (worker for worker in cluster.workers.values() if worker is not s.worker)
        remote = s.client.submit(np.full, 10, 7, workers=[peer.address])
        await wait(remote)
        arrived = asyncio.Event()
        stock = peer.handlers["get_data"]

        async def slow(comm: Any, **kwargs: Any) -> Any:
            await arrived.wait()
            return await stock(comm, **kwargs)

        peer.handlers["get_data"] = slow
        value = s.absent[0]
        expected = s.values.index(value) + 7
        await s.make_room()
        result = s.client.submit(lambda a, b: first(a) + first(b), value, remote, workers=[s.worker.address])
        await poll(lambda: not s.is_absent(value))
        arrived.set()
        assert await result == expected


@gen_test(timeout=60)
async def test_a_worker_that_is_paused_fetches_nothing_ahead() -> None:
    async with site() as s:
        await s.busy("go")
        value = next(value for value in s.values if not s.is_absent(value))
        result = s.client.submit(first, value)
        await poll(lambda: result.key in s.worker.state.tasks)
        s.worker.status = Status.paused
        assert s.memory._host is not None
        s.memory._host.press(VALUES * VALUE_NBYTES)
        await poll(lambda: s.is_absent(value))
        # As if it had come right now.
        for status in (Status.paused, Status.running):
            s.worker.status = status
            s.memory.task_came()
            looked = asyncio.Event()
            asyncio.get_running_loop().call_soon(looked.set)
            await looked.wait()
            assert (s.memory._prefetching is not None) is (status is Status.running)
        await poll(lambda: not s.is_absent(value))
        await Event("go", client=s.client).set()
        assert await result == s.values.index(value)


@gen_test(timeout=60)
async def test_nothing_waits_for_room_for_a_task_that_was_taken_away() -> None:
    async with site() as s:
        done = await s.busy("one")
        runs = s.client.submit(hold, "two", *s.values[:ROOM], pure=False, priority=1)
        taken = s.client.submit(first, s.values[ROOM])
        await poll(lambda: {runs.key, taken.key} <= s.worker.state.tasks.keys())
        await Event("one", client=s.client).set()
        # The task that runs now holds all that there is room for.
        await poll(lambda: s.memory.ledger.waiting(Tier.HOST) == 1)
        key = taken.key
        taken.release()
        await poll(lambda: key not in s.worker.state.tasks)
        await s.memory._decay()
        await poll(lambda: s.memory.ledger.waiting(Tier.HOST) == 0)
        await Event("two", client=s.client).set()
        await wait([done, runs])
