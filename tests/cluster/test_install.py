"""Installation on real clusters: busy ones, growing ones, restarted ones; and nothing left behind by an uninstall."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Iterator
from typing import Any, cast

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
from clusters import hearing, local_cluster, workers_getting_ready
from distributed import Client, Event, LocalCluster, Worker, wait

import dask_gpurt
from dask_gpurt import seams
from dask_gpurt.config import PARTS
from dask_gpurt.errors import ConfigError, InstallError
from dask_gpurt.installation import Installation

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def fingerprint(dask_worker: Any) -> dict[str, Any]:
    """Everything on a server that an installation might have touched, in a form that can be compared."""

    def name(value: object) -> str:
        return getattr(value, "__qualname__", type(value).__qualname__)

    # Dask gives the scheduler under this name, too, to what runs there.
    server = dask_worker
    found: dict[str, Any] = {
        "callables": {key: name(value) for key, value in vars(server).items() if callable(value)},
        "attributes": sorted(vars(server)),
        "handlers": {key: name(value) for key, value in server.handlers.items()},
        "stream handlers": {key: name(value) for key, value in server.stream_handlers.items()},
        "plugins": {key: name(value) for key, value in server.plugins.items() if not key.startswith("Worker-")},
        "extensions": {key: name(value) for key, value in server.extensions.items()},
    }
    if isinstance(server, Worker):
        found["data"] = (name(server.data), name(server.state.data))
    else:
        found["worker plugins"] = sorted(server.worker_plugins)
        found["transitions"] = {key: name(value) for key, value in server._TRANSITIONS_TABLE.items()}
        for key in ("stealing", "shuffle"):
            extension = server.extensions.get(key) or server.plugins[key]
            found[key] = sorted(key for key, value in vars(extension).items() if callable(value))
    return found


def fingerprints(client: Client) -> dict[str, Any]:
    return {"scheduler": client.run_on_scheduler(fingerprint), **client.run(fingerprint)}


def test_all_parts_are_installed_and_taken_away_without_a_trace(client: Client) -> None:
    before = fingerprints(client)
    answer = dask_gpurt.install(client)
    assert isinstance(answer, Installation)
    assert all(answer.installed(part) for part in PARTS), str(answer)
    assert len(answer.workers) == 2
    # At once, and not only of those whose heartbeat happens to have come.
    assert set(answer.tiers) == set(answer.workers)
    assert all("host" in tiers for tiers in answer.tiers.values())
    assert fingerprints(client) != before
    after = dask_gpurt.uninstall(client)
    assert not any(after.installed(part) for part in PARTS)
    assert fingerprints(client) == before


def test_uninstall_where_nothing_is_installed_does_nothing(client: Client) -> None:
    before = fingerprints(client)
    assert not any(dask_gpurt.uninstall(client).installed(part) for part in PARTS)
    assert fingerprints(client) == before


def test_installing_twice_replaces_and_one_uninstall_is_enough(client: Client) -> None:
    before = fingerprints(client)
    dask_gpurt.install(client)
    answer = dask_gpurt.install(client, placement=False)
    assert not answer.installed("placement")
    assert "left out" in str(answer)
    dask_gpurt.uninstall(client)
    assert fingerprints(client) == before


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_and_each_part_left_out(client: Client, part: str) -> None:
    alone = dask_gpurt.install(client, config={f"{other}.enabled": other == part for other in PARTS})
    assert [p for p in PARTS if alone.installed(p)] == [part]
    assert client.submit(sum, [1, 2]).result(timeout=30) == 3
    arguments: dict[str, Any] = {part: False}
    without = dask_gpurt.install(client, **arguments)
    assert [p for p in PARTS if not without.installed(p)] == [part]
    x = da.ones((400, 400), chunks=(100, 100))
    assert (x + x.T).sum().compute() == 2 * 400 * 400


def _spilled(dask_worker: Any) -> int:
    total = dask_worker.data.spilled_total
    return int(total.disk)


@pytest.fixture
def never_paused() -> Iterator[None]:
    """Stock on a busy machine may come so near to the limit that a worker pauses, and then for good: not what is tested."""
    with dask.config.set({f"distributed.worker.memory.{mark}": False for mark in ("pause", "terminate")}):
        yield


@pytest.mark.usefixtures("never_paused")
def test_installing_on_a_busy_cluster_with_data_in_memory_and_on_disk_loses_nothing(client: Client) -> None:
    rng = da.random.default_rng(7)
    # 1.4 GB on two workers whose target is 0.6 GiB: stock has spilled some of it.
    x = rng.random((12000, 15000), chunks=(1500, 2500)).persist()
    wait(x)
    expected = x.sum(axis=0).compute()
    assert sum(client.run(_spilled).values()) > 0, "the test needs data on disk"
    [scattered] = client.scatter([{"some": "value"}])

    running = (x + 1).sum(axis=1).persist()
    assert all(dask_gpurt.install(client).installed(part) for part in PARTS)
    np.testing.assert_allclose(x.sum(axis=0).compute(), expected)
    np.testing.assert_allclose(running.compute(), x.sum(axis=1).compute() + 15000)
    assert sum(client.run(_spilled).values()) > 0
    assert scattered.result() == {"some": "value"}

    running = (x + 2).sum(axis=1).persist()
    dask_gpurt.uninstall(client)
    np.testing.assert_allclose(x.sum(axis=0).compute(), expected)
    np.testing.assert_allclose(running.compute(), x.sum(axis=1).compute() + 30000)
    assert scattered.result() == {"some": "value"}
    # The same keys, not keys that were computed again.
    assert client.run_on_scheduler(_recomputed) == 0


def _recomputed(dask_scheduler: Any) -> int:
    return sum(
        1
        for *_, start, finish, _, stimulus, _ in dask_scheduler.transition_log
        if start == "memory" and finish == "released" and "missing" in str(stimulus)
    )


def test_workers_that_join_later_get_it(cluster: LocalCluster, client: Client) -> None:
    dask_gpurt.install(client)
    with workers_getting_ready(client, 1):
        cluster.scale(3)
    answer = dask_gpurt.status(client)
    assert len(answer.workers) == 3
    assert all(answer.installed(part) for part in PARTS), str(answer)


def test_adaptive_scaling_brings_it_to_new_workers_and_keeps_the_data_of_those_that_go() -> None:
    # Not processes: where one takes some seconds to end, Dask's nanny gives up, and its cluster never closes.
    with (
        dask.config.set({"distributed.scheduler.validate": True, "distributed.worker.validate": True}),
        local_cluster(2, processes=False, memory_limit="1 GiB") as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client)
        go = Event(client=client)
        held = client.map(_answer_when, range(24), go=go)
        with workers_getting_ready(client, 1):
            cluster.adapt(minimum=1, maximum=3, interval="200ms", target_duration="1s", wait_count=2)
        answer = dask_gpurt.status(client)
        assert all(answer.installed(part) for part in PARTS), str(answer)
        with hearing(client, "all", "remove-worker", 2) as gone:
            go.set()
            wait(held, timeout=60)
        assert not any(event["lost-computed-tasks"] for event in gone)
        assert client.gather(held) == [[number] * 1000 for number in range(24)]


def _answer_when(number: int, go: Event) -> list[int]:
    go.wait()
    return [number] * 1000


def test_restart_keeps_it(client: Client) -> None:
    dask_gpurt.install(client)
    with workers_getting_ready(client, 2):
        client.restart()
    answer = dask_gpurt.status(client)
    assert all(answer.installed(part) for part in PARTS), str(answer)
    assert client.submit(sum, [1, 2]).result(timeout=30) == 3


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"memory.host-limt": 1}, "gpurt.memory.host-limt"),
        ({"memory.host-limit": "plenty"}, "'plenty'"),
        ({"memory.directory": "/proc/no/such/folder"}, "/proc/no/such/folder"),
        ({"memory.object-url": "file:///proc/no/such/folder"}, "object-url: 'file:///proc/no/such/folder'"),
        ({"memory.object-url": "nosuch://bucket"}, "a URL that tcp://.* can write"),
        ({"memory.object-url": "/no/url"}, "a URL that fsspec opens"),
    ],
)
def test_bad_configuration_is_refused_and_the_cluster_left_as_it_was(
    client: Client, config: dict[str, object], named: str
) -> None:
    before = fingerprints(client)
    with pytest.raises(ConfigError, match=named):
        dask_gpurt.install(client, config=config)
    assert fingerprints(client) == before


def test_a_dask_out_of_range_is_refused_and_the_cluster_left_as_it_was(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprints(client)
    monkeypatch.setattr(seams, "SUPPORTED", ("2031.1.0", "2031.2"))
    with pytest.raises(InstallError, match=r"runs dask 202\d.*works with dask >= 2031.1.0, < 2031.2"):
        dask_gpurt.install(client)
    assert fingerprints(client) == before


def _break(part: str, side: seams.Side) -> None:
    seams.SEAMS[part] = (*seams.SEAMS[part], seams.Seam(side, "distributed:no_such_name"))


@pytest.mark.parametrize("part", ["memory", "shuffle"])
def test_a_worker_on_which_a_part_cannot_start_runs_stock_for_it(client: Client, part: str) -> None:
    first, second = client.scheduler_info(n_workers=-1)["workers"]
    client.run(_break, part, "worker", workers=[first])
    answer = dask_gpurt.install(client)
    assert not answer.installed(part)
    assert answer.workers[second][part].installed
    assert "no_such_name" in answer.workers[first][part].remark
    assert first in str(answer)
    # And it stands in the log of that worker, beside Dask's own messages.
    logs = client.get_worker_logs()
    assert [address for address in logs if any("is left stock" in message for _, message in logs[address])] == [first]
    x = da.ones((600, 600), chunks=(100, 600)).rechunk((600, 100), method="p2p")
    assert x.sum().compute() == 600 * 600


@pytest.mark.parametrize("part", ["placement", "shuffle"])
def test_a_part_that_cannot_start_on_the_scheduler_is_left_stock(part: str) -> None:
    with (
        local_cluster(1, 2, processes=False) as cluster,
        Client(cluster) as client,
        pytest.MonkeyPatch.context() as patch,
    ):
        broken = (*seams.SEAMS[part], seams.Seam("scheduler", "distributed:no_such_name"))
        patch.setitem(seams.SEAMS, part, broken)
        answer = dask_gpurt.install(client)
        assert [p for p in PARTS if not answer.installed(p)] == [part]
        assert "no_such_name" in str(answer)
        assert client.submit(sum, [1, 2]).result(timeout=30) == 3


def test_an_asynchronous_client_awaits_the_answer() -> None:
    async def main() -> tuple[Installation, Installation]:
        async with (
            local_cluster(1, 2, processes=False, asynchronous=True) as cluster,
            Client(cluster, asynchronous=True) as client,
        ):
            installing = cast("Awaitable[Installation]", dask_gpurt.install(client))
            installed = await installing
            return installed, await cast("Awaitable[Installation]", dask_gpurt.uninstall(client))

    installed, uninstalled = asyncio.run(main())
    assert all(installed.installed(part) for part in PARTS)
    assert not any(uninstalled.installed(part) for part in PARTS)


@contextlib.contextmanager
def command_line_cluster(
    scheduler_args: list[str], worker_args: list[str], env: dict[str, str], folder: Any
) -> Iterator[Client]:
    """A scheduler and a worker started as a deployment starts them: by command line."""
    dask = os.path.join(os.path.dirname(sys.executable), "dask")
    where = str(folder / "scheduler.json")
    quiet = {**os.environ, **env, "PYTHONWARNINGS": "ignore"}
    with contextlib.ExitStack() as stack:

        def start(*args: str) -> None:
            process = subprocess.Popen([dask, *args], env=quiet, cwd=folder)

            def end() -> None:
                process.terminate()
                process.wait(30)

            stack.callback(end)

        start(
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            where,
            *scheduler_args,
        )
        start(
            "worker",
            "--scheduler-file",
            where,
            "--host",
            "127.0.0.1",
            "--nthreads",
            "1",
            "--no-dashboard",
            *worker_args,
        )
        client = stack.enter_context(Client(scheduler_file=where, timeout=60))
        client.wait_for_workers(1, timeout=60)
        yield client


def as_documented() -> tuple[list[str], list[str]]:
    """The arguments of ``dask scheduler`` and ``dask worker`` as they stand on the page on deployments."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "deployment.md").read_text()
    [scheduler], [worker] = (
        re.findall(rf"^    dask {role} (.+)$", page, re.MULTILINE) for role in ("scheduler", "worker")
    )
    return shlex.split(scheduler), shlex.split(worker)


