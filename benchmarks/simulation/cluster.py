"""A scheduler, workers and a client on one virtual clock.

Covers: :class:`Spec`, :class:`Cluster`, :class:`Report`, :func:`run`.
Does not cover: what is computed (:mod:`benchmarks.simulation.workload`), what goes wrong (:mod:`benchmarks.simulation.faults`).

Theory of operation
-------------------
The scheduler is distributed's own. It is not started: its handlers are called with the messages of the workers, and
what it writes to the stream of a worker is delivered there. Its periodic callbacks (stealing, active memory
manager, those of a plugin) are stopped, and called by the virtual clock instead. An asyncio loop exists for what is a coroutine
in distributed, workers that join or leave; it is turned until such a coroutine has done its work, while the
virtual clock stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from time import thread_time
from typing import Any

import dask
from distributed import Scheduler
from distributed.comm.addressing import get_address_host
from distributed.scheduler import ClientState, heartbeat_interval
from distributed.utils import silence_logging_cmgr

from benchmarks.simulation import seams
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.network import FABRICS, Fabric, Network
from benchmarks.simulation.worker import SimulatedWorker
from benchmarks.simulation.workload import Phase, Workload
from dask_gpurt.plugins.probing import LARGE, Pairs
from dask_gpurt.topology import DASK
from dask_gpurt.topology import Report as LinkReport

__all__ = ["STOCK", "Cluster", "Policy", "Report", "Spec", "StuckError", "gpurt", "run"]

_CLIENT = "client"
#: Callbacks of a real process, which are nothing to a virtual one.
_HOUSEKEEPING = ("worker-ttl", "idle-timeout", "no-workers-timeout", "monitor", "tick")

#: Installs something on a scheduler.
Policy = Callable[[Scheduler], Any]


async def STOCK(scheduler: Scheduler) -> None:  # noqa: N802 - it is a constant to those who use it
    """Leave Dask as it is."""


async def gpurt(scheduler: Scheduler) -> None:
    """Install the product's own scheduler plugin.

    Raises
    ------
    RuntimeError
        If its placement does not start.
    """
    from dask_gpurt.config import Settings
    from dask_gpurt.plugins.scheduler import GpurtSchedulerPlugin

    plugin = GpurtSchedulerPlugin(Settings())
    await scheduler.register_scheduler_plugin(plugin, name=plugin.name, idempotent=False)
    if plugin.placement is None:
        raise RuntimeError(f"the placement does not start: {plugin.parts}")


class StuckError(Exception):
    """Tasks do not end."""


@dataclass(frozen=True)
class Spec:
    """A cluster.

    Parameters
    ----------
    nworkers, nthreads
        Workers, and threads of each.
    fabric
        What joins them.
    memory_nbytes, disk_bandwidth
        What a worker holds in memory, and bytes per second of its disk.
    latency_s
        Time that a message takes one way.
    contention
        How much a task is slowed down by each other one on its worker.
    jitter
        Part of a duration by which it varies, and of all periods.
    validate
        Whether all states are validated as they change.
    limit_s
        Virtual time after which tasks that have not ended never will.
    """

    nworkers: int = 8
    nthreads: int = 1
    fabric: Fabric = FABRICS["tcp"]
    memory_nbytes: float = math.inf
    disk_bandwidth: float = 2e9
    latency_s: float = 0.0002
    contention: float = 0.2
    jitter: float = 0.1
    validate: bool = False
    limit_s: float = 3_600.0


@dataclass(frozen=True)
class Report:
    """What a run has shown.

    Parameters
    ----------
    makespan_s
        From the first graph to the last result, as the client sees it.
    bound_s
        The least that it could be on such workers: the longest path, or all work shared equally.
    moved_nbytes, between_nbytes
        Between workers, and between nodes.
    peak_nbytes
        Held by the worker that held the most, in memory or on disk.
    spilled_nbytes
        Written to disks.
    tasks
        Tasks that have been computed.
    scheduler_cpu_s
        Processor time of the scheduler: the only figure that is not the same in the next run.
    metrics
        What the placement says of itself; empty if there is none.
    """

    makespan_s: float
    bound_s: float
    moved_nbytes: int
    between_nbytes: int
    peak_nbytes: int
    spilled_nbytes: int
    tasks: int
    scheduler_cpu_s: float
    metrics: Mapping[str, Any]


class _Stream:
    """What a scheduler writes to: a worker or a client."""

    def __init__(self, deliver: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._deliver = deliver
        self._waiting: list[dict[str, Any]] = []

    def send(self, *messages: dict[str, Any]) -> None:
        if self._deliver is None:
            self._waiting.extend(messages)
        else:
            for message in messages:
                self._deliver(message)

    def connect(self, deliver: Callable[[dict[str, Any]], None]) -> None:
        self._deliver = deliver
        waiting, self._waiting = self._waiting, []
        self.send(*waiting)

    def start(self, comm: Any) -> None:
        """A stream of distributed is started with a comm; this one has none."""

    def abort(self) -> None:
        self._deliver = lambda _: None

    def closed(self) -> bool:
        return False


class _Comm:
    """The connection by which a worker registers: it says when that is done, and then nothing any more."""

    peer_address = "tcp://simulated"

    def __init__(self) -> None:
        self.registered = asyncio.Event()
        self.name = ""

    async def write(self, message: dict[str, Any]) -> None:
        assert message["status"] == "OK", message
        self.registered.set()

    async def read(self, **kwargs: Any) -> Any:  # noqa: ARG002
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass

    def abort(self) -> None:
        pass

    def closed(self) -> bool:
        return False


class Cluster:
    """A cluster that computes one workload.

    Parameters
    ----------
    spec
        The cluster.
    workload
        What is computed; sizes and durations are known for its tasks alone.
    seed
        Of all that varies.

    Attributes
    ----------
    workers
        Address to each worker that is alive.
    numbered
        Number to each worker that ever was.
    takes_turns
        Whether workers take turns in sending, as dask-gpurt's do.
    trace
        What has happened: time, what, worker, keys; empty unless it is asked for.
    """

    def __init__(self, spec: Spec, workload: Workload, seed: int = 0, *, traced: bool = False) -> None:
        self.spec = spec
        self.workload = workload
        self.clock = Clock()
        self.network = Network(self.clock, spec.fabric)
        self.random = random.Random(seed)  # noqa: S311 - it is to be the same again
        self.sizes = workload.sizes
        self.durations = {
            key: duration * (1 + spec.jitter * (2 * self.random.random() - 1))
            for key, duration in workload.durations.items()
        }
        self.workers: dict[str, SimulatedWorker] = {}
        self.numbered: dict[int, SimulatedWorker] = {}
        self.trace: list[tuple[Any, ...]] = []
        self.computed = 0
        self.takes_turns = False
        self._pairs = Pairs(get_address_host)
        self._traced = traced
        self._loop = asyncio.new_event_loop()
        self._registered: set[asyncio.Task[None]] = set()
        self._peak_nbytes = self._spilled_nbytes = 0
        self._scheduler_cpu_s = 0.0
        #: What the client wants and does not have yet.
        self._missing: set[Any] = set()
        self._failure: str | None = None
        self._closed = False
        self.scheduler: Scheduler

    # --- life ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def started(self, policy: Policy) -> Iterator[None]:
        """Have a scheduler with ``policy``, and all workers."""
        with (
            dask.config.set(
                {
                    "distributed.scheduler.active-memory-manager.start": True,
                    "distributed.worker.memory.terminate": False,
                    "distributed.admin.low-level-log-length": 100,
                }
            ),
            silence_logging_cmgr(logging.CRITICAL),
            seams.replaced(lambda: self.clock.now, lambda **_: _Stream()),
        ):
            try:
                self._do(self._start(policy))
                for number in range(self.spec.nworkers):
                    self.add_worker(number)
                yield
            finally:
                self._closed = True
                self._do(self._stop())
                self._loop.close()

    def _do(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)

    async def _start(self, policy: Policy) -> None:
        self.scheduler = seams.OfflineScheduler(validate=self.spec.validate, host="127.0.0.1", dashboard=False)
        self.scheduler.clients[_CLIENT] = ClientState(_CLIENT)
        client: Any = _Stream(self._told)
        self.scheduler.client_comms[_CLIENT] = client
        # As Scheduler.start does; stealing begins by it.
        for plugin in list(self.scheduler.plugins.values()):
            await plugin.start(self.scheduler)
        await policy(self.scheduler)
        self.takes_turns = "gpurt" in self.scheduler.plugins
        for name, callback in self.scheduler.periodic_callbacks.items():
            callback.stop()
            if name not in _HOUSEKEEPING:
                period_s = callback.callback_time / 1000
                act = partial(self._scheduler, callback.callback)
                self.clock.every(period_s, act, first_s=period_s * self._vary())

    async def _stop(self) -> None:
        # What listens to a worker removes it at its end, unless it is gone.
        self.scheduler.stream_comms.clear()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for callback in self.scheduler.periodic_callbacks.values():
            callback.stop()

    def _vary(self) -> float:
        return 1 - self.spec.jitter * self.random.random()

    def record(self, what: str, worker: str, *keys: Any) -> None:
        """Note what has happened."""
        if what == "computed":
            self.computed += len(keys)
        if self._traced:
            self.trace.append((self.clock.now, what, worker, *keys))

    # --- workers ------------------------------------------------------------------------------------------------------

    def add_worker(self, number: int, *, speed: float = 1.0) -> None:
        """Let a worker join."""
        worker = SimulatedWorker(self, number, speed)
        self.workers[worker.address] = worker
        self.numbered[number] = worker
        self.record("joined", worker.name)
        comm: Any = _Comm()

        async def register() -> None:
            registration = asyncio.create_task(
                self.scheduler.add_worker(
                    comm,
                    address=worker.address,
                    status="running",
                    # What a WorkerState is hashed by.
                    server_id=worker.name,
                    nthreads=self.spec.nthreads,
                    name=worker.name,
                    resolve_address=False,
                    now=self.clock.now,
                    resources={},
                    memory_limit=None if math.isinf(self.spec.memory_nbytes) else int(self.spec.memory_nbytes),
                    services={},
                    local_directory="",
                    versions={},
                    nanny="",
                    extra={},
                    stimulus_id=f"join-{worker.name}",
                    metrics=worker.heartbeat()["metrics"],
                )
            )
            self._registered.add(registration)
            await comm.registered.wait()
            # It goes on to listen to the comm, which is silent.
            await asyncio.sleep(0)

        self._do(register())
        stream: Any = self.scheduler.stream_comms[worker.address]
        stream.connect(lambda message: self.clock.after(self.spec.latency_s, lambda: worker.receive(message)))
        self._probe(worker)
        period_s = heartbeat_interval(self.spec.nworkers)
        self.clock.every(period_s, lambda: self._heartbeat(worker), first_s=period_s * self._vary())
        self.clock.every(1.0, lambda: self._find_missing(worker), first_s=self._vary())

    def _probe(self, worker: SimulatedWorker) -> None:
        """Let links be measured that dask-gpurt's workers would measure now, while nothing else goes over them."""
        for source, target in self._pairs.joined(worker.address) if self.takes_turns else ():
            ends = self.workers[source].number, self.workers[target].number
            _, bandwidth = self.spec.fabric.link(*ends)
            report = (source, "host", target, "host", DASK, 2 * self.spec.latency_s, bandwidth, LARGE)
            self._learn([report])

    def _learn(self, reports: list[LinkReport]) -> None:
        plugin: Any = self.scheduler.plugins["gpurt"]
        plugin.topology.learn(reports)

    def remove_worker(self, worker: SimulatedWorker) -> None:
        """Let a worker die; the scheduler hears of it by the connection that breaks."""
        del self.workers[worker.address]
        self._pairs.left(worker.address)
        self._account(worker)
        worker.die()

        def lost() -> None:
            address = worker.address
            self._do(self.scheduler.remove_worker(address, stimulus_id=f"lost-{worker.name}", close=False))

        self.clock.after(self.spec.latency_s, lost)

    def _account(self, worker: SimulatedWorker) -> None:
        self._peak_nbytes = max(self._peak_nbytes, worker.store.peak_nbytes)
        self._spilled_nbytes += worker.store.spilled_nbytes

    def _heartbeat(self, worker: SimulatedWorker) -> bool:
        if worker.dead or self._closed:
            return False
        if worker.address in self.scheduler.workers:
            self.scheduler.heartbeat_worker(
                address=worker.address, resolve_address=False, now=self.clock.now, **worker.heartbeat()
            )
            if self.takes_turns:
                self._learn(worker.reports())
        return True

    def _find_missing(self, worker: SimulatedWorker) -> bool:
        worker.find_missing()
        return not worker.dead

    # --- messages -----------------------------------------------------------------------------------------------------

    def _scheduler(self, act: Callable[[], Any]) -> None:
        """Let the scheduler do something, and count its processor time."""
        started = thread_time()
        act()
        self._scheduler_cpu_s += thread_time() - started

    def send_to_scheduler(self, worker: SimulatedWorker, message: dict[str, Any]) -> None:
        """Bring a worker's message to the scheduler."""
        fields = dict(message)
        handler = self.scheduler.stream_handlers[fields.pop("op")]

        def arrive() -> None:
            # A connection that has broken brings nothing any more.
            if worker.address in self.scheduler.workers:
                self._scheduler(lambda: handler(worker=worker.address, **fields))

        self.clock.after(self.spec.latency_s, arrive)

    def _told(self, message: dict[str, Any]) -> None:
        """Take what the scheduler tells the client. Its latency counts in :meth:`compute`."""
        match message["op"]:
            case "key-in-memory":
                self._missing.discard(message["key"])
            case "lost-data":
                self._missing.add(message["key"])
            case "task-erred" | "cancelled-keys":
                self._failure = str({name: value for name, value in message.items() if name != "traceback"})

    # --- computing ----------------------------------------------------------------------------------------------------

    def compute(self) -> Report:
        """Compute the workload, phase by phase, as its user would.

        Raises
        ------
        StuckError
            If it does not come to its end.
        """
        latency_s = self.spec.latency_s
        for phase in self.workload.phases:
            self._missing = set(phase.keys)
            self.clock.now += latency_s
            self.submit(phase)
            while self._missing:
                if self._failure is not None:
                    raise StuckError(f"{self.workload.name}: {self._failure}")
                if self.clock.now > self.spec.limit_s or not self.clock.step():
                    raise StuckError(self._describe())
            self.clock.now += latency_s
            if phase.released:
                self.scheduler.client_releases_keys(phase.released, _CLIENT, stimulus_id="release")
        return self._report()

    def submit(self, phase: Phase) -> None:
        """Give a graph to the scheduler, in the name of the client."""
        self._scheduler(lambda: seams.submit(self.scheduler, phase, _CLIENT, self.clock.now))

    def settle(self, elapsed_s: float = 5.0) -> None:
        """Let time pass."""
        until = self.clock.now + elapsed_s
        while self.clock.now < until and self.clock.step():
            pass

    def _report(self) -> Report:
        makespan_s = self.clock.now
        for worker in self.workers.values():
            self._account(worker)
        return Report(
            makespan_s=makespan_s,
            bound_s=self.workload.bound_s(self.spec.nworkers * self.spec.nthreads),
            moved_nbytes=self.network.moved_nbytes,
            between_nbytes=self.network.between_nbytes,
            peak_nbytes=self._peak_nbytes,
            spilled_nbytes=self._spilled_nbytes,
            tasks=self.computed,
            scheduler_cpu_s=self._scheduler_cpu_s,
            metrics=self.placement_metrics(),
        )

    def placement_metrics(self) -> dict[str, Any]:
        """Return what the placement says of itself; nothing if it is not installed."""
        plugin: Any = self.scheduler.plugins.get("gpurt")
        return {} if plugin is None else plugin.placement.metrics()

    def _describe(self) -> str:
        """Say what the tasks wait for that do not end."""
        states: dict[str, int] = {}
        for task in self.scheduler.tasks.values():
            states[task.state] = states.get(task.state, 0) + 1
        return (
            f"{self.workload.name}: {len(self._missing)} results are missing after {self.clock.now:.1f} s; "
            f"the scheduler's tasks are {states}"
        )

    def validate(self) -> None:
        """Assert that all states agree with each other."""
        self.scheduler.validate_state()
        for worker in self.workers.values():
            worker.state.validate_state()


def run(spec: Spec, workload: Workload, policy: Policy, seed: int = 0) -> Report:
    """Compute a workload on a fresh cluster."""
    cluster = Cluster(spec, workload, seed)
    with cluster.started(policy):
        return cluster.compute()
