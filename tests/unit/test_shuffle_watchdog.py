"""The watchdog: which runs are stuck, by a clock that the tests turn."""

from __future__ import annotations

from typing import Any

import pytest

from dask_gpurt.shuffle.watchdog import INTERVAL_S, PROGRESS, WAITING, Watchdog, describe, interval_s

PATIENCE_S = 60.0
STATE: dict[str, Any] = {
    "phase": "transfer",
    "closed": False,
    "transferred": False,
    "inputs": 3,
    "outputs": 0,
    "own_outputs": 4,
    "posted_nbytes": 100,
    "sent_nbytes": 60,
    "outbox_nbytes": 40,
    "received_nbytes": 7,
    "parcels": 2,
    "attended": 0,
    "credits_granted": 5,
    "credits_nbytes": 11,
    "credits_wanted": 1,
    "staged_nbytes": 12,
    "put_nbytes": 13,
    "taken_nbytes": 14,
    "unanswered": [{"peer": "tcp://1", "nbytes": 40, "since_s": 61.25}],
    "tasks": [],
}
IDLE = {**STATE, "outbox_nbytes": 0, "unanswered": []}


class Watch:
    """Looks at one run every :data:`INTERVAL_S` seconds."""

    def __init__(self) -> None:
        self.watchdog = Watchdog(PATIENCE_S)
        self.now_s = 1000.0

    def look(self, state: dict[str, Any] | None, looks: int = 1, *, every_s: float = INTERVAL_S) -> list[str]:
        said = []
        for _ in range(looks):
            verdict = self.watchdog.look({} if state is None else {"run": state}, self.now_s)
            said += ["stuck" for _ in verdict.stuck] + ["going on" for _ in verdict.going_on]
            self.now_s += every_s
        return said


def test_a_run_that_stands_still_is_reported_once_and_when_it_goes_on() -> None:
    watch = Watch()
    assert watch.look(STATE, 12) == []  # 55 s
    assert watch.look(STATE) == ["stuck"]
    assert watch.look(STATE, 100) == []
    assert watch.look({**STATE, "sent_nbytes": 61}) == ["going on"]
    assert watch.look({**STATE, "sent_nbytes": 61}, 11) == []
    assert watch.look({**STATE, "sent_nbytes": 61}) == ["stuck"]


@pytest.mark.parametrize("key", PROGRESS)
def test_anything_that_is_done_is_progress(key: str) -> None:
    watch = Watch()
    assert watch.look(STATE, 12) == []
    assert watch.look({**STATE, key: 99}, 12) == []
    assert watch.look({**STATE, key: 99}) == ["stuck"]


@pytest.mark.parametrize("key", WAITING)
def test_a_run_is_stuck_only_while_it_waits_for_something(key: str) -> None:
    watch = Watch()
    assert watch.look(IDLE, 100) == []
    waiting = {**IDLE, key: [{}] if key in ("tasks", "unanswered") else 1}
    assert watch.look(waiting, 12) == [], "what counts begins with the waiting"
    assert watch.look(waiting) == ["stuck"]
    assert watch.look(IDLE) == ["going on"]


def test_a_stuck_run_that_ends_is_told() -> None:
    watch = Watch()
    assert watch.look(STATE, 13) == ["stuck"]
    assert watch.look(None, 3) == ["going on"]
    assert watch.look(STATE, 12) == []
    assert watch.look(None) == []


def test_time_in_which_nobody_looked_does_not_count() -> None:
    watch = Watch()
    assert watch.look(STATE, every_s=8 * 3600) == []
    assert watch.look(STATE, 10) == []
    assert watch.look(STATE) == ["stuck"]


def test_runs_are_watched_apart() -> None:
    watchdog = Watchdog(PATIENCE_S)
    for look in range(14):
        verdict = watchdog.look({"a": STATE, "b": {**STATE, "sent_nbytes": look}}, INTERVAL_S * look)
        assert dict(verdict.stuck) == ({"a": 60.0} if look == 12 else {})
    assert repr(watchdog) == "<Watchdog 2 watched, 1 stuck>"


def test_looks_are_close_enough_for_little_patience() -> None:
    assert interval_s(60) == INTERVAL_S
    assert interval_s(0.4) == pytest.approx(0.1)


def test_the_report_names_everything() -> None:
    task = {"what": "output", "partition": "(1, 2)", "since_s": 62.0}
    text = describe({**STATE, "tasks": [task]}, {"status": "paused", "store": "<ShardStore>"})
    for said in (
        "phase: transfer",
        "60 bytes of 100 posted",
        "outbox: 40 bytes",
        "7 bytes in 2 parcels",
        "5 granted (11 bytes not used yet), 1 wanted",
        "waiting for tcp://1 since 61.2 s (40 bytes)",
        "a task is in output (1, 2) since 62.0 s",
        "status paused, store <ShardStore>",
    ):
        assert said in text
