"""What a query dies of is its result, the next one finds a fresh cluster, and a wrong answer is none."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from dask.delayed import delayed
from distributed import Event, get_client

from benchmarks.frame import WrongAnswerError
from benchmarks.tpch_large import Arena
from dask_gpurt.demo.cluster import STOCK, ClusterSpec
from dask_gpurt.demo.tpch import Query


def number() -> float:
    return 2.5


def failure() -> float:
    raise ValueError("no such number")


def hang() -> None:
    Event("never-set").wait()


def test_a_query_that_fails_does_not_harm_the_next() -> None:
    schedulers = []

    def wall_s(arena: Arena, task: Any, expected: float = 2.5) -> float:
        def build(_: Any) -> Any:
            schedulers.append(get_client().scheduler_info()["address"])
            return delayed(task)()

        query = Query("q", "a number", build, sql="", columns=("sum",), key=(), order=())
        return arena.wall_s(query, lambda *_: None, pd.DataFrame({"sum": [expected]}))

    with Arena(STOCK, ClusterSpec(workers=1)) as arena:
        assert 0 < wall_s(arena, number) < float("inf")
        assert wall_s(arena, failure) == float("inf")
        with pytest.raises(WrongAnswerError, match="expected 7"):
            wall_s(arena, number, expected=7.0)
        arena.limit_s = 1.0
        assert wall_s(arena, hang) == float("inf")
    first, failed, second, hung = schedulers
    assert first == failed
    assert second == hung
    assert first != second
