"""Rounds of random jobs on a real cluster.

Each round runs a program of arrays and one of frames at a time, from two threads of the client, on two worker processes whose HOST tier
has a quarter of what the programs hold at their peak, and compares all answers. Then everything is dropped, the workers are
waited for until they have forgotten it, and their books must be empty: no byte held or reserved in any tier. After each round the figures of
:mod:`benchmarks.soak.growth` are taken of each worker and of the process of client and scheduler.

A round depends on nothing but the seed and its number.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NoAnswerError
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client

from benchmarks.contest import dropping
from benchmarks.frame import BrokenRunError, WrongAnswerError
from benchmarks.soak.figures import books, measure_process, measure_worker, written_nbytes
from benchmarks.soak.jobs import MismatchError, array_program, frame_program

__all__ = ["FULL", "MEMORY_LIMIT_NBYTES", "SMALL", "WORKERS", "Load", "run_round", "spilled_nbytes"]

WORKERS = 2


@dataclass(frozen=True)
class Load:
    """How large the programs are.

    Parameters
    ----------
    side, rows
        Of the arrays, and of the frames.
    host_limit_nbytes
        What each worker may have in memory.
    """

    side: int
    rows: int
    host_limit_nbytes: int


#: The programs hold up to four arrays of 12 MB and three frames of 10 MB, some 80 MB, on two workers, and what operations make on
#: their way to the next one.
FULL = Load(side=1_250, rows=200_000, host_limit_nbytes=10_000_000)

#: The same in small.
SMALL = Load(side=500, rows=32_000, host_limit_nbytes=1_600_000)

#: Of a worker: enough for what is no data, so that the limit above is what counts.
MEMORY_LIMIT_NBYTES = 3 * 2**29

#: A round that takes longer hangs: many times what one takes on two busy cores.
ROUND_LIMIT_S = 240.0

#: What is removed late, by threads, is waited for so long.
SETTLE_LIMIT_S = 30.0


def run_round(client: Client, load: Load, seed: int, number: int) -> dict[str, dict[str, float]]:
    """Run one round; return the figures of all processes at its end.

    Raises
    ------
    WrongAnswerError
        If a collection is not what it should be.
    BrokenRunError
        If the round does not end, or leaves something behind.
    """
    name = f"round {number} of seed {seed}"
    with dropping(client), client.as_current():
        programs: tuple[tuple[Callable[[Any, int], None], int], ...] = (
            (array_program, load.side),
            (frame_program, load.rows),
        )
        threads = ThreadPoolExecutor(len(programs), thread_name_prefix="soak")
        running = [
            threads.submit(program, np.random.default_rng([seed, number, size]), size) for program, size in programs
        ]
        deadline = time.monotonic() + ROUND_LIMIT_S
        try:
            for program in running:
                program.result(max(0.0, deadline - time.monotonic()))
        except MismatchError as error:
            raise WrongAnswerError(f"{name}: {error}") from error
        except NoAnswerError as error:
            raise BrokenRunError(f"{name} did not end within {ROUND_LIMIT_S:g} s: {_state(client)}") from error
        finally:
            # The threads of a round that hangs end with the process.
            threads.shutdown(wait=False, cancel_futures=True)
        del running
    return _figures(client, name)


def _figures(client: Client, name: str) -> dict[str, dict[str, float]]:
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while left := {address: books for address, books in client.run(books).items() if any(books.values())}:
        if time.monotonic() > deadline:
            raise BrokenRunError(f"{name}: nothing is wanted any more, and the workers hold {left}")
        time.sleep(0.05)
    gc.collect()
    workers = client.run(measure_worker)
    here = measure_process()
    return {f"worker {number}": workers[address] for number, address in enumerate(sorted(workers))} | {"client": here}


def _state(client: Client) -> Mapping[str, object]:
    calls = client.call_stack()
    return {"processing": client.processing(), "calls": {w: list(tasks) for w, tasks in calls.items()}}


def spilled_nbytes(client: Client) -> int:
    """Return the bytes that all workers have written so far."""
    return sum(client.run(written_nbytes).values())
