"""Whether taking a planned task from its worker pays, and how much of a backlog to take.

Covers: :func:`pays`, for one task, which Dask's own stealing is asked to respect; :func:`relief`, for the families that
still wait in the scheduler for a worker that is busy while another one is idle.
Does not cover: tasks that were not planned: Dask's own stealing decides there.

Theory of operation
-------------------
A planned task that runs elsewhere starts sooner, but its result has to come back to where its family meets. So taking
it pays if the wait it is spared is longer than that move, again counted twice (see
:mod:`dask_gpurt.plugins.policy`), and a fixed latency: a steal costs round trips. A task of unknown duration is not
taken: nobody knows yet that the wait is worth anything. It becomes known as soon as one task of the kind has
finished, or has been seen running for a while.

Families are taken from the end of the backlog, the part that its worker reaches last, and as wholes.
"""

from __future__ import annotations

from collections.abc import Iterable

from dask_gpurt.plugins.policy import STAY_PUT
from dask_gpurt.plugins.view import Backlog, Tail

__all__ = ["STEAL_LATENCY_S", "pays", "relief"]

#: What a steal costs in time, whatever it takes; the figure that Dask's own stealing reckons with.
STEAL_LATENCY_S = 0.1


def pays(wait_s: float, nbytes: int, bandwidth: float) -> bool:
    """Say whether being spared ``wait_s`` is worth moving ``nbytes`` later.

    Examples
    --------
    >>> pays(60.0, 100_000_000, bandwidth=100e6)
    True
    >>> pays(1.0, 100_000_000, bandwidth=100e6)
    False
    """
    return wait_s > STAY_PUT * nbytes / bandwidth + STEAL_LATENCY_S


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
