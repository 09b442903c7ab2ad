"""Dask's own processes with dask-gpurt in a simulated world: what goes wrong there is bad for nobody, and what is planted is found.

``make sim SEEDS=N`` runs more of them; see docs/reliability.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

#: Bugs that are planted (:mod:`benchmarks.world.planted`), which cannot be imported here: it is for a process of its own.
PLANTED = {
    "lost-message": "is wrong",
    "taken-twice": "is wrong",
    "unchecked-file": "is wrong|Error",
    "kept-window": "ByteWindow",
    "kept-shards": "left behind",
    "forgotten-holder": "the ledger knows",
    "boundless-disk": "over its limit",
    "unheard-loss": "have not ended",
    "deaf-run": "have not ended",
    "lost-repair": "is wrong|Error",
    "trusted-inputs": "is wrong|Error",
}
#: Those that take few seeds to be found run always.
QUICK = ("lost-message", "kept-shards", "forgotten-holder", "boundless-disk", "deaf-run")


def world(*arguments: object, found: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """Run the simulation; returns what it says, and the outcome of each seed."""
    file = Path(os.environ["PYTEST_WORLD"])
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.world", *map(str, arguments), "--json", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert ran.returncode == int(found), ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout, [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_WORLD", str(tmp_path / "seeds.json"))


@pytest.mark.timeout(900)
def test_nothing_is_lost_nor_wrong_nor_left_behind(pytestconfig: pytest.Config) -> None:
    seeds = 25 * pytestconfig.getoption("--seeds")
    _, outcomes = world("--seeds", seeds)
    assert len(outcomes) == seeds
    assert len({kind for outcome in outcomes for kind in outcome["faults"]}) >= 8
    assert sum(outcome["counts"]["deaths"] for outcome in outcomes) > seeds / 4
    assert sum(outcome["counts"]["looks"] for outcome in outcomes) > 1000 * seeds


def test_a_seed_replays_exactly() -> None:
    _, together = world("--seeds", 5, "--first", 11, "--processes", 2)
    _, alone = world("--seeds", 5, "--first", 11, "--processes", 1)
    told = {outcome["seed"]: (outcome["digest"], outcome["story"]) for outcome in together}
    assert {outcome["seed"]: (outcome["digest"], outcome["story"]) for outcome in alone} == told
    assert len({digest for digest, _ in told.values()}) == 5
    _, single = world("--seed", 12)
    assert (single[0]["digest"], single[0]["story"]) == told[12]


def test_the_same_befalls_stock_dask() -> None:
    said, outcomes = world("--seeds", 12, "--stock", found=True)
    assert len(outcomes) == 12
    # Its disks fail, and it has no checksums; what is compared is the answer, which most seeds get right.
    assert {outcome["kind"] for outcome in outcomes} <= {None, "error", "wrong", "hang"}, said
    assert sum(outcome["broken"] is None for outcome in outcomes) > 4
    assert sum(outcome["counts"]["repairs"] for outcome in outcomes) == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "bug", [bug if bug in QUICK else pytest.param(bug, marks=pytest.mark.exhaustive) for bug in PLANTED]
)
def test_a_planted_bug_is_found(bug: str) -> None:
    said, outcomes = world("--seeds", 200, "--stop", "--plant", bug, found=True)
    assert re.search(PLANTED[bug], outcomes[-1]["broken"]), said
