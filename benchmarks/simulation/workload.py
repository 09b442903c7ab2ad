"""Real Dask graphs with the sizes and durations that their tasks would have on large blocks.

Covers: :class:`Workload`, :class:`Recorder`.
Does not cover: the graphs themselves; see :mod:`benchmarks.simulation.graphs`.

Theory of operation
-------------------
A graph is built by Dask on small blocks, and run once, here, task by task. That gives the shape of each result; what it would be on
large blocks follows from the shapes alone: an axis that is *long* (:data:`LONG` elements or more) is cut from the side of a block and
grows with it, and a shorter one (clusters, quantiles, columns) stays as it is. Of tables, the rows grow. So a block
that is reduced along one axis has the size of a line, a partition that is split by a hash the size of a part, and a number
that of a number.

The duration of a task is that of passing over its inputs and its result once at the bandwidth of a GPU's memory, and
no less than what it takes to start it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from dask._task_spec import TaskRef, convert_legacy_graph
from dask.base import collections_to_expr
from dask.core import flatten
from dask.order import order
from dask.sizeof import sizeof

__all__ = ["Phase", "Recorder", "Workload"]

#: Elements from which on an axis is taken to be cut from a block's side.
LONG = 8
#: Bytes per second at which a task passes over what it reads and writes.
MEMORY_BANDWIDTH = 5e11
#: The shortest and the longest task.
SHORTEST_S, LONGEST_S = 0.001, 0.005
#: The least that any result takes.
LEAST_NBYTES = 64


@dataclass(frozen=True)
class Phase:
    """A graph that the user submits, and waits for.

    Parameters
    ----------
    graph
        Key to task, without what is in memory already.
    keys
        The results that are wanted.
    order
        Key to rank.
    released
        Results that are let go when the phase is over.
    """

    graph: Mapping[Any, Any]
    keys: Sequence[Any]
    order: Mapping[Any, int]
    released: Sequence[Any] = ()


@dataclass
class Workload:
    """What a user computes.

    Attributes
    ----------
    phases
        Its graphs.
    sizes, durations
        Key to bytes of the result, and to seconds on an idle worker.
    """

    name: str
    phases: list[Phase] = field(default_factory=list)
    sizes: dict[Any, int] = field(default_factory=dict)
    durations: dict[Any, float] = field(default_factory=dict)

    def bound_s(self, nthreads: int) -> float:
        """Return the least time in which it can be done: of each phase the longest path, or all work shared equally."""
        total_s = 0.0
        for phase in self.phases:
            ends: dict[Any, float] = {}
            for key in sorted(phase.graph, key=phase.order.__getitem__):
                inputs = (ends.get(dep, 0.0) for dep in phase.graph[key].dependencies)
                ends[key] = max(inputs, default=0.0) + self.durations[key]
            total_s += max(0.0, *ends.values(), sum(map(self.durations.__getitem__, phase.graph)) / nthreads)
        return total_s


class Recorder:
    """Record what a user computes.

    Parameters
    ----------
    name
        Of the workload.
    scale
        How much longer a long axis of an array is on large blocks.
    rows_scale
        How many more rows a table has.

    Attributes
    ----------
    workload
        What has been recorded.
    """

    def __init__(self, name: str, scale: int = 128, rows_scale: int = 10_000) -> None:
        self.workload = Workload(name)
        self._scale = scale
        self._rows_scale = rows_scale
        #: Key to the value of what is held in memory, on small blocks.
        self._held: dict[Any, Any] = {}

    def persist(self, *collections: Any) -> Any:
        """Compute collections and keep them: returns them, or the one, with their blocks in memory."""
        kept = []
        for collection, keys in zip(collections, self._submit(collections), strict=True):
            rebuild, arguments = collection.__dask_postpersist__()
            # As Client.persist does it, with what futures are in a graph.
            kept.append(rebuild({key: TaskRef(key) for key in flatten(keys)}, *arguments))
        return kept[0] if len(kept) == 1 else kept

    def compute(self, *collections: Any) -> None:
        """Compute collections, whose results stay on the workers until the end."""
        self._submit(collections)

    def _submit(self, collections: tuple[Any, ...]) -> list[Any]:
        """Add a phase; return the keys of each collection."""
        expression = collections_to_expr(collections, True).optimize()
        keys = expression.__dask_keys__()
        wanted = list(dict.fromkeys(flatten(keys)))
        graph = _culled(convert_legacy_graph(expression.__dask_graph__()), wanted, self._held)
        ranks = {key: rank for key, rank in order(graph).items() if key in graph}
        self._run(graph, ranks, set(wanted))
        self.workload.phases.append(Phase(graph, wanted, ranks))
        return list(keys)

    def _run(self, graph: Mapping[Any, Any], ranks: Mapping[Any, int], wanted: set[Any]) -> None:
        values = dict(self._held)
        uses = Counter(dep for task in graph.values() for dep in task.dependencies)
        sizes, durations = self.workload.sizes, self.workload.durations
        for key in sorted(graph, key=ranks.__getitem__):
            task = graph[key]
            value = values[key] = task({dep: values[dep] for dep in task.dependencies})
            sizes[key] = max(LEAST_NBYTES, self._nbytes(value))
            touched = sizes[key] + sum(map(sizes.__getitem__, task.dependencies))
            durations[key] = min(max(SHORTEST_S, touched / MEMORY_BANDWIDTH), LONGEST_S)
            if key in wanted:
                self._held[key] = value
            for dep in task.dependencies:
                uses[dep] -= 1
                if not uses[dep]:
                    del values[dep]

    def _nbytes(self, value: Any) -> int:
        """Return what a value would take on large blocks."""
        match value:
            case np.ndarray():
                return math.prod(self._long(side, self._scale) for side in value.shape) * value.itemsize
            case pd.DataFrame():
                row_nbytes = sum(dtype.itemsize for dtype in value.dtypes)
                return int(row_nbytes * self._long(len(value), self._rows_scale))
            case pd.Series() | pd.Index():
                return int(value.dtype.itemsize * self._long(len(value), self._rows_scale))
            case tuple() | list() | set():
                return sum(map(self._nbytes, value))
            case dict():
                return sum(map(self._nbytes, value.values()))
        return int(sizeof(value))

    @staticmethod
    def _long(side: int, scale: int) -> int:
        return side * scale if side >= LONG else side


def _culled(graph: Mapping[Any, Any], wanted: Iterable[Any], held: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return what ``wanted`` needs of a graph, without what is held."""
    found: dict[Any, Any] = {}
    stack = [key for key in wanted if key not in held]
    while stack:
        key = stack.pop()
        if key not in found:
            found[key] = graph[key]
            stack += [dep for dep in graph[key].dependencies if dep not in held]
    return found
