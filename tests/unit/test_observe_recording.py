"""A recording: bounded however long it lasts, exact at both ends, and whole when workers come and go."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from distributed.protocol.core import dumps, loads

from dask_gpurt.observe import document
from dask_gpurt.observe.board import ClusterReport, WorkerState
from dask_gpurt.observe.journal import Journal, RunPart, join
from dask_gpurt.observe.matrix import Matrix
from dask_gpurt.observe.recording import LENGTH, Recording
from dask_gpurt.observe.reports import RunReport, TierReport, WorkerReport
from dask_gpurt.observe.shuffles import SHOWN_MAX, Shuffles
from dask_gpurt.observe.worker import PEERS_MAX, Outgoing

EVIL = "<img src=x onerror=alert(1)>"


def report(used: int = 0, ucx: int = 0, waited_s: float = 0.0) -> WorkerReport:
    tiers = {"host": TierReport(used, 0, 1000), "disk": TierReport(0, 0, None)}
    return WorkerReport(tiers=tiers, moves={("host", "disk"): 2 * ucx}, sent={"ucx": ucx}, credit_wait_s=waited_s)


def cluster(reasons: dict[str, int] | None = None, loop_s: float = 0.02, /, **workers: WorkerReport) -> ClusterReport:
    states = [WorkerState(f"tcp://{name}", name, 0.0, loop_s, told) for name, told in workers.items()]
    return ClusterReport(states, 0.02, reasons)


def part(number: int = 1, name: str = "abc", **times: float | None) -> RunPart:
    figures = RunReport(name, number, "closed", False, 4, 2, 2, 100, 0, 70, 0, 0.0, 0)
    spent = {"begun_s": 1.0, "transferred_s": 2.0, "ended_s": 3.0, **times}
    return RunPart(figures, sent={"ucx": 90, "local": 5}, written_nbytes=7, credit_wait_s=0.5, **spent)  # type: ignore[arg-type]


def test_however_long_it_lasts_it_takes_no_more_room_and_loses_nothing() -> None:
    recording = Recording(0, cluster(a=report()), {})
    now_s, taken, moved = 0.0, 0, 0
    while taken < 5 * LENGTH:
        now_s += 0.5
        if recording.due(now_s):
            taken += 1
        moved += 3
        if recording.due(now_s):
            recording.observe(now_s, cluster(a=report(used=taken, ucx=moved)))
    assert recording.interval_s >= 8
    recording.finish(now_s, cluster(a=report(used=5, ucx=moved)), {}, [])
    times_s = recording.times_s
    assert LENGTH // 2 <= len(times_s) <= LENGTH
    assert times_s[-1] == now_s
    assert (np.diff(times_s) >= 0).all()
    assert not np.isnan(times_s).any()
    assert recording.total["ucx"] == moved
    passed_s = np.diff(times_s, prepend=times_s[0])
    # What was before the first sample that is left is in no rate.
    assert (recording.rates("ucx") * passed_s).sum() == pytest.approx(moved - recording.moved["ucx"][0])
    assert (np.diff(recording.moved["ucx"]) >= 0).all()
    board = recording.board
    assert board.ages_s is times_s
    assert len(board.total("host")) == len(board.limit("host")) == len(board.loops_s["worst"]) == len(times_s)
    assert recording.peaks["host"] == taken


def test_the_longest_turn_of_an_event_loop_is_not_thinned_out() -> None:
    recording = Recording(0, cluster(), {})
    for step in range(1, 3 * LENGTH):
        recording.observe(float(step), cluster(None, 4.0 if step == 18 else 0.02, a=report()))
    recording.finish(3.0 * LENGTH, cluster(a=report()), {}, [])
    assert np.nanmax(recording.board.loops_s["worst"]) == 4.0
    [stall] = recording.stalls
    assert (stall.worker, stall.at_s, stall.elapsed_s) == ("a", 18.0, 4.0)


def test_workers_that_come_and_go_count_and_what_was_before_does_not() -> None:
    recording = Recording(0, cluster(a=report(ucx=100), b=report(ucx=50)), {"tcp://a": Journal(report(ucx=110))})
    recording.observe(1, cluster(a=report(ucx=105), b=report(ucx=70)))
    recording.observe(2, cluster(a=report(ucx=115), c=report(ucx=7)))
    # Another process at the same address.
    recording.observe(3, cluster(b=report(ucx=4)))
    recording.finish(4, cluster(b=report(ucx=4)), {"tcp://b": Journal(report(ucx=6))}, [])
    assert recording.total["ucx"] == 5 + 20 + 7 + 6
    assert recording.total["host>disk"] == 2 * (5 + 20 + 7 + 6)
    # It had not moved anything when others were looked at first.
    assert recording.moved["ucx"].tolist() == [0, 20, 32, 36, 38]


def test_the_end_tells_what_is_new() -> None:
    before = {"tcp://a": Journal(sent={("tcp://b", "ucx"): 10, ("tcp://b", "inputs"): 1})}
    recording = Recording(100, cluster({"planned": 5, "idle": 1}, a=report(), b=report()), before)
    sent = {("tcp://b", "ucx"): 25, ("tcp://b", "inputs"): 1, ("tcp://gone", "comm"): 9}
    runs = (part(1, ended_s=99.0), part(2, begun_s=101.0, ended_s=103.0), part(3, ended_s=None))
    stuck = [
        (90.0, {"worker": "tcp://a", "run": "early", "still_s": 1.0}),
        (105.0, {"worker": "tcp://a", "run": "late", "still_s": 60.0}),
    ]
    recording.finish(
        110,
        cluster({"planned": 9, "idle": 1}, a=report(), b=report()),
        {"tcp://a": Journal(report(), sent, runs)},
        stuck,
    )
    matrix = recording.board.matrix
    assert matrix is not None
    assert (matrix.names, matrix.total.tolist()) == (["a", "b"], [[0, 15], [0, 0]])
    assert recording.board.cluster.reasons == {"planned": 4}
    assert [run.run_id for run in recording.runs] == [3, 2]
    assert [(stall.what, stall.worker, stall.at_s) for stall in recording.stalls] == [("late", "a", 5.0)]


@pytest.mark.parametrize("workers", [0, 2, 200])
def test_a_page_of_any_cluster(workers: int) -> None:
    def now(step: int) -> ClusterReport:
        return cluster({"planned": step}, 0.02, **{f"w{i}": report(step, 10 * step) for i in range(workers)})

    recording = Recording(0, now(0), {})
    for step in range(1, 4):
        recording.observe(step, now(step))
    journals = {f"tcp://w{i}": Journal(report(9, 90), {("tcp://w0", "ucx"): 90}, (part(),)) for i in range(workers)}
    recording.finish(9, now(9), journals, [])
    page = document.render(recording, "a title")
    assert page.count("data-root-id") >= (8 if workers else 7)
    assert ("None ran" in page) is not bool(workers)
    # 200 workers are no more to send than a picture of them.
    assert len(page) < 8_000_000


def test_names_in_a_page_are_text() -> None:
    recording = Recording(0, cluster({EVIL: 0}), {})
    named = WorkerState("tcp://a", EVIL, 0.0, 2.0, report())
    stuck = [(1.0, {"worker": "tcp://a", "run": EVIL, "still_s": 60.0})]
    recording.finish(2, ClusterReport([named], 0.02, {EVIL: 3}), {"tcp://a": Journal(runs=(part(name=EVIL),))}, stuck)
    page = document.render(recording, EVIL)
    assert EVIL not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert "&lt;img src=x" in page


def test_a_journal_survives_the_way_to_the_scheduler() -> None:
    journal = Journal(report(5, 6), {("tcp://a", "ucx"): 7}, (part(), part(2, ended_s=None, transferred_s=None)))
    assert Journal.from_message(loads(dumps(journal.to_message()))) == journal


def test_a_run_is_put_together_from_the_parts_of_its_workers() -> None:
    first = Journal(runs=(part(1), part(2, begun_s=5.0, transferred_s=None, ended_s=None)))
    second = Journal(runs=(part(1, begun_s=0.5, transferred_s=2.5, ended_s=4.0),))
    latest, run = join({"a": first, "b": second})
    assert (latest.run_id, latest.active, latest.transferred_s) == (2, True, None)
    assert (run.begun_s, run.transferred_s, run.ended_s, run.active) == (0.5, 2.5, 4.0, False)
    assert (run.inputs, run.outputs, run.own_outputs, run.sent) == (8, 4, 4, {"ucx": 180, "local": 10})
    assert (run.written_nbytes, run.credit_wait_s, run.phases) == (14, 1.0, {"closed": 2})


def test_runs_show_themselves_in_text_and_in_a_notebook() -> None:
    journal = Journal(runs=[part(number, EVIL) for number in range(SHOWN_MAX + 3)] + [part(99, ended_s=None)])
    shown = Shuffles(join({EVIL: journal}))
    assert "and 4 more" in str(shown)
    assert "goes on" in str(shown)
    text = shown._repr_html_()
    ET.fromstring(text)
    assert "<img" not in text
    assert "1 active, 53 ended" in text
    assert re.findall(r"(?<![-\w])color:", text) == []
    assert "no shuffle has run" in Shuffles(())._repr_html_()


def test_a_matrix_leaves_out_who_is_not_there_and_takes_a_fallen_count_for_a_new_one() -> None:
    names = {"tcp://10": "10", "tcp://9": "9"}
    rows: Any = {"tcp://10": {("tcp://9", "ucx"): 5, ("tcp://9", "other"): 3}, "tcp://gone": {("tcp://9", "ucx"): 1}}
    matrix = Matrix.of(names, rows, {"tcp://10": {("tcp://9", "ucx"): 50}})
    assert (matrix.names, matrix.total.tolist()) == (["9", "10"], [[0, 0], [5, 0]])
    assert Matrix().total.shape == (0, 0)


def test_what_peers_took_is_remembered_for_so_many_peers() -> None:
    outgoing = Outgoing()
    log = [{"who": f"tcp://{peer}", "total": 1} for peer in range(PEERS_MAX + 5)] + [{"who": None, "total": 9}]
    outgoing.update(log)
    assert len(outgoing.nbytes) == PEERS_MAX
    # Dask cuts its log off at the old end; what was counted already is known by its last entry.
    later = [*log[-3:], {"who": "tcp://100", "total": 5}]
    outgoing.update(later)
    outgoing.update(later)
    assert outgoing.nbytes["tcp://100"] == 6
