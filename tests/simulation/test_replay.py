"""The simulator beside a real cluster: the same graphs, the same bytes."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.placement import NOTHING_REAL_NBYTES, REAL
from benchmarks.simulation.cluster import STOCK, gpurt, run
from benchmarks.simulation.graphs import workload
from benchmarks.simulation.replay import DURATIONS, LOOPBACK, SIZES, replay, scaled

#: Little moves in a factorization of tall blocks: one block that is computed elsewhere on a busy machine is much of that.
TOLERANT = ("tsqr",)


def test_a_scaled_graph_is_the_same_graph() -> None:
    graph = workload("tsqr")
    small = scaled(graph)
    assert [list(phase.graph) for phase in small.phases] == [list(phase.graph) for phase in graph.phases]
    for before, after in zip(graph.phases, small.phases, strict=True):
        assert all(task.dependencies == before.graph[key].dependencies for key, task in after.graph.items())
    key = max(small.phases[0].graph, key=graph.sizes.__getitem__)
    task = small.phases[0].graph[key]
    assert task(dict.fromkeys(task.dependencies)).nbytes == small.sizes[key]
    assert small.sizes[key] == graph.sizes[key] // SIZES
    assert small.durations[key] == graph.durations[key] * DURATIONS


def test_a_tree_moves_far_less_than_with_stock_on_a_real_cluster_too() -> None:
    graph = scaled(workload("thin-tree"))
    simulated = run(LOOPBACK, graph, gpurt).moved_nbytes
    ours, stock = replay(graph, ours=True), replay(graph, ours=False)
    assert ours < 0.5 * stock
    assert ours >= 0.8 * simulated


@pytest.mark.exhaustive
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "stock"])
@pytest.mark.parametrize("name", [name for name in REAL if name not in TOLERANT])
def test_the_simulator_moves_what_a_real_cluster_moves(name: str, ours: bool) -> None:
    graph = scaled(workload(name))
    simulated = statistics.median(
        run(LOOPBACK, graph, gpurt if ours else STOCK, seed).moved_nbytes for seed in range(3)
    )
    moved = statistics.median(replay(graph, ours=ours) for _ in range(3))
    assert abs(moved - simulated) <= max(0.2 * simulated, NOTHING_REAL_NBYTES)
