"""Plugin of pytest that writes down what came of each test, and what ran in it; :mod:`stock_tests` loads it.

One line of JSON is written when a test begins, and one when it has ended, so that nothing is lost if the process ends with it. A
test is taken to run on dask-gpurt only if the parts themselves say so: distributed's tests reset Dask's configuration, and a
preload that fails is only logged. What runs in other processes than the test's own is not seen.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import dask.base
import dask.optimization
import distributed.shuffle
import pytest
from distributed import utils_test
from distributed.scheduler import Scheduler

__all__ = ["OUTCOMES"]

#: Environment variable with the file that is written to. Tests of which it says something already are not run again.
OUTCOMES = "STOCK_TESTS_OUTCOMES"

#: Of why a test has failed, so many characters are kept.
WHY_MAX = 300
#: What tests of 2024.12.1 import at their top.
GONE = ((dask.optimization, "SubgraphCallable"), (distributed.shuffle, "check_minimal_arrow_version"))


class Witness:
    """Count the schedulers and workers of each test, and of those the ones that run dask-gpurt.

    Parameters
    ----------
    path
        The file to write to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: dict[str, int] = {}
        self.worst = self.why = ""

    def write(self, **fields: object) -> None:
        """Append a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def count(self, what: str) -> None:
        """Count one more of ``what`` in the test that runs."""
        self.seen[what] = self.seen.get(what, 0) + 1

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what was run before."""
        done = set()
        if self.path.exists():
            done = {json.loads(line)["test"] for line in self.path.read_text(encoding="utf-8").splitlines()}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Write down the beginning and the end of a test."""
        self.seen, self.worst, self.why = {}, "passed", ""
        self.write(test=item.nodeid, event="begun")
        result = yield
        self.write(test=item.nodeid, event="ended", outcome=self.worst, why=self.why, **self.seen)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the worst of set-up, call and tear-down."""
        if report.outcome != "passed" and self.worst != "failed":
            self.worst = report.outcome
        if report.failed and not self.why:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why = str(getattr(crash, "message", report.longrepr))[:WHY_MAX]


def _watch(witness: Witness) -> None:
    """Have schedulers, and the parts of dask-gpurt on them and their workers, counted as they start."""
    from dask_gpurt.plugins.scheduler import GpurtSchedulerPlugin

    start_unsafe, ready = Scheduler.start_unsafe, GpurtSchedulerPlugin.worker_ready

    async def started(self: Scheduler) -> Scheduler:
        scheduler = await start_unsafe(self)
        witness.count("schedulers")
        plugin = self.plugins.get(GpurtSchedulerPlugin.name)
        if isinstance(plugin, GpurtSchedulerPlugin) and all(part.installed for part in plugin.parts.values()):
            witness.count("gpurt_schedulers")
        return scheduler

    async def reported(
        self: GpurtSchedulerPlugin, worker: str, parts: dict[str, Any], **others: Any
    ) -> dict[str, bool]:
        witness.count("gpurt_workers" if all(part["installed"] for part in parts.values()) else "partly_stock_workers")
        return await ready(self, worker, parts, **others)

    setattr(Scheduler, start_unsafe.__name__, started)
    setattr(GpurtSchedulerPlugin, ready.__name__, reported)


def _let_persist() -> None:
    """Let ``dask.persist`` use an asynchronous client, as it could when these tests were written; newer ones call ``client.persist``."""
    strict: Any = dask.base._ensure_not_async

    def ensure(client: Any) -> Any:
        frame = sys._getframe()
        callers: list[CodeType] = []
        while frame.f_back is not None and len(callers) < 5:
            frame = frame.f_back
            callers.append(frame.f_code)
        return client.get if dask.base.persist.__code__ in callers else strict(client)

    dask.base._ensure_not_async = ensure


def _find_what_has_moved(folder: Path) -> None:
    """Have certificates looked for where the tests are, and names imported that are gone; the few tests that use them still fail."""
    utils_test.get_cert = lambda name: str(folder / "cluster_tests" / name)
    for module, name in GONE:
        setattr(module, name, getattr(module, name, None))


def pytest_configure(config: pytest.Config) -> None:
    """Begin to look on."""
    # Marks of plugins that may be missing here.
    config.addinivalue_line("markers", "flaky: is run again where it fails; here it is not")
    witness = Witness(Path(os.environ[OUTCOMES]))
    config.pluginmanager.register(witness)
    _watch(witness)
    _let_persist()
    _find_what_has_moved(config.rootpath)
