"""What a task just gave, or took, is not the first to be moved away; over the state machine of a real worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

from dask.typing import Key
from distributed.worker_state_machine import (
    ComputeTaskEvent,
    ExecuteSuccessEvent,
    FreeKeysEvent,
    PauseEvent,
    WorkerState,
)

from dask_gpurt.memory.horizon import DYING, FAR, IDLE, LINK, OVERDUE, RECENT, SERVED, Kind, Use
from dask_gpurt.memory.manager import RECENT_PER_THREAD, WorkerHorizon
from dask_gpurt.memory.policy import OPERATION_NBYTES, SMALL_NBYTES, Candidate, order


class Site:
    """A worker of one thread that runs one task after the other."""

    def __init__(self) -> None:
        self.state = WorkerState(nthreads=1, address="tcp://127.0.0.1:1")
        self.horizon: Any = WorkerHorizon(SimpleNamespace(state=self.state, address=self.state.address))

    def compute(self, key: str, *inputs: str, absent: Sequence[str] = (), run_id: int = 0, rank: int = 0) -> None:
        who_has: dict[Key, Collection[str]] = {name: [self.state.address] for name in inputs}
        who_has |= {name: ["tcp://127.0.0.1:2"] for name in absent}
        event = ComputeTaskEvent.dummy(
            key, who_has=who_has, run_id=run_id, priority=(rank,), stimulus_id=f"compute-{key}"
        )
        self.state.handle_stimulus(event)

    def end(self, key: str) -> None:
        self.horizon.note(key)
        self.state.handle_stimulus(
            ExecuteSuccessEvent.dummy(key, key, run_id=self.state.tasks[key].run_id, stimulus_id=f"end-{key}")
        )

    def use(self, key: str) -> Use:
        (use,) = self.horizon.uses([key])
        assert isinstance(use, Use)
        return use


def test_a_new_result_is_kept_until_the_scheduler_can_have_said_who_needs_it() -> None:
    site = Site()
    site.compute("first")
    site.end("first")
    assert site.use("first") == RECENT
    for number in range(RECENT_PER_THREAD):
        site.compute(f"other-{number}")
        site.end(f"other-{number}")
    assert site.use("first") == IDLE, "nobody asked for it"


def test_what_was_just_used_up_is_not_written_while_its_deletion_is_on_its_way() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.compute("output", "input")
    assert site.use("input").kind is Kind.RUNNING
    site.end("output")
    assert site.use("input") == site.use("output") == RECENT


def test_a_known_use_counts_more() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.compute("runs")
    site.compute("next", "input")
    assert site.use("input").kind is Kind.NEXT
    assert site.use("input").distance == 1.0


def test_what_the_last_user_has_used_is_dying_before_its_deletion_is_ordered() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.compute("user", "input")
    site.horizon.tell([("input", None, False, [("user", site.state.address)], 0)])
    assert site.use("input").kind is Kind.RUNNING
    site.horizon.note("user")
    assert site.use("input") == DYING, "its result is being put"
    site.end("user")
    assert site.use("input") == DYING
    # Another graph comes: first its task, then the word.
    site.compute("another", "input")
    assert site.use("input").kind is Kind.RUNNING
    site.horizon.tell([("input", None, True, None, 0)])
    site.end("another")
    assert site.use("input") == IDLE


def test_what_goes_to_a_peer_has_time_once_that_was_served() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.horizon.tell([("input", None, False, [("user", "tcp://127.0.0.1:2")], 0)])
    assert site.use("input") == RECENT
    site.horizon.serve(["input"], "tcp://127.0.0.1:3")
    assert site.use("input") == RECENT
    site.horizon.serve(["input"], "tcp://127.0.0.1:2")
    assert site.use("input") == SERVED
    # The task is stolen while the input is on its way: the peer throws that away, and the thief asks here.
    site.horizon.tell([("input", None, False, [("user", "tcp://127.0.0.1:4")], 0)])
    assert site.use("input") == RECENT
    # It is deleted, and made again for somebody else.
    site.horizon.drop("input")
    site.horizon.note("input")
    assert site.use("input") == RECENT


def test_what_was_used_here_and_served_is_not_dying() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.compute("user", "input")
    site.horizon.tell([("input", None, False, [("user", site.state.address), ("other", "tcp://127.0.0.1:2")], 0)])
    site.end("user")
    assert site.use("input") == RECENT
    site.horizon.serve(["input"], "tcp://127.0.0.1:2")
    assert site.use("input") == SERVED


def test_a_user_that_was_taken_away_has_used_nothing() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.compute("other")
    site.compute("user", "input")
    site.horizon.tell([("input", None, False, [("user", site.state.address)], 0)])
    site.state.handle_stimulus(FreeKeysEvent(keys=["user"], stimulus_id="stolen"))
    assert site.use("input") == RECENT


def test_a_task_that_is_given_again_needs_its_inputs_again() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    site.compute("user", "input", run_id=1)
    site.horizon.tell([("input", None, False, [("user", site.state.address)], 0)])
    site.end("user")
    assert site.use("input") == DYING
    # Its result is lost with something else that it was made of.
    site.state.handle_stimulus(FreeKeysEvent(keys=["user"], stimulus_id="lost"))
    assert site.use("input") == DYING
    site.compute("user", "input", absent=["other"], run_id=2)
    assert site.state.tasks["user"].state == "waiting"
    assert site.use("input").kind is Kind.NEXT
    site.compute("last")
    site.end("last")
    assert site.use("input").kind is Kind.NEXT


def test_what_the_next_task_reads_stays_where_a_thread_is_about_to_be_free() -> None:
    site = Site()
    site.compute("input")
    site.end("input")
    for rank, key in enumerate(["first", "second", "third"]):
        site.compute(key, "input", rank=rank)
    site.horizon.begin("first")
    assert site.horizon.starting() == set()
    # Its task returns; what it held is let go before the worker hears of it.
    site.horizon.leave("first")
    assert site.horizon.starting() == {"second"}
    assert site.use("input").kind is Kind.RUNNING
    site.end("first")
    assert site.horizon.starting() == set()
    # It fails to be run, and is given again: it is not over.
    site.horizon.leave("second")
    assert site.horizon.starting() == {"third"}
    site.horizon.begin("second")
    assert site.horizon.starting() == set()
    # A worker that is paused starts nothing.
    site.horizon.leave("second")
    site.state.handle_stimulus(PauseEvent(stimulus_id="pause"))
    assert site.horizon.starting() == set()


def test_what_came_while_the_scheduler_had_other_things_to_say_is_recent() -> None:
    site = Site()
    for number in range(2 * RECENT_PER_THREAD):
        site.compute(f"key-{number}")
        site.end(f"key-{number}")
    assert site.use("key-0") == IDLE
    site.horizon.tell([("key-1", None, True, None, 0)])
    assert site.use("key-0") == RECENT
    assert site.use("key-1") == IDLE


def test_who_is_overdue_is_not_taken_for_the_next_one() -> None:
    site = Site()
    for number in (0, 1, 2):
        site.state.handle_stimulus(
            ComputeTaskEvent.dummy(f"key-{number}", priority=(0, 1, 10 + number), stimulus_id=f"compute-{number}")
        )
    site.end("key-0")
    # What runs now has rank 11.
    site.horizon.tell([("key-0", (0, 1, 5), False, None, 0)])
    assert site.use("key-0").distance == OVERDUE
    site.horizon.tell([("key-0", (0, 1, 5), False, None, 6)])
    assert site.use("key-0").distance == 6 * LINK
    site.horizon.tell([("key-0", (0, 1, 14), False, None, 6)])
    assert site.use("key-0").distance == 3
    site.horizon.tell([("key-0", (0, 2, 0), False, None, 0)])
    assert site.use("key-0").distance == FAR


def candidate(name: str, nbytes: int, distance: float | None = None) -> Candidate:
    use = IDLE if distance is None else Use(Kind.NEXT, distance)
    return Candidate((name,), nbytes, nbytes, use, 0)


def names(*candidates: Candidate) -> list[Any]:
    return [found.names[0] for found in order(candidates)]


def test_many_small_blocks_are_left_for_fewer_large_ones() -> None:
    small, large = OPERATION_NBYTES // 8, OPERATION_NBYTES * 8
    assert names(candidate("small", small, 20.0), candidate("large", large, 10.0)) == ["large", "small"]
    assert names(candidate("small", small, 200.0), candidate("large", large, 10.0)) == ["small", "large"]


def test_less_than_a_page_goes_last() -> None:
    crumb = candidate("crumb", SMALL_NBYTES - 1)
    assert names(crumb, candidate("soon", SMALL_NBYTES, 1.0)) == ["soon", "crumb"]
    # For free, it may go first.
    assert names(candidate("soon", SMALL_NBYTES, 1.0), crumb._replace(dirty_nbytes=0)) == ["crumb", "soon"]
