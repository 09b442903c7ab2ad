"""What a process holds, as numbers that should not grow.

Covers: the process that asks, and a worker of Dask's, with dask-gpurt or without; the functions for workers are run there.
Does not cover: what is too much; see :mod:`benchmarks.soak.growth`.
"""

from __future__ import annotations

import gc
import os
from typing import Any

import psutil

__all__ = ["books", "file_nbytes", "measure_process", "measure_worker", "written_nbytes"]


def books(dask_worker: Any) -> dict[str, int]:
    """Return the bytes that a worker holds and has reserved, in each tier; of stock Dask, those of the keys it holds."""
    if "gpurt" not in dask_worker.extensions:
        return {"keys_held_nbytes": int(dask_worker.state.nbytes)}
    figures = dask_worker.extensions["gpurt"].memory.metrics()
    return {name: value for name, value in figures.items() if name.endswith(("_held_nbytes", "_reserved_nbytes"))}


def written_nbytes(dask_worker: Any) -> int:
    """Return the bytes that a worker has spilled since it began; of stock Dask without its shuffle, which always writes files."""
    if "gpurt" not in dask_worker.extensions:
        return int(dask_worker.data.cumulative_metrics["disk-write", "bytes"])
    nbytes: int = dask_worker.extensions["gpurt"].memory.metrics()["host_written_nbytes"]
    return nbytes


def measure_worker(dask_worker: Any) -> dict[str, float]:
    """Measure a worker's process, and its files."""
    gc.collect()
    files = [os.path.join(folder, name) for folder, _, names in os.walk(dask_worker.local_directory) for name in names]
    idle = idle_nbytes = 0
    if "gpurt" in dask_worker.extensions:
        # Those that wait for their next copy are bounded by what was in use at a time, and no sign of a leak.
        figures = dask_worker.extensions["gpurt"].memory.metrics()
        idle, idle_nbytes = figures["disk_idle_files"], figures["disk_idle_file_nbytes"]
    return {
        **measure_process(),
        "files": len(files) - idle,
        "file_nbytes": max(0, sum(map(file_nbytes, files)) - idle_nbytes),
    }


def measure_process() -> dict[str, float]:
    """Measure this process."""
    process = psutil.Process()
    opened = list(map(_target, os.listdir("/proc/self/fd")))
    sockets = sum(target.startswith("socket:") for target in opened)
    return {
        "rss_nbytes": process.memory_info().rss,
        "descriptors": len(opened) - sockets,
        "sockets": sockets,
        "threads": process.num_threads(),
    }


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return "closed"  # in this moment


def file_nbytes(path: str) -> int:
    """Return what a file takes of the disk; none if it is gone."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0  # it was removed in this moment
