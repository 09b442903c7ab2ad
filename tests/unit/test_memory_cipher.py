"""What is encrypted at rest: back as it was, or an error; and nothing of it in any file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cryptography", reason="does the encryption")

from dask_gpurt.errors import CorruptDataError, InstallError
from dask_gpurt.memory import cipher as module
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cipher import Cipher
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.lower import DiskStore, ObjectStore, RawName
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.memory.store import Buffer

PATTERN = b"what nobody else is to read. "


@pytest.fixture
def cipher() -> Cipher:
    return Cipher(BlockPool(0).lease)


def frames() -> list[Buffer]:
    return [b"", b"x", PATTERN * 1000, np.arange(3000.0).reshape(30, 100).data, bytearray(2500)]


def raw(buffers: Any) -> list[bytes]:
    return [bytes(memoryview(buffer).cast("B")) if memoryview(buffer).nbytes else b"" for buffer in buffers]


@pytest.mark.parametrize("piece", [module.PIECE_NBYTES, 1000, 2500])
def test_frames_come_back(cipher: Cipher, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(module, "PIECE_NBYTES", piece)
    before, first = cipher.seal([b"before"])
    sealed, number = cipher.seal(frames())
    assert PATTERN not in b"".join(map(bytes, sealed))
    assert raw(cipher.open(sealed, number)) == raw(frames())
    assert raw(cipher.open(before, first)) == [b"before"]
    # Written where it can be changed, as all that is read back.
    assert not any(view.readonly for view in cipher.open(sealed, number))


def cut(frame: bytearray) -> None:
    del frame[-1:]


def grow(frame: bytearray) -> None:
    frame += b"\0"


def change(frame: bytearray) -> None:
    frame[len(frame) // 2] ^= 1


def exchange_pieces(frame: bytearray) -> None:
    frame[:1016], frame[1016:2032] = frame[1016:2032], frame[:1016]


@pytest.mark.parametrize("damage", [cut, grow, change, exchange_pieces])
def test_what_was_changed_is_not_opened(
    cipher: Cipher, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytearray], None]
) -> None:
    monkeypatch.setattr(module, "PIECE_NBYTES", 1000)
    (sealed,), number = cipher.seal([PATTERN * 100])
    changed = bytearray(sealed)
    damage(changed)
    with pytest.raises(CorruptDataError, match="not what was encrypted"):
        cipher.open([changed], number)


def test_a_frame_is_not_taken_for_another(cipher: Cipher) -> None:
    (one,), number = cipher.seal([PATTERN])
    (other,), _ = cipher.seal([PATTERN])
    assert bytes(one) != bytes(other)
    with pytest.raises(CorruptDataError):
        cipher.open([other], number)
    with pytest.raises(CorruptDataError):
        Cipher(BlockPool(0).lease).open([one], number)


def test_no_number_is_used_twice(cipher: Cipher) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = sorted(number for _, number in threads.map(lambda _: cipher.seal([b"a", b"b", b""]), range(500)))
    assert found == list(range(0, 1500, 3))


def test_files_and_objects_hold_nothing_that_can_be_read(cipher: Cipher, tmp_path: Path) -> None:
    pool = BlockPool(0)
    folder = SpillFolder(str(tmp_path / "disk"), pool)
    (tmp_path / "objects").mkdir()
    objects = ObjectFolder(f"file://{tmp_path}/objects", pool)
    disk, store = DiskStore(folder, None, cipher), ObjectStore(objects, None, cipher)
    value = np.frombuffer(PATTERN * 100_000, "u1").copy()
    copies: list[Any] = [disk.store("x", value), disk.store(RawName(), frames())]
    copies += [store.take_over(copies[0]), store.take_over(copies[1])]
    written = [path.read_bytes() for path in tmp_path.rglob("*.blk")]
    assert len(written) == 4
    assert sum(map(len, written)) > 2 * value.nbytes
    assert not [content for content in written if PATTERN in content or PATTERN[3:] in content]
    for copy in copies[::2]:
        np.testing.assert_array_equal(copy.load(), value)
        _, served = copy.frames()
        assert PATTERN in b"".join(raw(served))
    for copy in copies[1::2]:
        assert raw(copy.load()) == raw(frames())
    # Without it they are what they are.
    plain = DiskStore(folder).store("x", value)
    assert PATTERN in Path(plain._kept.path).read_bytes()  # type: ignore[attr-defined]
    folder.close()
    objects.close()


def test_a_store_that_gives_back_something_else_is_distrusted(cipher: Cipher, tmp_path: Path) -> None:
    folder = SpillFolder(str(tmp_path), BlockPool(0))
    store = DiskStore(folder, None, cipher)
    copy: Any = store.store("x", PATTERN)
    copy.sealed += 1
    with pytest.raises(CorruptDataError):
        copy.load()
    assert store.distrusted
    folder.close()


def test_it_shows_no_key(cipher: Cipher) -> None:
    assert repr(cipher) == "<Cipher>"


def test_without_the_library_it_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    assert "cannot be imported" in str(module.refusal())
    with pytest.raises(InstallError, match="encryption is on"):
        Cipher(BlockPool(0).lease)
