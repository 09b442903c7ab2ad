"""What the scheduler knows of the next uses of what workers hold.

Theory of operation
-------------------
A worker knows the tasks that were given to it. Those that will need its data later, and have no worker yet, only the
scheduler knows. So a worker that gets short of memory *watches*: it is told, for each key that it holds,

- the priority of the first task in Dask's order that needs the key and has no worker yet, if there is one, and how long the chain of tasks
  is, about, that this one waits for;
- whether a client wants the key;
- which tasks still need it, and what workers they were given to, if all have one and no client wants the key. Those that
  run here end here, and those that run elsewhere fetch it from here: so a worker can tell by itself when the key is
  *dying*, or needed by nobody that has not fetched it, and need not wait to be told so.

A task that has got another worker is not ahead any more: that worker fetches the key right away, and is served from the tier
where it lies. (By rank alone such a task would look overdue here, and the key as if it was needed in a moment.) One that
has got this worker is known there; the worker is told of its inputs when it gets it, before it has fetched them.

:class:`Foresight` is told which tasks changed, and collects for whom that matters, until the caller asks for the *words* to
be sent; a worker that was told the same before is told nothing. With nobody watching nothing is done at all. The
dependents of a key are put in order once, and looked at from the first on that was not over yet: a key with a
thousand dependents costs no more, for each of them, than one with a single one.

Covers: who is told what.
Does not cover: when, and how it gets there, see :mod:`dask_gpurt.plugins.horizon`; what a worker makes of it, see
:mod:`dask_gpurt.memory.horizon`.

Pure: no I/O, no clock, no dask. Tasks and workers have the attributes of the scheduler's ``TaskState`` and ``WorkerState``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple, Protocol

__all__ = ["Foresight", "Holder", "Task", "Word"]

#: States of a task that will run, and has no worker yet.
AHEAD = frozenset(("waiting", "queued", "no-worker"))
#: Links of a chain that are followed, lengths of chains that are told apart, and the chains that are looked at anew each time.
LINKS_MAX = 24
LENGTHS = (3, 6, 12, 24)
CHAINS_MAX = 4
#: Tasks that are named to a worker as the last ones that need a key. Where there are more, it is told when fewer are left.
USERS_MAX = 8


class Task(Protocol):
    """What is read of a task."""

    @property
    def key(self) -> Any:
        """Its name."""

    @property
    def state(self) -> str:
        """Its state."""

    @property
    def priority(self) -> Any:
        """Its place in Dask's order."""

    @property
    def dependents(self) -> Collection[Any]:
        """Tasks that take its result."""

    @property
    def dependencies(self) -> Collection[Any]:
        """Tasks whose results it takes."""

    @property
    def who_has(self) -> Collection[Any] | None:
        """Workers that hold its result."""

    @property
    def who_wants(self) -> Collection[Any] | None:
        """Clients that hold it."""

    @property
    def waiters(self) -> Collection[Any] | None:
        """Dependents that have yet to run."""

    @property
    def processing_on(self) -> Any:
        """The worker that it was given to; None: none."""

    @property
    def waiting_on(self) -> Collection[Any] | None:
        """Dependencies that have yet to run."""

    @property
    def run_spec(self) -> Any:
        """How it is made; None: it was scattered, and cannot be made again."""


class Holder(Protocol):
    """What is read of a worker."""

    @property
    def address(self) -> str:
        """Its address."""

    @property
    def has_what(self) -> Collection[Any]:
        """Tasks whose results it holds."""


class Word(NamedTuple):
    """What a worker is told about a key that it holds."""

    key: Any
    #: Of the first task that needs it and has no worker yet; None: there is none.
    priority: Any
    #: Whether a client holds it.
    wanted: bool
    #: The tasks that still need it, and the address that each was given to; None: others may come.
    users: tuple[tuple[Any, str], ...] | None = None
    #: How long the chain of tasks is that the first one waits for, about.
    behind: int = 0


