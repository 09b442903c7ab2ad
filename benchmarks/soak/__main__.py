"""``python -m benchmarks soak --minutes N [--seed S] [--json FILE]``: exit status 1 if anything was wrong, hung, or grew."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import dask
import dask.array as da
from distributed import Client

from benchmarks.frame import BrokenRunError, WrongAnswerError
from benchmarks.soak.growth import ROUNDS_MIN, complaints
from benchmarks.soak.rounds import FULL, MEMORY_LIMIT_NBYTES, WORKERS, Load, run_round, spilled_nbytes
from dask_gpurt import install
from dask_gpurt.demo import machine
from dask_gpurt.demo.cluster import ClusterSpec, open_client

__all__ = ["main", "soak"]


#: What Dask itself collects for an hour, or for a hundred graphs, would look like a leak.
BOUNDED = {
    "distributed.worker.profile.enabled": False,
    "distributed.diagnostics.computations.max-history": 1,
    "distributed.admin.log-length": 100,
    "distributed.admin.low-level-log-length": 100,
}


def soak(load: Load, minutes: float, seed: int) -> tuple[list[dict[str, dict[str, float]]], int]:
    """Run rounds for so long; return the figures after each of them, and the bytes that were written to DISK.

    Raises
    ------
    WrongAnswerError, BrokenRunError
        If a round goes wrong.
    """
    spec = ClusterSpec(workers=WORKERS, threads=1, memory_limit_nbytes=MEMORY_LIMIT_NBYTES)
    samples: list[dict[str, dict[str, float]]] = []
    with dask.config.set(BOUNDED), open_client(spec) as client:
        answer = install(client, config={"memory.host-limit": load.host_limit_nbytes})
        if not answer.installed("memory"):
            raise BrokenRunError(str(answer))
        pids = _pids(client)
        end = time.monotonic() + 60 * minutes
        while len(samples) < ROUNDS_MIN or time.monotonic() < end:
            begun = time.monotonic()
            samples.append(run_round(client, load, seed, len(samples)))
            if _pids(client) != pids:
                raise BrokenRunError(f"round {len(samples) - 1} of seed {seed}: a worker was lost")
            print(_line(samples, time.monotonic() - begun), flush=True)
        return samples, spilled_nbytes(client)


def _pids(client: Client) -> set[int]:
    return set(client.run(os.getpid).values())


def _line(samples: Sequence[dict[str, dict[str, float]]], elapsed_s: float) -> str:
    rss = " ".join(f"{figures['rss_nbytes'] / 2**20:.0f}" for figures in samples[-1].values())
    rest = " ".join(
        f"{figures['descriptors']:g}/{figures['threads']:g}/{figures.get('files', 0):g}"
        for figures in samples[-1].values()
    )
    return f"round {len(samples) - 1}: {elapsed_s:.1f} s, MiB {rss}, descriptors/threads/files {rest}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for how long (10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random jobs (the time)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures of all rounds to FILE")
    options = parser.parse_args(arguments)
    # Chunks are random, and do not go well together.
    warnings.filterwarnings("ignore", "Increasing number of chunks", da.PerformanceWarning)
    try:
        samples, written_nbytes = soak(FULL, options.minutes, options.seed)
    except (WrongAnswerError, BrokenRunError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    found = complaints(samples)
    if not written_nbytes:
        found.append("nothing was spilled: the jobs were not what they should be")
    if options.json is not None:
        content = {"seed": options.seed, "minutes": options.minutes, **machine.describe()}
        content |= {"written_nbytes": written_nbytes, "complaints": found, "rounds": samples}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for complaint in found:
        print(complaint, file=sys.stderr)
    verdict = "something grew" if found else "nothing grew"
    print(
        f"soak: {len(samples)} rounds, seed {options.seed}, all answers right, {written_nbytes / 1e9:.2f} GB spilled, {verdict}"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
