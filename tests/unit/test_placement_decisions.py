"""What is remembered of decisions, and how it is said."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import dask_gpurt.plugins
from dask_gpurt.explanation import (
    KINDS,
    REASONS,
    REFUSED,
    SHOWN,
    UNPLANNED,
    Alternative,
    Decision,
    Explanation,
    FamilyExplanation,
    TaskExplanation,
)
from dask_gpurt.plugins.decisions import Decisions, Lately
from dask_gpurt.plugins.families import Family
from dask_gpurt.plugins.policy import MOVE_LATENCY_S
from dask_gpurt.plugins.view import Candidate


@dataclass(frozen=True)
class Worker:
    address: str


A, B = Worker("tcp://a"), Worker("tcp://b")


def test_the_latest_decisions_are_remembered_and_no_more() -> None:
    decisions = Decisions(limit=3)
    for i in range(5):
        decisions.note((i % 2, "only-holder", (A, B)[i % 2], None, None))
    assert decisions.about({0, 7}) == {0: [Decision("only-holder", "tcp://a")] * 2}
    assert [key for key, _ in decisions.latest(2)] == [0, 1]
    assert [key for key, _ in decisions.latest(9)] == [0, 1, 0]


def test_prices_are_told_in_seconds_the_least_first() -> None:
    decisions = Decisions()
    decisions.note(("x", "earlier-elsewhere", B, None, [Candidate(A, 0, 9.0, 0.0), Candidate(B, 1_000_000, 1.0, 1.0)]))
    (decision,) = decisions.about({"x"})["x"]
    # A second for the bytes, and what it takes to begin; both twice.
    there, here = decision.alternatives
    assert here == Alternative("tcp://a", 0, 9.0, 0.0, 9.0)
    assert there == Alternative("tcp://b", 1_000_000, 1.0, 1.0, there.price_s)
    assert there.price_s == pytest.approx(1.0 + 2 * (1.0 + MOVE_LATENCY_S))


def test_a_family_is_told_as_it_is_now() -> None:
    decisions = Decisions()
    family = Family([("x", i) for i in range(6)], A, "meeting", "sum")
    decisions.note((("x", 0), "planned", A, family, None))
    family.moved, family.home = ("rehomed", A), B
    (decision,) = decisions.about({("x", 0)})[("x", 0)]
    assert decision.family == FamilyExplanation(
        "meeting", "sum", "tcp://b", 6, tuple(("x", i) for i in range(4)), ("rehomed", "tcp://a")
    )
    assert str(decision.family) == (
        "with ('x', 0), ('x', 1), ('x', 2), ('x', 3), … (6 in all), whose results meet in sum; "
        "planned for tcp://b, as tcp://a was gone or paused"
    )


def test_every_reason_has_its_words() -> None:
    # What is noted is written as a word of letters and dashes, beside the key.
    folder = Path(dask_gpurt.plugins.__file__).parent
    sources = "".join(
        (folder / name).read_text() for name in ("placement.py", "policy.py", "families.py", "crossings.py")
    )
    noted = re.findall(r'_(?:decided|left_to_dask|note)\(\(?\w[\w.]*,(?: ws,)? "([\w-]+)"', sources)
    chosen = re.findall(r'Choice\([\w.]+, "([\w-]+)" if .* else "([\w-]+)"', sources)
    assert {*noted, *(reason for pair in chosen for reason in pair)} - {"rehomed"} <= REASONS.keys()
    unplanned = re.findall(r"(?:_unplanned(?:\[key\] = |\(\w+, )|pop\(ts.key\) or \()(.*)", sources)
    words = {word for line in unplanned for word in re.findall(r'"([\w-]+)"', line)}
    assert words - {"failed"} == UNPLANNED
    assert {REFUSED, "failed"} | UNPLANNED <= REASONS.keys()
    assert len(set(noted)) >= 6
    assert chosen
    kinds = set(re.findall(r'"(meeting|holder|position|crossing|crossed)"', sources))
    assert kinds == KINDS.keys()


def test_what_is_remembered_until_a_decision_is_bounded() -> None:
    lately: Lately[str] = Lately(limit=10)
    for key in range(95):
        lately[key] = f"first {key}"
        assert len(lately) <= 20
    assert [lately.get(key) for key in (74, 85, 94)] == [None, "first 85", "first 94"]
    lately[85] = "second"
    assert lately.get(85) == "second"
    assert lately.pop(85) == "second"
    assert lately.pop(85) is None
    lately.clear()
    assert lately.get(94) is None
    assert not len(lately)


def test_a_refused_steal_is_said_and_is_not_why_a_task_is_where_it_is() -> None:
    refused = Decision(REFUSED, "tcp://a", (Alternative("tcp://a", 0, 0.1, 0.0, 0.1),))
    task = TaskExplanation("x", "processing", ("tcp://a",), (refused, Decision("most-bytes", "tcp://a")))
    assert task.reason == "most-bytes"
    assert [line.split(":")[0].strip() for line in task.lines()] == ["x", "steal-refused tcp", "tcp", "most-bytes tcp"]


def test_many_tasks_are_summed_up_and_a_few_are_shown() -> None:
    tasks = [TaskExplanation(("x", i), "memory", ("tcp://a",), (Decision("planned", "tcp://a"),)) for i in range(30)]
    answer = Explanation((*tasks, TaskExplanation("y", "waiting")), omitted=5)
    assert answer.reasons() == {"planned": 30, "": 1}
    text = repr(answer).splitlines()
    assert text[0] == "36 tasks: 30 planned, 1 not remembered (5 left out)"
    assert text[-1] == "… and 21 more in .tasks"
    assert sum(line.startswith("('x', ") for line in text) == SHOWN
    assert answer["y"].state == "waiting"
    with pytest.raises(KeyError):
        answer["z"]


def test_a_task_that_waits_says_for_whom() -> None:
    family = FamilyExplanation("holder", "s", "tcp://a", 1, ("x",), ("relieved", "tcp://b"))
    task = TaskExplanation("x", "queued", family=family, waiting=7)
    first, planned, last = task.lines()
    assert (first, last) == ("x: queued", "  7 tasks wait for that worker")
    assert planned == (
        "  planned with x, whose results meet in s, and what that takes beside them was there already; "
        "planned for tcp://a, which was idle while tcp://b had more to do"
    )
    assert list(TaskExplanation("x", "waiting").lines())[1:] == ["  not decided yet: it waits for its inputs"]


def test_html_is_escaped() -> None:
    answer = Explanation((TaskExplanation("<x>", "memory", ("tcp://a",), (Decision("planned", "tcp://a"),)),))
    assert "&lt;x&gt;: memory" in answer._repr_html_()
    assert "<x>" not in answer._repr_html_()
