"""Every private name of dask and distributed that dask-gpurt relies on.

Covers: the names, a check for each, and the accessors through which the rest of the package reaches them. No other
module may touch a private name of Dask (``tests/unit/test_seams.py`` reads the sources and says so).
Does not cover: what is done with them; see the part that uses them.

A seam is checked on the server where it is used, when the part is installed. A part with a broken seam is left stock
there, with a warning that names the seam; the other parts are installed.
"""

from __future__ import annotations

import copy
import heapq
import importlib
import importlib.util
import inspect
import time
from collections.abc import Awaitable, Callable, Container, Hashable, Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dask_gpurt.errors import SeamError
from dask_gpurt.handlers import weak

__all__ = ["DEMO", "MEMORY", "PLACEMENT", "SEAMS", "SHUFFLE", "SUPPORTED", "Seam", "broken", "lacking"]

#: Dask and distributed versions that the seams were tried with: lowest (included), highest (excluded).
SUPPORTED = ("2026.7.1", "2026.9")

Side = Literal["scheduler", "worker"]


@dataclass(frozen=True)
class Seam:
    """A name that has to exist.

    Parameters
    ----------
    side
        Where the name is used.
    path
        ``module:Dotted.name`` for what can be imported, ``.dotted.name`` for an attribute of the running scheduler or
        worker.
    parameters
        Names of the parameters that a callable has to take, in order, without ``self``; None: not checked.
    """

    side: Side
    path: str
    parameters: tuple[str, ...] | None = None

    def problem(self, server: object | None = None) -> str | None:
        """Say what is wrong, or None. Attributes of a server are skipped where no server is given."""
        module, _, dotted = self.path.rpartition(":") if ":" in self.path else ("", "", self.path[1:])
        if module:
            try:
                found: Any = importlib.import_module(module)
            except ImportError as error:
                return f"{self.path}: {error}"
        elif server is None:
            return None
        else:
            found = server
        for name in dotted.split("."):
            if not hasattr(found, name):
                # Slots and annotations declare instance attributes that the class itself does not have.
                if any(name in getattr(kind, "__annotations__", {}) for kind in getattr(found, "__mro__", (found,))):
                    return None
                return f"{self.path}: there is no {name!r}"
            found = getattr(found, name)
        if self.parameters is None:
            return None
        present = tuple(name for name in inspect.signature(found).parameters if name != "self")
        if present != self.parameters:
            return f"{self.path}: takes {present}, expected {self.parameters}"
        return None

    def lacks(self) -> str | None:
        """Name the library that Dask itself wants here and does not find; None: there is none."""
        module, _, _ = self.path.rpartition(":")
        try:
            importlib.import_module(module or "dask")
        except ImportError as error:
            # Dask raises one of its own, which says how to install it, from that of Python.
            cause = error if error.name else error.__cause__ or error.__context__
            library = (getattr(cause, "name", None) or "").partition(".")[0]
            return library if library not in ("", "dask", "distributed") else None
        return None


#: Names the placement uses.
PLACEMENT: tuple[Seam, ...] = (
    Seam("scheduler", "distributed.scheduler:SchedulerState._TRANSITIONS_TABLE"),
    Seam("scheduler", "distributed.scheduler:SchedulerState._add_to_processing", ("ts", "ws", "stimulus_id")),
    Seam("scheduler", "distributed.scheduler:SchedulerState._validate_ready", ("ts",)),
    Seam("scheduler", "distributed.scheduler:SchedulerState.is_rootish", ("ts",)),
    Seam("scheduler", "distributed.scheduler:SchedulerState.queued"),
    Seam("scheduler", "distributed.scheduler:SchedulerState.running"),
    Seam("scheduler", "distributed.scheduler:SchedulerState.idle_task_count"),
    Seam("scheduler", "distributed.scheduler:SchedulerState.WORKER_SATURATION"),
    Seam("scheduler", "distributed.scheduler:Scheduler.stimulus_queue_slots_maybe_opened", ("stimulus_id",)),
    Seam("scheduler", "distributed.scheduler:Scheduler.transitions", ("recommendations", "stimulus_id")),
    Seam("scheduler", "distributed.scheduler:TaskState._queueable"),
    Seam("scheduler", "distributed.scheduler:TaskState.get_nbytes", ()),
    Seam("scheduler", "distributed.scheduler:TaskPrefix.duration_average"),
    Seam("scheduler", "distributed.scheduler:TaskPrefix.max_exec_time"),
    Seam("scheduler", "distributed.scheduler:WorkerState.long_running"),
    Seam("scheduler", "distributed.scheduler:WorkerState.needs_what"),
    Seam("scheduler", "distributed.scheduler:WorkerState.task_prefix_count"),
    Seam("scheduler", "distributed.scheduler:WorkerState._network_occ"),
    Seam("scheduler", "distributed.scheduler:_task_slots_available", ("ws", "saturation_factor")),
    Seam("worker", "distributed.worker:Worker.get_data", ("comm", "keys", "who", "serializers")),
    Seam("worker", ".handlers"),
    Seam("worker", ".state.tasks"),
    Seam(
        "scheduler",
        "distributed.stealing:WorkStealing._get_thief",
        ("scheduler", "ts", "potential_thieves", "occupancies"),
    ),
    Seam("scheduler", "distributed.stealing:WorkStealing.move_task_request", ("ts", "victim", "thief")),
    Seam("scheduler", "distributed.stealing:WorkStealing.in_flight"),
)

