"""Frames through split, pack and unpack, against pandas, and against what stock makes of the same frames."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from distributed.shuffle._arrow import buffers_to_table, convert_shards, deserialize_table, serialize_table
from distributed.shuffle._shuffle import split_by_partition, split_by_worker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pandas.api.types import is_object_dtype

from dask_gpurt.shuffle import frames
from dask_gpurt.shuffle.arrow import SMALL_ROWS, decode_table, encode_table
from dask_gpurt.shuffle.kernels import Kernels, compile_kernels
from dask_gpurt.shuffle.plan import PartitionPlan
from dask_gpurt.shuffle.schema import INDEX, Column, Form, Schema
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode

#: Name to a column of so many rows from a random generator.
COLUMNS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "int64": lambda rng, n: rng.integers(-5, 5, n),
    "uint8": lambda rng, n: rng.integers(0, 5, n).astype("u1"),
    "float32": lambda rng, n: rng.random(n).astype("f4"),
    "float64-nan": lambda rng, n: np.where(rng.random(n) < 0.3, np.nan, rng.random(n)),
    "bool": lambda rng, n: rng.random(n) < 0.5,
    "int16": lambda rng, n: rng.integers(-5, 5, n).astype("i2"),
    "complex": lambda rng, n: rng.random(n) + 1j,
    "datetime": lambda rng, n: pd.to_datetime(rng.integers(0, 10**9, n), unit="s"),
    "datetime-ms": lambda rng, n: rng.integers(0, 10**9, n).astype("M8[ms]"),
    "datetime-tz": lambda rng, n: pd.to_datetime(rng.integers(0, 10**9, n), unit="s", utc=True).tz_convert(
        "Asia/Tokyo"
    ),
    "timedelta": lambda rng, n: rng.integers(0, 10**9, n).astype("m8[ns]"),
    "str": lambda rng, n: pd.Series(rng.choice(["", "a", "bb", "ü"], n), dtype="str"),
    "object-str": lambda rng, n: pd.Series([["x", None, "zz"][i] for i in rng.integers(0, 3, n)], dtype=object),
    "string[python]": lambda rng, n: pd.Series([["a", None][i] for i in rng.integers(0, 2, n)], dtype="string[python]"),
    "string[pyarrow]": lambda rng, n: pd.Series(
        [["a", None][i] for i in rng.integers(0, 2, n)], dtype="string[pyarrow]"
    ),
    "bytes": lambda rng, n: pd.Series([bytes([i]) for i in rng.integers(0, 3, n)], dtype=object),
    "date": lambda rng, n: pd.Series([dt.date(2020, 1, 1 + i) for i in rng.integers(0, 3, n)], dtype=object),
    "list": lambda rng, n: pd.Series([list(range(i)) for i in rng.integers(0, 3, n)], dtype=object),
    "Int64": lambda rng, n: pd.array(rng.integers(0, 5, n), dtype="Int64"),
    "Float32": lambda rng, n: pd.array(rng.random(n), dtype="Float32"),
    "boolean": lambda rng, n: pd.array([[None, True, False][i] for i in rng.integers(0, 3, n)], dtype="boolean"),
    "int32[pyarrow]": lambda rng, n: pd.array(rng.integers(0, 5, n), dtype=pd.ArrowDtype(pa.int32())),
    "list[pyarrow]": lambda rng, n: pd.array(
        [list(range(i)) for i in rng.integers(0, 3, n)], dtype=pd.ArrowDtype(pa.list_(pa.int64()))
    ),
    "struct[pyarrow]": lambda rng, n: pd.array(
        [{"x": int(i)} for i in rng.integers(0, 3, n)], dtype=pd.ArrowDtype(pa.struct([("x", pa.int64())]))
    ),
    "category": lambda rng, n: pd.Categorical(rng.choice(["a", "b", "c"], n), categories=["a", "b", "c"]),
    "category-ordered": lambda rng, n: pd.Categorical(rng.choice([3, 1], n), categories=[3, 2, 1], ordered=True),
    "period": lambda rng, n: pd.PeriodIndex.from_ordinals(rng.integers(0, 100, n), freq="D"),
    "interval": lambda rng, n: pd.arrays.IntervalArray.from_breaks(np.arange(n + 1)),
}
#: Types that pandas keeps in Arrow arrays or as NumPy's with a mask, of all shapes that such an array can have. What
#: stock makes of some of them is another type.
EXACT: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "str-long": lambda rng, n: pd.Series(words(rng, n), dtype="str"),
    "str-huge": lambda rng, n: pd.Series(["x" * int(k) for k in rng.choice([0, 1, 300, 70_000], n)], dtype="str"),
    "str-sliced": lambda rng, n: pd.Series([*words(rng, n + 3), "not this one"], dtype="str").iloc[3 : n + 3],
    "str-chunked": lambda rng, n: pd.concat([pd.Series(words(rng, k), dtype="str") for k in (n // 2, n - n // 2)]),
    "str-missing": lambda rng, n: pd.Series([None] * n, dtype="str"),
    "str-empty": lambda rng, n: pd.Series([""] * n, dtype="str"),
    "string-long": lambda rng, n: pd.Series(words(rng, n), dtype="string[pyarrow]"),
    "bytes-behind-nulls": lambda rng, n: arrow(behind_nulls(rng, n)),
    "utf8": lambda rng, n: arrow(pa.array(words(rng, n), pa.string())),
    "utf8-sliced": lambda rng, n: arrow(pa.array(words(rng, n + 9), pa.string()).slice(9)),
    "binary": lambda rng, n: arrow(pa.array([word and word.encode() for word in words(rng, n)], pa.binary())),
    "large-binary": lambda rng, n: arrow(pa.array([bytes([i, 0]) for i in rng.integers(0, 9, n)], pa.large_binary())),
    "flags": lambda rng, n: arrow(
        pa.array([[True, False, None][i] for i in rng.integers(0, 3, n + 5)], pa.bool_()).slice(5)
    ),
    "flags-full": lambda rng, n: arrow(pa.array(rng.random(n) < 0.5)),
    "date32": lambda rng, n: arrow(pa.array(numbers(rng, n + 3), pa.int32()).cast(pa.date32()).slice(3)),
    "time64": lambda rng, n: arrow(pa.array(numbers(rng, n), pa.int64()).cast(pa.time64("us"))),
    "timestamp-zone": lambda rng, n: arrow(pa.array(numbers(rng, n), pa.timestamp("ms", "Europe/Rome"))),
    "decimal": lambda rng, n: arrow(pa.array(numbers(rng, n), pa.int64()).cast(pa.decimal128(25, 2))),
    "float16": lambda rng, n: arrow(pa.array(rng.random(n).astype("f2"))),
    "Int8-nulls": lambda rng, n: pd.array(numbers(rng, n, 100), dtype="Int8"),
    "UInt32": lambda rng, n: pd.array(numbers(rng, n), dtype="UInt32"),
    "Float64-nulls": lambda rng, n: pd.array(numbers(rng, n), dtype="Float64"),
    "datetime-tz-nat": lambda rng, n: pd.DatetimeIndex(numbers(rng, n), tz="America/Lima").as_unit("us"),
    "category-missing": lambda rng, n: pd.Categorical(
        [["a", None, "c"][i] for i in rng.integers(0, 3, n)], categories=["c", "b", "a"]
    ),
}


def arrow(array: pa.Array) -> pd.api.extensions.ExtensionArray:
    return pd.arrays.ArrowExtensionArray(array)


def words(rng: np.random.Generator, n: int) -> list[str | None]:
    made = [None if rng.random() < 0.2 else "aßξ語🦜"[rng.integers(5)] * rng.integers(25) for _ in range(n)]
    return [made[i] for i in rng.integers(0, n, n)] if n else []


def numbers(rng: np.random.Generator, n: int, limit: int = 10**6) -> list[int | None]:
    return [None if rng.random() < 0.2 else int(rng.integers(limit)) for _ in range(n)]


def behind_nulls(rng: np.random.Generator, n: int) -> pa.Array:
    """Null is what is not valid, whatever the offsets say."""
    full = pa.array([b"secret" * i for i in rng.integers(0, 3, n)], pa.large_binary())
    valid = np.packbits(rng.random(n) < 0.5, bitorder="little")
    return pa.Array.from_buffers(full.type, n, [pa.py_buffer(valid), *full.buffers()[1:]])


INDEXES: dict[str, Callable[[np.random.Generator, int], pd.Index]] = {
    "range": lambda _, n: pd.RangeIndex(n),
    "shifted": lambda _, n: pd.RangeIndex(5, 5 + 2 * n, 2, name="i"),
    "int": lambda rng, n: pd.Index(rng.integers(0, 5, n), name="j"),
    "str": lambda rng, n: pd.Index(rng.choice(["a", "b"], n), name="name", dtype="str"),
    "datetime": lambda rng, n: pd.DatetimeIndex(pd.to_datetime(rng.integers(0, 10**9, n), unit="s")),
}
#: Likewise.
EXACT_INDEXES: dict[str, Callable[[np.random.Generator, int], pd.Index]] = {
    "str-missing": lambda rng, n: pd.Index(words(rng, n), dtype="str", name="s"),
    "utf8": lambda rng, n: pd.Index(arrow(pa.array(words(rng, n), pa.string()))),
    "zone": lambda rng, n: pd.DatetimeIndex(numbers(rng, n), tz="UTC", name="t").as_unit("s"),
    "Int64": lambda rng, n: pd.Index(numbers(rng, n), dtype="Int64", name=("a", 1)),
    "category": lambda rng, n: pd.CategoricalIndex(rng.choice(["x", "y"], n), categories=["y", "x", "z"], name="c"),
    "levels": lambda rng, n: pd.MultiIndex.from_arrays(
        [pd.Index(rng.choice(["a", "b"], n), dtype="str"), rng.integers(0, 9, n)], names=["l", None]
    ),
}
PARTITION = "_partitions"
#: Types that stock cannot bring back.
NEW = {"list[pyarrow]", "struct[pyarrow]", "complex"}


def ours(
    parts: list[pd.DataFrame],
    worker_for: dict[int, str],
    *,
    drop: bool,
    together: int,
    kernels: Kernels | None = None,
    repaired: bool = False,
) -> dict[int, pd.DataFrame]:
    """Shuffle as our runs do: split, send, pack ``together`` parcels at a time, unpack.

    If it is ``repaired``, every other parcel is cut by output on its way, and the others' outputs with odd numbers were taken over.
    """
    meta = parts[0].iloc[:0]
    if drop:
        meta = meta.drop(columns=[PARTITION])
    plan = PartitionPlan.build(worker_for)
    arrived: dict[str, list[Parcel]] = defaultdict(list)
    taken_over = PartitionPlan.build(worker_for, {partition for partition in worker_for if partition % 2})
    for number, part in enumerate(parts):
        shards: list[tuple[str, Header, Any]] = []
        for address, sent, view in frames.split(
            part, number, PARTITION, taken_over if repaired and number % 2 else plan, meta, kernels=kernels
        ):
            if not repaired or number % 2:
                shards.append((address, sent, view))
                continue
            for partition, header, body in frames.cut(Parcel(sent, view, sent.body_nbytes)):
                assert header.segments[:, 0].tolist() == [partition]
                shards.append((worker_for[partition], header, body))
        if repaired and number % 2:
            assert all(len(sent.segments) == 1 for _, sent, _ in shards if sent.segments[0, 0] % 2)
        for address, sent, view in shards:
            body = bytes(view)
            header = decode(encode(sent), body)
            frames.check_parcel(
                header, {partition for partition in worker_for if worker_for[partition] == address}.__contains__
            )
            arrived[address].append(Parcel(header, body, len(body)))
    stored: dict[Any, list[Any]] = defaultdict(list)
    for parcels in arrived.values():
        parcels.reverse()  # They may arrive in any order.
        for first in range(0, len(parcels), together):
            some = parcels[first : first + together]
            for partition, buffers in filter(None, map(frames.ready, some)):
                stored[partition] += buffers
            small = [parcel for parcel in some if frames.ready(parcel) is None]
            for packed, buffers in (frames.pack(small) if small else {}).items():
                stored[packed] += buffers
    return {partition: frames.join(buffers, meta) for partition, buffers in stored.items()}


def stock(parts: list[pd.DataFrame], worker_for: dict[int, str], *, drop: bool) -> dict[int, pd.DataFrame]:
    """Shuffle with stock's functions."""
    meta = parts[0].iloc[:0]
    workers = pd.Series(worker_for, name="_workers").astype("category")
    sent: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    for number, part in enumerate(parts):
        for address, table in split_by_worker(part, PARTITION, meta, workers).items():
            sent[address].append((number, serialize_table(table)))
    shards: dict[int, list[pa.Table]] = defaultdict(list)
    for data in sent.values():
        for partition, table in split_by_partition(buffers_to_table(data), PARTITION, drop).items():
            shards[int(partition)].append(deserialize_table(serialize_table(table)))
    return {partition: convert_shards(tables, meta, PARTITION, drop) for partition, tables in shards.items()}


