"""What a process holds is, after an installation has come, worked and gone, what it held before; and twenty of them add nothing."""

from __future__ import annotations

import asyncio
import collections
import gc
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import psutil
import pytest
from clusters import WITHOUT_MONITOR, local_cluster
from distributed import Client, wait

import dask_gpurt

pytest.importorskip("ucxx", reason="ucxx is not installed", exc_type=ImportError)

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

CYCLES = 20
#: Far less than what is worked with.
HOST_LIMIT = 2_000_000
ROWS = 60_000


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with (
        dask.config.set(WITHOUT_MONITOR),
        local_cluster(2, memory_limit="600 MB") as cluster,
        Client(cluster) as client,
    ):
        # What stock opens and imports for such work it keeps.
        work(client)
        yield client


def work(client: Client, config: dict[str, Any] | None = None) -> None:
    """Spill, shuffle and rechunk, between an installation and an uninstallation if there is a ``config`` for them."""
    if config is not None:
        answer = dask_gpurt.install(client, config=config)
        assert answer.installed("memory"), str(answer)
        assert answer.installed("shuffle"), str(answer)
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"key": rng.integers(0, 99, ROWS), "x": rng.random(ROWS), "s": rng.choice(["a", "bc"], ROWS)})
    source = dd.from_pandas(data, npartitions=6, sort=False)
    found = source.shuffle("key", npartitions=5, shuffle_method="p2p").compute()
    pd.testing.assert_frame_equal(found.sort_index(), data.assign(s=data.s.astype(found.s.dtype)))
    x = da.arange(1_200_000, chunks=100_000).reshape(1200, 1000).persist()
    wait(x)
    turned = x.rechunk((1200, 100), method="p2p").sum(axis=0).compute()
    np.testing.assert_array_equal(turned, np.arange(1_200_000).reshape(1200, 1000).sum(axis=0))
    if config is not None:
        figures = client.run(figures_of)
        assert sum(spilled for spilled, _ in figures.values()) > 0, figures
        if client.run(by_ucx).values() != {False}:
            # The first run may end before UCX is there.
            while not all(sent for _, sent in client.run(figures_of).values()):
                source.shuffle("key", npartitions=5, shuffle_method="p2p").compute()
        del x, found
        dask_gpurt.uninstall(client)


def figures_of(dask_worker: Any) -> tuple[int, int]:
    runtime = dask_worker.extensions["gpurt"]
    return runtime.memory.metrics()["host_written_nbytes"], runtime.shuffle.carrier.ucx_nbytes


def by_ucx(dask_worker: Any) -> bool:
    return bool(dask_worker.extensions["gpurt"].shuffle.carrier.path() == "by UCX")


