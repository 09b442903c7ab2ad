"""Jobs on real clusters whose workers have room for a part of the data.

Theory of operation
-------------------
Two clusters that were started alike live side by side, as in :mod:`benchmarks.contest`, one with dask-gpurt, and take
turns. What is limited is the data: the mark from which on both sides spill (``distributed.worker.memory.target``) is 25 %
of what the job holds at its peak. The worker's limit lies above it by what the process takes for itself and for running
tasks, so that neither side is paused, or spills for the sake of what is no data.

Beside each worker's own work a coroutine sleeps for a moment, again and again; by how much it wakes late is how long
something else kept the event loop, or the interpreter.

Covers: :class:`Limited`, :func:`beside_stock`.
Does not cover: the jobs (:mod:`benchmarks.spilling.workloads`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np
from distributed import Client, Worker, WorkerPlugin

from benchmarks.contest import clusters, dropping
from benchmarks.frame import BrokenRunError, WrongAnswerError, turns
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec

__all__ = ["Limited", "Run", "beside_stock"]

#: What a worker's process takes beside its data: code, temporaries, memory that the allocator keeps.
PROCESS_NBYTES = 768 * 2**20

#: How long the watch of the event loop sleeps.
SLEEP_S = 0.002

_WATCH = "benchmark-loop-watch"


@dataclass(frozen=True)
class Limited:
    """A job, and the room it has.

    Parameters
    ----------
    job
        Called with a client and ``scale``; returns what it holds, and a list of answers.
    scale
        Size of the data.
    capacity_nbytes
        Data that each worker may hold in memory, or on its device if ``gpu``.
    """

    job: Callable[..., tuple[Any, list[Any]]]
    scale: int
    capacity_nbytes: int
    gpu: bool = False

    @property
    def spec(self) -> ClusterSpec:
        """The cluster."""
        limit_nbytes = self.capacity_nbytes + (0 if self.gpu else PROCESS_NBYTES)
        return ClusterSpec(workers=2, threads=1, memory_limit_nbytes=limit_nbytes, gpu=self.gpu)

    @property
    def config(self) -> dict[str, object]:
        """Dask's configuration of the cluster."""
        if self.gpu:
            return {}
        limit_nbytes = self.spec.memory_limit_nbytes
        marks = {"target": 0.0, "spill": 0.75, "pause": 0.9}
        return {
            f"distributed.worker.memory.{mark}": (self.capacity_nbytes + part * PROCESS_NBYTES) / limit_nbytes
            for mark, part in marks.items()
        }


@dataclass(frozen=True)
class Run:
    """What a run cost."""

    wall_s: float
    #: The longest time that the event loop of a worker did not look.
    tick_s: float


class _Watch(WorkerPlugin):
    name = _WATCH

    def setup(self, worker: Worker) -> None:
        worker.loop.add_callback(self._begin)

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        self._task.cancel()

    def _begin(self) -> None:
        self.longest_s = 0.0
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(SLEEP_S)
            self.longest_s = max(self.longest_s, time.perf_counter() - before - SLEEP_S)


def _take_longest(dask_worker: Worker) -> float:
    watch: Any = dask_worker.plugins[_WATCH]
    longest_s: float = watch.longest_s
    watch.longest_s = 0.0
    return longest_s


def beside_stock(limited: Limited, pairs: int) -> tuple[list[Run], list[Run]]:
    """Run a job in turns on ours and on stock; return the runs of both.

    Raises
    ------
    WrongAnswerError
        If the answers differ.
    BrokenRunError
        If no worker of a side had to spill: the job was not what it should be.
    """
    ours: list[Run] = []
    stock: list[Run] = []
    expected: list[Any] | None = None
    with dask.config.set(limited.config), clusters(limited.spec) as clients:
        for client in clients.values():
            client.register_plugin(_Watch())
            _run(client, limited.job, 1)
        for _, is_ours in turns(pairs):
            client = clients[(GPURT if is_ours else STOCK).name]
            run, answers, spilled_nbytes = _run(client, limited.job, limited.scale)
            (ours if is_ours else stock).append(run)
            if not spilled_nbytes and not limited.gpu:
                raise BrokenRunError("nothing was spilled")
            expected = answers if expected is None else expected
            # Sums of floats depend on their order, by far less than one part in a million.
            if not all(np.allclose(mine, true, rtol=1e-6) for mine, true in zip(answers, expected, strict=True)):
                raise WrongAnswerError(f"{answers}, expected {expected}")
    return ours, stock


def _run(client: Client, job: Callable[..., tuple[Any, list[Any]]], scale: int) -> tuple[Run, list[Any], int]:
    with dropping(client), client.as_current():
        client.run(_take_longest)
        started = time.perf_counter()
        held, answers = job(client, scale=scale)
        wall_s = time.perf_counter() - started
        tick_s = max(client.run(_take_longest).values())
        spilled_nbytes = sum(client.run(_spilled_nbytes).values())
        del held
    return Run(wall_s, tick_s), answers, spilled_nbytes


def _spilled_nbytes(dask_worker: Worker) -> int:
    data: Any = dask_worker.data
    nbytes: int = data.spilled_total.disk
    return nbytes
