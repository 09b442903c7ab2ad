"""Replays a trace through a store, and counts what it moves.

Theory of operation
-------------------
Ours is the spiller that workers run (:class:`~dask_gpurt.memory.spiller.Spiller`), with its ledger and policy, and asked by
it the horizon that workers run (:class:`~dask_gpurt.memory.manager.WorkerHorizon`), which knows at each event what those of
the recorded cluster could have known (:mod:`benchmarks.spilling.views`). Around them stands what the manager and the mover do at each event: inputs are
brought up and pinned before a task starts, the inputs of the next one are fetched while it runs, and anew when another one
comes that will be the next, peers are served from below. Stock's is zict's buffer, which distributed's ``SpillBuffer`` is made of: the least recently used value goes; what
is read comes up and is written again when it goes again, unless a task still holds it.

There is no time in a replay: a read or a write is complete before the next event. So a fetch ahead is in time, always,
and writes are never late.

Stock counts the bytes of values and knows nothing of buffers that several of them share. It counts more than there is
where values are views of others, and less where a small view keeps a large buffer.

Covers: :func:`replay_ours`, :func:`replay_oracle`, :func:`replay_lru`, :class:`Moved`.
Does not cover: the bound (:mod:`benchmarks.spilling.bound`).

No I/O, no clock.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from zict import Buffer, Cache, WeakValueMapping

from benchmarks.spilling.oracle import Oracle
from benchmarks.spilling.trace import Delete, End, Key, Put, Seen, Serve, Start, Trace
from benchmarks.spilling.views import View
from dask_gpurt.memory import events as ev
from dask_gpurt.memory.ledger import Ledger, Reservation, Tier
from dask_gpurt.memory.spiller import Spiller

__all__ = ["Moved", "replay_lru", "replay_oracle", "replay_ours"]


@dataclass(frozen=True)
class Moved:
    """What a store did."""

    written_nbytes: int
    read_nbytes: int
    #: Values that were asked for and were not in memory.
    waits: int
    #: The most that was in memory after an event beyond the capacity and what running tasks held.
    beyond_nbytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes that went down and up."""
        return self.written_nbytes + self.read_nbytes


# Ours


class _OurStore:
    """What the manager and the mover do around a spiller, where moving takes no time."""

    def __init__(self, view: View, capacity_nbytes: int) -> None:
        self._view = view
        self._ledger = Ledger({Tier.HOST: capacity_nbytes})
        self._spiller = Spiller(self._ledger, view.horizon)
        self._buffers = itertools.count()
        self._running: dict[Key, tuple[Hashable, ...]] = {}
        #: Bytes of copies that were taken back.
        self._given_back: dict[Key, int] = {}
        #: The task that has just ended and what it held: for the worker it runs until its result was put.
        self._ending: tuple[Key, ...] = ()
        self.capacity_nbytes = capacity_nbytes
        self.written_nbytes = self.read_nbytes = self.waits = self.beyond_nbytes = 0

    def put(self, event: Put) -> None:
        self.delete(event.key)
        self._given_back.pop(event.key, None)
        self._view.horizon.note(event.key)
        self._view.fill(self._ledger.used(Tier.HOST) / max(1, self.capacity_nbytes))
        self._handle(ev.Put(event.key, ("put", event.buffer), event.buffer_nbytes, event.nbytes))

    def delete(self, key: Key) -> None:
        if key in self._spiller.blocks:
            self._handle(ev.Deleted(key))

    def give_back(self, key: Key) -> None:
        """Forget a copy that the scheduler has taken back."""
        block = self._spiller.blocks.get(key)
        if block is not None and not block.pins:
            self._given_back[key] = block.nbytes
            self.delete(key)

    def start(self, event: Start) -> None:
        for key in event.inputs:
            if (nbytes := self._given_back.pop(key, None)) is not None:
                # It is fetched from a peer again.
                self._handle(ev.Put(key, ("fetched", next(self._buffers)), nbytes, nbytes))
        self._ending = ()
        if self._spiller.calm:
            return
        self.waits += self._absent(event.inputs)
        pinned = self._ensure(event.inputs)
        assert pinned is not None, "what may be forced is granted"
        self._running[event.key] = pinned
        for name in pinned:
            self._spiller.touch(name)
        room = self._reserve(0, forceable=True)
        assert room is not None
        room.release()
        self._prefetch()

    def end(self, key: Key) -> None:
        inputs = self._running.pop(key, ())
        self._ending = (*inputs, key)
        self._view.leave(key)
        self._unpin(inputs)

    def serve(self, keys: Sequence[Key]) -> None:
        absent = [key for key in keys if key in self._spiller.absent]
        self.waits += len(absent)
        if absent:
            nbytes = sum(self._spiller.blocks[key].copy_nbytes for key in absent)
            frames = self._reserve(nbytes, forceable=True)
            assert frames is not None
            self.read_nbytes += nbytes
            frames.release()
        for key in keys:
            if key in self._spiller.blocks and key not in self._spiller.absent:
                self._spiller.touch(key)

    def look(self) -> None:
        """Note by how much too much is in memory."""
        used = self._ledger.used(Tier.HOST)
        if used > self.capacity_nbytes:
            blocks = self._spiller.blocks
            ending = {blocks[name].buffer for name in self._ending if name in blocks}
            held = {b.buffer: b.buffer_nbytes for b in blocks.values() if b.pins or b.buffer in ending}
            self.beyond_nbytes = max(self.beyond_nbytes, used - max(self.capacity_nbytes, sum(held.values())))

    def see(self, event: Seen) -> None:
        """Look what comes next when a task has come; one that starts right away is too late for that."""
        if event.state == "waiting" or (event.state == "ready" and self._running):
            blocks = self._spiller.blocks
            absent = [blocks[key] for key in self._view.next_inputs() if key in self._spiller.absent]
            lacking_nbytes = sum(max(block.nbytes, block.copy_nbytes) for block in absent)
            if self._ledger.used(Tier.HOST) + lacking_nbytes <= self.capacity_nbytes:
                self._prefetch()

    def _prefetch(self) -> None:
        inputs = self._view.next_inputs()
        if self._absent(inputs):
            self._unpin(self._ensure(inputs, forceable=False) or ())

    def _absent(self, keys: Sequence[Key]) -> int:
        return sum(key in self._spiller.absent for key in keys)

    # As the mover

    def _ensure(self, keys: Sequence[Key], *, forceable: bool = True) -> tuple[Hashable, ...] | None:
        blocks = self._spiller.blocks
        pinned = tuple(key for key in keys if key in blocks)
        self._handle(ev.Pinned(pinned))
        sizes = {n: max(blocks[n].nbytes, blocks[n].copy_nbytes) for n in pinned if n in self._spiller.absent}
        if not sizes:
            return pinned
        reservation = self._reserve(sum(sizes.values()), forceable=forceable)
        if reservation is None:
            self._unpin(pinned)
            return None
        for name, nbytes in sizes.items():
            self._handle(ev.Wanted(name, reservation.split(nbytes)))
        reservation.release()
        self._handle(ev.Pressed(0))
        return pinned

    def _reserve(self, nbytes: int, *, forceable: bool) -> Reservation | None:
        reservation = self._ledger.try_reserve(Tier.HOST, nbytes)
        if reservation is not None:
            return reservation
        granted: list[Reservation] = []
        request = self._ledger.request(Tier.HOST, nbytes, granted.append, forceable=forceable)
        self._handle(ev.Pressed(0))
        if not granted and forceable:
            self._ledger.force(Tier.HOST, again=True)
        if not granted:
            self._ledger.cancel(Tier.HOST, request)
            self._handle(ev.Pressed(0))
            return None
        return granted[0]

    def _unpin(self, names: tuple[Hashable, ...]) -> None:
        self._handle(ev.Unpinned(names))

    def _handle(self, event: ev.Event) -> None:
        todo = deque(self._spiller.handle(event))
        while todo:
            match todo.popleft():
                case ev.Write(name, epoch):
                    nbytes = self._spiller.blocks[name].nbytes
                    self.written_nbytes += nbytes
                    todo.extend(self._spiller.handle(ev.Written(name, epoch, nbytes)))
                case ev.Read(name, epoch):
                    block = self._spiller.blocks[name]
                    # What was dropped as dying is not asked for again; there is nothing below to be read.
                    assert block.copy_nbytes or not block.nbytes, f"{name!r} was dropped, and is wanted"
                    self.read_nbytes += block.nbytes
                    buffer = ("raised", next(self._buffers))
                    todo.extend(self._spiller.handle(ev.Raised(name, epoch, buffer, block.nbytes)))


