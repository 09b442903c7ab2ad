"""Turns: in which order a worker sends one large result to the many that ask for it.

Covers: :class:`Turns`. Pure: no I/O, no clock, no Dask.
Does not cover: sending; see :mod:`dask_gpurt.plugins.serving`.

Theory of operation
-------------------
Whoever gets a task is told who holds its inputs at that moment. A result that all workers take is held by one worker then, so
that all of them ask that one, at once, and each gets a part of its port: they have the result when the last of them has it.

So a worker sends a key to one peer at a time. Who has it can pass it on: after each copy that is made, as many of those that wait
as the copy's holder can serve in the same time, half of them, are *sent away*. In Dask's protocol that is the answer that a worker
is busy: the peer asks the scheduler who else holds the key, and goes there. That doubles with each round: n peers have a result
after the time of log2(n) copies instead of n.

Being sent away costs a peer some messages, and for a while it does not ask this worker again, for other keys either. So
it is done only if the last in the row would wait longer than :data:`WORTH_S` otherwise, by the time that the last copy took: on quick links,
or with few peers, all are served from here, one after the other, and the last one has the result no later than if all had shared the port.

========  ======================================  =========================================
event     is served now                           waits
========  ======================================  =========================================
enter     if the key is being sent to nobody      else, unless :data:`WAITING_MAX` wait: sent away
leave     the one that has waited longest         the others, or half of them (see above)
========  ======================================  =========================================

Nobody waits without a copy being made: a key has an entry exactly while it is being sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["AWAY_DELAY_S", "LARGE_NBYTES", "WAITING_MAX", "WORTH_S", "Turns"]

#: Results from which on it is worth to take turns: at 1 GB/s a copy takes some milliseconds then.
LARGE_NBYTES = 4 * 2**20
#: Seconds that the last in a row would wait from which on half of the row is sent away.
WORTH_S = 0.05
#: How many wait for one key at most; all others are sent away at once. As many copies would be made before the last of them.
WAITING_MAX = 64

#: How much later than the copy is made those are sent away who are to ask for it: the scheduler hears of it meanwhile.
AWAY_DELAY_S = 0.01

T = TypeVar("T")


class Turns(Generic[T]):
    """Who waits for which key.

    Examples
    --------
    >>> turns = Turns()
    >>> [turns.enter("x", peer) for peer in "abcd"]
    [True, False, False, False]
    >>> turns.leave("x", elapsed_s=1.0)  # c waits here, d is sent to a
    ('b', ['d'])
    >>> turns.leave("x", elapsed_s=1.0)
    ('c', [])
    >>> turns.leave("x", elapsed_s=1.0)
    (None, [])
    """

    def __init__(self) -> None:
        #: Key that is being sent to those that wait for it.
        self._waiting: dict[Hashable, deque[T]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self, key: Hashable, peer: T) -> bool | None:
        """Let ``peer`` ask for ``key``; True: it is served now, False: it waits, None: it is sent away.

        Who is served has to :meth:`leave`, also if that fails.
        """
        waiting = self._waiting.get(key)
        if waiting is None:
            self._waiting[key] = deque()
            return True
        if len(waiting) >= WAITING_MAX:
            return None
        waiting.append(peer)
        return False

    def leave(self, key: Hashable, elapsed_s: float | None) -> tuple[T | None, list[T]]:
        """Note that a copy has been made.

        Parameters
        ----------
        key
            The key.
        elapsed_s
            How long it took; None if it failed, so that there is no other holder.

        Returns
        -------
        The peer that is served next, if any waits, and those that are sent away.
        """
        waiting = self._waiting[key]
        if not waiting:
            del self._waiting[key]
            return None, []
        away: list[T] = []
        if elapsed_s is not None and len(waiting) * elapsed_s > WORTH_S:
            away = [waiting.pop() for _ in range(len(waiting) // 2)]
        return waiting.popleft(), away