def table_of(names: list[str], index: str, seed: int, sizes: list[int], outputs: int) -> list[pd.DataFrame]:
    rng = np.random.default_rng(seed)
    makers, indexes = COLUMNS | EXACT, INDEXES | EXACT_INDEXES
    parts = []
    for size in sizes:
        columns: dict[Any, Any] = {name: makers[name](rng, size) for name in names}
        columns[PARTITION] = rng.integers(0, outputs, size)
        part = pd.DataFrame({name: pd.Series(column).reset_index(drop=True) for name, column in columns.items()})
        part.index = indexes[index](rng, size)
        parts.append(part)
    return parts


def check(parts: list[pd.DataFrame], worker_for: dict[int, str], *, drop: bool, together: int) -> None:
    expected = stock(parts, worker_for, drop=drop)
    for kernels in (None, compiled()):
        found = ours(parts, worker_for, drop=drop, together=together, kernels=kernels)
        assert found.keys() == expected.keys()
        for partition, frame in found.items():
            if isinstance(parts[0].index.dtype, pd.StringDtype):
                # Beside a column of other strings stock makes its strings of the index, too.
                assert frame.index.dtype == parts[0].index.dtype
                expected[partition].index = expected[partition].index.astype(parts[0].index.dtype)
            pd.testing.assert_frame_equal(same_missing(frame), same_missing(expected[partition]))
        check_with_pandas(found, parts, drop=drop)


