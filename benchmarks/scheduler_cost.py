"""What the placement costs the scheduler: processor time a task beside stock's, in a simulated cluster.

``tree``, ``stencil`` and ``broadcast`` run on 32, 256 and 1,024 workers; what is counted is the time of the thread in the scheduler's own
handlers, callbacks and plugins, and not that of workers or of the simulator.

``million-tree`` and ``million-product`` submit a graph of a million tasks to 256 workers, each side in a process of its own: the processor
time and the memory until it is planned and its first tasks are sent, and what is above stock's of that, beside :data:`LIMITS`.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from benchmarks.frame import Line, Subject, line_of_pairs, turns
from benchmarks.simulation.cluster import STOCK, Cluster, Spec, gpurt
from benchmarks.simulation.synthetic import broadcast, product, stencil, tree
from benchmarks.simulation.workload import Workload

SIZES = (32, 256, 1024)
#: Graphs by workers: some tasks for each of them.
GRAPHS: Mapping[str, Callable[[int], Workload]] = {
    "tree": lambda nworkers: tree(max(4_000, 8 * nworkers)),
    "stencil": lambda nworkers: stencil(max(32, int((2 * nworkers) ** 0.5))),
    "broadcast": lambda nworkers: broadcast(max(2_000, 4 * nworkers)),
}
#: A tree of 875,000 leaves, and the product of two matrices of 99 by 99 blocks.
MILLION: Mapping[str, Callable[[], Workload]] = {"tree": lambda: tree(875_000), "product": lambda: product(99)}
#: What planning a million tasks may take above stock: seconds and bytes.
LIMITS = {"submit_cpu_s": 20.0, "peak_rss_nbytes": 2e9}
PAIRS = 5
PEER = "stock"


def cost(name: str, nworkers: int, quick: bool) -> Iterator[Line]:
    """Run a graph in turns, and count the scheduler's time; quick: once."""
    graph = GRAPHS[name](nworkers)
    spent: dict[bool, list[float]] = {True: [], False: []}
    for number, ours in turns(1 if quick else PAIRS):
        cluster = Cluster(Spec(nworkers=nworkers), graph, seed=number)
        with cluster.started(gpurt if ours else STOCK):
            gc.collect()
            gc.disable()
            try:
                report = cluster.compute()
            finally:
                gc.enable()
        spent[ours].append(1e6 * report.scheduler_cpu_s / report.tasks)
    yield line_of_pairs(f"{name}-{nworkers}", "us_per_task", spent[True], spent[False], PEER)


def _submit(name: str, ours: bool) -> tuple[float, int]:
    """Submit a million tasks; return seconds and peak of memory."""
    graph = MILLION[name]()
    cluster = Cluster(Spec(nworkers=256), graph)
    with cluster.started(gpurt if ours else STOCK):
        started = time.thread_time()
        cluster.submit(graph.phases[0])
        return time.thread_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def million(name: str, quick: bool) -> Iterator[Line]:  # noqa: ARG001 - it is no part of a quick run
    """Submit a million tasks."""
    context = multiprocessing.get_context("spawn")
    found = []
    for ours in (True, False):
        with ProcessPoolExecutor(1, context) as process:
            found.append(process.submit(_submit, name, ours).result())
    for (metric, limit), mine, theirs in zip(LIMITS.items(), *found, strict=True):
        yield line_of_pairs(f"million-{name}", metric, [mine], [theirs], PEER)
        yield line_of_pairs(f"million-{name}", f"{metric}-above-stock", [max(mine - theirs, 0)], [limit], "limit")


def everything(quick: bool) -> Iterator[Line]:
    """Run all; quick: once on 32 and 256 workers."""
    for case, run in CASES.items():
        if not quick or case.endswith(("-32", "-256")):
            yield from run(quick)


CASES: Mapping[str, Callable[[bool], Iterator[Line]]] = {
    f"{name}-{nworkers}": partial(cost, name, nworkers) for name in GRAPHS for nworkers in SIZES
} | {f"million-{name}": partial(million, name) for name in MILLION}

SUBJECT = Subject("scheduler_cost", "processor time of the scheduler a task", everything, CASES)
