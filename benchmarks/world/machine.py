"""The machines of the simulated world: time that jumps, hosts that stop and die, threads of which one runs at a time.

Theory of operation
-------------------
*Time.* :class:`VirtualLoop` is asyncio's own event loop on a selector that waits for nothing: where asyncio would sleep until the next
timer, the clock jumps there. :func:`take_time` puts that clock into the module ``time``, before anything that asks it is imported.

*Hosts.* A process of a cluster is a :class:`Host`: what runs for it, callback, task or thread, carries it in a context variable,
which asyncio hands on. What belongs to a host that was *killed* is never run again, without any ``finally``, as by SIGKILL; what
belongs to one that is *stopped* waits until it goes on, as by SIGSTOP.

*Threads.* Tasks of Dask, and files, are done by threads, which wait for the loop and for each other. They are real threads, but have a
baton: one goes on until it waits for a condition (futures, events, queues and semaphores all do), then the loop goes on, until
what the thread waits for is there; how long the thread takes to notice is drawn from the seed, and more for a slow host. So
there is one order of things, that of the seed.

Covers: :class:`VirtualLoop`, :class:`Host`, :func:`take_time`, :func:`take_threads`.
Does not cover: what goes from host to host (:mod:`benchmarks.world.network`), files (:mod:`benchmarks.world.disk`). Threads are not
interrupted between two waits: races of single instructions are not found here.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import queue
import random
import selectors
import threading
import time
import types
import uuid
from _thread import allocate_lock
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

__all__ = ["HOST", "Host", "PoolPerHost", "StuckError", "VirtualLoop", "take_chance", "take_threads", "take_time"]

#: The host for which something is done.
HOST: contextvars.ContextVar[Host | None] = contextvars.ContextVar("host", default=None)

#: What the clocks of the world show at its beginning: seconds of the epoch.
EPOCH_S = 1_700_000_000.0

#: A thread that can go on does so after so many seconds, in the mean.
LAG_S = 0.001

#: Whoever looks at a clock takes so long.
READING_S = 1e-6

#: Turns of the loop in which the clock does not go on. More are an endless loop.
TURNS_MAX = 100_000

real_time = time.perf_counter


class StuckError(Exception):
    """Nothing will ever happen again, or nothing but the same."""


class Host:
    """A process of the cluster.

    Parameters
    ----------
    name
        How it is called in addresses.
    random
        Draws how long its threads take.
    """

    def __init__(self, name: str, random: random.Random) -> None:
        self.name = name
        self.random = random
        self.alive = True
        #: While it is stopped, what it would have done since.
        self.stopped: list[tuple[_Guarded, tuple[Any, ...]]] | None = None
        #: How many times as long its threads take.
        self.slowness = 1.0
        #: Threads that a process has one pool of, by the name of the pool.
        self.pools: dict[str, ThreadPoolExecutor] = {}

    def __repr__(self) -> str:
        return f"<Host {self.name}{'' if self.alive else ' dead'}{'' if self.stopped is None else ' stopped'}>"

    def kill(self) -> None:
        """Let nothing more of it happen."""
        self.alive = False

    def stop(self) -> None:
        """Let nothing of it happen until it goes on."""
        if self.stopped is None:
            self.stopped = []

    def go_on(self) -> None:
        """Do all that was to be done meanwhile."""
        waiting, self.stopped = self.stopped or [], None
        loop = asyncio.get_running_loop()
        for guarded, args in waiting:
            handle: Any = guarded.handle
            if not handle.cancelled():
                # In the very same context: who has set something there takes it back there.
                loop.call_soon(guarded, *args, context=handle._context)

    def pool(self, name: str, threads: int) -> ThreadPoolExecutor:
        """Return the pool of that name."""
        if name not in self.pools:
            self.pools[name] = ThreadPoolExecutor(threads, f"{self.name}-{name}")
        return self.pools[name]

    def lag_s(self) -> float:
        """Draw how long one of its threads takes to go on."""
        return self.random.expovariate(1 / LAG_S) * self.slowness


class PoolPerHost(Executor):
    """Stands for a pool of threads that a process has one of, where several processes are simulated in one."""

    def __init__(self, name: str, threads: int) -> None:
        self._name = name
        self._threads = threads

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run it by the threads of the host that asks for it."""
        host = HOST.get()
        assert host is not None
        return host.pool(self._name, self._threads).submit(fn, *args, **kwargs)


class _Guarded:
    """A callback of a host."""

    __slots__ = ("callback", "handle", "host")

    def __init__(self, host: Host, callback: Callable[..., Any]) -> None:
        self.host = host
        self.callback = callback
        self.handle: asyncio.Handle | None = None

    def __call__(self, *args: Any) -> None:
        if not self.host.alive:
            return
        if self.host.stopped is not None:
            self.host.stopped.append((self, args))
            return
        self.callback(*args)


