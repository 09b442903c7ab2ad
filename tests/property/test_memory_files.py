"""Frames come back from a file as they were, past the page cache and through it."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_gpurt.memory import disk, files
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.files import LARGE_NBYTES, PAGE_NBYTES, Layout

LENGTHS = st.lists(
    st.one_of(
        st.integers(0, 300),
        st.sampled_from([PAGE_NBYTES - 1, PAGE_NBYTES, PAGE_NBYTES + 1, LARGE_NBYTES - 1, LARGE_NBYTES]),
        st.integers(LARGE_NBYTES, LARGE_NBYTES + 3 * PAGE_NBYTES),
        st.just(5 * 2**20 + 17),
    ),
    max_size=8,
)
POOL = BlockPool(2**26)


@pytest.fixture(params=["direct", "cached"])
def flags(request: pytest.FixtureRequest) -> int:
    flag: int = request.getfixturevalue("direct") if request.param == "direct" else 0
    return flag


@given(lengths=LENGTHS, data=st.data())
def test_frames_lie_apart_and_large_ones_as_far_into_a_page_as_in_memory(
    lengths: list[int], data: st.DataObject
) -> None:
    skews = [data.draw(st.integers(0, PAGE_NBYTES - 1)) for _ in lengths]
    layout = Layout(lengths, skews)
    end = 0
    for offset, length, skew in zip(layout.offsets, lengths, skews, strict=True):
        assert offset >= end
        if length >= LARGE_NBYTES:
            assert offset % PAGE_NBYTES == skew
        else:
            assert offset % 64 == 0
        end = offset + length
    assert layout.nbytes == end
    assert [n for first, last in layout.segments for n in range(first, last)] == list(range(len(lengths)))
    begins = [layout.offsets[first] - layout.offsets[first] % PAGE_NBYTES for first, _ in layout.segments]
    ends = [layout.offsets[last - 1] + lengths[last - 1] for _, last in layout.segments]
    assert all(begin >= end for begin, end in zip(begins[1:], ends[:-1], strict=True)), "segments share no page"
    assert sum(lengths) <= end < sum(lengths) + PAGE_NBYTES * (2 * len(lengths) + 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=LENGTHS, into=st.sampled_from([0, 1, 16, 4095]), longer=st.booleans(), placed=st.booleans())
def test_round_trip(tmp_path: Path, flags: int, *, lengths: list[int], into: int, longer: bool, placed: bool) -> None:
    rng = np.random.default_rng(sum(lengths))
    frames: list[Any] = []
    for length in lengths:
        # Begins so far into a page.
        frame = memoryview(mmap.mmap(-1, length + PAGE_NBYTES))[into : into + length]
        np.frombuffer(frame, dtype=np.uint8)[...] = rng.integers(0, 256, length, dtype=np.uint8)
        frames.append(frame)
    layout = files.layout_of(frames) if placed else Layout(lengths)
    path = tmp_path / "file"
    path.write_bytes(b"old" * 3_000_000 if longer else b"")
    fd = os.open(path, os.O_RDWR | flags)
    try:
        files.write(fd, frames, layout)
        assert os.fstat(fd).st_size == layout.nbytes
        found = files.read(fd, layout, POOL.lease, direct=bool(flags))
        assert found is not None
        assert [bytes(frame) for frame in found] == [bytes(frame) for frame in frames]
        if any(lengths):
            os.ftruncate(fd, max(o + n for o, n in zip(layout.offsets, lengths, strict=True) if n) - 1)
            assert files.read(fd, layout, POOL.lease, direct=bool(flags)) is None
    finally:
        os.close(fd)


def test_large_frames_are_written_from_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.pwritev
    frame = memoryview(mmap.mmap(-1, 8 * LARGE_NBYTES))[16:-100]
    frame[:] = np.random.default_rng(0).bytes(frame.nbytes)
    lies = np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
    theirs = 0

    def watch(fd: int, pieces: list[Any], offset: int) -> int:
        nonlocal theirs
        for piece in pieces:
            address = np.frombuffer(piece, np.uint8).__array_interface__["data"][0]
            theirs += piece.nbytes if lies <= address < lies + frame.nbytes else 0
        # Cut short in the middle of a piece, and at the end of one.
        return honest(fd, [pieces[0][: 3 * PAGE_NBYTES + 512]], offset)

    monkeypatch.setattr(os, "pwritev", watch)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        layout = files.layout_of([frame])
        files.write(fd, [frame], layout)
        assert theirs >= frame.nbytes - 2 * PAGE_NBYTES
        assert files.read(fd, layout, POOL.lease, direct=False) == [frame]
    finally:
        os.close(fd)


def test_reads_that_are_cut_short_are_continued(tmp_path: Path, flags: int, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: honest(fd, [views[0][: 2 * PAGE_NBYTES]], offset))
    layout = Layout([50_000, LARGE_NBYTES + 5])
    frames = [memoryview(bytes([7]) * length) for length in layout.lengths]
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | flags)
    try:
        files.write(fd, frames, layout)
        found = files.read(fd, layout, POOL.lease, direct=bool(flags))
    finally:
        os.close(fd)
    assert found == frames


@pytest.mark.usefixtures("direct")
def test_a_slow_disk_is_written_to_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = disk.SpillFolder(str(tmp_path), POOL)
    frames = [bytes(disk.DIRECT_NBYTES_MIN)]
    monkeypatch.setattr(disk, "DIRECT_RATE_MIN", 1.0)
    assert folder.write(frames).direct
    assert not folder.write([frames[0][1:]]).direct, "small files go through the cache"
    monkeypatch.setattr(disk, "DIRECT_RATE_MIN", 1e15)
    direct = [folder.write(frames).direct for _ in range(2 * disk.DIRECT_PROBE)]
    assert sum(direct) == 2, "it is asked now and then"
    monkeypatch.setattr(disk, "DIRECT_RATE_MIN", 1.0)
    assert folder.write(frames).direct
    folder.close()


def test_a_file_system_that_refuses_is_written_to_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.open

    def refuse(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return honest(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    folder = disk.SpillFolder(str(tmp_path), POOL)
    copy = folder.write([b"x" * disk.DIRECT_NBYTES_MIN])
    assert not copy.direct
    assert [bytes(frame) for frame in copy.read()] == [b"x" * disk.DIRECT_NBYTES_MIN]
    folder.close()
