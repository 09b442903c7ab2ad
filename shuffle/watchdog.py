"""Which runs make no progress, and what is said of them.

Covers: :class:`Watchdog`, which decides when a run is stuck and when it goes on again, and :func:`describe`, which puts the
state of a run into words.
Does not cover: where the states come from, see :meth:`dask_gpurt.shuffle.run.Run.state`; who looks, and who is told, see
:mod:`dask_gpurt.shuffle.worker`. Nothing is done about a stuck run: whoever reads the report knows better.

Theory of operation: a run is looked at every few seconds. It *waits* while something of it is under way on this worker: a
task inside it, a message that a peer has not answered, a request of a peer. It makes *progress* when any of its counters
(:data:`PROGRESS`) changes. A run that waited without progress for as long as is allowed is stuck, and is reported once;
so is its going on. A run that only has to wait for its next task is not stuck: that is the scheduler's business. What
counts is time in which the worker was looking: one that stood still itself, a suspended machine for instance, knows nothing
about its peers in that time.

Pure: no clock, no I/O, no Dask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PROGRESS", "WAITING", "Verdict", "Watchdog", "describe", "interval_s"]

#: What a run has done so far, by the keys of its state.
PROGRESS = (
    "inputs",
    "outputs",
    "posted_nbytes",
    "sent_nbytes",
    "received_nbytes",
    "parcels",
    "credits_granted",
    "staged_nbytes",
    "put_nbytes",
    "taken_nbytes",
    "transferred",
    "closed",
)
#: What is under way on this worker, by the keys of its state.
WAITING = ("tasks", "unanswered", "outbox_nbytes", "attended")

#: A run is looked at so often while it is allowed to stand still, and no more than every :data:`INTERVAL_S` seconds.
LOOKS = 4
INTERVAL_S = 5.0


def interval_s(patience_s: float) -> float:
    """Seconds between two looks."""
    return min(INTERVAL_S, patience_s / LOOKS)


@dataclass(frozen=True)
class Verdict:
    """What there is to be said.

    Parameters
    ----------
    stuck
        Run to the seconds that it has stood still.
    going_on
        Runs that were stuck before, and go on or have ended.
    """

    stuck: Mapping[str, float]
    going_on: tuple[str, ...]


@dataclass
class _Watched:
    done: tuple[object, ...]
    waits: bool
    still_s: float = 0.0
    reported: bool = False


class Watchdog:
    """Knows since when runs stand still.

    Parameters
    ----------
    patience_s
        For how long a run may wait without progress.

    Examples
    --------
    >>> watchdog = Watchdog(patience_s=60)
    >>> state = {"sent_nbytes": 7, "outbox_nbytes": 5}
    >>> [watchdog.look({"run": state}, now_s).stuck for now_s in range(0, 75, 5)][-3:]
    [{'run': 60.0}, {}, {}]
    >>> watchdog.look({"run": {"sent_nbytes": 12, "outbox_nbytes": 0}}, 75).going_on
    ('run',)
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._longest_s = 2 * interval_s(patience_s)
        self._watched: dict[str, _Watched] = {}
        self._looked_s: float | None = None

    def __repr__(self) -> str:
        stuck = sum(watched.reported for watched in self._watched.values())
        return f"<Watchdog {len(self._watched)} watched, {stuck} stuck>"

    @property
    def stuck(self) -> set[str]:
        """Runs that were reported, and do not go on yet."""
        return {run for run, watched in self._watched.items() if watched.reported}

    def look(self, states: Mapping[str, Mapping[str, Any]], now_s: float) -> Verdict:
        """Compare the states of all active runs with those of the last look."""
        passed_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, self._longest_s)
        self._looked_s = now_s
        stuck: dict[str, float] = {}
        going_on = [run for run, watched in self._watched.items() if watched.reported and run not in states]
        before, self._watched = self._watched, {}
        for run, state in states.items():
            done = tuple(state.get(key) for key in PROGRESS)
            waits = any(state.get(key) for key in WAITING)
            watched = before.get(run)
            if watched is None or watched.done != done or not (watched.waits and waits):
                if watched is not None and watched.reported:
                    going_on.append(run)
                watched = _Watched(done, waits)
            else:
                watched.still_s += passed_s
                if watched.still_s >= self.patience_s and not watched.reported:
                    watched.reported = True
                    stuck[run] = watched.still_s
            self._watched[run] = watched
        return Verdict(stuck, tuple(going_on))


def describe(state: Mapping[str, Any], worker: Mapping[str, Any]) -> str:
    """Put the state of a run, and that of its worker, into words."""
    of = state
    lines = [
        f"phase: {of['phase']}; {of['inputs']} inputs split here, {of['outputs']} of {of['own_outputs']} outputs handed out",
        f"sent: {of['sent_nbytes']} bytes of {of['posted_nbytes']} posted; outbox: {of['outbox_nbytes']} bytes",
        f"received: {of['received_nbytes']} bytes in {of['parcels']} parcels; requests of peers: {of['attended']}",
        f"credits: {of['credits_granted']} granted ({of['credits_nbytes']} bytes not used yet), {of['credits_wanted']} wanted",
        f"shelf: {of['staged_nbytes']} bytes staged, {of['put_nbytes']} put, {of['taken_nbytes']} taken",
    ]
    lines += [
        f"waiting for {one['peer']} since {one['since_s']:.1f} s ({one['nbytes']} bytes)" for one in state["unanswered"]
    ]
    lines += [f"a task is in {one['what']} {one['partition']} since {one['since_s']:.1f} s" for one in state["tasks"]]
    lines.append("worker: " + ", ".join(f"{key} {value}" for key, value in worker.items()))
    return "".join(f"\n  {line}" for line in lines)
