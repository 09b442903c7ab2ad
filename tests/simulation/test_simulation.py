"""The simulator: it is Dask that runs in it, nothing is lost, and a seed says everything."""

from __future__ import annotations

import ast
import math
import pathlib
from typing import Any

import dask
import pytest
from dask._task_spec import Task
from dask.order import order
from distributed import Scheduler

import benchmarks.simulation
from benchmarks.simulation.clock import Clock
from benchmarks.simulation.cluster import STOCK, Cluster, Policy, Spec, StuckError, gpurt, run
from benchmarks.simulation.graphs import ASIDE, GRAPHS, TUNED, workload
from benchmarks.simulation.network import FABRICS, Fabric, Network
from benchmarks.simulation.store import Store
from benchmarks.simulation.workload import Phase, Workload

POLICIES: dict[str, Policy] = {"stock": STOCK, "gpurt": gpurt}
#: Graphs of several kinds that take little time.
SMALL = ("thin-tree", "task-shuffle", "aligned", "kmeans", "rechunked-fft")


def test_a_port_is_shared_by_the_transfers_at_it() -> None:
    clock = Clock()
    network = Network(clock, Fabric(100.0, None))
    ended: dict[str, float] = {}
    for name, source, target in (("a", 0, 1), ("b", 0, 2), ("c", 3, 4)):
        network.begin(source, target, 100, lambda name=name: ended.setdefault(name, clock.now))  # type: ignore[misc]
    while clock.step():
        pass
    assert ended == {"c": 1.0, "a": 2.0, "b": 2.0}
    assert network.moved_nbytes == 300


def test_a_transfer_is_faster_once_another_one_has_ended() -> None:
    clock = Clock()
    network = Network(clock, Fabric(100.0, 10.0, node_size=2))
    ended: dict[str, float] = {}
    network.begin(0, 1, 300, lambda: ended.setdefault("long", clock.now))
    network.begin(0, 1, 100, lambda: ended.setdefault("short", clock.now))
    network.begin(0, 2, 100, lambda: ended.setdefault("between", clock.now))
    while clock.step():
        pass
    assert ended == {"short": 2.0, "long": 4.0, "between": 10.0}
    assert network.between_nbytes == 100


def test_a_store_spills_what_was_used_last() -> None:
    store = Store(Clock(), {"a": 40, "b": 40, "c": 40}, limit_nbytes=100, disk_bandwidth=10)
    store["a"] = store["b"] = None
    store.use("a")
    store["c"] = None
    assert (store.held_nbytes, store.spilled_nbytes, store.free_at) == (120, 40, 4.0)
    store.use("b")  # read, and "a" is written for it
    assert (store.spilled_nbytes, store.free_at) == (80, 12.0)
    del store["c"]
    assert store.held_nbytes == 80
    assert sorted(store) == ["a", "b"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SMALL)
def test_all_tasks_end_and_all_bytes_are_those_of_transfers(name: str, policy: str) -> None:
    graph = workload(name)
    cluster = Cluster(Spec(nworkers=6, validate=True, fabric=FABRICS["eff"]), graph, seed=3, traced=True)
    with cluster.started(POLICIES[policy]):
        report = cluster.compute()
        cluster.settle()
        cluster.validate()
        computed = [key for _, what, _, *keys in cluster.trace if what == "computed" for key in keys]
        fetched = [key for _, what, _, *keys in cluster.trace if what == "fetched" for key in keys]
        # What the client wants is there, and nothing else is.
        wanted = {key for phase in graph.phases for key in phase.keys}
        assert {key for worker in cluster.workers.values() for key in worker.store} == wanted
    # No worker was lost: each task is computed once.
    assert sorted(map(str, computed)) == sorted(str(key) for phase in graph.phases for key in phase.graph)
    assert report.tasks == len(computed)
    assert cluster.network.moved_nbytes == sum(graph.sizes[key] for key in fetched)
    assert report.makespan_s >= report.bound_s * (1 - cluster.spec.jitter)
    assert report.metrics.get("errors", 0) == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_trace(policy: str) -> None:
    def trace(seed: int) -> list[tuple[Any, ...]]:
        cluster = Cluster(Spec(nworkers=5, nthreads=2), workload("task-shuffle"), seed, traced=True)
        with cluster.started(POLICIES[policy]):
            cluster.compute()
        return cluster.trace

    assert trace(1) == trace(1)
    assert trace(1) != trace(2)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_has_the_same_names_each_time(name: str) -> None:
    # Delayed tasks have new ones by default, and with them another order in sets.
    again = workload.__wrapped__(name)
    assert list(again.sizes) == list(workload(name).sizes)


def test_short_memory_costs_time() -> None:
    enough = run(Spec(nworkers=2), workload("kmeans"), STOCK)
    short = run(Spec(nworkers=2, memory_nbytes=20e9), workload("kmeans"), STOCK)
    assert enough.spilled_nbytes == 0
    assert short.spilled_nbytes > 0
    assert short.makespan_s > 2 * enough.makespan_s
    assert math.isclose(short.peak_nbytes, enough.peak_nbytes, rel_tol=0.05)


def test_tasks_that_do_not_end_are_told() -> None:
    with pytest.raises(StuckError, match="results are missing"):
        run(Spec(limit_s=0.05), workload("thin-tree"), STOCK)


def test_stealing_and_the_memory_manager_are_at_work() -> None:
    tasks: dict[Any, Task] = {("sleep", i): Task(("sleep", i), int) for i in range(64)}
    graph = Workload(
        "sleeps", [Phase(tasks, list(tasks), order(tasks))], dict.fromkeys(tasks, 10), dict.fromkeys(tasks, 0.1)
    )
    with dask.config.set({"distributed.scheduler.worker-saturation": math.inf}):
        cluster = Cluster(Spec(nworkers=4), graph)
        with cluster.started(STOCK):
            next(iter(cluster.workers.values())).set_speed(0.05)
            assert cluster.compute().makespan_s < 10  # without stealing, 16 tasks of 2 s each
            scheduler: Any = cluster.scheduler
            assert isinstance(scheduler, Scheduler)
            assert sum(scheduler.extensions["stealing"].metrics["request_count_total"].values()) > 0
            assert scheduler.extensions["amm"].running


def test_a_third_of_the_graphs_is_kept_aside() -> None:
    assert len(TUNED) >= 18
    assert not TUNED.keys() & ASIDE.keys()
    assert len(ASIDE) * 3 >= len(GRAPHS) - 2


def test_private_names_stand_in_one_module() -> None:
    # A name of the simulator's own may begin with an underscore, too.
    folder = pathlib.Path(benchmarks.simulation.__file__).parent
    trees = {path: ast.parse(path.read_text()) for path in folder.glob("*.py") if path.name != "seams.py"}
    own = {
        node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
                assert node.attr in own, f"{path.name}:{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("dask", "distributed"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_") and name != "_task_spec"], path.name