class Foresight:
    """Collects what the watching workers have to be told."""

    def __init__(self) -> None:
        #: A watching worker to the tasks about which it may have to be told anew.
        self._changed: dict[Holder, set[Task]] = {}
        #: A task to what each watching worker was told last about it.
        self._told: dict[Task, dict[Holder, Word]] = {}
        #: A task to those of its dependents that may be ahead, the first one last.
        self._ahead: dict[Task, list[Task]] = {}
        #: Tasks of which somebody was told that a chain has to run first: it becomes shorter, of which nobody hears.
        self._chained: dict[Task, None] = {}

    def __repr__(self) -> str:
        return f"<Foresight: {len(self._changed)} watching, {sum(map(len, self._changed.values()))} changes>"

    @property
    def watched(self) -> bool:
        """Whether anybody watches."""
        return bool(self._changed)

    @property
    def watchers(self) -> list[Holder]:
        """Who watches."""
        return list(self._changed)

    @property
    def pending(self) -> bool:
        """Whether anybody may have to be told something."""
        return any(self._changed.values())

    def watch(self, worker: Holder) -> None:
        """Begin to tell ``worker``; from the beginning, if it watches already."""
        self.unwatch(worker)
        self._changed[worker] = set(worker.has_what)

    def unwatch(self, worker: Holder) -> None:
        """Tell ``worker`` nothing any more."""
        if self._changed.pop(worker, None) is None:
            return
        for told in self._told.values():
            told.pop(worker, None)
        if not self._changed:
            self._told.clear()
            self._ahead.clear()
            self._chained.clear()

    def transition(self, task: Task, finish: str) -> None:
        """Note that ``task`` has come to the state ``finish``."""
        if finish in AHEAD:
            # It is ahead (again): the places of those that are over are no longer the first ones.
            for dependency in task.dependencies:
                self._ahead.pop(dependency, None)
                self._mark(dependency)
            return
        for dependency in task.dependencies:
            self._mark(dependency)
            if finish == "processing" and task.processing_on in self._changed:
                self._changed[task.processing_on].add(dependency)
                if task.processing_on not in (dependency.who_has or ()):
                    # It is about to fetch it. If it had it before, it has forgotten what it was told then.
                    self._told.get(dependency, {}).pop(task.processing_on, None)
        if finish == "memory":
            self._mark(task)
        elif finish in ("released", "forgotten"):
            # Whoever holds it is told to forget it. Among what has changed it is passed over: nobody has it.
            self._ahead.pop(task, None)
            self._told.pop(task, None)
            self._chained.pop(task, None)

    def _mark(self, task: Task) -> None:
        for worker in task.who_has or ():
            changed = self._changed.get(worker)
            if changed is not None:
                changed.add(task)

    def words(self) -> Iterator[tuple[str, list[Word]]]:
        """Yield the address of each worker that has to be told something, and what; it counts as told."""
        for task in list(itertools.islice(self._chained, CHAINS_MAX)):
            del self._chained[task]
            self._mark(task)
        for worker, changed in self._changed.items():
            words = []
            for task in changed:
                if not task.who_has:
                    self._told.pop(task, None)
                    continue
                told = self._told.setdefault(task, {})
                first = self._first(task)
                priority, behind = (None, 0) if first is None else (first.priority, _behind(first))
                if behind:
                    self._chained[task] = None
                users = None if priority or task.who_wants else _users(task)
                word = Word(task.key, priority, bool(task.who_wants), users, behind)
                if told.get(worker) != word:
                    told[worker] = word
                    words.append(word)
            changed.clear()
            if words:
                yield worker.address, words

    def _first(self, task: Task) -> Any:
        ahead = self._ahead.get(task)
        if ahead is None:
            ahead = sorted((d for d in task.dependents if d.state in AHEAD), key=_priority, reverse=True)
            self._ahead[task] = ahead
        while ahead and ahead[-1].state not in AHEAD:
            ahead.pop()
        return ahead[-1] if ahead else None


def _behind(task: Task) -> int:
    """Say how long a chain is that ``task`` waits for: any one of those there are."""
    links = 0
    while links < LINKS_MAX and task.waiting_on:
        task = next(iter(task.waiting_on))
        links += 1
    return max((length for length in LENGTHS if length <= links), default=0)


def _users(task: Task) -> tuple[tuple[Any, str], ...] | None:
    waiters = task.waiters or ()
    if len(waiters) > USERS_MAX or task.run_spec is None:
        return None
    where = [(waiter.key, waiter.processing_on) for waiter in waiters]
    if any(worker is None for _, worker in where):
        return None
    return tuple((key, worker.address) for key, worker in where)


def _priority(task: Task) -> Any:
    return task.priority
