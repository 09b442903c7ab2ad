"""Copies that only peers need are offered to the scheduler, which takes back what these hold."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from dask_gpurt.memory.spare import OFFERS_MAX, Offers
from dask_gpurt.plugins.horizon import HorizonScheduler


class Rig:
    """Keys that may be given away, and a scheduler that answers."""

    def __init__(self) -> None:
        self.keys: list[Hashable] = []
        self.not_yet: set[Hashable] = set()
        self.asked: list[list[Hashable]] = []
        self.offers = Offers(lambda: list(self.keys), self.answer)

    async def answer(self, keys: list[Hashable]) -> list[Hashable]:
        self.asked.append(keys)
        return [key for key in keys if key in self.not_yet]

    async def settle(self) -> None:
        task = self.offers._task
        assert task is not None
        await asyncio.wait_for(task, 20)


def test_what_can_be_taken_back_is_offered_once() -> None:
    async def main() -> None:
        rig = Rig()
        rig.keys = ["a", "b"]
        rig.offers.soon()
        rig.offers.soon()
        await rig.settle()
        assert rig.asked == [["a", "b"]]
        # Its deletion may be on its way: that is nobody's to ask for again.
        rig.keys.append("c")
        rig.offers.soon()
        await rig.settle()
        assert rig.asked[1:] == [["c"]]
        # It goes, and comes again.
        rig.keys = ["b"]
        rig.offers.soon()
        await rig.settle()
        rig.keys = ["a", "b"]
        rig.offers.soon()
        await rig.settle()
        assert rig.asked[2:] == [["a"]]
        assert rig.offers.count == 4

    asyncio.run(main())


def test_what_no_peer_has_reported_is_offered_again_a_few_times() -> None:
    async def main() -> None:
        rig = Rig()
        rig.keys = ["a", "b"]
        rig.not_yet = {"b"}
        rig.offers.soon()
        await rig.settle()
        assert rig.asked == [["a", "b"], *[["b"]] * (OFFERS_MAX - 1)]
        rig.keys = ["c"]
        rig.offers.soon()
        task = rig.offers._task
        assert task is not None
        rig.offers.close()
        await asyncio.wait([task])
        assert len(rig.asked) == OFFERS_MAX

    asyncio.run(main())


@dataclass(frozen=True)
class Holder:
    """What the scheduler knows of a worker."""

    address: str


class Stage:
    """A scheduler of three workers and a value."""

    def __init__(self) -> None:
        self.a, self.b, self.c = (Holder(name) for name in "abc")
        self.removed: list[tuple[str, list[Any]]] = []
        self.task: Any = SimpleNamespace(who_has={self.a, self.b}, who_wants=set[str](), waiters=[])
        scheduler: Any = SimpleNamespace(
            workers={worker.address: worker for worker in (self.a, self.b, self.c)},
            tasks={"x": self.task},
            request_remove_replicas=lambda worker, keys, stimulus_id: self.removed.append((worker, keys)),
        )
        self.horizon = HorizonScheduler(scheduler)

    def needed_on(self, *workers: Any) -> None:
        self.task.waiters = [SimpleNamespace(processing_on=worker) for worker in workers]

    def spare(self, worker: str = "a", *keys: str) -> list[Any]:
        return asyncio.run(self.horizon.spare(worker, keys or ("x",)))


def test_the_scheduler_takes_back_what_is_where_it_is_needed() -> None:
    stage = Stage()
    stage.needed_on(stage.b)
    assert stage.spare() == []
    assert stage.removed == [("a", ["x"])]
    assert stage.horizon.taken == 1


def test_the_scheduler_leaves_what_may_be_needed_or_is_the_only_copy() -> None:
    stage = Stage()
    # Its deletion is on its way, or it is a client's.
    assert stage.spare() == []
    stage.needed_on(stage.b)
    stage.task.who_wants = {"client"}
    assert stage.spare() == []
    stage.task.who_wants = set()
    # It is needed here, or nobody knows where.
    stage.needed_on(stage.b, stage.a)
    assert stage.spare() == []
    stage.needed_on(stage.b, None)
    assert stage.spare() == []
    # It is on its way to one of them.
    stage.needed_on(stage.b, stage.c)
    assert stage.spare() == ["x"]
    stage.task.who_has = {stage.a}
    stage.needed_on(stage.b)
    assert stage.spare() == ["x"]
    # It is not known, or not there, or the worker is not.
    assert stage.spare("c") == stage.spare("d") == stage.spare("a", "y") == []
    assert stage.removed == []
