"""What the placement's pure modules see: small frozen values, and the shape of a task they only read.

Covers: :class:`Node`, the read-only shape of a task in a graph; :class:`Share`, a worker as the dealer sees it;
:class:`Candidate`, a worker as the chooser sees it; :class:`Choice`, an answer with its reason; :class:`Backlog` and
:class:`Tail`, what waits for a worker as the balancer sees it.
Does not cover: where the figures come from; see :mod:`dask_gpurt.plugins.placement`.

A million-task graph must be planned within seconds, so the graph is not copied: ``Node`` is a protocol that Dask's own
task objects satisfy, and the pure modules promise to read it alone. Everything else is copied out of the scheduler,
so that a decision can be written down, repeated and tested without one.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Any, NamedTuple, Protocol

__all__ = ["Backlog", "Candidate", "Choice", "Node", "Share", "Tail"]


class Node(Protocol):
    """A task of a graph, read only."""

    @property
    def key(self) -> Any:
        """Name of the task."""

    @property
    def priority(self) -> Any:
        """Rank of the task: of two, the one with the smaller priority runs first."""

    @property
    def dependencies(self) -> Collection[Any]:
        """Nodes whose results this task takes."""

    @property
    def dependents(self) -> Collection[Any]:
        """Nodes that take this task's result."""


class Share(NamedTuple):
    """A worker to which families are dealt, in proportion to its threads."""

    worker: Hashable
    nthreads: int


class Candidate(NamedTuple):
    """A worker that might run a task."""

    worker: Hashable
    #: Bytes of the task's inputs that the worker neither holds nor is fetching already.
    missing_nbytes: int
    #: Expected time until a thread of the worker is free for the task.
    wait_s: float
    #: Expected time that the missing bytes take to come.
    move_s: float


class Choice(NamedTuple):
    """A worker and why it was chosen."""

    worker: Hashable
    reason: str


class Backlog(NamedTuple):
    """Planned tasks that wait for a worker."""

    ntasks: int
    nthreads: int
    #: Expected duration of one of the tasks; 0 where nothing is known about it yet.
    duration_s: float

    @property
    def wait_s(self) -> float:
        """Expected time until the last of the tasks starts."""
        return self.ntasks * self.duration_s / max(self.nthreads, 1)


class Tail(NamedTuple):
    """A family at the end of a worker's backlog."""

    #: Members that still wait.
    ntasks: int
    #: Bytes that have to be moved later if the family leaves its home.
    nbytes: int