@pytest.mark.parametrize("way", ["command line", "environment", "as documented: the scheduler alone"])
def test_preload(way: str, tmp_path: Any) -> None:
    option = ["--preload", "dask_gpurt"]
    env = {}
    scheduler, worker = option, option
    if way == "environment":
        env = {"DASK_DISTRIBUTED__SCHEDULER__PRELOAD": "dask_gpurt", "DASK_DISTRIBUTED__WORKER__PRELOAD": "dask_gpurt"}
        scheduler, worker = [], []
    elif way.startswith("as documented"):
        scheduler, worker = as_documented()
        assert "dask_gpurt" in scheduler
        assert "dask_gpurt" not in worker
    with command_line_cluster(scheduler, worker, env, tmp_path) as client:
        assert client.submit(sum, [1, 2]).result(timeout=60) == 3
        answer = dask_gpurt.status(client)
        assert all(answer.installed(part) for part in PARTS), str(answer)
        dask_gpurt.uninstall(client)
        assert client.run(_has_it) == dict.fromkeys(client.run(_has_it), False)
        assert client.submit(sum, [1, 3]).result(timeout=60) == 4


def test_preload_on_a_worker_alone_gives_that_worker_its_memory(tmp_path: Any) -> None:
    with command_line_cluster([], ["--preload", "dask_gpurt"], {}, tmp_path) as client:
        assert list(client.run(_has_it).values()) == [True]
        dask_gpurt.uninstall(client)
        assert list(client.run(_has_it).values()) == [False]


def _has_it(dask_worker: Any) -> bool:
    return "gpurt" in dask_worker.extensions
