"""When a task's thread finds a run by itself, and when it asks as in stock Dask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dask_gpurt.shuffle.shortcut import Shortcut


class FakePlugin:
    """Stands for Dask's own, which asks the event loop."""

    def __init__(self) -> None:
        self.shuffle_runs = SimpleNamespace(_active_runs={}, closed=False)

    def get_or_create_shuffle(self, shuffle_id: str) -> str:
        return f"the loop's run of {shuffle_id}"

    def get_shuffle_run(self, shuffle_id: str, run_id: int) -> str:
        return f"the loop's run {run_id} of {shuffle_id}"


def shortcut() -> tuple[Shortcut, FakePlugin, Any]:
    """What is tested, the plugin that it stands before, and an active run."""
    plugin = FakePlugin()
    run = SimpleNamespace(run_id=7, _exception=None)
    plugin.shuffle_runs._active_runs["a"] = run
    worker: Any = SimpleNamespace(extensions={"shuffle": plugin})
    return Shortcut(worker), plugin, run


def test_a_run_that_is_there_is_found() -> None:
    one, plugin, run = shortcut()
    one.start()
    assert plugin.get_or_create_shuffle("a") is run
    assert plugin.get_shuffle_run("a", 7) is run


def test_the_loop_is_asked_for_what_is_not_there() -> None:
    one, plugin, _ = shortcut()
    one.start()
    assert plugin.get_or_create_shuffle("b") == "the loop's run of b"
    assert plugin.get_shuffle_run("b", 7) == "the loop's run 7 of b"
    # Stale, or newer than what is known here.
    assert plugin.get_shuffle_run("a", 6) == "the loop's run 6 of a"
    assert plugin.get_shuffle_run("a", 8) == "the loop's run 8 of a"


@pytest.mark.parametrize("end", ["failed", "all end"])
def test_the_loop_says_what_is_wrong_with_a_run(end: str) -> None:
    one, plugin, run = shortcut()
    one.start()
    if end == "failed":
        run._exception = ValueError("failed")
    else:
        plugin.shuffle_runs.closed = True
    assert plugin.get_or_create_shuffle("a") == "the loop's run of a"
    assert plugin.get_shuffle_run("a", 7) == "the loop's run 7 of a"


def test_stock_is_put_back() -> None:
    one, plugin, _ = shortcut()
    one.start()
    one.attach()
    one.stop()
    assert not {"get_or_create_shuffle", "get_shuffle_run"} & vars(plugin).keys()
    one.attach()
    assert plugin.get_or_create_shuffle("a") == "the loop's run of a"


def test_the_plugin_may_come_later() -> None:
    one, plugin, run = shortcut()
    one.worker.extensions.clear()
    one.start()
    one.worker.extensions["shuffle"] = plugin
    one.attach()
    assert plugin.get_or_create_shuffle("a") is run