compiled = functools.cache(compile_kernels)


def same_missing(frame: pd.DataFrame) -> pd.DataFrame:
    """Arrow does not tell None from NaN among objects; stock gives the one or the other."""
    return pd.DataFrame(
        {
            place: column.where(column.notna(), None) if is_object_dtype(column.dtype) else column
            for place, (_, column) in enumerate(frame.items())
        }
    ).set_axis(frame.columns, axis=1)


def check_with_pandas(found: dict[int, pd.DataFrame], parts: list[pd.DataFrame], *, drop: bool) -> None:
    for partition, frame in found.items():
        rows = pd.concat([part[part[PARTITION] == partition] for part in parts])
        if drop:
            rows = rows.drop(columns=[PARTITION])
        pd.testing.assert_frame_equal(
            same_missing(frame), same_missing(rows), check_index_type=False, check_categorical=False
        )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(sorted(set(COLUMNS) - NEW)), unique=True, max_size=5),
    st.sampled_from(sorted(INDEXES)),
    st.integers(0, 2**32),
    st.lists(st.integers(0, 30), min_size=1, max_size=5),
    st.dictionaries(st.integers(0, 6), st.sampled_from("ab"), min_size=1),
    st.booleans(),
    st.integers(1, 3),
)
def test_any_frame_is_shuffled_as_stock_does(  # noqa: PLR0917  Hypothesis passes them by position
    names: list[str], index: str, seed: int, sizes: list[int], worker_for: dict[int, str], drop: bool, together: int
) -> None:
    check(table_of(names, index, seed, [s + 1 for s in sizes], 7), worker_for, drop=drop, together=together)


