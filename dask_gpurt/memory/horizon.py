"""When a block is needed again.

Theory of operation
-------------------
A block's next use is one of four things (:class:`Kind`):

- *running*: a task that is running has it as an input. Moving it away frees nothing, the task holds it.
- *next*: a task that is known here will need it. The distance is counted in tasks: the position of that task in the
  worker's own queue, or, for a task whose other inputs are still missing, how far its rank (Dask's priority) lies
  behind the rank of what runs now, divided by the number of workers that work on those ranks.
- *idle*: nobody is known to need it, but somebody may: a client holds it. What a task just gave, or took, is the
  exception: who needs the one, and that the other is dying, is heard of only when the scheduler knows. :data:`RECENT` is
  assumed for both.
- *dying*: nobody will ever need it; its deletion is on the way. It need not be written.

A worker knows the tasks that were given to it. Of those that have no worker yet the scheduler tells it as long as it is
short of memory (:class:`Word`): the first one counts like a task whose inputs are missing here. Of what nobody needs and no
client holds, the deletion is as good as on its way, or a peer is about to fetch it: it stays, like what is recent.

What one worker sees by itself never proves that a block is dying: the last task that it knows of may not be the last
there is. The scheduler names the last ones (:attr:`Word.users`): when all of them have run here, the block is dying a round
trip before its deletion is ordered. Should it be wanted here after all, because another graph came in that very moment, it is
computed again, as if this worker had been lost; what cannot be computed again is never called dying.

A peer that was served may be lost before its task has run, and the task may be stolen from it while the block is on its way, which
the peer throws away then. So what only peers need that have all been served is not dying: it counts as overdue, and is offered to the
scheduler (:mod:`dask_gpurt.memory.spare`), which takes it back when the peers hold it.

Covers: the arithmetic.
Does not cover: where tasks, ranks and queues come from; see :mod:`dask_gpurt.memory.manager`, and
:mod:`dask_gpurt.plugins.foresight` for what the scheduler tells.

Pure: no I/O, no clock, no dask.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = [
    "CAN_MAKE",
    "DYING",
    "IDLE",
    "RECENT",
    "RUNNING",
    "SERVED",
    "SPARE",
    "TELL",
    "WATCH",
    "Horizon",
    "Kind",
    "Priority",
    "Snapshot",
    "Use",
    "Word",
    "next_use",
]

#: What a worker asks the scheduler by, to be told; and what it is told by.
WATCH = "gpurt_watch"
CAN_MAKE = "gpurt_can_make"
#: What it offers keys by, that only peers need.
SPARE = "gpurt_spare"
TELL = "gpurt-horizon"

#: A rank in tasks that is farther than any queue: a use by a later graph, or at a lower user priority.
FAR = 1e6

#: As far, in tasks, is what should have run already, by its rank, and has not: what it waits for is late, and it cannot be
#: known by how much. In traces of 28 jobs half of them came more than 100 tasks later; from 5 to 30 the bytes that are moved
#: differ by 2 %, with 0 they are a tenth more.
OVERDUE = 10.0
#: Where it waits for a chain of tasks, each link is so many tasks.
LINK = 4.0

#: States of a task that this worker has yet to run. One that waits for inputs to be fetched will not wait for long.
AHEAD = ("ready", "constrained", "waiting", "resumed")

Priority = tuple[int | float, ...]


class Kind(enum.IntEnum):
    """What is known about the next use of a block."""

    DYING = 0
    IDLE = 1
    NEXT = 2
    RUNNING = 3


class Use(NamedTuple):
    """The next use of a block."""

    kind: Kind
    #: Tasks until then; only for :attr:`Kind.NEXT`.
    distance: float = 0.0


DYING = Use(Kind.DYING)
IDLE = Use(Kind.IDLE)
RUNNING = Use(Kind.RUNNING)
#: Its last users are on peers that have fetched it: most will be gone when these have run.
SERVED = Use(Kind.NEXT, OVERDUE)
#: Of no known use, but a moment ago an input or a result: most will be gone, or be an input again, in another moment.
RECENT = Use(Kind.NEXT, 1.0)


class Word(NamedTuple):
    """What the scheduler said last about a key."""

    #: Of the first task that needs it and has no worker yet; None: there is none.
    priority: Priority | None
    #: Whether a client holds it.
    wanted: bool
    #: The tasks that still need it, and the address of the worker that has each; None: others may come.
    users: tuple[tuple[Hashable, str], ...] | None = None
    #: How long the chain of tasks is that the first task waits for, about.
    behind: int = 0


class Horizon(Protocol):
    """Who knows the next uses."""

    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        """Say the next use of each of ``names``."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a worker has ahead of it, at one moment."""

    #: Priority of what runs now; None if nothing runs.
    now: Priority | None
    #: Priorities of the tasks that could start at once, in order.
    ready: Sequence[Priority]
    #: Workers that share the work.
    nworkers: int = 1

    def position(self, priority: Priority) -> float:
        """Count the tasks until one with ``priority`` starts that was given to this worker.

        Examples
        --------
        >>> Snapshot((0, 1, 10), [(0, 1, 11), (0, 1, 12)]).position((0, 1, 12))
        2.0
        """
        return float(bisect_right(self.ready, priority))

    def distance(self, priority: Priority, chain: int = 0) -> float:
        """Count the tasks until one with ``priority`` starts that has no worker yet, and waits for a chain of tasks.

        Examples
        --------
        >>> Snapshot((0, 1, 10), [(0, 1, 11), (0, 1, 12)], 2).distance((0, 1, 50))
        20.0
        >>> Snapshot((0, 1, 10), []).distance((0, 1, 5))
        10.0
        >>> Snapshot((0, 1, 10), []).distance((0, 1, 5), 6)
        24.0
        """
        position = self.position(priority)
        if self.now is None:
            return position
        if priority < self.now:
            behind = max(OVERDUE, LINK * chain)
        elif priority[:-1] == self.now[:-1]:
            behind = (priority[-1] - self.now[-1]) / self.nworkers
        else:
            behind = FAR
        return max(position, behind)


def next_use(
    dependents: Iterable[tuple[str, Priority | None]],
    snapshot: Snapshot,
    word: Word | None = None,
    *,
    recent: bool = False,
) -> Use:
    """Judge when a block is needed again.

    Parameters
    ----------
    dependents
        State and priority of the tasks here that depend on it. The states are those of distributed's worker; what is done,
        failed or cancelled needs nothing any more.
    snapshot
        What is ahead.
    word
        What the scheduler said about it, if it did.
    recent
        Whether a task just gave or took it.

    Examples
    --------
    >>> snapshot = Snapshot((0, 1, 10), [(0, 1, 11), (0, 1, 12)])
    >>> next_use([("ready", (0, 1, 12)), ("memory", (0, 1, 9))], snapshot).distance
    2.0
    >>> next_use([("ready", (0, 1, 12))], snapshot, Word((0, 1, 11), wanted=False)).distance
    1.0
    >>> next_use([], snapshot, Word(None, wanted=True), recent=True).kind.name
    'IDLE'
    """
    distance: float | None = None
    for state, priority in dependents:
        if state in ("executing", "long-running"):
            return RUNNING
        if priority is not None and state in AHEAD:
            there = snapshot.position(priority)
            if distance is None or there < distance:
                distance = there
    if word is not None and word.priority is not None:
        there = snapshot.distance(word.priority, word.behind)
        distance = there if distance is None else min(distance, there)
    if distance is not None:
        return Use(Kind.NEXT, distance)
    about_to_go = recent if word is None else not word.wanted
    return RECENT if about_to_go else IDLE