#: Names the shuffle uses.
SHUFFLE: tuple[Seam, ...] = (
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin._retrieve_spec", ("shuffle_id",)),
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin._create", ("shuffle_id", "key", "worker")),
    Seam(
        "scheduler", "distributed.shuffle:ShuffleSchedulerPlugin._restart_shuffle", ("id", "scheduler", "stimulus_id")
    ),
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin._calculate_worker_for", ("spec",)),
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin.get_or_create", ("shuffle_id", "key", "worker")),
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin.heartbeat", ("ws", "data")),
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin.active_shuffles"),
    Seam(
        "scheduler",
        "distributed.shuffle:ShuffleSchedulerPlugin.transition",
        ("key", "start", "finish", "args", "stimulus_id", "kwargs"),
    ),
    Seam(
        "scheduler",
        "distributed.shuffle:ShuffleSchedulerPlugin.remove_worker",
        ("scheduler", "worker", "stimulus_id", "kwargs"),
    ),
    Seam("scheduler", "distributed.shuffle:ShuffleSchedulerPlugin.barrier", ("id", "run_id", "consistent")),
    Seam("scheduler", "distributed.shuffle._core:SchedulerShuffleState.run_spec"),
    Seam("scheduler", "distributed.shuffle._core:SchedulerShuffleState.participating_workers"),
    Seam("scheduler", ".handlers"),
    Seam("scheduler", ".stream_handlers"),
    Seam("scheduler", "distributed.shuffle._core:barrier_key", ("shuffle_id",)),
    Seam("scheduler", "distributed.shuffle._core:id_from_key", ("key",)),
    Seam("scheduler", "distributed.shuffle._shuffle:DataFrameShuffleSpec.create_run_on_worker"),
    Seam("scheduler", "distributed.shuffle._rechunk:ArrayRechunkSpec.create_run_on_worker"),
    Seam("scheduler", ".plugins"),
    Seam("worker", "distributed.shuffle:ShuffleWorkerPlugin.setup", ("worker",)),
    Seam("worker", "distributed.shuffle:ShuffleWorkerPlugin.heartbeat", ()),
    Seam("worker", "distributed.shuffle:ShuffleWorkerPlugin.shuffle_receive", ("shuffle_id", "run_id", "data")),
    Seam(
        "worker",
        "distributed.shuffle:ShuffleWorkerPlugin.add_partition",
        ("data", "partition_id", "id", "kwargs"),
    ),
    Seam("worker", "distributed.shuffle:ShuffleWorkerPlugin.get_or_create_shuffle", ("shuffle_id",)),
    Seam("worker", "distributed.shuffle:ShuffleWorkerPlugin.get_shuffle_run", ("shuffle_id", "run_id")),
    Seam("worker", "distributed.shuffle._worker_plugin:_ShuffleRunManager._active_runs"),
    Seam("worker", "distributed.shuffle._worker_plugin:_ShuffleRunManager.closed"),
    Seam("worker", "distributed.shuffle._worker_plugin:_ShuffleRunManager._fetch", ("shuffle_id", "key")),
    Seam("worker", "distributed.shuffle._worker_plugin:_ShuffleRunManager.close", ("shuffle_run",)),
    Seam("worker", "distributed.shuffle._worker_plugin:_ShuffleRunManager.get_with_run_id", ("shuffle_id", "run_id")),
    Seam("worker", "distributed.shuffle._core:id_from_key", ("key",)),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.barrier", ("run_ids",)),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.receive", ("data",)),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.add_partition", ("data", "partition_id")),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.get_output_partition", ("partition_id", "key", "kwargs")),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.inputs_done", ()),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.raise_if_closed", ()),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.fail", ("exception",)),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.heartbeat", ()),
    Seam("worker", "distributed.shuffle._core:ShuffleRun.offload", ("func", "args", "kwargs")),
    Seam("worker", "distributed.shuffle._core:ShuffleRun._capture_metrics", ("where",)),
    Seam("worker", "distributed.shuffle._core:ShuffleRun._ensure_output_worker", ("i", "key")),
    Seam("worker", "distributed.shuffle._core:ShuffleRun._exception"),
    Seam(
        "worker",
        "distributed.shuffle._shuffle:DataFrameShuffleSpec.create_run_on_worker",
        ("run_id", "span_id", "worker_for", "plugin"),
    ),
    Seam(
        "worker",
        "distributed.shuffle._rechunk:ArrayRechunkSpec.create_run_on_worker",
        ("run_id", "span_id", "worker_for", "plugin"),
    ),
    Seam("worker", "distributed.shuffle._rechunk:split_axes", ("old", "new")),
    Seam("worker", "distributed.shuffle._exceptions:P2PConsistencyError"),
    Seam("worker", "distributed.shuffle._exceptions:P2POutOfDiskError"),
    Seam("worker", "distributed.shuffle._exceptions:ShuffleClosedError"),
    Seam("worker", "distributed.shuffle._exceptions:DataUnavailable"),
    Seam("worker", "dask.dataframe.shuffle:partitioning_index", ("df", "npartitions", "cast_dtype")),
    Seam("worker", "dask.dataframe.multi:merge_chunk", ("lhs", "args", "result_meta", "kwargs")),
    Seam(
        "worker",
        "dask.dataframe.dask_expr._shuffle:AssignPartitioningIndex.operation",
        ("df", "index", "name", "npartitions", "meta", "index_shuffle"),
    ),
    Seam("worker", ".extensions"),
    Seam("worker", ".periodic_callbacks"),
    Seam("worker", ".monitor.get_process_memory"),
    Seam("worker", ".memory_manager.memory_limit"),
    Seam("worker", ".state.tasks"),
    Seam("worker", "distributed.worker:Worker._handle_remove_worker", ("worker", "stimulus_id")),
    Seam("worker", ".stream_handlers"),
)

#: Names the tiered store uses.
MEMORY: tuple[Seam, ...] = (
    Seam("scheduler", "distributed.scheduler:Scheduler.worker_send", ("worker", "msg")),
    Seam("scheduler", "distributed.scheduler:TaskState.who_wants"),
    Seam("scheduler", "distributed.scheduler:TaskState.waiters"),
    Seam("scheduler", "distributed.scheduler:TaskState.processing_on"),
    Seam("scheduler", "distributed.scheduler:WorkerState.has_what"),
    Seam("scheduler", ".handlers"),
    Seam("worker", "distributed.worker:Worker.execute", ("key", "stimulus_id")),
    Seam("worker", "distributed.worker:Worker.get_data", ("comm", "keys", "who", "serializers")),
    Seam("worker", "distributed.worker:Worker.data"),
    Seam("worker", "distributed.worker:Worker.handle_stimulus", ("stims",)),
    Seam("worker", "distributed.worker_memory:WorkerMemoryManager.data"),
    Seam("worker", "distributed.worker_memory:WorkerMemoryManager.memory_limit"),
    Seam("worker", "distributed.worker_memory:WorkerMemoryManager.memory_target_fraction"),
    Seam("worker", "distributed.worker_memory:WorkerMemoryManager.memory_spill_fraction"),
    Seam("worker", "distributed.worker_memory:WorkerMemoryManager.max_spill"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.data"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.tasks"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.actors"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.ready"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.waiting"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.executing"),
    Seam("worker", "distributed.worker_state_machine:WorkerState.has_what"),
    Seam("worker", "distributed.worker_state_machine:TaskState.dependents"),
    Seam("worker", "distributed.worker_state_machine:TaskState.dependencies"),
    Seam("worker", "distributed.worker_state_machine:TaskState.run_spec"),
    Seam("worker", "distributed.worker_state_machine:TaskState.nbytes"),
    Seam("worker", "distributed.worker_state_machine:TaskState.who_has"),
    Seam("worker", "distributed.worker_state_machine:TaskState.priority"),
    Seam("worker", "distributed.worker_state_machine:FreeKeysEvent", ("stimulus_id", "keys")),
    Seam("worker", "distributed.worker_state_machine:RescheduleEvent", ("stimulus_id", "key")),
    Seam("worker", "distributed.worker_state_machine:ExecuteFailureEvent.from_exception"),
    Seam("worker", "distributed.spill:SpillBuffer"),
    Seam("worker", "distributed.protocol:Serialized"),
    Seam("worker", ".memory_manager.data"),
    Seam("worker", ".state.data"),
    Seam("worker", ".handlers"),
    Seam("worker", ".stream_handlers"),
    Seam("worker", ".active_threads"),
    Seam("worker", ".monitor.get_process_memory"),
)

