"""The answer of install: what it says, and that it says so in a notebook too."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from dask_gpurt.installation import Installation, PartStatus
from dask_gpurt.observe.reports import TierReport

READY = PartStatus(True)
STOCK = PartStatus(False, "OSError: no <room>")


def test_where_all_is_well_it_says_so() -> None:
    answer = Installation("1.0", {"placement": READY, "shuffle": READY}, {"a": {"memory": READY, "shuffle": READY}})
    assert all(answer.installed(part) for part in ("placement", "shuffle", "memory"))
    assert str(answer).splitlines() == [
        "dask-gpurt 1.0 on 1 worker",
        "  memory     installed on all workers",
        "  shuffle    installed on all workers",
        "  placement  installed on the scheduler",
    ]


def test_a_worker_left_stock_is_named_with_the_reason() -> None:
    answer = Installation(
        "1.0", {"shuffle": READY}, {"a": {"memory": READY, "shuffle": READY}, "b": {"memory": STOCK, "shuffle": READY}}
    )
    assert not answer.installed("memory")
    assert answer.installed("shuffle")
    assert "installed on 1 of 2 workers, stock on 1 (OSError: no <room>: b)" in str(answer)
    assert "no &lt;room&gt;" in answer._repr_html_()


def test_many_stock_workers_are_counted_not_listed() -> None:
    workers = {f"w{i}": {"memory": STOCK if i < 9 else READY} for i in range(10)}
    assert "stock on 9 (OSError: no <room>: w0, w1, w2, w3 and 5 more)" in str(Installation("1.0", {}, workers))


def test_a_cluster_without_workers_is_not_called_installed() -> None:
    answer = Installation("1.0", {"placement": READY, "shuffle": READY}, {})
    assert answer.installed("placement")
    assert not answer.installed("memory")
    assert "waits for workers" in str(answer)


def test_what_the_scheduler_left_stock_is_said() -> None:
    answer = Installation("1.0", {"shuffle": PartStatus(False, "left out")}, {"a": {"shuffle": READY}})
    assert not answer.installed("shuffle")
    assert "stock on the scheduler (left out)" in str(answer)


def test_a_notebook_shows_the_tiers_in_total_and_by_worker() -> None:
    tiers = {f"tcp://<{i}>": {"host": TierReport(2**30, 0, 2**31), "disk": TierReport(0, 0, None)} for i in range(60)}
    text = Installation("1.0", {}, {}, tiers)._repr_html_()
    assert "60.00 GiB of 120.00 GiB" in text
    assert text.count("1.00 GiB of 2.00 GiB") == 50
    assert "and 10 more" in text
    assert "width:50%" in text
    assert "tcp://&lt;0&gt;" in text
    assert "<0>" not in text
    assert "Tiers" not in Installation("1.0", {}, {})._repr_html_()


def test_a_tier_that_a_worker_does_not_have_is_left_empty() -> None:
    tiers = {"a": {"device": TierReport(1, 0, 2), "host": TierReport(1, 0, 2)}, "b": {"host": TierReport(5, 0, 2)}}
    text = Installation("1.0", {}, {}, tiers)._repr_html_()
    # What is over its limit fills the bar, and no more.
    assert "width:100%" in text
    assert "&#8211;</td>" in text


def test_the_html_is_well_formed_and_sets_no_colour_of_text_or_page() -> None:
    tiers = {"a": {"host": TierReport(1, 0, 2)}}
    text = Installation("1.0", {"shuffle": READY}, {"a": {"memory": STOCK}}, tiers)._repr_html_()
    ET.fromstring(text)
    assert re.findall(r"(?<![-\w])color:", text) == []


def test_a_sum_says_of_how_many_workers_it_is() -> None:
    workers = {"a": {"memory": READY}, "b": {"memory": STOCK}}
    host = {"host": TierReport(1, 0, 2)}
    assert ">1 of 2 workers</th>" in Installation("1.0", {}, workers, {"a": host, "b": {}})._repr_html_()
    assert ">all workers</th>" in Installation("1.0", {}, workers, {"a": host, "b": host})._repr_html_()
    # Without the memory part there are no tiers, and no table of them.
    assert "Tiers" not in Installation("1.0", {}, workers, {"a": {}, "b": {}})._repr_html_()
