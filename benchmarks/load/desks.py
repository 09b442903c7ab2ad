"""Clients that are processes of their own, each with one job after the other, and what came of them.

A *desk* is a thread of the process of the scheduler and the client process that it hands jobs to. A job is a random program of
:mod:`benchmarks.soak.jobs` that compares all that it computes; it depends on nothing but its seed and number. A job that ends in an error
is given again, for Dask gives up what was on too many workers that died. One that does not end while nothing happens on the scheduler for
:data:`STILL_LIMIT_S`, or within :data:`JOB_LIMIT_S`, hangs: its client is killed, and another one takes its place.

Covers: :class:`Job`, :class:`Outcome`, :class:`Desks`, :func:`hangs`.
Does not cover: faults; what outcomes are acceptable.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import multiprocessing
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import dask.array as da
import numpy as np
from distributed import Client

from benchmarks.soak.jobs import MismatchError, array_program, frame_program
from benchmarks.soak.rounds import Load

__all__ = ["JOB_LIMIT_S", "STILL_LIMIT_S", "Desks", "Job", "Ledger", "Outcome", "hangs", "run_job"]

#: A job hangs if it does not end though for so long no task has changed its state; workers stand still for 20 s at most.
STILL_LIMIT_S = 120.0
#: It hangs if it takes longer, whatever happens. The largest have some 35,000 tasks, which take 100 s on two cores without faults, and others wait
#: for them.
JOB_LIMIT_S = 1200.0
#: How often it is asked whether anything happens.
LOOK_S = 10.0
#: How often a job is given that ended in an error.
ATTEMPTS = 3
#: A client process has imported everything and is connected by then.
START_LIMIT_S = 120.0


@dataclass(frozen=True)
class Job:
    """A random program.

    Parameters
    ----------
    seed, number
        What it depends on.
    load
        How large it is.
    """

    seed: int
    number: int
    load: Load

    def run(self) -> None:
        """Run it on the current client."""
        rng = np.random.default_rng([self.seed, self.number])
        program: tuple[Callable[[np.random.Generator, int], None], int]
        program = (array_program, self.load.side) if rng.random() < 0.5 else (frame_program, self.load.rows)
        program[0](rng, program[1])


@dataclass(frozen=True)
class Outcome:
    """What came of it: ``right``, ``wrong``, ``error`` or ``hang``; what kind of error, and all that is to be said."""

    verdict: str
    kind: str = ""
    story: str = ""


def run_job(job: Job) -> Outcome:
    """Run a job; whatever goes wrong is its outcome."""
    try:
        job.run()
    except MismatchError as error:
        return Outcome("wrong", story=str(error))
    except Exception as error:  # noqa: BLE001 - which errors are acceptable is for others to say
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__
        names = " from ".join(type(link).__name__ for link in chain)
        return Outcome("error", names, "; ".join(f"{link}"[:300] for link in chain))
    return Outcome("right")


def _serve(address: str, channel: Connection) -> None:
    # Chunks are random, and do not go well together.
    warnings.filterwarnings("ignore", "Increasing number of chunks", da.PerformanceWarning)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with contextlib.suppress(EOFError), Client(address) as client:
        channel.send(client.id)
        while (job := channel.recv()) is not None:
            outcome = run_job(job)
            # Collections refer to themselves in circles.
            gc.collect()
            channel.send(outcome)


@dataclass
class Ledger:
    """What came of all jobs."""

    right: int = 0
    retried: int = 0
    longest_s: float = 0.0
    #: Outcomes that were not right, by job, in the order in which they came.
    others: list[tuple[int, Outcome]] = field(default_factory=list)
    #: Jobs that were given up after :data:`ATTEMPTS` errors.
    given_up: list[int] = field(default_factory=list)


def hangs(
    poll: Callable[[float], bool], progress: Callable[[], int], clock: Callable[[], float] = time.monotonic
) -> str:
    """Wait for a job; say why it hangs, or nothing when it has ended.

    Parameters
    ----------
    poll
        Waits so many seconds for the end; says whether it has come.
    progress
        Returns how often tasks have changed their state, ever.
    clock
        In seconds.
    """
    begun = moved = clock()
    count = progress()
    while not poll(LOOK_S):
        now, found = clock(), progress()
        if found != count:
            count, moved = found, now
        if now - moved > STILL_LIMIT_S:
            return f"nothing has happened for {now - moved:.0f} s"
        if now - begun > JOB_LIMIT_S:
            return f"not done after {now - begun:.0f} s"
    return ""


class Desks:
    """Several clients at work.

    Parameters
    ----------
    address
        Of the scheduler.
    count
        How many.
    seed, load
        Of the jobs.
    state
        Says what the cluster is at, for a job that hangs.
    progress
        Returns how often tasks have changed their state, ever.
    """

    def __init__(
        self, address: str, count: int, seed: int, load: Load, *, state: Callable[[], str], progress: Callable[[], int]
    ) -> None:
        self.ledger = Ledger()
        self._address = address
        self._count = count
        self._jobs = (Job(seed, number, load) for number in itertools.count())
        self._state = state
        self._progress = progress
        self._lock = threading.Lock()
        self._spawn = multiprocessing.get_context("spawn")
        self._clients = [self._start() for _ in range(count)]

    def _start(self) -> tuple[Any, Connection]:
        channel, other = self._spawn.Pipe()
        process = self._spawn.Process(target=_serve, args=(self._address, other), daemon=True)
        process.start()
        other.close()
        if not channel.poll(START_LIMIT_S):
            raise TimeoutError("a client does not start")
        channel.recv()
        return process, channel

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Hand out jobs until the end of the block, and wait until those that were begun have come to something."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._work, args=(number, stop), name=f"desk-{number}")
            for number in range(self._count)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _work(self, number: int, stop: threading.Event) -> None:
        while not stop.is_set():
            with self._lock:
                job = next(self._jobs)
            for attempt in range(ATTEMPTS):
                begun = time.monotonic()
                outcome = self._ask(number, job)
                with self._lock:
                    self.ledger.longest_s = max(self.ledger.longest_s, time.monotonic() - begun)
                    if outcome.verdict == "right":
                        self.ledger.right += 1
                        break
                    print(f"job {job.number}: {outcome}"[:2000], flush=True)
                    self.ledger.others.append((job.number, outcome))
                    if outcome.verdict != "error":
                        break
                    if attempt + 1 == ATTEMPTS:
                        self.ledger.given_up.append(job.number)
                    else:
                        self.ledger.retried += 1

    def _ask(self, number: int, job: Job) -> Outcome:
        process, channel = self._clients[number]
        channel.send(job)
        if not (why := hangs(channel.poll, self._progress)):
            outcome: Outcome = channel.recv()
            return outcome
        outcome = Outcome("hang", story=f"{why}: {self._state()}")
        process.kill()
        process.join()
        self._clients[number] = self._start()
        return outcome

    def close(self) -> None:
        """End all client processes."""
        for process, channel in self._clients:
            with contextlib.suppress(BrokenPipeError):
                channel.send(None)
            process.join(START_LIMIT_S)
            if process.is_alive():
                process.kill()
                process.join()
            channel.close()
