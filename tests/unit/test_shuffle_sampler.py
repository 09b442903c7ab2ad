"""When a worker takes samples, and of what."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_gpurt.shuffle.sampler import SAMPLED_ROWS_MIN, Sampler
from dask_gpurt.shuffle.sizes import Sample


class FakePlugin:
    """Stands for Dask's own: asks for the run of a shuffle whose first input comes."""

    def __init__(self) -> None:
        self.shuffle_runs = self
        self._active_runs: dict[str, str] = {}

    async def _fetch(self, shuffle_id: str, key: Any = None) -> str:
        return f"stock run of {shuffle_id}"

    def add_partition(self, data: Any, partition_id: Any, id: str) -> str:  # noqa: A002
        if id not in self._active_runs:
            self._active_runs[id] = asyncio.run(self.shuffle_runs._fetch(id, "key"))
        return self._active_runs[id]


class FakeScheduler:
    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.asked: list[dict[str, Any]] = []

    async def gpurt_shuffle_open(self, **message: Any) -> Any:
        self.asked.append(message)
        return self.reply


def sampler(reply: Any) -> tuple[Sampler, FakePlugin, FakeScheduler]:
    plugin, scheduler = FakePlugin(), FakeScheduler(reply)
    worker: Any = SimpleNamespace(extensions={"shuffle": plugin}, scheduler=scheduler, address="me")
    return Sampler(worker), plugin, scheduler


def frame(rows: int = SAMPLED_ROWS_MIN, column: str = "_partitions") -> pd.DataFrame:
    return pd.DataFrame({"value": np.zeros(rows), column: np.arange(rows) % 4})


@pytest.mark.parametrize("column", ["_partitions", "__hash_partition"])
def test_the_first_input_goes_with_the_question_and_no_other(column: str) -> None:
    one, plugin, scheduler = sampler({"status": "OK", "run_spec": "our run"})
    one.start()
    assert [plugin.add_partition(frame(column=column), i, "a") for i in range(2)] == ["our run"] * 2
    (asked,) = scheduler.asked
    assert (asked["shuffle_id"], asked["key"], asked["worker"]) == ("a", "key", "me")
    sample = Sample.from_message(asked["sample"])
    assert sample.column == column
    assert sample.nbytes >= SAMPLED_ROWS_MIN * 16
    assert len(set(sample.rows.tolist())) == 1
    assert len(sample.rows) == 4


@pytest.mark.parametrize(
    "data",
    [
        frame(100),
        frame(column="other"),
        frame().assign(_partitions=0.5),
        np.zeros(10_000),
        pd.DataFrame(np.zeros((10_000, 2), int), columns=["_partitions", "_partitions"]),
    ],
    ids=["small", "other column", "no ids", "array", "twice"],
)
def test_of_what_cannot_be_counted_nothing_is_sent(data: Any) -> None:
    one, plugin, scheduler = sampler({"status": "OK", "run_spec": "our run"})
    one.start()
    assert plugin.add_partition(data, 0, "a") == "stock run of a"
    assert not scheduler.asked


def test_where_the_scheduler_does_not_know_the_question_the_stock_one_is_asked() -> None:
    one, plugin, scheduler = sampler(None)
    one.start()
    assert plugin.add_partition(frame(), 0, "a") == "stock run of a"
    assert len(scheduler.asked) == 1


def test_an_error_is_raised_as_stock_would() -> None:
    one, plugin, _ = sampler({"status": "error", "exception": ValueError("no such shuffle"), "traceback": None})
    one.start()
    with pytest.raises(ValueError, match="no such shuffle"):
        plugin.add_partition(frame(), 0, "a")


def test_stock_is_put_back() -> None:
    one, plugin, scheduler = sampler({"status": "OK", "run_spec": "our run"})
    one.start()
    one.stop()
    assert not {"add_partition", "_fetch"} & vars(plugin).keys()
    one.attach()
    assert plugin.add_partition(frame(), 0, "a") == "stock run of a"
    assert not scheduler.asked


def test_the_plugin_may_come_later() -> None:
    one, plugin, scheduler = sampler({"status": "OK", "run_spec": "our run"})
    there: Any = one.worker.extensions
    there.clear()
    one.start()
    there["shuffle"] = plugin
    assert plugin.add_partition(frame(), 0, "a") == "stock run of a"
    one.attach()
    assert plugin.add_partition(frame(), 0, "b") == "our run"
    assert len(scheduler.asked) == 1
