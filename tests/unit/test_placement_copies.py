"""Which copies go where memory is short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dask_gpurt.plugins import copies


class Worker:
    def __init__(self, nbytes: int, memory_limit: int = 100) -> None:
        self.nbytes = nbytes
        self.memory_limit = memory_limit


class Task:
    """A task that is to come: where it will be, and whether it is there already."""

    def __init__(self, place: Worker | None, *, sent: bool = False) -> None:
        self.place = place
        self.processing_on = place if sent else None


def held(*holders: Worker, waiters: tuple[Task, ...] = ()) -> Any:
    return SimpleNamespace(who_has=set(holders), waiters=set(waiters))


def droppable(dep: Any) -> list[Worker]:
    return copies.droppable(dep, lambda task: task.place)


def test_full_workers_forget_what_nobody_takes_there() -> None:
    full, fuller, roomy = Worker(60), Worker(90), Worker(10)
    assert droppable(held(full, fuller, roomy)) == [fuller, full]
    assert droppable(held(full, fuller, roomy, waiters=(Task(full),))) == [fuller]


def test_the_last_copy_stays_where_there_is_most_room() -> None:
    full, fuller = Worker(60), Worker(90)
    assert droppable(held(full, fuller)) == [fuller]
    assert droppable(held(full)) == []


def test_workers_with_room_or_without_a_limit_keep_theirs() -> None:
    assert droppable(held(Worker(10), Worker(20), Worker(10**9, memory_limit=0))) == []


def test_a_task_without_a_place_may_come_to_any_copy() -> None:
    assert droppable(held(Worker(90), Worker(95), waiters=(Task(None),))) == []


def test_what_very_many_take_stays() -> None:
    elsewhere = Worker(0)
    dep = held(Worker(90), Worker(95), waiters=tuple(Task(elsewhere) for _ in range(copies.WAITERS_MAX + 1)))
    assert droppable(dep) == []


def test_copies_stay_while_somebody_may_be_fetching_them() -> None:
    full, fuller, target = Worker(60), Worker(90), Worker(0)
    # It was told of both, and may ask either; without an answer it would wait for a second.
    assert droppable(held(full, fuller, waiters=(Task(target, sent=True),))) == []
    assert droppable(held(full, fuller, target, waiters=(Task(target, sent=True),))) == [fuller, full]


def test_what_is_on_its_way_counts() -> None:
    assert not copies.is_full(Worker(30))
    assert copies.is_full(Worker(30), incoming_nbytes=30)
    assert not copies.is_full(Worker(30, memory_limit=0), incoming_nbytes=10**9)
