"""The worker plugin: starts the parts that live on a worker, and takes them away again.

Covers: :class:`GpurtWorkerPlugin` (travels to every worker, those that join later included) and
:class:`WorkerRuntime` (what stands behind ``worker.extensions["gpurt"]``).
Does not cover: what the parts do; see :mod:`dask_gpurt.memory` and :mod:`dask_gpurt.shuffle`.

A part that cannot start leaves the worker with stock Dask for that part; the reason travels to the scheduler and from
there into the answer of ``install``. It must never keep a worker from starting.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from distributed.core import Status
from distributed.diagnostics.plugin import WorkerPlugin

from dask_gpurt.installation import PartStatus
from dask_gpurt.memory.store import BufferStore, DictBufferStore
from dask_gpurt.observe.worker import WorkerObserver, report
from dask_gpurt.plugins.parts import Parts
from dask_gpurt.secret import Secret
from dask_gpurt.topology import Topology

if TYPE_CHECKING:
    from distributed.worker import Worker

    from dask_gpurt.config import Settings
    from dask_gpurt.memory.manager import MemoryManager
    from dask_gpurt.plugins.probing import Probe
    from dask_gpurt.plugins.serving import Serving
    from dask_gpurt.shuffle.worker import ShuffleWorker

__all__ = ["GpurtWorkerPlugin", "WorkerRuntime"]


class WorkerRuntime:
    """The parts on one worker, found under ``worker.extensions["gpurt"]``.

    Attributes
    ----------
    memory
        The tiered store, or None where it was left stock.
    shuffle
        The data plane of the shuffle, or None where it was left stock.
    serving, probe
        What of the placement lives on a worker, or None where it was left stock.
    island
        The GPUs to which that of the worker is near; None if there are none, or it has none. See :mod:`dask_gpurt.plugins.islands`.
    parts
        Part to its status.
    """

    def __init__(self) -> None:
        self.island: str | None = None
        self.serving: Serving | None = None
        self.probe: Probe | None = None
        self.memory: MemoryManager | None = None
        self.shuffle: ShuffleWorker | None = None
        self.parts: dict[str, PartStatus] = {}
        self._observer: WorkerObserver | None = None

    async def start(self, worker: Worker, settings: Settings, secret: Secret | None) -> None:
        """Start what is enabled. Never raises for a part that cannot start; see :attr:`parts`."""
        from dask_gpurt.memory.manager import MemoryManager
        from dask_gpurt.plugins import islands
        from dask_gpurt.plugins.probing import Probe
        from dask_gpurt.plugins.serving import Serving
        from dask_gpurt.shuffle.worker import ShuffleWorker

        parts = Parts("worker", worker, settings)
        self.parts = parts.statuses
        if parts.startable("memory"):
            with parts.starting("memory"):
                memory = MemoryManager(worker, settings.memory)
                await memory.start()
                self.memory = memory
        if parts.startable("shuffle"):
            with parts.starting("shuffle"):
                store: BufferStore = self.memory.store if self.memory is not None else DictBufferStore()
                pool = self.memory.pool if self.memory is not None else None
                device_store = self.memory.device_store if self.memory is not None else None
                shuffle = ShuffleWorker(worker, settings.shuffle, store, pool, device_store, secret=secret)
                shuffle.start()
                self.shuffle = shuffle
                remark = shuffle.carrier.path()
            if self.shuffle is not None:
                parts.remark("shuffle", remark)
        if parts.startable("placement"):
            with parts.starting("placement"):
                # The shuffle tells the scheduler what is known of links.
                topology = self.shuffle.carrier.topology if self.shuffle is not None else Topology()
                serving, probe = Serving(worker, topology), Probe(worker, topology)
                serving.start()
                probe.start()
                self.serving, self.probe = serving, probe
                if gpus := os.environ.get("CUDA_VISIBLE_DEVICES"):
                    self.island = await asyncio.to_thread(islands.look, gpus)
        self._observer = WorkerObserver(worker, self)
        self._observer.start()

    async def stop(self, *, closing: bool) -> None:
        """Put stock Dask back; on a worker that is ``closing``, data is let go instead of being moved back.

        What stands before others goes before them. The shuffle goes before the tiers: its runs take their shards out of the tiers.
        """
        if self._observer is not None:
            self._observer.stop()
            self._observer = None
        if self.serving is not None and self.probe is not None:
            self.probe.stop()
            self.serving.stop()
            self.serving = self.probe = None
        if self.shuffle is not None:
            await self.shuffle.stop()
            self.shuffle = None
        if self.memory is not None:
            await (self.memory.close() if closing else self.memory.stop())
            self.memory = None


class GpurtWorkerPlugin(WorkerPlugin):
    """Bring dask-gpurt to a worker.

    Parameters
    ----------
    settings
        What to install.
    secret
        What all workers of this installation know; None: this one is none of them.
    report
        Whether the scheduler runs dask-gpurt too and waits for the status of this worker.
    """

    name = "gpurt"

    def __init__(self, settings: Settings, secret: Secret | None = None, *, report: bool = True) -> None:
        self.settings = settings
        self.secret = secret
        self.report = report
        self._memory: MemoryManager | None = None

    async def setup(self, worker: Worker) -> None:
        """Start the parts on ``worker`` and report them to the scheduler."""
        runtime = WorkerRuntime()
        # The runtime is in place before the parts are: a shuffle run may arrive as soon as the scheduler knows.
        worker.extensions["gpurt"] = runtime
        await runtime.start(worker, self.settings, self.secret)
        self._memory = runtime.memory
        if self.report:
            served = await worker.scheduler.gpurt_worker_ready(
                worker=worker.address,
                parts={part: status.to_message() for part, status in runtime.parts.items()},
                # The next heartbeat may be seconds away, and whoever installs is told at once.
                observed=report(worker, runtime).to_message(),
                island=runtime.island,
            )
            if runtime.memory is not None and served["memory"]:
                runtime.memory.may_watch()

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:  # noqa: ARG002
        """Let the tiers know of a task that the worker will start."""
        if finish in ("waiting", "ready") and self._memory is not None:
            self._memory.task_came()

    async def teardown(self, worker: Worker) -> None:
        """Put stock Dask back on ``worker``."""
        self._memory = None
        runtime = worker.extensions.pop("gpurt", None)
        if runtime is not None:
            await runtime.stop(closing=worker.status in (Status.closing, Status.closed))
