"""Compression of copies: where it pays, never elsewhere, and never other data."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dask_gpurt.codecs import MIN_NBYTES, Packed
from dask_gpurt.compression import FAST_BANDWIDTH
from dask_gpurt.errors import CorruptDataError
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.disk import DIRECT_NBYTES_MIN, SpillFolder
from dask_gpurt.memory.lower import DiskStore, RawName
from dask_gpurt.memory.packing import Meter, Packer

pytest.importorskip("pyarrow", reason="pyarrow brings the codecs")

POOL = BlockPool(2**26)
#: Bytes per second at which no other load on this machine makes a codec seem to be too slow.
SLOW = 1e6
NUMBERS = np.arange(100_000)
NOISE = np.frombuffer(np.random.default_rng(0).bytes(800_000), dtype="i8")


def known(meter: Meter, bandwidth: float) -> None:
    """Let it have seen so many bytes per second for a while."""
    for _ in range(20):
        meter.link.observe(8 * 2**20, 8 * 2**20 / bandwidth)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    folder = SpillFolder(str(tmp_path), POOL)
    # Its own files say nothing about it: they go to the page cache.
    folder._pace._possible = False
    packer = Packer(folder.meter, POOL.lease)
    yield DiskStore(folder, packer)
    folder.close()


def slow(store: DiskStore) -> None:
    assert isinstance(store.folder, SpillFolder)
    known(store.folder.meter, SLOW)
    for _ in range(20):
        assert store.packer is not None
        store.packer.wrote(8 * 2**20)


def test_a_slow_tier_is_given_less_and_gives_back_all(store: DiskStore) -> None:
    slow(store)
    copies = [store.store(n, NUMBERS + n) for n in range(10)]
    assert max(copy.nbytes for copy in copies) < NUMBERS.nbytes / 2
    for n, copy in enumerate(copies):
        value: Any = copy.load()
        np.testing.assert_array_equal(value, NUMBERS + n)
        assert value.flags.writeable
        found = copy.frames()
        assert found is not None
        assert b"".join(bytes(frame) for frame in found[1]) == (NUMBERS + n).tobytes()
        copy.remove()
    assert store.packer is not None
    assert 0 < store.packer.packed_nbytes < store.packer.raw_nbytes / 2


def test_kinds_are_told_apart(store: DiskStore) -> None:
    slow(store)
    for _ in range(5):
        assert store.store("noise", NOISE.view("f8")).nbytes >= NOISE.nbytes
        assert store.store("numbers", NUMBERS).nbytes < NUMBERS.nbytes / 2


@pytest.mark.parametrize("bandwidth", [2 * FAST_BANDWIDTH, None])
def test_a_tier_that_is_fast_or_unknown_is_left_alone(store: DiskStore, bandwidth: float | None) -> None:
    assert isinstance(store.folder, SpillFolder)
    if bandwidth is not None:
        known(store.folder.meter, bandwidth)
    copies = [store.store(n, NUMBERS) for n in range(50)]
    assert {copy.nbytes for copy in copies} == {NUMBERS.nbytes}
    assert store.packer is not None
    assert store.packer.raw_nbytes == 0


def test_the_price_of_a_disk_is_learned_from_what_reaches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SpillFolder(str(tmp_path), POOL)
    folder._pace._possible = True
    monkeypatch.setattr(os, "O_DIRECT", 0)
    folder.write([bytes(DIRECT_NBYTES_MIN)])
    assert folder.meter.link.transfers == 1
    folder.write([bytes(DIRECT_NBYTES_MIN - 1)])
    folder._pace._possible = False
    folder.write([bytes(DIRECT_NBYTES_MIN)])
    assert folder.meter.link.transfers == 1, "those went to the page cache"
    folder.close()


class Shards(RawName):
    __slots__ = ()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.lists(
        st.tuples(st.sampled_from([0, 1, 5000, MIN_NBYTES - 1, MIN_NBYTES, 200_000]), st.booleans()), max_size=5
    )
)
def test_buffers_come_back_as_they_were(store: DiskStore, frames: list[tuple[int, bool]]) -> None:
    slow(store)
    buffers = [(NOISE if noisy else NUMBERS).tobytes()[:nbytes] for nbytes, noisy in frames]
    copy = store.store(Shards(), buffers)
    found: Any = copy.load()
    assert [bytes(buffer) for buffer in found] == buffers
    copy.remove()


@pytest.mark.parametrize(
    "value",
    [
        pd.DataFrame({"a": range(20_000), "b": ["x", "yy"] * 10_000, "c": pd.Categorical(["u", "v"] * 10_000)}),
        np.asfortranarray(np.arange(90_000.0).reshape(300, 300)),
        np.arange(90_000).reshape(300, 300)[::2, ::3],
        np.zeros((0, 5)),
        {"some": [list(range(30_000)), "x" * 100_000]},
        None,
    ],
)
def test_values_come_back_as_they_were(store: DiskStore, value: Any) -> None:
    slow(store)
    for _ in range(3):
        found = store.store("x", value).load()
        if isinstance(value, pd.DataFrame):
            pd.testing.assert_frame_equal(found, value)
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found, value)
        else:
            assert found == value


def test_a_damaged_copy_is_never_returned(store: DiskStore) -> None:
    slow(store)
    assert isinstance(store.folder, SpillFolder)
    copy = store.store("x", NUMBERS)
    assert copy.nbytes < NUMBERS.nbytes / 2
    (name,) = os.listdir(store.folder.path)
    with open(os.path.join(store.folder.path, name), "r+b") as file:
        file.seek(1000)
        file.write(b"\xff\xfe\xfd")
    with pytest.raises(CorruptDataError):
        copy.load()
    assert store.distrusted


@pytest.mark.parametrize("nbytes", [-1, 1])
def test_what_decompresses_to_something_else_is_never_returned(nbytes: int) -> None:
    packer = Packer(Meter(), POOL.lease)
    known(packer._meter, SLOW)
    packer.wrote(2**30)
    frames, (packed,) = packer.pack("numbers", [NUMBERS.data])
    assert bytes(packer.unpack(frames, [packed])[0]) == NUMBERS.tobytes()
    with pytest.raises(CorruptDataError):
        packer.unpack(frames, [dataclasses.replace(packed, nbytes=packed.nbytes + nbytes)])
    with pytest.raises(CorruptDataError):
        packer.unpack([bytes(frames[0])[:-1]], [Packed(0, packed.codec, packed.nbytes, packed.digest)])


def test_threads_do_not_disturb_each_other(store: DiskStore) -> None:
    slow(store)
    together = threading.Barrier(4)

    def work(thread: int) -> None:
        together.wait(10)
        for n in range(20):
            value = NUMBERS * thread + n
            found: Any = store.store((thread, n), value).load()
            np.testing.assert_array_equal(found, value)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
