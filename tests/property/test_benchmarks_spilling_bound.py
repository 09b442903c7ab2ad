"""The bound is one: no store moves less, on any trace."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.spilling.bound import least_nbytes
from benchmarks.spilling.replay import replay_lru, replay_oracle, replay_ours
from benchmarks.spilling.trace import Delete, End, Event, Graph, Known, Put, Serve, Start, Trace

KB = 1024
INPUTS_MAX = 2
SIZE_MAX = 8


@st.composite
def traces(draw: st.DrawFn, *, views: bool) -> Trace:
    """Tasks of a worker of one thread: values come, are read, are served, and go."""
    events: list[Event] = []
    alive: dict[str, tuple[str, int]] = {}
    number = 0
    for _ in range(draw(st.integers(1, 25))):
        what = draw(st.sampled_from(("put", "put", "read", "read", "read", "serve", "delete")))
        if what != "put" and not alive:
            continue
        number += 1
        if what == "put":
            key = f"k{number}"
            size = draw(st.integers(1, SIZE_MAX)) * 64 * KB
            buffer, whole = key, size
            if views and alive and draw(st.booleans()):
                buffer, whole = alive[draw(st.sampled_from(sorted(alive)))]
                size = draw(st.integers(1, whole // KB)) * KB
            if draw(st.booleans()):
                events.append(Graph((), (key,)))
            alive[key] = buffer, whole
            events.append(Put(key, size, buffer, whole))
        elif what == "read":
            inputs = draw(st.lists(st.sampled_from(sorted(alive)), min_size=1, max_size=INPUTS_MAX, unique=True))
            events += [Start(f"t{number}", tuple(inputs)), End(f"t{number}")]
        elif what == "serve":
            events.append(Serve((draw(st.sampled_from(sorted(alive))),)))
        else:
            key = draw(st.sampled_from(sorted(alive)))
            del alive[key]
            events += [Known(key, "released"), Delete(key)]
    return Trace(tuple(events))


#: At least what a task takes at a time: below that stock holds what it has evicted, and has more than its capacity.
CAPACITIES = st.integers(INPUTS_MAX * SIZE_MAX * 64 * KB, 3 * SIZE_MAX * 64 * KB)


def no_less(moved_nbytes: int, least: float) -> bool:
    # Solvers answer to about nine digits.
    return moved_nbytes >= least * (1 - 1e-6) - 1


@given(traces(views=False), CAPACITIES)
@settings(max_examples=150, deadline=None)
def test_no_store_moves_less(trace: Trace, capacity_nbytes: int) -> None:
    least = least_nbytes(trace, capacity_nbytes)
    assert no_less(replay_lru(trace, capacity_nbytes).nbytes, least)
    for replay in (replay_ours, replay_oracle):
        moved = replay(trace, capacity_nbytes)
        assert moved.beyond_nbytes == 0
        assert no_less(moved.nbytes, least)


@given(traces(views=True), CAPACITIES)
@settings(max_examples=150, deadline=None)
def test_no_store_moves_less_where_values_share_buffers(trace: Trace, capacity_nbytes: int) -> None:
    for replay in (replay_ours, replay_oracle):
        moved = replay(trace, capacity_nbytes)
        # A buffer of which a task holds a part cannot go; so much more is granted to the bound, too.
        assert no_less(moved.nbytes, least_nbytes(trace, capacity_nbytes + moved.beyond_nbytes))


@given(traces(views=True), CAPACITIES)
@settings(max_examples=50, deadline=None)
def test_more_room_never_costs(trace: Trace, capacity_nbytes: int) -> None:
    assert no_less(int(least_nbytes(trace, capacity_nbytes)) + 1, least_nbytes(trace, 2 * capacity_nbytes))
    assert least_nbytes(trace, max(trace.peak_nbytes, 2 * trace.peak_nbytes)) == 0
