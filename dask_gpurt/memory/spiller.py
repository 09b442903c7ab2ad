"""The life of a block between memory and the tier below, as a state machine.

Theory of operation
-------------------
The spiller knows every block by name and holds none of the values. Events tell it what happened, instructions tell
the shell (:mod:`dask_gpurt.memory.mover`) what to do; see :mod:`dask_gpurt.memory.events`. Bytes are counted in the
:class:`~dask_gpurt.memory.ledger.Ledger`. Whenever the tier holds more than its limit, or a request waits for room,
blocks are chosen (:mod:`dask_gpurt.memory.policy`) until what is free, and what is on its way to be free, suffices.

=========  ========================  =========================================================
state      where the value is        ends by
=========  ========================  =========================================================
RESIDENT   memory                    Write -> WRITING; dying: Drop -> SPILLED (with a copy of no
                                     bytes, for the books: nobody will ask for it)
WRITING    memory, copy under way    Written -> CLEAN; WriteFailed, too large -> RESIDENT
CLEAN      memory and below          Drop -> SPILLED; RemoveCopy (disk is full) -> RESIDENT
SPILLED    below                     Wanted: Read -> READING
READING    below, read under way     Raised -> CLEAN; ReadFailed -> forgotten; ReadPutOff -> SPILLED
=========  ========================  =========================================================

Deleted ends every state. A block that is WRITING stays usable all the time; when its copy is complete it goes down only
if it is not pinned and the room is still needed, otherwise it is CLEAN, and may go for free later. A copy that has become larger
than was reserved for it, and that there is no room for, is removed again.

What cannot happen: a block is in memory and not in the ledger, or the other way round; a pinned block is dropped; a
block without a copy is dropped (unless it is dying); two operations run on one block at a time.

There may be two tiers below. A block goes to the first of them as long as that has room for it, if need be by removing
copies of what is in memory, and to the *overflow* when it has none, or when it is blocked. What lies in the overflow, or would
go there, is dearer (``dearness``) to the policy. Where a block that will be needed finds the first tier almost full, copies there
that nobody is known to need are *moved* to the overflow: that saves a read and a write of the overflow later, for a read and
a write of the first tier and a write of the overflow now, which pays from :data:`DEARNESS_MIN` on. A block whose copy is moved stays
SPILLED; when it is wanted meanwhile, the copy of the copy is thrown away. Nothing is moved up: it is read once either way.

When nothing more can be moved, and nothing is on its way, the oldest waiting request is forced through. When a write
fails for the sake of a tier below, nothing is written there (it is ``blocked``) until the shell says :class:`~dask_gpurt.memory.events.Retried`.

Pure: no I/O, no clock, no dask, no threads. The caller serializes the calls.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from dask_gpurt.memory import events as ev
from dask_gpurt.memory.horizon import Horizon, Kind, Use
from dask_gpurt.memory.ledger import Ledger, Reservation, Tier
from dask_gpurt.memory.policy import SMALL_NBYTES, Candidate, order

__all__ = ["Block", "Spiller", "State"]

#: Part of the limit that is freed beyond it once it is passed, so that not every put looks at all blocks.
BAND = 1 / 32


class State(enum.Enum):
    """Where a block is; see the table in the module's documentation."""

    RESIDENT = "resident"
    WRITING = "writing"
    CLEAN = "clean"
    SPILLED = "spilled"
    READING = "reading"


#: So many times as dear as the first tier below the overflow has to be for a copy to be moved there to make room: with d for that,
#: the block that needs the room costs 2 there, and not 2 d; the move costs 1 + d.
DEARNESS_MIN = 3.0

#: Part of the limit of the first tier below that such moves keep free, and moves at a time.
ROOM_BELOW = 1 / 16
MOVES_MAX = 2

_IN_MEMORY = (State.RESIDENT, State.WRITING, State.CLEAN)


