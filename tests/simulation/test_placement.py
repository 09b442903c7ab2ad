"""What the placement is for, in the simulator: fewer bytes, and no graph much slower than with stock Dask."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

import pytest
from fronts import end_of_front

from benchmarks.placement import ordered_processes, simulate
from benchmarks.simulation.cluster import STOCK, Cluster, Spec, gpurt, run
from benchmarks.simulation.graphs import workload
from benchmarks.simulation.network import FABRICS
from benchmarks.simulation.synthetic import tree
from dask_gpurt.plugins import copies


@pytest.mark.parametrize(
    ("name", "bytes_part"),
    [
        ("aligned", 0.0),
        ("transposed", 0.0),
        ("thin-tree", 0.25),
        ("climatology", 0.25),
        ("gram-sum", 0.7),
        ("matmul-persisted", 0.7),
        ("broadcast-join", 1.1),
        ("task-shuffle", 1.1),
    ],
)
def test_bytes(name: str, bytes_part: float) -> None:
    spec = Spec(fabric=FABRICS["tcp"])
    ours, stock = run(spec, workload(name), gpurt), run(spec, workload(name), STOCK)
    assert ours.metrics["errors"] == 0
    assert ours.moved_nbytes <= bytes_part * stock.moved_nbytes
    assert ours.makespan_s <= 1.25 * stock.makespan_s


@pytest.mark.parametrize(
    ("name", "fabric", "makespan_part"),
    [("broadcast-join", "tcp", 0.75), ("matmul", "tcp", 0.6), ("kmeans", "dgx", 1.1)],
)
def test_makespan(name: str, fabric: str, makespan_part: float) -> None:
    spec = Spec(fabric=FABRICS[fabric], memory_nbytes=16e9)
    ours, stock = run(spec, workload(name), gpurt), run(spec, workload(name), STOCK)
    assert ours.makespan_s <= makespan_part * stock.makespan_s


@pytest.mark.parametrize(
    ("name", "fabric", "nworkers"),
    [
        ("rechunked-fft", "dgx", 2),
        ("cholesky", "tcp", 2),
        ("table-join", "tcp", 8),
        *(
            pytest.param(*case, marks=pytest.mark.exhaustive)
            for case in [("cholesky", "dgx", 2), ("rechunked-fft", "eff", 2), ("lu", "dgx", 2), ("stencil", "eff", 32)]
        ),
    ],
)
def test_what_was_slower_than_stock_is_not(name: str, fabric: str, nworkers: int) -> None:
    spec = Spec(nworkers=nworkers, fabric=FABRICS[fabric], memory_nbytes=max(128e9 / nworkers, 16e9))
    ours, stock = run(spec, workload(name), gpurt), run(spec, workload(name), STOCK)
    # The order of Dask's sets is another one in each process; without what this is about it was 1.17 to 1.65.
    assert ours.makespan_s <= 1.12 * stock.makespan_s


def test_what_follows_from_roots_goes_where_fewer_of_them_wait() -> None:
    with ordered_processes() as processes:
        ours, stock = processes.submit(simulate, "running-sum", "dgx", 8, seeds=3).result(timeout=100)
    parts = [mine.makespan_s / theirs.makespan_s for mine, theirs in zip(ours, stock, strict=True)]
    # 1.09 where what is planned and not sent yet does not count.
    assert median(parts) <= 1.04


@pytest.mark.parametrize(("name", "part"), [("lu", 0.97), ("cholesky", 1.02)])
def test_an_idle_worker_takes_what_waits_at_the_end_of_a_front(name: str, part: float) -> None:
    # How much is left there depends on the order of Dask's sets, which is another one in each process, but for these.
    with ordered_processes() as processes:
        assert processes.submit(end_of_front, name).result(timeout=100) <= part


def test_what_is_dear_to_move_stays_at_the_end_of_a_front() -> None:
    # A product waits for some 20 ms there, and to move one block takes 45.
    report = run(Spec(nworkers=2, fabric=FABRICS["tcp"]), workload("lu"), gpurt)
    assert "relieved" not in report.metrics["decisions"]


def test_short_memory_is_not_filled_with_what_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    # All inputs and results of the product are 40 GB, which is what the workers have together; and copies come on top.
    spec = Spec(fabric=FABRICS["tcp"], memory_nbytes=6e9)
    ours, stock = run(spec, workload("matmul"), gpurt), run(spec, workload("matmul"), STOCK)
    assert ours.metrics["decisions"]["copy-dropped"] > 0
    assert ours.makespan_s <= 1.25 * stock.makespan_s
    # Against stock, what is spilled varies by a third with the order of tasks that Dask's names give.
    monkeypatch.setattr(copies, "droppable", lambda *_: [])
    kept = run(spec, workload("matmul"), gpurt)
    assert ours.spilled_nbytes <= 0.6 * kept.spilled_nbytes


def test_moves_have_the_price_of_links_before_anything_is_moved() -> None:
    cluster = Cluster(Spec(nworkers=16, fabric=FABRICS["dgx"]), workload("thin-tree"))
    with cluster.started(gpurt):
        plugin: Any = cluster.scheduler.plugins["gpurt"]
        prices = plugin.placement.prices
        prices.refresh(cluster.scheduler.bandwidth)
        assert 1 / prices.near_s == pytest.approx(450e9)
        assert 1 / prices.far_s == pytest.approx(50e9)
        assert prices.two


@pytest.mark.parametrize("speed", [0.25, 0.05])
def test_what_was_planned_for_a_slow_worker_flows_to_others(speed: float) -> None:
    makespans: dict[str, float] = {}
    for name, policy in (("ours", gpurt), ("stock", STOCK)):
        # Tasks of a tenth of a second: what a slow worker has begun is not what counts.
        graph = tree(800)
        graph.durations.update(dict.fromkeys(graph.durations, 0.1))
        cluster = Cluster(Spec(nworkers=4, validate=True), graph, traced=True)
        with cluster.started(policy):
            cluster.numbered[0].set_speed(speed)
            makespans[name] = cluster.compute().makespan_s
            done = Counter(worker for _, what, worker, *_ in cluster.trace if what == "computed")
            cluster.settle()
            cluster.validate()
        if policy is gpurt:
            # A fair share by speed, and no more than that by half.
            assert done["worker-0"] <= 1.5 * done.total() * speed / (3 + speed) + 4
    assert makespans["ours"] <= 1.1 * makespans["stock"]


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
@pytest.mark.parametrize("policy", [gpurt, STOCK], ids=["ours", "stock"])
def test_a_thousand_workers(policy: Any) -> None:
    graph = tree(16 * 1024)
    cluster = Cluster(Spec(nworkers=1024), graph)
    with cluster.started(policy):
        report = cluster.compute()
        cluster.settle(1.0)
        cluster.validate()
    assert report.tasks == len(graph.sizes)
    assert report.makespan_s >= report.bound_s * (1 - cluster.spec.jitter)


def test_crossings_wait_for_no_worker_that_is_gone() -> None:
    # All products of a worker that dies are made elsewhere.
    graph = workload("matmul")
    cluster = Cluster(Spec(validate=True), graph)
    with cluster.started(gpurt):
        for number, when in ((1, 0.5), (5, 2.0)):
            cluster.clock.at(when, lambda number=number: cluster.remove_worker(cluster.numbered[number]))  # type: ignore[misc]
        report = cluster.compute()
        cluster.settle()
        cluster.validate()
    assert report.metrics["errors"] == 0
    assert report.metrics["decisions"]["rehomed"] > 0
