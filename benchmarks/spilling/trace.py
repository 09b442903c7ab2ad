"""What happened on one worker, as far as a store has to do with it.

Theory of operation
-------------------
A trace is a sequence of events in the order of the clock, from three sources: what was put into and deleted from
``worker.data``, and who read it (tasks that start, peers that are served); how the worker's view of its tasks changed
(:class:`Seen`); and what the scheduler knew (:class:`Graph`, :class:`Known`), at the time when it knew it.
A store that is driven by a trace may use of it what lies before.

Bytes count by buffer, as in the ledger: however many values lie in one, it counts once, until the last of them goes.

Covers: the events, :class:`Trace`.
Does not cover: where they come from (:mod:`benchmarks.spilling.recorder`).

Pure: no I/O, no clock, no dask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass

__all__ = ["Delete", "End", "Event", "Graph", "Known", "Put", "Seen", "Serve", "Start", "Trace"]

Key = Hashable
Priority = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """A value came: the result of a task, or from a peer."""

    key: Key
    #: Bytes of the value itself.
    nbytes: int
    #: Identity of the memory it lies in, and the bytes of that.
    buffer: Hashable
    buffer_nbytes: int


@dataclass(frozen=True, slots=True)
class Delete:
    """A value went."""

    key: Key


@dataclass(frozen=True, slots=True)
class Start:
    """A task reads its inputs, and holds them until :class:`End`."""

    key: Key
    inputs: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class End:
    """A task is done; its result, if it has one, is put right after."""

    key: Key


@dataclass(frozen=True, slots=True)
class Serve:
    """A peer or a client reads values."""

    keys: tuple[Key, ...]
    #: Address of the peer; None: it is a client.
    who: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """The worker's view of a task changed: its state, or the inputs that it waits for."""

    key: Key
    state: str
    priority: Priority | None
    #: None: as before.
    inputs: tuple[Key, ...] | None


@dataclass(frozen=True, slots=True)
class Graph:
    """The scheduler was sent tasks."""

    #: (key, priority, keys of its inputs)
    tasks: tuple[tuple[Key, Priority, tuple[Key, ...]], ...]
    #: Keys that a client holds from now on.
    wanted: tuple[Key, ...]


@dataclass(frozen=True, slots=True)
class Known:
    """The scheduler's view of a task changed. What is released is needed by nobody, and no client holds it."""

    key: Key
    state: str
    #: Address of the worker that it was given to, or that has done it.
    worker: str | None = None


Event = Put | Delete | Start | End | Serve | Seen | Graph | Known


@dataclass(frozen=True)
class Trace:
    """The events of one worker.

    Parameters
    ----------
    events
        In the order of time.
    nworkers
        Workers of the cluster, of one thread each.
    address
        Of the worker.
    """

    events: tuple[Event, ...]
    nworkers: int = 1
    address: str = ""

    def scaled(self, factor: int) -> Trace:
        """Return the trace of the same job on values that are larger by ``factor``."""
        return dataclasses.replace(self, events=tuple(_scaled(event, factor) for event in self.events))

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that there were at a time.

        Examples
        --------
        >>> Trace((Put("x", 10, 1, 10), Put("view of x", 5, 1, 10), Delete("x"), Put("y", 7, 2, 7))).peak_nbytes
        17
        """
        buffers: dict[Key, tuple[Hashable, int]] = {}
        holders: dict[Hashable, int] = {}
        held_nbytes = peak_nbytes = 0
        for event in self.events:
            if isinstance(event, Put | Delete) and event.key in buffers:
                buffer, nbytes = buffers.pop(event.key)
                holders[buffer] -= 1
                if not holders[buffer]:
                    held_nbytes -= nbytes
            if isinstance(event, Put):
                buffers[event.key] = event.buffer, event.buffer_nbytes
                holders[event.buffer] = holders.get(event.buffer, 0) + 1
                if holders[event.buffer] == 1:
                    held_nbytes += event.buffer_nbytes
                peak_nbytes = max(peak_nbytes, held_nbytes)
        return peak_nbytes


def _scaled(event: Event, factor: int) -> Event:
    if not isinstance(event, Put):
        return event
    return dataclasses.replace(event, nbytes=event.nbytes * factor, buffer_nbytes=event.buffer_nbytes * factor)
