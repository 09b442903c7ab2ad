"""The DISK tier: what comes back is what was written, or an error; nothing is left behind, nothing is readable."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dask_gpurt.errors import CorruptDataError, SpillError
from dask_gpurt.memory import disk
from dask_gpurt.memory.blocks import HUGE_PAGE_NBYTES, SLAB_NBYTES_MIN, BlockPool, size_class
from dask_gpurt.memory.disk import IDLE_FILE_NBYTES_MIN, SpillFolder, remove_leftovers
from dask_gpurt.memory.lower import DiskStore
from dask_gpurt.memory.packing import Meter, Packer
from dask_gpurt.memory.store import Buffer
from dask_gpurt.topology import Rate

FRAMES: list[Buffer] = [b"small", b"", np.arange(100_000, dtype="u1").data, np.arange(300_000.0).data]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[SpillFolder]:
    folder = SpillFolder(str(tmp_path), BlockPool(2**24))
    yield folder
    folder.close()


def skew_of(frame: Buffer) -> int:
    address: int = np.frombuffer(frame, np.uint8).__array_interface__["data"][0]
    return address % 4096


def test_round_trip(folder: SpillFolder) -> None:
    copy = folder.write(FRAMES)
    frames = copy.read()
    assert [bytes(f) for f in frames] == [bytes(f) for f in FRAMES]
    assert not any(f.readonly for f in frames)
    # The last one is large, and begins as far into a page as in memory.
    assert copy.nbytes == 25 * 4096 + skew_of(FRAMES[-1]) + 2_400_000 == os.stat(copy.path).st_size
    copy.remove()
    copy.remove()
    folder.decay()
    folder.decay()
    assert os.listdir(folder.path) == []


@pytest.mark.parametrize(
    "value", [np.empty((0, 4)), np.empty((3, 0), order="F"), np.empty((0,), dtype="datetime64[ns]")]
)
def test_arrays_without_elements(folder: SpillFolder, value: np.ndarray[Any, Any]) -> None:
    packer = Packer(Meter(Rate(0.0, 1e6)), folder._pool.lease)
    for store in (DiskStore(folder), DiskStore(folder, packer)):
        found: Any = store.store("x", value).load()
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
    frame = pd.DataFrame({"x": value.reshape(-1), "text": pd.Series([], dtype="str")})
    pd.testing.assert_frame_equal(DiskStore(folder).store("x", frame).load(), frame)


def test_many_frames_take_several_calls(folder: SpillFolder) -> None:
    frames = [bytes([n % 256]) * (n % 5) for n in range(5000)]
    assert [bytes(f) for f in folder.write(frames).read()] == frames


def test_short_writes_are_continued(folder: SpillFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda fd, pieces, offset: honest(fd, [pieces[0][:8192]], offset))
    assert [bytes(f) for f in folder.write(FRAMES[:3]).read()] == [bytes(f) for f in FRAMES[:3]]


def flip(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(60_000)
        byte = file.read(1)
        file.seek(60_000)
        file.write(bytes([byte[0] ^ 1]))


def shorten(path: str) -> None:
    os.truncate(path, os.stat(path).st_size - 1)


def lengthen(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"!")


@pytest.mark.parametrize("damage", [flip, shorten, lengthen, os.unlink, lambda p: os.truncate(p, 0)])
def test_damage_is_found(folder: SpillFolder, damage: Callable[[str], None]) -> None:
    copy = folder.write(FRAMES)
    damage(copy.path)
    with pytest.raises(CorruptDataError):
        copy.read()


def test_files_cannot_be_exchanged(folder: SpillFolder) -> None:
    one, other = folder.write([b"1" * 1000]), folder.write([b"2" * 1000])
    os.replace(other.path, one.path)
    with pytest.raises(CorruptDataError, match="checksum"):
        one.read()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_refuses(folder: SpillFolder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(fd: int, pieces: list[memoryview], offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwritev", refuse)
    with pytest.raises(SpillError) as caught:
        folder.write(FRAMES)
    assert caught.value.errno == number
    assert not isinstance(caught.value, CorruptDataError)
    assert os.listdir(folder.path) == [], "half a file was left"


def test_a_disk_that_fails_to_read(folder: SpillFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    copy = folder.write(FRAMES)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(SpillError) as caught:
        copy.read()
    assert caught.value.errno == errno.EIO


def test_nobody_else_can_read(folder: SpillFolder) -> None:
    copy = folder.write(FRAMES)
    assert os.stat(folder.path).st_mode & 0o777 == 0o700
    assert os.stat(copy.path).st_mode & 0o777 == 0o600
    assert os.stat(folder.path + ".lock").st_mode & 0o777 == 0o600


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    folder = SpillFolder(str(tmp_path), BlockPool(0))
    folder.write(FRAMES)
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("aside", [False, True])
def test_closing_what_somebody_has_removed(tmp_path: Path, *, aside: bool) -> None:
    (tmp_path / "worker").mkdir()
    folder = SpillFolder(str(tmp_path / "worker"), BlockPool(0))
    folder.write(FRAMES)
    shutil.rmtree(tmp_path / "worker")
    folder.close(str(tmp_path) if aside else None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpillError, match="cannot keep spilled data"):
        SpillFolder(str(tmp_path / "file" / "below"), BlockPool(0))


def test_leftovers_of_the_dead_are_removed_and_the_living_are_left_alone(tmp_path: Path, folder: SpillFolder) -> None:
    code = (
        "import os, sys\n"
        "from dask_gpurt.memory.disk import IDLE_FILE_NBYTES_MIN, SpillFolder\n"
        "from dask_gpurt.memory.blocks import BlockPool\n"
        "folder = SpillFolder(sys.argv[1], BlockPool(0))\n"
        "folder.write([b'x' * 1000])\n"
        "print(folder.path, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    dead = done.stdout.strip()
    assert os.listdir(dead) == ["0.blk"]
    copy = folder.write(FRAMES)
    assert remove_leftovers(str(tmp_path)) == [dead]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [os.path.basename(folder.path), os.path.basename(folder.path) + ".lock"]
    )
    assert copy.read()


def test_a_lock_without_a_folder_is_left_to_its_maker(tmp_path: Path) -> None:
    lock = tmp_path / "gpurt-spill-young.lock"
    lock.touch(0o600)
    assert remove_leftovers(str(tmp_path)) == []
    assert lock.exists()
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_slab_is_used_again_once_nothing_refers_to_it() -> None:
    pool = BlockPool(2**24)
    array = np.frombuffer(pool.lease(2**20), dtype="f8")
    view = array[10:20]
    del array
    assert pool.idle_nbytes == 0, "a view still lies in it"
    del view
    assert pool.idle_nbytes == 2**20
    again = pool.lease(2**20 - 100)
    assert (pool.hits, pool.misses) == (1, 1)
    assert again.nbytes == 2**20 - 100


def test_idle_slabs_are_bounded() -> None:
    pool = BlockPool(3 * 2**20)
    leases = [pool.lease(2**20) for _ in range(10)]
    del leases
    assert pool.idle_nbytes == 3 * 2**20
    pool.trim()
    assert pool.idle_nbytes == 0


def test_large_files_are_written_over(tmp_path: Path) -> None:
    folder = SpillFolder(str(tmp_path), BlockPool(2**24))
    large = 3 * IDLE_FILE_NBYTES_MIN
    copies = [folder.write([bytes([n]) * large]) for n in range(4)]
    inodes = {os.stat(copy.path).st_ino for copy in copies}
    for copy in copies:
        copy.remove()
        copy.remove()
        with pytest.raises(CorruptDataError, match="gone"):
            copy.read()
    assert folder.idle_nbytes == 4 * large
    smaller = folder.write([b"s" * (large - 1024), b"t"])
    assert os.stat(smaller.path).st_ino in inodes
    assert os.stat(smaller.path).st_size == large - 1023
    assert [bytes(frame) for frame in smaller.read()] == [b"s" * (large - 1024), b"t"]
    assert folder.idle_nbytes == 3 * large
    # Too large for any of them: it takes the room of what is idle, not more.
    larger = folder.write([b"l" * (2 * large)])
    assert folder.idle_nbytes == large
    tiny = folder.write([b"x"] * 2000)
    assert folder.idle_nbytes == 0, "the folder was never larger"
    assert bytes(larger.read()[0]) == b"l" * (2 * large)
    larger.remove()
    folder.decay()
    assert folder.idle_nbytes == 2 * large
    folder.decay()
    assert folder.idle_nbytes == 0
    smaller.remove()
    tiny.remove()
    assert len(os.listdir(folder.path)) == 1
    folder.close()
    assert os.listdir(tmp_path) == []


def test_a_file_whose_writing_failed_is_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SpillFolder(str(tmp_path), BlockPool(2**24))
    folder.write([bytes(2 * IDLE_FILE_NBYTES_MIN)]).remove()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(SpillError):
            folder.write([bytes(2 * IDLE_FILE_NBYTES_MIN)])
    assert os.listdir(folder.path) == []
    assert folder.idle_nbytes == 0
    assert bytes(folder.write([b"y" * 2 * IDLE_FILE_NBYTES_MIN]).read()[0][:1]) == b"y"
    folder.close()


def test_what_is_not_needed_for_a_while_goes_back() -> None:
    pool = BlockPool(2**30)
    del [pool.lease(2**22) for _ in range(4)][:]
    assert pool.idle_nbytes == 4 * 2**22
    pool.decay()  # They have only just returned.
    assert pool.idle_nbytes == 4 * 2**22
    for _ in range(3):
        used = [pool.lease(2**22), pool.lease(2**22)]
        del used
    pool.decay()
    assert (pool.idle_nbytes, pool.misses) == (2 * 2**22, 4)
    pool.decay()
    assert pool.idle_nbytes == 0


@pytest.mark.parametrize("nbytes", [2**21 - 1, 2**21, 5 * 2**20 + 3])
def test_large_slabs_begin_at_a_huge_page(nbytes: int) -> None:
    lease = BlockPool(0).lease(nbytes)
    array = np.frombuffer(lease, dtype="u1")
    array[:] = 7
    assert array.sum() == 7 * nbytes
    assert nbytes < HUGE_PAGE_NBYTES or array.ctypes.data % HUGE_PAGE_NBYTES == 0


def test_small_leases_take_no_slab() -> None:
    pool = BlockPool(2**20)
    assert pool.lease(SLAB_NBYTES_MIN - 1).nbytes == SLAB_NBYTES_MIN - 1
    assert (pool.hits, pool.misses) == (0, 0)


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 10**5, 10**6, 10**7 + 1, 2**30 - 1])
def test_size_classes_waste_little(nbytes: int) -> None:
    size = size_class(nbytes)
    assert nbytes <= size <= nbytes + max(4096, nbytes // 8 + 1)
    assert size_class(size) == size


def test_a_lower_limit_gives_back_what_is_more() -> None:
    pool = BlockPool(2**30)
    del [pool.lease(n * 2**20) for n in (1, 2, 4, 8)][:]
    assert pool.idle_nbytes == 15 * 2**20
    pool.set_idle_limit(4 * 2**20)
    assert pool.idle_nbytes == 3 * 2**20, "the largest go first"
    lease = pool.lease(8 * 2**20)
    del lease
    assert pool.idle_nbytes == 3 * 2**20
    pool.set_idle_limit(2**30)
    del [pool.lease(8 * 2**20)][:]
    assert pool.idle_nbytes == 11 * 2**20


def test_closing_does_not_wait_for_a_disk_that_takes_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, aside = tmp_path / "parent", tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr(disk, "CLOSE_S", -1.0)
    left_alone = SpillFolder(str(parent), BlockPool(0))
    left_alone.write(FRAMES)
    folder = SpillFolder(str(parent), BlockPool(0))
    for _ in range(3):
        folder.write(FRAMES)
    spawned: list[int] = []
    spawn = os.posix_spawn
    monkeypatch.setattr(os, "posix_spawn", lambda *args, **options: spawned.append(spawn(*args, **options)))
    folder.close(str(aside))
    assert os.path.dirname(folder.path) == str(aside)
    assert not [name for name in os.listdir(parent) if os.path.basename(folder.path) in name]
    assert os.waitpid(spawned[0], 0)[1] == 0
    assert os.listdir(aside) == []
    # Without such a place all is removed at once.
    left_alone.close()
    assert os.listdir(parent) == []


def test_what_nobody_had_the_time_to_remove_is_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EAGAIN, "no process")

    monkeypatch.setattr(disk, "CLOSE_S", -1.0)
    monkeypatch.setattr(os, "posix_spawn", refuse)
    folder = SpillFolder(str(tmp_path / "parent"), BlockPool(0))
    folder.write(FRAMES)
    folder.close(str(tmp_path))
    assert remove_leftovers(str(tmp_path)) == [folder.path]
