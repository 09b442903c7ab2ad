"""What fuzzing has found (tests/property/test_fuzz.py), and what it is not likely to: each refused by an error of ours."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from dask_gpurt.shuffle import bricks, frames
from dask_gpurt.shuffle.arrow import decode_table, encode_table, to_frame
from dask_gpurt.shuffle.schema import Column, Form, Schema
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.sizes import TABLE_SIZE_MAX, Sample
from dask_gpurt.shuffle.wire import MESSAGE_NBYTES_MAX, Header, Kind, WireError, check_nbytes, check_sizes

TOKEN = Schema((Column(0, Form.PLAIN, np.dtype("<i8")), Column(-1, Form.PLAIN, np.dtype("<i8"))), None, (), False).token


def frame_header(segments: list[list[int]], nbytes: int, token: bytes = TOKEN) -> Header:
    return Header(Kind.FRAME, (0,), np.array(segments, dtype=np.int64).reshape(-1, 2), nbytes, token)


@pytest.mark.parametrize(
    ("segments", "nbytes"),
    [
        ([], 0),
        # In 64 bits, these are five rows.
        ([[0, 2**63 - 1], [1, 2**63 - 1], [0, 7]], 80),
        ([[0, 2**62]] * 4 + [[0, 5]], 80),
        ([[0, 2**31]], 80),
    ],
)
def test_rows_that_no_body_has(segments: list[list[int]], nbytes: int) -> None:
    frames.check_parcel(frame_header([[0, 5]], 80), {0, 1}.__contains__)
    with pytest.raises(WireError):
        frames.check_parcel(frame_header(segments, nbytes), {0, 1}.__contains__)


def test_rows_that_take_no_bytes_are_bounded_by_the_stream() -> None:
    nothing = Schema((), None, (0,), True).token
    frames.check_parcel(frame_header([[0, 1000]], 640, nothing), {0}.__contains__)
    with pytest.raises(WireError, match="has no 1000000 rows"):
        frames.check_parcel(frame_header([[0, 10**6]], 640, nothing), {0}.__contains__)


@pytest.mark.parametrize(
    "columns",
    [
        [[0, ",f8"], [-1, "<i8"]],
        [[0, "(2,)f8"], [-1, "<i8"]],
        [[0, "f8,f8"], [-1, "<i8"]],
        [[0, "<M8[25s]"], [-1, "<i8"]],
        [[0, "<M8"], [-1, "<i8"]],
        [[0, "<f8"], [-1, "<f2"]],
        [[float("inf"), "<f8"], [-1, "<i8"]],
        [[0, "|O8"], [-1, "<i8"]],
        [[0, "<i8"], [-1, "<i8"], [-1, "<i8"]],
        [[10**30, "<i8"], [-1, "<i8"]],
    ],
)
def test_columns_that_no_frame_has(columns: list[list[Any]]) -> None:
    assert Schema.parse(TOKEN).width == 1
    with pytest.raises(WireError):
        Schema.parse(json.dumps([columns, None, [], False]).encode())


def test_an_index_of_one_level_where_several_were_agreed_on() -> None:
    meta = pd.DataFrame({"x": [1]}, index=pd.MultiIndex.from_arrays([[1], [2]])).iloc[:0]
    header, body = frame_header([[0, 2]], 32), bytes(32)
    ((_, buffers),) = frames.pack([Parcel(header, body, 32)]).items()
    with pytest.raises(WireError, match="2 levels"):
        frames.join(buffers, meta)


# Arrow


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_stream_that_is_compressed_within_is_not_opened(codec: str) -> None:
    rows = 2**24
    bomb = stream(pa.table({"0": np.zeros(rows)}), compression=codec)
    assert len(bomb) < rows / 8
    before = pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()
    with pytest.raises(WireError, match="compressed"):
        decode_table(bomb, rows)
    assert (pa.total_allocated_bytes(), pa.default_memory_pool().max_memory()) == before


def test_a_dictionary_that_is_compressed_within_is_not_opened() -> None:
    words = pa.array(["x" * 10_000, "y" * 10_000]).dictionary_encode()
    assert decode_table(stream(pa.table({"0": words})), 2).num_rows == 2
    with pytest.raises(WireError, match="compressed"):
        decode_table(stream(pa.table({"0": words}), compression="zstd"), 2)


def test_offsets_that_lead_out_of_a_stream_are_not_followed() -> None:
    table = pa.table({"0": ["abc", "de", "f"]})
    good = bytes(encode_table(table))
    offsets = np.array([0, 3, 5, 6], dtype="<i4").tobytes()
    assert good.count(offsets) == 1
    for wrong in ([0, 3, 2**30, 6], [0, -5, 5, 6], [0, 3, 5, 2**31 - 1]):
        with pytest.raises(WireError, match="not an Arrow stream"):
            decode_table(good.replace(offsets, np.array(wrong, dtype="<i4").tobytes()), 3)


@pytest.mark.parametrize(
    "said", [b"{", b"[]", b"\xff", b'{"columns": 7}', b'{"index_columns": ["no such"], "columns": []}']
)
def test_metadata_for_pandas_that_are_none(said: bytes) -> None:
    meta = pd.DataFrame({"o": pd.Series([], dtype=object)})
    table = pa.table({"0": ["a", None]}).replace_schema_metadata({b"pandas": said})
    with pytest.raises(WireError, match="no table of the columns"):
        to_frame(decode_table(encode_table(table), 2), meta)


def test_a_table_of_other_columns() -> None:
    meta = pd.DataFrame({"o": pd.Series([], dtype=object), "a": pd.array([], dtype=pd.ArrowDtype(pa.list_(pa.int8())))})
    with pytest.raises(WireError, match="no table of the columns"):
        to_frame(pa.table({"0": ["a"]}), meta)


# Arrays


def test_the_same_place_twice_is_not_one_shard() -> None:
    segments = np.array([[0, 0, 2], [0, 0, 2]])
    header = Header(Kind.BRICK, (0,), segments, 32, b"'<f8'")
    bricks.check_parcel(header, {(0,)}.__contains__)
    ((_, buffers),) = bricks.pack([Parcel(header, bytes(32), 32)]).items()
    with pytest.raises(WireError, match="twice"):
        bricks.unpack(buffers)


@pytest.mark.parametrize("text", ["-" * 60_000 + "1", "(" * 60_000, "1" + "+1" * 30_000, "[(" * 20_000])
def test_dtypes_that_would_take_all_of_the_stack(text: str) -> None:
    with pytest.raises(WireError):
        bricks.dtype_of(text.encode())


# What is said beside headers


@pytest.mark.parametrize("nbytes", [-1, MESSAGE_NBYTES_MAX + 1, True, 1.0, "1", None, 2**64])
def test_sizes_that_no_message_has(nbytes: Any) -> None:
    check_nbytes(MESSAGE_NBYTES_MAX)
    with pytest.raises(WireError):
        check_nbytes(nbytes)
    with pytest.raises(WireError):
        check_sizes([0, nbytes], None, 2)


@pytest.mark.parametrize(
    ("sizes", "libraries"),
    [
        (None, None),
        (7, None),
        ([1], None),
        ([1, 2, 3], None),
        ([MESSAGE_NBYTES_MAX, 1], None),
        ([1, 2], ["cupy"]),
        ([1, 2], "ab"),
        ([1, 2], ["", 7]),
    ],
)
def test_announcements_that_are_none(sizes: Any, libraries: Any) -> None:
    check_sizes([1, 2], None, 2)
    check_sizes((1, 2), ["", "cupy"], 2)
    with pytest.raises(WireError):
        check_sizes(sizes, libraries, 2)


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": b"abc"},
        {"rows": bytes(4 * TABLE_SIZE_MAX + 4)},
        {"rows": None},
        {"nbytes": -1},
        {"nbytes": "many"},
        {"column": 7},
    ],
)
def test_samples_that_are_none(changed: dict[str, Any]) -> None:
    good = Sample("to", 10, np.array([1, 2])).to_message()
    assert Sample.from_message(good).rows.tolist() == [1, 2]
    with pytest.raises(WireError):
        Sample.from_message({**good, **changed})
    with pytest.raises(WireError):
        Sample.from_message({})
