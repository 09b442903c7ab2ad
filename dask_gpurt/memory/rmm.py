"""Lets allocations of RMM that fail be tried again after data has been moved off the device.

Theory of operation
-------------------
Over the resource that is current (a pool, an asynchronous one, a managed or a limiting one, with whatever stands over it)
goes an adaptor that calls :meth:`Rescuer.rescue` when it is out of memory, and over that one which counts. The callback
comes in any thread, at any moment. It must never hang, so nobody is waited for without a bound:

- A thread that runs a task asks the event loop, which knows what is needed next, and waits. Threads that fail meanwhile
  are served together. When the loop, or the thread that copies, makes no progress for :data:`PATIENCE_S`, it is taken to
  wait for the very thread that waits for it (which may hold a lock of the task's library, or of a pool that stands over
  this adaptor); that thread then moves data by itself, as far as it can, and gives up if it cannot.
- The event loop's own thread, and those that copy for the tiers, move data by themselves from the start.
- A thread that is inside the books, or in a callback already, is refused: what it was about to do is tried again later.

Refused is an allocation by a MemoryError with the whole story. It becomes RMM's own ``out_of_memory`` on its way through
C++, and a MemoryError again in the task. Nothing is lost by it, the task fails, and the worker goes on.

What allocates without RMM (CuPy's and Numba's own pools) calls nobody back; only the limit of DEVICE protects it.

Covers: :class:`Rescuer`, and :class:`RmmResource`, which installs it.
Does not cover: how much is moved, when to give up (:mod:`dask_gpurt.memory.rescue`); moving
(:mod:`dask_gpurt.memory.mover`).
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.rescue import Failure, Figures, Rescue, story

__all__ = ["Rescuer", "Resource", "RmmResource"]

logger = logging.getLogger(__name__)

#: Seconds without progress after which a thread does not wait for others any longer. Copying the largest of blocks takes
#: less.
PATIENCE_S = 2.0

#: Adaptors that were taken away. Buffers that were allocated through them may live on, and C++ calls back by a bare pointer.
_retired: list[object] = []


class Resource(Protocol):
    """An allocator that calls back when it is out of memory."""

    #: Bytes of the device.
    total_nbytes: int

    def allocations(self) -> int:
        """How many allocations have succeeded so far."""

    def figures(self) -> Figures:
        """What is known about its memory now."""


class Rescuer:
    """Moves data away for allocations that have failed.

    Parameters
    ----------
    mover
        Holds the data on the device.
    loop
        The event loop that it belongs to; this is called in its thread.
    who
        Says what runs in the calling thread.
    others
        Movers below, which the calling thread must not be inside of either.
    patience_s
        See :data:`PATIENCE_S`.
    """

    def __init__(
        self,
        mover: Mover,
        loop: asyncio.AbstractEventLoop,
        who: Callable[[], str],
        *,
        others: Sequence[Mover] = (),
        patience_s: float = PATIENCE_S,
    ) -> None:
        #: What calls back.
        self.resource: Resource | None = None
        #: Ever-increasing totals: allocations that failed, and those of them that were refused.
        self.failures = 0
        self.refusals = 0
        self._mover = mover
        self._movers = (mover, *others)
        self._loop = loop
        self._loop_thread = threading.get_ident()
        self._who = who
        self._patience_s = patience_s
        self._rescue: Rescue[Future[None]] = Rescue(mover.ledger.limit(mover.tier) or 0)
        self._inside: set[int] = set()
        self._rounds: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Rescuer of {self._mover!r}: {self.failures} failures, {self.refusals} refused>"

    def close(self) -> None:
        """Refuse everything from now on; on the loop."""
        self._closed = True
        if self._rounds is not None:
            self._rounds.cancel()

    def rescue(self, asked_nbytes: int) -> bool:
        """Make room for ``asked_nbytes``; say whether to try again. May be called by any thread, and returns in bounded time.

        Raises
        ------
        MemoryError
            If there is no room to be made.
        """
        thread = threading.get_ident()
        resource = self.resource
        if self._closed or resource is None or thread in self._inside:
            return False
        self.failures += 1
        self._inside.add(thread)
        try:
            failure = self._rescue.failed(thread, asked_nbytes, resource.allocations(), self._mover.freed_nbytes)
            if not self._rescue.hopeless(failure, resource.total_nbytes):
                self._make_room(thread, failure)
                if self._rescue.verdict(thread, failure, self._mover.freed_nbytes):
                    return True
            self._rescue.give_up(thread)
            raise self._refusal(failure, resource)
        finally:
            self._inside.discard(thread)

    def _refusal(self, failure: Failure, resource: Resource) -> MemoryError:
        self.refusals += 1
        ledger, tier = self._mover.ledger, self._mover.tier
        text = story(
            self._who(),
            failure,
            resource.figures(),
            held_nbytes=ledger.held(tier),
            limit_nbytes=ledger.limit(tier),
        )
        logger.warning("%s", text)
        return MemoryError(text)

    def _make_room(self, thread: int, failure: Failure) -> None:
        if any(mover.entered for mover in self._movers):
            return
        if thread != self._loop_thread and not any(mover.at_work_here for mover in self._movers):
            self._ask_loop(failure)
            if self._mover.freed_nbytes > failure.freed_nbytes:
                return
        self._mover.relieve(failure.wish_nbytes)

    def _ask_loop(self, failure: Failure) -> None:
        answer: Future[None] = Future()
        try:
            self._loop.call_soon_threadsafe(self._wish, failure.wish_nbytes, answer)
        except RuntimeError:
            return  # the loop is closed
        progress = None
        while progress != (progress := (self._mover.freed_nbytes, self._mover.written_nbytes)):
            try:
                answer.result(self._patience_s)
            except TimeoutError:
                continue
            return

    def _wish(self, nbytes: int, answer: Future[None]) -> None:
        if self._closed:
            answer.set_result(None)
        elif self._rescue.wish(nbytes, answer):
            self._rounds = self._loop.create_task(self._serve(), name="gpurt-rescue")

    async def _serve(self) -> None:
        while (found := self._rescue.round()) is not None:
            nbytes, answers = found
            try:
                await self._mover.make_room(nbytes)
            finally:
                for answer in answers:
                    answer.set_result(None)


class RmmResource:
    """RMM's current resource with a callback over it.

    Parameters
    ----------
    callback
        Is given the bytes of an allocation that failed; says whether to try again, or raises MemoryError.

    Raises
    ------
    RuntimeError
        If there is no device that can be used.
    """

    def __init__(self, callback: Callable[[int], bool]) -> None:
        self._mr: Any = importlib.import_module("rmm.mr")
        self._former = self._mr.get_current_device_resource()
        # What counts stands on top: rmm.statistics looks for it there.
        adaptor = self._mr.FailureCallbackResourceAdaptor(self._former, callback)
        self._ours = self._mr.StatisticsResourceAdaptor(adaptor)
        self.total_nbytes = int(self._mr.available_device_memory()[1])
        self._mr.set_current_device_resource(self._ours)

    def __repr__(self) -> str:
        return f"<RmmResource over {type(self._former).__name__}>"

    @staticmethod
    def in_use() -> bool:
        """Whether anything in this process has imported RMM."""
        # The attribute is there when the module is complete; another thread may be about to import it.
        return hasattr(sys.modules.get("rmm"), "mr")

    @property
    def installed(self) -> bool:
        """Whether what is current is ours, or stands over it."""
        current = self._mr.get_current_device_resource()
        while current is not None:
            if current is self._ours:
                return True
            current = getattr(current, "upstream_mr", None)
        return False

    def uninstall(self) -> None:
        """Put the former resource back, if ours is still the current one."""
        if self._mr.get_current_device_resource() is self._ours:
            self._mr.set_current_device_resource(self._former)
        _retired.append(self._ours)

    def allocations(self) -> int:
        """How many allocations have succeeded."""
        return int(self._ours.allocation_counts.total_count)

    def figures(self) -> Figures:
        """What is allocated and free."""
        free_nbytes = int(self._mr.available_device_memory()[0])
        return Figures(int(self._ours.allocation_counts.current_bytes), free_nbytes, self.total_nbytes)