#: Names that the pages in the dashboard use; and those that metrics for Prometheus do.
DASHBOARD: tuple[Seam, ...] = (
    Seam("scheduler", "distributed.dashboard.scheduler:template_variables", ("scheduler",)),
    Seam(
        "scheduler",
        "distributed.dashboard.core:BokehApplication",
        ("applications", "server", "prefix", "template_variables"),
    ),
    Seam("scheduler", "bokeh.server.tornado:BokehTornado._applications"),
    Seam("scheduler", ".http_application.applications"),
    Seam("scheduler", "distributed.core:Server._tick_interval_observed"),
)
METRICS: tuple[Seam, ...] = (
    Seam("scheduler", "distributed.http.prometheus:PrometheusCollector.build_name", ("name",)),
    Seam("scheduler", "distributed.http.scheduler.prometheus.core:PrometheusHandler._collectors"),
    Seam("worker", "distributed.http.prometheus:PrometheusCollector.build_name", ("name",)),
    Seam("worker", "distributed.http.worker.prometheus.core:PrometheusHandler._collector"),
)

#: Part to its seams.
SEAMS: dict[str, tuple[Seam, ...]] = {
    "memory": MEMORY,
    "shuffle": SHUFFLE,
    "placement": PLACEMENT,
    "dashboard": DASHBOARD,
    "metrics": METRICS,
}


def broken(part: str, side: Side, server: object | None = None) -> list[str]:
    """Say what is wrong with the seams of ``part`` on ``side``; an empty list means that it can be installed."""
    return [problem for seam in _of(part, side) if (problem := seam.problem(server)) is not None]


def lacking(part: str, side: Side) -> list[str]:
    """Name the libraries that ``part`` needs on ``side`` because Dask does, and that are not installed."""
    return sorted({library for seam in _of(part, side) if (library := seam.lacks()) is not None})


def _of(part: str, side: Side) -> Iterator[Seam]:
    return (seam for seam in SEAMS[part] if seam.side == side)


# --- PLACEMENT: how the scheduler chooses a worker -------------------------------------------------------------------

#: What a transition of the scheduler answers: recommendations, messages to clients, messages to workers.
Answer = tuple[dict[Any, str], dict[str, list[Any]], dict[str, list[Any]]]
#: A transition function: scheduler, key, stimulus_id.
TransitionFunction = Callable[[Any, Any, str], Answer]

_WAITING_PROCESSING = ("waiting", "processing")
_WAITING_QUEUED = ("waiting", "queued")
_QUEUED_PROCESSING = ("queued", "processing")


@dataclass(frozen=True)
class ChoiceOverrides:
    """What the placement puts in the place of the scheduler's own, or the scheduler's own in the same form."""

    waiting_processing: TransitionFunction
    waiting_queued: TransitionFunction
    queued_processing: TransitionFunction
    #: Called with ``stimulus_id`` as keyword whenever a worker may have become free.
    slots_opened: Callable[..., None]
    #: ``WorkStealing._get_thief``; None where the cluster steals no work.
    get_thief: Callable[..., Any] | None


def stock_choice(scheduler: Any) -> ChoiceOverrides:
    """Return the functions with which ``scheduler`` chooses workers now.

    Raises
    ------
    SeamError
        If they have been replaced already, or Dask has none of that name.
    """
    replaced = {"_TRANSITIONS_TABLE", "stimulus_queue_slots_maybe_opened"} & vars(scheduler).keys()
    if replaced:
        raise SeamError(f"the scheduler's {', '.join(sorted(replaced))} has been replaced already")
    table = scheduler._TRANSITIONS_TABLE
    missing = [entry for entry in (_WAITING_PROCESSING, _WAITING_QUEUED, _QUEUED_PROCESSING) if entry not in table]
    if missing:
        raise SeamError(f"the scheduler has no transition {missing}")
    stealing = scheduler.extensions.get("stealing")
    return ChoiceOverrides(
        waiting_processing=table[_WAITING_PROCESSING],
        waiting_queued=table[_WAITING_QUEUED],
        queued_processing=table[_QUEUED_PROCESSING],
        slots_opened=scheduler.stimulus_queue_slots_maybe_opened,
        get_thief=None if stealing is None else stealing._get_thief,
    )


def override_choice(scheduler: Any, overrides: ChoiceOverrides) -> None:
    """Let ``scheduler``, this instance alone, choose workers by ``overrides``."""
    # Dispatch goes through the table, so overriding the methods themselves would do nothing.
    scheduler._TRANSITIONS_TABLE = {
        **type(scheduler)._TRANSITIONS_TABLE,
        _WAITING_PROCESSING: overrides.waiting_processing,
        _WAITING_QUEUED: overrides.waiting_queued,
        _QUEUED_PROCESSING: overrides.queued_processing,
    }
    scheduler.stimulus_queue_slots_maybe_opened = overrides.slots_opened
    stealing = scheduler.extensions.get("stealing")
    if stealing is not None and overrides.get_thief is not None:
        stealing._get_thief = overrides.get_thief


def restore_choice(scheduler: Any) -> None:
    """Take back what :func:`override_choice` did; the class's own functions show again."""
    vars(scheduler).pop("_TRANSITIONS_TABLE", None)
    vars(scheduler).pop("stimulus_queue_slots_maybe_opened", None)
    stealing = scheduler.extensions.get("stealing")
    if stealing is not None:
        vars(stealing).pop("_get_thief", None)


