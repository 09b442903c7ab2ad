"""Queues: in which order each worker gets the planned tasks that wait for it.

Covers: :class:`Queues`, a heap a worker, and one for waiting tasks that were not planned.
Does not cover: what a free worker is, or the state of a task; see :mod:`dask_gpurt.plugins.placement`.

Theory of operation
-------------------
The queues are an order over a set of tasks that somebody else owns. An entry of a heap holds as long as its task waits
(:meth:`Queues.leave` has not been called for it) and its family has its home at the heap's worker; entries that
do not hold are skipped when they come to the top. So a family moves by pushing its members to another heap, and a task
leaves in constant time, for whatever reason.

The heap of the tasks without a plan exists only while planned tasks wait, so that where nothing is planned, nothing is
done. Of its entries, the owner says whether they hold.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from dask_gpurt.plugins.families import Family

__all__ = ["Queues"]

#: Priority of a task, a counter that breaks ties by age, and the task's key.
_Heap = list[tuple[Any, int, Any]]


class Queues:
    """Planned tasks that wait for their workers.

    Attributes
    ----------
    waiting
        Key of each planned task that waits to its family. Read only for others.
    wanted
        Workers for which planned tasks wait. Read only for others.
    """

    def __init__(self) -> None:
        self.waiting: dict[Any, Family] = {}
        self.wanted: set[Any] = set()
        self._heaps: defaultdict[Any, _Heap] = defaultdict(list)
        #: Tasks without a plan; None while no planned task waits.
        self._unplanned: _Heap | None = None
        #: Worker to the number of planned tasks that wait for it.
        self._backlog: Counter[Any] = Counter()
        #: Worker to the families that have waited for it, in the order in which they came.
        self._dealt: defaultdict[Any, list[Family]] = defaultdict(list)
        self._pushed = 0

    def enter(self, key: Any, priority: Any, family: Family) -> None:
        """Let a planned task wait. If it is the first, :meth:`enter_unplanned` has to follow for all others."""
        if self._unplanned is None:
            self._unplanned = []
        home = family.home
        self.waiting[key] = family
        self._backlog[home] += 1
        self.wanted.add(home)
        self._pushed += 1
        heapq.heappush(self._heaps[home], (priority, self._pushed, key))
        dealt = self._dealt[home]
        if not dealt or dealt[-1] is not family:
            dealt.append(family)

    def enter_unplanned(self, key: Any, priority: Any) -> None:
        """Let a task without a plan wait beside the planned ones; does nothing while there are none."""
        if self._unplanned is not None:
            self._pushed += 1
            heapq.heappush(self._unplanned, (priority, self._pushed, key))

    def leave(self, key: Any) -> None:
        """Let a planned task wait no longer; does nothing for others."""
        family = self.waiting.pop(key, None)
        if family is None:
            return
        self._count_down(family.home, 1)
        if not self.waiting:
            self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.waiting.clear()
        self.wanted.clear()
        self._heaps.clear()
        self._unplanned = None
        self._backlog.clear()
        self._dealt.clear()

    def next_for(self, worker: Any, still_waits: Callable[[Any], bool]) -> Any | None:
        """Find the task that ``worker`` should run next: its own first, or one without a plan that ranks before it.

        Parameters
        ----------
        worker
            The worker with a free slot.
        still_waits
            Whether a task without a plan still waits.
        """
        heap = self._heaps.get(worker)
        own = None
        while heap:
            family = self.waiting.get(heap[0][2])
            if family is not None and family.home is worker:
                own = heap[0]
                break
            heapq.heappop(heap)
        others = self._unplanned
        while others:
            entry = others[0]
            if entry[2] in self.waiting or not still_waits(entry[2]):
                heapq.heappop(others)
                continue
            return entry[2] if own is None or entry < own else own[2]
        return None if own is None else own[2]

    def able(self, workers: set[Any]) -> list[Any]:
        """List those of ``workers`` for which anything waits, with a plan or without one."""
        return list(workers if self._unplanned else workers & self.wanted)

    def backlog(self, worker: Any) -> int:
        """Count the planned tasks that wait for ``worker``."""
        return self._backlog[worker]

    def homes(self) -> list[Any]:
        """List the workers for which families have waited."""
        return list(self._dealt)

    def families_of(self, worker: Any, limit: int | None = None) -> Iterator[tuple[Family, list[Any]]]:
        """Go through the families that wait for ``worker``, the one that it reaches last first.

        Parameters
        ----------
        worker
            The worker.
        limit
            Families at most; None: all.

        Yields
        ------
        The family, and the keys of its members that wait. Moving it meanwhile is allowed.
        """
        dealt = self._dealt.get(worker, [])
        seen: set[int] = set()
        for position in range(len(dealt) - 1, -1, -1):
            family = dealt[position]
            keys = self._waiting_members(family) if family.home is worker and id(family) not in seen else []
            if not keys:
                del dealt[position]  # done, or elsewhere by now
                continue
            if limit is not None and len(seen) >= limit:
                return
            seen.add(id(family))
            yield family, keys

    def move(self, family: Family, home: Any, why: str, priority_of: Callable[[Any], Any]) -> None:
        """Change the home of a family, for its members that wait and for those to come."""
        keys = self._waiting_members(family)
        self._count_down(family.home, len(keys))
        family.moved = (why, family.home)
        family.home = home
        if not keys:
            return
        self._backlog[home] += len(keys)
        self.wanted.add(home)
        heap = self._heaps[home]
        for key in keys:
            self._pushed += 1
            heapq.heappush(heap, (priority_of(key), self._pushed, key))
        self._dealt[home].append(family)

    def _count_down(self, home: Any, number: int) -> None:
        self._backlog[home] -= number
        if not self._backlog[home]:
            self.wanted.discard(home)

    def _waiting_members(self, family: Family) -> list[Any]:
        return [key for key in family.keys if self.waiting.get(key) is family]
