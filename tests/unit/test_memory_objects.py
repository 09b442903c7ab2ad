"""The OBJECT tier on a real S3 server, on files, and in memory: what comes back is what was written, or an error."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest

pytest.importorskip("moto", reason="moto brings the S3 server")

from s3_server import Fault

from dask_gpurt.errors import CorruptDataError, SpillError
from dask_gpurt.memory import objects
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.memory.store import Buffer

if TYPE_CHECKING:
    from s3_server import S3Server

FRAMES: list[Buffer] = [b"small", b"", np.arange(100_000, dtype="u1").data, np.arange(30_000.0).data]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PAUSES_S", (0.01, 0.01))


@pytest.fixture(params=["s3", "file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield f"s3://{request.getfixturevalue('s3').bucket}/some/folder"
    elif request.param == "file":
        yield f"file://{tmp_path}"
    else:
        yield "memory://spilled"
        fsspec.filesystem("memory").store.clear()
        fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def listed(url: str) -> list[str]:
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    return sorted(fs.find(path))


def test_round_trip(url: str) -> None:
    folder = ObjectFolder(url, BlockPool(2**24))
    folder.begin()
    assert len(listed(url)) == 1, "the owner"
    copy = folder.write(FRAMES)
    other = folder.write([b"other"])
    assert copy.nbytes == sum(memoryview(frame).nbytes for frame in FRAMES)
    frames = copy.read()
    assert [bytes(f) for f in frames] == [bytes(f) for f in FRAMES]
    assert not any(f.readonly for f in frames)
    assert [bytes(f) for f in folder.write([]).read()] == []
    copy.remove()
    copy.remove()
    with pytest.raises(CorruptDataError, match="gone"):
        copy.read()
    assert bytes(other.read()[0]) == b"other"
    folder.close()
    folder.close()
    assert listed(url) == []
    with pytest.raises(SpillError, match="closed"):
        folder.write([b"late"])


def test_left_overs_of_the_dead_are_removed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = ObjectFolder(url, BlockPool(0))
    dead.write([b"x" * 1000])
    fs, path = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{path}/somebody-elses", b"")
    young = ObjectFolder(url, BlockPool(0))
    young.begin()
    young.renew()
    assert len(listed(url)) == 4, "nobody was silent for long enough"
    # As if all that was there were older than that.
    monkeypatch.setattr(objects, "STALE_S", -10.0)
    last = ObjectFolder(url, BlockPool(0))
    last.begin()
    last.renew()
    names = [found.rpartition("/")[2] for found in listed(url)]
    assert names == [os.path.basename(last.path) + ".owner", "somebody-elses"]
    # Who was taken for dead, and is not, finds nothing, and can go on, at the second try where there are folders.
    with contextlib.suppress(SpillError):
        dead.write([b"y"])
    assert bytes(dead.write([b"y"]).read()[0]) == b"y"
    for folder in (dead, young, last):
        folder.close()
    assert [found.rpartition("/")[2] for found in listed(url)] == ["somebody-elses"]


def test_who_is_renewed_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [ObjectFolder(f"file://{tmp_path}", BlockPool(0)) for _ in range(2)]
    copies = [folder.write([b"x"]) for folder in folders]
    for folder in folders:
        os.utime(folder.path + ".owner", (time.time() - 2 * objects.STALE_S,) * 2)
    folders[0].renew()
    third = ObjectFolder(f"file://{tmp_path}", BlockPool(0))
    third.begin()
    third.renew()
    assert copies[0].read()
    with pytest.raises(CorruptDataError, match="gone"):
        copies[1].read()
    assert not os.path.exists(folders[1].path)
    # Nor need anybody begin for it: who lives looks, too, once in a while.
    os.utime(folders[0].path + ".owner", (time.time() - 2 * objects.STALE_S,) * 2)
    third.renew()
    assert copies[0].read()
    monkeypatch.setattr(third, "_looked_s", time.monotonic() - 2 * objects.STALE_S)
    third.renew()
    assert not os.path.exists(folders[0].path)
    for folder in (*folders, third):
        folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_url_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SpillError, match="cannot keep spilled data at nosuch://") as caught:
        ObjectFolder("nosuch://user:secret@host/path", BlockPool(0))
    assert "secret" not in str(caught.value)
    folder = ObjectFolder(f"file://{tmp_path}/not/there", BlockPool(0))
    with pytest.raises(SpillError, match="cannot keep spilled data") as caught:
        folder.begin()
    assert caught.value.errno == errno.ENOENT
    assert not isinstance(caught.value, CorruptDataError)
    assert list(tmp_path.iterdir()) == []


SECRET_URLS = [
    "s3://key:hunter2@bucket/folder",
    "memory://key:hunter2@folder",
    "file://key:hunter2@/no/such/folder",
    "http://key:hunter2@127.0.0.1:1/x?token=tok-3n",
    "ftp://key:hunter2@127.0.0.1:1/x",
    "nosuch://key:hunter2@x?sig=tok-3n",
]


@pytest.mark.parametrize("url", SECRET_URLS)
def test_a_password_in_the_url_is_shown_nowhere(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PAUSES_S", ())
    said: list[str] = []

    def note(error: BaseException) -> None:
        said.extend([str(error), repr(error), *traceback.format_exception(error)])

    with caplog.at_level(logging.DEBUG, logger="dask_gpurt"):
        try:
            folder = ObjectFolder(url, BlockPool(0))
        except SpillError as error:
            note(error)
        else:
            said.append(repr(folder))
            try:
                copy = folder.write([b"x"])
                said.append(repr(copy))
                folder._fs.rm_file(copy.path)
                copy.read()
            except SpillError as error:
                note(error)
            folder._begun = True
            folder.renew()
            folder.close()
            with contextlib.suppress(SpillError):
                folder.begin()
    told = "\n".join([*said, caplog.text])
    assert told
    assert "hunter2" not in told
    assert "tok-3n" not in told


def test_what_is_no_name_of_ours_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Names that, taken for a pattern or a path, would be those of others.
    folder = ObjectFolder(f"file://{tmp_path}", BlockPool(0))
    copy = folder.write([b"x"])
    for name in ("gpurt-spill-*.owner", "gpurt-spill-.owner", "gpurt-spill-[0-9a-f]*.owner", "gpurt-spill-..owner"):
        (tmp_path / name).touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(objects, "STALE_S", -10.0)
    monkeypatch.setattr(folder, "_looked_s", -math.inf)
    folder.renew()
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert bytes(copy.read()[0]) == b"x"
    folder.close()


def test_a_bucket_is_not_made(s3: S3Server) -> None:
    folder = ObjectFolder(f"s3://{s3.bucket}-other/folder", BlockPool(0))
    with pytest.raises(SpillError):
        folder.begin()
    assert not fsspec.filesystem("s3").exists(f"{s3.bucket}-other")


# What a store can do wrong


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("method", "kind", "status"),
    [
        ("PUT", "status", 503),
        ("PUT", "status", 500),
        ("PUT", "status", 403),
        ("PUT", "drop", 0),
        ("GET", "status", 503),
        ("GET", "status", 403),
        ("GET", "drop", 0),
        ("GET", "flip", 0),
        ("GET", "short", 0),
        ("GET", "cut", 0),
    ],
)
def test_a_store_that_fails(s3: S3Server, method: str, kind: Any, status: int) -> None:
    folder = ObjectFolder(f"s3://{s3.bucket}", BlockPool(2**24))
    good = folder.write(FRAMES)
    s3.fault = Fault(method, kind, status)
    with pytest.raises(SpillError) as caught:
        folder.write(FRAMES) if method == "PUT" else good.read()
    assert isinstance(caught.value, CorruptDataError) == (kind in ("flip", "short"))
    assert "PermissionError" in str(caught.value) or status != 403
    # Bounded.
    asked = sum(asked_for == method for asked_for, _ in s3.requests)
    assert asked < 40
    # What passes by is tried again, and nothing is heard of it.
    s3.fault = Fault(method, kind, status, times=1)
    if status != 403:
        assert [bytes(f) for f in folder.write(FRAMES).read()] == [bytes(f) for f in FRAMES]
        assert s3.fault.times == 0
    s3.fault = None
    assert [bytes(f) for f in good.read()] == [bytes(f) for f in FRAMES]
    folder.close()
    assert listed(f"s3://{s3.bucket}") == []


@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_store_that_does_not_answer(s3: S3Server, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ObjectFolder(f"s3://{s3.bucket}", BlockPool(0))
    good = folder.write([b"x" * 1000])
    monkeypatch.setattr(objects, "DEADLINE_S", 0.5)
    s3.fault = Fault(method, "hang")
    with pytest.raises(SpillError, match="Timeout"):
        folder.write([b"y"]) if method == "PUT" else good.read()
    s3.fault = None
    assert bytes(good.read()[0]) == b"x" * 1000
    folder.close()


@pytest.mark.usefixtures("quick")
def test_a_store_that_is_not_there(s3: S3Server, caplog: pytest.LogCaptureFixture) -> None:
    folder = ObjectFolder(f"s3://{s3.bucket}", BlockPool(0))
    good = folder.write([b"x" * 1000])
    s3.stop()
    for operation in (good.read, good.remove, lambda: folder.write([b"y"])):
        with pytest.raises(SpillError, match="Could not connect"):
            operation()
    folder.renew()
    folder.close()
    assert "is left for another worker" in caplog.text


@pytest.mark.usefixtures("quick")
def test_objects_cannot_be_exchanged(s3: S3Server) -> None:
    url = f"s3://{s3.bucket}"
    folder = ObjectFolder(url, BlockPool(0))
    one, other = folder.write([b"1" * 1000]), folder.write([b"2" * 1000])
    fsspec.filesystem("s3").copy(other.path, one.path)
    with pytest.raises(CorruptDataError, match="digest"):
        one.read()
    folder.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_file_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    folder = ObjectFolder(f"file://{tmp_path}", BlockPool(0))
    copy = folder.write([b"x"])
    monkeypatch.setattr(folder._fs, "pipe_file", refuse)
    monkeypatch.setattr(folder._fs, "cat_file", refuse)
    for operation in (copy.read, lambda: folder.write([b"y"])):
        with pytest.raises(SpillError) as caught:
            operation()
        assert caught.value.errno == number
        assert not isinstance(caught.value, CorruptDataError)
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_names_cannot_be_guessed() -> None:
    folders = [ObjectFolder("memory://spilled", BlockPool(0)) for _ in range(2)]
    assert len({folder.path for folder in folders}) == 2
    assert all(len(folder.path.rpartition("-")[2]) == 32 for folder in folders)
