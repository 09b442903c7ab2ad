"""Records traces on a real cluster that dask-gpurt was not installed on.

Theory of operation
-------------------
Stock Dask decides where tasks run, and memory is unlimited, so that a trace is of the job and not of any store. A worker
plugin stands before the worker's data and its two readers (tasks that start, peers that are served), and hears of the
transitions of the worker's tasks; a scheduler plugin writes down what the scheduler learns. All processes are on one
machine and note the same monotonic clock, by which their notes are merged.

A buffer is known by the address of the object that owns it, as in the product (``codec.footprint``). An address is used
again only when all values in the buffer were deleted, which is noted before.

Covers: :func:`record`, :func:`record_on_cluster`.
Does not cover: what a store makes of it (:mod:`benchmarks.spilling.replay`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import dask
from distributed import Client, Scheduler, SchedulerPlugin, Worker, WorkerPlugin

from benchmarks.contest import dropping
from benchmarks.spilling.trace import Delete, End, Event, Graph, Known, Put, Seen, Serve, Start, Trace
from dask_gpurt import seams
from dask_gpurt.demo.cluster import ClusterSpec, open_client
from dask_gpurt.memory.codec import footprint

__all__ = ["record", "record_on_cluster"]

#: When, and what.
Note = tuple[float, Event]

_NAME = "benchmark-recorder"


class _Notes:
    def __init__(self) -> None:
        self._notes: list[Note] = []
        self._own_buffers = 0

    def add(self, event: Event) -> None:
        self._notes.append((time.monotonic(), event))

    def put(self, key: Hashable, value: object) -> None:
        buffer, buffer_nbytes, nbytes = footprint(value)
        if buffer is None:
            self._own_buffers -= 1
            buffer = self._own_buffers
        self.add(Put(key, nbytes, buffer, buffer_nbytes))

    def take(self) -> list[Note]:
        notes, self._notes = self._notes, []
        return notes


class _Store(dict[Hashable, object]):
    """``worker.data`` of a worker without limits, which is a plain dict, too."""

    def __init__(self, notes: _Notes) -> None:
        super().__init__()
        self._notes = notes

    def __setitem__(self, key: Hashable, value: object) -> None:
        self._notes.put(key, value)
        super().__setitem__(key, value)

    def __delitem__(self, key: Hashable) -> None:
        super().__delitem__(key)
        self._notes.add(Delete(key))


class _WorkerRecorder(WorkerPlugin):
    name = _NAME

    def setup(self, worker: Worker) -> None:
        self.notes = _Notes()
        self._worker = worker
        self._hooks = seams.worker_hooks(worker)
        self._inputs: dict[Hashable, tuple[Hashable, ...]] = {}
        self._stock = seams.worker_store(worker)
        store = _Store(self.notes)
        store.update(self._stock)
        seams.set_worker_store(worker, store)
        seams.set_worker_hooks(worker, seams.WorkerHooks(execute=self._execute, get_data=self._get_data))

    def teardown(self, worker: Worker) -> None:
        self._stock.update(seams.worker_store(worker))
        seams.set_worker_store(worker, self._stock)
        seams.restore_worker_hooks(worker, self._hooks)

    def transition(self, key: Any, start: str, finish: str, **kwargs: Any) -> None:  # noqa: ARG002
        task = seams.worker_task(self._worker, key)
        inputs: tuple[Hashable, ...] | None = None
        if task is not None:
            inputs = tuple(seams.input_keys(self._worker, task))
            inputs = None if self._inputs.get(key, ()) == inputs else inputs
        if inputs is not None:
            self._inputs[key] = inputs
        if finish == "forgotten":
            self._inputs.pop(key, None)
        self.notes.add(Seen(key, finish, None if task is None else task.priority, inputs))

    async def _execute(self, key: Any, *, stimulus_id: str) -> Any:
        task = seams.worker_task(self._worker, key)
        self.notes.add(Start(key, () if task is None else tuple(seams.input_keys(self._worker, task))))
        try:
            return await self._hooks.execute(key, stimulus_id=stimulus_id)
        finally:
            self.notes.add(End(key))

    async def _get_data(self, comm: Any, keys: Any, who: str | None = None, serializers: Any = None) -> Any:
        there = seams.worker_store(self._worker)
        self.notes.add(Serve(tuple(key for key in keys if key in there), who))
        return await self._hooks.get_data(comm, keys, who=who, serializers=serializers)


class _SchedulerRecorder(SchedulerPlugin):
    name = _NAME

    def __init__(self) -> None:
        self.notes = _Notes()

    async def start(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def update_graph(
        self,
        scheduler: Scheduler,
        *,
        keys: set[Any],
        tasks: list[Any],
        priority: dict[Any, tuple[float, ...]],
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        known = scheduler.tasks
        self.notes.add(
            Graph(
                tuple((key, priority[key], tuple(ts.key for ts in known[key].dependencies)) for key in tasks),
                tuple(keys),
            )
        )

    def transition(
        self,
        key: Any,
        start: str,  # noqa: ARG002
        finish: str,
        *args: Any,  # noqa: ARG002
        worker: str | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        task = self._scheduler.tasks.get(key)
        if task is not None and task.processing_on is not None:
            worker = task.processing_on.address
        self.notes.add(Known(key, finish, worker))


def _take_from_scheduler(dask_scheduler: Scheduler) -> list[Note]:
    recorder: Any = dask_scheduler.plugins[_NAME]
    notes: list[Note] = recorder.notes.take()
    return notes


def _take_from_worker(dask_worker: Worker) -> list[Note]:
    recorder: Any = dask_worker.plugins[_NAME]
    notes: list[Note] = recorder.notes.take()
    return notes


def record(client: Client, jobs: Mapping[str, Callable[[Client], object]]) -> Iterator[tuple[str, list[Trace]]]:
    """Run jobs one after another; yield the name of each, and the traces of the workers.

    What a job returns is held until its trace was taken, as its user would.
    """
    client.register_plugin(_WorkerRecorder())
    client.register_plugin(_SchedulerRecorder())
    try:
        # A job is to be seen task by task, as graphs of blocks are.
        with dask.config.set({"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"}):
            for name, job in jobs.items():
                with dropping(client):
                    client.run_on_scheduler(_take_from_scheduler)
                    client.run(_take_from_worker)
                    result = job(client)
                    known = client.run_on_scheduler(_take_from_scheduler)
                    seen = client.run(_take_from_worker)
                    del result
                yield name, [_merge(notes, known, len(seen), address) for address, notes in sorted(seen.items())]
    finally:
        client.unregister_worker_plugin(_NAME)
        client.unregister_scheduler_plugin(_NAME)


def record_on_cluster(jobs: Mapping[str, Callable[[Client], object]]) -> Iterator[tuple[str, list[Trace]]]:
    """As :func:`record`, on a cluster of two worker processes of one thread, without limits."""
    with open_client(ClusterSpec(workers=2, threads=1, memory_limit_nbytes=0)) as client:
        yield from record(client, jobs)


def _merge(own: list[Note], known: list[Note], nworkers: int, address: str) -> Trace:
    # Of notes of one time the worker's come first: what the scheduler knows has yet to travel.
    notes = sorted([*own, *known], key=lambda note: note[0])
    return Trace(tuple(event for _, event in notes), nworkers, address)