@dataclass(slots=True)
class Block:
    """What is known about a block."""

    name: Hashable
    epoch: int
    state: State
    #: Bytes of the value itself.
    nbytes: int
    #: The buffer that it lies in while it is in memory, and its bytes.
    buffer: Hashable = None
    buffer_nbytes: int = 0
    #: Bytes of the copy below, and where that is, or is on its way to.
    copy_nbytes: int = 0
    tier: Tier | None = None
    #: How many want it to stay.
    pins: int = 0
    #: Higher: used more recently.
    recency: int = 0
    #: WRITING, and to be dropped when that is done: the bytes that are expected to become free then.
    leaving_nbytes: int = 0
    #: The value itself cannot be written.
    unwritable: bool = False
    #: Bytes of a copy that was larger than was expected, and that there was no room for.
    needs_nbytes: int = 0
    #: Pays for a copy under way, or for a read under way.
    reservation: Reservation | None = None
    #: Pays for the copy of the copy that is under way to the overflow, and which move that is.
    fare: Reservation | None = None
    move_epoch: int = 0
    #: The copy cannot be moved.
    unmovable: bool = False


class Spiller:
    """Decides what moves between ``upper`` and ``lower``.

    Parameters
    ----------
    ledger
        The books; may be shared with others.
    horizon
        Tells the next uses.
    upper, lower
        The two tiers. A lower tier of None: whoever keeps the copies counts them.
    overflow
        Where copies go that the lower tier has no room for, or does not take; None: nowhere.
    dearness
        Says how many times as dear a byte is that goes to the overflow, or comes from there, as one of the lower tier.
    unwritten_min_nbytes
        What is smaller is not dropped unwritten: nothing is gained by it, and who needs it may change. (The tasks that unpack a
        shuffle first run anywhere, to be sent where they belong; all of them need its barrier, which is a number.)
    counted
        Says of a name whether it counts in :attr:`absent_nbytes`.
    writes_max
        Writes under way at a time. Further ones are started as these complete, so that they are chosen late.
    """

    def __init__(
        self,
        ledger: Ledger,
        horizon: Horizon,
        *,
        upper: Tier = Tier.HOST,
        lower: Tier | None = Tier.DISK,
        overflow: Tier | None = None,
        dearness: Callable[[], float] = lambda: 1.0,
        unwritten_min_nbytes: int = SMALL_NBYTES,
        counted: Callable[[Hashable], bool] = lambda name: True,  # noqa: ARG005
        writes_max: int = 4,
    ) -> None:
        self.ledger = ledger
        self.horizon = horizon
        self.upper = upper
        self.lower = lower
        self.overflow = overflow
        self._below: tuple[Tier | None, ...] = (lower,) if overflow is None else (lower, overflow)
        self._dearness = dearness
        self._unwritten_min_nbytes = unwritten_min_nbytes
        self._counted = counted
        self.writes_max = writes_max
        #: Name -> block.
        self.blocks: dict[Hashable, Block] = {}
        #: Names that are not in memory: SPILLED or READING.
        self.absent: set[Hashable] = set()
        #: Bytes of the values that are not in memory, of those that count, and of all their copies.
        self.absent_nbytes = 0
        self.absent_copy_nbytes = 0
        #: Tiers below that nothing is written to for the time being, because they refused a write.
        self.blocked: set[Tier | None] = set()
        #: Bytes that were dropped without ever having been written, and those whose older copy was still good.
        self.dropped_unwritten_nbytes = 0
        self.dropped_clean_nbytes = 0
        #: Bytes that were moved to the overflow.
        self.moved_nbytes = 0
        #: Bytes of buffers that have left ``upper``, for whatever reason.
        self.freed_nbytes = 0
        #: Bytes that are expected to become free when what is being written has been.
        self.leaving_nbytes = 0
        self._sharing: dict[Hashable, set[Hashable]] = {}
        self._writing = 0
        self._moves = 0
        #: Blocks that will be needed and found the tier below almost full, until it is looked again for what could be moved.
        self._look_below = 0
        self._pressed_nbytes = 0
        #: What the dearness was when blocks were looked at last.
        self._dear = 1.0
        #: Searches since the last one that found something, and events until the next one.
        self._fruitless = 0
        self._skip = 0
        self._clock = itertools.count(1)
        self._handlers: dict[type, Callable[[Any, list[ev.Instruction]], None]] = {
            ev.Put: self._put,
            ev.Adopted: self._adopted,
            ev.Grown: self._grown,
            ev.Deleted: self._deleted,
            ev.Pinned: self._pinned,
            ev.Unpinned: self._unpinned,
            ev.Wanted: self._wanted,
            ev.Raised: self._raised,
            ev.ReadFailed: self._read_failed,
            ev.ReadPutOff: self._read_put_off,
            ev.Written: self._written,
            ev.WriteFailed: self._write_failed,
            ev.Moved: self._moved,
            ev.MoveFailed: self._move_failed,
            ev.Pressed: self._pressed,
            ev.Retried: self._retried,
        }

    def __repr__(self) -> str:
        return (
            f"<Spiller {self.upper}->{self.lower}: {len(self.blocks)} blocks, {len(self.absent)} below, "
            f"{self._writing} being written{''.join(f', {tier} is blocked' for tier in self.blocked)}>"
        )

    # For the shell

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        """Take note of ``event`` and say what is to be done."""
        instructions: list[ev.Instruction] = []
        self._handlers[type(event)](event, instructions)
        if self._pressed_nbytes or self.ledger.wanted(self.upper) > 0:
            self._relieve(instructions)
        return instructions

    def touch(self, name: Hashable) -> None:
        """Note that a block was used."""
        self.blocks[name].recency = next(self._clock)

    def current(self, name: Hashable, epoch: int) -> bool:
        """Whether ``name`` still means the block that an operation was begun for."""
        block = self.blocks.get(name)
        return block is not None and block.epoch == epoch

    def moving(self, name: Hashable, epoch: int) -> bool:
        """Whether the copy of ``name`` is still wanted where the move ``epoch`` brings it."""
        block = self.blocks.get(name)
        return block is not None and block.fare is not None and block.move_epoch == epoch

    @property
    def busy(self) -> bool:
        """Whether writes are under way."""
        return self._writing > 0

    @property
    def calm(self) -> bool:
        """Whether everything is in memory and there is room."""
        return not self.absent and self.ledger.wanted(self.upper) <= 0

    # Events

    def _put(self, event: ev.Put, instructions: list[ev.Instruction]) -> None:
        if event.name in self.blocks:
            self._forget(self.blocks[event.name], instructions)
        epoch = next(self._clock)
        block = Block(event.name, epoch, State.RESIDENT, event.nbytes, recency=epoch)
        self.blocks[event.name] = block
        self._enter(block, event.buffer, event.buffer_nbytes, event.reservation)

    def _adopted(self, event: ev.Adopted, instructions: list[ev.Instruction]) -> None:
        if event.name in self.blocks:
            self._forget(self.blocks[event.name], instructions)
        epoch = next(self._clock)
        block = Block(event.name, epoch, State.SPILLED, event.nbytes, copy_nbytes=event.copy_nbytes, recency=epoch)
        block.tier = self.lower
        self.blocks[event.name] = block
        self._hold_copy(block)
        self._absent(block)

    def _grown(self, event: ev.Grown, instructions: list[ev.Instruction]) -> None:
        block = self.blocks[event.name]
        assert block.state in (State.RESIDENT, State.CLEAN), block
        assert self.ledger.holders(self.upper, block.buffer) == 1, block
        if block.state is State.CLEAN:
            self._remove_copy(block, instructions)
        block.nbytes += event.nbytes
        block.buffer_nbytes += event.nbytes
        self.ledger.grow(self.upper, block.buffer, event.nbytes, event.reservation)

    def _deleted(self, event: ev.Deleted, instructions: list[ev.Instruction]) -> None:
        self._forget(self.blocks[event.name], instructions)

    def _pinned(self, event: ev.Pinned, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        for name in event.names:
            self.blocks[name].pins += 1

    def _unpinned(self, event: ev.Unpinned, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        for name in event.names:
            block = self.blocks.get(name)
            if block is not None and block.pins:
                block.pins -= 1

    def _wanted(self, event: ev.Wanted, instructions: list[ev.Instruction]) -> None:
        block = self.blocks[event.name]
        block.recency = next(self._clock)
        if block.state is State.SPILLED:
            block.state = State.READING
            block.reservation = event.reservation
            instructions.append(ev.Read(block.name, block.epoch))
            return
        self._stay(block)
        if event.reservation is not None:
            event.reservation.release()

    def _raised(self, event: ev.Raised, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        block = self.blocks[event.name]
        assert block.state is State.READING, block
        assert block.epoch == event.epoch, block
        self._present(block)
        block.state = State.CLEAN
        reservation, block.reservation = block.reservation, None
        self._enter(block, event.buffer, event.buffer_nbytes, reservation)

    def _read_failed(self, event: ev.ReadFailed, instructions: list[ev.Instruction]) -> None:
        self._forget(self.blocks[event.name], instructions)

    def _read_put_off(self, event: ev.ReadPutOff, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        block = self.blocks[event.name]
        assert block.state is State.READING, block
        block.state = State.SPILLED
        reservation, block.reservation = block.reservation, None
        if reservation is not None:
            reservation.release()

    def _written(self, event: ev.Written, instructions: list[ev.Instruction]) -> None:
        block = self.blocks[event.name]
        assert block.state is State.WRITING, block
        assert block.epoch == event.epoch, block
        more = None
        if block.reservation is not None and event.nbytes > block.reservation.nbytes:
            # Serialized, it is larger than its value says it is.
            more = self._reserve_below(block.reservation.tier, event.nbytes - block.reservation.nbytes, instructions)
            if more is None:
                self._end_write(block)
                block.state, block.tier, block.needs_nbytes = State.RESIDENT, None, event.nbytes
                instructions.append(ev.RemoveCopy(block.name))
                return
        leaving = block.leaving_nbytes > 0
        self._pass_on(block)
        self._end_write(block)
        if more is not None:
            more.release()
        block.state = State.CLEAN
        block.copy_nbytes = event.nbytes
        self._hold_copy(block)
        if leaving and not block.pins and self._excess() > 0:
            self._drop(block, instructions)

    def _write_failed(self, event: ev.WriteFailed, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        block = self.blocks[event.name]
        assert block.state is State.WRITING, block
        assert block.epoch == event.epoch, block
        self._end_write(block)
        block.state = State.RESIDENT
        if event.value_is_to_blame:
            block.unwritable = True
        else:
            self.blocked.add(block.tier)
        block.tier = None

    def _moved(self, event: ev.Moved, instructions: list[ev.Instruction]) -> None:
        block = self.blocks[event.name]
        self._end_move(block)
        if block.state is not State.SPILLED:
            # It is being read, from where it was.
            return
        assert block.tier is not None, block
        self.ledger.drop(block.tier, (self.upper, block.epoch))
        self.absent_copy_nbytes += event.nbytes - block.copy_nbytes
        block.tier, block.copy_nbytes = self.overflow, event.nbytes
        self._hold_copy(block)
        self.moved_nbytes += event.nbytes
        instructions.append(ev.Replace(block.name))

    def _move_failed(self, event: ev.MoveFailed, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        block = self.blocks[event.name]
        self._end_move(block)
        block.unmovable = True

    def _pressed(self, event: ev.Pressed, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        self._pressed_nbytes = max(self._pressed_nbytes, event.nbytes)
        if event.nbytes:
            # Whoever asks for it has a reason to: it is looked for now.
            self._skip = 0

    def _retried(self, event: ev.Retried, instructions: list[ev.Instruction]) -> None:  # noqa: ARG002
        self.blocked.clear()
        self._skip = 0

    # Making room

    def _excess(self) -> int:
        """Bytes that have yet to go, those on their way not counted as gone."""
        return max(self.ledger.wanted(self.upper), self._pressed_nbytes)

    def _relieve(self, instructions: list[ev.Instruction]) -> None:
        excess = self._excess() - self.leaving_nbytes
        if excess > 0 and self._worthwhile():
            before = len(instructions)
            # A wish from outside is for so much, and no more.
            over = self.ledger.wanted(self.upper) > 0
            band = int((self.ledger.limit(self.upper) or 0) * BAND) if over else 0
            self._evict(excess, band, instructions)
            self._fruitless = 0 if len(instructions) > before else self._fruitless + 1
            self._skip = min(self._fruitless, len(self.blocks) // 64)
        if not self.leaving_nbytes and self.ledger.wanted(self.upper) > 0:
            # Nothing is on its way out, and what could go without a write has gone.
            self.ledger.force(self.upper)
        if not self.leaving_nbytes:
            # A wish from outside is served once, as far as it can be.
            self._pressed_nbytes = 0

    def _worthwhile(self) -> bool:
        """Whether to look at all blocks again; where many were looked at in vain, not at every event."""
        self._skip -= 1
        return self._skip < 0

    def _evict(self, excess: int, band: int, instructions: list[ev.Instruction]) -> None:
        for candidate in order(self._candidates()):
            if excess <= 0 and candidate.nbytes > band + excess:
                # The band is for many small blocks; no large one is moved for its sake.
                return
            blocks = [self.blocks[name] for name in candidate.names]
            if candidate.use.kind is Kind.DYING:
                if candidate.nbytes < self._unwritten_min_nbytes:
                    # It will be deleted in a moment.
                    continue
                for block in blocks:
                    self._give_up(block, instructions)
                excess -= candidate.nbytes
                continue
            dying = [block for block in blocks if block.name in candidate.dying]
            blocks = [block for block in blocks if block.name not in candidate.dying]
            dirty = [block for block in blocks if block.state is State.RESIDENT]
            if dirty:
                if len(self.blocked) == len(self._below):
                    continue
                if self._writing and self._writing + len(dirty) > self.writes_max:
                    # Rather wait for a slot than give up what is needed sooner.
                    return
                # The members of a candidate go together: only the last one frees anything.
                share = -(-candidate.nbytes // len(dirty))
                if not all(self._begin_write(block, share, instructions) for block in dirty):
                    continue
                if self.overflow is not None and candidate.use.kind is Kind.NEXT:
                    self._make_room_below(self.overflow, candidate.nbytes, instructions)
            for block in dying:
                self._give_up(block, instructions)
            for block in blocks:
                if block.state is State.CLEAN:
                    self.dropped_clean_nbytes += block.nbytes
                    self._drop(block, instructions)
            excess -= candidate.nbytes

    def _give_up(self, block: Block, instructions: list[ev.Instruction]) -> None:
        """Drop a block that nobody will ask for."""
        if block.state is State.RESIDENT:
            self.dropped_unwritten_nbytes += block.nbytes
            # A copy of no bytes keeps the books even; reading it would fail.
            self._hold_copy(block)
        self._drop(block, instructions)

    def _candidates(self) -> list[Candidate]:
        groups: list[list[Block]] = []
        firsts: list[Hashable] = []
        every = self.blocks
        for buffer, names in self._sharing.items():
            blocks = [every[name] for name in names]
            for b in blocks:
                if b.pins or b.state is State.WRITING or (b.unwritable and b.state is State.RESIDENT):
                    break
            else:
                # The ledger may know holders that are no blocks of ours; then nothing would be freed.
                if blocks[0].buffer_nbytes and self.ledger.holders(self.upper, buffer) == len(blocks):
                    groups.append(blocks)
                    firsts.extend(names)
        uses = iter(self.horizon.uses(firsts))
        self._dear = 1.0 if self.overflow is None else max(1.0, self._dearness())
        return [self._candidate(blocks, list(itertools.islice(uses, len(blocks)))) for blocks in groups]

    def _candidate(self, blocks: list[Block], uses: list[Use]) -> Candidate:
        if len(blocks) == 1:
            # Most are, and this is done for all blocks, for each that is moved away.
            (block,) = blocks
            dirty_nbytes = block.nbytes if block.state is State.RESIDENT else 0
            dearness = 1.0 if self._dear == 1.0 else self._dearness_of(block)
            return Candidate((block.name,), block.buffer_nbytes, dirty_nbytes, uses[0], block.recency, dearness)
        # Dying only if all are.
        kind = max(use.kind for use in uses)
        wanted = [
            (block.nbytes, use.distance) for block, use in zip(blocks, uses, strict=True) if use.kind is Kind.NEXT
        ]
        wanted_nbytes = sum(nbytes for nbytes, _ in wanted)
        # They come back one by one: what counts is when most of their bytes do.
        distance = sum(max(1, nbytes) * distance for nbytes, distance in wanted) / max(
            1, sum(max(1, n) for n, _ in wanted)
        )
        dying = [
            block.name
            for block, use in zip(blocks, uses, strict=True)
            if use.kind is Kind.DYING is not kind and block.nbytes >= self._unwritten_min_nbytes
        ]
        dirty = [block.nbytes for block in blocks if block.state is State.RESIDENT and block.name not in dying]
        return Candidate(
            tuple(b.name for b in blocks),
            blocks[0].buffer_nbytes,
            sum(dirty),
            Use(kind, distance),
            max(b.recency for b in blocks),
            1.0 if self._dear == 1.0 else max(self._dearness_of(b) for b in blocks),
            wanted_nbytes,
            len(dirty),
            len(wanted),
            tuple(dying),
        )

    def _dearness_of(self, block: Block) -> float:
        if block.state is State.CLEAN:
            return self._dear if block.tier is self.overflow else 1.0
        assert self.lower is not None
        no_room = self.lower in self.blocked or self._free_below() < block.nbytes
        return self._dear if no_room else 1.0

    def _free_below(self) -> float:
        """Bytes that the first tier below has room for."""
        if self.lower is None or self.ledger.limit(self.lower) is None:
            return float("inf")
        return -self.ledger.wanted(self.lower)

    def _make_room_below(self, overflow: Tier, nbytes: int, instructions: list[ev.Instruction]) -> None:
        """Move copies that nobody is known to need to the overflow, where the first tier below is almost full, and that pays.

        The next block is expected to have ``nbytes``.
        """
        lower = self.lower
        assert lower is not None
        limit = self.ledger.limit(lower)
        if limit is None or self._moves >= MOVES_MAX or overflow in self.blocked:
            return
        lacking = max(nbytes, limit * ROOM_BELOW) - self._free_below()
        if lacking <= 0:
            return
        self._look_below -= 1
        if self._look_below >= 0 or self._dear <= DEARNESS_MIN:
            return
        candidates = [
            block
            for block in map(self.blocks.__getitem__, self.absent)
            if block.state is State.SPILLED
            and block.tier is lower
            and block.copy_nbytes
            and block.fare is None
            and not (block.pins or block.unmovable)
        ]
        uses = self.horizon.uses([block.name for block in candidates])
        idle = [block for block, use in zip(candidates, uses, strict=True) if use.kind is Kind.IDLE]
        for block in sorted(idle, key=lambda block: -block.recency):
            if lacking <= 0 or self._moves >= MOVES_MAX:
                break
            fare = self.ledger.try_reserve(overflow, block.copy_nbytes)
            if fare is None:
                continue
            block.fare, block.move_epoch = fare, next(self._clock)
            self._moves += 1
            lacking -= block.copy_nbytes
            instructions.append(ev.Move(block.name, block.move_epoch, overflow))
        if not self._moves:
            # All of them were looked at in vain; not again for each block.
            self._look_below = len(candidates) // 16

    def _end_move(self, block: Block) -> None:
        if block.fare is not None:
            self._moves -= 1
            block.fare.release()
            block.fare = None

    def _begin_write(self, block: Block, leaving_nbytes: int, instructions: list[ev.Instruction]) -> bool:
        nbytes = max(block.nbytes, block.needs_nbytes)
        for tier in self._below:
            if tier in self.blocked:
                continue
            reservation = None if tier is None else self._reserve_below(tier, nbytes, instructions)
            if reservation is not None or tier is None:
                break
        else:
            return False
        block.tier = tier
        block.reservation = reservation
        block.state = State.WRITING
        block.leaving_nbytes = leaving_nbytes
        self._writing += 1
        self.leaving_nbytes += leaving_nbytes
        instructions.append(ev.Write(block.name, block.epoch, tier))
        return True

    def _reserve_below(self, tier: Tier, nbytes: int, instructions: list[ev.Instruction]) -> Reservation | None:
        """Reserve room in a tier below. Copies of what is in memory are the least that can be given up for it."""
        reservation = self.ledger.try_reserve(tier, nbytes)
        if reservation is not None:
            return reservation
        lacking = self.ledger.wanted(tier) + nbytes
        spare = []
        for block in self.blocks.values():
            if block.state is State.CLEAN and block.tier is tier:
                spare.append(block)
                lacking -= block.copy_nbytes
                if lacking <= 0:
                    break
        else:
            # Not enough of them: they stay.
            return None
        for block in spare:
            self._remove_copy(block, instructions)
        return self.ledger.try_reserve(tier, nbytes)

    def _end_write(self, block: Block) -> None:
        self._writing -= 1
        self._stay(block)
        if block.reservation is not None:
            block.reservation.release()
            block.reservation = None

    def _pass_on(self, block: Block) -> None:
        """Expect from the others that leave its buffer what a block does not free by itself; the last one frees it."""
        for name in self._sharing[block.buffer]:
            other = self.blocks[name]
            if other is not block and other.leaving_nbytes:
                other.leaving_nbytes += block.leaving_nbytes
                block.leaving_nbytes = 0
                return

    def _stay(self, block: Block) -> None:
        """Take back the intention to drop a block that is being written."""
        self.leaving_nbytes -= block.leaving_nbytes
        block.leaving_nbytes = 0

    # Coming and going

    def _enter(self, block: Block, buffer: Hashable, buffer_nbytes: int, reservation: Reservation | None) -> None:
        block.buffer = buffer
        block.buffer_nbytes = buffer_nbytes
        sharing = self._sharing.get(buffer)
        if sharing is None:
            self._sharing[buffer] = {block.name}
        else:
            sharing.add(block.name)
        self.ledger.hold(self.upper, buffer, buffer_nbytes, reservation)

    def _leave(self, block: Block) -> None:
        sharing = self._sharing[block.buffer]
        sharing.discard(block.name)
        if not sharing:
            del self._sharing[block.buffer]
        freed = self.ledger.drop(self.upper, block.buffer)
        self.freed_nbytes += freed
        self._pressed_nbytes = max(0, self._pressed_nbytes - freed)
        block.buffer = None
        block.buffer_nbytes = 0

    def _absent(self, block: Block) -> None:
        self.absent.add(block.name)
        self.absent_nbytes += block.nbytes if self._counted(block.name) else 0
        self.absent_copy_nbytes += block.copy_nbytes

    def _present(self, block: Block) -> None:
        self.absent.discard(block.name)
        self.absent_nbytes -= block.nbytes if self._counted(block.name) else 0
        self.absent_copy_nbytes -= block.copy_nbytes

    def _drop(self, block: Block, instructions: list[ev.Instruction]) -> None:
        assert not block.pins, block
        block.state = State.SPILLED
        self._leave(block)
        self._absent(block)
        instructions.append(ev.Drop(block.name))

    def _hold_copy(self, block: Block) -> None:
        if block.tier is not None:
            self.ledger.hold(block.tier, (self.upper, block.epoch), block.copy_nbytes)

    def _remove_copy(self, block: Block, instructions: list[ev.Instruction]) -> None:
        self._end_move(block)
        if block.tier is not None:
            self.ledger.drop(block.tier, (self.upper, block.epoch))
        block.copy_nbytes = 0
        block.tier = None
        if block.state is State.CLEAN:
            block.state = State.RESIDENT
        instructions.append(ev.RemoveCopy(block.name))

    def _forget(self, block: Block, instructions: list[ev.Instruction]) -> None:
        if block.state is State.WRITING:
            self._end_write(block)
        if block.state in _IN_MEMORY:
            self._leave(block)
            instructions.append(ev.Drop(block.name))
        else:
            self._present(block)
        if block.state in (State.CLEAN, State.SPILLED, State.READING):
            self._remove_copy(block, instructions)
        if block.reservation is not None:
            block.reservation.release()
            block.reservation = None
        del self.blocks[block.name]
