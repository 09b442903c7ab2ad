"""Clusters of this machine alone: every socket listens on the loopback address, and dashboards take any free port."""

from __future__ import annotations

from typing import Any

from distributed import LocalCluster

__all__ = ["WITHOUT_MONITOR", "local_cluster"]

#: Stock's memory monitor is kept out, so that only managed memory decides.
WITHOUT_MONITOR = {
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}


def local_cluster(n_workers: int, threads_per_worker: int = 1, **options: Any) -> LocalCluster:
    """Return a cluster of processes, or, with ``processes=False``, of workers in this process that talk over TCP all the same."""
    options = {"protocol": "tcp", "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", **options}
    return LocalCluster(n_workers=n_workers, threads_per_worker=threads_per_worker, **options)
