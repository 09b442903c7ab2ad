"""Graphs of any size that are made at once: a tree, a stencil, a product, a broadcast.

Covers: :func:`tree`, :func:`stencil`, :func:`product`, :func:`broadcast`.
Does not cover: what a policy is judged by: real graphs; see :mod:`benchmarks.simulation.graphs`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dask._task_spec import Task, TaskRef

from benchmarks.simulation.workload import Phase, Workload

__all__ = ["broadcast", "product", "stencil", "tree"]

#: Bytes of a result, and seconds of a task.
NBYTES = 1_000_000
DURATION_S = 0.01


def _task(key: Any, inputs: Iterable[Any] = ()) -> Task:
    return Task(key, max, *map(TaskRef, inputs))


def _workload(name: str, tasks: Iterable[Task], keys: list[Any]) -> Workload:
    """Make a workload of tasks in the order in which they should run."""
    graph = {task.key: task for task in tasks}
    order = {key: rank for rank, key in enumerate(graph)}
    return Workload(name, [Phase(graph, keys, order)], dict.fromkeys(graph, NBYTES), dict.fromkeys(graph, DURATION_S))


def tree(leaves: int, fan_in: int = 8) -> Workload:
    """Reduce leaves, a few at a time."""
    tasks: list[Task] = []
    #: Level to the results there that wait for their siblings.
    open_levels: list[list[Any]] = [[]]

    def close(level: int) -> None:
        if level + 1 == len(open_levels):
            open_levels.append([])
        key = (f"sum{level}", len(tasks))
        tasks.append(_task(key, open_levels[level]))
        open_levels[level] = []
        open_levels[level + 1].append(key)
        if len(open_levels[level + 1]) == fan_in:
            close(level + 1)

    for i in range(leaves):
        tasks.append(_task(("leaf", i)))
        open_levels[0].append(("leaf", i))
        if len(open_levels[0]) == fan_in:
            close(0)
    level = 0
    while level < len(open_levels) - 1 or len(open_levels[level]) > 1:
        if open_levels[level]:
            close(level)
        level += 1
    return _workload("tree", tasks, [tasks[-1].key])


def stencil(side: int, steps: int = 4) -> Workload:
    """Let each block of a square take those beside it, a few times."""
    tasks = [_task(("load", i, j)) for i in range(side) for j in range(side)]
    name = "load"
    for step in range(steps):
        before, name = name, f"step{step}"
        for i in range(side):
            for j in range(side):
                near = ((i, j), (i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
                inputs = [(before, k, m) for k, m in near if 0 <= k < side and 0 <= m < side]
                tasks.append(_task((name, i, j), inputs))
    return _workload("stencil", tasks, [(name, i, j) for i in range(side) for j in range(side)])


def product(side: int) -> Workload:
    """Multiply two square matrices of blocks: as many products as the cube of a side, and a sum for each block of the result."""
    tasks = [_task((name, i, j)) for name in ("left", "right") for i in range(side) for j in range(side)]
    for i in range(side):
        for j in range(side):
            parts = [("part", i, j, k) for k in range(side)]
            tasks += [_task(part, [("left", i, part[-1]), ("right", part[-1], j)]) for part in parts]
            tasks.append(_task(("block", i, j), parts))
    return _workload("product", tasks, [("block", i, j) for i in range(side) for j in range(side)])


def broadcast(parts: int, wide: int = 2) -> Workload:
    """Let each part take some results that all of them take."""
    shared = [("shared", i) for i in range(wide)]
    tasks = list(map(_task, shared))
    for i in range(parts):
        tasks += [_task(("part", i)), _task(("joined", i), [("part", i), *shared])]
    return _workload("broadcast", tasks, [("joined", i) for i in range(parts)])