class _Nothing(selectors.BaseSelector):
    """A selector of files that are never ready; it lets the clock jump instead of waiting."""

    def __init__(self) -> None:
        self.loop: Any = None
        self._keys: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = self._keys[fileobj] = selectors.SelectorKey(fileobj, 0, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys.pop(fileobj)

    def get_map(self) -> Any:
        return self._keys

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.loop.turn(timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop in a world of its own.

    Attributes
    ----------
    now
        Seconds since the beginning.
    threads
        The threads that wait.
    stepped
        Called whenever all that was to be done at one time is done, before the clock goes on.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.threads = _Threads(self)
        self.stepped: Callable[[], None] | None = None
        self._turns = 0
        selector = _Nothing()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now

    def read(self) -> float:
        """Return what the clocks show, a little later each time: nothing takes no time at all."""
        self.now += READING_S
        return self.now

    def turn(self, timeout: float | None) -> None:
        """Let the time until the next timer pass; None: there is none."""
        self._turns += 1
        if self._turns > TURNS_MAX:
            raise StuckError(f"{TURNS_MAX} turns of the loop at {self.now}")
        if self.threads.look() or timeout == 0:
            return
        if self.stepped is not None:
            self.stepped()
        if timeout is None:
            raise StuckError("nothing will happen any more")
        self._turns = 0
        self.now += timeout

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        return super().run_in_executor(executor or _DEFAULT_POOL, func, *args)

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        guarded = _guard(callback, context)
        handle = super().call_soon(guarded, *args, context=context)
        if isinstance(guarded, _Guarded):
            guarded.handle = handle
        return handle

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        return self.call_soon(callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        guarded = _guard(callback, context)
        handle = super().call_at(when, guarded, *args, context=context)
        if guarded is not callback:
            guarded.handle = handle
        return handle


_DEFAULT_POOL = PoolPerHost("default", 8)


def _guard(callback: Any, context: contextvars.Context | None) -> Any:
    if isinstance(callback, _Guarded):
        return callback
    host = HOST.get() if context is None else context.get(HOST)
    return callback if host is None else _Guarded(host, callback)


def take_time(now: Callable[[], float], shown: Callable[[], float]) -> None:
    """Let the module ``time`` show another clock. What has taken its functions before goes on with the real one.

    Whoever reads it asks ``now``; logs, which may be on or off, ask ``shown``.
    """
    for_logs: Any = types.ModuleType("time")
    vars(for_logs).update(vars(time))
    for_logs.time = lambda: EPOCH_S + shown()
    patched: Any = logging
    patched.time = for_logs
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        begin = EPOCH_S if name == "time" else 1000.0
        setattr(time, name, lambda begin=begin: begin + now())
        setattr(time, f"{name}_ns", lambda begin=begin: int((begin + now()) * 1e9))


def take_chance(drawn: random.Random) -> None:
    """Let all that is drawn in this process, names and keys too, come from ``drawn``, and its number be always the same."""
    patched_uuid: Any = uuid
    patched_os: Any = os
    patched_uuid.uuid1 = patched_uuid.uuid4 = lambda *_, **__: uuid.UUID(int=drawn.getrandbits(128), version=4)
    patched_os.urandom = drawn.randbytes
    patched_os.getpid = lambda: 1


class _Thread:
    """What the world knows of a thread."""

    __slots__ = ("ended", "go", "host", "noticed", "signal", "thread", "timer")

    def __init__(self, thread: threading.Thread, host: Host | None) -> None:
        self.thread = thread
        self.host = host
        self.go = allocate_lock()
        self.go.acquire()
        #: What it waits for: it is free when that is there. None: just for its turn.
        self.signal: Any = None
        self.noticed = False
        self.timer: asyncio.TimerHandle | None = None
        self.ended = False


class _Threads:
    """Hands the baton to one thread at a time. The loop, whose thread this is, has it in between."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._back = allocate_lock()
        self._back.acquire()
        self._waiting: list[_Thread] = []
        #: Whether somebody may have what it waits for.
        self.notified = False
        self._here = threading.local()

    @property
    def current(self) -> _Thread | None:
        """The thread that calls; None: it is none of the world's."""
        return getattr(self._here, "thread", None)

    def begin(self, known: _Thread) -> None:
        """Let a thread, which has been started, run."""
        self._schedule(known, 0.0)

    def run(self, known: _Thread, run: Callable[[], None]) -> None:
        """Run a thread from its first turn to its end."""
        known.go.acquire()
        self._here.thread = known
        HOST.set(known.host)
        try:
            run()
        finally:
            known.ended = True
            self._back.release()

    def wait(self, signal: Any, timeout: float | None) -> bool:
        """Give the baton away until ``signal`` can be acquired, or for so long; whether it was."""
        known = self.current
        assert known is not None
        if signal is not None and signal.acquire(False):
            return True
        known.signal = signal
        known.noticed = False
        known.timer = None if timeout is None else self._loop.call_later(timeout, self._expire, known)
        self._waiting.append(known)
        self._back.release()
        known.go.acquire()
        return known.noticed

    def _expire(self, known: _Thread) -> None:
        if known in self._waiting:
            self._waiting.remove(known)
            self._schedule(known, 0.0)

    def look(self) -> bool:
        """Let those go on that have what they wait for; whether there are any."""
        if not self.notified:
            return False
        self.notified = False
        found = [known for known in self._waiting if known.signal is not None and known.signal.acquire(False)]
        for known in found:
            self._waiting.remove(known)
            known.noticed = True
            if known.timer is not None:
                known.timer.cancel()
            self._schedule(known, 0.0 if known.host is None else known.host.lag_s())
        return bool(found)

    def _schedule(self, known: _Thread, delay_s: float) -> None:
        context = contextvars.Context()
        context.run(HOST.set, known.host)
        self._loop.call_later(delay_s, self._resume, known, context=context)

    def _resume(self, known: _Thread) -> None:
        known.go.release()
        self._back.acquire()

    def pump(self, signal: Any) -> None:
        """Let threads go on until ``signal`` can be acquired, while the loop itself is held up."""
        while not signal.acquire(False):
            ready = [known for known in self._waiting if known.signal is not None and known.signal.acquire(False)]
            if not ready:
                raise StuckError("the event loop waits for a thread that waits")
            for known in ready:
                self._waiting.remove(known)
                known.noticed = True
                self._resume(known)


def take_threads() -> Callable[[VirtualLoop | None], None]:
    """Have all threads that are started from now on run by turns; returns what is told the loop of their world."""
    loop: VirtualLoop | None = None
    start, run, join = threading.Thread.start, threading.Thread.run, threading.Thread.join
    wait, notify, sleep = threading.Condition.wait, threading.Condition.notify, time.sleep
    starting = threading.local()

    def started(self: Any) -> None:
        if loop is None:
            start(self)
            return
        self.of_world = _Thread(self, HOST.get())
        starting.it = True
        try:
            start(self)
        finally:
            starting.it = False
        loop.threads.begin(self.of_world)

    def ran(self: Any) -> None:
        known = getattr(self, "of_world", None)
        if known is None or loop is None:
            run(self)
        else:
            loop.threads.run(known, lambda: run(self))

    def joined(self: Any, timeout: float | None = None) -> None:
        known = getattr(self, "of_world", None)
        if loop is None or known is None:
            join(self, timeout)
            return
        waited_s = 0.0
        while not known.ended and (timeout is None or waited_s < timeout):
            if loop.threads.current is None:
                raise StuckError(f"the event loop waits for {self}")
            loop.threads.wait(None, 0.01)
            waited_s += 0.01

    def waited(self: Any, timeout: float | None = None) -> bool:
        if loop is None or getattr(starting, "it", False):
            return wait(self, timeout)
        signal = allocate_lock()
        signal.acquire()
        self._waiters.append(signal)
        state = self._release_save()
        noticed = False
        try:
            if loop.threads.current is None:
                if timeout is None or timeout > 0:
                    loop.threads.pump(signal)
                    noticed = True
            else:
                noticed = loop.threads.wait(signal, timeout)
            return noticed
        finally:
            self._acquire_restore(state)
            if not noticed and signal in self._waiters:
                self._waiters.remove(signal)

    def told(self: Any, n: int = 1) -> None:
        notify(self, n)
        if loop is not None:
            loop.threads.notified = True

    def slept(seconds: float) -> None:
        if loop is None:
            sleep(seconds)
        elif loop.threads.current is None:
            raise StuckError("the event loop sleeps")
        else:
            loop.threads.wait(None, seconds)

    def tell(world: VirtualLoop | None) -> None:
        nonlocal loop
        loop = world

    patches: Any = threading
    patches.Thread.start, patches.Thread.run, patches.Thread.join = started, ran, joined
    patches.Condition.wait, patches.Condition.notify = waited, told
    patched_time: Any = time
    patched_time.sleep = slept
    patched_queue: Any = queue
    patched_queue.SimpleQueue = queue._PySimpleQueue  # type: ignore[attr-defined]  # the other waits without a condition
    return tell
