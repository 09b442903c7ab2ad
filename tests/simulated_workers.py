"""A dashboard with more workers than a machine has: their figures, in the middle of a large job, in place of those of a cluster.

Covers: :class:`Simulated`, which puts them where the pages look. Does not cover: how they come there from real workers
(``tests/cluster/test_dashboard.py``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from distributed.metrics import time

from dask_gpurt.observe.board import LENGTH, ClusterReport, Placing, WorkerState
from dask_gpurt.observe.journal import Journal
from dask_gpurt.observe.reports import RunReport, TierReport, WorkerReport

__all__ = ["Simulated"]

GIB = 2**30
#: Workers of a host.
HOST = 8
#: The job has been at work for so long when the page is opened.
BEGAN_S = 600.0


class Simulated:
    """The figures of many workers with GPUs and an object store.

    Parameters
    ----------
    observer
        What the pages ask.
    count
        Workers.
    """

    def __init__(self, observer: Any, count: int) -> None:
        self.random = np.random.default_rng(0)
        self.names = {f"tcp://10.0.{i // HOST}.{i % HOST}:9000": f"node{i // HOST}-{i % HOST}" for i in range(count)}
        #: The one that everybody sends to, whose event loop suffers from that.
        self.hot = count * 2 // 5
        #: How busy each is, beside the others.
        self.pace = self.random.uniform(0.6, 1.0, count)
        self.pace[self.hot] = 1.3
        self.began_s: float | None = None
        self.board = observer.board
        observer.look = self.look
        observer.journals = self.journals
        observer.names = lambda: self.names

    def look(self) -> ClusterReport:
        """Say what is known now; for the first who asks, as if somebody had looked all the time."""
        now_s = time()
        if self.began_s is None:
            self.began_s = now_s - BEGAN_S
            for age in range(LENGTH, 0, -1):
                self.board.observe(now_s - age, self.at(now_s - age))
        return self.at(now_s)

    def at(self, now_s: float) -> ClusterReport:
        """Say what is known at a time."""
        assert self.began_s is not None
        elapsed_s = now_s - self.began_s
        workers = []
        for number, (address, name) in enumerate(self.names.items()):
            pace = self.pace[number]
            wave = math.sin(elapsed_s / 30 + number / 40)
            device, host = (0.75 + 0.2 * wave) * 70 * GIB, (0.5 + 0.3 * wave) * 96 * GIB
            spilled = max(0.0, 40 * GIB * math.sin(elapsed_s / 60 + number // HOST))
            report = WorkerReport(
                tiers={
                    "device": TierReport(int(device), 2 * GIB, 80 * GIB),
                    "host": TierReport(int(host), GIB, 96 * GIB),
                    "disk": TierReport(int(spilled), 0, None),
                    "object": TierReport(int(spilled / 4), 0, None),
                },
                moves={
                    ("device", "host"): int(elapsed_s * 2e8 * pace),
                    ("host", "device"): int(elapsed_s * 1.8e8 * pace),
                    ("host", "disk"): int(elapsed_s * 5e7 * pace),
                },
                sent={
                    "ucx": int(elapsed_s * 8e8 * pace),
                    "comm": int(elapsed_s * 2e6 * pace),
                    "inputs": int(elapsed_s * 3e7 * pace),
                    "local": int(elapsed_s * 4e6 * pace),
                },
                received_nbytes=int(elapsed_s * 8e8 * pace),
                credit_wait_s=elapsed_s * 0.02 * pace,
                shuffles=4,
                runs=tuple(self._run(run) for run in (3, 4)),
            )
            loop_s = 0.02 + 0.3 * (number == self.hot) + float(self.random.exponential(0.004))
            workers.append(WorkerState(address, name, now_s, loop_s, report))
        reasons = {"planned": 48_210, "most-bytes": 11_922, "only-holder": 9_120, "idle": 312, "steal-allowed": 87}
        names = list(self.names.values())
        latest = [Placing(f"('read-parquet-{i}', {i})", "planned", names[17 * i % len(names)]) for i in range(12)]
        loop_s = 0.03 + float(self.random.exponential(0.01))
        return ClusterReport(workers, loop_s, reasons, 0, 12_400, 3_100, latest)

    @staticmethod
    def _run(run: int) -> RunReport:
        phase = "transfer" if run == 4 else "unpack"
        return RunReport(f"{run}f3a9c21", run, phase, False, 12, run, 20, 10**10, 10**8, 10**10, 2, 0.4, run)

    async def journals(self) -> dict[str, Journal]:
        """Say who has sent what: everybody to all, more within a host, and one gets too much."""
        assert self.began_s is not None
        each_nbytes = (time() - self.began_s) * 8e8 / len(self.names)
        found = {}
        for number, address in enumerate(self.names):
            sent = {}
            for other, peer in enumerate(self.names):
                if other != number:
                    near = number // HOST == other // HOST
                    much = (3 if near else 1) * (2 if other == self.hot else 1)
                    nbytes = int(self.random.uniform(0.8, 1.2) * much * each_nbytes)
                    sent[peer, "ucx"] = nbytes
                    sent[peer, "inputs"] = nbytes // 20
            found[address] = Journal(sent=sent)
        return found
