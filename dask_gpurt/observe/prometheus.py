"""Metrics for Prometheus, on the endpoint ``/metrics`` that each scheduler and worker of Dask has.

Theory of operation: names, units and prefixes are made as Dask makes its own (``dask_worker_…``, ``dask_scheduler_…``). A
process has one registry, and Dask's collectors in it are told at each request whose figures are wanted; ours look there. They
are in the registry as long as at least one server of this process has dask-gpurt (:data:`collectors`); a server that has none
answers nothing of them. Figures are looked up when they are asked for, and cost nothing before.

Covers: both collectors, and their coming and going. Without prometheus_client, which is optional to Dask, there are none.
Does not cover: figures for the dashboard, which come with heartbeats (:mod:`dask_gpurt.observe.worker`).
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dask_gpurt import seams

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["Collectors", "collect_scheduler", "collect_worker", "collectors"]

logger = logging.getLogger(__name__)


class Collectors:
    """The collectors of this process, as long as somebody wants them."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        #: Side to the servers that want it.
        self._owners: dict[seams.Side, set[int]] = {"scheduler": set(), "worker": set()}
        self._registered: dict[seams.Side, Any] = {}

    @property
    def idle(self) -> bool:
        """Whether there are none."""
        return not self._registered

    def attach(self, side: seams.Side, server: object) -> None:
        """Have the metrics of ``server`` collected, where Prometheus can be served."""
        if importlib.util.find_spec("prometheus_client") is None:
            return
        if problems := seams.broken("metrics", side, server):
            logger.warning("dask-gpurt: there are no metrics for Prometheus: Dask has changed: %s", "; ".join(problems))
            return
        from prometheus_client import REGISTRY

        with self._guard:
            self._owners[side].add(id(server))
            if side not in self._registered:
                self._registered[side] = _Collector(side)
                REGISTRY.register(self._registered[side])

    def detach(self, side: seams.Side, server: object) -> None:
        """Let go of it; with the last server of a side its collector is removed."""
        with self._guard:
            self._owners[side].discard(id(server))
            if not self._owners[side] and side in self._registered:
                from prometheus_client import REGISTRY

                REGISTRY.unregister(self._registered.pop(side))


#: Those of this process.
collectors = Collectors()


class _Collector:
    """Answers for the server whose metrics are asked for."""

    def __init__(self, side: seams.Side) -> None:
        self._side = side

    def describe(self) -> Sequence[Metric]:
        """Nothing is looked up when the collector is registered: there may be no request yet."""
        return ()

    def collect(self) -> Iterator[Metric]:
        server = seams.scraped(self._side)
        if server is None:
            return
        if self._side == "scheduler":
            yield from collect_scheduler(server)
        else:
            yield from collect_worker(server)


class _Families:
    """Makes families of metrics with names as Dask's.

    Parameters
    ----------
    server
        Whose metrics they are.
    side
        Goes into their names.
    """

    def __init__(self, server: Any, side: seams.Side) -> None:
        from distributed.http.prometheus import PrometheusCollector

        self._names = PrometheusCollector(server)
        self._names.subsystem = side

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        from prometheus_client.core import GaugeMetricFamily

        return GaugeMetricFamily(self._names.build_name(f"gpurt_{name}"), text, labels=labels)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Any:
        """Make a counter; ``_total`` is added to its name."""
        from prometheus_client.core import CounterMetricFamily

        return CounterMetricFamily(self._names.build_name(f"gpurt_{name}"), text, labels=labels)


def collect_worker(worker: Any) -> Iterator[Metric]:
    """Yield the metrics of a worker; nothing where dask-gpurt is not installed."""
    runtime = worker.extensions.get("gpurt")
    if runtime is None:
        return
    families = _Families(worker, "worker")
    if runtime.memory is not None:
        yield from _of_memory(runtime.memory, families)
    if runtime.shuffle is not None:
        yield from _of_shuffle(runtime.shuffle, families)


