"""What workers measure of their links goes to the scheduler, with the heartbeats that Dask's shuffle sends anyway.

Covers: :class:`LinkReporter` on a worker, :class:`LinkBoard` on the scheduler.
Does not cover: what is known of a link, and what is worth telling (:mod:`dask_gpurt.topology`); who measures
(:mod:`dask_gpurt.shuffle.carrier`).
See also: :mod:`dask_gpurt.shuffle.assignment`, which decides by it.

Theory of operation: each worker measures the links that begin there. A heartbeat (every half a second, rarer in large
clusters) takes along at most :data:`REPORTS_MAX` of those whose price has changed; in most of them that is none. The
scheduler keeps the newest report on each, of workers that it knows and about their own links, and forgets those of a worker
that leaves. Either side may be without the other: Dask's scheduler passes over what it does not know. Nothing here may raise
for what a peer says: Dask closes a worker whose heartbeat fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dask_gpurt import seams
from dask_gpurt.shuffle.extension import Extension
from dask_gpurt.topology import News, Report, Topology

if TYPE_CHECKING:
    from distributed import Scheduler, Worker

__all__ = ["REPORTS_MAX", "LinkBoard", "LinkReporter"]

#: Reports in one heartbeat, of some 100 bytes each: a worker with a thousand peers has told all in half a minute.
REPORTS_MAX = 32


class LinkReporter(Extension):
    """Adds what is new about a worker's links to its heartbeats.

    Parameters
    ----------
    worker
        The worker.
    topology
        What it has measured.
    """

    def __init__(self, worker: Worker, topology: Topology) -> None:
        super().__init__(worker)
        self._news = News(topology)

    def extend(self, plugin: Any) -> Callable[[], None]:
        """Add to the plugin's heartbeats; returns how to undo it."""
        return seams.add_to_shuffle_heartbeat(plugin, lambda: self._news.take(REPORTS_MAX))


class LinkBoard:
    """Takes down on the scheduler what workers report.

    Parameters
    ----------
    scheduler
        The scheduler.
    topology
        Where it is kept.
    """

    def __init__(self, scheduler: Scheduler, topology: Topology) -> None:
        self._scheduler = scheduler
        self.topology = topology

    def start(self) -> Callable[[], None]:
        """Begin; returns how to undo it."""
        return seams.hear_shuffle_heartbeat(self._scheduler.plugins["shuffle"], self.hear)

    def hear(self, address: str, reports: Sequence[Report]) -> None:
        """Take reports of the worker at ``address``."""
        workers = self._scheduler.workers
        self.topology.learn(report for report in reports[:REPORTS_MAX] if report[0] == address and report[2] in workers)

    def remove_worker(self, address: str) -> None:
        """Forget the links of a worker that has left."""
        self.topology.forget(address)
