"""What simulation has found (docs/reliability.md): barriers without a run."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.shuffle._core import ShuffleId, barrier_key

from dask_gpurt import seams

BARRIER = barrier_key(ShuffleId("one"))


class Plugin:
    """What is asked of Dask's plugin of the scheduler."""

    def __init__(self, *active: str) -> None:
        self.active_shuffles = dict.fromkeys(active)
        self.seen: list[Any] = []

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        self.seen.append((key, start, finish, *args, *kwargs))


@pytest.mark.parametrize(
    ("active", "start", "finish", "told"),
    [
        ((), "waiting", "processing", ["one"]),
        (("one",), "waiting", "processing", []),
        (("one",), "processing", "released", ["one"]),
        ((), "processing", "released", []),
        ((), "processing", "memory", []),
    ],
)
def test_a_barrier_that_begins_without_a_run_is_heard_of(
    active: tuple[str, ...], start: str, finish: str, told: list[str]
) -> None:
    plugin, heard = Plugin(*active), list[str]()
    restore = seams.hear_ended_runs(plugin, heard.append)
    plugin.transition(BARRIER, start, finish)
    plugin.transition(("other", 1), start, finish)
    assert heard == told
    assert plugin.seen == [(BARRIER, start, finish), (("other", 1), start, finish)]
    restore()
    plugin.transition(BARRIER, start, finish)
    assert heard == told
