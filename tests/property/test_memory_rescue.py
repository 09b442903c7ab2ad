"""Failed allocations against a model of a device that holds movable and other bytes, in pieces."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dask_gpurt.memory.rescue import TRIES_MAX, Figures, Rescue, story

LIMIT = 6400
THREADS = st.integers(0, 3)


class Threads(RuleBasedStateMachine):
    """Threads that fail, are asked again or refused, and share rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.rescue: Rescue[int] = Rescue(LIMIT)
        self.allocations = 0
        self.freed = 0
        self.token = 0
        self.waiting: dict[int, int] = {}
        self.under_way = False
        self.tries: dict[int, tuple[int, int, int]] = {}

    @rule(thread=THREADS, asked=st.sampled_from([0, 10, 1000, LIMIT]), freed=st.integers(0, 50))
    def fail(self, thread: int, asked: int, freed: int) -> None:
        failure = self.rescue.failed(thread, asked, self.allocations, self.freed)
        last_asked, last_allocations, tries = self.tries.get(thread, (-1, -1, 0))
        again = (last_asked, last_allocations) == (asked, self.allocations)
        assert failure.tries == (tries + 1 if again else 1)
        assert failure.wish_nbytes >= asked << (failure.tries - 1)
        self.freed += freed
        retry = self.rescue.verdict(thread, failure, self.freed)
        assert retry == (freed > 0)
        self.tries[thread] = (asked, self.allocations, failure.tries) if retry else (-1, -1, 0)

    @rule()
    def succeed(self) -> None:
        self.allocations += 1

    @rule(nbytes=st.integers(1, 100))
    def wish(self, nbytes: int) -> None:
        self.token += 1
        begins = self.rescue.wish(nbytes, self.token)
        assert begins is not self.under_way
        self.under_way = True
        self.waiting[self.token] = nbytes

    @precondition(lambda self: self.under_way)
    @rule()
    def next_round(self) -> None:
        found = self.rescue.round()
        if not self.waiting:
            assert found is None
            self.under_way = False
            return
        assert found == (sum(self.waiting.values()), list(self.waiting))
        self.waiting.clear()

    @invariant()
    def nobody_waits_without_a_round(self) -> None:
        assert self.under_way or not self.waiting


TestThreads = Threads.TestCase
TestThreads.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


@given(
    asked=st.integers(0, 2 * LIMIT),
    movable=st.lists(st.integers(1, 500), max_size=40),
    free=st.integers(0, 500),
    usable=st.floats(0.2, 1),
)
def test_an_allocation_succeeds_if_moving_everything_would_do_and_ends_in_any_case(
    asked: int, movable: list[int], free: int, usable: float
) -> None:
    """Of what is freed only the part ``usable`` lies in one piece: the rest is fragmentation."""
    rescue: Rescue[int] = Rescue(LIMIT)
    left, freed = list(movable), 0
    total = free + sum(movable)
    calls = 0
    while free + int(freed * usable) < asked:
        calls += 1
        assert calls <= TRIES_MAX + 1
        failure = rescue.failed(0, asked, 0, freed)
        if rescue.hopeless(failure, total):
            break
        goal = freed + failure.wish_nbytes
        while left and freed < goal:
            freed += left.pop()
        if not rescue.verdict(0, failure, freed):
            break
    else:
        return
    if asked <= total:
        assert not left, "given up with something left"


def test_small_allocations_ask_for_a_step_and_repeated_ones_for_twice_as_much() -> None:
    rescue: Rescue[int] = Rescue(LIMIT)
    wishes = []
    for _ in range(4):
        failure = rescue.failed(1, 8, 5, 0)
        wishes.append(failure.wish_nbytes)
        assert rescue.verdict(1, failure, 1)
    assert wishes == [100, 200, 400, 800]
    # Something was allocated since: it is another one.
    assert rescue.failed(1, 8, 6, 0).wish_nbytes == 100
    # And another thread has nothing to do with it.
    assert rescue.failed(2, 8, 6, 0).wish_nbytes == 100


def test_what_no_device_could_hold_is_hopeless() -> None:
    rescue: Rescue[int] = Rescue(LIMIT)
    assert rescue.hopeless(rescue.failed(1, 101, 0, 0), 100)
    assert not rescue.hopeless(rescue.failed(1, 100, 0, 0), 100)


def test_threads_that_come_and_go_do_not_fill_the_books() -> None:
    rescue: Rescue[int] = Rescue(LIMIT)
    for thread in range(2000):
        assert rescue.verdict(thread, rescue.failed(thread, 8, 0, 0), 1)
    assert len(rescue._last) <= 256


def test_the_story_says_who_asked_for_what_and_where_it_is() -> None:
    failure = Rescue[int](LIMIT).failed(1, 2**30, 0, 0)
    text = story("task 'y'", failure, Figures(None, 2**20, 2**32), held_nbytes=0, limit_nbytes=None)
    for part in ("task 'y'", "1.00 GiB", "4.00 GiB", "1.00 MiB are free", "1 try"):
        assert part in text
