"""Arrays through split, pack and unpack, against NumPy."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import device_standin
import numpy as np
import pytest
from distributed.shuffle._rechunk import split_axes
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_gpurt.memory import codec
from dask_gpurt.shuffle import bricks, device
from dask_gpurt.shuffle.device import DeviceBody
from dask_gpurt.shuffle.libraries import LibraryMissingError
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode

PLAIN: list[Any] = [
    "f8",
    ">f4",
    "u1",
    "?",
    "c16",
    "M8[ms]",
    "m8[ns]",
    "S3",
    "U2",
    "V5",
    [("a", "i4"), ("b", "f8", (2,))],
]


@st.composite
def cuts(draw: st.DrawFn, length: int) -> tuple[int, ...]:
    inner = draw(st.sets(st.integers(1, length - 1), max_size=4)) if length > 1 else set()
    edges = [0, *sorted(inner), length]
    return tuple(b - a for a, b in itertools.pairwise(edges))


@st.composite
def rechunks(draw: st.DrawFn) -> tuple[tuple[int, ...], Any, Any]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    return shape, tuple(draw(cuts(n)) for n in shape), tuple(draw(cuts(n)) for n in shape)


def chunks_of(array: np.ndarray[Any, Any], chunks: Any) -> dict[tuple[int, ...], np.ndarray[Any, Any]]:
    edges = [[0, *itertools.accumulate(axis)] for axis in chunks]
    return {
        index: array[tuple(slice(e[i], e[i + 1]) for e, i in zip(edges, index, strict=True))]
        for index in itertools.product(*(range(len(axis)) for axis in chunks))
    }


def _lend(nbytes: int) -> memoryview:
    return np.empty(nbytes, np.uint8).data


def rechunk(
    array: np.ndarray[Any, Any],
    old: Any,
    new: Any,
    together: int,
    put: Callable[[Any], Any] = lambda chunk: chunk,
    *,
    repaired: bool = False,
) -> dict[Any, Any]:
    """Rechunk what ``put`` makes of the chunks. Every other body on a device travels by the host.

    If it is ``repaired``, half of the parcels are cut by output on their way; of the other chunks every other output was taken over.
    """
    axes = split_axes(old, new)
    outputs = list(itertools.product(*(range(len(axis)) for axis in new)))
    worker_for = {index: "ab"[number % 2] for number, index in enumerate(outputs)}
    arrived: dict[str, list[Parcel]] = defaultdict(list)
    for number, (index, chunk) in enumerate(chunks_of(array, old).items()):
        alone = outputs[::2] if repaired and number % 2 else ()
        shards: list[tuple[str, Any, Any]] = []
        for address, header, body in bricks.split(put(chunk), index, axes, worker_for, alone=alone):
            assert len(header.segments) == 1 or not {tuple(s[: len(index)]) for s in header.segments.tolist()} & {
                *alone
            }
            if not repaired or number % 2:
                shards.append((address, header, body))
                continue
            cut = bricks.cut(Parcel(header, body, header.body_nbytes))
            shards += [(worker_for[target], one, piece) for target, one, piece in cut]
        for address, header, body in shards:
            by_host = not isinstance(body, DeviceBody) or sum(map(len, arrived.values())) % 2
            raw = bytes(body.on_host(_lend) if isinstance(body, DeviceBody) else body) if by_host else body
            found = decode(encode(header), raw)
            bricks.check_parcel(found, {target for target in outputs if worker_for[target] == address}.__contains__)
            arrived[address].append(Parcel(found, raw, found.body_nbytes))
    stored: dict[Any, list[Any]] = defaultdict(list)
    for parcels in arrived.values():
        for first in range(0, len(parcels), together):
            some = parcels[first : first + together]
            for on_device in (False, True):
                kind = [parcel for parcel in some if isinstance(parcel.body, DeviceBody) is on_device]
                for target, buffers in bricks.pack(kind).items():
                    stored[target] += buffers
                assert device_standin.library().idle, "others may read what was packed, or use what it was made of"
    return {target: bricks.unpack(buffers) for target, buffers in stored.items()}


@settings(deadline=None)
@given(rechunks(), st.sampled_from(range(len(PLAIN))), st.integers(1, 4), st.booleans())
def test_any_array_is_rechunked(case: tuple[Any, Any, Any], kind: int, together: int, fortran: bool) -> None:
    shape, old, new = case
    dtype = np.dtype(PLAIN[kind])
    count = int(np.prod(shape))
    raw = np.random.default_rng(count).integers(0, 2, count * dtype.itemsize).astype("u1")
    array = raw.view(dtype).reshape(shape)
    if fortran:
        array = np.asfortranarray(array)
    found = rechunk(array, old, new, together, repaired=together % 2 == 0)
    expected = chunks_of(array, new)
    assert found.keys() == expected.keys()
    for index, chunk in found.items():
        assert chunk.dtype == dtype
        assert chunk.shape == expected[index].shape
        assert chunk.tobytes() == expected[index].tobytes()
        assert chunk.flags.writeable
        assert codec.footprint(chunk)[1] == chunk.nbytes, "it keeps no other memory alive"


@settings(deadline=None)
@given(rechunks(), st.integers(1, 4), st.sampled_from(["f8", "u1", "c16", "?"]))
def test_any_array_on_a_device_is_rechunked_there(case: tuple[Any, Any, Any], together: int, kind: str) -> None:
    shape, old, new = case
    array = np.random.default_rng(1).integers(0, 2, shape).astype(kind)
    with pytest.MonkeyPatch.context() as patch:
        # These are small, and would all go by the host.
        patch.setattr(device, "SMALL_NBYTES", 0)
        found = rechunk(array, old, new, together, put=device_standin.asarray)
    expected = chunks_of(array, new)
    assert found.keys() == expected.keys()
    for index, chunk in found.items():
        assert chunk.dtype == array.dtype
        np.testing.assert_array_equal(device_standin.asnumpy(chunk), expected[index])


def test_small_bodies_are_taken_to_the_host_and_large_ones_stay() -> None:
    axes = split_axes(((50, 400), (200,)), ((450,), (100, 100)))
    worker_for: dict[tuple[int, ...], str] = {(0, 0): "a", (0, 1): "b"}
    chunks = {(0, 0): np.ones((50, 200)), (1, 0): np.ones((400, 200))}
    for index, chunk in chunks.items():
        for _, header, body in bricks.split(device_standin.asarray(chunk), index, axes, worker_for):
            assert header.body_nbytes == chunk.nbytes / 2
            assert isinstance(body, DeviceBody) is (chunk.nbytes / 2 >= device.SMALL_NBYTES) is bool(index[0])


def test_an_output_that_cannot_be_made_here_is_refused() -> None:
    header = Header(Kind.BRICK, (0,), np.array([[0, 0, 2]]), 16, b"elsewhere '<f8'")
    with pytest.raises(LibraryMissingError, match="'elsewhere' are not known"):
        bricks.check_parcel(header, lambda _: True)


def test_what_is_not_plain_is_not_described() -> None:
    for dtype in (np.dtype(object), np.dtype([("a", object)]), np.dtypes.StringDType(), np.dtype("V0"), np.dtype("S0")):
        assert bricks.dtype_token(dtype) is None
    with pytest.raises(TypeError, match="plain"):
        bricks.split(np.array([None]), (0,), split_axes(((1,),), ((1,),)), {(0,): "a"})


@given(st.binary(max_size=30))
def test_noise_describes_no_dtype_or_a_plain_one(noise: bytes) -> None:
    try:
        dtype = bricks.dtype_of(noise)
    except WireError:
        return
    assert not dtype.hasobject


@pytest.mark.parametrize("token", [b"'|O'", b"__import__('os')", b"'<f8'+", b"[('a', '|O')]", b"'V0'", b"(" * 500])
def test_objects_and_code_describe_no_dtype(token: bytes) -> None:
    with pytest.raises(WireError):
        bricks.dtype_of(token)


def test_shapes_that_do_not_fit_are_refused() -> None:
    right = Header(Kind.BRICK, (0,), np.array([[0, 0, 2]]), 16, b"'<f8'")
    bricks.check_parcel(right, lambda _: True)
    for wrong, message in (
        (Header(Kind.BRICK, (0,), np.array([[0, 0, 3]]), 16, b"'<f8'"), "3 elements"),
        (Header(Kind.BRICK, (0,), np.array([[0, 0, 2, 1]]), 16, b"'<f8'"), "expected"),
        (Header(Kind.FRAME, (0,), np.array([[0, 0, 2]]), 16, b"'<f8'"), "expected"),
    ):
        with pytest.raises(WireError, match=message):
            bricks.check_parcel(wrong, lambda _: True)
    with pytest.raises(WireError, match="not held"):
        bricks.check_parcel(right, lambda _: False)


def test_a_missing_shard_is_noticed() -> None:
    def packed(place: list[int], shape: list[int]) -> list[Any]:
        header = Header(Kind.BRICK, (0, 0), np.array([place + shape]), int(np.prod(shape)), b"'|u1'")
        return [encode(header), bytes(header.body_nbytes)]

    three = packed([0, 0], [1, 1]) + packed([0, 1], [1, 2]) + packed([1, 0], [2, 1])
    with pytest.raises(WireError, match="4 shards were expected, got 3"):
        bricks.unpack(three)
    with pytest.raises(WireError, match="lengths"):
        bricks.unpack(three + packed([1, 1], [3, 2]))
    assert bricks.unpack(three + packed([1, 1], [2, 2])).shape == (3, 3)
