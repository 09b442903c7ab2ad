"""Which copies go where memory is short."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dask_gpurt.plugins import copies


class Worker:
    def __init__(self, nbytes: int, memory_limit: int = 100) -> None:
        self.nbytes = nbytes
        self.memory_limit = memory_limit


def held(*holders: Worker, waiters: tuple[Worker | None, ...] = ()) -> Any:
    """Make an input with its holders, and the place of each task that is to come."""
    return SimpleNamespace(who_has=set(holders), waiters={(i, place) for i, place in enumerate(waiters)})


def droppable(dep: Any) -> list[Worker]:
    return copies.droppable(dep, lambda waiter: waiter[1])


def test_full_workers_forget_what_nobody_takes_there() -> None:
    full, fuller, roomy = Worker(60), Worker(90), Worker(10)
    assert droppable(held(full, fuller, roomy)) == [fuller, full]
    assert droppable(held(full, fuller, roomy, waiters=(full,))) == [fuller]


def test_the_last_copy_stays_where_there_is_most_room() -> None:
    full, fuller = Worker(60), Worker(90)
    assert droppable(held(full, fuller)) == [fuller]
    assert droppable(held(full)) == []


def test_workers_with_room_or_without_a_limit_keep_theirs() -> None:
    assert droppable(held(Worker(10), Worker(20), Worker(10**9, memory_limit=0))) == []


def test_a_task_without_a_place_may_come_to_any_copy() -> None:
    assert droppable(held(Worker(90), Worker(95), waiters=(None,))) == []


def test_what_very_many_take_stays() -> None:
    elsewhere = Worker(0)
    dep = held(Worker(90), Worker(95), waiters=(elsewhere,) * (copies.WAITERS_MAX + 1))
    assert droppable(dep) == []
