"""Decisions: what was decided about which task, remembered for those who ask why.

Covers: :class:`Decisions`, the latest ones, and what they look like to somebody who asks; :class:`Lately`, for what is remembered of a
task until it is decided about it, or between decisions.
Does not cover: how it is shown; see :mod:`dask_gpurt.explanation`. Counting; see :mod:`dask_gpurt.plugins.placement`.

Theory of operation
-------------------
A decision costs the scheduler some ten microseconds, so what is remembered of it is what is at hand: a plain tuple of the
key, the reason, and objects that exist anyway (the worker, the family, the workers that were compared). Nothing is
copied, formatted or looked up until somebody asks, and nothing is indexed: an answer walks all that is remembered, once for
all keys that it is about.

What is remembered is bounded by its number: :data:`REMEMBERED` decisions, of which the largest compares a handful of workers.
A family is shown as it is when it is asked for, as are the addresses of workers that have left since.

Stealing asks about the same task again and again. A refusal is noted once for each place of a task, with what was compared then, so
that refusals are no more than decisions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from dask_gpurt.explanation import NAMED, Alternative, Decision, FamilyExplanation
from dask_gpurt.plugins.families import Family
from dask_gpurt.plugins.policy import prices_s
from dask_gpurt.plugins.view import Candidate

__all__ = ["REMEMBERED", "Decisions", "Lately", "Noted", "explain_family"]

#: Decisions that are remembered: at most some 10 MB, if each compares four workers.
REMEMBERED = 20_000

V = TypeVar("V")


class Noted(NamedTuple):
    """What is remembered of a decision; written as a plain tuple, which costs a third."""

    key: Any
    reason: str
    #: The worker, with its ``address``; None where Dask decides.
    worker: Any
    #: The plan that was carried out or left.
    family: Family | None
    #: The workers that were compared; None if there was no choice.
    compared: Sequence[Candidate] | None


class Decisions:
    """The latest decisions.

    Attributes
    ----------
    note
        Remember a decision: called with a tuple that has the fields of :class:`Noted`.
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._noted: deque[tuple[Any, str, Any, Family | None, Sequence[Candidate] | None]] = deque(maxlen=limit)
        self.note = self._noted.append

    def about(self, keys: Collection[Any]) -> dict[Any, list[Decision]]:
        """Find the decisions about each of ``keys``, latest first; a key without any is not in the answer."""
        found: dict[Any, list[Decision]] = {}
        for entry in reversed(self._noted):
            if entry[0] in keys:
                found.setdefault(entry[0], []).append(_decision(Noted(*entry)))
        return found

    def latest(self, limit: int) -> Iterator[tuple[Any, Decision]]:
        """Go through the latest decisions with their keys, latest first; for a display."""
        for entry in islice(reversed(self._noted), limit):
            yield entry[0], _decision(Noted(*entry))


class Lately(Generic[V]):
    """A mapping that forgets what was put first: it keeps ``limit`` entries at least, and twice as many at most.

    Two generations: a full one becomes the old one, and what was the old one is forgotten.

    Examples
    --------
    >>> lately = Lately(limit=2)
    >>> for key in range(5):
    ...     lately[key] = str(key)
    >>> [lately.pop(key) for key in (1, 2, 4, 4)]
    [None, '2', '4', None]
    """

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._young: dict[Any, V] = {}
        self._old: dict[Any, V] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def __setitem__(self, key: Any, value: V) -> None:
        if len(self._young) >= self._limit:
            self._young, self._old = {}, self._young
        self._young[key] = value

    def get(self, key: Any) -> V | None:
        """Return what was put last; None if it is forgotten."""
        value = self._young.get(key)
        return self._old.get(key) if value is None else value

    def pop(self, key: Any) -> V | None:
        """Return what was put last, and forget it."""
        before = self._old.pop(key, None)
        value = self._young.pop(key, None)
        return before if value is None else value

    def clear(self) -> None:
        """Forget everything."""
        self._young.clear()
        self._old.clear()


def explain_family(family: Family) -> FamilyExplanation:
    """Describe a family as it is now."""
    moved = family.moved
    return FamilyExplanation(
        kind=family.kind,
        at=family.at,
        home=_address(family.home),
        size=len(family.keys),
        keys=tuple(family.keys[:NAMED]),
        moved=None if moved is None else (moved[0], _address(moved[1])),
    )


def _decision(noted: Noted) -> Decision:
    alternatives: list[Alternative] = []
    if noted.compared is not None:
        for candidate, price_s in zip(noted.compared, prices_s(noted.compared), strict=True):
            worker, missing_nbytes, wait_s, move_s = candidate
            alternatives.append(Alternative(_address(worker), missing_nbytes, wait_s, move_s, price_s))
        alternatives.sort(key=lambda alternative: (alternative.price_s, alternative.missing_nbytes))
    return Decision(
        reason=noted.reason,
        worker="" if noted.worker is None else _address(noted.worker),
        alternatives=tuple(alternatives),
        family=None if noted.family is None else explain_family(noted.family),
    )


def _address(worker: Any) -> str:
    return str(worker.address)
