"""The 22 queries say what DuckDB says, a fault in them would be noticed, and their figures add up."""

from __future__ import annotations

import contextlib
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import dask
import pandas as pd
import pytest

from benchmarks import tpch
from benchmarks.frame import WrongAnswerError
from benchmarks.tpch_queries import NAMES, differences, finish, queries
from dask_gpurt.demo import data
from dask_gpurt.demo.tpch import MONEY, Query, reader, truth

#: The smallest at which every query finds rows: query 17 has none in a hundredth.
SCALE = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    return data.ensure_tables(SCALE, tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def threads() -> Any:
    with dask.config.set({"scheduler": "threads", "dataframe.shuffle.method": "tasks"}):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_answers(folder: Any, name: Any) -> None:
    query = queries(SCALE)[name]
    expected = truth(query, folder)
    assert len(expected) > 0
    assert not expected.isna().any(axis=None)
    answer = finish(query, query.build(reader(folder)).compute())
    assert differences(query, answer, expected) == []
    # The same comparison finds a row too few, and one value that is a little off.
    assert differences(query, answer.iloc[1:], expected)
    numbers = [column for column in answer.columns if pd.api.types.is_numeric_dtype(answer[column].dtype)]
    if numbers:
        off = answer.copy()
        one = pd.api.types.is_integer_dtype(off[numbers[-1]].dtype)
        off.loc[0, numbers[-1]] += 1 if one else 1e-5 + 1e-7 * off.loc[0, numbers[-1]]
        assert differences(query, off, expected)


@pytest.mark.parametrize("name", [name for name, query in queries(SCALE).items() if query.order])
def test_the_order_counts(folder: Any, name: Any) -> None:
    query = queries(SCALE)[name]
    expected = truth(query, folder)
    answer = finish(query, expected)
    assert differences(query, answer, expected) == []
    if len(set(answer[query.order[0][0]])) > 1:
        assert differences(query, answer.iloc[::-1].reset_index(drop=True), expected)


def test_every_decimal_has_become_a_float(folder: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = {}
    for table in data.TABLES:
        schema = pq.read_schema(next((folder / table).iterdir()))
        assert not any(pa.types.is_decimal(field.type) for field in schema)
        floats[table] = tuple(field.name for field in schema if pa.types.is_floating(field.type))
    assert {table: names for table, names in floats.items() if names} == MONEY


def test_nothing_but_decimals_changes(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    cents = [Decimal("0.07"), Decimal("-123456789.10"), None, Decimal("4.00"), Decimal("0.01")]
    table = pa.table({"name": list("abcde"), "price": pa.array(cents, pa.decimal128(15, 2)), "day": range(5)})
    path = tmp_path / "table.parquet"
    pq.write_table(table, path, row_group_size=2)
    data._decimals_to_floats(path)
    assert list(tmp_path.iterdir()) == [path]
    assert pq.ParquetFile(path).num_row_groups == 3
    found = pq.read_table(path)
    assert found.drop(["price"]).equals(table.drop(["price"]))
    assert found["price"].to_pylist() == [0.07, -123456789.1, None, 4.0, 0.01]
    before = path.stat().st_ino
    data._decimals_to_floats(path)
    assert path.stat().st_ino == before


def test_the_parameter_that_follows_the_scale_factor() -> None:
    assert "0.002" in queries(0.05)["q11"].sql
    assert "0.0001" in queries(1.0)["q11"].sql


def test_a_number_becomes_a_row() -> None:
    query = queries(SCALE)["q6"]
    expected = pd.DataFrame({"revenue": [2.5]})
    assert differences(query, finish(query, 2.5), expected) == []
    assert differences(query, finish(query, 2.6), expected) == ["row row=0: revenue is 2.6, expected 2.5"]
    assert differences(query, finish(query, math.nan), expected)


class Cluster:
    """Stands for the client of a cluster: notes when it computes, and returns what it was told to."""

    def __init__(self, name: Any, log: Any, answer: Any = 2.5) -> None:
        self.name, self.log, self.answer = name, log, answer
        self.current = False

    @contextlib.contextmanager
    def as_current(self) -> Any:
        self.current = True
        yield
        self.current = False


def compare(*clusters: Any) -> Any:
    class Number:
        def compute(self) -> Any:
            (cluster,) = (each for each in clusters if each.current)
            cluster.log.append(cluster.name)
            return cluster.answer

    query = Query("q", "a number", lambda _: Number(), sql="", columns=("sum",), key=(), order=())
    ours, peer = clusters
    expected = pd.DataFrame({"sum": [2.5]})
    return tpch.compare(query, lambda *_: None, expected, ours=ours, peer=peer, least=2)


def test_both_sides_take_turns_after_a_run_that_is_not_counted(monkeypatch: Any) -> None:
    monkeypatch.setattr(tpch, "PAIRS_S", 0.0)
    log: list[str] = []
    ours, peer = compare(Cluster("ours", log), Cluster("peer", log))
    assert (len(ours), len(peer)) == (2, 2)
    assert sorted(log[:2]) == ["ours", "peer"]
    assert log[2:] == ["peer", "ours", "ours", "peer"]


def test_a_short_query_runs_more_often() -> None:
    ours, peer = compare(Cluster("ours", []), Cluster("peer", []))
    assert (len(ours), len(peer)) == (6, 6)


@pytest.mark.parametrize("answers", [(2.5, 2.6), (2.6, 2.5)])
def test_a_wrong_answer_is_no_result(answers: Any) -> None:
    mine, theirs = answers
    with pytest.raises(WrongAnswerError, match=r"q: row row=0: sum is 2\.6"):
        compare(Cluster("ours", [], mine), Cluster("peer", [], theirs))


def test_no_query_weighs_more_for_taking_longer() -> None:
    short, long = ([1.0], [2.0]), ([100.0], [50.0])
    line = tpch.line_of_all([short, long])
    assert line.case == "geomean"
    assert line.ratio == pytest.approx(1.0)
    assert line.ours == pytest.approx(10.0)
    assert line.peer == pytest.approx(10.0)
    assert line.quartiles == pytest.approx((1.0, 1.0))
