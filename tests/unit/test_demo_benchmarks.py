"""The benchmarks' frame, with a subject of our own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.__main__ import main, subjects
from benchmarks.frame import Subject, WrongAnswerError, line_of_pairs, turns


def fake(*, right: Any = True) -> Any:
    def run(quick: Any) -> Any:
        pairs = 1 if quick else 3
        yield line_of_pairs("slow", "wall_s", ours=[2.0] * pairs, peer=[1.0] * pairs, peer_name="stock")
        if not right:
            raise WrongAnswerError("fast: 2, expected 3")
        yield line_of_pairs("nothing", "written_nbytes", ours=[0] * pairs, peer=[5] * pairs, peer_name="stock")

    return {"fake": Subject("fake", "what it is like", run)}


def test_a_line_a_case(capsys: Any, tmp_path: Any) -> None:
    path = tmp_path / "out.json"
    assert main(["fake", "--json", str(path)], fake()) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fake slow wall_s ratio=0.500 ours=2 peer=1 peer_name=stock q1=0.500 q3=0.500 pairs=3",
        "fake nothing written_nbytes ratio=inf ours=0 peer=5 peer_name=stock q1=inf q3=inf pairs=3",
    ]
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert written["subject"] == "fake"
    assert written["machine"]["cores"] >= 1
    assert written["versions"]["dask"]
    assert [(line["case"], line["ratio"], line["pairs"]) for line in written["lines"]] == [
        ("slow", 0.5, 3),
        ("nothing", None, 3),
    ]


def test_quick(capsys: Any) -> None:
    assert main(["fake", "--quick"], fake()) == 0
    assert "pairs=1" in capsys.readouterr().out


def test_a_wrong_answer_is_no_result(capsys: Any, tmp_path: Any) -> None:
    path = tmp_path / "out.json"
    assert main(["fake", "--json", str(path)], fake(right=False)) == 1
    assert "expected 3" in capsys.readouterr().err
    assert not path.exists()


def test_an_unknown_subject(capsys: Any) -> None:
    assert main(["nope"], fake()) == 2
    said = capsys.readouterr().err
    assert "usage:" in said
    assert "'nope'" in said
    assert "what it is like" in said


def test_a_folder_that_is_not_there(capsys: Any, tmp_path: Any) -> None:
    assert main(["fake", "--json", str(tmp_path / "no" / "out.json")], fake()) == 2
    assert "no folder" in capsys.readouterr().err


def test_the_median_of_neighbours_is_reported() -> None:
    # The machine gets ten times slower in the middle; each pair says the same.
    line = line_of_pairs("c", "wall_s", ours=[1.0, 1.0, 10.0], peer=[1.5, 1.5, 15.0], peer_name="stock")
    assert line.ratio == 1.5
    assert line.quartiles == (1.5, 1.5)


def test_the_order_alternates() -> None:
    order = [ours for _, ours in turns(4)]
    assert order == [False, True, True, False, False, True, True, False]


def test_every_module_is_a_subject() -> None:
    assert {"demo", "overhead"} <= set(subjects())
