"""What the placement gains, on simulated clusters: makespan, bytes moved, memory and spilling beside stock Dask.

Cases are ``GRAPH-FABRIC-N``: one of :data:`benchmarks.simulation.graphs.GRAPHS`, what joins the workers, and how many there are; see
:mod:`benchmarks.simulation`. ``geomean-FABRIC-N`` is over the graphs that were tuned on, ``geomean-aside-FABRIC-N`` over those kept
aside, ``geomean-all-FABRIC-N`` over all, and ``worst-FABRIC-N`` the graph (of all) in which ours is worst. There is no answer to compare; that all tasks have been computed,
and that the placement met no error, is checked. One seed is one pair.

``real-GRAPH`` replays a graph on a real cluster of 6 workers, see :mod:`benchmarks.simulation.replay`, and compares its bytes with stock's,
and those of either side with what the simulator says of the same graph: these lines should be close to 1.

In means and worst cases, bytes below :data:`NOTHING_NBYTES` count as that many: whoever moves a number instead of nothing is
not infinitely worse.

Simulations run in processes of their own with one ``PYTHONHASHSEED``, so that they are the same in every run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from benchmarks.frame import BrokenRunError, Line, Subject, line_of_pairs, turns
from benchmarks.simulation.cluster import STOCK, Report, Spec, StuckError, gpurt, run
from benchmarks.simulation.graphs import ASIDE, GRAPHS, TUNED, workload
from benchmarks.simulation.network import FABRICS
from benchmarks.simulation.replay import LOOPBACK, replay, scaled

#: Workers of the clusters.
SIZES = (2, 8, 32)
#: What a quick run looks at.
QUICK = (("tcp", 8), ("dgx", 8))
#: Seeds: where the network is the bottleneck, single ones vary by some 15 %. Of a graph, the median of the pairs' ratios counts.
SEEDS = 3
#: Memory of all workers together, and of one at least.
MEMORY_NBYTES, WORKER_NBYTES = 128e9, 16e9
#: Half of a block: less than that says nothing.
NOTHING_NBYTES = 2**26
PEER = "default"
#: Graphs that are replayed: of each kind one that takes a few seconds on a real cluster.
REAL = (
    "thin-tree",
    "matmul",
    "matmul-persisted",
    "gram-sum",
    "tsqr",
    "aligned",
    "transposed",
    "stencil",
    "broadcast-join",
    "climatology",
)
REAL_RUNS = 3
#: A quarter of a replayed block: less than that says nothing.
NOTHING_REAL_NBYTES = 2**17
#: Metric to the field of a report. Where a metric is left out, there is nothing to say: one node has no other.
METRICS = {
    "makespan": "makespan_s",
    "bytes": "moved_nbytes",
    "between-nodes": "between_nbytes",
    "peak": "peak_nbytes",
    "spilled": "spilled_nbytes",
}

#: The reports of ours and of stock, a pair a seed.
Pairs = tuple[list[Report], list[Report]]


def simulate(name: str, fabric: str, nworkers: int, seeds: int) -> Pairs:
    """Run a graph on a cluster with both.

    Raises
    ------
    BrokenRunError
        If a task was not computed, or the placement met an error.
    """
    graph = workload(name)
    spec = Spec(
        nworkers=nworkers,
        fabric=FABRICS[fabric],
        memory_nbytes=max(MEMORY_NBYTES / nworkers, WORKER_NBYTES),
    )
    found: list[list[Report]] = []
    for policy in (gpurt, STOCK):
        try:
            reports = [run(spec, graph, policy, seed) for seed in range(seeds)]
        except StuckError as error:
            raise BrokenRunError(str(error)) from error
        for report in reports:
            if report.tasks < sum(len(phase.graph) for phase in graph.phases):
                raise BrokenRunError(f"{name}: {report.tasks} tasks have been computed")
            if report.metrics.get("errors"):
                raise BrokenRunError(f"{name}: the placement met {report.metrics['errors']} errors")
        found.append(reports)
    return found[0], found[1]


@contextlib.contextmanager
def ordered_processes() -> Iterator[ProcessPoolExecutor]:
    """Have processes in which sets have one order in every run."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
            yield processes
    finally:
        del os.environ["PYTHONHASHSEED"]
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before


def graphs_on(fabric: str, nworkers: int, names: Sequence[str], *, quick: bool) -> Iterator[tuple[str, Pairs]]:
    """Run graphs on a cluster."""
    with ordered_processes() as processes:
        job = partial(simulate, fabric=fabric, nworkers=nworkers, seeds=1 if quick else SEEDS)
        yield from zip(names, processes.map(job, names), strict=True)