def check_exactly(parts: list[pd.DataFrame], worker_for: dict[int, str], *, drop: bool, together: int) -> None:
    for kernels, repaired in ((None, False), (compiled(), False), (None, True)):
        found = ours(parts, worker_for, drop=drop, together=together, kernels=kernels, repaired=repaired)
        assert found.keys() == worker_for.keys() & set().union(*(part[PARTITION] for part in parts))
        for partition, frame in found.items():
            rows = pd.concat([part[part[PARTITION] == partition] for part in parts])
            pd.testing.assert_frame_equal(frame, rows.drop(columns=[PARTITION]) if drop else rows, check_exact=True)


#: What loses nothing, and what Python's objects are not, of which there are two kinds of missing ones.
WHOLE = sorted({*EXACT, *COLUMNS} - {"object-str", "bytes", "date", "list", "string[python]"})


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(WHOLE), unique=True, max_size=6),
    st.sampled_from(sorted({*INDEXES, *EXACT_INDEXES})),
    st.integers(0, 2**32),
    st.lists(st.integers(1, 60), min_size=1, max_size=5),
    st.dictionaries(st.integers(0, 6), st.sampled_from("ab"), min_size=1),
    st.booleans(),
    st.integers(1, 3),
)
def test_any_frame_comes_back_as_pandas_has_it(  # noqa: PLR0917  Hypothesis passes them by position
    names: list[str], index: str, seed: int, sizes: list[int], worker_for: dict[int, str], drop: bool, together: int
) -> None:
    check_exactly(table_of(names, index, seed, sizes, 7), worker_for, drop=drop, together=together)


