"""The kill matrix: what is shuffled x phase x victim x transport, in memory and on disk, on real processes.

A *trap* is laid in every worker: it springs once, in the first worker that comes to the given point of a shuffle, and
kills (SIGKILL) that worker, a peer of it, or both. Nannies bring them back. Every case ends with the right answer, every
row compared, and leaves nothing behind: no run, no bytes in the books, no thread, no file.

Some cases stand for the rest; all of them: ``pytest -m exhaustive tests/cluster/test_shuffle_kill.py``. With ``--stock`` they befall
Dask's own shuffle, in memory and on disk, by Dask's comms.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from dask.utils import parse_bytes
from distributed import Client, wait

import dask_gpurt

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

KINDS = ["shuffle", "merge", "rechunk"]
#: Where a trap is: before the first message; where messages are under way in both directions, none of them answered;
#: where one is taken in and not answered; at the barrier; where the first output has its shards, and a later one. ("inputs" is as
#: "transfers", and the last input is split after it, so that the barrier has not begun.)
PHASES = ["first-transfer", "transfers", "unanswered", "barrier", "first-unpack", "unpacks"]
#: The worker that the trap is in, one that it has to do with at that moment, both.
VICTIMS = ["self", "peer", "both"]
#: Transport, bytes that a worker may hold (None: all in memory), and what it may keep of what it has sent (None: nothing, so that a
#: lost worker costs a restart).
PLACES = list(itertools.product(["auto", "dask"], [None, "6 MiB"], [None, "1 GiB"]))
#: The very same objects wherever they are meant: then pytest keeps the cluster.
IN_MEMORY, ON_DISK, KEPT_IN_MEMORY, KEPT_ON_DISK = PLACES[0], PLACES[6], PLACES[1], PLACES[7]

WORKERS, LIMIT = 3, "3 GiB"
DEADLINE_S = 60
PARTITIONS, ROWS = 10, 45_000
BLOCK = (100, 4000)


# The data


def frame(number: int) -> Any:
    rng = np.random.default_rng(number)
    columns = {f"c{i}": rng.random(ROWS) for i in range(7)}
    return pd.DataFrame({"id": np.arange(ROWS) + number * ROWS, "key": rng.integers(0, ROWS * 5, ROWS), **columns})


def other_frame(number: int) -> Any:
    """Half of the keys are in none of the frames."""
    keys = np.arange(number, ROWS * 10, PARTITIONS)
    return pd.DataFrame({"key": keys, "name": [f"name {key}" for key in keys]})


def block(block_info: Any = None) -> Any:
    number = int(block_info[None]["chunk-location"][0])
    return np.arange(BLOCK[0] * BLOCK[1], dtype="f8").reshape(BLOCK) + number * BLOCK[0] * BLOCK[1]


def frames() -> Any:
    return dd.from_map(frame, range(PARTITIONS), meta=frame(0).iloc[:0])


class Shuffle:
    """A shuffle: its inputs, made anew whenever they are lost, what is computed, and whether that is right."""

    def sources(self) -> list[Any]:
        return [frames()]

    def target(self, sources: list[Any]) -> Any:
        return sources[0].shuffle("key", npartitions=12, shuffle_method="p2p")

    def check(self, parts: list[Any]) -> None:
        expected = pd.concat([frame(number) for number in range(PARTITIONS)], ignore_index=True)
        homes = pd.concat([part["key"].drop_duplicates() for part in parts])
        assert homes.is_unique
        pd.testing.assert_frame_equal(pd.concat(parts).sort_values("id", ignore_index=True), expected)


class Merge(Shuffle):
    def sources(self) -> list[Any]:
        return [frames(), dd.from_map(other_frame, range(PARTITIONS), meta=other_frame(0).iloc[:0])]

    def target(self, sources: list[Any]) -> Any:
        left, right = sources
        return left.merge(right, on="key", how="outer", npartitions=12, shuffle_method="p2p", broadcast=False)

    def check(self, parts: list[Any]) -> None:
        left = pd.concat([frame(number) for number in range(PARTITIONS)])
        right = pd.concat([other_frame(number) for number in range(PARTITIONS)])
        order = ["key", "id"]
        expected = left.merge(right, on="key", how="outer")
        found = pd.concat(parts)[list(expected.columns)]
        # Dask has its own idea of strings.
        expected = expected.astype({"name": found["name"].dtype})
        pd.testing.assert_frame_equal(
            found.sort_values(order, ignore_index=True), expected.sort_values(order, ignore_index=True)
        )


class Rechunk(Shuffle):
    def sources(self) -> list[Any]:
        chunks = ((BLOCK[0],) * PARTITIONS, (BLOCK[1],))
        return [da.map_blocks(block, chunks=chunks, dtype="f8", meta=np.empty((0, 0)))]

    def target(self, sources: list[Any]) -> Any:
        # Small blocks would be merged to one input.
        with dask.config.set({"array.chunk-size": "1 MiB"}):
            return sources[0].rechunk((-1, -(-BLOCK[1] // 12)), method="p2p")

    def check(self, parts: list[Any]) -> None:
        expected = np.arange(PARTITIONS * BLOCK[0] * BLOCK[1], dtype="f8").reshape(-1, BLOCK[1])
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)


SHUFFLES = {"shuffle": Shuffle(), "merge": Merge(), "rechunk": Rechunk()}


# Traps


class Trap:
    """Springs once in all workers, and sends a signal to the victims.

    Parameters
    ----------
    folder
        Where it is noted that it has sprung.
    victim
        One of :data:`VICTIMS`.
    pids
        Address of each worker to its process.
    signal_number
        What is sent.
    """

    def __init__(self, folder: pathlib.Path, victim: str, pids: dict[str, int], signal_number: int) -> None:
        self.folder = folder
        self.victim = victim
        self.pids = pids
        self.signal_number = signal_number

    def sprung(self) -> bool:
        return (self.folder / "sprung").exists()

    def spring(self, own: str, peer: str | None = None) -> None:
        try:
            (self.folder / "sprung").touch(exist_ok=False)
        except FileExistsError:
            return
        if peer is None:
            peer = next(address for address in sorted(self.pids) if address != own)
        victims = {"self": [own], "peer": [peer], "both": [peer, own]}[self.victim]
        (self.folder / "new").write_text(json.dumps([self.pids[address] for address in victims]))
        (self.folder / "new").rename(self.folder / "victims")
        for address in victims:
            os.kill(self.pids[address], self.signal_number)

    def victims(self) -> list[int]:
        found: list[int] = json.loads((self.folder / "victims").read_text())
        return found


def lay(trap: Trap, phase: str, dask_worker: Any) -> None:
    """Lay a trap in this worker."""
    stock = "gpurt" not in dask_worker.extensions
    if stock:
        from distributed.shuffle._core import ShuffleRun as Run
        from distributed.shuffle._core import ShuffleRun as Sender
        from distributed.shuffle._core import ShuffleRun as Shards
    else:
        from dask_gpurt.shuffle.carrier import Carrier as Sender  # type: ignore[assignment]
        from dask_gpurt.shuffle.run import Run  # type: ignore[assignment]
        from dask_gpurt.shuffle.shelf import Shelf as Shards  # type: ignore[assignment]

    own = dask_worker.address
    replaced: list[tuple[Any, str, Any]] = []
    counts: Counter[str] = Counter()
    unanswered: Counter[str] = Counter()

    def replace(cls: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        stock = getattr(cls, name)
        replaced.append((cls, name, stock))
        setattr(cls, name, function)
        return stock  # type: ignore[no-any-return]

    def add_partition(self: Any, data: Any, partition_id: Any) -> Any:
        number = partition_id[0] if isinstance(partition_id, tuple) else partition_id
        if phase == "inputs" and number == PARTITIONS - 1:
            deadline_s = time.monotonic() + DEADLINE_S
            # In a thread of tasks; the trap may spring in another process, and if it never does, the test says so.
            while not trap.sprung() and time.monotonic() < deadline_s:
                time.sleep(0.01)
        return stock_add_partition(self, data, partition_id)

    async def deliver(address: str, stock_deliver: Callable[..., Any]) -> Any:
        if phase == "first-transfer":
            trap.spring(own, address)
        unanswered[address] += 1
        try:
            return await stock_deliver()
        finally:
            unanswered[address] -= 1

    async def deliver_message(self: Any, run: Any, address: str, *args: Any) -> Any:
        return await deliver(address, lambda: stock_send(self, run, address, *args))

    async def send(self: Any, address: str, shards: Any) -> Any:
        if address == own:
            return await stock_send(self, address, shards)
        return await deliver(address, lambda: stock_send(self, address, shards))

    async def take(*args: Any, **kwargs: Any) -> Any:
        if phase in ("transfers", "inputs"):
            # Held until this worker has sent something to every other, which holds it as this one does.
            while not trap.sprung() and sum(map(bool, unanswered.values())) < len(trap.pids) - 1:  # noqa: ASYNC110 - of other processes
                await asyncio.sleep(0.01)
            trap.spring(own)
        reply = await stock_take(*args, **kwargs)
        if phase == "unanswered" and reply["status"] == "OK":
            counts["taken"] += 1
            if counts["taken"] == 2:
                trap.spring(own)
        return reply

    async def inputs_done(self: Any) -> None:
        if phase == "barrier":
            trap.spring(own)
        await stock_inputs_done(self)

    def unpacks() -> None:
        counts["unpacked"] += 1
        if phase in ("first-unpack", "unpacks") and counts["unpacked"] == 1 + 2 * (phase == "unpacks"):
            trap.spring(own)

    async def take_shards(self: Any, partition: Any) -> Any:
        shards = await stock_read(self, partition)
        unpacks()
        return shards

    def read(self: Any, partition: Any) -> Any:
        shards = stock_read(self, partition)
        unpacks()
        return shards

    stock_add_partition = replace(Run, "add_partition", add_partition)
    stock_inputs_done = replace(Run, "inputs_done", inputs_done)
    stock_send = replace(Sender, "send", send) if stock else replace(Sender, "deliver", deliver_message)
    stock_read = replace(Shards, "_read_from_disk", read) if stock else replace(Shards, "take", take_shards)
    # The handler is a bound method by now.
    handler = "shuffle_receive" if stock else "gpurt_shuffle_take"
    stock_take = dask_worker.handlers[handler]
    dask_worker.handlers[handler] = take

    def clear() -> None:
        dask_worker.handlers[handler] = stock_take
        for cls, name, stock in replaced:
            setattr(cls, name, stock)

    dask_worker.clear_trap = clear


def clear(dask_worker: Any) -> None:
    if hasattr(dask_worker, "clear_trap"):
        dask_worker.clear_trap()
        del dask_worker.clear_trap


# What is left behind


def busy_threads() -> list[str]:
    """Threads that are within the shuffle, but for the one that belongs to UCX."""
    found = []
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, top in sys._current_frames().items():
        code: Any = top
        while code is not None:
            if "/shuffle/" in code.f_code.co_filename and names.get(ident) not in ("gpurt-ucx", "MainThread"):
                found.append(f"{names.get(ident)} in {code.f_code.co_qualname}")
                break
            code = code.f_back
    return found


async def left_behind(dask_worker: Any) -> dict[str, Any]:
    """Whatever is not as it was before; that may take a moment, for futures are released in the background."""
    extension = dask_worker.extensions.get("gpurt")
    deadline_s = time.monotonic() + 15
    while True:
        here = asyncio.current_task()
        found: dict[str, Any] = {}
        if extension is not None:
            part = extension.shuffle
            found = {
                "runs": [repr(run) for run in part._runs.values()],
                "under way": part.window.used_nbytes,
                "kept": part.allowance.used_nbytes,
                "books": {
                    name: n
                    for name, n in extension.memory.metrics().items()
                    if n and name.endswith(("_held_nbytes", "_reserved_nbytes"))
                },
            }
        found |= {
            "stock's runs": [repr(run) for run in dask_worker.extensions["shuffle"].shuffle_runs._runs],
            "threads": busy_threads(),
            "tasks": [task.get_name() for task in asyncio.all_tasks() if "gpurt" in repr(task) and task is not here],
        }
        if not any(found.values()) or time.monotonic() > deadline_s:
            return {what: value for what, value in found.items() if value}
        await asyncio.sleep(0.02)


def orphans(folder: str) -> list[str]:
    """Spill folders of processes that are dead."""
    found = []
    for lock in pathlib.Path(folder).rglob("gpurt-spill-*.lock"):
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            found.append(str(lock))
    return found


# The cases


class Site:
    """A cluster with everything installed, which is whole again before every case."""

    def __init__(self, client: Client, folder: pathlib.Path, *, stock: bool) -> None:
        self.client = client
        self.folder = folder
        self.stock = stock

    def whole(self) -> dict[str, int]:
        self.client.wait_for_workers(WORKERS, timeout=DEADLINE_S)
        if not self.stock:
            self.client.run_on_scheduler(all_capable)
        pids: dict[str, int] = self.client.run(os.getpid)
        assert len(pids) == WORKERS
        return pids

    def needs_gpurt(self) -> None:
        """Skip a test that looks at, or harms, what only dask-gpurt has."""
        if self.stock:
            pytest.skip("stock Dask has no books of messages, and writes its files by other calls")

    def outputs(self, shuffle: Shuffle, *, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """Compute, within the deadline, with the inputs in the memory of the workers, as the outputs are."""
        client = self.client
        sources = [source.persist() for source in shuffle.sources()]
        wait(sources, timeout=DEADLINE_S)
        started = time.monotonic()
        futures = client.futures_of(shuffle.target(sources).persist())
        meanwhile()
        wait(futures, timeout=DEADLINE_S - (time.monotonic() - started))
        return client.gather(futures)  # type: ignore[no-any-return]

    def clean(self) -> None:
        self.whole()
        assert not {worker: left for worker, left in self.client.run(left_behind).items() if left}
        assert not orphans(str(self.folder))


async def all_capable(dask_scheduler: Any) -> None:
    """Wait until all workers take part."""
    async with asyncio.timeout(DEADLINE_S):
        part = dask_scheduler.plugins["gpurt"].shuffle
        while not part._capable.issuperset(dask_scheduler.workers):  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    transport, limit, kept = request.param
    stock = request.config.getoption("--stock")
    if stock and (transport, kept) != ("dask", None):
        pytest.skip("stock Dask has neither UCX nor repairs, which this place is for")
    folder = tmp_path_factory.mktemp("scratch")
    config = {"shuffle.transport": transport, "shuffle.keep-sent": kept}
    config |= {} if limit is None else {"memory.host-limit": limit}
    # As much in memory as ours has, and on disk what ours has there.
    stocks: dict[str, Any] = {"distributed.p2p.storage.disk": limit is not None}
    stocks |= {} if limit is None else {"distributed.worker.memory.target": parse_bytes(limit) / parse_bytes(LIMIT)}
    with (
        # A cluster gives up a nanny whose worker was lost so long ago and, killed again, is not there at that moment.
        dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour", **(stocks if stock else {})}),
        local_cluster(WORKERS, 2, memory_limit=LIMIT, local_directory=str(folder), silence_logs=False) as cluster,
        Client(cluster) as client,
    ):
        if not stock:
            dask_gpurt.install(client, config=config)
        yield Site(client, folder, stock=stock)


def check_kill(site: Site, folder: pathlib.Path, kind: str, phase: str, victim: str) -> None:
    trap = Trap(folder, victim, site.whole(), signal.SIGKILL)
    site.client.run(lay, trap, phase)
    parts = site.outputs(SHUFFLES[kind])
    assert trap.sprung()
    SHUFFLES[kind].check(parts)
    pids = site.whole()
    assert not set(trap.victims()) & set(pids.values())
    site.client.run(clear)
    site.clean()


def name_of(value: Any) -> str | None:
    if isinstance(value, str):
        return None
    transport, limit, kept = value
    return "-".join([transport, "memory" if limit is None else "disk", *(["kept"] if kept else [])])


REPRESENTATIVE = [
    (IN_MEMORY, "merge", "transfers", "self"),
    (IN_MEMORY, "shuffle", "unanswered", "peer"),
    (IN_MEMORY, "rechunk", "first-transfer", "both"),
    (ON_DISK, "merge", "unpacks", "peer"),
    (ON_DISK, "shuffle", "barrier", "both"),
    (ON_DISK, "rechunk", "transfers", "peer"),
    (KEPT_IN_MEMORY, "shuffle", "first-transfer", "both"),
    (KEPT_ON_DISK, "merge", "unanswered", "peer"),
    (KEPT_ON_DISK, "rechunk", "barrier", "self"),
]


@pytest.mark.parametrize(("site", "kind", "phase", "victim"), REPRESENTATIVE, ids=name_of, indirect=["site"])
def test_workers_are_killed(site: Site, tmp_path: pathlib.Path, kind: str, phase: str, victim: str) -> None:
    check_kill(site, tmp_path, kind, phase, victim)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", PLACES, ids=name_of, indirect=True)
def test_all_cases(site: Site, tmp_path: pathlib.Path, kind: str, phase: str, victim: str) -> None:
    check_kill(site, tmp_path, kind, phase, victim)


def count_restarts(dask_scheduler: Any) -> None:
    """Count the restarts of shuffles from now on."""
    plugin = dask_scheduler.plugins["shuffle"]
    stock = plugin._restart_shuffle
    dask_scheduler.restarts = 0

    def restart(*args: Any, **kwargs: Any) -> None:
        dask_scheduler.restarts += 1
        stock(*args, **kwargs)

    plugin._restart_shuffle = restart


def restarts(dask_scheduler: Any) -> int:
    """How many there were; they are not counted any longer."""
    del dask_scheduler.plugins["shuffle"]._restart_shuffle
    return int(dask_scheduler.restarts)


def transfers(dask_scheduler: Any) -> int:
    """How many inputs of shuffles have been split, ever."""
    prefixes = dask_scheduler.task_prefixes
    return sum(prefix.state_counts["memory"] for name, prefix in prefixes.items() if "-transfer" in name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("site", [KEPT_IN_MEMORY, KEPT_ON_DISK], ids=name_of, indirect=True)
def test_a_lost_worker_costs_its_own_partitions_only(site: Site, tmp_path: pathlib.Path, kind: str) -> None:
    client = site.client
    trap = Trap(tmp_path, "self", site.whole(), signal.SIGKILL)
    client.run(lay, trap, "inputs")
    client.run_on_scheduler(count_restarts)
    before = client.run_on_scheduler(transfers)
    seen = [len(client.get_events(topic)) for topic in ("all", "gpurt")]
    SHUFFLES[kind].check(site.outputs(SHUFFLES[kind]))
    assert trap.sprung()
    happened, repaired = (client.get_events(topic)[n:] for topic, n in zip(("all", "gpurt"), seen, strict=True))
    lost = [
        key
        for _, event in happened
        if event["action"] == "remove-worker"
        for key in event["lost-computed-tasks"]
        if "-transfer" in str(key)
    ]
    repairs = [event for _, event in repaired if event["action"] == "shuffle-repaired"]
    assert repairs
    assert [event["inputs-again"] for event in repairs] == [0] * len(repairs)
    assert client.run_on_scheduler(restarts) == 0
    inputs = PARTITIONS * len(SHUFFLES[kind].sources())
    assert client.run_on_scheduler(transfers) - before == inputs + len(lost)
    client.run(clear)
    site.clean()


def strand_first_barrier(dask_scheduler: Any) -> None:
    """Restart the shuffle when its barrier is asked for, and never answer, as if a dead worker were being called."""
    plugin = dask_scheduler.plugins["shuffle"]

    async def barrier(id: str, run_id: int, consistent: bool) -> None:  # noqa: A002
        dask_scheduler.handlers["shuffle_barrier"] = plugin.barrier
        await plugin.barrier(id, run_id, consistent=False)
        await asyncio.Event().wait()

    dask_scheduler.handlers["shuffle_barrier"] = barrier


@pytest.mark.parametrize("site", [ON_DISK], ids=name_of, indirect=True)
def test_a_barrier_ends_with_its_run(site: Site) -> None:
    site.whole()
    site.client.run_on_scheduler(strand_first_barrier)
    SHUFFLES["shuffle"].check(site.outputs(SHUFFLES["shuffle"]))
    site.clean()


async def sprung(trap: Trap) -> list[int]:
    """Wait until the trap has sprung; the victims."""
    async with asyncio.timeout(DEADLINE_S):
        while not (trap.folder / "victims").exists():  # noqa: ASYNC110 - who is stopped sets no event
            await asyncio.sleep(0.01)
    return trap.victims()


async def finds_no_answer(dask_worker: Any) -> None:
    """Wait until this worker has waited for a peer's answer for a second."""
    part = dask_worker.extensions["gpurt"].shuffle
    async with asyncio.timeout(DEADLINE_S):
        while not any(  # noqa: ASYNC110 - that nothing happens sets no event
            message["since_s"] > 1.0 for run in list(part._runs.values()) for message in run.state()["unanswered"]
        ):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("site", [ON_DISK], ids=name_of, indirect=True)
