"""What watching workers are told of next uses, against what can be read off the whole graph."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.plugins.foresight import AHEAD, LENGTHS, LINKS_MAX, USERS_MAX, Foresight, Word

#: States of a task that needs its inputs.
TO_RUN = ("waiting", "queued", "no-worker", "processing")
STATES = ("released", "waiting", "queued", "no-worker", "processing", "memory", "erred", "forgotten")


@dataclass(eq=False)
class Task:
    key: str
    priority: tuple[int, int, int]
    state: str = "released"
    dependencies: list[Task] = field(default_factory=list, repr=False)
    dependents: list[Task] = field(default_factory=list, repr=False)
    who_has: set[Worker] | None = None
    who_wants: set[str] | None = None
    processing_on: Worker | None = None
    run_spec: object = "made"

    @property
    def waiting_on(self) -> list[Task]:
        return [dependency for dependency in self.dependencies if dependency.state in TO_RUN]

    @property
    def waiters(self) -> list[Task]:
        return [dependent for dependent in self.dependents if dependent.state in TO_RUN]


@dataclass(eq=False)
class Worker:
    address: str
    has_what: set[Task] = field(default_factory=set)

    def take(self, task: Task) -> None:
        self.has_what.add(task)
        task.who_has = (task.who_has or set()) | {self}

    def drop(self, task: Task) -> None:
        self.has_what.discard(task)
        task.who_has = ((task.who_has or set()) - {self}) or None


class Listener:
    """Remembers what each worker was told."""

    def __init__(self, foresight: Foresight) -> None:
        self.foresight = foresight
        self.heard: dict[str, dict[str, Word]] = {}
        self.words = 0

    def listen(self) -> None:
        for address, words in self.foresight.words():
            assert words, "an empty message"
            self.words += len(words)
            self.heard.setdefault(address, {}).update((word.key, word) for word in words)


def truth(task: Task) -> Word:
    ahead = [dependent.priority for dependent in task.dependents if dependent.state in AHEAD]
    users = None
    if not ahead and not task.who_wants and task.run_spec and len(task.waiters) <= USERS_MAX:
        users = tuple((waiter.key, waiter.processing_on.address) for waiter in task.waiters if waiter.processing_on)
    return Word(task.key, min(ahead, default=None), bool(task.who_wants), users)


@st.composite
def graphs(draw: st.DrawFn) -> list[Task]:
    ranks = draw(st.permutations(range(draw(st.integers(2, 10)))))
    tasks = [Task(f"t{number}", (0, 1, rank)) for number, rank in enumerate(ranks)]
    for number, task in enumerate(tasks):
        for dependency in draw(st.sets(st.sampled_from(tasks[:number]), max_size=3)) if number else ():
            task.dependencies.append(dependency)
            dependency.dependents.append(task)
    return tasks


@given(graphs(), st.data())
def test_who_watches_knows_what_the_graph_says(tasks: list[Task], data: st.DataObject) -> None:
    workers = [Worker("a"), Worker("b")]
    foresight = Foresight()
    listener = Listener(foresight)
    watching: set[Worker] = set()
    for _ in range(data.draw(st.integers(0, 40))):
        what = data.draw(st.sampled_from(["transition"] * 3 + ["lose", "watch", "unwatch", "listen"]))
        if what == "transition":
            task = data.draw(st.sampled_from(tasks))
            task.state = data.draw(st.sampled_from(STATES))
            for worker in workers:
                worker.drop(task)
            task.processing_on = data.draw(st.sampled_from(workers)) if task.state == "processing" else None
            if task.state == "memory":
                for worker in data.draw(st.sets(st.sampled_from(workers), min_size=1)):
                    worker.take(task)
                task.who_wants = data.draw(st.sampled_from([None, {"client"}]))
            foresight.transition(task, task.state)
            if task.processing_on:
                if data.draw(st.booleans()):
                    listener.listen()
                for dependency in task.dependencies:
                    if dependency.who_has:
                        task.processing_on.take(dependency)
        elif what == "lose":
            # A copy that others have, too. The scheduler's plugins do not hear of it.
            if spare := [task for task in tasks if task.who_has and len(task.who_has) > 1]:
                task = data.draw(st.sampled_from(spare))
                worker = data.draw(st.sampled_from(workers))
                worker.drop(task)
                listener.heard.get(worker.address, {}).pop(task.key, None)
        elif what == "listen":
            listener.listen()
        else:
            worker = data.draw(st.sampled_from(workers))
            if what == "watch":
                watching.add(worker)
                foresight.watch(worker)
            else:
                watching.discard(worker)
                foresight.unwatch(worker)
                listener.heard.pop(worker.address, None)
    listener.listen()
    assert foresight.watched == bool(watching)
    assert not foresight.pending
    for worker in watching:
        # How long a chain is, is said now and then, and of any of the chains.
        heard = {key: word._replace(behind=0) for key, word in listener.heard.get(worker.address, {}).items()}
        assert {task.key: heard.get(task.key) for task in worker.has_what} == {
            task.key: truth(task) for task in worker.has_what
        }


def test_what_goes_to_another_worker_is_no_use_here() -> None:
    source, near, far = Task("source", (0, 1, 0)), Task("near", (0, 1, 1), "waiting"), Task("far", (0, 1, 9), "waiting")
    for task in (near, far):
        task.dependencies.append(source)
        source.dependents.append(task)
    holder = Worker("holder")
    source.state = "memory"
    holder.take(source)
    foresight = Foresight()
    foresight.watch(holder)
    assert dict(foresight.words()) == {"holder": [Word("source", (0, 1, 1), False)]}
    near.state = "processing"
    near.processing_on = Worker("elsewhere")
    foresight.transition(near, "processing")
    assert dict(foresight.words()) == {"holder": [Word("source", (0, 1, 9), False)]}
    # Its worker was lost.
    near.state = "waiting"
    near.processing_on = None
    foresight.transition(near, "waiting")
    assert dict(foresight.words()) == {"holder": [Word("source", (0, 1, 1), False)]}


def test_who_waits_for_a_chain_is_told_about_how_long_that_is() -> None:
    source, user = Task("source", (0, 1, 0), "memory"), Task("user", (0, 1, 99), "waiting")
    chain = [Task(f"link-{number}", (0, 1, 1 + number), "waiting") for number in range(LINKS_MAX + 5)]
    for first, then in itertools.pairwise([*chain, user]):
        then.dependencies.append(first)
        first.dependents.append(then)
    user.dependencies.append(source)
    source.dependents.append(user)
    holder = Worker("holder")
    holder.take(source)
    foresight = Foresight()
    foresight.watch(holder)
    heard = []
    while True:
        heard += [word.behind for words in dict(foresight.words()).values() for word in words]
        if not chain:
            break
        # Nothing of what the source is needed for changes.
        link = chain.pop(0)
        link.state = "memory"
        foresight.transition(link, "memory")
    assert heard == [*reversed(LENGTHS), 0]
    assert not foresight._chained


def test_the_last_tasks_are_named_to_who_holds_their_input_and_to_who_will() -> None:
    source, user = Task("source", (0, 1, 0), "memory"), Task("user", (0, 1, 1), "waiting")
    user.dependencies.append(source)
    source.dependents.append(user)
    holder, runner = Worker("holder"), Worker("runner")
    holder.take(source)
    foresight = Foresight()
    for worker in (holder, runner):
        foresight.watch(worker)
    assert dict(foresight.words()) == {"holder": [Word("source", (0, 1, 1), False)]}
    user.state, user.processing_on = "processing", runner
    foresight.transition(user, "processing")
    last = [Word("source", None, False, (("user", "runner"),))]
    assert dict(foresight.words()) == {"holder": last, "runner": last}
    # What cannot be made again is never let go of.
    source.run_spec = None
    foresight.transition(user, "processing")
    assert dict(foresight.words())["holder"] == [Word("source", None, False, None)]


def test_who_fetches_a_key_again_is_told_again() -> None:
    source, user = Task("source", (0, 1, 0), "memory", who_wants={"client"}), Task("user", (0, 1, 1), "waiting")
    user.dependencies.append(source)
    holder, runner = Worker("holder"), Worker("runner")
    for worker in (holder, runner):
        worker.take(source)
    foresight = Foresight()
    foresight.watch(runner)
    wanted = {"runner": [Word("source", None, True)]}
    assert dict(foresight.words()) == wanted
    # It drops its copy, and forgets what it was told about it; the scheduler's plugins do not hear of that.
    runner.drop(source)
    user.state, user.processing_on = "processing", runner
    foresight.transition(user, "processing")
    assert dict(foresight.words()) == wanted


class Counted:
    """A state that counts how often it is looked at."""

    looks = itertools.count()

    def __init__(self, state: str) -> None:
        self.state = state

    def __hash__(self) -> int:
        next(self.looks)
        return hash(self.state)

    def __eq__(self, other: object) -> bool:
        return self.state == other


def test_a_key_with_many_dependents_costs_no_more_for_each() -> None:
    def looks(count: int) -> int:
        source = Task("source", (0, 1, 0), "memory")
        holder = Worker("holder")
        holder.take(source)
        dependents = [Task(f"d{number}", (0, 1, 1 + number)) for number in range(count)]
        for dependent in dependents:
            state: Any = Counted("waiting")
            dependent.state = state
            dependent.dependencies.append(source)
            source.dependents.append(dependent)
        foresight = Foresight()
        foresight.watch(holder)
        Counted.looks = itertools.count()
        for dependent in dependents:
            done: Any = Counted("processing")
            dependent.state, dependent.processing_on = done, holder
            foresight.transition(dependent, "processing")
            list(foresight.words())
        return next(Counted.looks)

    assert looks(1000) / 1000 <= 1.5 * looks(10) / 10
