"""Records on the scheduler what happens, for clients that will make reports of it.

Covers: :class:`Recorders`: beginning, sampling, ending, and what is left behind by clients that are gone.
Does not cover: what is recorded (:mod:`dask_gpurt.observe.recording`); the client's side (:mod:`dask_gpurt.reporter`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from distributed.metrics import time
from tornado.ioloop import PeriodicCallback

from dask_gpurt.errors import GpurtError
from dask_gpurt.observe.recording import INTERVAL_S, Recording

if TYPE_CHECKING:
    from distributed import Scheduler

    from dask_gpurt.observe.board import ClusterReport
    from dask_gpurt.observe.journal import Journal

__all__ = ["RECORDERS_MAX", "Recorders", "Watched"]

#: Recordings that may be under way at a time, of all clients.
RECORDERS_MAX = 16


class Watched(Protocol):
    """Where the figures come from."""

    def look(self) -> ClusterReport:
        """Say what is known now."""

    async def journals(self) -> dict[str, Journal]:
        """Ask the workers."""


class Recorders:
    """The recordings that are under way on a scheduler.

    Parameters
    ----------
    scheduler
        The scheduler.
    watched
        What is recorded.
    """

    def __init__(self, scheduler: Scheduler, watched: Watched) -> None:
        self._scheduler = scheduler
        self._watched = watched
        #: (client, its name for it) to the recording and what takes its samples.
        self._running: dict[tuple[str, str], tuple[Recording, PeriodicCallback]] = {}
        self._stopped = False

    def __len__(self) -> int:
        return len(self._running)

    async def begin(self, client: str, name: str) -> None:
        """Begin to record for a client.

        Raises
        ------
        GpurtError
            If there are too many already.
        """
        journals = await self._watched.journals()
        if len(self._running) >= RECORDERS_MAX:
            raise GpurtError(
                f"{RECORDERS_MAX} reports are being recorded on this scheduler: no more than that at a time"
            )
        if self._stopped or client not in self._scheduler.clients:
            # Meanwhile: nobody would end it.
            raise GpurtError("dask-gpurt, or the client, is not there any more")
        recording = Recording(time(), self._watched.look(), journals)

        def sample() -> None:
            if recording.due(time()):
                recording.observe(time(), self._watched.look())

        callback = PeriodicCallback(sample, 1000 * INTERVAL_S)
        self._running[client, name] = recording, callback
        callback.start()

    async def end(self, client: str, name: str) -> Recording | None:
        """End a recording, and return it; None: there is none, because dask-gpurt was installed anew meanwhile."""
        journals = await self._watched.journals()
        if (client, name) not in self._running:
            return None
        recording, callback = self._running.pop((client, name))
        callback.stop()
        recording.finish(time(), self._watched.look(), journals, self._stuck())
        return recording

    def _stuck(self) -> list[tuple[float, dict[str, Any]]]:
        events = self._scheduler.get_events("gpurt")
        return [(at_s, event) for at_s, event in events if event.get("action") == "shuffle-stuck"]

    def drop(self, client: str) -> None:
        """End what a client has begun."""
        for key in [key for key in self._running if key[0] == client]:
            _, callback = self._running.pop(key)
            callback.stop()

    def stop(self) -> None:
        """End all, for good."""
        self._stopped = True
        for client in {client for client, _ in self._running}:
            self.drop(client)
