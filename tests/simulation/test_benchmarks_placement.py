"""The benchmarks of the placement: their lines, and the graphs that are made at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import placement
from benchmarks.__main__ import main
from benchmarks.simulation.cluster import STOCK, Report, Spec, run
from benchmarks.simulation.synthetic import broadcast, stencil, tree


def test_a_graph_beside_stock(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "out.json"
    assert main(["placement", "--quick", "--case", "thin-tree-tcp-2", "--json", str(path)]) == 0
    lines = {line["metric"]: line for line in json.loads(path.read_text())["lines"]}
    assert list(lines) == ["makespan", "bytes", "peak", "spilled"]
    assert {line["peer_name"] for line in lines.values()} == {"default"}
    assert lines["bytes"]["ratio"] > 2
    assert "placement thin-tree-tcp-2 makespan ratio=" in capsys.readouterr().out


def a_report(makespan_s: float, moved_nbytes: float) -> Report:
    return Report(makespan_s, 1.0, int(moved_nbytes), 0, 1, 0, 1, 0.0, {})


def test_the_worst_is_by_the_median_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the medians, "one" is worse by a third; of each pair but one it is better.
    pairs = {
        "one": ([3.0, 4.0, 9.0], [3.1, 4.1, 1.0]),
        "two": ([2.0, 2.0, 2.0], [1.9, 1.9, 1.9]),
    }
    found = {
        name: ([a_report(s, 0) for s in ours], [a_report(s, 10.0) for s in stock])
        for name, (ours, stock) in pairs.items()
    }
    monkeypatch.setattr(placement, "graphs_on", lambda *_, **__: list(found.items()))
    monkeypatch.setattr(placement, "TUNED", ("one",))
    monkeypatch.setattr(placement, "ASIDE", ("two",))
    monkeypatch.setattr(placement, "GRAPHS", ("one", "two"))
    lines = {(line.case, line.metric): line for line in placement.cluster("tcp", 8, quick=False)}
    assert lines["worst-tcp-8", "makespan"].ratio == lines["two-tcp-8", "makespan"].ratio == pytest.approx(0.95)
    assert lines["worst-tcp-8", "makespan"].pairs == 3
    # Nothing beside a few bytes is no gain without end.
    assert lines["worst-tcp-8", "bytes"].ratio == 1.0
    assert lines["one-tcp-8", "bytes"].ratio > 1e6


def test_graphs_that_are_made_at_once() -> None:
    reduced = tree(100, fan_in=4)
    (phase,) = reduced.phases
    assert len(phase.keys) == 1
    assert sum(key[0] == "leaf" for key in phase.graph) == 100
    assert all(len(task.dependencies) <= 4 for task in phase.graph.values())
    assert len(stencil(5, steps=2).phases[0].graph) == 75
    assert len(broadcast(10).phases[0].graph) == 22


@pytest.mark.parametrize("graph", [tree(100), stencil(6), broadcast(40)], ids=lambda graph: graph.name)
def test_they_run(graph: Any) -> None:
    report = run(Spec(nworkers=4), graph, STOCK)
    assert report.tasks == len(graph.sizes)
    assert report.scheduler_cpu_s > 0
