"""Puts the figures of a worker into Dask's heartbeats, and takes them out again.

Covers: :class:`WorkerObserver`; what a worker answers when it is asked for its journal (see :mod:`dask_gpurt.observe.journal`). A heartbeat carries one report (see :mod:`dask_gpurt.observe.reports`), and for each tier what
Dask's own table of workers shows: its page takes any text among a worker's metrics for one more column.
Does not cover: what Prometheus is told; see :mod:`dask_gpurt.observe.prometheus`.

What it costs: some 20 µs for each heartbeat, whoever looks or not; and less than one for each time that a peer took inputs from here,
which Dask logs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dask_gpurt.handlers import weak
from dask_gpurt.observe import prometheus
from dask_gpurt.observe.journal import Journal, RunPart
from dask_gpurt.observe.reports import RunReport, TierReport, WorkerReport, columns

if TYPE_CHECKING:
    from distributed import Worker

    from dask_gpurt.plugins.worker import WorkerRuntime

__all__ = ["JOURNAL", "METRIC", "PEERS_MAX", "Outgoing", "WorkerObserver", "report"]

#: Name of the report among a worker's metrics.
METRIC = "gpurt"
#: Name under which a worker is asked for its journal.
JOURNAL = "gpurt_journal"
#: Peers for which it is remembered how many bytes of inputs they took; those that took some last are kept.
PEERS_MAX = 4096


def report(worker: Worker, runtime: WorkerRuntime) -> WorkerReport:
    """Look at what a worker has and did."""
    memory, shuffle = runtime.memory, runtime.shuffle
    sent = {"inputs": worker.transfer_outgoing_bytes_total}
    received, waited_s, shuffles = 0, 0.0, 0
    runs: tuple[RunReport, ...] = ()
    if shuffle is not None:
        figures = shuffle.metrics()
        sent |= {path: int(figures[f"bytes_{name}"]) for path, name in _SENT.items()}
        received, waited_s, shuffles = int(figures["bytes_received"]), figures["credit_wait_s"], int(figures["runs"])
        runs = tuple(RunReport.of(state) for state in shuffle.states())
    return WorkerReport(
        tiers={} if memory is None else {str(tier): TierReport(*figures) for tier, figures in memory.tiers().items()},
        moves={} if memory is None else {(str(a), str(b)): nbytes for (a, b), nbytes in memory.moves().items()},
        sent=sent,
        received_nbytes=received,
        credit_wait_s=waited_s,
        shuffles=shuffles,
        runs=runs,
    )


#: Path of a report to the name of its bytes among the shuffle's metrics.
_SENT = {"ucx": "sent_ucx", "comm": "sent_comm", "local": "local"}


class Outgoing:
    """Adds up, by peer, the inputs that peers took, from Dask's own log of them."""

    def __init__(self) -> None:
        self.nbytes: dict[str, int] = {}
        self._last: object = None

    def update(self, log: deque[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> None:
        """Count what is new in the log, which Dask cuts off at its old end.

        Examples
        --------
        >>> outgoing, log = Outgoing(), [{"who": "a", "total": 5}]
        >>> outgoing.update(log)
        >>> log.append({"who": "a", "total": 2})
        >>> outgoing.update(log)
        >>> outgoing.nbytes
        {'a': 7}
        """
        fresh: list[Mapping[str, Any]] = []
        for entry in reversed(log):
            if entry is self._last:
                break
            fresh.append(entry)
        for entry in reversed(fresh):
            self._last, who = entry, entry["who"]
            # Clients do not say who they are.
            if who is not None:
                self.nbytes[who] = self.nbytes.pop(who, 0) + entry["total"]
        while len(self.nbytes) > PEERS_MAX:
            del self.nbytes[next(iter(self.nbytes))]


class WorkerObserver:
    """What others can see of a worker, from start to stop.

    Parameters
    ----------
    worker
        The worker.
    runtime
        The parts that run on it.
    """

    def __init__(self, worker: Worker, runtime: WorkerRuntime) -> None:
        self._worker = worker
        self._runtime = runtime
        self._metrics: dict[str, Callable[[Worker], Any]] = {}
        self._outgoing = Outgoing()
        self._journal: Callable[..., Any] = weak(self.journal)

    def start(self) -> None:
        """Begin to tell."""
        tiers = () if self._runtime.memory is None else self._runtime.memory.tiers()
        self._metrics = {METRIC: self._report}
        for tier, column in columns(map(str, tiers)).items():
            self._metrics[column] = partial(self._tier, tier)
        # Another object instead of another content: a heartbeat may be walking through it, and Dask closes a worker for that.
        self._worker.metrics = {**self._worker.metrics, **self._metrics}
        self._worker.handlers[JOURNAL] = self._journal
        prometheus.collectors.attach("worker", self._worker)

    def stop(self) -> None:
        """Tell nothing any more. Calling it again does nothing."""
        metrics = self._worker.metrics.items()
        self._worker.metrics = {name: metric for name, metric in metrics if self._metrics.get(name) is not metric}
        self._metrics = {}
        if self._worker.handlers.get(JOURNAL) is self._journal:
            del self._worker.handlers[JOURNAL]
        prometheus.collectors.detach("worker", self._worker)

    def journal(self) -> dict[str, Any]:
        """Answer who was sent what, and what runs of shuffles there were. Handler for the scheduler."""
        now = self._look()
        sent = {(peer, "inputs"): nbytes for peer, nbytes in self._outgoing.nbytes.items()}
        shuffle = self._runtime.shuffle
        if shuffle is None:
            return Journal(now, sent).to_message()
        runs = [RunPart.of(state, account) for state, account in shuffle.accounts()]
        return Journal(now, {**sent, **shuffle.carrier.sent}, runs).to_message()

    def _report(self, worker: Worker) -> dict[str, Any]:  # noqa: ARG002
        return self._look().to_message()

    def _look(self) -> WorkerReport:
        # Before Dask forgets what it has logged.
        self._outgoing.update(self._worker.transfer_outgoing_log)
        return report(self._worker, self._runtime)

    def _tier(self, tier: str, worker: Worker) -> str:  # noqa: ARG002
        memory = self._runtime.memory
        figures = {} if memory is None else {str(tier): found for tier, found in memory.tiers().items()}
        return str(TierReport(*figures[tier])) if tier in figures else ""
