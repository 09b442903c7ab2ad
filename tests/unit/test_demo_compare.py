"""Comparisons of answers: what is equal passes, and each kind of fault is found."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_gpurt.demo.compare import array_differences, frame_differences


@pytest.fixture
def truth() -> Any:
    return pd.DataFrame(
        {
            "name": ["d", "c", "b", "a"],
            "count": [1, 2, 3, 4],
            "total": [9.0, 5.0, 5.0, 1e6 + 1 / 3],
            "day": pd.to_datetime(["1995-01-01", "1995-01-02", "1995-01-02", "1995-01-04"]),
        }
    )


def check(answer: Any, truth: Any, **kwargs: Any) -> Any:
    return frame_differences(answer, truth, key=["name"], order=[("day", False)], **kwargs)


def test_same_values_in_other_types_are_equal(truth: Any) -> None:
    answer = truth.assign(
        count=truth["count"].astype("int32"),
        total=truth["total"] * (1 + 1e-12),
        day=[stamp.date() for stamp in truth["day"]],
    )
    answer["day"] = answer["day"].astype("date32[day][pyarrow]")
    assert check(answer, truth) == []


def test_ties_may_come_in_any_order(truth: Any) -> None:
    assert check(truth.iloc[[0, 2, 1, 3]], truth) == []


def test_at_the_limit_a_tie_stands_for_its_like(truth: Any) -> None:
    assert check(truth.iloc[[0, 2]], truth, limit=2) == []
    assert check(truth.iloc[[0, 3]], truth, limit=2) == [
        "row 1, ordered by day: 1995-01-04 00:00:00, expected 1995-01-02 00:00:00"
    ]


@pytest.mark.parametrize(
    ("column", "value", "found"),
    [
        ("count", 5, "row name=b: count is 5, expected 3"),
        ("total", 5.00001, "row name=b: total is 5.00001, expected 5.0"),
        ("total", np.nan, "row name=b: total is nan, expected 5.0"),
        ("name", "x", "row name=x is not in the expected answer"),
        ("name", "c", "row name=c is there twice"),
    ],
)
def test_a_changed_value_is_found(truth: Any, column: Any, value: Any, found: Any) -> None:
    answer = truth.copy()
    answer.loc[2, column] = value
    assert found in check(answer, truth)


def test_a_wrong_order_is_found(truth: Any) -> None:
    assert check(truth.iloc[::-1], truth)


def test_a_lost_row_is_found(truth: Any) -> None:
    assert check(truth.head(3), truth) == ["there are 3 rows, expected 4"]
    assert check(truth.head(1), truth, limit=2) == ["there are 1 rows, expected 2"]


def test_a_wrong_kind_is_found(truth: Any) -> None:
    assert check(truth.assign(count=truth["count"].astype(float)), truth) == [
        "count is of kind float, expected integer"
    ]
    assert check(truth.assign(day=["1995"] * 4), truth) == ["day is of kind string, expected date"]
    assert check(truth.drop(columns="day"), truth) == [
        "columns are ['name', 'count', 'total'], expected ['name', 'count', 'total', 'day']"
    ]


def test_many_differences_are_cut_short(truth: Any) -> None:
    answer = pd.concat([truth] * 3, ignore_index=True).assign(name=list("abcdefghijkl"))
    assert check(answer.assign(count=0), answer)[-1] == "and 7 more"


def test_a_key_that_is_none_is_refused(truth: Any) -> None:
    with pytest.raises(ValueError, match="does not identify"):
        frame_differences(truth, truth, key=["total"])


def test_dates_are_compared_by_value() -> None:
    date32: Any = "date32[day][pyarrow]"
    truth = pd.DataFrame({"k": [1], "day": pd.to_datetime(["1995-01-01"])})
    answer = pd.DataFrame({"k": [1], "day": pd.Series([dt.date(1995, 1, 2)]).astype(date32)})
    assert frame_differences(answer, truth, key=["k"])


def test_arrays() -> None:
    truth = np.arange(6.0).reshape(2, 3)
    assert array_differences(truth * (1 + 1e-13), truth) == []
    assert array_differences(truth.T, truth) == ["the shape is (3, 2), expected (2, 3)"]
    assert array_differences(truth.astype(int), truth) == ["the type is int64, expected float64"]
    changed = truth.copy()
    changed[1, 2] = 5.001
    assert array_differences(changed, truth) == ["element (1, 2) is 5.001, expected 5.0"]