@pytest.mark.parametrize("index", sorted(EXACT_INDEXES))
@pytest.mark.parametrize("name", [name for name in WHOLE if name != "str-huge"])
def test_every_type_comes_back_as_pandas_has_it(name: str, index: str) -> None:
    parts = table_of([name], index, 0, [40, 1, 30], 4)
    check_exactly(parts, {0: "a", 1: "a", 2: "b", 3: "b"}, drop=True, together=2)


@pytest.mark.parametrize("name", [*EXACT, "str", "string[pyarrow]", "Int64", "boolean", "category", "datetime-tz"])
def test_what_is_taken_apart_does_not_go_by_arrow(name: str) -> None:
    (part,) = table_of([name], "str-missing", 0, [40], 1)
    ((_, header, _),) = frames.split(part, 0, PARTITION, PartitionPlan.build({0: "a"}), part.iloc[:0])
    assert not Schema.parse(header.extra).stream


@pytest.mark.parametrize("name", sorted(set(COLUMNS) - NEW))
def test_every_type_is_shuffled_as_stock_does(name: str) -> None:
    parts = table_of([name], "range", 0, [40, 1, 30], 4)
    check(parts, {0: "a", 1: "a", 2: "b", 3: "b"}, drop=True, together=2)


def test_large_shards_are_sliced_rather_than_gathered() -> None:
    size = 3 * SMALL_ROWS
    parts = table_of(["int64", "str"], "range", 1, [size, size, size], 2)
    check(parts, {0: "a", 1: "b"}, drop=True, together=2)


