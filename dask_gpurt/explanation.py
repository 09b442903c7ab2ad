"""Why tasks went where they went: plain data that travels from the scheduler to the client, and how it is shown.

Covers: :class:`Explanation` (what was asked for), :class:`TaskExplanation` (one task), :class:`Decision` (one choice for it),
:class:`Alternative` (a worker that was compared), :class:`FamilyExplanation` (the tasks it was planned with).
Does not cover: remembering decisions; see :mod:`dask_gpurt.plugins.decisions`. Asking for them; see :mod:`dask_gpurt.explainer`.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "KINDS",
    "REASONS",
    "REFUSED",
    "UNPLANNED",
    "Alternative",
    "Decision",
    "Explanation",
    "FamilyExplanation",
    "TaskExplanation",
]

#: Reason of a decision to what it means.
REASONS: Mapping[str, str] = {
    "planned": "it was planned there, with its family",
    "urgent": "the worker was free, and no task ranks before it by the priorities that users gave",
    "only-holder": "no other running worker holds inputs that count",
    "most-bytes": "most of its inputs are there, and nowhere does it start so much earlier that fetching them pays",
    "earlier-elsewhere": "it starts so much earlier there than where more of its inputs are that fetching them pays",
    "plan-does-not-pay": "it left its plan: its planned worker would fetch more than the plan saves",
    "plan-without-worker": "it left its plan: no worker was running that could take over its family",
    "steal-allowed": "an idle worker may take it over: it is spared more time than moving its inputs, or its result later, takes",
    "steal-refused": "it stays there though another worker was idle, as taking it over would have cost more than it would have waited",
    "lone": "Dask decided: nothing in its graph takes its result, so that nothing says where it belongs",
    "apart": "Dask decided: its result meets no other one in its graph, and it is not one of several blocks of a collection",
    "gathered": "Dask decided: where its result first meets others, most of its collection does, which is no reason to put it anywhere",
    "few-workers": "Dask decided: fewer than two workers were running when its graph came, so that nothing was planned",
    "unplanned": "Dask decided: it has no plan, as it is made again, or as its graph came before the placement, or too long ago",
    "restricted": "Dask decided: it has restrictions or resources, or it is an actor",
    "no-holder": "Dask decided: no running worker holds any of its inputs",
    "failed": "Dask decided: the placement failed, and the scheduler's log has its first traceback",
}

#: Reasons of decisions that were Dask's because there was no plan.
UNPLANNED = frozenset({"lone", "apart", "gathered", "few-workers", "unplanned"})
#: Reason of what leaves a task where it was.
REFUSED = "steal-refused"

#: Kind of a family to why its tasks belong together, and to the worker they were dealt to.
KINDS: Mapping[str, str] = {
    "meeting": "whose results meet in {at}",
    "holder": "whose results meet in {at}, and what that takes beside them was there already",
    "position": "that are neighbouring blocks of one collection",
    "crossing": "that take shared inputs, and whose results meet in {at}",
    "crossed": "that are inputs of products which are made there",
}

#: Members of a family that are named, and tasks that are shown in full.
NAMED = 4
SHOWN = 10


@dataclass(frozen=True)
class Alternative:
    """A worker that was compared with others."""

    worker: str
    #: Bytes of the task's inputs that it did not have, in the measure of the decision: of what many tasks take, a share.
    missing_nbytes: int
    #: Expected time until it would have started the task.
    wait_s: float
    #: Expected time that fetching takes.
    move_s: float
    #: What was compared: the wait, and twice the time to fetch.
    price_s: float


@dataclass(frozen=True)
class FamilyExplanation:
    """Tasks that were planned for one worker."""

    #: Why they belong together; one of :data:`KINDS`.
    kind: str
    #: Where their results meet; None if they do not.
    at: Any
    #: Address of the worker for which they are planned now.
    home: str
    size: int
    #: The first of its members.
    keys: tuple[Any, ...]
    #: Why the family was last given to another worker, and from which; None if it is where it was dealt.
    moved: tuple[str, str] | None = None

    def __str__(self) -> str:
        more = f", … ({self.size} in all)" if self.size > len(self.keys) else ""
        kind = KINDS.get(self.kind, self.kind).format(at=_name(self.at))
        text = f"with {', '.join(map(_name, self.keys))}{more}, {kind}; planned for {self.home}"
        match self.moved:
            case ("rehomed", before):
                text += f", as {before} was gone or paused"
            case ("relieved", before):
                text += f", which was idle while {before} had more to do"
            case (why, before):
                text += f" ({why}: before, {before})"
        return text


@dataclass(frozen=True)
class Decision:
    """One choice of a worker for a task."""

    #: One of :data:`REASONS`.
    reason: str
    #: Address of the worker; empty where Dask decided.
    worker: str = ""
    #: What was compared, cheapest first; empty where nothing was.
    alternatives: tuple[Alternative, ...] = ()
    family: FamilyExplanation | None = None

    def lines(self) -> Iterator[str]:
        """Say it in a line or more."""
        where = f" {self.worker}" if self.worker else ""
        yield f"{self.reason}{where}: {REASONS.get(self.reason, 'a reason of another version')}"
        if self.family is not None:
            yield f"  {self.family}"
        for alternative in self.alternatives:
            nbytes, move, wait, price = _figures(alternative)
            yield f"  {alternative.worker}: {nbytes} to fetch in {move}, waits {wait}, price {price}"


@dataclass(frozen=True)
class TaskExplanation:
    """One task: where it is, and why."""

    key: Any
    #: Dask's state of the task; ``unknown`` if the scheduler has no such task now.
    state: str
    #: Addresses of the workers that have its result, or that it was sent to.
    workers: tuple[str, ...] = ()
    #: Decisions that are remembered, latest first.
    decisions: tuple[Decision, ...] = ()
    #: The family of a task with a plan that is not done.
    family: FamilyExplanation | None = None
    #: Tasks that wait in the scheduler for the worker of the family.
    waiting: int = 0

    @property
    def reason(self) -> str:
        """The reason of the latest decision that sent it anywhere; empty if none is remembered."""
        return next((decision.reason for decision in self.decisions if decision.reason != REFUSED), "")

    def lines(self) -> Iterator[str]:
        """Say it in several lines."""
        where = f" on {', '.join(self.workers)}" if self.workers else ""
        yield f"{_name(self.key)}: {self.state}{where}"
        if self.family is not None and (not self.decisions or self.decisions[0].family != self.family):
            yield f"  planned {self.family}"
        if self.state == "queued" and self.family is not None:
            yield f"  {self.waiting} tasks wait for that worker"
        for decision in self.decisions:
            for line in decision.lines():
                yield f"  {line}"
        if not self.decisions and self.family is None:
            yield f"  {_SILENT.get(self.state, 'no decision is remembered: it was too long ago, or before the placement')}"


_SILENT = {
    "unknown": "the scheduler has no such task, and remembers no decision about it",
    "waiting": "not decided yet: it waits for its inputs",
    "released": "not decided yet",
}


@dataclass(frozen=True)
class Explanation:
    """The answer of :func:`dask_gpurt.explain`.

    Examples
    --------
    >>> compared = (Alternative("tcp://10.0.0.1:1", 0, 0.25, 0.0, 0.25), Alternative("tcp://10.0.0.2:1", 10**6, 0.0, 0.15, 0.31))
    >>> decision = Decision("most-bytes", "tcp://10.0.0.1:1", compared)
    >>> Explanation((TaskExplanation(("x", 0), "memory", ("tcp://10.0.0.1:1",), (decision,)),))
    ('x', 0): memory on tcp://10.0.0.1:1
      most-bytes tcp://10.0.0.1:1: most of its inputs are there, and nowhere does it start so much earlier that fetching them pays
        tcp://10.0.0.1:1: 0 B to fetch in 0.00 us, waits 250.00 ms, price 250.00 ms
        tcp://10.0.0.2:1: 0.95 MiB to fetch in 150.00 ms, waits 0.00 us, price 310.00 ms
    """

    tasks: tuple[TaskExplanation, ...]
    #: Whether the placement is at work on the cluster; if not, all decisions are Dask's.
    installed: bool = True
    #: Tasks of what was asked for that were left out.
    omitted: int = 0

    def __getitem__(self, key: Any) -> TaskExplanation:
        for task in self.tasks:
            if task.key == key:
                return task
        raise KeyError(key)

    def reasons(self) -> dict[str, int]:
        """Count the tasks by the reason of their latest decision, most frequent first."""
        return dict(Counter(task.reason for task in self.tasks).most_common())

    def _head(self) -> str:
        if not self.installed:
            return "The placement of dask-gpurt is not installed: Dask decides."
        count = len(self.tasks) + self.omitted
        if count == 1:
            return ""
        reasons = ", ".join(f"{count} {reason or 'not remembered'}" for reason, count in self.reasons().items())
        return f"{count} tasks: {reasons or 'none'}" + (f" ({self.omitted} left out)" if self.omitted else "")

    def __str__(self) -> str:
        head = self._head()
        lines = [head] if head else []
        if self.installed:
            for task in self.tasks[:SHOWN]:
                lines += task.lines()
            if len(self.tasks) > SHOWN:
                lines.append(f"… and {len(self.tasks) - SHOWN} more in .tasks")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = []
        for task in self.tasks[:SHOWN] if self.installed else ():
            first, *lines = (html.escape(line) for line in task.lines())
            rows.append(f"<dt>{first}</dt><dd><pre>{'<br>'.join(lines)}</pre></dd>")
        return f"<div><strong>{html.escape(self._head())}</strong><dl>{''.join(rows)}</dl></div>"


def _name(key: Any) -> str:
    return key if isinstance(key, str) else repr(key)


def _figures(alternative: Alternative) -> tuple[str, str, str, str]:
    from dask.utils import format_bytes, format_time

    return (
        format_bytes(alternative.missing_nbytes),
        format_time(alternative.move_s),
        format_time(alternative.wait_s),
        format_time(alternative.price_s),
    )
