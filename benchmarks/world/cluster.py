"""A cluster in the simulated world: Dask's own scheduler, workers and client, with dask-gpurt on them, or without.

Covers: :class:`World`: beginning, ending, killing and returning of its processes.
Does not cover: what is done on it (:mod:`benchmarks.world.jobs`), what goes wrong (:mod:`benchmarks.world.faults`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import dask
import distributed.threadpoolexecutor
import distributed.utils
import distributed.worker_state_machine
from distributed import Client, Scheduler, Worker
from distributed.core import Status
from distributed.node import ServerNode
from distributed.system_monitor import SystemMonitor

import dask_gpurt
from benchmarks.world.machine import HOST, Host, PoolPerHost, VirtualLoop
from benchmarks.world.network import Network

__all__ = ["CONFIG", "SCHEDULER", "World", "take_servers"]

T = TypeVar("T")

SCHEDULER = "scheduler:8786"

#: Where the world differs from what is configured by default, and why.
CONFIG: dict[str, Any] = {
    # Of the process, which all workers share here.
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.worker.profile.enabled": False,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.admin.system-monitor.disk": False,
    "distributed.worker.use-file-locking": False,
    # Workers are killed more often than people would put up with.
    "distributed.scheduler.allowed-failures": 100,
    # A silent death is noticed in a time that is worth simulating.
    "distributed.scheduler.worker-ttl": "20s",
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.dashboard.status.task-stream-length": 10,
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.tick.limit": "1h",
    # Serialization goes to a thread that all workers share here.
    "distributed.comm.offload": False,
    "dataframe.shuffle.method": "p2p",
    "array.rechunk.method": "p2p",
}

_PORT = 4000

#: How often a nurse looks, and how long she lets a worker close.
NURSE_S = 0.05
CLOSING_S = 4.0
ENDING = (Status.closing, Status.closed, Status.failed)


class World:
    """The processes of a cluster.

    Parameters
    ----------
    loop
        The event loop of the world.
    seed
        From which all chance is drawn.
    folder
        For files.
    workers, memory_nbytes, gpurt
        How many workers there are, of how much memory each, and the configuration of dask-gpurt.
    stock
        Whether dask-gpurt is left out.
    validate
        Whether Dask's state machines check themselves with each transition.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        folder: Path,
        *,
        workers: int = 3,
        memory_nbytes: int = 2**20,
        gpurt: dict[str, Any] | None = None,
        stock: bool = False,
        validate: bool = False,
    ) -> None:
        self.loop = loop
        self.seed = seed
        self.folder = folder
        self.memory_nbytes = memory_nbytes
        self.gpurt = gpurt or {}
        self.stock = stock
        self.validate = validate
        self.network = Network(loop, random.Random(f"network-{seed}"))
        self.names = [f"w{number}" for number in range(workers)]
        self.hosts: dict[str, Host] = {}
        self.workers: dict[str, Any] = {}
        self.scheduler: Any = None
        self.client: Any = None
        self.deaths = 0
        #: What has happened to it, with times.
        self.story: list[str] = []

    def tell(self, what: str) -> None:
        """Note what happens."""
        self.story.append(f"{self.loop.now:9.4f} {what}")

    def on(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Do something on a host."""
        context = contextvars.copy_context()
        context.run(HOST.set, self.hosts[name])
        return context.run(asyncio.get_running_loop().create_task, work)

    def _host(self, name: str) -> None:
        self.hosts[name] = Host(name, random.Random(f"{name}-{self.seed}-{self.deaths}"))

    @property
    def repairs(self) -> int:
        """How often a shuffle has gone on without a worker."""
        plugin: Any = self.scheduler.plugins.get("gpurt") if self.scheduler is not None else None
        return plugin.shuffle.repairs.count if plugin is not None and plugin.shuffle is not None else 0

    async def begin(self) -> None:
        """Start scheduler, workers and client, and install dask-gpurt, if it is to be."""
        self._host("scheduler")
        self._host("client")
        await self.on("scheduler", self._begin_scheduler())
        for name in self.names:
            self._host(name)
        await asyncio.gather(*(self.on(name, self._begin_worker(name)) for name in self.names))
        await self.on("client", self._begin_client())

    async def _begin_scheduler(self) -> None:
        self.scheduler = await Scheduler(
            host="scheduler", port=8786, protocol="sim", dashboard=False, validate=self.validate
        )

    async def _begin_worker(self, name: str) -> None:
        folder = self.folder / f"{name}-{self.deaths}"
        self.workers[name] = await Worker(
            f"sim://{SCHEDULER}",
            host=name,
            port=_PORT,
            protocol="sim",
            name=name,
            nthreads=1,
            memory_limit=self.memory_nbytes,
            local_directory=str(folder),
            dashboard=False,
            validate=self.validate,
        )

    async def _begin_client(self) -> None:
        self.client = await Client(f"sim://{SCHEDULER}", asynchronous=True, set_as_default=False)
        if not self.stock:
            # A client in a coroutine answers with something to wait for.
            installing: Any = dask_gpurt.install(self.client, config=self.gpurt)
            await installing

    def kill(self, name: str, *, silently: bool = False) -> None:
        """End a worker as SIGKILL does; silently: as a machine that loses its power, which ends no connection."""
        host = self.hosts[name]
        if not host.alive:
            return
        host.kill()
        self.network.leave(host, silently=silently)
        self.deaths += 1
        self.workers.pop(name, None)
        self.tell(f"{name} {'vanishes' if silently else 'is killed'}")

    async def nurse(self, name: str) -> None:
        """See to it that a worker that has ended, in whichever way, comes back on its address, as a nanny does."""
        drawn = random.Random(f"nurse-{name}-{self.seed}")
        closing_s = 0.0
        while True:
            await asyncio.sleep(NURSE_S)
            worker = self.workers.get(name)
            if worker is not None and self.hosts[name].alive and worker.status not in ENDING:
                closing_s = 0.0
                continue
            closing_s += NURSE_S
            if worker is not None and worker.status is Status.closing and closing_s < CLOSING_S:
                continue
            if worker is not None:
                self.kill(name)
            await asyncio.sleep(drawn.choice([0.0, 0.1, 1.0, 25.0]) * drawn.random())
            self.network.returned(name)
            self._host(name)
            self.tell(f"{name} comes back")
            beginning = self.on(name, self._begin_worker(name))
            while not beginning.done() and self.hosts[name].alive:
                await asyncio.wait([beginning], timeout=NURSE_S)
            if not beginning.done():
                # Killed while it began: nothing of it goes on.
                continue
            try:
                await beginning
            except (OSError, RuntimeError, TimeoutError) as error:
                self.tell(f"{name} cannot: {error!r}")
                self.kill(name)
            else:
                self.tell(f"{name} is back")


def _no_http(self: Any, routes: Any, *args: Any, **kwargs: Any) -> None:
    from types import SimpleNamespace

    del routes, args, kwargs
    self.http_application = SimpleNamespace(applications=[])
    self.http_server = SimpleNamespace(port=0, stop=lambda: None)


def _no_measure(self: Any) -> dict[str, Any]:
    self.count += 1
    return {"time": 0.0, "cpu": 0.0, "memory": 0, "host_net_io.read_bps": 0.0, "host_net_io.write_bps": 0.0}


def take_servers() -> None:
    """Leave out of Dask's servers what looks at the machine that the simulation runs on."""
    node: Any = ServerNode
    node.start_http_server = _no_http
    monitor: Any = SystemMonitor
    # What a process has one of, and processes are many here.
    everywhere: Any = distributed.utils
    everywhere._offload_executor = PoolPerHost("offload", 1)
    everywhere = distributed.threadpoolexecutor
    everywhere.threads_lock = contextlib.nullcontext()
    # Of a worker's tasks, which lie in sets: their order is to follow from the seed, and not from where in memory they lie.
    everywhere = distributed.worker_state_machine.TaskState
    everywhere.__hash__ = lambda self: hash(self.key)
    monitor.update = _no_measure
    monitor.get_process_memory = lambda self: 0
    monitor.recent = lambda self: {"time": 0.0, "cpu": 0.0, "memory": 0}


dask.config.set(CONFIG)
