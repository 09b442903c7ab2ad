"""A horizon that knows the rest of the trace: what a better one could win at most, by the policy as it is.

Covers: :class:`Oracle`.
Does not cover: the optimum, which is no policy (:mod:`benchmarks.spilling.bound`).

Pure: no I/O, no clock, no dask.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence

from benchmarks.spilling.trace import Delete, Graph, Serve, Start, Trace
from dask_gpurt.memory.horizon import DYING, IDLE, RUNNING, Kind, Use

__all__ = ["Oracle"]


class Oracle:
    """Says the next uses as they will be.

    Parameters
    ----------
    trace
        What will be.

    Examples
    --------
    >>> oracle = Oracle(Trace((Start("a", ("x",)), Start("b", ("y",)), Start("c", ("x",)))))
    >>> oracle.now = 1
    >>> oracle.uses(["x", "y", "z"])  # doctest: +NORMALIZE_WHITESPACE
    [Use(kind=<Kind.NEXT: 2>, distance=1.0), Use(kind=<Kind.NEXT: 2>, distance=0.0),
     Use(kind=<Kind.DYING: 0>, distance=0.0)]
    """

    def __init__(self, trace: Trace) -> None:
        #: Number of the event from which on it is asked.
        self.now = 0
        #: Says what the tasks read that start in this moment.
        self.starting: Callable[[], Collection[Hashable]] = tuple
        self._wanted: set[Hashable] = set()
        #: Key -> numbers of the events that read it, and of those that delete it.
        self._reads: defaultdict[Hashable, list[int]] = defaultdict(list)
        self._deletes: defaultdict[Hashable, list[int]] = defaultdict(list)
        for number, event in enumerate(trace.events):
            match event:
                case Start(_, keys) | Serve(keys, _):
                    for key in keys:
                        self._reads[key].append(number)
                case Delete(key):
                    self._deletes[key].append(number)
                case Graph(_, keys):
                    self._wanted.update(keys)
                case _:
                    pass

    def note(self, key: Hashable) -> None:
        """Learn nothing new."""

    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        """Say the next use of each of ``names``."""
        starting = self.starting()
        return [RUNNING if name in starting else self._use(name) for name in names]

    def _use(self, name: Hashable) -> Use:
        read, delete = (_next(numbers.get(name, ()), self.now) for numbers in (self._reads, self._deletes))
        if read < delete:
            return Use(Kind.NEXT, float(read - self.now))
        return IDLE if name in self._wanted else DYING


def _next(numbers: Sequence[int], now: int) -> float:
    place = bisect_left(numbers, now)
    return numbers[place] if place < len(numbers) else float("inf")