def test_categories_may_differ_between_partitions() -> None:
    parts = [
        pd.DataFrame({"c": pd.Categorical(values), PARTITION: [0] * len(values)})
        for values in (["a", "b"], ["z"], ["b", "y", "a"])
    ]
    found = ours(parts, {0: "b"}, drop=True, together=2)[0]
    assert found["c"].tolist() == ["a", "b", "z", "b", "y", "a"]
    assert set(found["c"].cat.categories) == {"a", "b", "y", "z"}


@pytest.mark.parametrize("together", [1, 2])
def test_a_column_may_be_all_missing_in_one_partition(together: int) -> None:
    parts = [
        pd.DataFrame({"o": pd.Series(values, dtype=object), PARTITION: 0}) for values in ([None, None], ["x", "y"])
    ]
    found = ours(parts, {0: "b"}, drop=True, together=together)[0]
    pd.testing.assert_frame_equal(found, stock(parts, {0: "b"}, drop=True)[0])
    assert found["o"].isna().tolist() == [True, True, False, False]
    assert found["o"].tolist()[2:] == ["x", "y"]


@pytest.mark.parametrize("name", sorted(NEW))
def test_nested_types_are_shuffled_though_stock_cannot(name: str) -> None:
    parts = table_of(["int64", name, "str"], "int", 0, [40, 1, 30], 4)
    check_with_pandas(ours(parts, {0: "a", 1: "a", 2: "b", 3: "b"}, drop=True, together=2), parts, drop=True)


@pytest.mark.parametrize("names", [[0, 1], [("a", 1), ("a", 2)], [None, 2.5], ["a", "a"]], ids=str)
def test_columns_need_not_be_named_by_different_strings(names: list[Any]) -> None:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [4.0, 5.0, 6.0], "c": [0, 1, 0]})
    frame.columns = pd.Index([*names, PARTITION], tupleize_cols=False, dtype=object)
    frame.index = pd.Index([7, 8, 9], name=5)
    check_with_pandas(ours([frame], {0: "a", 1: "b"}, drop=True, together=1), [frame], drop=True)


def test_columns_may_stand_in_another_order() -> None:
    parts = [pd.DataFrame({"a": [1], "b": ["x"], PARTITION: 0}), pd.DataFrame({"b": ["y"], PARTITION: 0, "a": [2]})]
    found = ours(parts, {0: "b"}, drop=True, together=2)[0]
    assert found.to_dict("list") == {"a": [1, 2], "b": ["x", "y"]}


@pytest.mark.parametrize("dtype", ["Int64", "int64[pyarrow]", "float64", "bool", "category"])
def test_partition_ids_of_other_types(dtype: str) -> None:
    frame = pd.DataFrame({"a": range(4), PARTITION: pd.Series([1, 0, 1, 0]).astype(dtype)})
    found = ours([frame], {0: "a", 1: "b"}, drop=True, together=1)
    assert found[0]["a"].tolist() == [1, 3]
    assert found[1]["a"].tolist() == [0, 2]


