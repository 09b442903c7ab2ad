"""The spiller against a shell that believes nothing: it keeps the values itself and objects to every wrong order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dask_gpurt.memory import events as ev
from dask_gpurt.memory import spiller
from dask_gpurt.memory.horizon import DYING, IDLE, RUNNING, Kind, Use
from dask_gpurt.memory.ledger import Ledger, Reservation, Tier
from dask_gpurt.memory.spiller import DEARNESS_MIN, MOVES_MAX, Block, Spiller, State
from docs import states

LIMIT = 100
OBJECT_LIMIT = 100
UNWRITTEN_MIN = 20
NAMES = st.integers(0, 12)
USES = st.one_of(
    st.just(IDLE), st.just(RUNNING), st.just(DYING), st.integers(0, 20).map(lambda d: Use(Kind.NEXT, float(d)))
)


class Oracle:
    def __init__(self) -> None:
        self.known: dict[Hashable, Use] = {}

    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [self.known.get(name, IDLE) for name in names]


class Shell(RuleBasedStateMachine):
    overflow: Tier | None = None
    disk_limit = 150

    def __init__(self) -> None:
        super().__init__()
        self.oracle = Oracle()
        self.ledger = Ledger({Tier.HOST: LIMIT, Tier.DISK: self.disk_limit, Tier.OBJECT: OBJECT_LIMIT})
        self.spiller = Spiller(
            self.ledger,
            self.oracle,
            overflow=self.overflow,
            dearness=lambda: self.dearness,
            unwritten_min_nbytes=UNWRITTEN_MIN,
            writes_max=2,
        )
        self.dearness = 10.0
        #: Copies of copies under way, by the moves that make them; not all of them are wanted any more.
        self.moves: dict[int, Hashable] = {}
        self.memory: dict[Hashable, tuple[Hashable, int]] = {}
        #: Copies below, and in which tier they are.
        self.disk: dict[Hashable, int] = {}
        self.tiers: dict[Hashable, Tier | None] = {}
        self.writing: dict[Hashable, int] = {}
        self.reading: dict[Hashable, int] = {}
        self.pins: dict[Hashable, int] = {}
        self.sizes: dict[Hashable, int] = {}
        self.doomed: set[Hashable] = set()
        self.granted: list[Reservation] = []
        self.asked = 0

    def handle(self, event: ev.Event) -> list[ev.Instruction]:
        known = set(self.spiller.blocks)
        instructions = self.spiller.handle(event)
        for instruction in instructions:
            name = instruction.name
            match instruction:
                case ev.Drop():
                    assert name in self.memory
                    if name in self.spiller.blocks and not (isinstance(event, ev.Put) and event.name == name):
                        assert not self.pins.get(name), "a pinned value was dropped"
                        assert name in self.disk or self.oracle.known.get(name) is DYING, "the only value was dropped"
                        if name not in self.disk:
                            assert self.memory[name][1] >= UNWRITTEN_MIN, "it was not worth that"
                            self.doomed.add(name)
                    del self.memory[name]
                case ev.RemoveCopy():
                    self.disk.pop(name, None)
                    if name in self.spiller.blocks:
                        assert name in self.memory, "the only copy was removed"
                case ev.Write():
                    # What was adopted may be more than a tier may hold; nothing is written to it then.
                    tier = instruction.tier
                    assert tier is not None
                    limit_nbytes = {Tier.DISK: self.disk_limit, Tier.OBJECT: OBJECT_LIMIT}[tier]
                    assert self.ledger.used(tier) <= limit_nbytes, "more than the tier may hold"
                    assert name in self.memory
                    assert name not in self.disk
                    assert name not in self.writing
                    assert instruction.tier in (Tier.DISK, self.overflow)
                    assert instruction.tier not in self.spiller.blocked
                    self.tiers[name] = instruction.tier
                    self.writing[name] = instruction.epoch
                case ev.Move():
                    assert self.dearness > DEARNESS_MIN
                    assert instruction.tier is self.overflow
                    assert self.tiers[name] is Tier.DISK
                    assert name in self.disk
                    assert name not in self.memory
                    assert self.spiller.blocks[name].state is State.SPILLED
                    assert self.oracle.known.get(name, IDLE) is IDLE, "it will be needed"
                    self.moves[instruction.epoch] = name
                case ev.Replace():
                    assert isinstance(event, ev.Moved)
                    assert name not in self.reading, "somebody reads it"
                    self.tiers[name] = self.overflow
                case ev.Read():
                    assert name not in self.memory
                    self.reading[name] = instruction.epoch
        for name in known - set(self.spiller.blocks):
            self.forget(name)
        return instructions

    def forget(self, name: Hashable) -> None:
        for table in (self.pins, self.sizes, self.writing, self.reading):
            table.pop(name, None)
        self.doomed.discard(name)
        self.oracle.known.pop(name, None)

    @rule(name=NAMES, nbytes=st.integers(0, 60), use=USES, shared=st.booleans())
    def put(self, name: int, nbytes: int, use: Use, shared: bool) -> None:
        if name in self.spiller.blocks:
            self.handle(ev.Deleted(name))
        buffer: Hashable = ("own", name, len(self.memory))
        buffer_nbytes = nbytes
        others = [b for b in self.memory.values() if b[1] >= nbytes]
        if shared and others:
            buffer, buffer_nbytes = others[0]
        else:
            buffer = object()
        self.memory[name] = (buffer, buffer_nbytes)
        self.sizes[name] = nbytes
        self.oracle.known[name] = use
        self.handle(ev.Put(name, buffer, buffer_nbytes, nbytes))

    @rule(name=NAMES, nbytes=st.integers(0, 60))
    def adopt(self, name: int, nbytes: int) -> None:
        if name in self.spiller.blocks:
            self.handle(ev.Deleted(name))
        self.disk[name] = nbytes
        self.tiers[name] = Tier.DISK
        self.sizes[name] = nbytes
        self.handle(ev.Adopted(name, nbytes, nbytes))

    @rule(name=NAMES)
    def delete(self, name: int) -> None:
        if name in self.spiller.blocks:
            self.handle(ev.Deleted(name))
            assert name not in self.memory
            assert name not in self.disk

    @rule(name=NAMES, nbytes=st.integers(1, 30))
    def grow(self, name: int, nbytes: int) -> None:
        block = self.spiller.blocks.get(name)
        if block is None or block.state not in (State.RESIDENT, State.CLEAN):
            return
        buffer, size = self.memory[name]
        if self.ledger.holders(Tier.HOST, buffer) == 1:
            self.memory[name] = (buffer, size + nbytes)
            self.sizes[name] += nbytes
            self.handle(ev.Grown(name, nbytes))

    @rule(names=st.sets(NAMES, max_size=3))
    def pin(self, names: set[int]) -> None:
        here = tuple(name for name in names if name in self.spiller.blocks)
        for name in here:
            self.pins[name] = self.pins.get(name, 0) + 1
        self.handle(ev.Pinned(here))

    @rule(names=st.sets(NAMES, max_size=3))
    def unpin(self, names: set[int]) -> None:
        here = tuple(name for name in names if self.pins.get(name))
        for name in here:
            self.pins[name] -= 1
        self.handle(ev.Unpinned(here))

    @rule(name=NAMES)
    def want(self, name: int) -> None:
        if name in self.spiller.blocks and name not in self.doomed:
            self.handle(ev.Wanted(name, self.ledger.reserve(Tier.HOST, self.sizes[name])))

    @rule(name=NAMES, use=USES)
    def foresee(self, name: int, use: Use) -> None:
        if name not in self.doomed and self.oracle.known.get(name) is not DYING:
            self.oracle.known[name] = use

    @precondition(lambda self: self.writing)
    @rule(
        ok=st.sampled_from(["written", "written", "written", "refused", "unwritable"]),
        more_nbytes=st.sampled_from([0, 0, 0, 7]),
        data=st.data(),
    )
    def end_write(self, ok: str, more_nbytes: int, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.writing, key=repr)))
        epoch = self.writing.pop(name)
        if not self.spiller.current(name, epoch):
            return
        if ok == "written":
            tier, nbytes = self.tiers[name], self.sizes[name] + more_nbytes
            assert tier is not None
            limit_nbytes = self.ledger.limit(tier)
            assert limit_nbytes is not None
            within = self.ledger.used(tier) <= limit_nbytes
            self.disk[name] = nbytes
            self.handle(ev.Written(name, epoch, nbytes))
            if within:
                assert self.ledger.used(tier) <= limit_nbytes, "the copy is larger than there was room for"
        else:
            self.handle(ev.WriteFailed(name, epoch, value_is_to_blame=ok == "unwritable"))

    @precondition(lambda self: self.reading)
    @rule(ok=st.sampled_from(["yes", "put off", "no"]), data=st.data())
    def end_read(self, ok: str, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.reading, key=repr)))
        epoch = self.reading.pop(name)
        if not self.spiller.current(name, epoch):
            return
        if ok == "yes":
            buffer = object()
            self.memory[name] = (buffer, self.sizes[name])
            self.handle(ev.Raised(name, epoch, buffer, self.sizes[name]))
        elif ok == "put off":
            self.handle(ev.ReadPutOff(name, epoch))
        else:
            self.handle(ev.ReadFailed(name, epoch))
            assert name not in self.spiller.blocks

    @precondition(lambda self: self.moves)
    @rule(ok=st.booleans(), data=st.data())
    def end_move(self, ok: bool, data: st.DataObject) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.moves)))
        name = self.moves.pop(epoch)
        if not self.spiller.moving(name, epoch):
            return
        if ok:
            self.handle(ev.Moved(name, epoch, self.disk[name]))
            assert self.spiller.blocks[name].state is not State.SPILLED or self.tiers[name] is self.overflow
        else:
            self.handle(ev.MoveFailed(name, epoch))
            assert self.tiers[name] is Tier.DISK

    @rule(dearness=st.sampled_from([0.5, 1.0, DEARNESS_MIN, 10.0]))
    def learn(self, dearness: float) -> None:
        self.dearness = dearness

    @rule(nbytes=st.integers(0, 120))
    def press(self, nbytes: int) -> None:
        self.handle(ev.Pressed(nbytes))

    @rule()
    def retry(self) -> None:
        self.handle(ev.Retried())

    @rule(nbytes=st.integers(0, 130))
    def ask(self, nbytes: int) -> None:
        self.asked += 1
        self.ledger.request(Tier.HOST, nbytes, self.granted.append)
        self.handle(ev.Pressed(0))

    @precondition(lambda self: self.granted)
    @rule()
    def give_back(self) -> None:
        self.granted.pop(0).release()
        self.asked -= 1
        self.handle(ev.Pressed(0))

    # What must always be true

    @invariant()
    def the_books_agree_with_what_is_there(self) -> None:
        assert self.ledger.held(Tier.HOST) == sum(dict(self.memory.values()).values())
        for tier in (Tier.DISK, Tier.OBJECT):
            assert self.ledger.held(tier) == sum(n for name, n in self.disk.items() if self.tiers[name] is tier)
        assert self.spiller.absent == set(self.spiller.blocks) - set(self.memory)
        assert self.spiller.absent_nbytes == sum(self.sizes[n] for n in self.spiller.absent)
        assert self.spiller.absent_copy_nbytes == sum(self.disk.get(n, 0) for n in self.spiller.absent)

    @invariant()
    def writes_are_bounded(self) -> None:
        current = [n for n, e in self.writing.items() if self.spiller.current(n, e)]
        assert self.spiller.busy == bool(current)
        moving = [name for epoch, name in self.moves.items() if self.spiller.moving(name, epoch)]
        assert len(moving) == self.spiller._moves <= MOVES_MAX
        assert self.ledger.reserved(Tier.OBJECT) >= sum(self.disk[name] for name in moving)

    @invariant()
    def over_the_limit_only_if_nothing_can_go(self) -> None:
        if self.ledger.wanted(Tier.HOST) <= 0 or self.writing:
            return
        for name, block in self.spiller.blocks.items():
            alone = name in self.memory and self.ledger.holders(Tier.HOST, block.buffer) == 1
            use = self.oracle.known.get(name, IDLE)
            if use is DYING and block.buffer_nbytes < UNWRITTEN_MIN:
                # It will be deleted in a moment.
                continue
            if alone and not block.pins and use is not RUNNING and block.buffer_nbytes and block.state is State.CLEAN:
                # It became movable by something the spiller was not told of; then the next event moves it.
                self.handle(ev.Retried())
                assert name not in self.memory or self.ledger.wanted(Tier.HOST) <= 0 or self.writing
                return

    @invariant()
    def nobody_waits_forever(self) -> None:
        waiting = self.ledger.waiting(Tier.HOST)
        assert waiting + len(self.granted) == self.asked
        if waiting and not self.writing and not self.granted:
            self.handle(ev.Retried())
            assert self.granted or self.writing


def test_what_nobody_needs_makes_room_below_for_what_will_be_needed() -> None:
    """A working set between memory and a disk that is full of data which a client holds."""

    def moved_through_the_overflow(dearness: float) -> tuple[int, int]:
        oracle = Oracle()
        ledger = Ledger({Tier.HOST: 40, Tier.DISK: 64, Tier.OBJECT: 1000})
        spiller = Spiller(ledger, oracle, overflow=Tier.OBJECT, dearness=lambda: dearness)
        through = 0

        def handle(event: ev.Event) -> None:
            nonlocal through
            for instruction in spiller.handle(event):
                name = instruction.name
                block = spiller.blocks.get(name)
                match instruction:
                    case ev.Write(epoch=epoch, tier=tier):
                        through += 10 * (tier is Tier.OBJECT)
                        handle(ev.Written(name, epoch, 10))
                    case ev.Read(epoch=epoch):
                        assert block is not None
                        through += 10 * (block.tier is Tier.OBJECT)
                        handle(ev.Raised(name, epoch, object(), 10))
                    case ev.Move(epoch=epoch):
                        through += 10
                        handle(ev.Moved(name, epoch, 10))

        for name in range(10):
            handle(ev.Put(name, object(), 10, 10))
        for name in range(100, 106):
            oracle.known[name] = Use(Kind.NEXT, float(name - 100))
            handle(ev.Put(name, object(), 10, 10))
        for turn in range(60):
            name = 100 + turn % 6
            for other in range(100, 106):
                oracle.known[other] = Use(Kind.NEXT, float((other - name) % 6))
            handle(ev.Wanted(name))
        return through, spiller.moved_nbytes

    stays, none_moved = moved_through_the_overflow(1.0)
    moves, moved_nbytes = moved_through_the_overflow(10.0)
    assert none_moved == 0
    assert moved_nbytes > 0
    assert moves < stays


class OverflowingShell(Shell):
    overflow = Tier.OBJECT


TestShell = Shell.TestCase
TestOverflowingShell = OverflowingShell.TestCase
TestShell.settings = TestOverflowingShell.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


#: Nothing is looked for after the first failure: others that a planted bug causes would be raised together with it.
FIRST = settings(max_examples=1000, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)


def test_the_ways_between_states_are_those_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table in the module's documentation, of which the diagram is drawn, has all that happens, and nothing else."""
    gone, set_attribute = set[tuple[str, str]](), Block.__setattr__

    def noting(block: Block, name: str, value: object) -> None:
        before = getattr(block, name, None)
        set_attribute(block, name, value)
        if isinstance(before, State) and isinstance(value, State) and before is not value:
            gone.add((before.name, value.name))

    monkeypatch.setattr(Block, "__setattr__", noting)
    # So that copies have to make room for others soon.
    monkeypatch.setattr(Shell, "disk_limit", 70)
    long = settings(max_examples=200, stateful_step_count=200, derandomize=True, phases=[Phase.generate])
    run_state_machine_as_test(Shell, settings=long)
    table = {(move.source, move.target) for move in states.moves(spiller.__doc__ or "")}
    assert gone == {(source, target) for source, target in table if target.isupper()}


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is worth something only if it objects."""

    def leaky(self: Spiller, block: object) -> None:
        sharing = self._sharing[block.buffer]  # type: ignore[attr-defined]
        sharing.discard(block.name)  # type: ignore[attr-defined]
        if not sharing:
            del self._sharing[block.buffer]  # type: ignore[attr-defined]

    monkeypatch.setattr(Spiller, "_leave", leaky)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Shell, settings=FIRST)
