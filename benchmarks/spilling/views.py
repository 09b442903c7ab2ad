"""What the horizon sees: a worker and a scheduler as they were at an event of a trace.

Theory of operation
-------------------
The horizon of a worker looks at the worker's state, and is told by the scheduler's plugin, which looks at the scheduler's.
Here are stand-ins for both with the attributes that are looked at, driven by the events in which a trace noted how the
real ones changed. What the scheduler tells arrives behind the tasks that it gave to the worker before, on the same stream.

Covers: :class:`ReplayedWorker`, :class:`ReplayedScheduler`; :class:`View`, which is both, with our horizon or with an oracle.
Does not cover: what is made of it, which is the product's own code.

No I/O, no clock.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.spilling.oracle import Oracle
from benchmarks.spilling.trace import Delete, Event, Graph, Key, Known, Priority, Put, Seen, Serve, Start, Trace
from dask_gpurt import seams
from dask_gpurt.memory.manager import WATCH_FRACTION, WorkerHorizon
from dask_gpurt.plugins.foresight import Foresight, Word

__all__ = ["ReplayedScheduler", "ReplayedWorker", "View"]

#: Events until the scheduler answers an offer: those of some tasks.
OFFER_EVENTS = 20

#: States of a task that was given to the worker to be run.
_TO_RUN = ("waiting", "queued", "no-worker", "processing")
_GIVEN = ("waiting", "ready", "constrained", "executing", "long-running")


@dataclass(slots=True, eq=False)
class _Task:
    """Stands for the worker's state of a task."""

    key: Key
    state: str = "released"
    priority: Priority | None = None
    #: None: a peer's, of which the result was fetched.
    run_spec: object = None
    #: Which time it is given to a worker, of all tasks.
    run_id: int = 0
    dependencies: list[_Task] = field(default_factory=list)
    dependents: list[_Task] = field(default_factory=list)


