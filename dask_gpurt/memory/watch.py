"""Has the scheduler tell a worker, while that is short of memory, what it knows of the next uses of its keys.

Theory of operation
-------------------
The worker asks by a request of its own; what it is told comes by the stream on which Dask sends it tasks, so that it is
neither older nor newer than these. A message by which nobody is listening would end that stream, and with it the worker. So
the handler stays until the scheduler has said that this was its *last* message: when it was asked to stop, or when
dask-gpurt was taken away from it.

Covers: asking, listening, and the end of both.
Does not cover: what is made of it; see :mod:`dask_gpurt.memory.horizon`.
See also: :mod:`dask_gpurt.plugins.horizon`, the scheduler's side.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Any

from dask_gpurt.handlers import weak
from dask_gpurt.memory.horizon import CAN_MAKE, SPARE, TELL, WATCH

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

#: How long the scheduler may take for its last message; one that is gone sends none.
LAST_S = 10.0
#: How long a worker that gives this up waits before it asks: most often dask-gpurt was taken away from the scheduler first.
COURTESY_S = 1.0


class Watch:
    """Asks the scheduler of ``worker``.

    Parameters
    ----------
    worker
        The worker. All methods are called on its event loop.
    tell
        Is given what the scheduler says: for each key its next use and whether it is wanted.
    """

    def __init__(self, worker: Any, tell: Callable[[Iterable[Any]], None]) -> None:
        self._worker = worker
        self._tell = tell
        #: Whether there is a scheduler that answers.
        self.available = False
        #: Whether we listen, or are about to.
        self.on = False
        self._turn = asyncio.Lock()
        self._last = asyncio.Event()
        self._last.set()
        self._task: asyncio.Task[None] | None = None

    def set(self, on: bool) -> None:
        """Begin or stop to listen, soon."""
        if self.available and on is not self.on:
            self.on = on
            self._task = asyncio.create_task(self._begin() if on else self._end(), name="gpurt-watch")

    async def close(self) -> None:
        """Stop to listen, and wait until no message can come any more."""
        self.available = False
        self.on = False
        await self._heard_last(COURTESY_S)
        await self._end()

    async def settled(self) -> None:
        """Wait for what was begun."""
        if self._task is not None:
            await self._task

    async def can_make(self, key: Hashable) -> bool:
        """Whether the scheduler knows how ``key`` is made; False if it does not answer."""
        if not self.available:
            return False
        try:
            return bool(await getattr(self._worker.scheduler, CAN_MAKE)(key=key))
        except OSError as error:
            logger.debug("The scheduler does not say whether %r can be made: %s", key, error)
            return False

    async def offer(self, keys: list[Hashable]) -> Collection[Hashable]:
        """Offer copies of keys that only peers need; return those that are to be offered again."""
        if not self.on:
            return ()
        try:
            return await getattr(self._worker.scheduler, SPARE)(worker=self._worker.address, keys=keys) or ()
        except OSError as error:
            logger.debug("The scheduler takes nothing back: %s", error)
            return ()

    async def _begin(self) -> None:
        async with self._turn:
            if not self.on:
                return
            self._last.clear()
            self._worker.stream_handlers[TELL] = weak(self._hear, late_is_no_error=True)
            if not await self._ask(True):
                self.available = False
                self._deaf()

    async def _end(self) -> None:
        async with self._turn:
            if self.on or self._last.is_set():
                return
            await self._ask(False)
            if not await self._heard_last(LAST_S):
                logger.debug("The scheduler did not say that it has stopped to tell next uses; the handler stays")

    async def _heard_last(self, patience_s: float) -> bool:
        try:
            await asyncio.wait_for(self._last.wait(), patience_s)
        except TimeoutError:
            return False
        return True

    async def _ask(self, watching: bool) -> bool:
        try:
            await getattr(self._worker.scheduler, WATCH)(worker=self._worker.address, watching=watching)
        except OSError as error:
            # It was taken away from the scheduler, which has said its last word then, or the scheduler is gone. What this
            # worker knows by itself has to do.
            logger.debug("The scheduler does not tell next uses: %s", error)
            return False
        return True

    def _hear(self, words: Iterable[Any], last: bool = False) -> None:
        if last:
            self._deaf()
        elif self.on:
            self._tell(words)

    def _deaf(self) -> None:
        self.on = False
        self._worker.stream_handlers.pop(TELL, None)
        self._last.set()
