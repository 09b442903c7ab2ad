"""A short load with faults, and that it would object."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import KilledWorker

from benchmarks.load import __main__ as command
from benchmarks.load import desks
from benchmarks.load.__main__ import Report, load
from benchmarks.load.desks import Job, Outcome, run_job
from benchmarks.load.faults import Fault, damage
from benchmarks.soak.jobs import MismatchError
from benchmarks.soak.rounds import SMALL

#: Of which only the address is asked for.
WORKER: Any = SimpleNamespace(address="tcp://127.0.0.1:1")

FAULTS = [
    Fault("kill", 0.5, 0),
    Fault("damage", 0.1, 0),
    Fault("stop", 0.1, 1.0),
]


@pytest.mark.exhaustive
def test_random_jobs_while_faults_happen(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "plan", lambda seed: iter(FAULTS * 100))
    monkeypatch.setattr(command, "EPOCHS", 1)
    report = load(SMALL, minutes=0.2, seed=6, fault_every_s=1.0, clients=2)
    assert report.objections() == [], capsys.readouterr().out
    assert report.ledger.right > 0
    assert sum(report.written_nbytes.values()) > 0
    assert set(report.faults) == {fault.kind for fault in FAULTS}
    figures = report.epochs[-1]
    assert figures["all"]["files"] == 0, "the dead have left nothing"
    # Processes, by name: three workers that live.
    assert len(figures) == 3 + len({"scheduler", "all"})


@pytest.mark.parametrize(
    ("error", "verdict", "kind", "objected"),
    [
        (MismatchError("7 of 9 numbers"), "wrong", "", True),
        (KilledWorker("task", WORKER, 3), "error", "KilledWorker", False),
        (ValueError("what is this?"), "error", "ValueError", True),
    ],
)
def test_an_outcome_that_is_not_right(
    monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str, kind: str, objected: bool
) -> None:
    def fail(rng: Any, size: int) -> None:
        raise error

    for program in ("array_program", "frame_program"):
        monkeypatch.setattr(desks, program, fail)
    outcome = run_job(Job(1, 2, SMALL))
    assert (outcome.verdict, outcome.kind) == (verdict, kind)
    report = Report()
    report.ledger.others.append((2, outcome))
    assert bool(report.objections()) == objected
    assert report.count(verdict) == 1
    assert report.errors() == (Counter([kind]) if verdict == "error" else Counter())


def test_hangs_and_jobs_that_were_given_up_are_objected_to() -> None:
    report = Report()
    report.ledger.others.append((3, Outcome("hang", story="…")))
    report.ledger.given_up.append(4)
    assert len(report.objections()) == 2


@pytest.mark.parametrize(
    ("ends_s", "still_from_s", "why"),
    [
        (1000.0, 990.0, ""),
        (1000.0, 50.0, "nothing has happened for"),
        (float("inf"), float("inf"), "not done after"),
    ],
)
def test_a_job_hangs_that_does_not_go_on(ends_s: float, still_from_s: float, why: str) -> None:
    now_s = 0.0

    def poll(timeout_s: float) -> bool:
        nonlocal now_s
        now_s += timeout_s
        return now_s >= ends_s

    found = desks.hangs(poll, lambda: int(min(now_s, still_from_s)), lambda: now_s)
    assert found.startswith(why)
    assert bool(found) == bool(why)
    assert now_s <= min(ends_s, still_from_s + desks.STILL_LIMIT_S, desks.JOB_LIMIT_S) + 2 * desks.LOOK_S


def test_files_are_damaged_that_hold_data(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "data").write_bytes(data := os.urandom(10_000))
    assert damage(str(tmp_path)) == 1
    assert (tmp_path / "data").read_bytes() != data
    assert (tmp_path / "lock").stat().st_size == 0
