"""Frames on a device as shards, and the registers of libraries; cuDF itself is covered by tests on a GPU."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import device_standin
import numpy as np
import pandas as pd
import pytest

from dask_gpurt.shuffle import device, tables
from dask_gpurt.shuffle.device import DeviceBody
from dask_gpurt.shuffle.libraries import LibraryMissingError
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode

WORKER_FOR = {0: "a", 1: "b", 2: "a", 5: "b"}


def frame(seed: int, rows: int = 40_000) -> device_standin.Frame:
    rng = np.random.default_rng(seed)
    part = rng.choice([0, 1, 2, 5, 9], rows, p=[0.6, 0.38, 0.01, 0.005, 0.005])
    return device_standin.Frame({"part": part, "x": rng.random(rows)}, index=np.arange(rows) + seed * rows)


def split(data: Any, number: int) -> list[tuple[str, Header, Any]]:
    return tables.split(
        device_standin.Frames(),
        data,
        number,
        "part",
        worker_for=WORKER_FOR,
        meta=frame(0, 0)[["x"]],
        allocate=lambda nbytes: memoryview(bytearray(nbytes)),
    )


def test_a_frame_is_split_packed_and_joined() -> None:
    frames = [frame(number) for number in range(3)]
    stored: dict[Any, list[Any]] = defaultdict(list)
    sizes = set()
    # As if the last had arrived first.
    for number, data in reversed(list(enumerate(frames))):
        parcels = []
        for address, header, body in split(data, number):
            found = decode(encode(header), body)
            held = {part for part, owner in WORKER_FOR.items() if owner == address}
            tables.check_parcel(found, held.__contains__, frame(0, 0)[["x"]])
            assert isinstance(body, DeviceBody) is (header.body_nbytes >= device.SMALL_NBYTES)
            parcels.append(Parcel(found, body, found.body_nbytes))
        small = []
        for parcel in parcels:
            done = tables.ready(parcel)
            if done is None:
                small.append(parcel)
            else:
                stored[done[0]] += done[1]
        sizes |= {parcel.nbytes >= tables.LARGE_NBYTES for parcel in parcels}
        for partition, buffers in tables.pack(small).items():
            stored[partition] += buffers
    assert sizes == {True, False}
    whole = pd.DataFrame(pd.concat(frames))
    for partition in WORKER_FOR:
        joined = tables.join(stored[partition], frame(0, 0)[["x"]])
        assert type(joined) is device_standin.Frame
        pd.testing.assert_frame_equal(pd.DataFrame(joined), whole.loc[whole["part"] == partition, ["x"]])


def test_what_does_not_belong_here_is_refused() -> None:
    meta = frame(0, 0)[["x"]]
    segments = np.array([[1, 20]])

    def check(
        kind: Kind = Kind.TABLE, found: Any = segments, extra: bytes = b"device_standin 20 rows", **other: Any
    ) -> None:
        header = Header(kind, (3,), np.array(found), other.get("nbytes", 320), extra)
        tables.check_parcel(header, other.get("wanted", lambda _: True), other.get("meta", meta))

    check()
    with pytest.raises(WireError, match="not held"):
        check(wanted=lambda _: False)
    for kind, found in ((Kind.FRAME, [[1, 20]]), (Kind.TABLE, [[1, 20], [2, 30]]), (Kind.TABLE, [[1, 2, 3]])):
        with pytest.raises(WireError, match="a shard of a table"):
            check(kind, found)
    with pytest.raises(LibraryMissingError, match="'elsewhere' are not known"):
        check(extra=b"elsewhere x")
    with pytest.raises(WireError, match="a shard of a DataFrame was expected"):
        check(meta=pd.DataFrame({"x": [1.0]}))
    # Rows that are not those of the description, and more than there is memory for.
    for other in ({"found": [[1, 21]]}, {"nbytes": 319}, {"meta": frame(0, 0)}):
        with pytest.raises(WireError, match="rows"):
            check(**other)


def test_memory_of_another_library_is_not_joined() -> None:
    class Other(device_standin.Library):
        name = "other"

    head = encode(Header(Kind.TABLE, (1,), np.array([[0, 1]]), 1, b"device_standin 1 rows"))
    body = DeviceBody(Other(), device_standin.asarray(np.ones(1, np.uint8)))
    with pytest.raises(WireError, match=r"memory of device_standin were expected, got \['other'\]"):
        tables.join([head, body], frame(0, 0))


def test_what_is_no_packed_table_is_not_joined() -> None:
    head = encode(Header(Kind.TABLE, (1,), np.array([[0, 1]]), 1, b"device_standin 1 rows"))
    other = encode(Header(Kind.TABLE, (1,), np.array([[1, 1]]), 1, b"cudf 1 rows"))
    brick = encode(Header(Kind.BRICK, (1,), np.array([[0, 1]]), 1, b"'|u1'"))
    for buffers, message in (
        ([], "alternate"),
        ([head], "alternate"),
        ([brick, b"x"], "tables were expected"),
        ([head, b"x", other, b"x"], "one library"),
    ):
        with pytest.raises(WireError, match=message):
            tables.join(buffers, None)


def test_a_frame_that_its_library_cannot_split_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tables.UnsupportedFrameError, match="missing"):
        split(device_standin.Frame({"part": [1], "x": [np.nan]}), 0)
    # One whose descriptions its own check does not know has another layout by now.
    monkeypatch.setattr(device_standin.Frames, "check", tables.CudfLibrary.check)
    with pytest.raises(tables.UnsupportedFrameError, match="no peer would take it"):
        split(frame(0), 0)
    monkeypatch.undo()
    monkeypatch.setattr(tables, "MAX_EXTRA_NBYTES", 10)
    with pytest.raises(tables.UnsupportedFrameError, match="description"):
        split(frame(0), 0)


def test_libraries_are_known_by_the_package_of_their_values() -> None:
    array = device_standin.asarray(np.ones(3))
    assert device.library_of(array) is device_standin.library()
    assert tables.frames_of(frame(0)) is tables.frames_named("device_standin")
    for other in (np.ones(3), frame(0), pd.DataFrame({"a": [1]}), None):
        assert device.library_of(other) is None
    for other in (array, pd.DataFrame({"a": [1]}), None):
        assert tables.frames_of(other) is None


@pytest.mark.parametrize(("named", "builtin"), [(device.library_named, "cupy"), (tables.frames_named, "cudf")])
def test_a_library_that_is_not_here_is_missing(named: Any, builtin: str) -> None:
    with pytest.raises(LibraryMissingError, match="'numpy' are not known"):
        named("numpy")
    try:
        __import__(builtin)
    except ImportError:
        with pytest.raises(LibraryMissingError, match="cannot import"):
            named(builtin)
