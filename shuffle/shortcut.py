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
from typing import Any

from dask_gpurt import seams
from dask_gpurt.shuffle.extension import Extension

__all__ = ["Shortcut"]


class Shortcut(Extension):
    """Stands before the look-ups of one worker.

    Parameters
    ----------
    worker
        The worker.
    """

    def extend(self, plugin: Any) -> Callable[[], None]:
        """Stand before the plugin's own methods; returns how to undo it."""
        stock = seams.shuffle_lookups(plugin)

        def get_or_create(shuffle_id: Any) -> Any:
            run = seams.sound_shuffle_run(plugin, shuffle_id)
            return stock.get_or_create(shuffle_id) if run is None else run

        def get(shuffle_id: Any, run_id: int) -> Any:
            run = seams.sound_shuffle_run(plugin, shuffle_id)
            return stock.get(shuffle_id, run_id) if run is None or run.run_id != run_id else run

        return seams.override_shuffle_lookups(plugin, seams.ShuffleLookups(get_or_create, get))
