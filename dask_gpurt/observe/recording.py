"""What happened on a cluster from one moment to another: the figures of a report.

Theory of operation
-------------------
A recording is sampled, first once in :data:`INTERVAL_S` seconds. When :data:`LENGTH` samples are kept, every second one is dropped,
and from then on they are taken half as often: however long it lasts, it takes no more memory, some 2 MB for 200 workers with two
tiers, and has at least half as many points as there is room for. What is counted (bytes moved, seconds waited) is kept as running
sums, so that nothing is lost between two samples; of the time that event loops take for a turn the longest is kept.

At the beginning and at the end every worker is asked, so that both ends are exact. A worker that has left counts by what its
last heartbeat said, and is missing where senders and receivers are told apart.

Covers: :class:`Recording`, :class:`Odometer`. Does not cover: who takes samples (:mod:`dask_gpurt.observe.recorder`); the page
(:mod:`dask_gpurt.observe.document`).

Pure: no I/O, no clock, no Dask, no Bokeh.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dask_gpurt.observe.board import TIERS, Board, ClusterReport, Floats, WorkerState, counts, push, thinned
from dask_gpurt.observe.journal import Journal, ShuffleRun, join
from dask_gpurt.observe.matrix import Matrix

__all__ = ["INTERVAL_S", "LENGTH", "RUNS_MAX", "STALLS_MAX", "TURN_S", "Odometer", "Recording", "Stall"]

#: Time between two samples at first; samples that are kept, an even number.
INTERVAL_S = 0.5
LENGTH = 512
#: Runs of shuffles that are kept: the latest.
RUNS_MAX = 200
#: Stalls that are kept: the longest turns of event loops, and the latest reports of shuffles.
STALLS_MAX = 50
#: An event loop that takes longer for a turn stands still.
TURN_S = 1.0


class Odometer:
    """Adds up what workers count, whatever becomes of the workers."""

    def __init__(self) -> None:
        self.total: Counter[str] = Counter()
        self._last: dict[str, dict[str, float]] = {}

    def begin(self, counts: Mapping[str, Mapping[str, float]]) -> None:
        """Take what the workers, by address, have counted already for nothing."""
        self._last = {address: dict(counted) for address, counted in counts.items()}

    def update(self, counts: Mapping[str, Mapping[str, float]]) -> None:
        """Add what was counted since the last time.

        A worker that was not there before begins at nothing. A count that is behind what is known, because it was longer on its way,
        says nothing new.

        Examples
        --------
        >>> odometer = Odometer()
        >>> odometer.begin({"a": {"ucx": 100}})
        >>> odometer.update({"a": {"ucx": 103}, "b": {"ucx": 7}})
        >>> odometer.update({"a": {"ucx": 101}})
        >>> odometer.total
        Counter({'ucx': 10})
        """
        for address in self._last.keys() - counts.keys():
            del self._last[address]
        for address, counted in counts.items():
            last = self._last.setdefault(address, {})
            for name, count in counted.items():
                if count > last.get(name, 0):
                    self.total[name] += count - last.get(name, 0)  # type: ignore[assignment]
                    last[name] = count


@dataclass(frozen=True)
class Stall:
    """Something that stood still."""

    #: Seconds since the beginning.
    at_s: float
    worker: str
    what: str
    elapsed_s: float


class Recording:
    """What happens from now on; see :meth:`observe` and :meth:`finish`.

    Parameters
    ----------
    now_s
        The time, in seconds of the scheduler's clock.
    cluster
        What the scheduler knows.
    journals
        Address of a worker to what it has told.
    """

    def __init__(self, now_s: float, cluster: ClusterReport, journals: Mapping[str, Journal]) -> None:
        self.begun_s = now_s
        #: How long it lasted; None: it has not ended yet.
        self.elapsed_s: float | None = None
        self.interval_s = INTERVAL_S
        self.board = Board(LENGTH, gap_s=math.inf)
        #: Seconds since the beginning, of each sample of the board and of :attr:`moved`.
        self.times_s: Floats = np.full(LENGTH, np.nan)
        #: Name of a count to its sum, by sample; see :func:`dask_gpurt.observe.board.counts`.
        self.moved: dict[str, Floats] = {}
        #: Tier to the most bytes that were there at once.
        self.peaks: dict[str, float] = {}
        self.runs: Sequence[ShuffleRun] = ()
        self.stalls: Sequence[Stall] = ()
        #: What was counted in all; the seconds of ``credit_wait_s`` too.
        self.total: Counter[str] = Counter()
        self._odometer = Odometer()
        self._turns: dict[str, Stall] = {}
        self._samples = 0
        self._sent = {address: journal.sent for address, journal in journals.items()}
        self._reasons = dict(cluster.reasons or {})
        cluster = _fresh(cluster, journals)
        self._odometer.begin(_counted(cluster))
        self.observe(now_s, cluster)

    def due(self, now_s: float) -> bool:
        """Whether it is time for the next sample."""
        last_s = self.begun_s + float(self.times_s[-1])
        return now_s - last_s >= 0.9 * self.interval_s

    def observe(self, now_s: float, cluster: ClusterReport) -> None:
        """Take a sample."""
        if self._samples == LENGTH:
            self.board.thin()
            self.times_s = thinned(self.times_s)
            self.moved = {name: thinned(row) for name, row in self.moved.items()}
            self._samples //= 2
            self.interval_s *= 2
        self._samples += 1
        self.board.observe(now_s, cluster)
        self._odometer.update(_counted(cluster))
        push(self.times_s, now_s - self.begun_s)
        for name in self._odometer.total.keys() - self.moved.keys():
            # Nothing of it had been there.
            self.moved[name] = np.full(LENGTH, np.nan)
            self.moved[name][LENGTH + 1 - self._samples :] = 0
        for name, row in self.moved.items():
            push(row, self._odometer.total[name])
        for tier in self.board.tiers:
            self.peaks[tier] = float(np.fmax(self.peaks.get(tier, 0.0), self.board.total(tier)[-1]))
        for worker in cluster.workers:
            self._note_turn(now_s, worker.name, worker.loop_s)
        self._note_turn(now_s, "the scheduler", cluster.loop_s)

    def _note_turn(self, now_s: float, name: str, loop_s: float) -> None:
        if loop_s >= TURN_S and (name not in self._turns or loop_s > self._turns[name].elapsed_s):
            self._turns[name] = Stall(now_s - self.begun_s, name, "a turn of the event loop", loop_s)

    def finish(
        self,
        now_s: float,
        cluster: ClusterReport,
        journals: Mapping[str, Journal],
        stuck: Sequence[tuple[float, Mapping[str, Any]]],
    ) -> None:
        """Take the last sample.

        Parameters
        ----------
        now_s, cluster, journals
            As at the beginning.
        stuck
            When each run of a shuffle was reported as stuck, and what was said of it; from any time.
        """
        cluster = _fresh(cluster, journals)
        self.observe(now_s, cluster)
        self.elapsed_s = now_s - self.begun_s
        self.total = self._odometer.total
        self.times_s = self.times_s[-self._samples :]
        self.moved = {name: row[-self._samples :] for name, row in self.moved.items()}
        self.board.cut(self.times_s)
        names = {worker.address: worker.name for worker in cluster.workers}
        sent = {address: journal.sent for address, journal in journals.items()}
        self.board.matrix = Matrix.of(names, sent, self._sent)
        if cluster.reasons is not None:
            since = {reason: count - self._reasons.get(reason, 0) for reason, count in cluster.reasons.items()}
            reasons = {reason: count for reason, count in since.items() if count > 0}
            self.board.cluster = dataclasses.replace(self.board.cluster, reasons=reasons, latest=())
        runs = join({names.get(address, address): journal for address, journal in journals.items()})
        # Workers have clocks of their own.
        self.runs = [run for run in runs if run.ended_s is None or run.ended_s >= self.begun_s][:RUNS_MAX]
        turns = sorted(self._turns.values(), key=lambda stall: -stall.elapsed_s)
        shuffles = [
            Stall(at_s - self.begun_s, names.get(said["worker"], said["worker"]), str(said["run"]), said["still_s"])
            for at_s, said in stuck
            if at_s >= self.begun_s
        ]
        self.stalls = sorted(turns[:STALLS_MAX] + shuffles[-STALLS_MAX:], key=lambda stall: stall.at_s)

    @property
    def tiers(self) -> list[str]:
        """Tiers that some worker had, from the top down."""
        return [tier for tier in TIERS if tier in self.peaks]

    def rates(self, name: str) -> Floats:
        """Bytes a second of a count, by sample: the mean since the sample before."""
        if name not in self.moved or len(self.times_s) < 2:
            return np.zeros(len(self.times_s))
        passed_s = np.maximum(np.diff(self.times_s), 1e-9)
        rates: Floats = np.concatenate([[0.0], np.diff(self.moved[name]) / passed_s])
        return rates


def _fresh(cluster: ClusterReport, journals: Mapping[str, Journal]) -> ClusterReport:
    """Put in what workers have told just now for what they told with their last heartbeats."""

    def newer(worker: WorkerState) -> WorkerState:
        journal = journals.get(worker.address)
        return worker if journal is None else dataclasses.replace(worker, report=journal.report)

    return dataclasses.replace(cluster, workers=[newer(worker) for worker in cluster.workers])


def _counted(cluster: ClusterReport) -> dict[str, dict[str, float]]:
    return {
        worker.address: {**counts(report), "credit_wait_s": report.credit_wait_s}
        for worker in cluster.workers
        if (report := worker.report) is not None
    }
