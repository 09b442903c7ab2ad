"""Columns taken apart and put together: where they are refused, and the limits of Arrow's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dask_gpurt.shuffle import columns
from dask_gpurt.shuffle.columns import Arrangement, Source, check_form, put_together, take_apart
from dask_gpurt.shuffle.schema import Form
from dask_gpurt.shuffle.wire import WireError

UTF8 = pd.ArrowDtype(pa.string())


def taken(column: Any, expected: Any = None) -> Source:
    series = pd.Series(column)
    source = take_apart(series, series.dtype if expected is None else expected)
    assert source is not None
    return source


def test_nothing_is_copied_that_need_not_be() -> None:
    numbers = np.arange(5)
    assert np.shares_memory(taken(pd.Series(numbers, copy=False)).elements, numbers)
    array = pa.array([3, 1, 2], pa.int64())
    values = taken(pd.arrays.ArrowExtensionArray(array)).elements
    assert values.ctypes.data == array.buffers()[1].address
    text = taken(pd.Series(["a", "bc"], dtype=pd.ArrowDtype(pa.large_string()))).text
    assert text is not None
    assert text.data.ctypes.data == text.array.buffers()[2].address


@pytest.mark.parametrize(("longest", "dtype"), [(0, "u1"), (255, "u1"), (256, "u2"), (65_535, "u2"), (65_536, "u4")])
def test_lengths_take_no_more_bytes_than_they_need(longest: int, dtype: str) -> None:
    source = taken(pd.Series(["x" * longest, "y"], dtype="str"))
    assert source.elements.dtype == dtype
    assert source.elements.tolist() == [longest, 1]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pd.Series(["a"], dtype="str"), pd.StringDtype("pyarrow")),
        (pd.Series(["a"], dtype="str"), np.dtype(object)),
        (pd.Series(["a"], dtype="string[python]"), pd.StringDtype("python")),
        (pd.Series(["a"], dtype=object), np.dtype(object)),
        (pd.Series([1], dtype="Int64"), pd.Int32Dtype()),
        (pd.Series(["a"], dtype="category"), pd.CategoricalDtype()),
        (pd.Series(["a"], dtype=pd.CategoricalDtype(["a", "b"])), pd.CategoricalDtype(["b", "a"])),
        (pd.Series([[1]], dtype=pd.ArrowDtype(pa.list_(pa.int64()))), pd.ArrowDtype(pa.list_(pa.int64()))),
        (pd.Series(["a"], dtype=pd.ArrowDtype(pa.string_view())), pd.ArrowDtype(pa.string_view())),
        (pd.Series([b"abc"], dtype=pd.ArrowDtype(pa.binary(3))), pd.ArrowDtype(pa.binary(3))),
        (pd.Series([None], dtype=pd.ArrowDtype(pa.null())), pd.ArrowDtype(pa.null())),
        (pd.Series(pd.period_range("2020", periods=1, freq="D")), pd.PeriodDtype("D")),
    ],
)
def test_what_is_unexpected_or_unknown_goes_by_arrow(column: pd.Series[Any], expected: Any) -> None:
    assert take_apart(column, expected) is None


@pytest.mark.parametrize(
    ("form", "dtype", "expected"),
    [
        (Form.TEXT, "u1", np.dtype("i8")),
        (Form.TEXT, "u1", np.dtype(object)),
        (Form.TEXT, "u1", pd.Int64Dtype()),
        (Form.TEXT, "u1", pd.StringDtype("python")),
        (Form.FIXED, "u4", pd.Int64Dtype()),
        (Form.FIXED, "u8", UTF8),
        (Form.FIXED, "?", pd.ArrowDtype(pa.uint8())),
        (Form.CODES, "i1", pd.Int8Dtype()),
        (Form.CODES, "i1", pd.CategoricalDtype()),
    ],
)
def test_a_form_that_was_not_expected_is_refused(form: Form, dtype: str, expected: Any) -> None:
    with pytest.raises(WireError, match="was expected"):
        check_form(form, np.dtype(dtype), expected)


def test_codes_without_a_category_are_refused() -> None:
    dtype = pd.CategoricalDtype(["a", "b"])
    made = put_together(Form.CODES, dtype, np.array([1, -1, 0], "i1"), None)
    assert made.equals(pd.Categorical(["b", None, "a"], dtype=dtype))
    for code in (2, -2):
        with pytest.raises(WireError, match="2 categories"):
            put_together(Form.CODES, dtype, np.array([code], "i1"), None)


def test_more_strings_than_an_array_can_have_become_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "NARROW_NBYTES_MAX", 4)
    segments = [(1, octets(b"abc")), (2, octets(b"d")), (1, octets(b"")), (1, octets(b"efgh")), (1, octets(b"i"))]
    lengths = np.array([3, 0, 1, 0, 4, 1], "u1")
    valid = np.array([True, False, True, True, True, True])
    made = put_together(Form.TEXT, UTF8, lengths, valid, text=segments)
    chunks = pa.chunked_array(pa.array(made))
    assert [len(chunk) for chunk in chunks.chunks] == [4, 1, 1]
    assert chunks.to_pylist() == ["abc", None, "d", "", "efgh", "i"]
    with pytest.raises(WireError, match="too many"):
        put_together(Form.TEXT, UTF8, np.array([5], "u1"), None, text=[(1, octets(b"abcde"))])
    # Wide offsets have no such limit.
    wide = put_together(Form.TEXT, pd.StringDtype("pyarrow"), np.array([5], "u1"), None, text=[(1, octets(b"abcde"))])
    assert list(wide) == ["abcde"]


def octets(content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(content, np.uint8) if content else np.empty(0, np.uint8)


def test_segments_of_strings_are_put_into_order() -> None:
    # Two pieces: the first has the segments 0 and 2, the second 1.
    arrangement = Arrangement(np.array([2, 1, 3]), np.array([0, 2, 1]))
    lengths = [np.array([1, 2, 1], "u1"), np.array([0, 1, 0], "u1")]
    found = arrangement.texts(lengths, [octets(b"abbz"), octets(b"m")], [2, 1])
    assert [(rows, bytes(text)) for rows, text in found] == [(2, b"abb"), (3, b"m"), (1, b"z")]
    out = np.empty(6, np.uint8)
    arrangement.fill(out, lengths)
    assert out.tolist() == [1, 2, 0, 1, 0, 1]
