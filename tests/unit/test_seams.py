"""Private names of Dask: each is there, each is checked, and none is used outside of seams.py."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Scheduler, Worker
from distributed.comm.core import CommClosedError
from distributed.core import ConnectionPool

import dask_gpurt
from dask_gpurt import seams
from dask_gpurt.config import Settings
from dask_gpurt.plugins.parts import Parts

ROOT = pathlib.Path(dask_gpurt.__file__).parent
SOURCES = sorted(
    path for folder in (ROOT, ROOT / "plugins", ROOT / "shuffle") for path in folder.glob("*.py")
) + sorted(
    path
    for folder in (ROOT / "memory", ROOT / "demo", ROOT / "doctor", ROOT / "observe", ROOT / "shuffle" / "transport")
    for path in folder.glob("*.py")
)
ALL = [(part, seam) for part, of_part in seams.SEAMS.items() for seam in of_part]


@pytest.mark.parametrize(("part", "seam"), ALL, ids=lambda value: getattr(value, "path", value))
def test_every_seam_of_a_class_or_module_is_there(part: str, seam: seams.Seam) -> None:
    assert seam.problem() is None


def test_every_part_has_seams() -> None:
    assert all(seams.SEAMS[part] for part in ("memory", "shuffle", "placement"))


def test_a_name_that_has_moved_is_found() -> None:
    assert "no 'gone'" in str(seams.Seam("scheduler", "distributed.scheduler:Scheduler.gone").problem())
    assert "no_such" in str(seams.Seam("scheduler", "distributed.no_such:Thing").problem())
    assert "no 'gone'" in str(seams.Seam("worker", ".gone").problem(object()))


def test_a_signature_that_has_changed_is_found() -> None:
    class Server:
        def decide(self, task: object) -> object:
            return task

    assert seams.Seam("scheduler", ".decide", ("task",)).problem(Server()) is None
    assert "expected ('ts',)" in str(seams.Seam("scheduler", ".decide", ("ts",)).problem(Server()))


def test_a_name_that_only_the_base_declares_is_there() -> None:
    class Server:
        declared: int

    class Subclass(Server):
        more: int

    assert seams.Seam("worker", ".declared").problem(Subclass) is None
    assert "no 'gone'" in str(seams.Seam("worker", ".gone").problem(Subclass))


def test_broken_seams_are_those_of_the_side(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = seams.Seam("worker", "distributed.worker:Worker.gone")
    monkeypatch.setitem(seams.SEAMS, "memory", (gone, dataclasses.replace(gone, side="scheduler")))
    assert len(seams.broken("memory", "worker")) == 1


def _private_uses(path: pathlib.Path) -> Iterator[str]:
    """Attributes with a leading underscore, taken from anything but ``self`` and ``cls``."""
    tree = ast.parse(path.read_text())
    own = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    }
    own |= {
        target.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                continue
            if node.attr not in own:  # a private name of a class of this very module is its own business
                yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("dask", "distributed"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            if private := [name for name in names if name.startswith("_") and name != "_task_spec"]:
                yield f"{path.name}:{node.lineno}: from {node.module} import {private}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_private_names_of_others_stand_in_seams_alone(path: pathlib.Path) -> None:
    if path.name != "seams.py":
        assert not list(_private_uses(path))


def test_the_check_finds_a_private_use(tmp_path: pathlib.Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("from distributed.shuffle._core import ShuffleRun\nscheduler._transition(1)\n")
    assert len(list(_private_uses(bad))) == 2


def test_scheduler_and_worker_are_what_the_seams_think() -> None:
    assert Scheduler.__module__ == "distributed.scheduler"
    assert Worker.__module__ == "distributed.worker"


def test_removed_workers_are_heard_of_by_all_and_the_last_to_go_puts_stock_back() -> None:
    heard: list[str] = []
    stock = lambda worker, stimulus_id: heard.append(f"stock {worker}")  # noqa: E731
    server = SimpleNamespace(stream_handlers={"remove-worker": stock})
    first = seams.hear_removed_workers(server, lambda worker: heard.append(f"first {worker}"))
    second = seams.hear_removed_workers(server, lambda worker: heard.append(f"second {worker}"))
    server.stream_handlers["remove-worker"](worker="a", stimulus_id="")
    assert heard == ["stock a", "first a", "second a"]
    # An installation may end after the next one has begun.
    first()
    server.stream_handlers["remove-worker"](worker="b", stimulus_id="")
    assert heard[3:] == ["stock b", "second b"]
    second()
    second()
    assert server.stream_handlers["remove-worker"] is stock


def test_a_library_that_dask_does_not_find_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = seams.Seam("worker", "dask.dataframe.multi:merge_chunk")
    assert wanted.lacks() is None
    assert seams.Seam("worker", "distributed.no_such:Thing").lacks() is None
    monkeypatch.setattr(seams, "SEAMS", {"shuffle": (wanted,)})
    assert seams.lacking("shuffle", "worker") == []
    for name in [
        name for name in sys.modules if name.partition(".")[0] == "pandas" or name.startswith("dask.dataframe")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert seams.lacking("shuffle", "worker") == ["pandas"]
    assert Parts("worker", object(), Settings.load({})).refusal("shuffle") == "not installed: pandas"


def test_a_worker_that_closes_is_as_good_as_gone_to_those_who_send_it_shards() -> None:
    async def main() -> None:
        pool = ConnectionPool()
        await pool.start()

        class Runs:
            async def get_with_run_id(self, **_: Any) -> None:
                # It asks the scheduler what that is for a run.
                await pool.connect("tcp://127.0.0.1:1")

        worker = SimpleNamespace(
            address="tcp://127.0.0.1:2", rpc=pool, extensions={"shuffle": SimpleNamespace(shuffle_runs=Runs())}
        )
        await pool.close()
        with pytest.raises(CommClosedError, match="is closing") as caught:
            await seams.shuffle_run(worker, "a", 1)
        assert isinstance(caught.value.__cause__, RuntimeError)

        class Others:
            async def get_with_run_id(self, **_: Any) -> None:
                raise seams.P2PConsistencyError("another run")

        worker.rpc = ConnectionPool()
        await worker.rpc.start()
        worker.extensions["shuffle"].shuffle_runs = Others()
        with pytest.raises(seams.P2PConsistencyError, match="another run"):
            await seams.shuffle_run(worker, "a", 1)
        await worker.rpc.close()

    asyncio.run(main())
