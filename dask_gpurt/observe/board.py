"""What the pages show: the reports of all workers, over time and in rates.

Theory of operation
-------------------
Whoever wants to show something calls :meth:`Board.observe` with what the scheduler has from its workers at the moment; the
board is shared by all pages, and looked at once in :data:`INTERVAL_S` seconds however many are open. While none is open
nobody calls, and nothing is kept: a gap in time begins a new history.

Counts become rates over the time between two heartbeats of the same worker, which are half a second apart in small clusters
and some seconds in large ones. A count that goes down (a worker that was restarted) is a rate of zero.

Covers: :class:`Board` and the figures that are taken from it. Does not cover: how they are drawn, see
:mod:`dask_gpurt.observe.drawing`; where they come from, see :mod:`dask_gpurt.observe.scheduler`.

Pure: no I/O, no clock, no Dask, no Bokeh.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dask_gpurt.observe.reports import Run, WorkerReport, natural

if TYPE_CHECKING:
    from dask_gpurt.observe.journal import ShuffleRun
    from dask_gpurt.observe.matrix import Matrix

__all__ = [
    "INTERVAL_S",
    "LENGTH",
    "TIERS",
    "Board",
    "ClusterReport",
    "Placing",
    "WorkerState",
    "counts",
    "push",
    "thinned",
]

#: From the top down.
TIERS = ("device", "host", "disk", "object")
#: Time between two samples, and how many are kept: three minutes.
INTERVAL_S = 1.0
LENGTH = 180
#: A gap that is longer begins a new history.
GAP_S = 10 * INTERVAL_S
#: Runs that are shown.
RUNS_SHOWN = 12

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WorkerState:
    """What the scheduler knows of one worker."""

    address: str
    name: str
    #: When its last heartbeat came, in seconds of the scheduler's clock.
    seen_s: float
    #: Time between two turns of its event loop.
    loop_s: float
    #: None: it has no dask-gpurt, or has not told yet.
    report: WorkerReport | None = None


@dataclass(frozen=True)
class Placing:
    """A decision of the placement."""

    key: str
    reason: str
    #: Name of the worker; empty where Dask decided.
    worker: str
    #: What was compared, and with whom it was planned, line by line.
    why: str = ""


@dataclass(frozen=True)
class ClusterReport:
    """What the scheduler knows at one moment."""

    workers: Sequence[WorkerState] = ()
    #: Time between two turns of the scheduler's event loop.
    loop_s: float = 0.0
    #: Reason of the placement's decisions to how many there were; None where it is not installed.
    reasons: Mapping[str, int] | None = None
    #: Decisions that fell to Dask because of an error, tasks with a plan that are not done, those of them that wait.
    errors: int = 0
    planned: int = 0
    waiting: int = 0
    #: Latest first.
    latest: Sequence[Placing] = ()


class _Rates:
    """Turns the counts of one worker into rates."""

    def __init__(self) -> None:
        self._seen_s: float | None = None
        self._counts: Mapping[str, int] = {}
        self.rates: dict[str, float] = {}

    def update(self, seen_s: float, counts: Mapping[str, int]) -> None:
        if self._seen_s is None:
            self.rates = {}
        elif seen_s > self._seen_s:
            elapsed_s = seen_s - self._seen_s
            before = self._counts
            self.rates = {
                name: (count - before[name]) / elapsed_s if count > before.get(name, count) else 0.0
                for name, count in counts.items()
            }
        else:
            return
        self._seen_s, self._counts = seen_s, counts


class Board:
    """The figures of a cluster over the last minutes.

    Parameters
    ----------
    length
        Samples that are kept.
    gap_s
        A time without samples that is longer begins a new history.
    """

    def __init__(self, length: int = LENGTH, gap_s: float = GAP_S) -> None:
        self.cluster = ClusterReport()
        #: Who sent how much to whom, and runs of shuffles that have ended, latest first, if somebody has asked the workers.
        self.matrix: Matrix | None = None
        self.ended: Sequence[ShuffleRun] = ()
        #: Seconds of the samples before the latest one: negative, oldest first.
        self.ages_s: Floats = INTERVAL_S * np.arange(1 - length, 1, dtype=float)
        self._length = length
        self._gap_s = gap_s
        self._looked_s = -np.inf
        self._forget()

    def _forget(self) -> None:
        self._used: dict[str, dict[str, Floats]] = {tier: {} for tier in TIERS}
        self._limits: dict[str, Floats] = {tier: self._nothing() for tier in TIERS}
        self._rates: dict[str, _Rates] = {}
        #: Time between two turns of event loops: of the scheduler, of the median worker and of the worst one.
        self.loops_s: dict[str, Floats] = {name: self._nothing() for name in ("scheduler", "median", "worst")}

    # Looking

    def due(self, now_s: float) -> bool:
        """Whether it is time for the next sample."""
        # A little early is better than a whole turn late.
        return now_s - self._looked_s >= 0.9 * INTERVAL_S

    def observe(self, now_s: float, cluster: ClusterReport) -> None:
        """Take a sample."""
        if now_s - self._looked_s > self._gap_s:
            self._forget()
        self._looked_s = now_s
        workers = sorted(cluster.workers, key=lambda worker: natural(worker.name))
        self.cluster = ClusterReport(**{**vars(cluster), "workers": workers})
        there = {worker.address for worker in workers}
        for tier in TIERS:
            rows = self._used[tier]
            for address in rows.keys() - there:
                del rows[address]
            limits: list[int] = []
            for worker in workers:
                found = None if worker.report is None else worker.report.tiers.get(tier)
                if found is None:
                    rows.pop(worker.address, None)
                    continue
                push(rows.setdefault(worker.address, self._nothing()), found.used_nbytes)
                if found.limit_nbytes is not None:
                    limits.append(found.limit_nbytes)
            push(self._limits[tier], sum(limits) if rows and len(limits) == len(rows) else np.nan)
        for address in self._rates.keys() - there:
            del self._rates[address]
        for worker in workers:
            if worker.report is not None:
                self._rates.setdefault(worker.address, _Rates()).update(worker.seen_s, counts(worker.report))
        loops = [worker.loop_s for worker in workers]
        push(self.loops_s["scheduler"], cluster.loop_s)
        push(self.loops_s["median"], float(np.median(loops)) if loops else np.nan)
        push(self.loops_s["worst"], max(loops, default=np.nan))

    def _nothing(self) -> Floats:
        return np.full(self._length, np.nan)

    def thin(self) -> None:
        """Keep every second sample: there is as much room again, for samples that are twice as far apart."""
        self._used = {
            tier: {address: thinned(row) for address, row in rows.items()} for tier, rows in self._used.items()
        }
        self._limits = {tier: thinned(row) for tier, row in self._limits.items()}
        for row in self.loops_s.values():
            # A turn that took long is what one looks for.
            row[:-1:2] = row[1::2] = np.fmax(row[:-1:2], row[1::2])
        self.loops_s = {name: thinned(row) for name, row in self.loops_s.items()}

    def cut(self, ages_s: Floats) -> None:
        """Keep the latest samples, as many as ``ages_s``, which are theirs."""
        count = self._length = len(ages_s)
        self.ages_s = ages_s
        self._used = {
            tier: {address: row[-count:] for address, row in rows.items()} for tier, rows in self._used.items()
        }
        self._limits = {tier: row[-count:] for tier, row in self._limits.items()}
        self.loops_s = {name: row[-count:] for name, row in self.loops_s.items()}

    # Tiers

    @property
    def reports(self) -> list[tuple[WorkerState, WorkerReport]]:
        """The workers that tell, in the order of their names."""
        return [(worker, worker.report) for worker in self.cluster.workers if worker.report is not None]

    @property
    def tiers(self) -> list[str]:
        """The tiers that some worker has, from the top down."""
        return [tier for tier in TIERS if self._used[tier]]

    def names(self, tier: str) -> list[str]:
        """Names of the workers that have ``tier``, in order."""
        return [worker.name for worker in self.cluster.workers if worker.address in self._used[tier]]

    def by_worker(self, tier: str) -> Floats:
        """Bytes that count in ``tier``: a row for each of :meth:`names`, a column for each of :attr:`ages_s`."""
        rows = self._used[tier]
        found = [rows[worker.address] for worker in self.cluster.workers if worker.address in rows]
        return np.stack(found) if found else np.empty((0, self._length))

    def total(self, tier: str) -> Floats:
        """Bytes of ``tier`` on all workers, over time."""
        rows = self.by_worker(tier)
        known = ~np.isnan(rows)
        return np.where(known.any(axis=0), np.where(known, rows, 0.0).sum(axis=0), np.nan)

    def limit(self, tier: str) -> Floats:
        """Bytes that ``tier`` may hold on all workers, over time; NaN: there is no limit."""
        return self._limits[tier]

    def worker_limit(self, tier: str) -> int | None:
        """The largest limit that a worker has for ``tier``; None: there is none."""
        found = [report.tiers[tier].limit_nbytes for _, report in self.reports if tier in report.tiers]
        return max((limit for limit in found if limit is not None), default=None)

    # Moves

    def rates(self) -> Counter[str]:
        """Bytes a second that move now: ``host>disk`` and so on between tiers, or a path between workers."""
        total: Counter[str] = Counter()
        for rates in self._rates.values():
            total.update(rates.rates)
        return total

    def counts(self) -> Counter[str]:
        """Bytes that have moved, on the workers that are there, by the same names."""
        total: Counter[str] = Counter()
        for _, report in self.reports:
            total.update(counts(report))
        return total

    def busiest(self, limit: int) -> list[tuple[str, dict[str, float]]]:
        """Workers that move most now, and the rates of each: ``down`` and ``up`` between tiers, ``sent``, ``received``."""
        found = []
        for worker, _ in self.reports:
            rates = self._rates[worker.address].rates
            of = {"down": 0.0, "up": 0.0, "sent": 0.0, "received": rates.get("received", 0.0)}
            for name, rate in rates.items():
                source, arrow, target = name.partition(">")
                if arrow:
                    of["down" if TIERS.index(source) < TIERS.index(target) else "up"] += rate
                elif name not in ("local", "received"):
                    of["sent"] += rate
            if any(of.values()):
                found.append((worker.name, of))
        return sorted(found, key=lambda item: -sum(item[1].values()))[:limit]

    # Shuffles

    def runs(self) -> list[Run]:
        """Runs of shuffles that are active: those that are stuck first, then the latest."""
        found: dict[tuple[str, int], Run] = {}
        for worker, report in self.reports:
            for part in report.runs:
                run = found.setdefault((part.shuffle_id, part.run_id), Run(part.shuffle_id, part.run_id))
                run.add(worker.name, part)
        return sorted(found.values(), key=lambda run: (not run.stuck, -run.run_id))[:RUNS_SHOWN]

    # Event loops

    def slowest(self) -> WorkerState | None:
        """The worker whose event loop takes longest for a turn."""
        return max(self.cluster.workers, key=lambda worker: worker.loop_s, default=None)


def push(row: Floats, value: float) -> None:
    """Add the latest value to a row; the oldest one is forgotten."""
    row[:-1] = row[1:]
    row[-1] = value


def thinned(row: Floats) -> Floats:
    """Keep every second value of a row of even length, the latest one too.

    Examples
    --------
    >>> thinned(np.arange(6.0))
    array([nan, nan, nan,  1.,  3.,  5.])
    """
    return np.concatenate([np.full(len(row) // 2, np.nan), row[1::2]])


def counts(report: WorkerReport) -> dict[str, int]:
    """Bytes that have moved on a worker: ``host>disk`` and so on between tiers, a path between workers, ``received`` shards."""
    moves = {f"{source}>{target}": nbytes for (source, target), nbytes in report.moves.items()}
    return {**moves, **report.sent, "received": report.received_nbytes}
