"""Output partitions by the compiled loop, against Dask's own function, to the bit."""

from __future__ import annotations

import functools
import importlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dask_gpurt.shuffle import hashing
from dask_gpurt.shuffle.hashing import partitioning_index, replacement
from dask_gpurt.shuffle.kernels import Kernels, compile_kernels

#: Where Dask keeps its function, and where it uses it.
HOME, *USERS = (
    importlib.import_module(f"dask.dataframe.{name}") for name in ("shuffle", "dask_expr._shuffle", "dask_expr._merge")
)
STOCK = HOME.partitioning_index
ASSIGN = USERS[0].AssignPartitioningIndex
STOCK_ASSIGN = ASSIGN.operation
kernels = functools.cache(compile_kernels)

NUMBERS = st.sampled_from(
    ["?", "i1", "u1", "i2", "u4", "i8", "u8", "f4", "f8", "f2", "c8", "c16", ">i8", "M8[s]", "m8[ns]"]
)
#: Columns that pandas does not keep as numbers, by what makes so many rows of them.
OTHERS: dict[str, Callable[[int], Any]] = {
    "str": lambda n: pd.Series([f"s{i % 7}" for i in range(n)], dtype="str"),
    "object": lambda n: pd.Series([(1, 2) if i % 2 else "x" for i in range(n)], dtype=object),
    "Int64": lambda n: pd.array([None if i % 3 else i for i in range(n)], dtype="Int64"),
    "category": lambda n: pd.Categorical([f"c{i % 3}" for i in range(n)], categories=["c0", "c1", "c2"]),
    "datetime-tz": lambda n: pd.Series(pd.date_range("2020", periods=n, tz="Asia/Tokyo")),
}


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    rows = draw(st.integers(0, 40))
    columns: dict[int, Any] = {}
    for number in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            columns[number] = draw(hnp.arrays(np.dtype(draw(NUMBERS)), rows))
        else:
            columns[number] = OTHERS[draw(st.sampled_from(sorted(OTHERS)))](rows)
    frame = pd.DataFrame(columns, index=pd.Index(range(5, 5 + rows), name="i"))
    frame.columns = draw(st.sampled_from([frame.columns, pd.Index(["k"] * len(columns))]))
    # Views: every other row, of memory that is not contiguous.
    return frame[:: draw(st.sampled_from([1, 2]))]


COUNTS = st.sampled_from([1, 2, 7, 64, 127, 128, 129, 500, 2**15, 70_001, 2**31 + 5])


@settings(deadline=None)  # the first one compiles
@given(frames(), COUNTS, st.booleans())
def test_rows_go_where_dask_sends_them(frame: pd.DataFrame, npartitions: int, compiled: bool) -> None:
    found = partitioning_index(frame, npartitions, kernels() if compiled else None)
    pd.testing.assert_series_equal(found, STOCK(frame, npartitions))


@st.composite
def keyed_frames(draw: st.DrawFn) -> tuple[pd.DataFrame, Any, pd.DataFrame]:
    """A frame, the labels of its keys, and the empty frame that it is known by, whose types may differ."""
    frame = draw(frames())
    frame.columns = [f"c{number}" for number in range(len(frame.columns))]
    meta = frame.iloc[:0]
    for label in frame.columns:
        kind = draw(st.sampled_from([None, None, "f8", "i4", "Int64", "str"]))
        if kind is not None:
            meta = meta.assign(**{label: pd.Series([], dtype=kind, index=meta.index)})
    labels: Any = draw(
        st.one_of(
            st.lists(st.sampled_from(list(frame.columns)), min_size=1, max_size=3),
            st.sampled_from(["c0", ["c0", "i"], ["i"], ["c0", "missing"]]),
        )
    )
    return frame, labels, meta


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
@settings(deadline=None)
@given(keyed_frames(), COUNTS, st.sampled_from(["_partitions", "c0"]), st.booleans())
def test_frames_get_the_column_that_dask_assigns(
    keyed: tuple[pd.DataFrame, Any, pd.DataFrame], npartitions: int, name: str, compiled: bool
) -> None:
    frame, labels, meta = keyed
    arguments = frame, labels, name, npartitions, meta, False
    try:
        expected = STOCK_ASSIGN(*arguments)
    except ValueError:
        # Of numbers in another order of bytes pandas takes no column twice.
        reject()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "compiled_kernels", kernels if compiled else lambda: None)
        over = hashing._over_assigning(STOCK_ASSIGN)
        pd.testing.assert_frame_equal(over(*arguments), expected)


