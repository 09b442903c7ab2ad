"""Where tasks with inputs go, what a plan may cost, and when leaving it pays."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from dask_gpurt.plugins import policy, stealing
from dask_gpurt.plugins.view import Backlog, Candidate, Tail


@dataclass(frozen=True)
class Input:
    nbytes: int
    who_has: frozenset[str] | None
    waiters: frozenset[int] = frozenset()

    def get_nbytes(self) -> int:
        return self.nbytes


def held(nbytes: int, *workers: str) -> Input:
    return Input(nbytes, frozenset(workers))


def test_holdings_are_summed_over_all_inputs() -> None:
    inputs = [held(1, "a"), held(2, "b"), held(3, "c"), held(4, "d"), *[held(2, "e")] * 4]
    assert policy.holdings(inputs, 4) == ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 8}, 18)


def test_a_broadcast_counts_only_for_workers_that_hold_something_else() -> None:
    everyone = [f"w{i}" for i in range(20)]
    assert policy.holdings([held(100, *everyone), held(1, "w3"), held(1, "x")], 4) == ({"w3": 101, "x": 1}, 102)


def test_of_an_input_that_is_everywhere_a_few_holders_are_looked_at() -> None:
    nbytes, total = policy.holdings([held(100, *[f"w{i}" for i in range(20)])], 4, many=8)
    assert len(nbytes) == 8
    assert set(nbytes.values()) == {total} == {100}


def test_an_input_without_holder_counts_for_nobody() -> None:
    assert policy.holdings([Input(5, None)], 4) == ({}, 5)


def test_an_input_that_many_wait_for_counts_by_the_share_of_one() -> None:
    table = Input(1000, frozenset({"a"}), frozenset(range(40)))
    part = Input(150, frozenset({"b"}), frozenset({1}))
    assert policy.holdings([table, part], nworkers=4) == ({"a": 100, "b": 150}, 250)
    # No more than one task for each worker: all of it has to be fetched for one.
    assert policy.holdings([table, part], nworkers=40) == ({"a": 1000, "b": 150}, 1150)


class Worker:
    def __init__(self, ntasks: int = 0) -> None:
        self.processing = range(ntasks)


def test_best_holders_run_and_are_few() -> None:
    a, b, c, d, e = (Worker() for _ in range(5))
    nbytes = {a: 1, b: 5, c: 3, d: 4, e: 2}
    assert policy.best_holders(nbytes, {a, b, c, e}, limit=3) == [b, c, e]
    assert policy.best_holders(nbytes, set()) == []


def test_of_holders_of_as_much_those_with_the_least_to_do_are_looked_at() -> None:
    busy, idle, more = Worker(3), Worker(0), Worker(9)
    assert policy.best_holders({busy: 4, idle: 4, more: 5}, {busy, idle, more}, limit=2) == [more, idle]
    # Where much has to be fetched anyway, a little more is as much.
    assert policy.best_holders({busy: 40, idle: 41, more: 42}, {busy, idle, more}, limit=2, total_nbytes=80) == [
        idle,
        busy,
    ]
    assert policy.best_holders({busy: 40, idle: 30, more: 42}, {busy, idle, more}, limit=2, total_nbytes=80) == [
        busy,
        more,
    ]


def test_a_worker_short_of_memory_is_passed_over() -> None:
    full, roomy, unlimited = (SimpleNamespace(nbytes=75, memory_limit=limit) for limit in (100, 200, 0))
    assert policy.with_room([full, roomy, unlimited]) == [roomy, unlimited]
    assert policy.with_room([full, full]) == [full, full]


def test_a_task_stays_with_its_bytes_until_waiting_costs_twice_the_move() -> None:
    def chosen(wait_s: float) -> object:
        return policy.choose([Candidate("here", 0, wait_s, 0.0), Candidate("there", 1_000, 0.0, 1.0)]).worker

    move_s = 1.0 + policy.MOVE_LATENCY_S
    assert chosen(1.9 * move_s) == "here"
    assert chosen(2.1 * move_s) == "there"


def test_where_all_fetch_about_as_much_the_shorter_queue_wins() -> None:
    # As in a shuffle: each holds a part, and nobody the whole.
    chosen = policy.choose([Candidate("a", 100, 0.002, 0.1), Candidate("b", 101, 0.0, 0.101)])
    assert chosen == ("a", "most-bytes")
    chosen = policy.choose([Candidate("a", 100, 0.01, 0.1), Candidate("b", 101, 0.0, 0.101)])
    assert chosen == ("b", "earlier-elsewhere")


def test_between_equals_the_shorter_queue_wins() -> None:
    chosen = policy.choose([Candidate("a", 7, 2.0, 7.0), Candidate("b", 7, 1.0, 7.0)])
    assert chosen == ("b", "most-bytes")


def test_a_plan_may_miss_twice_what_it_saves() -> None:
    assert policy.accepts(200, consumers=1, best_missing_nbytes=0, output_nbytes=100)
    assert not policy.accepts(201, consumers=1, best_missing_nbytes=0, output_nbytes=100)
    assert policy.accepts(201, consumers=2, best_missing_nbytes=0, output_nbytes=100)
    assert policy.accepts(150, consumers=1, best_missing_nbytes=80, output_nbytes=0)


def test_tasks_of_unknown_duration_are_not_taken() -> None:
    assert stealing.relief(Backlog(100, 1, 0.0), Backlog(0, 1, 0.0), [Tail(1, 0)] * 100, 1e9) == 0


def test_relief_halves_a_backlog_between_equals() -> None:
    assert stealing.relief(Backlog(40, 1, 1.0), Backlog(0, 1, 1.0), [Tail(4, 0)] * 10, 1e9) == 5
    assert stealing.relief(Backlog(40, 1, 1.0), Backlog(0, 3, 1.0), [Tail(4, 0)] * 10, 1e9) == 8


def test_relief_is_not_given_where_moving_costs_more_than_waiting() -> None:
    assert stealing.relief(Backlog(4, 1, 1.0), Backlog(0, 1, 1.0), [Tail(1, 10_000)] * 4, bandwidth=1e3) == 0


def test_the_last_long_task_goes_to_the_idle_worker() -> None:
    assert stealing.relief(Backlog(1, 1, 60.0), Backlog(0, 1, 60.0), [Tail(1, 1_000)], bandwidth=1e6) == 1


def test_crossings_are_shared_out_as_soon_as_messages_and_moves_pay() -> None:
    def taken(ntasks: int, duration_s: float, *tails: Tail, nthreads: int = 1) -> list[int]:
        return stealing.shared_out(Backlog(ntasks, 1, duration_s), Backlog(0, nthreads, duration_s), tails, 1e9)

    # 20 ms of work: until waits differ by less than the messages take. The tenth of a second of other steals it is not worth.
    assert taken(20, 0.001, *[Tail(2, 0)] * 10) == [0, 1, 2, 3]
    assert not stealing.pays(0.02, 0, 1e9)
    # More threads take more; a group that is more than the half is left for another time.
    assert taken(20, 0.001, *[Tail(2, 0)] * 10, nthreads=3) == [0, 1, 2, 3, 4, 5]
    assert taken(20, 0.001, Tail(11, 0), Tail(3, 0)) == [1]
    # Messages take as long, moves take longer, and nobody knows how long the tasks take.
    assert taken(5, 0.001, Tail(1, 0)) == []
    assert taken(20, 0.001, Tail(2, 10_000_000)) == []
    assert taken(20, 0.0, Tail(2, 0)) == []


def test_what_a_part_is_taken_of_is_not_fetched_for_it() -> None:
    # Three tasks here would split a block that takes a second to come; where it lies they would wait for 20 ms.
    assert not policy.starts_sooner(1.0, 3, 0.02)
    # With a hundred tasks here it pays; and with a link that is quicker.
    assert policy.starts_sooner(1.0, 100, 0.02)
    assert policy.starts_sooner(0.001, 3, 0.02)
    # Work that waits long where the inputs are goes elsewhere.
    assert policy.starts_sooner(1.0, 3, 5.0)
