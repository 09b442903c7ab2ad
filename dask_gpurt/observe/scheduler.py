"""Brings pages into the dashboard of a running scheduler, and metrics to its endpoint, and takes both away again.

Covers: :class:`SchedulerObserver`; what the scheduler has of its workers, put together for the board; asking the workers for more.
Does not cover: documents and panels (:mod:`dask_gpurt.observe.pages`), metrics (:mod:`dask_gpurt.observe.prometheus`).
See also: :mod:`dask_gpurt.seams`, for how a page comes into Dask's dashboard and its menu.

A scheduler without a dashboard, because Bokeh is not installed or it is switched off, gets none. What keeps a page from
being there keeps nothing else from working: it is logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.metrics import time

from dask_gpurt import seams
from dask_gpurt.observe import prometheus
from dask_gpurt.observe.board import Board, ClusterReport, Placing, WorkerState
from dask_gpurt.observe.journal import Journal, join
from dask_gpurt.observe.matrix import Matrix
from dask_gpurt.observe.recorder import Recorders
from dask_gpurt.observe.reports import TierReport, WorkerReport
from dask_gpurt.observe.worker import JOURNAL, METRIC

if TYPE_CHECKING:
    from distributed import Scheduler

    from dask_gpurt.plugins.placement import Placement
    from dask_gpurt.plugins.scheduler import GpurtSchedulerPlugin

__all__ = ["SchedulerObserver"]

logger = logging.getLogger(__name__)

#: Decisions that are shown.
LATEST = 12
#: A worker that does not answer within this time is passed over.
ANSWER_S = 10.0
#: Workers are asked for their journals no more often than this, and for each of them so much later: 7 s where there are 200.
ASKED_S, ASKED_WORKER_S = 2.0, 0.025


class SchedulerObserver:
    """What others can see of a scheduler and its workers, from start to stop.

    Parameters
    ----------
    scheduler
        The scheduler.
    plugin
        The parts that run on it.
    """

    def __init__(self, scheduler: Scheduler, plugin: GpurtSchedulerPlugin) -> None:
        self._scheduler = scheduler
        self._plugin = plugin
        self._remove_pages: Callable[[], None] | None = None
        #: For pages; see :class:`dask_gpurt.observe.pages.Source`.
        self.board = Board()
        self.recorders = Recorders(scheduler, self)
        self.active = False
        self._asked_s = -ASKED_S
        self._asking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to show."""
        self.active = True
        prometheus.collectors.attach("scheduler", self._scheduler)
        if not seams.has_dashboard(self._scheduler):
            return
        if problems := seams.broken("dashboard", "scheduler", self._scheduler):
            logger.warning("dask-gpurt: there is no page in the dashboard: Dask has changed: %s", "; ".join(problems))
            return
        try:
            from dask_gpurt.observe.pages import documents

            self._remove_pages = seams.add_dashboard_pages(self._scheduler, documents(self), "gpurt")
        except Exception:
            logger.exception("dask-gpurt: there is no page in the dashboard")

    def stop(self) -> None:
        """Show nothing any more. Calling it again does nothing."""
        # Pages that are open stand still.
        self.active = False
        self.recorders.stop()
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None
        prometheus.collectors.detach("scheduler", self._scheduler)
        if self._remove_pages is not None:
            self._remove_pages()
            self._remove_pages = None

    def tiers(self) -> dict[str, Mapping[str, TierReport]]:
        """Return what lies in the tiers of each worker that has said so."""
        states = map(_state, self._scheduler.workers.values())
        return {state.address: state.report.tiers for state in states if state.report is not None}

    def refresh(self) -> None:
        """Bring the board up to date."""
        now_s = time()
        if self.board.due(now_s):
            self.board.observe(now_s, self.look())

    def ask(self) -> None:
        """Have what only workers know brought up to date on the board, if it is time for that, as soon as they have answered."""
        now_s = time()
        if self._asking is None and now_s - self._asked_s >= ASKED_S + ASKED_WORKER_S * len(self._plugin.workers):
            self._asked_s = now_s
            self._asking = asyncio.create_task(self._ask(), name="gpurt-observer-asks")

    async def _ask(self) -> None:
        try:
            journals = await self.journals()
            self.board.matrix = Matrix.of(
                self.names(), {address: journal.sent for address, journal in journals.items()}
            )
            self.board.ended = [run for run in join(journals) if not run.active]
        finally:
            self._asking = None

    def names(self) -> dict[str, str]:
        """Return address to name of the workers that have dask-gpurt."""
        workers = self._scheduler.workers
        return {address: str(workers[address].name) for address in self._plugin.workers if address in workers}

    async def journals(self) -> dict[str, Journal]:
        """Ask all workers for their journals; who does not answer in time is left out."""
        found = await asyncio.gather(*map(self._journal, self.names()))
        return {address: journal for address, journal in found if journal is not None}

    async def _journal(self, address: str) -> tuple[str, Journal | None]:
        try:
            asked = getattr(self._scheduler.rpc(address), JOURNAL)()
            message = await asyncio.wait_for(asked, ANSWER_S)
        except (OSError, RuntimeError) as error:
            # It is gone, or dask-gpurt is on its way out there.
            logger.info("dask-gpurt: %s does not tell what it has sent: %r", address, error)
            return address, None
        # A worker that has no such handler answers, and says nothing: dask-gpurt has just gone there.
        return address, None if message is None else Journal.from_message(message)

    def look(self) -> ClusterReport:
        """Put together what the scheduler knows at the moment."""
        names = {address: str(ws.name) for address, ws in self._scheduler.workers.items()}
        workers = [_state(ws) for ws in self._scheduler.workers.values()]
        loop_s = seams.loop_interval_s(self._scheduler)
        placement = self._plugin.placement
        if placement is None:
            return ClusterReport(workers, loop_s)
        metrics = placement.metrics()
        return ClusterReport(
            workers,
            loop_s,
            reasons=metrics["decisions"],
            errors=metrics["errors"],
            planned=metrics["planned"],
            waiting=metrics["waiting"],
            latest=_latest(placement, names),
        )


def _state(ws: Any) -> WorkerState:
    message = ws.metrics.get(METRIC)
    return WorkerState(
        address=ws.address,
        name=str(ws.name),
        seen_s=ws.last_seen,
        loop_s=ws.metrics.get("event_loop_interval", 0.0),
        report=None if message is None else WorkerReport.from_message(message),
    )


def _latest(placement: Placement, names: dict[str, str]) -> list[Placing]:
    return [
        Placing(str(key), decision.reason, names.get(decision.worker, decision.worker), "\n".join(decision.lines()))
        for key, decision in placement.decisions.latest(LATEST)
    ]
