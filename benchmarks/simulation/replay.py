"""The graphs of the simulator on a real cluster of this machine, to see whether the simulator moves the bytes that a real one moves.

Covers: :func:`scaled`, :func:`replay`.
Does not cover: right answers: tests of the placement compare them with NumPy's and pandas'.

Theory of operation
-------------------
A workload is replayed task by task, as its user submits it, on the scheduler, workers and sockets of a ``LocalCluster``. What stands in for
a task sleeps as long as the task would take, and returns as many bytes as its result has: who computes what is decided by
durations and sizes alone, and six workers that sleep need no six cores. Sizes are divided, and durations multiplied,
so that they are far from what a message and an event loop take; the simulator is given the same ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import dask
import numpy as np
from dask._task_spec import Task, TaskRef
from distributed import Client, Future, LocalCluster, wait

import dask_gpurt
from benchmarks.simulation.cluster import Spec
from benchmarks.simulation.network import Fabric
from benchmarks.simulation.workload import Phase, Workload

__all__ = ["LOOPBACK", "NWORKERS", "replay", "scaled"]

NWORKERS = 6
#: What a replay divides sizes by, and multiplies durations with: half a megabyte for most blocks, and 10 to 50 ms for a task.
SIZES, DURATIONS = 256, 10
#: The least that a result has.
LEAST_NBYTES = 64
#: The cluster of a replay as the simulator has it: sockets of one machine, and one process that serves them all.
LOOPBACK = Spec(nworkers=NWORKERS, fabric=Fabric(5e8, None), latency_s=0.002, contention=0.0)
#: A replay that takes longer hangs.
LIMIT_S = 120


@dataclass(frozen=True)
class _StandIn:
    """What stands in for a task."""

    nbytes: int
    duration_s: float

    def __call__(self, *_: Any) -> Any:
        time.sleep(self.duration_s)
        return np.zeros(self.nbytes, "u1")


def scaled(workload: Workload, *, sizes: float = SIZES, durations: float = DURATIONS) -> Workload:
    """Return the workload with sizes that are divided, durations that are multiplied, and tasks that have both."""
    nbytes = {key: max(LEAST_NBYTES, int(size / sizes)) for key, size in workload.sizes.items()}
    seconds = {key: durations * duration_s for key, duration_s in workload.durations.items()}
    phases = []
    for phase in workload.phases:
        graph = {
            key: Task(key, _StandIn(nbytes[key], seconds[key]), *map(TaskRef, sorted(task.dependencies, key=str)))
            for key, task in phase.graph.items()
        }
        phases.append(replace(phase, graph=graph))
    return Workload(workload.name, phases, nbytes, seconds)


def replay(workload: Workload, *, ours: bool) -> int:
    """Compute a scaled workload on a fresh cluster; return the bytes that its workers have fetched from each other."""
    with (
        dask.config.set({"distributed.worker.memory.terminate": False, "distributed.worker.memory.pause": False}),
        LocalCluster(
            n_workers=NWORKERS,
            threads_per_worker=1,
            processes=False,
            protocol="tcp",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
            # Connections of a cluster that closes break while heartbeats are on their way.
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        if ours:
            dask_gpurt.install(client, memory=False, shuffle=False)
        held: dict[Any, Future[Any]] = {}
        for phase in workload.phases:
            held.update(_submit(client, phase, held))
            wait([held[key] for key in phase.keys], timeout=LIMIT_S)
            for key in phase.released:
                del held[key]
        return sum(client.run(_fetched_nbytes).values())


def _submit(client: Client, phase: Phase, held: Mapping[Any, Future[Any]]) -> dict[Any, Future[Any]]:
    graph = {
        key: Task(key, task.func, *(held.get(ref.key, ref) for ref in task.args)) for key, task in phase.graph.items()
    }
    new = [key for key in phase.keys if key in graph]
    return dict(zip(new, client.get(graph, new, sync=False), strict=True))


def _fetched_nbytes(dask_worker: Any) -> int:
    return sum(entry["total"] for entry in dask_worker.transfer_incoming_log)