def test_a_body_that_is_none_is_refused() -> None:
    table = pa.table({"a": [1, 2]})
    with pytest.raises(WireError, match="Arrow"):
        decode_table(b"nothing", 0)
    with pytest.raises(WireError, match="rows"):
        decode_table(bytes(encode_table(table)), 3)
    token = Schema(
        (Column(0, Form.PLAIN, np.dtype("i8")), Column(INDEX, Form.PLAIN, np.dtype("i8"))), None, (), stream=False
    ).token
    header = Header(Kind.FRAME, (0,), np.array([[5, 2]]), 32, token)
    frames.check_parcel(header, lambda partition: partition == 5)
    with pytest.raises(WireError, match="not held"):
        frames.check_parcel(header, lambda partition: partition == 4)
    with pytest.raises(WireError, match="expected"):
        frames.check_parcel(Header(Kind.BRICK, (0,), np.array([[5, 2]]), 32, token), lambda _: True)
    for nbytes in (31, 33):
        with pytest.raises(WireError, match="take 32 bytes"):
            frames.check_parcel(Header(Kind.FRAME, (0,), np.array([[5, 2]]), nbytes, token), lambda _: True)
        with pytest.raises(WireError, match="take 32 bytes"):
            Schema.parse(token).read(bytes(nbytes), 2)
    with pytest.raises(WireError, match="alternate"):
        frames.join([b""], pd.DataFrame())
    packed = encode(
        Header(
            Kind.FRAME,
            (0,),
            np.array([[0, 2]]),
            16,
            Schema((Column(INDEX, Form.PLAIN, np.dtype("i8")),), None, (), stream=False).token,
        )
    )
    with pytest.raises(WireError, match="1 columns were expected"):
        frames.join([packed, bytes(16)], pd.DataFrame({"a": [1]}))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[[], null, [], false]",
        b'[[[0, "O"]], null, [], true]',
        b'[[[1, "<i8"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "<i8"], [0, "<i8"], [-1, "<i8"]], null, [], false]',
        b'[[[-1, "<i8"], [-1, "<i8"]], null, [], false]',
        b'[[[-1, "<i8"]], null, [0], false]',
        b'[[[0, "<M8"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "t<i4"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "t<f4"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "a<f8"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "a|V24"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "a<i8,<i8"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "c<u1"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "c|i1?"], [-1, "<i8"]], null, [], false]',
        b'[[[0, "<i8?"], [-1, "<i8"]], null, [], false]',
        b'[[[1, "<i8"], [0, "<i8"], [-1, "<i8"]], null, [], false]',
        b'[[[-1, "<i8"], [0, "<i8"]], null, [], false]',
        b"[" * 60000,
    ],
)
def test_a_schema_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(WireError):
        Schema.parse(content)


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_schema_makes_the_parser_fail_in_another_way(content: bytes) -> None:
    with contextlib.suppress(WireError):
        Schema.parse(content)


#: A schema with a column of each form, and the frame that it describes.
FORMS = table_of(["int64", "str", "utf8", "date32", "Int64", "flags", "category"], "str-missing", 0, [6], 1)[0]


@given(st.data())
def test_no_body_makes_join_fail_in_another_way(data: st.DataObject) -> None:
    ((_, header, body),) = frames.split(FORMS, 0, PARTITION, PartitionPlan.build({0: "a"}), FORMS.iloc[:0])
    changed = bytearray(body)
    for place in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=5)):
        changed[place] = data.draw(st.integers(0, 255))
    changed = data.draw(st.sampled_from([changed, changed[:-1], changed + b"x"]))
    with contextlib.suppress(WireError):
        frame = frames.join([encode(replace(header, body_nbytes=len(changed))), changed], FORMS.iloc[:0])
        assert len(changed) == header.body_nbytes
        assert len(frame) == 6
        assert frame.dtypes.equals(FORMS.dtypes)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    frame = pd.DataFrame({"a": pd.Series(["bb", "c"], dtype="str"), PARTITION: 0})
    ((_, header, body),) = frames.split(frame, 0, PARTITION, PartitionPlan.build({0: "a"}), frame.iloc[:0])
    schema = Schema.parse(header.extra)
    lengths = bytes(body).index(b"\x02\x01bbc")
    assert bytes(schema.read(body, 2).texts[0]) == b"bbc"
    for wrong in (b"\x02\x00", b"\x02\x02", b"\xff\xff"):
        changed = bytearray(body)
        changed[lengths : lengths + 2] = wrong
        with pytest.raises(WireError, match="strings take"):
            schema.read(changed, 2)
        with pytest.raises(WireError, match="strings take"):
            frames.join([encode(header), changed], frame.iloc[:0])


