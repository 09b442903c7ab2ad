"""Tells workers that are short of memory what the scheduler knows of the next uses of what they hold.

Theory of operation
-------------------
A worker that gets short of memory says so (the handler ``gpurt_watch``), and that it is no longer. While anybody is,
a plugin hears of each transition; what has changed since goes out at most every :data:`INTERVAL_S`, to each worker in one
message on the stream that its tasks come by.

A worker that is short of memory offers copies that only its peers need (``gpurt_spare``). They are taken back as Dask's active memory manager
takes back copies, if these peers hold theirs.

A worker that has lost a value asks whether it can be made again (``gpurt_can_make``): one that it was given by a peer looks, once that
peer is gone, just as one that was scattered.

Covers: the handler, the plugin, the messages.
Does not cover: what is said, see :mod:`dask_gpurt.plugins.foresight`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin

from dask_gpurt.handlers import weak
from dask_gpurt.memory.horizon import CAN_MAKE, SPARE, TELL, WATCH
from dask_gpurt.plugins.foresight import Foresight

if TYPE_CHECKING:
    from distributed.scheduler import Scheduler

__all__ = ["INTERVAL_S", "HorizonScheduler"]

#: How long changes are collected: as long as Dask collects the messages to a worker.
INTERVAL_S = 0.002
#: Keys in a message, so that the event loop has other turns between.
WORDS_MAX = 2000

_NAME = "gpurt-horizon"


class HorizonScheduler(SchedulerPlugin):
    """Tell the workers of ``scheduler``.

    Parameters
    ----------
    scheduler
        The running scheduler.
    """

    name = _NAME

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.foresight = Foresight()
        self._handlers = {WATCH: weak(self.watch), CAN_MAKE: weak(self.can_make), SPARE: weak(self.spare)}
        self._due: asyncio.TimerHandle | None = None
        #: Messages, and keys in them.
        self.messages = 0
        self.words = 0
        #: Copies that were taken back.
        self.taken = 0

    def begin(self) -> None:
        """Listen to workers that want to watch."""
        self.scheduler.handlers.update(self._handlers)

    def end(self) -> None:
        """Tell nobody anything any more."""
        for name, handler in self._handlers.items():
            if self.scheduler.handlers.get(name) is handler:
                del self.scheduler.handlers[name]
        for state in self.foresight.watchers:
            self._unwatch(state)
        if self._due is not None:
            self._due.cancel()
            self._due = None

    async def watch(self, worker: str, watching: bool) -> None:
        """Begin or end to tell a worker."""
        state = self.scheduler.workers.get(worker)
        if state is None:
            return
        if watching:
            if not self.foresight.watched:
                self.scheduler.add_plugin(self, name=_NAME)
            self.foresight.watch(state)
            self._later()
        else:
            self._unwatch(state)

    async def can_make(self, key: Any) -> bool:
        """Whether a key is the result of a task, and so can be made again."""
        task = self.scheduler.tasks.get(key)
        return task is not None and task.run_spec is not None

    async def spare(self, worker: str, keys: Iterable[Any]) -> list[Any]:
        """Take back a worker's copies of keys that are needed elsewhere only, and are there; return those that may be there soon."""
        state = self.scheduler.workers.get(worker)
        taken: list[Any] = []
        soon: list[Any] = []
        for key in keys:
            task = self.scheduler.tasks.get(key)
            if state is None or task is None or state not in (task.who_has or ()) or not task.waiters:
                # It is gone, or about to be.
                continue
            users = {waiter.processing_on for waiter in task.waiters}
            if task.who_wants or None in users or state in users:
                # Somebody else may come for it.
                continue
            assert task.who_has is not None
            (taken if users <= task.who_has else soon).append(key)
        if taken:
            self.scheduler.request_remove_replicas(worker, taken, stimulus_id=f"gpurt-spare-{time.time()}")
            self.taken += len(taken)
        return soon

    def _unwatch(self, state: Any) -> None:
        self.foresight.unwatch(state)
        # It listens until then.
        self.scheduler.worker_send(state.address, {"op": TELL, "words": [], "last": True})
        if not self.foresight.watched and self.scheduler.plugins.get(_NAME) is self:
            self.scheduler.remove_plugin(_NAME)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Note what has changed."""
        task = self.scheduler.tasks.get(key)
        if task is not None:
            self.foresight.transition(task, finish)
            if self._due is None and self.foresight.pending:
                self._later()

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:  # noqa: ARG002
        """Forget a worker that left."""
        for state in self.foresight.watchers:
            if state.address == worker:
                self.foresight.unwatch(state)

    def _later(self) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(INTERVAL_S, self._tell)

    def _tell(self) -> None:
        self._due = None
        for address, words in self.foresight.words():
            for start in range(0, len(words), WORDS_MAX):
                part = words[start : start + WORDS_MAX]
                self.messages += 1
                self.words += len(part)
                self.scheduler.worker_send(address, {"op": TELL, "words": [tuple(word) for word in part]})
