"""Ours against several peers on data that lies on the workers: clusters, turns, checks, the bound.

Covers: :class:`Contender`, :class:`Workload`, :class:`Case`, :func:`contest`.
Does not cover: what the data are and when an answer is right; see :mod:`benchmarks.tables` and the subjects.

Two clusters that were started alike live side by side, each of two worker processes of one thread: one on which
dask-gpurt is installed with its defaults, as its users have it, and one that it never touched, on which all of stock's
methods run. The one that waits takes about 3 % of two cores, for heartbeats and Dask's profiler, whoever works.
Installing and uninstalling in turn on one cluster would cost ours its warm state, its pools of memory above all, which
a user's cluster keeps; a fresh cluster a run would cost both theirs.

Both clusters get the same inputs, dealt to the workers in turn, and the same expressions; of the configuration, the
method alone differs. Each contender first does a small run of the same kind, which is not counted. Then they take turns
in rounds, in one order and back, so that a drift of the machine weighs on all. In a run the clock covers building the
expression, sending its graph, and the work, until all outputs are in memory on the workers. Outside of the clock the
answer is checked and dropped, and the workers are waited for until they have forgotten it.

The bound ``memcpy`` is the time in which one thread would copy the bytes of the input once, at the rate that
``numpy.copyto`` has between two arrays of 256 MB that were touched before; it is measured in each round, in the
process of the client, while the workers rest. Nothing that moves data can do without one copy, so the ratio, bound ÷
ours, is the fraction of what one core's memory gives.

Stock's ``p2p`` writes its shards to files in the workers' directories, which the operating system caches: what its
users get who have memory to spare. ``p2p-memory`` is the same with ``disk=False`` forced into the specification of each
shuffle, which no setting of Dask's does for dataframes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import dask
import numpy as np
import pandas as pd
from distributed import Client, Scheduler, SchedulerPlugin, wait
from distributed.client import futures_of

from benchmarks.frame import BrokenRunError, Line, line_of_pairs, rounds
from benchmarks.tables import compare_frames
from dask_gpurt import status
from dask_gpurt.config import PARTS
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec, Side, open_client

__all__ = [
    "KEEPING",
    "OURS",
    "P2P",
    "P2P_MEMORY",
    "TASKS",
    "Bound",
    "Case",
    "Contender",
    "ShardsInMemory",
    "Workload",
    "clusters",
    "contest",
    "dropping",
    "memcpy_rate",
    "runner",
]

#: Enough that neither side spills or pauses in the cases that are to be in memory.
AMPLE_NBYTES = 4 * 2**30

COPIED_NBYTES = 256_000_000

#: A run that takes longer hangs: several times what the slowest takes on two cores.
RUN_LIMIT_S = 240

#: A worker that still holds results after this time will not drop them.
SETTLE_LIMIT_S = 60.0
SETTLE_PERIOD_S = 0.02


class ShardsInMemory(SchedulerPlugin):
    """Makes stock's p2p shuffle keep its shards in memory, on the scheduler where it is registered."""

    name = "benchmark-shards-in-memory"

    def update_graph(self, scheduler: Scheduler, *, tasks: list[Any], **kwargs: Any) -> None:  # noqa: ARG002
        """Change the specification of new shuffles. Stock reads it from the barrier task when a shuffle begins."""
        for key in tasks:
            task: Any = scheduler.tasks[key].run_spec
            spec: Any = getattr(task, "spec", None)
            if getattr(spec, "disk", False):
                task.spec = dataclasses.replace(spec, disk=False)


@dataclass(frozen=True)
class Contender:
    """One of those that are compared.

    Parameters
    ----------
    name
        As in the output.
    method
        Value of ``dataframe.shuffle.method`` and ``array.rechunk.method``.
    side
        What is installed on the cluster on which it runs.
    shards_in_memory
        Whether stock's p2p is made to do without files.
    """

    name: str
    method: str
    side: Side = STOCK
    shards_in_memory: bool = False

    @contextlib.contextmanager
    def chosen(self, client: Client) -> Iterator[None]:
        """Let Dask use this contender's method on the cluster of ``client``."""
        methods = {"dataframe.shuffle.method": self.method, "array.rechunk.method": self.method}
        with dask.config.set(methods), client.as_current():
            if self.shards_in_memory:
                client.register_plugin(ShardsInMemory())
            try:
                yield
            finally:
                if self.shards_in_memory:
                    client.unregister_scheduler_plugin(ShardsInMemory.name)


