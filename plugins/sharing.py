"""Sharing: lets workers that have run out of work take crossings that wait on busy ones, at once.

Covers: :class:`Sharing`.
Does not cover: whether it pays; see :mod:`dask_gpurt.plugins.stealing`. What waits in the scheduler, and what
is no crossing: for these the balancer and Dask's own stealing look every tenth of a second; see :mod:`dask_gpurt.plugins.placement`.

Theory of operation
-------------------
A factorization goes over its blocks as a front, and what is left at the end of a front is on few workers: all of a row or of a column. With
some tasks of a millisecond each that is over before anybody looks. So while crossings are planned, and whenever a task is
done, though no more often than every :data:`INTERVAL_S`, idle workers are looked for. Each takes whole groups of crossings from the end
of what the busiest worker was given, and their family with them, if the wait that these are spared is longer than twice the moves: of
inputs that the idle worker has not, and of results, those of the same group that are already made on the other worker included.

Tasks are taken by the messages of Dask's own stealing: a worker that has begun a task keeps it. Where work stealing is switched off, nothing is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from heapq import nlargest
from typing import TYPE_CHECKING, Any, NamedTuple

from dask_gpurt import seams
from dask_gpurt.plugins import stealing
from dask_gpurt.plugins.families import Family
from dask_gpurt.plugins.view import Backlog, Candidate, Tail

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed.scheduler import Scheduler, TaskState, WorkerState

    from dask_gpurt.plugins.prices import Prices

__all__ = ["AHEAD", "INTERVAL_S", "LOOK_S", "Sharing", "Taken"]

#: Seconds between two turns: an answer takes about as long. And between two looks whether anybody is idle: a task takes no less.
INTERVAL_S, LOOK_S = 0.005, 0.001
#: Tasks for each of its threads that a worker keeps whatever others have to do: so many are on their way to its threads.
AHEAD = 4
#: Idle workers that are helped in one turn, and busy ones that are looked at.
HELPED = 8


class Taken(NamedTuple):
    """A task that an idle worker has asked for."""

    task: TaskState
    family: Family
    thief: WorkerState
    #: The worker that was given it, and the thief, as they were compared.
    compared: Sequence[Candidate]


class _Lot(NamedTuple):
    """Tasks of one family that a worker has been given."""

    family: Family
    tasks: list[TaskState]


class Sharing:
    """Take crossings from busy workers for idle ones.

    Parameters
    ----------
    scheduler
        The running scheduler.
    plan
        Key of a planned task to its family, until its result is in memory.
    sizes
        Task prefix to the size of its latest result.
    prices
        What moves cost.
    duration_of
        Expected seconds of a task; 0 if nothing is known.
    may_move
        Whether nobody has said where a task has to run.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        plan: Mapping[Any, Family],
        sizes: Mapping[str, int],
        prices: Prices,
        *,
        duration_of: Callable[[TaskState], float],
        may_move: Callable[[TaskState], bool],
    ) -> None:
        self._running: set[WorkerState] = scheduler.running
        self._scheduler = scheduler
        self._plan = plan
        self._sizes = sizes
        self._prices = prices
        self._duration_of = duration_of
        self._may_move = may_move
        self._next_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to look again."""
        if now_s < self._next_s or not seams.steals(self._scheduler):
            return False
        self._next_s = now_s + LOOK_S
        return True

    def turn(self, thieves: Sequence[WorkerState]) -> Iterator[Taken]:
        """Ask for tasks on behalf of ``thieves``, which have nothing to do."""
        if not thieves:
            return
        self._next_s += INTERVAL_S - LOOK_S
        busy = [ws for ws in nlargest(HELPED, self._running, key=_load) if len(ws.processing) > AHEAD * ws.nthreads]
        lots = {ws: self._lots(ws) for ws in busy}
        #: Tasks that a worker has, without those that are being taken from it.
        left = {ws: len(ws.processing) for ws in busy}
        for thief in thieves[:HELPED]:
            victim = max((ws for ws in busy if lots[ws]), key=lambda ws: left[ws] / ws.nthreads, default=None)
            if victim is None:
                return
            waiting = lots[victim]
            duration_s = self._duration_of(waiting[0].tasks[0])
            tails = [Tail(len(lot.tasks), self._nbytes(lot, thief)) for lot in waiting]
            backlog = Backlog(left[victim], victim.nthreads, duration_s)
            idle = Backlog(len(thief.processing), thief.nthreads, duration_s)
            taken = stealing.shared_out(backlog, idle, tails, self._prices.bandwidth)
            for lot, tail in ((waiting[position], tails[position]) for position in taken):
                compared = (
                    Candidate(victim, 0, backlog.wait_s, 0.0),
                    Candidate(thief, tail.nbytes, 0.0, tail.nbytes / self._prices.bandwidth),
                )
                for ts in lot.tasks:
                    if seams.steal(self._scheduler, ts, victim, thief):
                        left[victim] -= 1
                        yield Taken(ts, lot.family, thief, compared)
            lots[victim] = [lot for position, lot in enumerate(waiting) if position not in taken]

    def _lots(self, ws: WorkerState) -> list[_Lot]:
        """List what ``ws`` was given of crossings, what it reaches last first."""
        found: dict[int, _Lot] = {}
        for ts in ws.processing:
            family = self._plan.get(ts.key)
            if family is not None and not family.waits and family.home is ws and self._may_move(ts):
                found.setdefault(id(family), _Lot(family, [])).tasks.append(ts)
        return sorted(found.values(), key=_last, reverse=True)

    def _nbytes(self, lot: _Lot, thief: WorkerState) -> int:
        """Count what has to be moved if ``thief`` takes a lot."""
        inputs = {dep for ts in lot.tasks for dep in ts.dependencies}
        missing = sum(
            dep.get_nbytes() for dep in inputs if thief not in (dep.who_has or ()) and dep not in thief.needs_what
        )
        made = sum(key not in self._plan for key in lot.family.keys)
        return missing + self._sizes.get(lot.tasks[0].prefix.name, 0) * (1 + min(made, len(lot.tasks)))


def _load(ws: WorkerState) -> float:
    return float(len(ws.processing) / ws.nthreads)


def _last(lot: _Lot) -> Any:
    return max(map(_priority, lot.tasks))


def _priority(ts: TaskState) -> Any:
    return ts.priority