def test_columns_of_another_form_than_expected_are_refused() -> None:
    frame = pd.DataFrame({"a": pd.Series(["bb", "c"], dtype="str"), PARTITION: 0})
    ((_, header, body),) = frames.split(frame, 0, PARTITION, PartitionPlan.build({0: "a"}), frame.iloc[:0])
    for dtype in ("int64", "Int8", "category", "object"):
        with pytest.raises(WireError, match=rf"a column of {dtype} was expected"):
            frames.join([encode(header), body], frame.iloc[:0].astype({"a": dtype}))


def test_strings_of_other_widths_and_with_nulls_in_one_partition_only_are_joined_without_arrow() -> None:
    columns = [["a", "bb"], ["c" * 300, None], ["d" * 70_000, ""], ["é", "f"]]
    parts = [pd.DataFrame({"a": pd.Series(column, dtype="str"), PARTITION: [0, 1]}) for column in columns]
    check_exactly(parts, {0: "a", 1: "b"}, drop=True, together=1)
    plan = PartitionPlan.build({0: "a", 1: "b"})
    schemas = [
        Schema.parse(header.extra)
        for part in parts
        for _, header, _ in frames.split(part, 0, PARTITION, plan, parts[0].iloc[:0])
    ]
    assert len({schema.token for schema in schemas}) > 2
    assert len({schema.family for schema in schemas}) == 1


def test_strings_and_objects_of_strings_may_meet() -> None:
    parts = [
        pd.DataFrame({"a": pd.Series(["x", "y"], dtype=dtype), "n": [1, 2], PARTITION: [0, 1]})
        for dtype in ("str", "object", "string[pyarrow]", "str")
    ]
    found = ours(parts, {0: "a", 1: "b"}, drop=True, together=2)
    expected = stock(parts, {0: "a", 1: "b"}, drop=True)
    for partition in (0, 1):
        pd.testing.assert_frame_equal(found[partition], expected[partition])


def test_large_shards_have_bodies_of_their_own() -> None:
    parts = table_of(["int64", "float32", "str", "datetime"], "shifted", 0, [60_000, 50_000], 4)
    plan = PartitionPlan.build({0: "a", 1: "a", 2: "b", 3: "b"})
    shards = frames.split(parts[0], 7, PARTITION, plan, parts[0].iloc[:0])
    assert [header.segments[:, 0].tolist() for _, header, _ in shards] == [[0], [1], [2], [3]]
    assert len({id(body.obj) for _, _, body in shards}) == 4
    check(parts, {0: "a", 1: "a", 2: "b", 3: "b"}, drop=True, together=2)


@pytest.mark.parametrize("size", [10, 200_000])
def test_types_may_differ_between_partitions(size: int) -> None:
    whole = pd.DataFrame({"a": np.arange(size), "b": ["x"] * size, PARTITION: np.arange(size) % 2})
    half = pd.DataFrame({"a": np.arange(size) / 2, "b": ["y"] * size, PARTITION: 0})
    found = ours([whole, half], {0: "a", 1: "b"}, drop=True, together=1)
    expected = stock([whole, half], {0: "a", 1: "b"}, drop=True)
    for partition in (0, 1):
        pd.testing.assert_frame_equal(found[partition], expected[partition])


def test_duplicate_names_and_an_index_of_several_levels() -> None:
    frame = pd.DataFrame({"a": range(6), "b": list("uvwxyz"), PARTITION: [0, 1] * 3})
    frame.index = pd.MultiIndex.from_arrays([list("aabbcc"), range(6)], names=["l", None])
    frame.columns = pd.Index(["a", "a", PARTITION])
    check_with_pandas(ours([frame], {0: "a", 1: "b"}, drop=False, together=1), [frame], drop=False)