def name_of(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"


async def held(dask_worker: Any) -> dict[str, Any]:
    while getattr(dask_worker, "state", dask_worker).tasks:  # noqa: ASYNC110  the client's words for it are on their way
        await asyncio.sleep(0.01)
    for _ in range(3):
        # Tasks that end, and what they refer to.
        await asyncio.sleep(0)
        gc.collect()
    return holding(dask_worker)


def holding(server: Any) -> dict[str, Any]:
    """All that the process of a server holds, and what of Dask's is replaced in it."""
    fds: collections.Counter[str] = collections.Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        fds[re.sub(r"\d+", "N", target)] += 1
    # Connections are Dask's, which keeps as many as were needed at a time; those of UCX are counted by its threads.
    fds.pop("socket:[N]", None)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    maps = Path("/proc/self/maps").read_text().splitlines()
    segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    ours: collections.Counter[str] = collections.Counter()
    for thing in gc.get_objects():
        module = getattr(type(thing), "__module__", None)
        if isinstance(module, str) and module.startswith(("dask_gpurt", "ucxx")):
            ours[f"{module}.{type(thing).__qualname__}"] += 1
    # Constants; what connections keep that were opened within a shuffle: a name, and where stock's measures go; and the
    # memory of a few values that are referred to until something else is computed. More would show in the size of the process.
    for name in ("dask_gpurt.topology.Rate", "dask_gpurt.seams._MetricsOf", "dask_gpurt.memory.blocks._Slab"):
        del ours[name]
    from dask.dataframe import multi, shuffle
    from dask.dataframe.dask_expr import _shuffle

    found: dict[str, Any] = {
        # The event loop's own threads come as they are needed, up to a number that stock sets.
        "threads": sorted(
            name
            for thread in threading.enumerate()
            if not (name := re.sub(r"\d+", "N", thread.name)).startswith(("asyncio_", "ThreadPoolExecutor-"))
        ),
        "descriptors": dict(fds),
        "locked": status["VmLck"].split()[0],
        "pinned": status["VmPin"].split()[0],
        "shared memory": len([line for line in maps if "/dev/shm" in line or "/SYSV" in line]),
        "segments": len([segment for segment in segments if segment[4] == str(os.getpid())]),
        "children": [child.name() for child in psutil.Process().children(recursive=True)],
        "objects": dict(ours),
        "tasks": sorted(name for task in asyncio.all_tasks() if "gpurt" in (name := task.get_name())),
        "callbacks": sorted(server.periodic_callbacks),
        "handlers": sorted(server.handlers),
        "stream handlers": sorted(server.stream_handlers),
        "extensions": sorted(server.extensions),
        "plugins": sorted(re.sub(r"-[0-9a-f-]{36}", "", name) for name in server.plugins),
        "replaced": [
            name_of(value)
            for value in (
                shuffle.partitioning_index,
                _shuffle.partitioning_index,  # type: ignore[attr-defined]
                _shuffle.AssignPartitioningIndex.operation,
                multi.merge_chunk,
                type(getattr(server, "data", None)),
            )
        ],
        "rss": psutil.Process().memory_info().rss,
    }
    if hasattr(server, "local_directory"):
        found["files"] = sorted(
            os.path.relpath(os.path.join(where, name), server.local_directory)
            for where, folders, files in os.walk(server.local_directory)
            for name in (*folders, *files)
        )
    return found


def holdings(client: Client) -> dict[str, dict[str, Any]]:
    return {"scheduler": client.run_on_scheduler(held), **client.run(held)}


def common(was: Any, now: Any) -> Any:
    """Return what there was of what there is now."""
    if isinstance(was, dict):
        return dict(collections.Counter(was) & collections.Counter(now))
    if isinstance(was, list):
        there = collections.Counter(now)
        kept = []
        for name in was:
            if there[name]:
                there[name] -= 1
                kept.append(name)
        return kept
    return min(was, now)


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Say what is not as it was, but for the size of the process, which is never the same."""
    found = []
    for server, held_before in before.items():
        for what in held_before.keys() - {"rss"}:
            was, now = held_before[what], after[server][what]
            if server == "scheduler":
                # It is in the process of all tests, and what others have left there may go meanwhile.
                was = common(was, now)
            if isinstance(was, dict):
                every = was.keys() | now.keys()
                found += [
                    f"{server}: {what}: {name}: {was.get(name, 0)} -> {now.get(name, 0)}"
                    for name in sorted(every)
                    if was.get(name, 0) != now.get(name, 0)
                ]
            elif was != now:
                found.append(f"{server}: {what}: {was} -> {now}")
    return found


def test_nothing_is_held_any_more_after_an_installation_has_worked_and_gone(client: Client) -> None:
    config = {"memory.host-limit": HOST_LIMIT}
    # Once for what is loaded and compiled for good: modules, UCX's own threads, Numba's machine code.
    work(client, config)
    before = holdings(client)
    work(client, config)
    after = holdings(client)
    assert differences(before, after) == []
    for server, what in after.items():
        assert not [name for name in what["threads"] if "gpurt" in name], server
        assert (what["locked"], what["pinned"]) == ("0", "0")
        assert what["tasks"] == []
        # The scheduler is in the process of all tests, with what others have left there.
        assert server == "scheduler" or not [
            name for name in what["objects"] if name.endswith(("Manager", "Pool", "Carrier", "Transport", "Engine"))
        ]
        assert not [path for path in what.get("files", ()) if "gpurt" in path]
        assert not [name for name in what["replaced"] if "gpurt" in name]
        assert not [
            name
            for kind in ("handlers", "stream handlers", "callbacks", "extensions", "plugins")
            for name in what[kind]
            if "gpurt" in name
        ]


def test_twenty_installations_leave_no_more_than_one(client: Client) -> None:
    config = {"memory.host-limit": HOST_LIMIT}
    work(client, config)
    first = holdings(client)
    for number in range(CYCLES):
        # Most of them see no work, as what takes the time is not what an installation takes.
        if number % 7 == 6:
            work(client, config)
        else:
            dask_gpurt.install(client, config=config)
            dask_gpurt.uninstall(client)
    last = holdings(client)
    assert differences(first, last) == []
    for server in first:
        assert last[server]["rss"] - first[server]["rss"] < 64 * 2**20, server
