"""A worker: the state machine of a real one, and a shell that takes virtual time for what it is told to do.

Covers: :class:`SimulatedWorker`: executing, fetching and serving, messages, heartbeats, being paused, slow and dead.
Does not cover: choices: those are the state machine's and the scheduler's.

Theory of operation
-------------------
The state machine's instructions are carried out as ``distributed.Worker`` does: a task runs when its inputs are in memory, for
its duration, longer where the worker's other threads compute too; a peer is asked for keys, answers at once that it is
busy if it serves too many already, and sends them as one transfer else. Messages to and from the scheduler take the control
latency and keep their order.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import dask
from dask.utils import parse_bytes
from distributed.worker_state_machine import (
    AcquireReplicasEvent,
    CancelComputeEvent,
    ComputeTaskEvent,
    Execute,
    ExecuteSuccessEvent,
    FindMissingEvent,
    FreeKeysEvent,
    GatherDep,
    GatherDepBusyEvent,
    GatherDepNetworkFailureEvent,
    GatherDepSuccessEvent,
    PauseEvent,
    RefreshWhoHasEvent,
    RemoveReplicasEvent,
    RemoveWorkerEvent,
    RetryBusyWorkerEvent,
    RetryBusyWorkerLater,
    SendMessageToScheduler,
    StateMachineEvent,
    StealRequestEvent,
    UnpauseEvent,
    WorkerState,
)

from benchmarks.simulation.clock import Flow, Fluid
from benchmarks.simulation.network import Transfer
from benchmarks.simulation.store import Store
from dask_gpurt.plugins.turns import AWAY_DELAY_S, LARGE_NBYTES, Turns
from dask_gpurt.shuffle.links import REPORTS_MAX
from dask_gpurt.topology import DASK, News, Place, Report, Topology

if TYPE_CHECKING:
    from benchmarks.simulation.cluster import Cluster

__all__ = ["SimulatedWorker"]

_EVENTS: dict[str, Callable[..., StateMachineEvent]] = {
    "compute-task": ComputeTaskEvent,
    "cancel-compute": CancelComputeEvent,
    "acquire-replicas": AcquireReplicasEvent,
    "remove-replicas": RemoveReplicasEvent,
    "free-keys": FreeKeysEvent,
    "steal-request": StealRequestEvent,
    "refresh-who-has": RefreshWhoHasEvent,
    "remove-worker": RemoveWorkerEvent,
}
#: After how long a worker asks a busy peer again; as ``distributed.Worker`` does.
_RETRY_BUSY_S = 0.15
#: Transfers smaller than this say nothing about bandwidth; as in ``distributed.Worker``.
_TELLING_NBYTES = 1_000_000


class SimulatedWorker:
    """A worker of ``cluster``.

    Parameters
    ----------
    cluster
        What it is a part of.
    number
        Its number, which says in which node it is.
    speed
        How fast it computes; 1: as fast as the durations say.
    """

    def __init__(self, cluster: Cluster, number: int, speed: float) -> None:
        spec = cluster.spec
        self.cluster = cluster
        self.number = number
        self.name = f"worker-{number}"
        node, seat = spec.fabric.seat(number)
        self.address = f"tcp://10.{node // 250 // 250}.{node // 250 % 250}.{node % 250 + 1}:{8788 + seat}"
        self.speed = speed
        self.dead = False
        self.paused = False
        self.store = Store(cluster.clock, cluster.sizes, spec.memory_nbytes, spec.disk_bandwidth)
        part = dask.config.get("distributed.worker.memory.transfer")
        self.state = WorkerState(
            nthreads=spec.nthreads,
            address=self.address,
            data=self.store,
            validate=spec.validate,
            transfer_incoming_count_limit=dask.config.get("distributed.worker.connections.outgoing"),
            transfer_incoming_bytes_limit=spec.memory_nbytes * part if math.isfinite(spec.memory_nbytes) else math.inf,
            transfer_message_bytes_limit=parse_bytes(
                dask.config.get("distributed.worker.transfer.message-bytes-limit")
            ),
        )
        self._served_max = dask.config.get("distributed.worker.connections.incoming")
        self._topology = Topology()
        self._news = News(self._topology)
        self._serving = 0
        self._turns: Turns[tuple[Callable[[], None], Callable[[], None]]] | None = (
            Turns() if cluster.takes_turns else None
        )
        #: Transfers that are on their way from and to this worker, and what tells the receiver that one has broken.
        self._open: dict[Transfer, Callable[[], None]] = {}
        self._fluid = Fluid(cluster.clock)
        self._computing: dict[Flow, None] = {}
        self._ids = itertools.count()
        self._bandwidth = float(parse_bytes(dask.config.get("distributed.scheduler.bandwidth")))
        self._bandwidths: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))

    # --- messages -----------------------------------------------------------------------------------------------------

    def receive(self, message: dict[str, Any]) -> None:
        """Take a message from the scheduler."""
        if self.dead:
            return
        fields = dict(message)
        event = _EVENTS.get(fields.pop("op"))
        if event is not None:  # "close" comes to a worker that is dead by then; what dask-gpurt tells is not for us
            self.handle(event(**fields))

    def handle(self, *events: StateMachineEvent) -> None:
        """Give events to the state machine, and do what it says."""
        if self.dead:
            return
        for instruction in self.state.handle_stimulus(*events):
            if isinstance(instruction, SendMessageToScheduler):
                self.cluster.send_to_scheduler(self, instruction.to_dict())
            elif isinstance(instruction, Execute):
                self._execute(instruction.key)
            elif isinstance(instruction, GatherDep):
                self._gather(instruction.worker, instruction.to_gather, instruction.total_nbytes)
            else:
                assert isinstance(instruction, RetryBusyWorkerLater), instruction
                retry = RetryBusyWorkerEvent(worker=instruction.worker, stimulus_id=self._id("retry-busy"))
                self.cluster.clock.after(_RETRY_BUSY_S, lambda retry=retry: self.handle(retry))  # type: ignore[misc]

    def heartbeat(self) -> dict[str, Any]:
        """Return what a worker tells about itself."""
        bandwidths, self._bandwidths = dict(self._bandwidths), defaultdict(lambda: (0.0, 0))
        now = self.cluster.clock.now
        return {
            "executing": {
                task.key: now - task.start_time for task in self.state.executing if task.start_time is not None
            },
            "metrics": {
                "bandwidth": {"total": self._bandwidth, "workers": bandwidths, "types": {}},
                "digests_total_since_heartbeat": {},
                "managed_bytes": self.state.nbytes,
                "spilled_bytes": {"memory": self.store.spilled_nbytes, "disk": self.store.spilled_nbytes},
                "memory": self.store.held_nbytes,
                "event_loop_interval": 0.02,
                "transfer": {},
            },
        }

    def reports(self) -> list[Report]:
        """Return what is new about links, as heartbeats of dask-gpurt's workers do."""
        return self._news.take(REPORTS_MAX)

    def find_missing(self) -> None:
        """Ask for keys that are nowhere, as workers do from time to time."""
        self.handle(FindMissingEvent(stimulus_id=self._id("find-missing")))

    def _id(self, what: str) -> str:
        return f"{what}-{self.number}-{next(self._ids)}"

    # --- computing ----------------------------------------------------------------------------------------------------

    def _execute(self, key: Any) -> None:
        task = self.state.tasks[key]
        for dependency in task.dependencies:
            self.store.use(dependency.key)
        run_id = task.run_id
        self.cluster.clock.at(self.store.free_at, lambda: self._compute(key, run_id))

    def _compute(self, key: Any, run_id: int) -> None:
        if self.dead:
            return
        clock = self.cluster.clock
        start = clock.now
        if (task := self.state.tasks.get(key)) is not None:
            task.start_time = start

        def done() -> None:
            del self._computing[flow]
            self._share()
            if self.dead:
                return
            self.cluster.record("computed", self.name, key)
            self.handle(
                ExecuteSuccessEvent(
                    key=key,
                    run_id=run_id,
                    value=None,
                    start=start,
                    stop=clock.now,
                    nbytes=self.cluster.sizes[key],
                    type=None,
                    stimulus_id=self._id("computed"),
                )
            )

        flow = self._fluid.begin(self.cluster.durations[key], done)
        self._computing[flow] = None
        self._share()

    def _share(self) -> None:
        """Let tasks that run side by side slow each other down."""
        rate = self.speed / (1 + self.cluster.spec.contention * (len(self._computing) - 1))
        for flow in self._computing:
            self._fluid.set_rate(flow, rate)

    def set_speed(self, speed: float) -> None:
        """Compute slower or faster from now on."""
        self.speed = speed
        self._share()

    # --- transfers ----------------------------------------------------------------------------------------------------

    def _gather(self, address: str, keys: Collection[Any], total_nbytes: int) -> None:
        latency_s = self.cluster.spec.latency_s
        clock = self.cluster.clock
        started = clock.now

        def failed() -> None:
            failure = GatherDepNetworkFailureEvent(
                worker=address, total_nbytes=total_nbytes, stimulus_id=self._id("gather-failed")
            )
            clock.after(latency_s, lambda: self.handle(failure))

        def busy() -> None:
            event = GatherDepBusyEvent(worker=address, total_nbytes=total_nbytes, stimulus_id=self._id("gather-busy"))
            clock.after(latency_s, lambda: self.handle(event))

        def arrived(found: list[Any]) -> None:
            nbytes = sum(self.cluster.sizes[key] for key in found)
            self._learn(address, nbytes, clock.now - started)
            self.cluster.record("fetched", self.name, *found)
            self.handle(
                GatherDepSuccessEvent(
                    worker=address,
                    total_nbytes=total_nbytes,
                    data=dict.fromkeys(found),
                    stimulus_id=self._id("gathered"),
                )
            )

        def asked() -> None:
            peer = self.cluster.workers.get(address)
            if peer is None or peer.dead:
                failed()
            elif not self.dead:
                peer.serve(self, keys, arrived, busy, failed)

        clock.after(latency_s, asked)

    def serve(
        self,
        peer: SimulatedWorker,
        keys: Collection[Any],
        arrived: Callable[[list[Any]], None],
        busy: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        """Send what is here of ``keys`` to another worker."""
        turns = self._turns
        large = max(keys, key=self.cluster.sizes.__getitem__)
        if turns is None or self.cluster.sizes[large] < LARGE_NBYTES:
            self._send(peer, keys, arrived, busy, failed)
            return
        clock = self.cluster.clock
        started = clock.now

        def sent(found: list[Any]) -> None:
            elapsed_s = clock.now - started
            link = self._topology.link(Place(self.address), Place(peer.address), DASK)
            link.observe(sum(map(self.cluster.sizes.__getitem__, found)), elapsed_s)
            arrived(found)
            leave(elapsed_s)

        def unsent(tell: Callable[[], None]) -> None:
            tell()
            leave(None)

        def leave(elapsed_s: float | None) -> None:
            following, away = turns.leave(large, elapsed_s)
            if following is not None:
                following[0]()
            for _, send_away in away:
                clock.after(AWAY_DELAY_S, send_away)

        def send() -> None:
            nonlocal started
            started = clock.now
            self._send(peer, keys, sent, partial(unsent, busy), partial(unsent, failed))

        answer = turns.enter(large, (send, busy))
        if answer:
            send()
        elif answer is None:
            busy()

    def _send(
        self,
        peer: SimulatedWorker,
        keys: Collection[Any],
        arrived: Callable[[list[Any]], None],
        busy: Callable[[], None],
        failed: Callable[[], None],
    ) -> None:
        if self._serving >= (1 if self.paused else self._served_max):
            busy()
            return
        self._serving += 1
        found = [key for key in keys if key in self.store]
        for key in found:
            self.store.use(key)

        def broken() -> None:
            self._serving -= 1
            failed()

        def begin() -> None:
            if self.dead or peer.dead:
                broken()
                return

            def sent() -> None:
                self._serving -= 1
                del self._open[transfer], peer._open[transfer]
                arrived(found)

            nbytes = sum(self.cluster.sizes[key] for key in found)
            transfer = self.cluster.network.begin(self.number, peer.number, nbytes, sent)
            self._open[transfer] = peer._open[transfer] = broken

        self.cluster.clock.at(self.store.free_at, begin)

    def _learn(self, address: str, nbytes: int, elapsed_s: float) -> None:
        if nbytes > _TELLING_NBYTES:
            bandwidth = nbytes / max(elapsed_s, 0.001)
            self._bandwidth = self._bandwidth * 0.95 + bandwidth * 0.05
            total, count = self._bandwidths[address]
            self._bandwidths[address] = (total + bandwidth, count + 1)

    # --- faults -------------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Start no task and no transfer any more, as a worker does that is short of memory."""
        self._change_status("paused", PauseEvent(stimulus_id=self._id("pause")))

    def unpause(self) -> None:
        """Go on."""
        self._change_status("running", UnpauseEvent(stimulus_id=self._id("unpause")))

    def _change_status(self, status: str, event: StateMachineEvent) -> None:
        if self.dead or self.paused == (status == "paused"):
            return
        self.paused = status == "paused"
        self.cluster.record(status, self.name)
        self.handle(event)
        message = {"op": "worker-status-change", "status": status, "stimulus_id": self._id(status)}
        self.cluster.send_to_scheduler(self, message)

    def die(self) -> None:
        """Be gone, with all that it held and all that was on its way."""
        self.dead = True
        self.cluster.record("died", self.name)
        for flow in self._computing:
            self._fluid.set_rate(flow, 0.0)
        for transfer, broken in list(self._open.items()):
            self.cluster.network.cancel(transfer)
            for end in (transfer.source, transfer.target):
                self.cluster.numbered[end]._open.pop(transfer, None)
            broken()
