"""Merges of partitions, against Dask's own function, and which ones are left to it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from dask.dataframe.multi import merge_chunk
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from dask_gpurt.shuffle import merging
from dask_gpurt.shuffle.merging import inner_merge, over_merge_chunk

STOCK = getattr(merge_chunk, "__wrapped__", merge_chunk)


def side(draw: st.DrawFn, prefix: str, *, unique: bool) -> pd.DataFrame:
    dtype = draw(st.sampled_from(["i8", "i8", "i4", "u2", "f8", "Int64", "str"]))
    keys = draw(st.lists(st.integers(0, 30), unique=unique, max_size=30))
    frame = pd.DataFrame({"key": pd.Series(keys, dtype="i8").astype(dtype)})
    for number, kind in enumerate(draw(st.lists(st.sampled_from(["f8", "i8", "str", "category", "?"]), max_size=4))):
        name = draw(st.sampled_from([f"{prefix}{number}", f"{prefix}{number}", "both"]))
        if name not in frame:
            frame.insert(
                draw(st.integers(0, len(frame.columns))), name, pd.Series(np.arange(len(frame)) % 2).astype(kind)
            )
    frame.index = pd.Index(
        np.arange(len(frame)) * 2 + 1,
        name=draw(st.sampled_from([None, "i"])),
        dtype=draw(st.sampled_from(["i8", "f8"])),
    )
    return frame[:: draw(st.sampled_from([1, -1]))]


@st.composite
def merges(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    left = side(draw, "l", unique=draw(st.booleans()))
    right = side(draw, "r", unique=draw(st.sampled_from([True, True, False])))
    how = draw(st.sampled_from(["inner", "inner", "inner", "left", "outer"]))
    on = draw(st.sampled_from(["key", ["key"]]))
    asked: dict[str, Any] = {"how": how, "left_on": on, "right_on": on, "suffixes": ("_x", "_y")}
    if draw(st.booleans()):
        asked.update(left_index=False, right_index=False, indicator=draw(st.booleans()))
    return left, right, asked


@settings(max_examples=300, deadline=None)
@given(merges())
def test_merges_are_those_of_dask(merge: tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]) -> None:
    left, right, asked = merge
    try:
        meta = left.iloc[:0].merge(right.iloc[:0], **asked)
        expected = STOCK(left, right, result_meta=meta, **asked)
    except ValueError:
        # Numbers and strings: there is nothing to compare with.
        reject()
    with mock.patch.object(merging, "ROWS_MIN", 0):
        found = over_merge_chunk(STOCK)(left, right, result_meta=meta, **asked)
    pd.testing.assert_frame_equal(found, expected, check_index_type="exact", check_column_type="exact")


def sides(rows: int = 100_000) -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    left = pd.DataFrame({"key": rng.integers(0, rows, rows), "l": np.arange(rows)})
    right = pd.DataFrame({"r": rng.random(rows // 2), "key": rng.permutation(rows)[: rows // 2]})
    return left, right


def test_large_merges_on_keys_that_come_once_are_done_here() -> None:
    left, right = sides()
    found = inner_merge(left, right, "key")
    assert found is not None
    pd.testing.assert_frame_equal(found, left.merge(right, on="key"), check_index_type="exact")


@pytest.mark.parametrize("matched", [True, False])
def test_what_is_shared_with_the_inputs_is_copied_before_it_is_changed(matched: bool) -> None:
    left, right = sides()
    if matched:
        right = pd.DataFrame({"r": np.zeros(len(left)), "key": left.pop("key").to_numpy()})
        left["key"] = np.random.default_rng(1).permutation(right["key"].to_numpy())
        right = right.drop_duplicates("key")
    before = left.copy(deep=True), right.copy(deep=True)
    found = inner_merge(left, right, "key")
    assert found is not None
    for place in range(len(found.columns)):
        found.iloc[:, place] = 7
    pd.testing.assert_frame_equal(left, before[0])
    pd.testing.assert_frame_equal(right, before[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda left, right: (left.head(10), right.head(10)),
        lambda left, right: (left, right.assign(key=right["key"] // 2)),
        lambda left, right: (left.sort_values("key"), right.sort_values("key")),
        lambda left, right: (left, right.assign(l=1)),
        lambda left, right: (left.astype({"key": "i4"}), right),
        lambda left, right: (left.astype({"key": "f8"}), right.astype({"key": "f8"})),
        lambda left, right: (left.rename_axis(columns="names"), right),
        lambda left, right: (left, right.iloc[:0]),
    ],
    ids=["small", "not unique", "sorted", "same names", "other type", "floats", "named columns", "empty"],
)
def test_others_are_left_to_pandas(change: Any) -> None:
    left, right = change(*sides())
    assert inner_merge(left, right, "key") is None


def test_keys_that_seem_to_come_once_are_all_looked_at() -> None:
    left, right = sides()
    twice = pd.concat([right, right.tail(1)])
    assert inner_merge(left, twice, "key") is None