def replay_ours(trace: Trace, capacity_nbytes: int) -> Moved:
    """Replay a trace through the spiller of dask-gpurt."""
    return _replay(trace, View(trace), capacity_nbytes)


def replay_oracle(trace: Trace, capacity_nbytes: int) -> Moved:
    """Replay a trace through the spiller of dask-gpurt, with a horizon that knows the future."""
    return _replay(trace, View(trace, Oracle(trace)), capacity_nbytes)


def _replay(trace: Trace, view: View, capacity_nbytes: int) -> Moved:
    store = _OurStore(view, capacity_nbytes)
    for number, event in enumerate(trace.events):
        view.see(number, event)
        for key in view.taken_back(number):
            store.give_back(key)
        match event:
            case Put():
                store.put(event)
            case Delete(key):
                store.delete(key)
            case Start():
                store.start(event)
            case End(key):
                store.end(key)
            case Serve(keys):
                store.serve(keys)
                view.served(event)
            case Seen():
                store.see(event)
            case _:
                continue
        store.look()
    return Moved(store.written_nbytes, store.read_nbytes, store.waits, store.beyond_nbytes)


# Stock's


class _Value:
    """Stands for a value; tasks hold it, and stock's store knows as long as one does."""

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class _Disk(MutableMapping[Key, _Value]):
    """Stands for the files of stock's store."""

    def __init__(self) -> None:
        self._sizes: dict[Key, int] = {}
        self.written_nbytes = self.read_nbytes = self.reads = 0

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __getitem__(self, key: Key) -> _Value:
        nbytes = self._sizes[key]
        self.read_nbytes += nbytes
        self.reads += 1
        return _Value(nbytes)

    def __setitem__(self, key: Key, value: _Value) -> None:
        self._sizes[key] = value.nbytes
        self.written_nbytes += value.nbytes

    def __delitem__(self, key: Key) -> None:
        del self._sizes[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def _weight(key: Key, value: _Value) -> float:  # noqa: ARG001
    return value.nbytes


def replay_lru(trace: Trace, capacity_nbytes: int) -> Moved:
    """Replay a trace through stock's store."""
    disk = _Disk()
    slow: Any = Cache(disk, WeakValueMapping())
    store: Buffer[Key, _Value] = Buffer({}, slow, capacity_nbytes, weight=_weight)
    running: dict[Key, list[_Value]] = {}
    for event in trace.events:
        match event:
            case Put(key, nbytes):
                store[key] = _Value(nbytes)
            case Delete(key):
                if key in store:
                    del store[key]
            case Start(key, inputs):
                running[key] = [store[name] for name in inputs if name in store]
            case End(key):
                running.pop(key, None)
            case Serve(keys):
                for name in keys:
                    store.get(name)
            case _:
                pass
    return Moved(disk.written_nbytes, disk.read_nbytes, disk.reads)