def test_a_receiver_stands_still_for_a_while(site: Site, tmp_path: pathlib.Path) -> None:
    site.needs_gpurt()
    pids = site.whole()
    trap = Trap(tmp_path, "peer", pids, signal.SIGSTOP)
    site.client.run(lay, trap, "first-transfer")

    def go_on() -> None:
        stopped = site.client.run_on_scheduler(sprung, trap)
        living = [address for address, pid in pids.items() if pid not in stopped]
        try:
            site.client.run(finds_no_answer, workers=living)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)

    parts = site.outputs(SHUFFLES["merge"], meanwhile=go_on)
    SHUFFLES["merge"].check(parts)
    del parts
    site.client.run(clear)
    # Nobody was lost.
    assert site.whole() == pids
    site.clean()


def fill_disk(writes: int | None, dask_worker: Any) -> None:
    """Let so many writes, or all, find the disk full."""
    stock = os.pwritev
    left = itertools.count()

    def pwritev(fd: int, pieces: list[Any], offset: int) -> int:
        if writes is None or next(left) < writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(fd, pieces, offset)

    def empty() -> None:
        os.pwritev = stock

    os.pwritev = pwritev  # type: ignore[assignment]
    dask_worker.empty_disk = empty


def failed_writes(dask_worker: Any) -> int:
    dask_worker.empty_disk()
    return int(dask_worker.extensions["gpurt"].memory.metrics()["host_write_failures"])


@pytest.mark.parametrize("writes", [3, None], ids=["for-a-while", "for-good"])
@pytest.mark.parametrize("site", [ON_DISK], ids=name_of, indirect=True)
def test_a_disk_is_full(site: Site, writes: int | None) -> None:
    site.needs_gpurt()
    site.whole()
    site.client.run(fill_disk, writes)
    # What cannot be written stays in memory, over the limit.
    parts = site.outputs(SHUFFLES["shuffle"])
    assert all(site.client.run(failed_writes).values())
    SHUFFLES["shuffle"].check(parts)
    del parts
    site.clean()
