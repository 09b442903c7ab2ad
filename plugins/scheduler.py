"""The scheduler plugin: starts the parts that live on the scheduler, and knows which workers have theirs.

Covers: :class:`GpurtSchedulerPlugin`; setting up and taking away a whole installation from the scheduler
(:func:`set_up`, :func:`take_away`), which ``install`` and the preload share.
Does not cover: the placement policy (:mod:`dask_gpurt.plugins.placement`), the choice of the data plane of a shuffle
run (:mod:`dask_gpurt.shuffle.scheduler`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps

from dask_gpurt.handlers import weak
from dask_gpurt.installation import PartStatus
from dask_gpurt.observe.reports import WorkerReport
from dask_gpurt.observe.scheduler import SchedulerObserver
from dask_gpurt.plugins.parts import Parts
from dask_gpurt.plugins.worker import GpurtWorkerPlugin
from dask_gpurt.secret import Secret
from dask_gpurt.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from distributed.scheduler import Scheduler

    from dask_gpurt.config import Settings
    from dask_gpurt.observe.reports import TierReport
    from dask_gpurt.plugins.horizon import HorizonScheduler
    from dask_gpurt.plugins.placement import Placement
    from dask_gpurt.plugins.probing import Prober
    from dask_gpurt.shuffle.scheduler import ShuffleScheduler

__all__ = ["NAME", "GpurtSchedulerPlugin", "set_up", "take_away"]

#: Name of the scheduler plugin and of the worker plugin.
NAME = "gpurt"
_READY = "gpurt_worker_ready"


class GpurtSchedulerPlugin(SchedulerPlugin):
    """Bring dask-gpurt to a scheduler.

    Attributes
    ----------
    parts
        Part to its status on the scheduler.
    workers
        Address of a worker to its parts, as the worker reported them.
    topology
        What workers have measured of the links between them.
    """

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.parts: dict[str, PartStatus] = {}
        self.workers: dict[str, dict[str, PartStatus]] = {}
        self._first_tiers: dict[str, Mapping[str, TierReport]] = {}
        self.topology = Topology()
        self.placement: Placement | None = None
        self.prober: Prober | None = None
        self.horizon: HorizonScheduler | None = None
        self.shuffle: ShuffleScheduler | None = None
        self._scheduler: Scheduler | None = None
        self._ready: Callable[..., Any] | None = None
        self.observer: SchedulerObserver | None = None

    async def start(self, scheduler: Scheduler) -> None:
        """Start what is enabled. The second of two calls does nothing (a preload's plugin is started twice)."""
        if self._scheduler is not None:
            return
        self._scheduler = scheduler
        scheduler.handlers[_READY] = self._ready = weak(self.worker_ready)
        from dask_gpurt.plugins.horizon import HorizonScheduler
        from dask_gpurt.plugins.placement import Placement
        from dask_gpurt.plugins.probing import Pairs, Prober
        from dask_gpurt.shuffle.scheduler import ShuffleScheduler

        parts = Parts("scheduler", scheduler, self.settings)
        self.parts = parts.statuses
        if parts.startable("memory"):
            with parts.starting("memory"):
                horizon = HorizonScheduler(scheduler)
                horizon.begin()
                self.horizon = horizon
        if parts.startable("shuffle"):
            with parts.starting("shuffle"):
                shuffle = ShuffleScheduler(scheduler, self.settings.shuffle, self.topology, self.joining)
                shuffle.start()
                self.shuffle = shuffle
        if parts.startable("placement"):
            with parts.starting("placement"):
                placement = Placement(scheduler, self.settings.placement, self.topology)
                placement.start()
                self.placement = placement
                self.prober = Prober(scheduler, self.topology, Pairs(placement.near))
        self.observer = SchedulerObserver(scheduler, self)
        self.observer.start()

    def stop(self) -> None:
        """Put stock Dask back on the scheduler. Calling it again does nothing."""
        if self._scheduler is None:
            return
        if self.observer is not None:
            self.observer.stop()
            self.observer = None
        if self.prober is not None:
            self.prober.stop()
            self.prober = None
        if self.placement is not None:
            self.placement.stop()
            self.placement = None
        if self.shuffle is not None:
            self.shuffle.stop()
            self.shuffle = None
        if self.horizon is not None:
            self.horizon.end()
            self.horizon = None
        if self._scheduler.handlers.get(_READY) is self._ready:
            del self._scheduler.handlers[_READY]
        self._scheduler = None

    def remove_client(self, scheduler: Scheduler, client: str) -> None:  # noqa: ARG002
        """End what a client that has left had begun to record."""
        if self.observer is not None:
            self.observer.recorders.drop(client)

    async def close(self) -> None:
        """Let go of what belongs to the process, when the scheduler closes with dask-gpurt installed."""
        if self.observer is not None:
            self.observer.stop()

    async def worker_ready(
        self,
        worker: str,
        parts: dict[str, dict[str, Any]],
        observed: dict[str, Any],
        island: str | None = None,
    ) -> dict[str, bool]:
        """Take the report of a worker whose parts have started; say which parts of it the scheduler serves."""
        statuses = {part: PartStatus(bool(p["installed"]), str(p["remark"])) for part, p in parts.items()}
        self.workers[worker] = statuses
        self._first_tiers[worker] = WorkerReport.from_message(observed).tiers
        if self._scheduler is not None:
            # Under the topic "gpurt" of Dask's events: whoever waits for a worker to be ready needs no polling.
            self._scheduler.log_event(NAME, {"action": "worker-ready", "worker": worker, "parts": parts})
        if self.shuffle is not None:
            shuffle = statuses.get("shuffle")
            self.shuffle.set_capable(worker, shuffle is not None and shuffle.installed)
        if self.placement is not None:
            self.placement.settle(worker, island)
        placement = statuses.get("placement")
        if self.prober is not None and placement is not None and placement.installed:
            self.prober.worker_ready(worker)
        return {"memory": self.horizon is not None}

    def joining(self, worker: str) -> bool:
        """Whether the parts of a worker are starting: it is told to start them when it joins, and reports when they have."""
        return worker not in self.workers and self._scheduler is not None and NAME in self._scheduler.worker_plugins

    def tiers(self) -> dict[str, Mapping[str, TierReport]]:
        """Return what lies in the tiers of each worker, as its last heartbeat said; before the first one, as it was when it began."""
        if self.observer is None or self._scheduler is None:
            return {}
        # One that is gone may have been quicker to leave than to be ready.
        first = {worker: tiers for worker, tiers in self._first_tiers.items() if worker in self._scheduler.workers}
        return {**first, **self.observer.tiers()}

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:  # noqa: ARG002
        """Forget a worker that left; a worker that returns on the same address reports anew."""
        self.workers.pop(worker, None)
        self._first_tiers.pop(worker, None)
        if self.prober is not None:
            self.prober.remove_worker(worker)
        if self.shuffle is not None:
            self.shuffle.remove_worker(worker)


async def set_up(scheduler: Scheduler, settings: Settings) -> GpurtSchedulerPlugin:
    """Install on ``scheduler`` and on all its workers, now and later. An earlier installation is replaced."""
    await take_away(scheduler)
    plugin = GpurtSchedulerPlugin(settings)
    await scheduler.register_scheduler_plugin(plugin, name=NAME, idempotent=False)
    # New for each installation: nobody who was in the one before is in this one by that.
    workers = dumps(GpurtWorkerPlugin(settings, Secret.new()))
    await scheduler.register_worker_plugin(None, workers, name=NAME, idempotent=False)
    return plugin


async def take_away(scheduler: Scheduler) -> bool:
    """Uninstall from ``scheduler`` and its workers; False if there was nothing to uninstall."""
    plugin = scheduler.plugins.get(NAME)
    if isinstance(plugin, GpurtSchedulerPlugin):
        # First the scheduler, so that no shuffle run begins on a worker that is about to lose its data plane.
        plugin.stop()
        scheduler.remove_plugin(NAME)
    scheduler.worker_plugins.pop(NAME, None)
    # Workers that were given a preload have the plugin without the scheduler knowing.
    removed = await scheduler.broadcast(msg={"op": "run", "function": dumps(_remove_from_worker)}, on_error="return")
    return plugin is not None or any(isinstance(r, dict) and r.get("result") for r in removed.values())


async def _remove_from_worker(dask_worker: Any) -> bool:
    if NAME not in dask_worker.plugins:
        return False
    await dask_worker.plugin_remove(NAME)
    return True
