"""Moves values between memory and the tiers below, as the spiller says.

Theory of operation
-------------------
The :class:`Mover` holds what the spiller only knows by name: the values in memory, and the copies below. Each event goes
to the spiller under one lock, and the instructions that come out are carried out: cheap ones at once, reads and writes
(with serialization and checksums) by a few threads of its own. Their answers return through the event loop, so the
loop never waits for a disk, and the horizon is asked on the loop only. The overflow, if there is one, has threads to
itself: a server that takes its time does not hold up the disk.

A reader who cannot wait (:meth:`Mover.get` for a value that is below) reads in its own thread. Whoever can wait calls
:meth:`Mover.ensure`, which reserves room first, and pins.

Nothing that a thread raises is lost: the failure of a write is logged, and the value stays in memory; the failure of
a read is raised to whoever waits, and told to ``lost``. Where memory is lacking (MemoryError) no value is to blame: a write
is tried again, and what was to be read stays where it is.

Writes wait in queues of the mover's own, so that a thread that needs room at once, and must not wait for any other
(:meth:`Mover.relieve`), can take them over.

Covers: values, copies, threads, waiting.
Does not cover: what moves and when (:mod:`dask_gpurt.memory.spiller`); how a value becomes a copy
(:mod:`dask_gpurt.memory.lower`); what the values are to Dask (:mod:`dask_gpurt.memory.manager`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from dask_gpurt.errors import CorruptDataError, SpillError
from dask_gpurt.memory import codec
from dask_gpurt.memory import events as ev
from dask_gpurt.memory.ledger import Reservation, Tier
from dask_gpurt.memory.lower import Copy, FrameStore, Lower, RawName
from dask_gpurt.memory.spiller import Spiller, State

__all__ = ["Mover"]

logger = logging.getLogger(__name__)

#: Seconds until a tier that refused a write is tried again.
RETRY_S = 1.0

#: Operations of the overflow at a time: most of what each takes is waiting for a server.
OVERFLOW_THREADS = 4

#: Seconds without any grant, read or write after which a request is granted although another forced one is
#: outstanding. Whoever holds that one may be waiting behind it.
PATIENCE_S = 0.25

#: Seconds that a thread which makes room by itself waits for a write that another one has begun.
HAND_S = 1.0


class _Write(NamedTuple):
    name: Hashable
    epoch: int
    value: object
    tier: Tier | None


class Mover:
    """Values by name, in memory or below.

    Parameters
    ----------
    spiller
        Decides. The mover is the only one that talks to it.
    lower
        The tier below.
    loop
        The event loop that the answers of the threads return to.
    lost
        Called on the loop with the name and the error of a value that cannot be read back, after it was forgotten.
    threads
        How many operations run at a time. Two keep a disk busy while one of them serializes.
    overflow
        The tier that the spiller knows as the overflow.
    """

    def __init__(
        self,
        spiller: Spiller,
        lower: Lower,
        loop: asyncio.AbstractEventLoop,
        lost: Callable[[Hashable, Exception], None],
        *,
        threads: int = 2,
        overflow: FrameStore | None = None,
    ) -> None:
        self.spiller = spiller
        self.ledger = spiller.ledger
        self.tier: Tier = spiller.upper
        self.lower = lower
        self.overflow = overflow
        #: Ever-increasing totals.
        self.written_nbytes = 0
        self.read_nbytes = 0
        #: The same bytes by where they came from and where they went.
        self.moves: Counter[tuple[Tier, Tier]] = Counter()
        self.lost_blocks = 0
        self.write_failures = 0
        self.waits = 0
        self._loop = loop
        self._lost = lost
        self._lock = threading.RLock()
        self._values: dict[Hashable, object] = {}
        self._copies: dict[Hashable, Copy] = {}
        self._arrivals: dict[Hashable, list[asyncio.Future[Exception | None]]] = {}
        self._own_buffers = 0
        #: Tiers whose refusal was logged.
        self._warned: set[Tier | None] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._pending: set[Future[Any]] = set()
        #: The thread that holds the lock.
        self._holder: int | None = None
        #: Threads of this mover.
        self._own_threads: set[int] = set()
        #: Writes that no thread has begun: those to the overflow, and the others.
        self._writes: dict[bool, deque[_Write]] = {True: deque(), False: deque()}
        #: Writes that have ended, and how, as long as nobody has taken note.
        self._answers: deque[tuple[_Write, Copy | Exception]] = deque()
        self._answered = threading.Event()
        #: Copies of copies that have just arrived in the overflow.
        self._arrived_below: dict[Hashable, Copy] = {}
        self._threads = ThreadPoolExecutor(threads, f"gpurt-{self.tier}-io", self._enlist)
        self._overflow_threads = ThreadPoolExecutor(OVERFLOW_THREADS, "gpurt-overflow-io", self._enlist)
        self._closed = False

    def __repr__(self) -> str:
        return f"<Mover {self.spiller!r}>"

    # Looking

    def __len__(self) -> int:
        return len(self.spiller.blocks)

    def __contains__(self, name: object) -> bool:
        return name in self.spiller.blocks

    def names(self) -> list[Hashable]:
        """All names, in memory or below, in the order in which they were put."""
        with self._lock:
            return list(self.spiller.blocks)

    @property
    def in_memory(self) -> dict[Hashable, object]:
        """Name to value of what is in memory. Look, do not touch."""
        return self._values

    @property
    def absent(self) -> set[Hashable]:
        """Names of what is not in memory. Look, do not touch."""
        return self.spiller.absent

    def copy_of(self, name: Hashable) -> Copy | None:
        """The copy of ``name`` below, if there is one."""
        return self._copies.get(name)

    def raised_nbytes(self, name: Hashable) -> int:
        """Bytes of memory that reading the copy of ``name`` takes; 0 if it is gone."""
        block = self.spiller.blocks.get(name)
        return 0 if block is None else max(block.nbytes, block.copy_nbytes)

    def has_room_for(self, names: Iterable[Hashable]) -> bool:
        """Whether those of ``names`` that are here, and not in memory, can be read without anything being moved away."""
        limit_nbytes = self.ledger.limit(self.tier)
        lacking_nbytes = sum(self.raised_nbytes(name) for name in names if name in self.absent)
        return limit_nbytes is None or self.ledger.used(self.tier) + lacking_nbytes <= limit_nbytes

    # Putting and getting

    def put(
        self,
        name: Hashable,
        value: object,
        reservation: Reservation | None = None,
        *,
        buffer: tuple[Hashable, int] | None = None,
        nbytes: int | None = None,
    ) -> None:
        """Hold ``value`` under ``name``, in place of what was there. ``nbytes`` are its bytes, where they are known.

        ``buffer`` is the identity and the bytes of the memory in which a list of buffers lies that is not alone in it.
        """
        memory: Hashable
        if not isinstance(name, RawName):
            memory, memory_nbytes, nbytes = codec.footprint(value, nbytes)
        else:
            nbytes = _nbytes(value)
            memory, memory_nbytes = buffer or (None, nbytes)
        with self._acting() as garbage:
            if name in self.spiller.blocks:
                self._handle(ev.Deleted(name), garbage)
            self._values[name] = value
            self._handle(ev.Put(name, self._named(memory), memory_nbytes, nbytes, reservation), garbage)
            if self._arrivals:
                self._arrived(name, None)

    def grow(self, name: Hashable, more: Sequence[Any], reservation: Reservation | None = None) -> bool:
        """Append ``more`` to the buffers under ``name``, if they are in memory and at rest; say whether they were."""
        with self._acting() as garbage:
            block = self.spiller.blocks.get(name)
            if block is None or block.state not in (State.RESIDENT, State.CLEAN):
                return False
            self._values[name].extend(more)  # type: ignore[attr-defined]
            self._handle(ev.Grown(name, _nbytes(more), reservation), garbage)
            return True

    def adopt(self, name: Hashable, nbytes: int, copy: Copy) -> None:
        """Take over a value that lies below."""
        with self._acting() as garbage:
            if name in self.spiller.blocks:
                self._handle(ev.Deleted(name), garbage)
            self._copies[name] = copy
            self._handle(ev.Adopted(name, nbytes, copy.nbytes), garbage)

    def delete(self, name: Hashable) -> None:
        """Forget ``name``; KeyError if there is none."""
        with self._acting() as garbage:
            self._handle(ev.Deleted(name), garbage)
            self._arrived(name, None)

    def get(self, name: Hashable) -> object:
        """Return the value, if need be by reading it here and now.

        Raises
        ------
        KeyError
            If there is none.
        SpillError
            If it cannot be read back.
        """
        try:
            value = self._values[name]
            self.spiller.touch(name)
        except KeyError:
            return self._get_below(name)
        return value

    def _get_below(self, name: Hashable) -> object:
        with self._acting() as garbage:
            if name in self._values:
                return self._values[name]
            block = self.spiller.blocks[name]
            epoch, copy = block.epoch, self._copies.get(name)
            if ours := block.state is State.SPILLED:
                self._handle(ev.Wanted(name), garbage, read=False)
        try:
            value = _load(name, copy)
        except (SpillError, MemoryError) as error:
            if ours:
                self._end_read(name, epoch, None, error, None)
            raise
        if ours:
            self._end_read(name, epoch, value, None, copy)
        return value

    # Waiting

    async def reserve(self, nbytes: int, *, forceable: bool = True) -> Reservation:
        """Wait until ``nbytes`` more may be held, moving others away if need be.

        Where nothing more can be moved away, it is granted all the same if it is ``forceable``.

        Raises
        ------
        MemoryError
            If it is not, and is more than the tier may hold.
        """
        with self._lock:
            limit_nbytes = self.ledger.limit(self.tier)
            if not forceable and limit_nbytes is not None and nbytes > limit_nbytes:
                raise MemoryError(f"{nbytes} bytes are more than {self.tier} may hold, which is {limit_nbytes}")
            reservation = self.ledger.try_reserve(self.tier, nbytes)
        if reservation is not None:
            return reservation
        self.waits += 1
        future: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()

        def grant(reservation: Reservation) -> None:
            if future.done():
                with self._acting() as garbage:
                    reservation.release()
                    self._handle(ev.Pressed(0), garbage)
            else:
                future.set_result(reservation)

        with self._acting() as garbage:
            request = self.ledger.request(self.tier, nbytes, lambda r: self._call(grant, r), forceable=forceable)
            self._handle(ev.Pressed(0), garbage)
        try:
            grants = self.ledger.grants
            while not (await asyncio.wait([future], timeout=PATIENCE_S))[0]:
                if forceable and grants == self.ledger.grants and not self._pending:
                    with self._acting() as garbage:
                        self.ledger.force(self.tier, again=True)
                grants = self.ledger.grants
            return future.result()
        except asyncio.CancelledError:
            with self._acting() as garbage:
                self.ledger.cancel(self.tier, request)
                # Granted already, or by a callback that is on its way: that one finds the future cancelled.
                if not future.cancel() and not future.cancelled():
                    future.result().release()
                self._handle(ev.Pressed(0), garbage)
            raise

    async def ensure(self, names: Iterable[Hashable], *, forceable: bool = True) -> tuple[Hashable, ...]:
        """Wait until those of ``names`` that are here are in memory, and pin them; returns them, to be unpinned.

        After :meth:`close` nothing is brought into memory any more: whoever waits finds the values where they were taken to.

        Raises
        ------
        SpillError
            If one of them cannot be read back; nothing is pinned then.
        MemoryError
            If there is no memory to read one of them into. It is where it was, and nothing is pinned.
        """
        with self._acting() as garbage:
            pinned = tuple(name for name in names if name in self.spiller.blocks)
            self._handle(ev.Pinned(pinned), garbage)
        try:
            while not self._closed and (below := [name for name in pinned if name in self.absent]):
                await self._raise_all(below, forceable=forceable)
        except BaseException:
            self.unpin(pinned)
            raise
        return pinned

    def unpin(self, names: tuple[Hashable, ...]) -> None:
        """Take back the pins of :meth:`ensure`."""
        with self._acting() as garbage:
            self._handle(ev.Unpinned(names), garbage)

    async def _raise_all(self, names: list[Hashable], *, forceable: bool) -> None:
        blocks = self.spiller.blocks
        sizes = {n: self.raised_nbytes(n) for n in names if blocks[n].state is State.SPILLED}
        reservation = await self.reserve(sum(sizes.values()), forceable=forceable)
        arrivals: list[asyncio.Future[Exception | None]] = []
        try:
            with self._acting() as garbage:
                for name in names:
                    if name in self.absent and not self._closed:
                        arrival = asyncio.get_running_loop().create_future()
                        self._arrivals.setdefault(name, []).append(arrival)
                        arrivals.append(arrival)
                        self._handle(ev.Wanted(name, reservation.split(sizes.get(name, 0))), garbage)
            for arrival in arrivals:
                error = await arrival
                if error is not None:
                    raise error
        finally:
            with self._acting() as garbage:
                reservation.release()
                self._handle(ev.Pressed(0), garbage)

    async def frames(self, name: Hashable) -> tuple[bytes, list[Any]] | None:
        """Read the copy of ``name`` as it lies, without bringing the value back; None if it is in memory or gone, or closed.

        Raises
        ------
        SpillError
            If it cannot be read; ``lost`` was told.
        """
        while True:
            with self._lock:
                block = self.spiller.blocks.get(name)
                copy = self._copies.get(name)
                if block is None or copy is None or name in self._values or self._closed:
                    return None
                epoch = block.epoch
            try:
                found: tuple[bytes, list[Any]] | None = await asyncio.wrap_future(self._submit(copy.tier, copy.frames))
                break
            except SpillError as error:
                with self._acting() as garbage:
                    if not self.spiller.current(name, epoch):
                        return None
                    if self._copies.get(name) is not copy:
                        continue  # it has been moved
                    if name in self.absent:
                        self._handle(ev.Wanted(name), garbage, read=False)
                        self._end_read(name, epoch, None, error, None)
                raise
        if found is not None:
            self._count_read(copy)
        return found

    # Pressure from outside

    def press(self, nbytes: int) -> int:
        """Ask for ``nbytes`` to go, whatever the limit says; returns the bytes that are gone already."""
        before = self.ledger.held(self.tier)
        with self._acting() as garbage:
            self._handle(ev.Pressed(nbytes), garbage)
        return before - self.ledger.held(self.tier)

    @property
    def freed_nbytes(self) -> int:
        """Ever-increasing total of what has left memory, for whatever reason."""
        return self.spiller.freed_nbytes

    @property
    def entered(self) -> bool:
        """Whether the calling thread is inside this mover right now, and must not come in again."""
        return self._holder == threading.get_ident()

    @property
    def at_work_here(self) -> bool:
        """Whether the calling thread is one of those that read and write for this mover."""
        return threading.get_ident() in self._own_threads

    async def make_room(self, nbytes: int) -> int:
        """Move ``nbytes`` away, whatever the limit says, and wait for it; returns the bytes that have gone."""
        before = self.freed_nbytes
        with self._acting() as garbage:
            self._handle(ev.Pressed(nbytes), garbage)
        garbage.clear()
        while self.freed_nbytes - before < nbytes and self.spiller.busy and self._pending:
            pending = [asyncio.wrap_future(future) for future in tuple(self._pending)]
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            # The answer of what has ended is on its way through the loop.
            await asyncio.sleep(0)
        return self.freed_nbytes - before

    def relieve(self, nbytes: int) -> int:
        """As :meth:`make_room`, by the calling thread, which may be any: one that holds up the loop, or is one of the mover's own.

        It takes over what waits to be written, and waits, no longer than :data:`HAND_S` at a time, for what others have in hand.
        Seen from another thread than the loop's, next uses are not known.
        """
        before = self.freed_nbytes
        if self.entered or self._closed:
            return 0
        # Once what others have in hand does not come to an end: they may be waiting for this thread.
        without_others = False
        self._press_here(nbytes)
        while self.freed_nbytes - before < nbytes:
            self._answered.clear()
            if self._hear_here() or self._write_here() or (not without_others and self._wait_here()):
                continue
            if without_others:
                break
            without_others = True
            self._press_here(nbytes + self.spiller.leaving_nbytes)
        return self.freed_nbytes - before

    def set_limit(self, nbytes: int | None) -> None:
        """Hold so many bytes at most; None: stop making room, whoever waits for it goes on."""
        with self._acting() as garbage:
            self.ledger.set_limit(self.tier, nbytes)
            self._handle(ev.Pressed(0), garbage)

    # The end

    async def settle(self) -> None:
        """Wait until no operation is under way."""
        while self._pending:
            await asyncio.wait([asyncio.wrap_future(future) for future in tuple(self._pending)])
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Forget all values and copies; operations under way end first."""
        if self._closed:
            return
        self._closed = True
        if self._retry is not None:
            self._retry.cancel()
        await self.settle()
        for threads in (self._threads, self._overflow_threads):
            await self._loop.run_in_executor(None, threads.shutdown)
        with self._acting() as garbage:
            garbage.extend(self._values.values())
            self._values.clear()
            self._copies.clear()

    # Carrying out

    @contextmanager
    def _acting(self) -> Iterator[list[object]]:
        """Hold the lock; what is put into the list dies after it was given back."""
        garbage: list[object] = []
        with self._lock:
            outer, self._holder = self._holder, threading.get_ident()
            try:
                yield garbage
            finally:
                self._holder = outer

    def _handle(self, event: ev.Event, garbage: list[object], *, read: bool = True) -> None:
        for instruction in self.spiller.handle(event):
            name = instruction.name
            if isinstance(instruction, ev.Drop):
                garbage.append(self._values.pop(name))
            elif isinstance(instruction, ev.Write):
                tier = instruction.tier
                queue = self._writes[self._overflows(tier)]
                queue.append(_Write(name, instruction.epoch, self._values[name], tier))
                self._submit(tier, self._write_next, queue)
            elif isinstance(instruction, ev.Read):
                if read or name != getattr(event, "name", None):
                    copy = self._copies.get(name)
                    self._submit(None if copy is None else copy.tier, self._read, name, instruction.epoch, copy)
            elif isinstance(instruction, ev.Move):
                self._submit(instruction.tier, self._move, name, instruction.epoch, self._copies[name])
            else:
                copy = self._copies.pop(name, None)
                if isinstance(instruction, ev.Replace):
                    self._copies[name] = self._arrived_below.pop(name)
                if copy is not None and not self._closed:
                    self._submit(copy.tier, self._remove, copy)

    def _named(self, buffer: Hashable) -> Hashable:
        """Give a buffer that is known to be nobody else's an identity that no other has."""
        if buffer is not None:
            return buffer
        self._own_buffers -= 1
        return self._own_buffers

    def _submit(self, tier: Tier | None, function: Callable[..., Any], *args: object) -> Future[Any]:
        """Run an operation of a tier below, by its threads."""
        future = (self._overflow_threads if self._overflows(tier) else self._threads).submit(function, *args)
        self._pending.add(future)
        # Its answer comes by way of the loop; only behind that is it over.
        future.add_done_callback(lambda future: self._call(self._pending.discard, future))
        return future

    def _overflows(self, tier: Tier | None) -> bool:
        return tier is not None and tier is self.spiller.overflow

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            # The loop is closed: there is nobody left to tell.
            logger.debug("%r: the event loop is closed", self)

    def _enlist(self) -> None:
        self._own_threads.add(threading.get_ident())

    def _write_next(self, queue: deque[_Write]) -> None:
        try:
            write = queue.popleft()
        except IndexError:
            return  # a thread that could not wait has done it
        self._answers.append((write, self._written(write)))
        del write
        self._answered.set()
        self._call(self._hear)

    def _written(self, write: _Write) -> Copy | Exception:
        lower = self.overflow if self._overflows(write.tier) else self.lower
        assert lower is not None
        try:
            return lower.store(write.name, write.value)
        except Exception as error:  # noqa: BLE001 - whatever a value's serialization raises; it is logged on the loop
            return error

    def _hear(self) -> None:
        """Take note of a write that has ended; on the loop."""
        try:
            write, outcome = self._answers.popleft()
        except IndexError:
            return  # a thread that could not wait has heard of it
        self._end_write(write.name, write.epoch, outcome, write.tier)

    def _press_here(self, nbytes: int) -> None:
        with self._acting() as garbage:
            self._handle(ev.Pressed(nbytes), garbage)

    def _hear_here(self) -> bool:
        """Take note of a write that has ended, by any thread; say whether there was one."""
        try:
            write, outcome = self._answers.popleft()
        except IndexError:
            return False
        if isinstance(outcome, Exception):
            # To be logged, and tried again, by the loop.
            self._call(self._end_write, write.name, write.epoch, outcome, write.tier)
        else:
            self._end_write(write.name, write.epoch, outcome, write.tier)
        return True

    def _write_here(self) -> bool:
        try:
            write = self._writes[False].popleft()
        except IndexError:
            return False
        self._answers.append((write, self._written(write)))
        return True

    def _wait_here(self) -> bool:
        """Wait for a write that another thread has in hand."""
        return self.spiller.busy and not self.at_work_here and self._answered.wait(HAND_S)

    def _end_write(self, name: Hashable, epoch: int, outcome: Copy | Exception, tier: Tier | None) -> None:
        if not isinstance(outcome, Exception):
            self._count_written(self.tier, outcome)
            _count(name, "write", outcome.nbytes)
        with self._acting() as garbage:
            if not self.spiller.current(name, epoch):
                if not isinstance(outcome, Exception):
                    self._submit(tier, self._remove, outcome)
                return
            if not isinstance(outcome, Exception):
                self._copies[name] = outcome
                self._warned.discard(tier)
                self._handle(ev.Written(name, epoch, outcome.nbytes), garbage)
                return
            self.write_failures += 1
            to_blame = not isinstance(outcome, SpillError | MemoryError)
            self._handle(ev.WriteFailed(name, epoch, to_blame), garbage)
        if to_blame:
            logger.error("Failed to serialize %r; it stays in memory", name, exc_info=outcome)
            return
        if tier not in self._warned:
            self._warned.add(tier)
            logger.warning(
                "Cannot spill%s, data stays in memory%s; will be tried again every %g s: %s",
                "" if tier is None else f" to {tier}",
                "" if self.overflow is None or self._overflows(tier) else ", or overflows",
                RETRY_S,
                outcome,
            )
        if self._retry is None and not self._closed:
            self._retry = self._loop.call_later(RETRY_S, self._retry_now)

    def _retry_now(self) -> None:
        self._retry = None
        with self._acting() as garbage:
            self._handle(ev.Retried(), garbage)

    def _move(self, name: Hashable, epoch: int, copy: Copy) -> None:
        assert self.overflow is not None
        try:
            moved = self.overflow.take_over(copy)
        except (SpillError, TypeError) as error:
            logger.debug("%r stays in %s: %s", name, copy.tier, error)
            self._call(self._end_move, name, epoch, copy, None)
        else:
            self._call(self._end_move, name, epoch, copy, moved)

    def _end_move(self, name: Hashable, epoch: int, copy: Copy, moved: Copy | None) -> None:
        if moved is not None:
            self.read_nbytes += copy.nbytes
            self._count_written(copy.tier, moved)
        with self._acting() as garbage:
            if self.spiller.moving(name, epoch):
                if moved is None:
                    self._handle(ev.MoveFailed(name, epoch), garbage)
                else:
                    self._arrived_below[name] = moved
                    self._handle(ev.Moved(name, epoch, moved.nbytes), garbage)
                    moved = self._arrived_below.pop(name, None)
        if moved is not None:
            # It is not wanted there any more.
            self._submit(moved.tier, self._remove, moved)

    def _read(self, name: Hashable, epoch: int, copy: Copy | None) -> None:
        try:
            value = _load(name, copy)
        except (SpillError, MemoryError) as error:
            self._call(self._end_read, name, epoch, None, error, None)
        else:
            self._call(self._end_read, name, epoch, value, None, copy)

    def _end_read(
        self, name: Hashable, epoch: int, value: object, error: SpillError | MemoryError | None, copy: Copy | None
    ) -> None:
        if copy is not None:
            self._count_read(copy)
            _count(name, "read", copy.nbytes)
        # Not under the lock: what somebody's sizeof does is theirs.
        footprint = None if error is not None or isinstance(name, RawName) else codec.footprint(value)
        with self._acting() as garbage:
            if not self.spiller.current(name, epoch):
                return
            if isinstance(error, MemoryError):
                self._handle(ev.ReadPutOff(name, epoch), garbage)
            elif error is not None:
                self.lost_blocks += 1
                self._handle(ev.ReadFailed(name, epoch), garbage)
            else:
                if footprint is None:
                    buffer, size = None, self.spiller.blocks[name].nbytes
                else:
                    buffer, size, _ = footprint
                self._values[name] = value
                self._handle(ev.Raised(name, epoch, self._named(buffer), size), garbage)
            self._arrived(name, error)
        if error is not None and not isinstance(error, MemoryError):
            self._call(self._lost, name, error)

    def _count_read(self, copy: Copy) -> None:
        self.read_nbytes += copy.nbytes
        self.moves[copy.tier, self.tier] += copy.nbytes

    def _count_written(self, source: Tier, copy: Copy) -> None:
        self.written_nbytes += copy.nbytes
        self.moves[source, copy.tier] += copy.nbytes

    def _arrived(self, name: Hashable, error: Exception | None) -> None:
        for future in self._arrivals.pop(name, ()):
            self._call(_set, future, error)

    def _remove(self, copy: Copy) -> None:
        try:
            copy.remove()
        except SpillError as error:
            logger.warning("%s", error)


def _load(name: Hashable, copy: Copy | None) -> object:
    if copy is None:
        raise CorruptDataError(f"there is no copy of {name!r}")
    try:
        return copy.load()
    except (SpillError, MemoryError):
        raise
    except Exception as error:
        # The bytes are what was written; what they were made from does not come back from them.
        raise CorruptDataError(f"{name!r} cannot be deserialized: {error!r}") from error


def _count(name: Hashable, action: str, nbytes: int) -> None:
    if nbytes and isinstance(name, RawName) and name.meter is not None:
        name.meter(action, nbytes)


def _nbytes(buffers: Any) -> int:
    return sum(memoryview(buffer).nbytes for buffer in buffers)


def _set(future: asyncio.Future[Exception | None], error: Exception | None) -> None:
    if not future.done():
        future.set_result(error)
