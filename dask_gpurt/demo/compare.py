"""Whether two answers are the same.

Covers: rows of an ordered query result (:func:`frame_differences`), arrays (:func:`array_differences`). Both return
what differs, in words; nothing is what agreement looks like.
Does not cover: where the true answers come from; see :mod:`dask_gpurt.demo.tpch` and :mod:`dask_gpurt.demo.arrays`.

What "same" means for rows: the same columns with the same kinds of type (integer, float, string, date), each row found
in the truth under its key with equal values, no row twice, the number of rows that the limit allows, and the columns
that the query orders by in the same sequence. Rows that tie in these columns may come in any order and, at the limit,
stand for each other, as SQL has it. Integers, strings and dates have to be equal; floats may differ by ``RTOL``,
because sums of floats depend on their order and because the reference adds exact decimals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["ATOL", "RTOL", "array_differences", "frame_differences"]

#: Relative difference allowed between floats: far above the rounding of a sum of millions of float64 (about 1e-12),
#: far below a row that is missing or counted twice.
RTOL = 1e-9
#: Absolute difference allowed, for sums whose terms cancel.
ATOL = 1e-6

#: Differences that are written out; more say nothing new.
SHOWN = 5


def frame_differences(
    answer: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    key: Sequence[str],
    order: Sequence[tuple[str, bool]] = (),
    limit: int | None = None,
) -> list[str]:
    """Say how an ordered, limited answer differs from the truth.

    Parameters
    ----------
    answer
        The rows to check, in their order.
    truth
        All rows of the true answer in their order, before the limit.
    key
        Columns that identify a row of the truth.
    order
        Columns that the rows are ordered by, each with whether it descends. An order of ``answer`` is only checked
        here.
    limit
        Rows that are to be returned at most.

    Examples
    --------
    >>> truth = pd.DataFrame({"k": [1, 2], "v": [0.5, 0.25]})
    >>> frame_differences(truth, truth, key=["k"])
    []
    >>> frame_differences(truth.assign(v=[0.5, 0.2]), truth, key=["k"])
    ['row k=2: v is 0.2, expected 0.25']
    """
    if list(answer.columns) != list(truth.columns):
        return [f"columns are {list(answer.columns)}, expected {list(truth.columns)}"]
    kinds = [(name, _kind(answer[name]), _kind(truth[name])) for name in truth.columns]
    differences = [f"{name} is of kind {is_}, expected {expected}" for name, is_, expected in kinds if is_ != expected]
    if differences:
        return differences
    expected_rows = len(truth) if limit is None else min(limit, len(truth))
    if len(answer) != expected_rows:
        return [f"there are {len(answer)} rows, expected {expected_rows}"]
    answer, truth = _plain(answer), _plain(truth)
    differences = []
    for name, _ in order:
        unequal = ~_equal(answer[name], truth[name].head(expected_rows))
        if unequal.any():
            row = int(np.argmax(unequal))
            is_, expected = answer[name].iloc[row], truth[name].iloc[row]
            differences.append(f"row {row}, ordered by {name}: {_show(is_)}, expected {_show(expected)}")
    if truth.duplicated(list(key)).any():
        raise ValueError(f"{list(key)} does not identify a row of the truth")
    for row in answer.index[answer.duplicated(list(key))]:
        differences.append(f"row {_name(answer, row, key)} is there twice")
    # Each row of the answer, beside the row of the truth with its key.
    expected_frame = answer[list(key)].merge(truth, on=list(key), how="left", indicator=True)
    unknown = expected_frame["_merge"].to_numpy() != "both"
    for row in answer.index[unknown]:
        differences.append(f"row {_name(answer, row, key)} is not in the expected answer")
    for name in truth.columns.difference(list(key), sort=False):
        unequal = ~_equal(answer[name], expected_frame[name]) & ~unknown
        for row in answer.index[unequal]:
            is_, expected = answer[name].loc[row], expected_frame[name].loc[row]
            differences.append(f"row {_name(answer, row, key)}: {name} is {_show(is_)}, expected {_show(expected)}")
    return _shortened(differences)


def array_differences(answer: Any, truth: Any) -> list[str]:
    """Say how an array differs from the truth.

    Examples
    --------
    >>> array_differences(np.array([1.0, 2.0]), np.array([1.0, 2.5]))
    ['element (1,) is 2.0, expected 2.5']
    """
    answer, truth = np.asarray(answer), np.asarray(truth)
    if answer.shape != truth.shape:
        return [f"the shape is {answer.shape}, expected {truth.shape}"]
    if answer.dtype.kind != truth.dtype.kind:
        return [f"the type is {answer.dtype}, expected {truth.dtype}"]
    unequal = ~np.isclose(answer, truth, rtol=RTOL, atol=ATOL, equal_nan=True)
    positions = [tuple(int(i) for i in position) for position in np.argwhere(unequal)]
    return _shortened([f"element {p} is {answer[p].item()!r}, expected {truth[p].item()!r}" for p in positions])


def _kind(column: pd.Series[Any]) -> str:
    dtype = column.dtype
    name = str(dtype)
    if "date" in name:
        return "date"
    if pd.api.types.is_integer_dtype(dtype):
        return "integer"
    if pd.api.types.is_numeric_dtype(dtype):
        return "float"
    return "string"


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Bring columns of one kind to one type, and number the rows from zero."""
    types: dict[str, Any] = {"date": "datetime64[us]", "integer": "int64", "float": "float64", "string": "str"}
    return frame.reset_index(drop=True).astype({name: types[_kind(frame[name])] for name in frame.columns})


def _equal(left: pd.Series[Any], right: pd.Series[Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    a, b = left.to_numpy(), right.to_numpy()
    if a.dtype.kind == "f":
        return np.asarray(np.isclose(a, b, rtol=RTOL, atol=ATOL, equal_nan=True), dtype=bool)
    return np.asarray((a == b) | (pd.isna(a) & pd.isna(b)), dtype=bool)


def _name(frame: pd.DataFrame, row: Any, key: Sequence[str]) -> str:
    return ", ".join(f"{column}={_show(frame[column].loc[row])}" for column in key)


def _show(value: Any) -> str:
    return str(value.item() if isinstance(value, np.generic) else value)


def _shortened(differences: list[str]) -> list[str]:
    if len(differences) <= SHOWN:
        return differences
    return [*differences[:SHOWN], f"and {len(differences) - SHOWN} more"]