OURS = Contender("dask-gpurt", "p2p", side=GPURT)
P2P = Contender("p2p", "p2p")
TASKS = Contender("tasks", "tasks")
P2P_MEMORY = Contender("p2p-memory", "p2p", shards_in_memory=True)
#: Ours, which keeps what it sends, in case that a worker is lost.
KEEPING = Contender("keeping", "p2p", side=Side("keeping", PARTS, (("shuffle.keep-sent", "4 GiB"),)))


class Workload(Protocol):
    """What is done to which data."""

    def load(self, client: Client) -> Any:
        """Return the inputs: collections that lie in the memory of the workers, unless the tasks are to make them."""

    def nbytes(self, client: Client, inputs: Any) -> int:
        """Return the bytes of the inputs."""

    def build(self, inputs: Any) -> Any:
        """Return the lazy collection that is measured."""

    def truth(self, client: Client, inputs: Any) -> Any:
        """Find out what is needed to judge an answer, without anything that is measured."""

    def check(self, client: Client, answer: Any, truth: Any) -> None:
        """Raise :exc:`~benchmarks.frame.WrongAnswerError` if the persisted ``answer`` is wrong."""

    def excerpt(self, client: Client, answer: Any) -> pd.DataFrame | None:
        """Return a part of the answer that has to be the same for all contenders; None: :meth:`check` sees it all."""


@dataclass(frozen=True)
class Bound:
    """What nothing that moves data can do without.

    Parameters
    ----------
    name
        As in the output.
    start
        Returns what measures a rate, in bytes per second.
    """

    name: str
    start: Callable[[], Callable[[], float]]


@dataclass(frozen=True)
class Case:
    """A workload, and who competes in it.

    Parameters
    ----------
    name
        As in the output.
    workload, small
        What is measured, and what each contender does first.
    peers
        Whom ours is compared with.
    rounds
        Runs of each.
    memory_limit_nbytes
        Of each worker.
    peaks_against
        Peers whose peak memory ours is compared with; the sum over the workers, each at its own highest.
    against_limit
        Whether the highest peak of any worker of ours is compared with the limit.
    bound
        Rate of which the bound is made; None: that of ``memcpy``.
    """

    name: str
    workload: Workload
    small: Workload
    peers: tuple[Contender, ...]
    rounds: int
    memory_limit_nbytes: int = AMPLE_NBYTES
    peaks_against: tuple[Contender, ...] = ()
    against_limit: bool = False
    bound: Bound | None = None


@dataclass(frozen=True)
class Run:
    """What a run cost."""

    wall_s: float
    #: Peak of the resident set of each worker; empty where the system does not tell.
    peaks_nbytes: tuple[int, ...]


def contest(case: Case) -> Iterator[Line]:
    """Run a case, and yield its lines.

    Raises
    ------
    WrongAnswerError
        If an answer is wrong.
    BrokenRunError
        If a run fails, a worker is lost, or dask-gpurt is not what runs on our side.
    """
    # Ours is beside the first peer, which is the one that matters most.
    contenders = (case.peers[0], OURS, *case.peers[1:])
    runs: dict[Contender, list[Run]] = {contender: [] for contender in contenders}
    bounds_s: list[float] = []
    spec = ClusterSpec(workers=2, threads=1, memory_limit_nbytes=case.memory_limit_nbytes)
    sides = dict.fromkeys([STOCK, *(contender.side for contender in contenders)])
    with clusters(spec, sides) as clients:
        for contender in contenders:
            _warm_up(case.small, contender, clients[contender.side.name])
        inputs = {name: case.workload.load(client) for name, client in clients.items()}
        stock = clients[STOCK.name]
        truth = case.workload.truth(stock, inputs[STOCK.name])
        nbytes = case.workload.nbytes(stock, inputs[STOCK.name])
        excerpts: list[pd.DataFrame] = []
        copying = (case.bound or MEMCPY).start()
        for number, contender in rounds(contenders, case.rounds):
            if len(bounds_s) == number:
                bounds_s.append(nbytes / copying())
            client = clients[contender.side.name]
            with dropping(client):
                run, answer = _measure(case, contender, client, inputs[contender.side.name])
                case.workload.check(client, answer, truth)
                if number == 0:
                    excerpt = case.workload.excerpt(client, answer)
                    if excerpt is not None:
                        excerpts = excerpts or [excerpt]
                        compare_frames(excerpts[0], excerpt)
                del answer
            runs[contender].append(run)
    yield from _lines(case, runs, bounds_s)


def runner(make: Callable[..., Case]) -> Callable[[bool], Iterator[Line]]:
    """Return what a :class:`~benchmarks.frame.Subject` calls for a case, which ``make(quick=...)`` makes."""
    return lambda quick: contest(make(quick=quick))


