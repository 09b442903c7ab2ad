"""Compressed buffers: back as they were, and nothing that a peer can send does more than raise an error of ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_gpurt import codecs
from dask_gpurt.codecs import CODECS, MIN_NBYTES, RAW_NBYTES_MAX, SAMPLE_NBYTES, CodecError, Packed
from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.wire import WireError, pack_list

pytest.importorskip("pyarrow", reason="pyarrow brings the codecs")

names = st.sampled_from(sorted(CODECS))


@st.composite
def bodies(draw: st.DrawFn) -> Buffer:
    nbytes = draw(st.sampled_from([0, 1, 100, MIN_NBYTES - 1, MIN_NBYTES, MIN_NBYTES + 1, 70_000, 300_000]))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    high = draw(st.sampled_from([1, 2, 16, 256]))
    body = rng.integers(0, high, nbytes, dtype=np.uint8)
    form: Callable[[Any], Buffer] = draw(st.sampled_from([bytes, bytearray, memoryview]))
    return form(body.data)


def lend(nbytes: int) -> memoryview:
    return memoryview(bytearray(b"\xaa" * nbytes))


def raw(buffers: list[Any]) -> list[bytes]:
    return [bytes(memoryview(buffer)) for buffer in buffers]


@given(name=names, buffers=st.lists(bodies(), max_size=6))
def test_buffers_come_back_as_they_were(name: str, buffers: list[Buffer]) -> None:
    message = codecs.compress(buffers, name)
    told = pack_list([dataclasses.astuple(each) for each in message.packed], len(buffers))
    assert told == message.packed
    assert raw(codecs.decompress(message.buffers, told, lend)) == raw(buffers)
    sizes = [memoryview(buffers[each.number]).nbytes for each in told]
    assert all(nbytes >= MIN_NBYTES for nbytes in sizes)
    assert message.raw_nbytes == sum(sizes)
    assert message.wire_nbytes == sum(memoryview(message.buffers[each.number]).nbytes for each in told)
    assert message.wire_nbytes <= 0.9 * message.raw_nbytes


def body() -> bytes:
    return np.random.default_rng(0).integers(0, 9, 100_000).tobytes()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("by", [-1, 1, 8, -700_000, 10**6])
def test_a_size_that_is_not_true_is_found_out(name: str, by: int) -> None:
    message = codecs.compress([body()], name)
    (packed,) = message.packed
    lent = []

    def counting(nbytes: int) -> memoryview:
        lent.append(nbytes)
        return lend(nbytes)

    with pytest.raises(CodecError, match=r"were announced|cannot be decompressed"):
        codecs.decompress(message.buffers, [dataclasses.replace(packed, nbytes=packed.nbytes + by)], counting)
    assert lent == [packed.nbytes + by], "no more than was announced may be held"


@given(name=names, at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=50)
def test_a_bit_that_is_flipped_is_found_out(name: str, at: float, bit: int) -> None:
    message = codecs.compress([body()], name)
    wire = bytearray(message.buffers[0])
    wire[int(at * len(wire))] ^= 1 << bit
    with pytest.raises(CodecError, match="damaged on its way"):
        codecs.decompress([wire], message.packed, lend)


@given(name=names, data=st.data())
@settings(max_examples=100)
def test_garbage_with_a_right_checksum_is_found_out_or_harmless(name: str, data: st.DataObject) -> None:
    import xxhash

    message = codecs.compress([body()], name)
    wire = bytearray(message.buffers[0])
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(wire) - 1))
        wire[start : start + 8] = data.draw(st.binary(max_size=16))
    (packed,) = message.packed
    packed = dataclasses.replace(packed, digest=xxhash.xxh3_64_intdigest(wire))
    try:
        (found,) = codecs.decompress([wire], [packed], lend)
    except CodecError:
        return
    assert memoryview(found).nbytes == packed.nbytes


GOOD = [0, "lz4", MIN_NBYTES, 2**64 - 1]


@pytest.mark.parametrize(
    "told",
    [
        None,
        7,
        "lz4",
        [7],
        [GOOD[:3]],
        [["0", *GOOD[1:]]],
        [[True, *GOOD[1:]]],
        [[-1, *GOOD[1:]]],
        [[2, *GOOD[1:]]],
        [[0, "gzip", *GOOD[2:]]],
        [[0, "lz4", MIN_NBYTES - 1, 0]],
        [[0, "lz4", RAW_NBYTES_MAX + 1, 0]],
        [[0, "lz4", float(MIN_NBYTES), 0]],
        [GOOD, GOOD],
    ],
)
def test_what_a_peer_tells_is_checked(told: Any) -> None:
    assert pack_list([GOOD], 2) == [Packed(0, "lz4", MIN_NBYTES, 2**64 - 1)]
    with pytest.raises(WireError):
        pack_list(told, 2)


def test_a_sample_sees_all_of_a_message_and_is_small() -> None:
    zeros, noise = bytes(2**20), np.random.default_rng(0).bytes(2**20)
    figures, elapsed_s = codecs.sample([b"header", zeros, noise, b"header"])
    assert set(figures) == set(CODECS)
    for each in figures.values():
        # Half of what was looked at is noise.
        assert 0.4 < each.ratio < 0.6
        assert each.compress_speed > 0
        assert each.decompress_speed > 0
    assert elapsed_s > 0
    assert codecs.sample([b"header"])[0] == {}
    assert codecs.sample([noise[:MIN_NBYTES]])[0]["lz4"].ratio > 0.9
    assert SAMPLE_NBYTES == 2**16