def steals(scheduler: Any) -> bool:
    """Whether idle workers of ``scheduler`` steal work: users can switch that off, at any time."""
    return "stealing" in scheduler.extensions and "stealing" in scheduler.periodic_callbacks


def steal(scheduler: Any, ts: Any, victim: Any, thief: Any) -> bool:
    """Ask ``victim`` for a task that it has not begun, for ``thief``; False if that was asked for already, or it cannot be asked."""
    stealing = scheduler.extensions["stealing"]
    if ts in stealing.in_flight:
        return False
    stealing.move_task_request(ts, victim, thief)
    return ts in stealing.in_flight


def add_to_processing(scheduler: Any) -> Callable[[Any, Any, str], Answer]:
    """Return the function that gives a task to a worker: task, worker, stimulus_id."""
    bound: Callable[[Any, Any, str], Answer] = scheduler._add_to_processing
    return bound


def assert_ready(scheduler: Any, ts: Any) -> None:
    """Assert what a validating scheduler asserts of a task that is ready to run."""
    scheduler._validate_ready(ts)


def is_queueable(ts: Any) -> bool:
    """Whether the task may wait in the scheduler's queue."""
    return bool(ts._queueable)


def incoming_nbytes(ws: Any) -> int:
    """Return the bytes that a worker has to fetch for the tasks that it was given."""
    nbytes: int = ws._network_occ
    return nbytes


def worker_get_data(worker: Any) -> Callable[..., Any]:
    """Return what answers a peer that asks a worker for data, whoever has put it there: comm, keys, who, serializers."""
    function: Callable[..., Any] = worker.handlers["get_data"]
    return function


def set_worker_get_data(worker: Any, function: Callable[..., Any]) -> None:
    """Let ``function`` answer peers that ask a worker for data."""
    worker.handlers["get_data"] = function


def task_slots_available() -> Callable[[Any, float], int]:
    """Return the function that counts the tasks a worker may be sent at a given saturation."""
    function: Callable[[Any, float], int] = importlib.import_module("distributed.scheduler")._task_slots_available
    return function


# --- DEMO: what the demonstration and the benchmarks measure with ---------------------------------------------------

#: Names the meter uses. Not a part that is installed: a broken one fails the demo's own tests, and nothing else.
DEMO: tuple[Seam, ...] = (Seam("worker", "distributed.comm.tcp:TCP.write", ("msg", "serializers", "on_error")),)


def comm_classes() -> tuple[Any, ...]:
    """Classes of comms whose ``write`` returns the bytes that it sent: TCP, of which TLS derives, and UCX if present."""
    classes = [importlib.import_module("distributed.comm.tcp").TCP]
    if importlib.util.find_spec("distributed_ucxx") is not None:
        classes.append(importlib.import_module("distributed_ucxx").UCXX)
    return tuple(classes)


# --- MEMORY: the store behind worker.data, and what a worker has ahead of it -----------------------------------------


@dataclass(frozen=True)
class MemoryLimits:
    """What a worker was told about its memory."""

    #: Bytes the process may take; None: no limit.
    limit_nbytes: int | None
    #: Bytes of values above which stock spills; None: it does not, by that measure.
    target_nbytes: int | None
    #: Bytes of the process above which stock spills; None: it does not, by that measure.
    spill_nbytes: int | None
    #: Bytes on disk at most; None: no limit.
    disk_nbytes: int | None


def memory_limits(worker: Any) -> MemoryLimits:
    """Return the limits of ``worker``."""
    manager = worker.memory_manager
    limit = manager.memory_limit or None

    def part(fraction: float | Literal[False]) -> int | None:
        return None if limit is None or fraction is False else int(limit * fraction)

    return MemoryLimits(
        limit_nbytes=limit,
        target_nbytes=part(manager.memory_target_fraction),
        spill_nbytes=part(manager.memory_spill_fraction),
        disk_nbytes=None if manager.max_spill is False else int(manager.max_spill),
    )


def process_memory_nbytes(worker: Any) -> int:
    """Return the bytes that the process of ``worker`` takes, by the measure that stock's memory monitor goes by."""
    nbytes: int = worker.monitor.get_process_memory()
    return nbytes


def worker_store(worker: Any) -> MutableMapping[Any, Any]:
    """Return the mapping behind ``worker.data``."""
    store: MutableMapping[Any, Any] = worker.memory_manager.data
    return store


def set_worker_store(worker: Any, store: MutableMapping[Any, Any]) -> None:
    """Put ``store`` behind ``worker.data``; both places that refer to it change."""
    worker.memory_manager.data = store
    worker.state.data = store


def is_chosen_store(store: Any) -> bool:
    """Whether somebody has chosen a store of their own for a worker, rather than Dask or dask-cuda one of theirs."""
    from distributed.spill import SpillBuffer

    theirs = (cls.__module__.partition(".")[0] == "dask_cuda" for cls in type(store).__mro__)
    return type(store) is not dict and not isinstance(store, SpillBuffer) and not any(theirs)


def stock_copy_below(store: Any, key: Any) -> bool:
    """Whether a stock store has ``key`` on disk and not in memory."""
    from distributed.spill import SpillBuffer

    return isinstance(store, SpillBuffer) and key not in store.fast and key in store.slow


def load_from_stock(store: Any, key: Any) -> Any:
    """Return a value from a stock store, leaving it on disk there if it is."""
    from distributed.spill import SpillBuffer

    if isinstance(store, SpillBuffer) and key not in store.fast:
        try:
            return store.slow[key]
        except KeyError:
            # It went up meanwhile.
            return store[key]
    return store[key]


def keep_in_stock(store: Any, key: Any, value: Any) -> None:
    """Put a value into a stock store without anything being spilled, however large it is."""
    from distributed.spill import SpillBuffer

    if isinstance(store, SpillBuffer):
        store.set_noevict(key, value)
    else:
        store[key] = value


@dataclass(frozen=True)
class WorkerHooks:
    """The two entries of a worker that the tiered store stands before."""

    #: key, stimulus_id -> coroutine of a state machine event.
    execute: Callable[..., Any]
    #: comm, keys, who, serializers -> coroutine of an answer.
    get_data: Callable[..., Any]


