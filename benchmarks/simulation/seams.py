"""The private names of distributed that the simulator uses, and where it puts its clock and streams.

What dask-gpurt itself uses stands in :mod:`dask_gpurt.seams`; these are of no use to it. A test reads the sources of the simulator and
fails if another of its modules touches a private name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from distributed import Scheduler
from distributed.http.routing import RoutingApplication
from distributed.worker_state_machine import TaskState

from benchmarks.simulation.workload import Phase

__all__ = ["OfflineScheduler", "replaced", "submit"]

#: Modules whose ``time`` and ``monotonic`` are read from the virtual clock. ``dask_gpurt``'s too: it makes ids of them.
_TIMED = (
    "distributed.scheduler",
    "distributed.stealing",
    "distributed.active_memory_manager",
    "distributed.worker_state_machine",
    "dask_gpurt.plugins.placement",
)


class OfflineScheduler(Scheduler):
    """The scheduler without a web server. It is never started, so that it listens nowhere."""

    def start_http_server(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start nothing; there is an application with no pages."""
        self.http_application = RoutingApplication([])


@contextlib.contextmanager
def replaced(now: Callable[[], float], stream: Callable[..., Any]) -> Iterator[None]:
    """Replace the clock of :data:`_TIMED`, and what a scheduler makes to write to a worker that joins.

    A worker's ``TaskState`` is hashed by its key meanwhile, and not by where it lies: that would make the order
    of a set another one in each run.
    """
    with contextlib.ExitStack() as stack:
        for name in _TIMED:
            module = importlib.import_module(name)
            for function in ("time", "monotonic"):
                if hasattr(module, function):
                    stack.enter_context(_attribute(module, function, now))
        stack.enter_context(_attribute(importlib.import_module("distributed.scheduler"), "BatchedSend", stream))
        stack.enter_context(_attribute(TaskState, "__hash__", lambda task: hash(task.key)))
        yield


@contextlib.contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def submit(scheduler: Scheduler, phase: Phase, client: str, start: float) -> None:
    """Do what ``Scheduler.update_graph`` does once a graph has been unpacked, ordered and culled."""
    scheduler._create_taskstate_from_graph(
        start=start,
        dsk=dict(phase.graph),
        keys=set(phase.keys),
        ordered=dict(phase.order),
        client=client,
        annotations_by_type={},
        global_annotations=None,
        stimulus_id=f"update-graph-{start}",
        submitting_task=None,
        span_metadata={"collections": []},
        fifo_timeout=60.0,
    )