def _of_memory(memory: Any, families: _Families) -> Iterator[Metric]:
    tiers, metrics = memory.tiers(), memory.metrics()
    held = families.gauge("tier_bytes", "Bytes held in each tier", ["tier"])
    reserved = families.gauge(
        "tier_reserved_bytes", "Bytes that are reserved in each tier for what is to come", ["tier"]
    )
    limit = families.gauge(
        "tier_limit_bytes", "Bytes that each tier may hold; tiers without a limit are left out", ["tier"]
    )
    for tier, (held_nbytes, reserved_nbytes, limit_nbytes) in tiers.items():
        held.add_metric([tier], held_nbytes)
        reserved.add_metric([tier], reserved_nbytes)
        if limit_nbytes is not None:
            limit.add_metric([tier], limit_nbytes)
    moved = families.counter("moved_bytes", "Bytes that were copied from a tier to another one", ["source", "target"])
    for (source, target), nbytes in memory.moves().items():
        moved.add_metric([source, target], nbytes)
    yield from (held, reserved, limit, moved)
    dropped = families.counter(
        "dropped_bytes",
        "Bytes that left a tier without being copied: they were not needed any more, or had a copy below already",
        ["tier", "why"],
    )
    waits = families.counter("tier_waits", "Times that something waited for room in a tier", ["tier"])
    failures = families.counter("write_failures", "Copies to a tier below that failed", ["tier"])
    lost = families.counter("lost_blocks", "Copies below that could not be read back", ["tier"])
    compressed = families.counter(
        "compressed_bytes", "Bytes before and after compression on the way to a tier", ["tier", "stage"]
    )
    for tier in tiers:
        if f"{tier}_waits" in metrics:
            dropped.add_metric([tier, "dying"], metrics[f"{tier}_dropped_unwritten_nbytes"])
            dropped.add_metric([tier, "clean"], metrics[f"{tier}_dropped_clean_nbytes"])
            waits.add_metric([tier], metrics[f"{tier}_waits"])
            failures.add_metric([tier], metrics[f"{tier}_write_failures"])
            lost.add_metric([tier], metrics[f"{tier}_corrupt_blocks"])
        if f"{tier}_compressed_nbytes" in metrics:
            compressed.add_metric([tier, "before"], metrics[f"{tier}_compressed_nbytes"])
            compressed.add_metric([tier, "after"], metrics[f"{tier}_compressed_to_nbytes"])
    yield from (dropped, waits, failures, lost, compressed)
    if "device_allocation_failures" in metrics:
        allocations = families.counter(
            "allocation_failures", "Allocations of RMM that failed at first, and those that failed for good", ["result"]
        )
        refused = metrics["device_allocation_refusals"]
        allocations.add_metric(["rescued"], metrics["device_allocation_failures"] - refused)
        allocations.add_metric(["refused"], refused)
        yield allocations


def _of_shuffle(shuffle: Any, families: _Families) -> Iterator[Metric]:
    metrics, states = shuffle.metrics(), shuffle.states()
    runs = families.counter("shuffle_runs", "Runs of shuffles that began on this worker")
    runs.add_metric([], metrics["runs"])
    active = families.gauge("shuffle_active_runs", "Runs of shuffles that are under way", ["phase"])
    phases = Counter(state["phase"] for state in states)
    for phase in ("transfer", "unpack"):
        active.add_metric([phase], phases[phase])
    stuck = families.gauge("shuffle_stuck_runs", "Runs that were reported because they make no progress")
    stuck.add_metric([], sum(state["stuck"] for state in states))
    sent = families.counter(
        "shuffle_sent_bytes", "Bytes of shards by the way that they went; local: they stayed", ["path"]
    )
    for path, name in (("ucx", "sent_ucx"), ("comm", "sent_comm"), ("local", "local")):
        sent.add_metric([path], metrics[f"bytes_{name}"])
    received = families.counter("shuffle_received_bytes", "Bytes of shards that came from peers")
    received.add_metric([], metrics["bytes_received"])
    messages = families.counter("shuffle_messages", "Messages to peers")
    messages.add_metric([], metrics["messages"])
    packed = families.counter("shuffle_compressed_bytes", "Bytes of messages before and after compression", ["stage"])
    packed.add_metric(["before"], metrics["bytes_before_compression"])
    packed.add_metric(["after"], metrics["bytes_after_compression"])
    waited = families.counter("shuffle_credit_wait_seconds", "Time that messages waited for room at peers")
    waited.add_metric([], metrics["credit_wait_s"])
    busy = families.counter("shuffle_busy_seconds", "Time that threads spent on shards", ["activity"])
    for activity in ("split", "unpack", "compress"):
        busy.add_metric([activity], metrics[f"{activity}_s"])
    yield from (runs, active, stuck, sent, received, messages, packed, waited, busy)


def collect_scheduler(scheduler: Any) -> Iterator[Metric]:
    """Yield the metrics of a scheduler; nothing where dask-gpurt is not installed."""
    plugin = scheduler.plugins.get("gpurt")
    if plugin is None:
        return
    families = _Families(scheduler, "scheduler")
    workers = families.gauge("workers", "Workers on which a part is installed, or was left stock", ["part", "state"])
    for part in ("memory", "shuffle"):
        states = [status[part].installed for status in plugin.workers.values() if part in status]
        workers.add_metric([part, "installed"], sum(states))
        workers.add_metric([part, "stock"], len(scheduler.workers) - sum(states))
    yield workers
    if plugin.placement is None:
        return
    metrics = plugin.placement.metrics()
    decisions = families.counter("placement_decisions", "Decisions about tasks and families", ["reason"])
    for reason, count in metrics["decisions"].items():
        decisions.add_metric([reason], count)
    errors = families.counter("placement_errors", "Decisions that fell to Dask because of an error")
    errors.add_metric([], metrics["errors"])
    tasks = families.gauge(
        "placement_tasks", "Tasks with a plan that are not done, and those of them that wait", ["state"]
    )
    tasks.add_metric(["planned"], metrics["planned"])
    tasks.add_metric(["waiting"], metrics["waiting"])
    yield from (decisions, errors, tasks)