def worker_hooks(worker: Any) -> WorkerHooks:
    """Return the entries as they are now.

    Raises
    ------
    SeamError
        If they have been replaced already.
    """
    if "execute" in vars(worker):
        raise SeamError("the worker's execute has been replaced already")
    return WorkerHooks(execute=worker.execute, get_data=worker.handlers["get_data"])


def set_worker_hooks(worker: Any, hooks: WorkerHooks) -> None:
    """Put ``hooks`` into ``worker``, this instance alone."""
    worker.execute = hooks.execute
    worker.handlers["get_data"] = weak(hooks.get_data)


def restore_worker_hooks(worker: Any, hooks: WorkerHooks) -> None:
    """Take back :func:`set_worker_hooks`; ``hooks`` are those that were there before."""
    vars(worker).pop("execute", None)
    worker.handlers["get_data"] = hooks.get_data


def worker_task(worker: Any, key: Any) -> Any:
    """Return the worker's state of the task ``key``, or None."""
    return worker.state.tasks.get(key)


def running_key(worker: Any, thread: int) -> Any:
    """Return the key of the task that runs in ``thread``, or None. May be called by any thread."""
    return worker.active_threads.get(thread)


def worker_result_nbytes(worker: Any, key: Any) -> int | None:
    """Return the bytes that a worker has counted of a task's result, or None. They are known before the result is stored."""
    task = worker.state.tasks.get(key)
    return None if task is None else task.nbytes


def input_keys(worker: Any, task: Any) -> list[Any]:
    """Return the keys that a worker's task takes from the store."""
    actors = worker.state.actors
    return [dep.key for dep in task.dependencies if dep.key not in actors]


def dependents_of(worker: Any, key: Any) -> list[tuple[Any, str, Any]]:
    """Return (key, state, :func:`rank`) of the tasks that the worker knows to depend on ``key``."""
    task = worker.state.tasks.get(key)
    return [] if task is None else [(d.key, d.state, rank(d)) for d in task.dependents]


def rank(task: Any) -> Any:
    """Return the priority that the scheduler gave to a worker's task: without what the worker has appended; or None."""
    return None if task.priority is None else task.priority[:-1]


def worker_holds(worker: Any, key: Any) -> bool:
    """Whether a worker has the result of ``key``, as it sees it."""
    task = worker.state.tasks.get(key)
    return task is not None and task.state == "memory"


def is_to_run(worker: Any, key: Any) -> bool:
    """Whether a worker has a task that it has not started."""
    task = worker.state.tasks.get(key)
    return task is not None and task.state in ("ready", "constrained", "waiting")


def next_task(worker: Any) -> Any:
    """Return the task that the worker starts next, as far as it knows, or None: of those that wait for inputs, if all do."""
    state = worker.state
    if state.ready:
        return state.ready.peek()
    return min(state.waiting, key=rank, default=None)


def ahead(worker: Any) -> tuple[Any, list[Any], int]:
    """Return the lowest :func:`rank` that is executing (or None), those that are ready, sorted, and known workers."""
    state = worker.state
    now = min((rank(task) for task in state.executing if task.priority is not None), default=None)
    return now, sorted(rank(task) for task in state.ready), 1 + len(state.has_what)


def about_to_start(worker: Any, leaving: Container[Any]) -> set[Any]:
    """Return the keys of tasks that take the threads of those in ``leaving``, which is over for them but for the worker to hear of it."""
    state = worker.state
    if not state.ready or not state.running:
        return set()
    free = state.nthreads - sum(task.key not in leaving for task in state.executing)
    if free == 1:
        return {state.ready.peek().key}
    return {task.key for task in heapq.nsmallest(free, state.ready, key=rank)}


def is_pure_data(worker: Any, key: Any) -> bool:
    """Whether nobody seems to know how to make ``key`` again: it was scattered, and no other worker has it.

    Of a key that has come from a peer the same is seen, once that peer has left: only the scheduler knows.
    """
    task = worker.state.tasks.get(key)
    return task is not None and task.run_spec is None and not task.who_has


def forget_replica(worker: Any, key: Any, stimulus_id: str) -> None:
    """Let ``worker`` tell the scheduler that it has no value of ``key`` any more; it recomputes it if it can."""
    from distributed.worker_state_machine import FreeKeysEvent

    worker.handle_stimulus(FreeKeysEvent(keys=[key], stimulus_id=stimulus_id))


def reschedule_event(key: Any, stimulus_id: str) -> Any:
    """Return the event that says: this task was not run here, run it somewhere."""
    from distributed.worker_state_machine import RescheduleEvent

    return RescheduleEvent(key=key, stimulus_id=stimulus_id)


def failure_event(key: Any, run_id: int, error: BaseException, stimulus_id: str) -> Any:
    """Return the event that says: this task failed."""
    from distributed.worker_state_machine import ExecuteFailureEvent

    return ExecuteFailureEvent.from_exception(error, key=key, run_id=run_id, stimulus_id=stimulus_id)


def failure_of(event: Any) -> BaseException | None:
    """Return the error that a task failed with on this worker, if ``event`` says that it did."""
    from distributed.protocol import pickle
    from distributed.worker_state_machine import ExecuteFailureEvent

    if not isinstance(event, ExecuteFailureEvent):
        return None
    error = pickle.loads(event.exception.data)
    return error if isinstance(error, BaseException) else None


# --- SHUFFLE: the data plane of distributed's p2p --------------------------------------------------------------------

if TYPE_CHECKING:
    from distributed.shuffle._core import ShuffleRun
    from distributed.shuffle._exceptions import (
        DataUnavailable,
        P2PConsistencyError,
        P2POutOfDiskError,
        ShuffleClosedError,
    )
    from distributed.shuffle._rechunk import ArrayRechunkSpec, split_axes
    from distributed.shuffle._shuffle import DataFrameShuffleSpec

__all__ += [
    "ArrayRechunkSpec",
    "DataFrameShuffleSpec",
    "DataUnavailable",
    "P2PConsistencyError",
    "P2POutOfDiskError",
    "ShuffleClosedError",
    "ShuffleRun",
    "split_axes",
]

#: Names of distributed's shuffle that this module has too, once they are asked for: its module.
_SHUFFLE_NAMES = {
    "ShuffleRun": "distributed.shuffle._core",
    "DataUnavailable": "distributed.shuffle._exceptions",
    "P2PConsistencyError": "distributed.shuffle._exceptions",
    "P2POutOfDiskError": "distributed.shuffle._exceptions",
    "ShuffleClosedError": "distributed.shuffle._exceptions",
    "ArrayRechunkSpec": "distributed.shuffle._rechunk",
    "split_axes": "distributed.shuffle._rechunk",
    "DataFrameShuffleSpec": "distributed.shuffle._shuffle",
}


