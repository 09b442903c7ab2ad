"""Headers survive the wire, and nothing else passes for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode

NUMBERS = st.integers(0, 2**63 - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    rows = draw(st.integers(0, 5))
    columns = draw(st.integers(0, 6))
    segments = draw(st.lists(NUMBERS, min_size=rows * columns, max_size=rows * columns))
    return Header(
        draw(st.sampled_from(Kind)),
        tuple(draw(st.lists(NUMBERS, max_size=5))),
        np.array(segments, dtype=np.int64).reshape(rows, columns),
        draw(st.integers(0, 64)),
        draw(st.binary(max_size=20)),
    )


@given(headers())
def test_a_header_comes_back(header: Header) -> None:
    found = decode(encode(header), bytes(header.body_nbytes))
    assert (found.kind, found.input_id, found.body_nbytes, found.extra) == (
        header.kind,
        header.input_id,
        header.body_nbytes,
        header.extra,
    )
    assert found.segments.shape == header.segments.shape
    assert (found.segments == header.segments).all()


@given(headers(), st.data())
def test_what_is_cut_or_longer_is_refused(header: Header, data: st.DataObject) -> None:
    encoded = encode(header)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    body = bytes(header.body_nbytes)
    for wrong in (encoded[:cut], encoded + b"\0"):
        with pytest.raises(WireError):
            decode(wrong, body)
    with pytest.raises(WireError):
        decode(encoded, body + b"\0")


@given(headers(), st.data())
def test_a_changed_byte_is_refused_or_gives_a_header(header: Header, data: st.DataObject) -> None:
    encoded = bytearray(encode(header))
    where = data.draw(st.integers(0, len(encoded) - 1))
    encoded[where] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(encoded, bytes(header.body_nbytes))
    except WireError:
        return
    # What is accepted is a header of this very length: nothing was made up.
    assert len(encode(found)) == len(encoded)
    assert found.body_nbytes == header.body_nbytes


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(WireError):
        decode(noise, b"")


@given(st.binary(max_size=200))
def test_noise_behind_the_magic_is_refused_or_gives_a_header(noise: bytes) -> None:
    buffer = b"GPSH\x01" + noise
    try:
        found = decode(buffer, b"")
    except WireError:
        return
    assert encode(found) == buffer


def test_limits_hold_for_the_sender_too() -> None:
    with pytest.raises(WireError, match="limits"):
        encode(Header(Kind.FRAME, (0,) * 65, np.zeros((0, 2), dtype=np.int64), 0))
    with pytest.raises(WireError, match="limits"):
        encode(Header(Kind.FRAME, (0,), np.zeros((1, 193), dtype=np.int64), 0))
    with pytest.raises(WireError, match="limits"):
        encode(Header(Kind.FRAME, (0,), np.zeros((0, 2), dtype=np.int64), 0, bytes(2**16 + 1)))
