"""Jobs on real clusters whose workers have room for a part of the data.

Theory of operation
-------------------
Two clusters that were started alike live side by side, as in :mod:`benchmarks.contest`, one with dask-gpurt, and take
turns. What is limited is the data: the mark from which on both sides spill (``distributed.worker.memory.target``) is 25 %
of what the job holds at its peak. The worker's limit lies above it by what the process takes for itself and for running
tasks, so that neither side is paused, or spills for the sake of what is no data.

Beside each worker's own work a coroutine sleeps for a moment, again and again; by how much it wakes late is how long
something else kept the event loop, or the interpreter, or the processors. Full collections of Python's garbage, which take some 80 ms
of a worker and come a few times a minute at most, wherever the job is then, are told apart. A process that does nothing else
sleeps in the same way meanwhile: what it wakes late is the machine's doing.

Covers: :class:`Limited`, :func:`beside_stock`, :func:`with_room`.
Does not cover: the jobs (:mod:`benchmarks.spilling.workloads`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from typing import Any

import dask
import numpy as np
from distributed import Client, Worker, WorkerPlugin

from benchmarks.contest import clusters, dropping
from benchmarks.frame import BrokenRunError, WrongAnswerError, turns
from benchmarks.spilling.workloads import BLOCKS, JOBS, PASSES_NBYTES
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec, count_gpus, open_client

__all__ = ["Limited", "Run", "beside_stock", "has_spilled", "with_room"]

#: What a worker's process takes beside its data: code, temporaries, memory that the allocator keeps.
PROCESS_NBYTES = 768 * 2**20

#: Of Python's garbage collector. The last one is everything.
GENERATIONS = len(gc.get_threshold())
#: How long the watch of the event loop sleeps.
SLEEP_S = 0.002

WORKERS = 2

#: Room for all data, as a part of it: some of the jobs hold what they make beside what they pass over.
ROOMY = 3.0

_WATCH = "benchmark-loop-watch"


@dataclass(frozen=True)
class Limited:
    """The room that jobs have.

    Parameters
    ----------
    scale
        Size of the data of the jobs.
    part
        What the workers may hold of these in memory, or on their devices if ``gpu``.
    """

    scale: int
    part: float
    gpu: bool = False

    @property
    def workers(self) -> int:
        """How many there are; each has a GPU of its own if ``gpu``."""
        return min(WORKERS, count_gpus()) if self.gpu else WORKERS

    @property
    def capacity_nbytes(self) -> int:
        """Bytes of data that each worker may hold."""
        return int(self.scale * PASSES_NBYTES * self.part / self.workers)

    @property
    def spec(self) -> ClusterSpec:
        """The cluster."""
        limit_nbytes = self.capacity_nbytes + (0 if self.gpu else PROCESS_NBYTES)
        return ClusterSpec(workers=self.workers, threads=1, memory_limit_nbytes=limit_nbytes, gpu=self.gpu)

    @property
    def config(self) -> dict[str, float]:
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
    #: The longest time that the event loop of a worker did not look, and the same without those in which all garbage was collected.
    tick_s: float
    working_tick_s: float
    #: The longest time that a process did not look which had nothing else to do.
    idle_tick_s: float


async def _ticks() -> AsyncIterator[float]:
    """Sleep again and again; yield by how much it was too long."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(SLEEP_S)
        yield time.perf_counter() - before - SLEEP_S


class _Watch(WorkerPlugin):
    name = _WATCH

    async def setup(self, worker: Worker) -> None:  # noqa: ARG002
        self.longest_s = self.longest_working_s = 0.0
        self._collections = 0
        gc.callbacks.append(self._collects)
        self._task = asyncio.create_task(self._watch())

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        self._task.cancel()
        gc.callbacks.remove(self._collects)

    def _collects(self, phase: str, info: dict[str, int]) -> None:  # noqa: ARG002
        self._collections += info["generation"] == GENERATIONS - 1

    async def _watch(self) -> None:
        before = self._collections
        async for late_s in _ticks():
            self.longest_s = max(self.longest_s, late_s)
            if self._collections == before:
                self.longest_working_s = max(self.longest_working_s, late_s)
            before = self._collections


def _take_longest(dask_worker: Worker) -> tuple[float, float]:
    watch: Any = dask_worker.plugins[_WATCH]
    longest_s: tuple[float, float] = watch.longest_s, watch.longest_working_s
    watch.longest_s = watch.longest_working_s = 0.0
    return longest_s