def __getattr__(name: str) -> Any:
    # Base classes cannot be reached through a function, and must not be imported before the seams are checked.
    if name not in _SHUFFLE_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_SHUFFLE_NAMES[name]), name)


def override_shuffle_spec(plugin: Any, choose: Callable[[Any], Any]) -> Callable[[], None]:
    """Let ``choose`` answer the spec for each new run of a scheduler's shuffle plugin; returns how to undo it."""
    stock = plugin._retrieve_spec

    def retrieve(shuffle_id: Any) -> Any:
        return choose(stock(shuffle_id))

    return _override(plugin, "_retrieve_spec", retrieve)


def override_shuffle_creation(scheduler: Any, before: Callable[[Any], Awaitable[None]]) -> Callable[[], None]:
    """Have what a worker is told that asks for a shuffle wait for ``before`` (its id); returns how to undo it."""
    stock = scheduler.handlers["shuffle_get_or_create"]

    async def get_or_create(shuffle_id: Any, key: Any, worker: str) -> Any:
        await before(shuffle_id)
        return stock(shuffle_id=shuffle_id, key=key, worker=worker)

    return _override_handler(scheduler, "shuffle_get_or_create", get_or_create)


def override_shuffle_assignment(plugin: Any, assign: Callable[[Any, dict[Any, str]], Any]) -> Callable[[], None]:
    """Let ``assign`` (spec, stock's answer) say which worker makes each output of a new run; returns how to undo it."""
    stock = plugin._calculate_worker_for

    def calculate(spec: Any) -> Any:
        return assign(spec, stock(spec))

    return _override(plugin, "_calculate_worker_for", calculate)


