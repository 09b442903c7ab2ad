"""``python -m benchmarks.world --seeds N``: the simulated world, one seed after the other.

Each seed runs in a process of its own, which is forked from one that has loaded everything, so that none knows of another. ``--seed N``
runs that one alone, and tells its story. ``--stock`` does the same to Dask without dask-gpurt.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib
import json
import os
import select
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.world.machine import VirtualLoop, real_time, take_threads, take_time

#: No seed takes more processor time, which is some hundred times what they take; nor longer, which one does that waits for itself.
CPU_S = 120
REAL_S = 1800


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world", description=__doc__)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="this one alone, and its story")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="how many run at a time")
    parser.add_argument("--plant", help="plant this bug, which is to be found; see benchmarks/world/planted.py")
    parser.add_argument("--stop", action="store_true", help="stop with the first seed that finds something")
    parser.add_argument("--stock", action="store_true", help="Dask without dask-gpurt, to compare")
    parser.add_argument("--json", type=Path, help="write a line a seed to this file")
    return parser.parse_args()


def _fork(seed: int, run: Any) -> tuple[int, int]:
    """Run a seed in a child; returns its number and where its outcome is read."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    import faulthandler

    # When that happens depends on what was there before.
    gc.disable()
    # The signal ends the process after that.
    faulthandler.register(signal.SIGPROF, chain=True)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    faulthandler.dump_traceback_later(REAL_S, exit=True)
    outcome = run(seed)
    with open(writing, "w") as file:
        json.dump(outcome, file)
    # Threads of the world still wait for their turn.
    sys.stdout.flush()
    os._exit(0)


def _gather(seeds: range, processes: int, run: Any) -> Iterator[tuple[int, Any]]:
    """Run all seeds, so many at a time, and yield what came of them."""
    waiting = iter(seeds)
    running: dict[int, tuple[int, int, bytes]] = {}
    try:
        yield from _outcomes(waiting, processes, run, running)
    finally:
        for _, child, _ in running.values():
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _outcomes(
    waiting: Iterator[int], processes: int, run: Any, running: dict[int, tuple[int, int, bytes]]
) -> Iterator[tuple[int, Any]]:
    while True:
        while len(running) < processes and (seed := next(waiting, None)) is not None:
            child, reading = _fork(seed, run)
            running[reading] = (seed, child, b"")
        if not running:
            return
        for reading in select.select(list(running), [], [])[0]:
            seed, child, told = running[reading]
            piece = os.read(reading, 2**16)
            if piece:
                running[reading] = (seed, child, told + piece)
                continue
            del running[reading]
            os.close(reading)
            os.waitpid(child, 0)
            yield seed, json.loads(told) if told else None


def main() -> int:
    """Run; the exit status is 1 if anything was found."""
    arguments = _arguments()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Dask goes through sets in the order of hashes.
        os.execve(  # noqa: S606
            sys.executable,
            [sys.executable, "-m", "benchmarks.world", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    worlds: list[VirtualLoop] = []
    # Before anything is imported that takes functions of these modules for its own.
    take_time(lambda: worlds[0].read() if worlds else 0.0, lambda: worlds[0].now if worlds else 0.0)
    tell = take_threads()

    import logging
    import warnings

    import dask

    from benchmarks.world.cluster import CONFIG, take_servers
    from benchmarks.world.jobs import make_jobs
    from benchmarks.world.run import simulate

    dask.config.set(CONFIG)
    take_servers()
    verbose = arguments.seed is not None
    if not verbose:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
    if arguments.plant:
        from benchmarks.world import planted

        planted.plant(arguments.plant)
    jobs = make_jobs()

    def run(seed: int) -> dict[str, Any]:
        return dataclasses.asdict(simulate(seed, jobs, tell, worlds.append, stock=arguments.stock))

    def loaded(seed: int) -> list[str]:
        run(seed)
        return list(sys.modules)

    # What is loaded late is loaded once.
    for _, names in _gather(range(1), 1, loaded):
        for name in names or ():
            if name.partition(".")[0] in (
                "dask",
                "distributed",
                "dask_gpurt",
                "pandas",
                "pyarrow",
                "numba",
                "cryptography",
            ):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)

    # A seed looks for what is left of it, and not through all that was loaded.
    gc.freeze()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    if verbose:
        seeds = range(arguments.seed, arguments.seed + 1)
    began = real_time()
    found = []
    kinds: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    what: Counter[str] = Counter()
    lines = arguments.json.open("w") if arguments.json else None
    for seed, told in _gather(seeds, arguments.processes, run):
        outcome = told or {
            "seed": seed,
            "broken": "the process has died",
            "kind": "died",
            "story": [],
            "faults": [],
            "counts": {},
        }
        kinds.update(outcome["faults"])
        counts.update(outcome["counts"])
        if lines is not None:
            lines.write(json.dumps(outcome) + "\n")
            lines.flush()
        if verbose:
            print("\n".join(outcome["story"]))
            print(f"digest {outcome.get('digest')}, {outcome.get('virtual_s')} s, in {outcome.get('real_s')} s")
        if outcome["broken"] is not None:
            found.append(seed)
            what[outcome["kind"]] += 1
            print(f"seed {seed}: {outcome['broken']}", flush=True)
            if arguments.stop:
                break
    print(
        f"{len(seeds)} seeds in {real_time() - began:.0f} s, {len(found)} broken {found[:20]} {dict(what)}; "
        f"faults {dict(sorted(kinds.items()))}; {dict(counts)}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
