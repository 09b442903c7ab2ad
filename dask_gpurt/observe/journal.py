"""What a worker tells when it is asked: what it has sent to each peer, and its runs of shuffles, those that ended lately included.

Covers: :class:`Journal`, one worker's answer, and how it travels; :func:`join`, which makes the runs of a cluster of the parts that its
workers tell. Does not cover: what workers tell unasked (:mod:`dask_gpurt.observe.reports`); who asks
(:mod:`dask_gpurt.observe.scheduler`); how runs are shown to people (:mod:`dask_gpurt.observe.shuffles`).

A heartbeat would be the wrong place: a worker has as many peers as there are workers, and nobody looks most of the time. An answer
takes some 50 bytes for each peer and path, and 300 for each run, of which there are few.

Pure: no I/O, no clock, no Dask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dask_gpurt.observe.reports import Run, RunReport, WorkerReport

if TYPE_CHECKING:
    from dask_gpurt.shuffle.account import Account

__all__ = ["Journal", "RunPart", "ShuffleRun", "join"]


@dataclass(frozen=True)
class RunPart:
    """A run of a shuffle on one worker, from its beginning; times are seconds since the epoch, by the worker's clock."""

    report: RunReport
    begun_s: float
    #: When peers had all that was sent to them, and when the run ended here; None: not yet.
    transferred_s: float | None
    ended_s: float | None
    #: ``ucx``, ``comm`` or ``local`` to bytes.
    sent: Mapping[str, int]
    #: Bytes that went to DISK while they waited to be unpacked.
    written_nbytes: int
    credit_wait_s: float

    @classmethod
    def of(cls, state: Mapping[str, Any], account: Account) -> RunPart:
        """Take what is worth telling of a run; see :meth:`dask_gpurt.shuffle.worker.ShuffleWorker.accounts`."""
        return cls(
            RunReport.of(state),
            account.begun_s,
            account.transferred_s,
            account.ended_s,
            dict(account.sent),
            account.written_nbytes,
            account.credit_wait_s,
        )


@dataclass(frozen=True)
class Journal:
    """One worker's answer."""

    #: What it tells with its heartbeats, as it is now.
    report: WorkerReport = field(default_factory=WorkerReport)
    #: (address of a peer, one of :data:`~dask_gpurt.observe.reports.PATHS`) to the bytes that were sent to it.
    sent: Mapping[tuple[str, str], int] = field(default_factory=dict)
    #: Oldest first.
    runs: Sequence[RunPart] = ()

    def to_message(self) -> dict[str, Any]:
        """Turn into what a message carries without pickle.

        Examples
        --------
        >>> journal = Journal(WorkerReport(received_nbytes=3), {("tcp://10.0.0.1:1", "ucx"): 5})
        >>> Journal.from_message(journal.to_message()) == journal
        True
        """
        runs = [[list(vars(part.report).values()), *list(vars(part).values())[1:]] for part in self.runs]
        sent = [[peer, path, nbytes] for (peer, path), nbytes in self.sent.items()]
        return {"report": self.report.to_message(), "sent": sent, "runs": runs}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Journal:
        """Read what :meth:`to_message` has made."""
        return cls(
            WorkerReport.from_message(message["report"]),
            {(peer, path): nbytes for peer, path, nbytes in message["sent"]},
            tuple(RunPart(RunReport(*report), *figures) for report, *figures in message["runs"]),
        )


@dataclass(frozen=True)
class ShuffleRun:
    """A run of a shuffle over all workers; times are seconds since the epoch."""

    shuffle_id: str
    run_id: int
    #: ``transfer``, ``unpack`` or ``closed`` to the number of workers in it.
    phases: Mapping[str, int]
    #: Names of the workers on which it makes no progress.
    stuck: Sequence[str]
    #: When the first worker began.
    begun_s: float
    #: When the last one had sent everything, and when it ended on the last one; None as long as it has not on some worker.
    transferred_s: float | None
    ended_s: float | None
    #: Input partitions that were split; output partitions that were handed out, of how many.
    inputs: int
    outputs: int
    own_outputs: int
    #: ``ucx``, ``comm`` (Dask's own comms) or ``local`` (it stayed on its worker) to bytes.
    sent: Mapping[str, int]
    received_nbytes: int
    #: Bytes that went to DISK while they waited to be unpacked.
    written_nbytes: int
    #: Seconds that messages waited for room at peers, of all workers together.
    credit_wait_s: float

    @property
    def active(self) -> bool:
        """Whether it is under way on some worker."""
        return self.ended_s is None


def join(journals: Mapping[str, Journal]) -> list[ShuffleRun]:
    """Make runs of the parts that workers, by name, tell of them; the latest first."""
    found: dict[tuple[int, str], list[tuple[str, RunPart]]] = {}
    for name, journal in journals.items():
        for part in journal.runs:
            found.setdefault((part.report.run_id, part.report.shuffle_id), []).append((name, part))
    return [_joined(parts) for _, parts in sorted(found.items(), reverse=True)]


def _joined(parts: Sequence[tuple[str, RunPart]]) -> ShuffleRun:
    first = parts[0][1].report
    together = Run(first.shuffle_id, first.run_id)
    sent: Counter[str] = Counter()
    for name, part in parts:
        together.add(name, part.report)
        sent.update(part.sent)
    return ShuffleRun(
        shuffle_id=first.shuffle_id,
        run_id=first.run_id,
        phases=dict(together.phases),
        stuck=tuple(together.stuck),
        begun_s=min(part.begun_s for _, part in parts),
        transferred_s=_last(part.transferred_s for _, part in parts),
        ended_s=_last(part.ended_s for _, part in parts),
        inputs=together.inputs,
        outputs=together.outputs,
        own_outputs=together.own_outputs,
        sent=dict(sent),
        received_nbytes=together.received_nbytes,
        written_nbytes=sum(part.written_nbytes for _, part in parts),
        credit_wait_s=sum(part.credit_wait_s for _, part in parts),
    )


def _last(times_s: Iterable[float | None]) -> float | None:
    """Return the last one, None if one is still to come."""
    known = list(times_s)
    return None if None in known else max(time_s for time_s in known if time_s is not None)