def test_plain_keys_are_assigned_here_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[Any] = []
    over = hashing._over_assigning(lambda df, index, *_: left.append(index))
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, np.nan], "c": ["x", "y"], "d": pd.array([1, 2], dtype="Int64")})
    frame.index.name = "i"
    for labels in (["a"], ["b", "a"], ["c"]):
        assert over(frame, labels, "p", 3, frame.iloc[:0], False) is not None
    others: list[Any] = ["a", ["d"], ["i"], ["a", "i"], ["a", "a"], [], frame["a"], frame[["a"]]]
    for labels in others:
        over(frame, labels, "p", 3, frame.iloc[:0], False)
    over(frame, ["_index"], "p", 3, frame.iloc[:0], True)
    assert len(left) == len(others) + 1


@pytest.mark.parametrize("rows", [4095, 4096, 4097, 100_003])
@pytest.mark.parametrize("npartitions", [16, 33])
def test_frames_of_many_blocks(rows: int, npartitions: int) -> None:
    rng = np.random.default_rng(rows)
    frame = pd.DataFrame({"a": rng.random(rows), "b": rng.integers(-9, 9, rows), "c": OTHERS["str"](rows)})
    pd.testing.assert_series_equal(partitioning_index(frame, npartitions, kernels()), STOCK(frame, npartitions))


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """Owners whose claims on Dask's functions end with the test."""
    ready: Callable[[], Kernels] = kernels
    monkeypatch.setattr(hashing, "compiled_kernels", ready)
    them: list[object] = [object(), object()]
    yield them
    for owner in them:
        replacement.detach(owner)


def test_dask_is_given_its_function_back_by_the_last_owner(owners: list[object]) -> None:
    for owner in owners:
        replacement.attach(owner)
        replacement.attach(owner)
    over = HOME.partitioning_index
    assert over is not STOCK
    assert all(user.partitioning_index is over for user in USERS)
    assert ASSIGN.operation is not STOCK_ASSIGN
    replacement.detach(owners[0])
    assert HOME.partitioning_index is over
    replacement.detach(owners[1])
    assert all(module.partitioning_index is STOCK for module in (HOME, *USERS))
    assert ASSIGN.operation is STOCK_ASSIGN


def test_what_the_loop_cannot_do_is_left_to_dask(owners: list[object]) -> None:
    replacement.attach(owners[0])
    over = HOME.partitioning_index
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.5, np.nan]})
    for found, expected in (
        (over(frame, 5), STOCK(frame, 5)),
        (over(frame["a"], 5), STOCK(frame["a"], 5)),
        (over(frame, 5, cast_dtype={"a": "f8"}), STOCK(frame, 5, {"a": "f8"})),
    ):
        pd.testing.assert_series_equal(found, expected)
    assert over(pd.Index([1, 2]), 5).tolist() == STOCK(pd.Index([1, 2]), 5).tolist()


def test_graphs_made_here_name_dasks_function(owners: list[object]) -> None:
    replacement.attach(owners[0])
    sent = [pickle.dumps(HOME.partitioning_index), cloudpickle.dumps(USERS[1].partitioning_index)]
    assigning = pickle.dumps(ASSIGN.operation), cloudpickle.dumps(ASSIGN.operation)
    replacement.detach(owners[0])
    assert all(pickle.loads(one) is STOCK for one in sent)
    assert all(pickle.loads(one) is STOCK_ASSIGN for one in assigning)