class _Ready:
    """Stands for the worker's queue."""

    def __init__(self) -> None:
        self.tasks: set[_Task] = set()

    def __iter__(self) -> Iterator[_Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def peek(self) -> _Task:
        return min(self.tasks, key=_priority)


def _priority(task: _Task) -> Priority:
    return task.priority or ()


class _State:
    def __init__(self, nworkers: int) -> None:
        self.nthreads = 1
        self.running = True
        self.tasks: dict[Key, _Task] = {}
        self.actors: dict[Key, object] = {}
        self.ready = _Ready()
        self.waiting: set[_Task] = set()
        self.executing: set[_Task] = set()
        self.has_what = range(nworkers - 1)


class ReplayedWorker:
    """What the horizon sees of a worker, as it was at an event of the trace."""

    def __init__(self, nworkers: int, address: str = "") -> None:
        self.state = _State(nworkers)
        self.address = address
        self._runs = itertools.count(1)

    def see(self, event: Seen) -> None:
        """Change the view of a task."""
        state = self.state
        task = self._task(event.key)
        if event.state in _GIVEN:
            task.run_spec = event.state
            if task.state not in _GIVEN:
                task.run_id = next(self._runs)
        task.state = event.state
        task.priority = event.priority
        if event.inputs is not None:
            self._set_inputs(task, event.inputs)
        state.ready.tasks.discard(task)
        state.waiting.discard(task)
        state.executing.discard(task)
        if event.state == "ready":
            state.ready.tasks.add(task)
        elif event.state == "waiting":
            state.waiting.add(task)
        elif event.state == "executing":
            state.executing.add(task)
        elif event.state == "forgotten":
            self._set_inputs(task, ())
            for dependent in task.dependents:
                dependent.dependencies.remove(task)
            del state.tasks[event.key]

    def _task(self, key: Key) -> _Task:
        task = self.state.tasks.get(key)
        if task is None:
            task = self.state.tasks[key] = _Task(key)
        return task

    def _set_inputs(self, task: _Task, inputs: Sequence[Key]) -> None:
        for dependency in task.dependencies:
            dependency.dependents.remove(task)
        task.dependencies = [self._task(key) for key in inputs]
        for dependency in task.dependencies:
            dependency.dependents.append(task)


@dataclass(slots=True, eq=False)
class _KnownTask:
    """Stands for the scheduler's state of a task."""

    key: Key
    state: str = "released"
    priority: Priority | None = None
    dependencies: set[_KnownTask] = field(default_factory=set)
    dependents: set[_KnownTask] = field(default_factory=set)
    who_has: set[_Holder] = field(default_factory=set)
    who_wants: set[str] = field(default_factory=set)
    processing_on: _Holder | None = None
    #: Scattered data has none; the jobs scatter nothing.
    run_spec: object = "made"

    @property
    def waiting_on(self) -> list[_KnownTask]:
        """Dependencies that have yet to run."""
        return [task for task in self.dependencies if task.state in _TO_RUN]

    @property
    def waiters(self) -> list[_KnownTask]:
        """Dependents that have yet to run."""
        return [task for task in self.dependents if task.state in _TO_RUN]


class _Holder:
    """Stands for the scheduler's state of a worker."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.has_what: set[_KnownTask] = set()


class ReplayedScheduler:
    """Tells a worker's horizon what the scheduler would have told, from when on it watches.

    Parameters
    ----------
    horizon
        Is told.
    address
        The worker's address.
    """

    def __init__(self, horizon: WorkerHorizon, address: str = "") -> None:
        self._horizon = horizon
        self._foresight = Foresight()
        self._tasks: dict[Hashable, _KnownTask] = {}
        #: Tasks that were given to the worker, which has not seen them yet.
        self._sent: set[Hashable] = set()
        #: What was told behind such tasks.
        self._on_its_way: deque[tuple[set[Hashable], list[Word]]] = deque()
        self._address = address
        self._workers = {address: _Holder(address)}

    def update_graph(self, event: Graph) -> None:
        """Take new tasks."""
        for key, priority, inputs in event.tasks:
            task = self._tasks.setdefault(key, _KnownTask(key))
            task.priority = priority
            for name in inputs:
                dependency = self._tasks.setdefault(name, _KnownTask(name))
                task.dependencies.add(dependency)
                dependency.dependents.add(task)
        for key in event.wanted:
            self._tasks.setdefault(key, _KnownTask(key)).who_wants.add("client")

    def transition(self, event: Known) -> None:
        """Change the view of a task."""
        task = self._tasks.get(event.key)
        if task is None:
            return
        task.state = event.state
        task.processing_on = None
        self._arrive(event.key)
        if event.worker is not None and event.state == "processing":
            task.processing_on = self._worker(event.worker)
            if event.worker == self._address:
                self._sent.add(event.key)
        elif event.worker is not None and event.state == "memory":
            self.add_replica(event.key, event.worker)
        if event.state in ("released", "forgotten"):
            task.who_wants.clear()
            for worker in task.who_has:
                worker.has_what.discard(task)
            task.who_has.clear()
        if self._foresight.watched:
            self._foresight.transition(task, event.state)
        if event.state == "forgotten":
            for dependency in task.dependencies:
                dependency.dependents.discard(task)
            del self._tasks[event.key]

    def add_replica(self, key: Hashable, address: str | None = None) -> None:
        """Note that a worker holds a key; None: the one that is told."""
        task = self._tasks.get(key)
        if task is not None:
            worker = self._worker(self._address if address is None else address)
            task.who_has.add(worker)
            worker.has_what.add(task)

    def remove_replica(self, key: Hashable) -> None:
        """Note that the worker does not hold a key any more."""
        task = self._tasks.get(key)
        if task is not None:
            worker = self._worker(self._address)
            task.who_has.discard(worker)
            worker.has_what.discard(task)

    def _worker(self, address: str) -> _Holder:
        return self._workers.setdefault(address, _Holder(address))

    def taken_back(self, keys: Iterable[Key]) -> Iterator[Key]:
        """Yield those of ``keys`` that the worker offers and is told to forget."""
        for key in keys:
            task = self._tasks.get(key)
            if task is None or task.who_wants or not task.waiters:
                continue
            users = {waiter.processing_on for waiter in task.waiters}
            holders = task.who_has - {self._worker(self._address)}
            if users <= holders:
                self.remove_replica(key)
                yield key

    def watch(self) -> None:
        """Begin to tell."""
        if not self._foresight.watched:
            self._foresight.watch(self._worker(self._address))

    def see(self, event: Seen) -> None:
        """Note what the worker has heard of."""
        if event.state in _GIVEN:
            self._arrive(event.key)

    def _arrive(self, key: Hashable) -> None:
        self._sent.discard(key)
        for before, _ in self._on_its_way:
            before.discard(key)

    def tell(self) -> None:
        """Say what has changed, and let what was said arrive."""
        if self._foresight.pending:
            for _, words in self._foresight.words():
                self._on_its_way.append((set(self._sent), words))
        while self._on_its_way and not self._on_its_way[0][0]:
            self._horizon.tell(self._on_its_way.popleft()[1])


class View:
    """Both, for a trace.

    Parameters
    ----------
    trace
        What is replayed.
    horizon
        In the place of the one that workers have.
    """

    def __init__(self, trace: Trace, horizon: Oracle | None = None) -> None:
        self._worker = ReplayedWorker(trace.nworkers, trace.address)
        known = self._known = WorkerHorizon(self._worker)
        self._scheduler = ReplayedScheduler(known, trace.address)
        self._oracle = horizon
        self.horizon = horizon or known
        #: Keys that are offered to the scheduler, and the event by which it answers; all that were.
        self._offers: deque[tuple[int, list[Key]]] = deque()
        self._offered: set[Key] = set()

    def see(self, number: int, event: Event) -> None:
        """Change what is seen as the event with this number does, before the store hears of it."""
        if self._oracle is not None:
            self._oracle.starting = self._about_to_be_read
            # What an event reads is in use until it is over; what comes after it has come.
            self._oracle.now = number if isinstance(event, Start | Serve) else number + 1
        if not isinstance(event, Graph | Known):
            self._scheduler.tell()
        match event:
            case Seen():
                self._worker.see(event)
                self._scheduler.see(event)
            case Graph():
                self._scheduler.update_graph(event)
            case Known():
                self._scheduler.transition(event)
            case Put(key):
                self._scheduler.add_replica(key)
            case Delete(key):
                self._scheduler.remove_replica(key)
                self._known.drop(key)
            case Serve(keys, str(who)):
                for key in keys:
                    self._scheduler.add_replica(key, who)
            case _:
                pass

    def served(self, event: Serve) -> None:
        """Take note that this was read."""
        if event.who is not None:
            self._known.serve(event.keys, event.who)

    def _about_to_be_read(self) -> set[Key]:
        tasks = self._worker.state.tasks
        return {each.key for key in self._known.starting() for each in tasks[key].dependencies}

    def leave(self, key: Key) -> None:
        """Take note that a task is over."""
        self._known.leave(key)

    def fill(self, part: float) -> None:
        """Take note that so much of the capacity is used."""
        if part > WATCH_FRACTION:
            self._scheduler.watch()

    def taken_back(self, number: int) -> list[Key]:
        """Return the keys whose copies the scheduler takes back by the event with this number."""
        if self._oracle is not None:
            return []
        due: list[Key] = []
        while self._offers and self._offers[0][0] <= number:
            due += self._scheduler.taken_back(self._offers.popleft()[1])
        if self._known.has_served and (keys := [key for key in self._known.spare() if key not in self._offered]):
            self._offered.update(keys)
            self._offers.append((number + OFFER_EVENTS, keys))
        for key in due:
            self._known.drop(key)
        return due

    def next_inputs(self) -> list[Key]:
        """Return what the task takes that the worker will start next."""
        task = seams.next_task(self._worker)
        return [] if task is None else [dependency.key for dependency in task.dependencies]
