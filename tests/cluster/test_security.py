"""What must not be told, and where nothing may be steered to, on real workers."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import numpy as np
import pytest
from clusters import WITHOUT_MONITOR, local_cluster
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.errors import ConfigError

# The workers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Keys that would be other files, or none, if they had a part in the names of files.
HOSTILE: list[Any] = [
    "../../../escaped",
    "/tmp/escaped",
    "a/b/../../../../escaped",
    "nul\0nul",
    "x" * 5000,
    "ünï-cödé/🦜\n",
    ".lock",
    "*",
    ("tuple", 1, "../../escaped"),
    ("a", ("b", "../.."), -1),
    "{0.__class__}%s%n",
]


def tree(folder: str) -> set[str]:
    return {os.path.join(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files)}


def spilled(dask_worker: Any) -> tuple[int, str]:
    memory = dask_worker.extensions["gpurt"].memory
    return memory.metrics()["disk_held_nbytes"], memory._folder.path


def modes(folder: str) -> dict[str, int]:
    """Of a folder and of the files in it."""
    found = {folder: os.stat(folder).st_mode}
    for name in os.listdir(folder):
        # Workers go on to spill and to read.
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.stat(os.path.join(folder, name)).st_mode
    return found


def value_of(number: int) -> np.ndarray:
    return np.full(100_000, number)


def test_keys_have_no_part_in_the_names_of_files(tmp_path: Path) -> None:
    with (
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(1, memory_limit="400 MB", local_directory=str(tmp_path / "inside")) as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client, config={"memory.host-limit": 900_000})
        outside = {path for path in tree(str(tmp_path)) if "/inside" not in path}
        futures = [client.submit(value_of, number, key=key) for number, key in enumerate(HOSTILE)]
        scattered = client.scatter({f"../{number}": value_of(number) for number in range(3)})
        for number, future in enumerate(futures):
            assert (future.result(timeout=60) == number).all()
        ((nbytes, folder),) = client.run(spilled).values()
        assert nbytes > 0
        found = modes(folder)
        assert not [mode for mode in found.values() if mode & 0o077]
        del found[folder]
        assert found
        assert not [name for name in found if not re.fullmatch(r"\d+\.blk(\.idle)?", name)]
        assert {path for path in tree(str(tmp_path)) if "/inside" not in path} == outside
        assert not os.path.exists("/tmp/escaped")
        for number, future in enumerate(futures):
            assert (future.result(timeout=60) == number).all()
        for number, future in enumerate(scattered.values()):
            assert (future.result(timeout=60) == number).all()


PATTERN = b"what nobody else is to read. "


def pattern(number: int) -> np.ndarray:
    return np.frombuffer(PATTERN * 20_000 + bytes([number]), "u1").copy()


def files_with_it(folder: Path) -> tuple[int, int]:
    """How many spill files there are, and how many of them have the pattern."""
    contents = []
    for path in folder.rglob("gpurt-spill-*/*.blk*"):
        # Workers go on to spill and to read.
        with contextlib.suppress(FileNotFoundError):
            contents.append(path.read_bytes())
    return len(contents), sum(PATTERN in content for content in contents)


def test_what_is_spilled_is_encrypted_where_that_is_wanted(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="does the encryption")
    with (
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(2, memory_limit="400 MB", local_directory=str(tmp_path)) as cluster,
        Client(cluster) as client,
    ):
        for encryption in (False, True):
            config = {"memory.host-limit": 900_000, "memory.compression": "off", "memory.encryption": encryption}
            assert dask_gpurt.install(client, config=config).installed("memory")
            futures = client.map(pattern, range(12), pure=False)
            wait(futures)
            # Peers are sent what lies on DISK, and tasks read it.
            sums = client.gather(
                client.map(lambda x, y: int(x[-1]) + int(y[-1]), futures, [*futures[6:], *futures[:6]])
            )
            assert sums == [number + (number + 6) % 12 for number in range(12)]
            count, found = files_with_it(tmp_path)
            assert count
            assert (found == 0) is encryption
            for number, value in enumerate(client.gather(futures)):
                np.testing.assert_array_equal(value, pattern(number))
            del futures, value
            dask_gpurt.uninstall(client)


def told_by(client: Client) -> str:
    """Everything that a cluster shows without being asked for a password."""

    def of_server(dask_worker: Any) -> str:
        plugin = dask_worker.plugins["gpurt"]
        found = [repr(plugin), repr(vars(plugin)), repr(dask_worker.plugins)]
        memory = getattr(dask_worker.extensions.get("gpurt"), "memory", None)
        if memory is not None:
            found += [repr(memory), repr(memory._objects), repr(memory.metrics())]
        return "\n".join(found)

    shown: list[Any] = [dask_gpurt.status(client), dask_gpurt.status(client)._repr_html_()]
    shown += [client.get_scheduler_logs(), client.get_worker_logs(), client.get_events(), client.scheduler_info()]
    shown += [client.run(of_server), client.run_on_scheduler(of_server)]
    return "\n".join(map(repr, shown))


def fail(settings: Any, dask_worker: Any) -> None:
    raise ZeroDivisionError


def test_a_password_in_the_url_is_told_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level("DEBUG"),
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(1, processes=False, memory_limit="400 MB") as cluster,
        Client(cluster) as client,
    ):
        config = {"memory.host-limit": 900_000, "memory.disk-limit": 900_000}
        for url, error in (("s3://key:hunter2@bucket/folder", ConfigError), ("key:hunter2@no/url", ConfigError)):
            with pytest.raises(error) as caught:
                dask_gpurt.install(client, config={**config, "memory.object-url": url})
            assert "hunter2" not in f"{caught.value!r} {caught.value}"
        answer = dask_gpurt.install(client, config={**config, "memory.object-url": "memory://key:hunter2@folder"})
        assert answer.installed("memory"), str(answer)
        futures = client.map(value_of, range(6))
        assert [int(future.result(timeout=60)[0]) for future in futures] == list(range(6))
        assert "hunter2" not in told_by(client)
        # Dask logs what it was called with where that fails.
        plugin = next(iter(cluster.workers.values())).plugins["gpurt"]
        assert plugin.settings.memory.object_url.endswith("hunter2@folder")
        with pytest.raises(ZeroDivisionError):
            client.run(fail, plugin.settings)
        del futures
        dask_gpurt.uninstall(client)
    assert "Run Failed" in caplog.text
    assert "hunter2" not in caplog.text