def _lines(case: Case, runs: dict[Contender, list[Run]], bounds_s: Sequence[float]) -> Iterator[Line]:
    """Make the lines of a case of all its runs."""
    ours = runs[OURS]
    walls = [run.wall_s for run in ours]
    for peer in case.peers:
        yield line_of_pairs(case.name, "wall_s", walls, [run.wall_s for run in runs[peer]], peer.name)
    yield line_of_pairs(case.name, "wall_s", walls, bounds_s, (case.bound or MEMCPY).name)
    if not all(run.peaks_nbytes for each in runs.values() for run in each):
        return
    for peer in case.peaks_against:
        peaks, theirs = ([sum(run.peaks_nbytes) for run in runs[contender]] for contender in (OURS, peer))
        yield line_of_pairs(case.name, "peak_rss_nbytes", peaks, theirs, peer.name)
    if case.against_limit:
        highest = [max(run.peaks_nbytes) for run in ours]
        limits = [case.memory_limit_nbytes] * len(highest)
        yield line_of_pairs(case.name, "peak_rss_nbytes", highest, limits, "limit")


@contextlib.contextmanager
def clusters(spec: ClusterSpec, sides: Iterable[Side] = (STOCK, GPURT)) -> Iterator[dict[str, Client]]:
    """Start a cluster for each side; return a client of each by the side's name.

    Raises
    ------
    BrokenRunError
        If not all of dask-gpurt is installed on its side.
    """
    with contextlib.ExitStack() as stack:
        clients = {}
        for side in sides:
            client = clients[side.name] = stack.enter_context(open_client(spec))
            side.install(client)
            if side.parts:
                installation = status(client)
                if not all(map(installation.installed, PARTS)):
                    raise BrokenRunError(f"not all of it is installed:\n{installation}")
        yield clients


def _warm_up(workload: Workload, contender: Contender, client: Client) -> None:
    with dropping(client), contender.chosen(client):
        inputs = workload.load(client)
        answer = client.persist(workload.build(inputs))
        wait(answer)
        workload.check(client, answer, workload.truth(client, inputs))
        del inputs, answer


def _measure(case: Case, contender: Contender, client: Client, inputs: Any) -> tuple[Run, Any]:
    before = _pids(client)
    peaks_known = all(_reset_peak(pid) for pid in before)
    with contender.chosen(client):
        started = time.perf_counter()
        answer = client.persist(case.workload.build(inputs))
        try:
            wait(answer, timeout=RUN_LIMIT_S)
        except TimeoutError as error:
            raise BrokenRunError(f"{case.name} on {contender.name} did not end within {RUN_LIMIT_S} s") from error
        wall_s = time.perf_counter() - started
    for future in futures_of(answer):
        if future.status == "error":
            reason = future.exception()
            raise BrokenRunError(f"{case.name} failed on {contender.name}: {reason}") from reason
    if _pids(client) != before:
        raise BrokenRunError(f"{case.name}: {contender.name} lost a worker")
    return Run(wall_s, tuple(map(_peak_nbytes, before)) if peaks_known else ()), answer


@contextlib.contextmanager
def dropping(client: Client) -> Iterator[None]:
    """Wait, at the end, until the workers hold no more results than at the beginning.

    Raises
    ------
    BrokenRunError
        If they go on to hold them.
    """
    before = _held(client)
    yield
    # Collections refer to themselves in circles.
    gc.collect()
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while _held(client) > before:
        if time.monotonic() > deadline:
            raise BrokenRunError(f"the workers still hold {_held(client)} results, not {before}")
        time.sleep(SETTLE_PERIOD_S)


def _held(client: Client) -> int:
    return sum(client.run(_count_results).values())


def _count_results(dask_worker: Any) -> int:
    return len(dask_worker.data)


def _pids(client: Client) -> tuple[int, ...]:
    return tuple(sorted(client.run(os.getpid).values()))


def _reset_peak(pid: int) -> bool:
    """Set a process's high-water mark back to what is resident now; see proc_pid_clear_refs(5)."""
    try:
        with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _peak_nbytes(pid: int) -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def memcpy_rate(nbytes: int = COPIED_NBYTES, copies: int = 3) -> Callable[[], float]:
    """Return what measures the rate at which one thread copies memory, in bytes per second: the median of some copies.

    Examples
    --------
    >>> memcpy_rate(nbytes=8_000_000)() > 0
    True
    """
    source, target = np.ones(nbytes // 8), np.zeros(nbytes // 8)

    def measure() -> float:
        rates = []
        for _ in range(copies):
            started = time.perf_counter()
            np.copyto(target, source)
            rates.append(source.nbytes / (time.perf_counter() - started))
        return statistics.median(rates)

    return measure


MEMCPY = Bound("memcpy", memcpy_rate)
