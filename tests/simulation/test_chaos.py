"""Workers that join, die, pause and slow down while graphs run: no task is lost or stuck, and all states agree.

The same with a policy that fails: what fails falls to Dask.

``--seeds 1000`` runs that many; a seed that fails is the report of a bug.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from dask._task_spec import Task, TaskRef
from dask.order import order

from benchmarks.simulation.cluster import Cluster, Spec, gpurt
from benchmarks.simulation.faults import Faults, unleash
from benchmarks.simulation.graphs import workload
from benchmarks.simulation.network import FABRICS
from benchmarks.simulation.synthetic import product, tree
from benchmarks.simulation.workload import Phase, Workload
from dask_gpurt.plugins import copies, crossings, families, policy, stealing
from dask_gpurt.plugins.prices import Prices
from dask_gpurt.plugins.queues import Queues

REAL = ("thin-tree", "task-shuffle", "aligned", "tsqr", "lu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("--seeds")))
    if "shaken_seed" in metafunc.fixturenames:
        # A twentieth: each is run for every part that can fail.
        metafunc.parametrize("shaken_seed", range(-(-metafunc.config.getoption("--seeds") // 20)))


def random_workload(rng: random.Random) -> Workload:
    """Make a graph of some layers, in which tasks take a few results of the layers before."""
    graph: dict[Any, Task] = {}
    layers: list[list[tuple[str, int]]] = []
    for depth in range(rng.randint(1, 6)):
        layer = [(f"layer{depth}", i) for i in range(rng.randint(1, 60))]
        for key in layer:
            above = [rng.choice(rng.choice(layers)) for _ in range(rng.choice([0, 1, 1, 2, 2, 3, 9]))] if layers else []
            graph[key] = Task(key, max, *(TaskRef(dep) for dep in dict.fromkeys(above)))
        layers.append(layer)
    wanted = layers[-1] + [key for key in graph if rng.random() < 0.05]
    needed: dict[Any, Task] = {}
    stack = list(wanted)
    while stack:
        key = stack.pop()
        if key not in needed:
            needed[key] = graph[key]
            stack.extend(graph[key].dependencies)
    return Workload(
        "random",
        [Phase(needed, list(dict.fromkeys(wanted)), order(needed))],
        {key: rng.choice([100, 10**6, 10**8]) for key in needed},
        {key: rng.choice([0.001, 0.01, 0.1]) for key in needed},
    )


def test_nothing_is_lost_or_stuck(seed: int) -> None:
    rng = random.Random(seed)
    graph = workload(rng.choice(REAL)) if rng.random() < 0.2 else random_workload(rng)
    spec = Spec(
        nworkers=rng.randint(2, 8),
        nthreads=rng.choice([1, 1, 3]),
        fabric=rng.choice(list(FABRICS.values())),
        memory_nbytes=rng.choice([1e9, 1e12]),
        validate=True,
    )
    cluster = Cluster(spec, graph, seed)
    with cluster.started(gpurt):
        faults = Faults(rng.choice([1, 4]) * graph.bound_s(spec.nworkers), *(rng.randint(0, 3) for _ in range(4)))
        unleash(cluster, faults)
        report = cluster.compute()
        # All that goes wrong has gone wrong then, and is known: a pause may begin late, and last as long.
        cluster.settle(2 * faults.until_s + 5)
        cluster.validate()
        for phase in graph.phases:
            for key in phase.keys:
                holders = {ws.address for ws in cluster.scheduler.tasks[key].who_has or ()}
                assert holders <= {address for address, worker in cluster.workers.items() if key in worker.store}
        metrics = cluster.placement_metrics()
    assert report.tasks >= len(graph.sizes)
    assert metrics["errors"] == metrics["waiting"] == metrics["planned"] == 0


#: What can fail: the functions of the pure modules that a placement calls.
FALLIBLE: list[tuple[Any, str]] = [
    *((families, name) for name in ("meetings", "by_meeting", "by_position")),
    (crossings, "by_crossing"),
    *((policy, name) for name in ("holdings", "best_holders", "choose", "accepts", "with_room", "starts_sooner")),
    *((copies, name) for name in ("is_full", "droppable")),
    *((Prices, name) for name in ("move_s", "refresh")),
    *((stealing, name) for name in ("pays", "relief", "shared_out")),
    *((Queues, name) for name in ("enter", "leave", "move", "next_for", "able", "homes", "families_of", "backlog")),
]


class PolicyError(Exception):
    """What a bug would raise."""


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["at times", "always"])
@pytest.mark.parametrize(("owner", "name"), FALLIBLE)
def test_errors_in_the_policy_stall_nothing(
    owner: Any, name: str, share: float, shaken_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(shaken_seed)
    sound = getattr(owner, name)

    def fallible(*args: Any, **kwargs: Any) -> Any:
        if rng.random() < share:
            raise PolicyError(name)
        return sound(*args, **kwargs)

    # Of a tree, most tasks are planned, and wait; of a product, idle workers take some.
    kinds = [lambda: tree(rng.choice([40, 200]), fan_in=4), lambda: product(6), lambda: random_workload(rng)]
    graph = kinds[shaken_seed % 3]()
    cluster = Cluster(Spec(nworkers=rng.randint(2, 6), nthreads=rng.choice([1, 2]), validate=True), graph, shaken_seed)
    with cluster.started(gpurt):
        monkeypatch.setattr(owner, name, fallible)
        faults = Faults(graph.bound_s(cluster.spec.nworkers))
        unleash(cluster, faults)
        report = cluster.compute()
        cluster.settle(2 * faults.until_s + 5)
        cluster.validate()
        metrics = cluster.placement_metrics()
    assert report.tasks >= len(graph.sizes)
    assert metrics["waiting"] == 0