def lines_of(case: str, nworkers: int, pairs: Pairs, *, floored: bool = False) -> Iterator[Line]:
    """Make the lines of a graph; floored: with bytes as they count in means and worst cases."""
    for metric, name in METRICS.items():
        if metric != "between-nodes" or nworkers > FABRICS["dgx"].node_size:
            least = NOTHING_NBYTES if floored and metric != "makespan" else 0
            mine, theirs = ([max(getattr(report, name), least) for report in reports] for reports in pairs)
            yield line_of_pairs(case, metric, mine, theirs, PEER)


def one(name: str, fabric: str, nworkers: int, quick: bool) -> Iterator[Line]:
    """Run one graph."""
    for _, pairs in graphs_on(fabric, nworkers, [name], quick=quick):
        yield from lines_of(f"{name}-{fabric}-{nworkers}", nworkers, pairs)


def cluster(fabric: str, nworkers: int, quick: bool) -> Iterator[Line]:
    """Run all graphs on one cluster, and sum up."""
    found: dict[str, dict[str, Line]] = {}
    for name, pairs in graphs_on(fabric, nworkers, list(GRAPHS), quick=quick):
        case = f"{name}-{fabric}-{nworkers}"
        yield from lines_of(case, nworkers, pairs)
        found[name] = {line.metric: line for line in lines_of(case, nworkers, pairs, floored=True)}
    for metric in next(iter(found.values())):
        lines = {name: of_graph[metric] for name, of_graph in found.items()}
        for label, part in (("geomean", TUNED), ("geomean-aside", ASIDE), ("geomean-all", GRAPHS)):
            yield _mean(f"{label}-{fabric}-{nworkers}", [lines[name] for name in part])
        worst = min(lines.values(), key=lambda line: line.ratio)
        print(f"worst in {metric}: {worst.case}", flush=True)
        yield replace(worst, case=f"worst-{fabric}-{nworkers}")


def _mean(case: str, lines: Sequence[Line]) -> Line:
    ours, peer = (statistics.geometric_mean(getattr(line, side) for line in lines) for side in ("ours", "peer"))
    return line_of_pairs(case, lines[0].metric, [ours], [peer], PEER)


def real(name: str, quick: bool) -> Iterator[Line]:
    """Replay a graph on real clusters, in turns, and simulate the same."""
    graph = scaled(workload(name))
    found: dict[bool, list[float]] = {True: [], False: []}
    for _, ours in turns(1 if quick else REAL_RUNS):
        found[ours].append(max(replay(graph, ours=ours), NOTHING_REAL_NBYTES))
    case = f"real-{name}"
    yield line_of_pairs(case, "bytes", found[True], found[False], PEER)
    with ordered_processes() as processes:
        for label, ours in (("bytes-simulated", True), ("default-bytes-simulated", False)):
            simulated = processes.submit(_replayed, name, ours, len(found[ours])).result()
            yield line_of_pairs(case, label, found[ours], simulated, "simulator")


def _replayed(name: str, ours: bool, seeds: int) -> list[float]:
    """Simulate what is replayed; return the bytes."""
    graph = scaled(workload(name))
    reports = [run(LOOPBACK, graph, gpurt if ours else STOCK, seed) for seed in range(seeds)]
    return [float(max(report.moved_nbytes, NOTHING_REAL_NBYTES)) for report in reports]


def everything(quick: bool) -> Iterator[Line]:
    """Run all graphs on all clusters; quick: on two, with one seed."""
    for fabric, nworkers in QUICK if quick else [(fabric, nworkers) for fabric in FABRICS for nworkers in SIZES]:
        yield from cluster(fabric, nworkers, quick)
    for name in () if quick else REAL:
        yield from real(name, quick)


CASES: Mapping[str, Callable[[bool], Iterator[Line]]] = (
    {f"geomean-{fabric}-{nworkers}": partial(cluster, fabric, nworkers) for fabric in FABRICS for nworkers in SIZES}
    | {
        f"{name}-{fabric}-{nworkers}": partial(one, name, fabric, nworkers)
        for name in GRAPHS
        for fabric in FABRICS
        for nworkers in SIZES
    }
    | {f"real-{name}": partial(real, name) for name in REAL}
)

SUBJECT = Subject("placement", "makespan, bytes and memory on simulated clusters", everything, CASES)
