"""What a task just gave, or took, is not the first to be moved away; over the state machine of a real worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from distributed.worker_state_machine import ComputeTaskEvent, ExecuteSuccessEvent, WorkerState

from dask_gpurt.memory.horizon import IDLE, RECENT, Kind, Use
from dask_gpurt.memory.manager import RECENT_PER_THREAD, WorkerHorizon
from dask_gpurt.memory.policy import OPERATION_NBYTES, SMALL_NBYTES, Candidate, order


class Site:
    """A worker of one thread that runs one task after the other."""

    def __init__(self) -> None:
        self.state = WorkerState(nthreads=1, address="tcp://127.0.0.1:1")
        self.horizon: Any = WorkerHorizon(SimpleNamespace(state=self.state))

    def compute(self, key: str, *inputs: str) -> None:
        event = ComputeTaskEvent.dummy(
            key, who_has={name: [self.state.address] for name in inputs}, stimulus_id=f"compute-{key}"
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
