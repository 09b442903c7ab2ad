"""The pool of blocks: nothing is lent twice, everything returns, and what waits stays within its bound."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from dask_gpurt.memory.blocks import HUGE_PAGE_NBYTES, SLAB_NBYTES_MIN, BlockPool, size_class

LIMIT = 2**21
SIZES = st.one_of(
    st.integers(0, 3 * SLAB_NBYTES_MIN),
    st.sampled_from([SLAB_NBYTES_MIN - 1, SLAB_NBYTES_MIN, HUGE_PAGE_NBYTES - 1, HUGE_PAGE_NBYTES, 3 * 2**20]),
)


def span(view: memoryview) -> tuple[int, int]:
    begin: int = np.frombuffer(view, dtype="u1").__array_interface__["data"][0]
    return begin, begin + view.nbytes


class Borrower(RuleBasedStateMachine):
    """Writes its own number all over each lease, and finds it there until it gives it back."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(LIMIT)
        self.leases: dict[int, memoryview] = {}
        self.numbers = 0
        self.asked = 0

    @rule(nbytes=SIZES)
    def lease(self, nbytes: int) -> None:
        view = self.pool.lease(nbytes)
        assert view.nbytes == nbytes
        assert not view.readonly
        self.asked += nbytes >= SLAB_NBYTES_MIN
        if nbytes:
            self.numbers += 1
            np.frombuffer(view, dtype="u1")[:] = self.numbers % 256
            self.leases[self.numbers] = view

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        del self.leases[data.draw(st.sampled_from(sorted(self.leases)))]

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def keep_a_part(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
        view = self.leases[number]
        self.leases[number] = view[view.nbytes // 3 : view.nbytes // 3 + 1]

    @rule()
    def decay(self) -> None:
        self.pool.decay()

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        assert self.pool.idle_nbytes == 0

    @rule(nbytes=st.integers(0, LIMIT))
    def limit(self, nbytes: int) -> None:
        self.pool.set_idle_limit(nbytes)

    @invariant()
    def nothing_is_lent_twice(self) -> None:
        end = 0
        for begin, after in sorted(map(span, self.leases.values())):
            assert begin >= end
            end = after
        for number, view in self.leases.items():
            assert {view[0], view[view.nbytes // 2], view[-1]} == {number % 256}

    @invariant()
    def what_waits_is_bounded_and_counted(self) -> None:
        assert 0 <= self.pool.idle_nbytes <= self.pool.idle_limit_nbytes
        assert self.pool.hits + self.pool.misses == self.asked
        # The books, against what is there.
        assert self.pool._idle_nbytes == sum(size * len(slabs) for size, slabs in self.pool._idle.items())


TestBorrower = Borrower.TestCase
TestBorrower.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


#: Nothing is looked for after the first failure: others that a planted bug causes would be raised together with it.
FIRST = settings(max_examples=1000, derandomize=True, phases=[Phase.generate], report_multiple_bugs=False)


def test_a_planted_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def hasty(array: object, give_back: Callable[[object], None], slab: object) -> SimpleNamespace:
        give_back(slab)
        return SimpleNamespace()

    # A slab returns while it is still in use.
    monkeypatch.setattr("dask_gpurt.memory.blocks.weakref", SimpleNamespace(finalize=hasty))
    with pytest.raises(AssertionError, match=r"^assert \d+ >= \d+"):
        run_state_machine_as_test(Borrower, settings=FIRST)


def test_everything_returns() -> None:
    pool = BlockPool(2**30)
    sizes = [SLAB_NBYTES_MIN + 5000 * n for n in range(50)]
    leases = [pool.lease(nbytes) for nbytes in sizes]
    parts = [lease[7:9] for lease in leases[:10]]
    del leases
    assert pool.idle_nbytes == sum(map(size_class, sizes[10:])), "parts keep the whole"
    del parts
    assert pool.idle_nbytes == sum(map(size_class, sizes))
    again = [pool.lease(nbytes) for nbytes in sizes]
    assert (pool.hits, pool.idle_nbytes) == (50, 0), "no page is touched for the first time twice"
    del again


def test_threads_share_it() -> None:
    pool = BlockPool(LIMIT)
    together = threading.Barrier(4)

    def borrow(thread: int) -> None:
        rng = random.Random(thread)
        held: list[tuple[int, memoryview]] = []
        together.wait(10)
        for step in range(300):
            number = (thread * 64 + step % 64) % 256
            view = pool.lease(rng.choice([SLAB_NBYTES_MIN, 2 * SLAB_NBYTES_MIN, 5 * SLAB_NBYTES_MIN]))
            np.frombuffer(view, dtype="u1")[:] = number
            held.append((number, view))
            if len(held) > 3:
                expected, oldest = held.pop(rng.randrange(3))
                assert (np.frombuffer(oldest, dtype="u1") == expected).all(), "somebody else has written there"
                del oldest
            assert pool.idle_nbytes <= LIMIT
            if step % 50 == 0:
                pool.decay()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(borrow, range(4)))
    assert pool.hits > pool.misses
    assert pool.hits + pool.misses == 4 * 300
    assert pool.idle_nbytes <= LIMIT
