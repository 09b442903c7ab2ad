"""Ratios, table and report from runs that are made up."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from dask_gpurt import webpage
from dask_gpurt.demo import machine, report
from dask_gpurt.demo.app import to_plain
from dask_gpurt.demo.measure import Usage
from dask_gpurt.demo.runner import METRICS, Comparison, Outcome
from dask_gpurt.demo.show import make_table

WALL, MOVED, WRITTEN, PEAK = METRICS
SIDES = ("stock", "dask-gpurt")


def run(
    side: Any,
    number: Any = 0,
    *,
    wall_s: Any = 1.0,
    moved: Any = 2**30,
    written: Any = 0,
    differences: Any = (),
    error: Any = None,
) -> Any:
    usage = None if error else Usage(wall_s=wall_s, moved_nbytes=moved, written_nbytes=written, peak_nbytes=2**30)
    return Outcome("q3", side, number, usage, list(differences), error)


@pytest.fixture
def good() -> Any:
    return Comparison(
        "q3",
        SIDES,
        [
            run("stock", 0, wall_s=3.0, written=2**20),
            run("dask-gpurt", 0, wall_s=2.0, moved=2**29),
            run("dask-gpurt", 1, wall_s=20.0, moved=2**29),
            run("stock", 1, wall_s=50.0, written=2**20),
            run("stock", 2, wall_s=2.0, written=2**20),
            run("dask-gpurt", 2, wall_s=1.0, moved=2**29),
        ],
    )


@pytest.fixture
def bad() -> Any:
    return Comparison(
        "matmul",
        SIDES,
        [
            run("stock", error="KilledWorker: <dead>"),
            run("dask-gpurt", differences=["element (0, 0) is 1, expected 2"]),
        ],
    )


def test_the_ratio_is_the_median_over_pairs(good: Any) -> None:
    assert good.ratios(WALL) == [1.5, 2.5, 2.0]
    assert good.ratio(WALL) == 2.0
    assert good.ratio(MOVED) == 2.0
    assert good.median(WALL, "stock") == 3.0


def test_nothing_at_all(good: Any, bad: Any) -> None:
    assert good.ratio(WRITTEN) == math.inf
    assert Comparison("q3", SIDES, [run("stock"), run("dask-gpurt")]).ratio(WRITTEN) is None
    assert bad.ratio(WALL) is None
    assert bad.median(WALL, "stock") is None


def test_a_wrong_answer_has_no_figures(bad: Any) -> None:
    assert bad.values(WALL, "dask-gpurt") == []
    assert bad.problems() == [
        "q3 failed on stock: KilledWorker: <dead>",
        "q3 on dask-gpurt: element (0, 0) is 1, expected 2",
    ]


def test_the_table_fits_a_terminal(good: Any, bad: Any) -> None:
    screen = io.StringIO()
    console = Console(width=80, file=screen)
    console.print(make_table([good, bad]))
    lines = screen.getvalue().splitlines()
    assert any(re.search(r"q3 +stock +3\.00 s +1\.00 GiB +1\.00 MiB +1\.00 GiB +right", line) for line in lines)
    assert any(re.search(r"ratio +2\.00 +2\.00 +∞ +1\.00", line) for line in lines)
    assert any(re.search(r"matmul +stock +(- +){4}failed", line) for line in lines)
    assert any(re.search(r"dask-gpurt +(- +){4}wrong", line) for line in lines)
    assert "…" not in screen.getvalue()


def test_plain_data_is_json(good: Any, bad: Any) -> None:
    plain = json.loads(json.dumps([to_plain(good), to_plain(bad)], allow_nan=False))
    assert plain[0]["ratios"] == {"wall_s": 2.0, "moved_nbytes": 2.0, "written_nbytes": None, "peak_nbytes": 1.0}
    assert plain[0]["runs"][0]["usage"]["wall_s"] == 3.0
    assert plain[1]["runs"][0]["error"] == "KilledWorker: <dead>"


class _Loads(HTMLParser):
    """Collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[Any] = []

    def handle_starttag(self, tag: Any, attrs: Any) -> None:
        wanted = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
        self.loaded += [value for name, value in attrs if wanted.get(tag) == name]


def test_the_report_opens_offline(good: Any, bad: Any, tmp_path: Any) -> None:
    path = tmp_path / "report.html"
    webpage.write(path, report.render([good, bad], machine.describe(), {"Cluster": "2 workers"}))
    page = path.read_text(encoding="utf-8")
    parser = _Loads()
    parser.feed(page)
    assert parser.loaded == []
    assert not re.search(r"@import|url\(['\"]?https?:", page)
    assert "KilledWorker: &lt;dead&gt;" in page
    assert "Not all answers agreed" in page
    assert "2 workers" in page
    # A ratio plot and one for each metric.
    assert page.count("data-root-id") == 1 + len(METRICS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_report_of_failures_only(bad: Any) -> None:
    page = report.render([bad], machine.describe(), {})
    assert page.count("data-root-id") == 1


def test_a_good_report_says_so(good: Any) -> None:
    assert "All answers agreed" in report.render([good], machine.describe(), {})