def _override(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put ``function`` before a method of this one object; returns how to undo it."""
    before = vars(owner).get(name)

    def restore() -> None:
        # Whoever has put another layer on top of this one keeps it.
        if vars(owner).get(name) is not function:
            return
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, function)
    return restore


def _override_handler(server: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put ``function`` before a handler that is there; returns how to undo it, unless somebody else stands before it by then."""
    handlers = server.handlers
    before = handlers[name]
    handlers[name] = function

    def restore() -> None:
        if handlers.get(name) is function:
            handlers[name] = before

    return restore


#: Modules that know Dask's functions for frames by their names.
_FRAME_MODULES = (
    "dask.dataframe.shuffle",
    "dask.dataframe.multi",
    "dask.dataframe.dask_expr._shuffle",
    "dask.dataframe.dask_expr._merge",
)


def replace_partitioning_index(over: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace Dask's function by ``over`` of it, in this process; returns how to undo it."""
    return _replace_everywhere("dask.dataframe.shuffle", "partitioning_index", over)


def replace_merge_chunk(over: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace what Dask merges two partitions with by ``over`` of it, in this process; returns how to undo it."""
    return _replace_everywhere("dask.dataframe.multi", "merge_chunk", over)


def _replace_everywhere(home: str, name: str, over: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace a function where it is and where it is imported to.

    A graph that is made here must not hold another function than the one of that name, or it would be sent as code.
    """
    stock = getattr(importlib.import_module(home), name)
    function = over(stock)
    modules = [importlib.import_module(each) for each in _FRAME_MODULES]
    undo = [_override(module, name, function) for module in modules if getattr(module, name, None) is stock]

    def restore() -> None:
        for restore_one in undo:
            restore_one()

    return restore


def replace_assigning(over: Callable[[Any], Any]) -> Callable[[], None]:
    """Replace what Dask assigns output partitions with by ``over`` of it, in this process; returns how to undo it.

    Tasks name it as an attribute of its class, so that what they say is true with both.
    """
    owner = importlib.import_module("dask.dataframe.dask_expr._shuffle").AssignPartitioningIndex
    return _override(owner, "operation", staticmethod(over(owner.operation)))


def shuffle_spec(plugin: Any, shuffle_id: str) -> Any:
    """Return the spec that a new run of a shuffle would have, or None if the scheduler does not know its barrier."""
    try:
        return plugin._retrieve_spec(shuffle_id)
    except KeyError:
        return None


def shuffle_barrier(scheduler: Any, shuffle_id: str) -> Any:
    """Return the scheduler's state of the barrier task of a shuffle."""
    from distributed.shuffle._core import ShuffleId, barrier_key

    return scheduler.tasks[barrier_key(ShuffleId(shuffle_id))]


def barrier_shuffle(task: Any) -> str | None:
    """Return the id of the shuffle whose barrier a task of the scheduler is, or None."""
    from distributed.shuffle._core import id_from_key

    shuffle_id = id_from_key(task.key)
    return None if shuffle_id is None else str(shuffle_id)


@dataclass(frozen=True)
class ShuffleHooks:
    """Where a worker's shuffle plugin begins with an input: its own entries, or what stands before them."""

    #: data, partition_id, id, kwargs; called in a task's thread.
    add_partition: Callable[..., Any]
    #: shuffle_id, key -> coroutine of the spec of a run.
    fetch: Callable[..., Any]


def shuffle_hooks(plugin: Any) -> ShuffleHooks:
    """Return the entries of a worker's shuffle plugin as they are now."""
    return ShuffleHooks(plugin.add_partition, plugin.shuffle_runs._fetch)


def override_shuffle_hooks(plugin: Any, hooks: ShuffleHooks) -> Callable[[], None]:
    """Put ``hooks`` into a worker's shuffle plugin; returns how to undo it."""
    undo = (
        _override(plugin, "add_partition", hooks.add_partition),
        _override(plugin.shuffle_runs, "_fetch", hooks.fetch),
    )

    def restore() -> None:
        for restore_one in undo:
            restore_one()

    return restore


@dataclass(frozen=True)
class ShuffleLookups:
    """How a task's thread gets a worker's part of a run: the entries of the shuffle plugin, or what stands before them."""

    #: shuffle_id
    get_or_create: Callable[..., Any]
    #: shuffle_id, run_id
    get: Callable[..., Any]


def shuffle_lookups(plugin: Any) -> ShuffleLookups:
    """Return the look-ups of a worker's shuffle plugin as they are now."""
    return ShuffleLookups(plugin.get_or_create_shuffle, plugin.get_shuffle_run)


def override_shuffle_lookups(plugin: Any, lookups: ShuffleLookups) -> Callable[[], None]:
    """Put ``lookups`` into a worker's shuffle plugin; returns how to undo it."""
    undo = (
        _override(plugin, "get_or_create_shuffle", lookups.get_or_create),
        _override(plugin, "get_shuffle_run", lookups.get),
    )

    def restore() -> None:
        for restore_one in undo:
            restore_one()

    return restore


def sound_shuffle_run(plugin: Any, shuffle_id: str) -> Any:
    """Return the active run of a shuffle that a worker has, unless it failed or all end; else None. For any thread."""
    runs = plugin.shuffle_runs
    run = runs._active_runs.get(shuffle_id)
    return None if run is None or runs.closed or run._exception is not None else run


#: Beside the ids of shuffles in the heartbeats of workers. Stock's scheduler passes over ids that it does not know.
_HEARTBEAT_ID = "gpurt"


def add_to_shuffle_heartbeat(plugin: Any, more: Callable[[], Any]) -> Callable[[], None]:
    """Send what ``more`` returns with each heartbeat of a worker's shuffle plugin; returns how to undo it."""
    stock = plugin.heartbeat

    def heartbeat() -> dict[Any, Any]:
        return {**stock(), _HEARTBEAT_ID: more()}

    return _override(plugin, "heartbeat", heartbeat)


def hear_shuffle_heartbeat(plugin: Any, hear: Callable[[str, Any], None]) -> Callable[[], None]:
    """Give ``hear`` the address of a worker and what it adds to its heartbeats; returns how to undo it."""
    stock = plugin.heartbeat

    def heartbeat(ws: Any, data: dict[Any, Any]) -> None:
        if _HEARTBEAT_ID in data:
            hear(ws.address, data[_HEARTBEAT_ID])
        stock(ws, data)

    return _override(plugin, "heartbeat", heartbeat)


def has_shuffle_run(plugin: Any, shuffle_id: str) -> bool:
    """Whether a worker knows an active run of a shuffle."""
    return shuffle_id in plugin.shuffle_runs._active_runs


def restart_shuffle(scheduler: Any, shuffle_id: str, run_id: int) -> bool:
    """Restart a shuffle if this run of it is active; says whether it was."""
    plugin = scheduler.plugins["shuffle"]
    active = plugin.active_shuffles.get(shuffle_id)
    if active is None or active.run_id != run_id:
        return False
    plugin._restart_shuffle(shuffle_id, scheduler, stimulus_id=f"gpurt-shuffle-declined-{time.time()}")
    return True


def hear_ended_runs(plugin: Any, hear: Callable[[str], None]) -> Callable[[], None]:
    """Tell ``hear`` of each shuffle whose run ends because its barrier is taken from the worker that does it.

    And of each whose barrier is asked for though it has no run. Returns how to undo it.
    """
    from distributed.shuffle._core import id_from_key

    stock = plugin.transition

    def transition(key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        ended = start == "processing" and finish == "released"
        shuffle_id = id_from_key(key) if ended or (finish == "processing" and type(key) is str) else None
        tells = shuffle_id is not None and (shuffle_id in plugin.active_shuffles) is ended
        stock(key, start, finish, *args, **kwargs)
        if tells:
            hear(str(shuffle_id))

    return _override(plugin, "transition", transition)


def override_shuffle_loss(plugin: Any, lose: Callable[[str, str, Callable[[], None]], None]) -> Callable[[], None]:
    """Let ``lose`` decide what the loss of a worker means to the shuffles; returns how to undo it.

    It is given the address of the worker, a stimulus, and how to have stock restart the runs that it still takes part in.
    """
    stock = plugin.remove_worker

    def remove_worker(scheduler: Any, worker: str, *, stimulus_id: str, **kwargs: Any) -> None:
        lose(worker, stimulus_id, lambda: stock(scheduler, worker, stimulus_id=stimulus_id, **kwargs))

    return _override(plugin, "remove_worker", remove_worker)


def override_shuffle_barrier(scheduler: Any, answer: Callable[..., Any]) -> Callable[[], None]:
    """Let ``answer`` (stock's answer, id, run_id, consistent) answer when a barrier is reached; returns how to undo it."""
    stock = scheduler.handlers["shuffle_barrier"]

    async def shuffle_barrier(id: Any, run_id: int, consistent: bool) -> Any:  # noqa: A002  the worker's message
        return await answer(stock, id, run_id, consistent)

    return _override_handler(scheduler, "shuffle_barrier", shuffle_barrier)


def amend_shuffle_run(state: Any, spec: Any, worker_for: dict[Any, str]) -> None:
    """Give an active run of the scheduler another spec and other owners; it stays the same run."""
    amended = copy.copy(state.run_spec)
    # Frozen, and with a number that a new one would not have.
    object.__setattr__(amended, "spec", spec)
    object.__setattr__(amended, "worker_for", worker_for)
    state.run_spec = amended


def thread_key() -> Any:
    """Return the key of the task that this thread executes."""
    from distributed.worker import thread_state  # type: ignore[attr-defined]

    return thread_state.key


def hear_removed_workers(worker: Any, hear: Callable[[str], None]) -> Callable[[], None]:
    """Tell ``hear`` of each worker that the scheduler says has left. Returns how to undo it.

    Dask tells all workers anyway. A message of our own could come late, when nobody knows it any more, and a worker that
    is told by its scheduler what it does not know closes.
    """
    handlers = worker.stream_handlers
    found = handlers["remove-worker"]
    hearers: list[Callable[[str], None]] | None = getattr(found, "hearers", None)
    if hearers is None:
        hearers, stock = [], found

        def removed(worker: str, stimulus_id: str) -> None:
            stock(worker=worker, stimulus_id=stimulus_id)
            for each in hearers:
                each(worker)

        removed.hearers = hearers  # type: ignore[attr-defined]
        removed.stock = stock  # type: ignore[attr-defined]
        found = handlers["remove-worker"] = removed
    hearers.append(hear)

    def restore() -> None:
        if hear in hearers:
            hearers.remove(hear)
        if not hearers and handlers.get("remove-worker") is found:
            handlers["remove-worker"] = found.stock

    return restore


def restart_without_run(scheduler: Any, shuffle_id: str) -> bool:
    """Restart a shuffle whose barrier is asked for though it has no run; says whether it was so."""
    plugin = scheduler.plugins["shuffle"]
    try:
        barrier = shuffle_barrier(scheduler, shuffle_id)
    except KeyError:
        return False
    if shuffle_id in plugin.active_shuffles or barrier.state not in {"processing", "queued", "no-worker"}:
        return False
    plugin._restart_shuffle(shuffle_id, scheduler, stimulus_id=f"gpurt-shuffle-without-run-{time.time()}")
    return True


async def shuffle_run(worker: Any, shuffle_id: str, run_id: int) -> Any:
    """Return a worker's part of a run, which is made if it is not there yet.

    Raises
    ------
    P2PConsistencyError
        If it is not the active run of this shuffle.
    CommClosedError
        If the worker is closing, and cannot ask the scheduler for it any more.
    """
    from distributed.comm.core import CommClosedError
    from distributed.core import Status

    try:
        return await worker.extensions["shuffle"].shuffle_runs.get_with_run_id(shuffle_id=shuffle_id, run_id=run_id)
    except RuntimeError as error:
        # A pool that is closed says so by this type, as those do that have nothing to do with it.
        if worker.rpc.status is Status.running:
            raise
        raise CommClosedError(f"{worker.address} is closing") from error


def worker_encrypts(worker: Any) -> bool:
    """Whether Dask's comms of ``worker`` are encrypted, or have to be."""
    return bool(worker.security.require_encryption) or not str(worker.address).startswith(("tcp://", "inproc://"))


@dataclass(frozen=True)
class _MetricsOf:
    """What distributed needs of a shuffle run to give it what is measured."""

    span_id: str | None
    digest_metric: Callable[[Hashable, float], None]


def capture_shuffle_metrics(run: Any, where: str) -> AbstractContextManager[None]:
    """Give what is metered inside to a shuffle run.

    Stock's own way to do it refers to the run, and a connection that is opened inside keeps that for as long as it is there.
    """
    from distributed.shuffle._core import ShuffleRun

    return ShuffleRun._capture_metrics(_MetricsOf(run.span_id, run.digest_metric), where)  # type: ignore[arg-type]


def shuffle_executor(plugin: Any) -> Any:
    """Return the threads of a worker's shuffle plugin."""
    return plugin._executor


def worker_memory_limit(worker: Any) -> int | None:
    """Return the memory limit of a worker in bytes, or None if it has none."""
    limit = worker.memory_manager.memory_limit
    return int(limit) if limit else None


def worker_memory_fraction(worker: Any) -> float:
    """Return the part of its memory limit that a worker's process uses; 0 where it has no limit."""
    limit = worker.memory_manager.memory_limit
    return float(worker.monitor.get_process_memory() / limit) if limit else 0.0


def worker_task_state(worker: Any, key: Any) -> str | None:
    """Return the state of a worker's task, or None if it knows of none."""
    task = worker.state.tasks.get(key)
    return None if task is None else str(task.state)


def worker_task_shuffles(worker: Any, key: Any) -> set[str]:
    """Return the ids of the shuffles that a worker's task reads."""
    from distributed.shuffle._core import id_from_key

    task = worker.state.tasks.get(key)
    found = () if task is None else (id_from_key(dependency.key) for dependency in task.dependencies)
    return {str(shuffle_id) for shuffle_id in found if shuffle_id is not None}


# --- DASHBOARD and METRICS: what people see --------------------------------------------------------------------------


def has_dashboard(scheduler: Any) -> bool:
    """Whether ``scheduler`` serves Dask's dashboard."""
    if not scheduler.http_application.applications or importlib.util.find_spec("bokeh") is None:
        return False  # nobody has loaded Bokeh, which takes its time
    return _dashboard(scheduler) is not None


def _dashboard(scheduler: Any) -> Any:
    from bokeh.server.tornado import BokehTornado

    served = (app for app in scheduler.http_application.applications if isinstance(app, BokehTornado))
    return next(served, None)


def add_dashboard_pages(scheduler: Any, pages: dict[str, Callable[..., None]], entry: str) -> Callable[[], None]:
    """Serve ``pages`` (path to what makes the document) in the dashboard, and ``entry`` in its menu; returns how to undo it.

    They are an application beside Dask's own, made as that is. Dask lists the applications of the first one for JupyterLab,
    so ours are named there, too. The menu is one list, shared by all pages.
    """
    from distributed.dashboard.core import BokehApplication
    from distributed.dashboard.scheduler import template_variables
    from tornado.ioloop import IOLoop

    stock = _dashboard(scheduler)
    menu = template_variables(scheduler)
    plots = [
        {"url": path.strip("/"), "name": path.strip("/").replace("-", " ").removeprefix("individual ").title()}
        for path in pages
        if path.startswith("/individual-")
    ]
    ours = BokehApplication(pages, scheduler, prefix=stock.prefix, template_variables=menu)
    ours.initialize(IOLoop.current())
    ours.start()
    scheduler.http_application.add_application(ours)
    # Another object instead of another content: Bokeh may be walking through it.
    stock._applications = {**stock._applications, **ours.applications}
    menu["pages"].insert(len(menu["pages"]) - 1, entry)
    menu["plots"][:] = sorted([*menu["plots"], *plots], key=lambda plot: str(plot["name"]))

    def remove() -> None:
        ours.stop()
        if ours in scheduler.http_application.applications:
            scheduler.http_application.applications.remove(ours)
        stock._applications = {
            path: context for path, context in stock._applications.items() if context is not ours.applications.get(path)
        }
        if entry in menu["pages"]:
            menu["pages"].remove(entry)
        menu["plots"][:] = [plot for plot in menu["plots"] if plot not in plots]

    return remove


def loop_interval_s(server: Any) -> float:
    """Return the time between two turns of a server's event loop, as it was observed last."""
    return float(server._tick_interval_observed)


def scraped(side: Side) -> Any:
    """Return the scheduler or worker of this process whose metrics Prometheus is given at the moment, or None.

    There is one registry in a process, and Dask's own collectors are told at each request whose it is.
    """
    if side == "scheduler":
        from distributed.http.scheduler.prometheus.core import PrometheusHandler as SchedulerHandler

        collectors = SchedulerHandler._collectors
        return collectors[0].server if collectors else None
    from distributed.http.worker.prometheus.core import PrometheusHandler as WorkerHandler

    return None if WorkerHandler._collector is None else WorkerHandler._collector.server
