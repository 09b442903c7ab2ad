"""Whether taking a planned task from its worker pays, and how much of a backlog to take.

Covers: :func:`pays`, for one task, which Dask's own stealing is asked to respect; :func:`relief`, for the families that
still wait in the scheduler for a worker that is busy while another one is idle; :func:`shared_out`, for the crossings that wait on it.
Does not cover: tasks that were not planned: Dask's own stealing decides there.

Theory of operation
-------------------
A planned task that runs elsewhere starts sooner, but its result has to come back to where its family meets. So taking
it pays if the wait it is spared is longer than that move, again counted twice (see
:mod:`dask_gpurt.plugins.policy`), and a fixed latency: a steal costs round trips. A task of unknown duration is not
taken: nobody knows yet that the wait is worth anything. It becomes known as soon as one task of the kind has
finished, or has been seen running for a while.

Families are taken from the end of the backlog, the part that its worker reaches last, and as wholes.

Crossings (see :mod:`dask_gpurt.plugins.crossings`) are sent to their workers long before these reach them, and fetch their inputs wherever they
are. So of them, an idle worker takes what a busy one has not begun as soon as the wait is longer than the moves and a few
messages: :data:`MESSAGES_S`. A group that does not pay, as much of it is made already, is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable

from dask_gpurt.plugins.policy import STAY_PUT
from dask_gpurt.plugins.view import Backlog, Tail

__all__ = ["MESSAGES_S", "STEAL_LATENCY_S", "pays", "relief", "shared_out"]

#: What a steal costs in time, whatever it takes; the figure that Dask's own stealing reckons with.
STEAL_LATENCY_S = 0.1
#: What a steal costs that leaves nothing behind: a question to the victim, its answer, and a task to the thief, some 2 ms each.
MESSAGES_S = 0.005


def pays(wait_s: float, nbytes: int, bandwidth: float, latency_s: float = STEAL_LATENCY_S) -> bool:
    """Say whether being spared ``wait_s`` is worth moving ``nbytes`` later.

    Examples
    --------
    >>> pays(60.0, 100_000_000, bandwidth=100e6)
    True
    >>> pays(1.0, 100_000_000, bandwidth=100e6)
    False
    """
    return wait_s > STAY_PUT * nbytes / bandwidth + latency_s


def relief(victim: Backlog, thief: Backlog, tails: Iterable[Tail], bandwidth: float) -> int:
    """Count the families that ``thief`` should take over from the end of ``victim``'s backlog.

    Parameters
    ----------
    victim, thief
        What waits for each of the two.
    tails
        The victim's families, the one it reaches last first.
    bandwidth
        Bytes per second between workers.

    Examples
    --------
    >>> busy, idle = Backlog(8, 1, 1.0), Backlog(0, 1, 1.0)
    >>> relief(busy, idle, [Tail(2, 0)] * 4, bandwidth=100e6)
    2
    """
    taken = 0
    for tail in tails:
        after = Backlog(thief.ntasks + tail.ntasks, thief.nthreads, thief.duration_s)
        # A family that would wait at the thief as long as at the victim gains nothing by moving.
        if victim.wait_s < after.wait_s or not pays(victim.wait_s - thief.wait_s, tail.nbytes, bandwidth):
            break
        victim = Backlog(victim.ntasks - tail.ntasks, victim.nthreads, victim.duration_s)
        thief = after
        taken += 1
    return taken


def shared_out(victim: Backlog, thief: Backlog, tails: Iterable[Tail], bandwidth: float) -> list[int]:
    """List the groups of crossings that ``thief`` should take over from the end of ``victim``'s backlog, by their position in ``tails``.

    Parameters
    ----------
    victim, thief
        What each of the two has to do.
    tails
        Groups that the victim has not begun, the one it reaches last first.
    bandwidth
        Bytes per second between workers.

    Examples
    --------
    >>> busy, idle = Backlog(12, 1, 0.01), Backlog(0, 1, 0.01)
    >>> shared_out(busy, idle, [Tail(2, 0), Tail(2, 10**9), Tail(3, 0), Tail(2, 0)], bandwidth=1e9)
    [0, 2]
    """
    taken: list[int] = []
    for position, tail in enumerate(tails):
        left = Backlog(victim.ntasks - tail.ntasks, victim.nthreads, victim.duration_s)
        after = Backlog(thief.ntasks + tail.ntasks, thief.nthreads, thief.duration_s)
        if after.wait_s <= left.wait_s and pays(victim.wait_s - thief.wait_s, tail.nbytes, bandwidth, MESSAGES_S):
            taken.append(position)
            victim, thief = left, after
    return taken
