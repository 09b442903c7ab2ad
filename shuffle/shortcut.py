"""A task's thread finds a run that is there without asking the event loop for it.

Covers: the two look-ups of Dask's shuffle plugin that tasks begin with.
Does not cover: runs that are not there yet, were restarted, have failed or end: the event loop knows about those, and is
asked as in stock Dask.

Theory of operation: stock asks the event loop in each task, which costs both threads 0.2 ms, and the task waits for
whatever the loop is at. The loop does no more than to look into a dictionary, and a thread may do that as well: what it
finds is what the loop would have answered, had it been asked a moment earlier. Between its answer and the task anything
can happen in stock Dask, too, and the run itself tells when it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dask_gpurt import seams

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["Shortcut"]


class Shortcut:
    """Stands before the look-ups of one worker.

    Parameters
    ----------
    worker
        The worker.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._started = False
        self._restore: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin, or do so with the first run on a worker that preloads dask-gpurt, and has Dask's own plugin later."""
        self._started = True
        self.attach()

    def attach(self) -> None:
        """Stand before Dask's own plugin, if that is there, and this has been started."""
        plugin = self._worker.extensions.get("shuffle")
        if not self._started or self._restore is not None or plugin is None:
            return
        stock = seams.shuffle_lookups(plugin)

        def get_or_create(shuffle_id: Any) -> Any:
            run = seams.sound_shuffle_run(plugin, shuffle_id)
            return stock.get_or_create(shuffle_id) if run is None else run

        def get(shuffle_id: Any, run_id: int) -> Any:
            run = seams.sound_shuffle_run(plugin, shuffle_id)
            return stock.get(shuffle_id, run_id) if run is None or run.run_id != run_id else run

        self._restore = seams.override_shuffle_lookups(plugin, seams.ShuffleLookups(get_or_create, get))

    def stop(self) -> None:
        """Put stock back."""
        self._started = False
        if self._restore is not None:
            self._restore()
            self._restore = None
