"""The board: reports of workers become rates, histories and sums."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from distributed.protocol.core import dumps, loads

from dask_gpurt.observe.board import LENGTH, Board, ClusterReport, WorkerState
from dask_gpurt.observe.reports import RUNS_MAX, RunReport, TierReport, WorkerReport, columns
from dask_gpurt.observe.worker import METRIC, WorkerObserver
from dask_gpurt.plugins.worker import WorkerRuntime

GB = 10**9


def worker(
    name: str,
    at_s: float,
    *,
    host: int = 0,
    limit: int | None = 8 * GB,
    written: int = 0,
    loop_s: float = 0.02,
    runs: tuple[RunReport, ...] = (),
    **sent: int,
) -> WorkerState:
    report = WorkerReport(
        tiers={"host": TierReport(host, 0, limit), "disk": TierReport(written, 0, None)},
        moves={("host", "disk"): written},
        sent=sent,
        runs=runs,
    )
    return WorkerState(f"tcp://127.0.0.1:{name}", name, at_s, loop_s, report)


def run(phase: str = "transfer", *, number: int = 1, stuck: bool = False, unanswered_s: float = 0.0) -> RunReport:
    return RunReport("abc", number, phase, stuck, 4, 1, 2, 100, 50, 70, 1, unanswered_s, 3)


def test_a_report_survives_the_way_to_the_scheduler() -> None:
    runs = tuple(run(number=number) for number in range(RUNS_MAX + 3))
    report = WorkerReport({"host": TierReport(1, 2, None)}, {("host", "disk"): 3}, {"ucx": 4}, 5, 0.5, 20, runs)
    there = WorkerReport.from_message(loads(dumps({"metrics": report.to_message()}))["metrics"])
    assert there == WorkerReport(**{**vars(report), "runs": runs[-RUNS_MAX:]})


def test_a_run_tells_what_it_waits_for() -> None:
    state = dict.fromkeys(("inputs", "outputs", "own_outputs", "sent_nbytes", "outbox_nbytes", "received_nbytes"), 1)
    waits = [{"peer": "a", "nbytes": 1, "since_s": 2.0}, {"peer": "b", "nbytes": 1, "since_s": 0.5}]
    told = RunReport.of(
        {**state, "id": "abc", "run_id": 7, "phase": "unpack", "stuck": False, "credits_wanted": 3, "unanswered": waits}
    )
    assert (told.unanswered, told.unanswered_s, told.credits_wanted) == (2, 2.0, 3)


def test_a_tier_says_in_a_table_what_it_holds_and_may_hold() -> None:
    assert str(TierReport(2**30, 2**30, 2**32)) == "2.00 GiB of 4.00 GiB"
    assert str(TierReport(0, 0, None)) == "0 B"
    assert columns(["host"]) == {"host": "gpurt host"}


def test_counts_become_rates_between_two_heartbeats() -> None:
    board = Board()
    board.observe(0, ClusterReport([worker("a", 0, written=GB, ucx=0)]))
    assert not board.rates()["host>disk"]
    board.observe(1, ClusterReport([worker("a", 0.5, written=2 * GB, ucx=500)]))
    assert board.rates()["host>disk"] == 2 * GB
    assert board.rates()["ucx"] == 1000
    assert board.counts()["host>disk"] == 2 * GB
    # The same heartbeat again says nothing new.
    board.observe(2, ClusterReport([worker("a", 0.5, written=2 * GB, ucx=500)]))
    assert board.rates()["host>disk"] == 2 * GB
    board.observe(3, ClusterReport([worker("a", 2.5, written=2 * GB, ucx=500)]))
    assert not board.rates()["host>disk"]


def test_a_worker_that_begins_anew_has_no_negative_rate() -> None:
    board = Board()
    board.observe(0, ClusterReport([worker("a", 0, written=GB)]))
    board.observe(1, ClusterReport([worker("a", 1, written=GB // 2)]))
    assert board.rates()["host>disk"] == 0


def test_what_is_used_is_kept_over_time_by_worker_and_in_total() -> None:
    board = Board()
    board.observe(0, ClusterReport([worker("a", 0, host=GB)]))
    board.observe(1, ClusterReport([worker("a", 1, host=2 * GB), worker("b", 1, host=GB)]))
    assert board.tiers == ["host", "disk"]
    assert board.names("host") == ["a", "b"]
    rows = board.by_worker("host")
    assert rows.shape == (2, LENGTH)
    assert rows[:, -1].tolist() == [2 * GB, GB]
    assert rows[0, -2] == GB
    assert np.isnan(rows[1, -2])
    assert board.total("host")[-2:].tolist() == [GB, 3 * GB]
    assert np.isnan(board.total("host")[-3])
    assert board.limit("host")[-2:].tolist() == [8 * GB, 16 * GB]
    assert board.worker_limit("host") == 8 * GB
    assert np.isnan(board.limit("disk")[-1])
    assert board.worker_limit("disk") is None


def test_a_limit_that_some_workers_do_not_have_is_none_of_the_cluster() -> None:
    board = Board()
    board.observe(0, ClusterReport([worker("a", 0), worker("b", 0, limit=None)]))
    assert np.isnan(board.limit("host")[-1])


def test_a_worker_that_left_is_forgotten() -> None:
    board = Board()
    board.observe(0, ClusterReport([worker("a", 0, host=GB), worker("b", 0, host=GB)]))
    board.observe(1, ClusterReport([worker("b", 1, host=GB)]))
    assert board.names("host") == ["b"]
    assert board.total("host")[-2:].tolist() == [GB, GB]


def test_a_worker_without_a_report_is_there_and_says_nothing() -> None:
    board = Board()
    board.observe(0, ClusterReport([WorkerState("tcp://x", "x", 0, 0.5), worker("a", 0)]))
    assert board.names("host") == ["a"]
    slowest = board.slowest()
    assert slowest is not None
    assert slowest.name == "x"


def test_nothing_is_kept_while_nobody_looks() -> None:
    board = Board()
    assert board.due(0)
    board.observe(0, ClusterReport([worker("a", 0, host=GB)]))
    assert not board.due(0.5)
    assert board.due(1)
    board.observe(100, ClusterReport([worker("a", 100, host=GB)]))
    assert np.isnan(board.by_worker("host")[0, -2])


def test_workers_are_in_the_order_in_which_people_count() -> None:
    board = Board()
    board.observe(0, ClusterReport([worker(name, 0) for name in ("w10", "w9", "2", "10", "a")]))
    assert board.names("host") == ["2", "10", "a", "w9", "w10"]


def test_the_busiest_workers_come_first_and_idle_ones_not_at_all() -> None:
    board = Board()
    for at_s in (0, 1):
        moved = {"a": 1, "b": 3, "c": 0}
        board.observe(
            at_s,
            ClusterReport([worker(n, at_s, written=count * at_s, comm=count * at_s) for n, count in moved.items()]),
        )
    assert board.busiest(5) == [
        ("b", {"down": 3.0, "up": 0.0, "sent": 3.0, "received": 0.0}),
        ("a", {"down": 1.0, "up": 0.0, "sent": 1.0, "received": 0.0}),
    ]
    assert len(board.busiest(1)) == 1


def test_a_run_is_summed_over_its_workers_and_a_stuck_one_comes_first() -> None:
    board = Board()
    a = worker("a", 0, runs=(run(), run(number=2)))
    b = worker("b", 0, runs=(run("unpack", stuck=True, unanswered_s=2.5), run(number=2)))
    board.observe(0, ClusterReport([a, b]))
    first, second = board.runs()
    assert (first.run_id, first.stuck, second.run_id) == (1, ["b"], 2)
    assert first.phases == {"transfer": 1, "unpack": 1}
    assert (first.inputs, first.outputs, first.own_outputs, first.sent_nbytes) == (8, 2, 4, 200)
    assert (first.unanswered, first.unanswered_s, first.credits_wanted) == (2, 2.5, 6)


@pytest.mark.parametrize("loops", [[], [0.1], [0.1, 0.2, 0.6]])
def test_event_loops_are_known_by_the_median_and_the_worst(loops: list[float]) -> None:
    board = Board()
    workers = [worker(str(i), 0, loop_s=loop_s) for i, loop_s in enumerate(loops)]
    board.observe(0, ClusterReport(workers, loop_s=0.05))
    assert board.loops_s["scheduler"][-1] == 0.05
    expected = [np.median(loops), max(loops)] if loops else [np.nan, np.nan]
    assert np.array_equal([board.loops_s["median"][-1], board.loops_s["worst"][-1]], expected, equal_nan=True)


def test_a_heartbeat_that_walks_through_the_metrics_of_a_worker_is_not_disturbed() -> None:
    class Server:
        metrics: ClassVar[dict[str, Any]] = {"theirs": len}
        http_server = None
        handlers: ClassVar[dict[str, Any]] = {}

    server: Any = Server()
    before = server.metrics
    walk = iter(before.items())
    observer = WorkerObserver(server, WorkerRuntime())
    observer.start()
    assert server.metrics.keys() == {"theirs", METRIC}
    assert [name for name, _ in walk] == ["theirs"]
    walk = iter(server.metrics.items())
    observer.stop()
    assert [name for name, _ in walk] == ["theirs", METRIC]
    assert server.metrics == before