async def _idle(told: Connection) -> None:
    longest_s = 0.0
    told.send(longest_s)
    async for late_s in _ticks():
        longest_s = max(longest_s, late_s)
        if told.poll():
            told.send(longest_s)
            return


def _be_idle(told: Connection) -> None:
    asyncio.run(_idle(told))


@contextlib.contextmanager
def _idle_process() -> Iterator[Callable[[], float]]:
    """Have a process that does nothing; what is yielded ends it, and returns its longest tick."""
    here, there = Pipe()
    process = get_context("spawn").Process(target=_be_idle, args=(there,), daemon=True)
    process.start()
    there.close()
    here.recv()

    def end() -> float:
        here.send(None)
        longest_s: float = here.recv()
        return longest_s

    try:
        yield end
    finally:
        process.kill()
        process.join()
        here.close()


def beside_stock(names: Iterable[str], limited: Limited, pairs: int) -> Iterator[tuple[str, list[Run], list[Run]]]:
    """Run jobs of :data:`~benchmarks.spilling.workloads.PASSES` in turns; yield the runs of each on ours and on stock.

    Raises
    ------
    WrongAnswerError
        If the answers differ.
    BrokenRunError
        If a side did not have to spill: the job was not what it should be.
    """
    with dask.config.set(limited.config), clusters(limited.spec) as clients:
        for client in clients.values():
            client.register_plugin(_Watch())
        for name in names:
            job = JOBS[name]
            for client in clients.values():
                _run(client, functools.partial(job, passes=1), 1)
            runs: dict[bool, list[Run]] = {True: [], False: []}
            expected: list[Any] | None = None
            for _, is_ours in turns(pairs):
                client = clients[(GPURT if is_ours else STOCK).name]
                run, answers, spilled = _run(client, job, limited.scale)
                runs[is_ours].append(run)
                if not spilled:
                    raise BrokenRunError(f"{name} spilled nothing")
                expected = answers if expected is None else expected
                # Sums of floats depend on their order, by far less than one part in a million.
                if not all(np.allclose(mine, true, rtol=1e-6) for mine, true in zip(answers, expected, strict=True)):
                    raise WrongAnswerError(f"{name}: {answers}, expected {expected}")
            yield name, runs[True], runs[False]


def with_room(names: Iterable[str], limited: Limited, rounds: int) -> dict[str, list[Run]]:
    """Run the same jobs on stock Dask with room for all: what is left is no store's to win.

    Raises
    ------
    BrokenRunError
        If there was not room for all.
    """
    roomy = dataclasses.replace(limited, part=ROOMY)
    found = {}
    with dask.config.set(roomy.config), open_client(roomy.spec) as client:
        client.register_plugin(_Watch())
        for name in names:
            job = JOBS[name]
            _run(client, functools.partial(job, passes=1), 1)
            runs = [_run(client, job, limited.scale) for _ in range(rounds)]
            if any(spilled for _, _, spilled in runs):
                raise BrokenRunError(f"{name} spilled although there should have been room")
            found[name] = [run for run, _, _ in runs]
    return found


def _run(client: Client, job: Callable[..., tuple[Any, list[Any]]], scale: int) -> tuple[Run, list[Any], bool]:
    with dropping(client), client.as_current(), _idle_process() as end:
        client.run(_take_longest)
        started = time.perf_counter()
        # Blocks of as many megabytes as the scale says.
        held, answers = job(client, scale=4 * scale, blocks=BLOCKS // 4)
        wall_s = time.perf_counter() - started
        ticks = client.run(_take_longest).values()
        idle_tick_s = end()
        spilled = any(client.run(has_spilled).values())
        del held
    return Run(wall_s, max(tick for tick, _ in ticks), max(tick for _, tick in ticks), idle_tick_s), answers, spilled


def has_spilled(dask_worker: Worker) -> bool:
    """Whether data has left the top tier of a worker: lies below now, or, if that tier is a device of ours, ever went down."""
    data: Any = dask_worker.data
    memory: Any = getattr(dask_worker.extensions.get("gpurt"), "memory", None)
    if memory is not None and "device_written_nbytes" in (figures := memory.metrics()):
        return bool(figures["device_written_nbytes"])
    if hasattr(data, "device_keys"):
        # dask-cuda's store: not all that belongs on the device is there.
        return any(key not in data.device for key in data.device_keys)
    return bool(data.spilled_total.disk)
