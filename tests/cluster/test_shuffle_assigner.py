"""Who makes which output: by size, beside what it meets, and as stock does where there is nothing to be won."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, Event, secede, wait

import dask_gpurt
from dask_gpurt.topology import Topology

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, INPUTS, OUTPUTS = 40_000, 8, 16
#: Half of the rows have it.
HOT = 7
#: By which a worker asks the scheduler for a run.
QUESTIONS = ("gpurt_shuffle_open", "shuffle_get_or_create", "shuffle_get")


@pytest.fixture(scope="module")
def shared() -> Iterator[Client]:
    config = {
        "distributed.scheduler.validate": True,
        "distributed.worker.validate": True,
        # A cluster gives up a nanny whose new worker is not there after 15 seconds.
        "distributed.deploy.lost-worker-timeout": "1 hour",
        # Who has nothing to do at the moment would take what is wanted elsewhere.
        "distributed.scheduler.work-stealing": False,
    }
    with (
        dask.config.set(config),
        # A thread waits for samples; what it waits for may be given to the same worker.
        local_cluster(2, 2, silence_logs=False) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def client(shared: Client) -> Iterator[Client]:
    """The cluster with our shuffle alone, whose scheduler waits for samples as long as it takes, and takes notes."""
    # One that was killed in the test before comes back.
    shared.wait_for_workers(2, timeout=60)
    dask_gpurt.install(shared, placement=False, memory=False)
    shared.run_on_scheduler(take_notes)
    yield shared
    shared.run_on_scheduler(stop_notes)
    dask_gpurt.uninstall(shared)


def take_notes(dask_scheduler: Any) -> None:
    """Note the workers' questions for runs, and what they are told.

    Events: one has "asked", two have "asked twice", a run has "begun".
    """
    for name in ("asked", "asked twice", "begun"):
        dask_scheduler.extensions["events"].event_clear(name=name)
    assigner = dask_scheduler.plugins["gpurt"].shuffle.assigner
    assigner.patience_s, assigner.rate_nbytes_s = 600.0, 1.0
    # Of links it hears nothing: how quick they are depends on what else the machine does.
    assigner.topology = Topology()
    found: dict[str, Any] = {"runs": {}, "questions": []}
    dask_scheduler.extensions["notes"] = found
    for name in QUESTIONS:
        handler = dask_scheduler.handlers[name]

        async def noting(*, name: str = name, handler: Any = handler, **message: Any) -> Any:
            found["questions"].append(name)
            dask_scheduler.extensions["events"].event_set(name="asked")
            if len(found["questions"]) == 2:
                dask_scheduler.extensions["events"].event_set(name="asked twice")
            answer = handler(**message)
            answer = await answer if asyncio.iscoroutine(answer) else answer
            if answer["status"] == "OK":
                run = answer["run_spec"].data
                found["runs"].setdefault(run.run_id, []).append(dict(run.worker_for))
                dask_scheduler.extensions["events"].event_set(name="begun")
            return answer

        dask_scheduler.handlers[name] = noting


def stop_notes(dask_scheduler: Any) -> None:
    plugin = dask_scheduler.plugins["shuffle"]
    dask_scheduler.handlers.update(shuffle_get=plugin.get, shuffle_get_or_create=plugin.get_or_create)
    del dask_scheduler.extensions["notes"]


def questions(client: Client) -> list[str]:
    found: list[str] = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.extensions["notes"]["questions"])
    return found


def assignments(client: Client) -> list[dict[Any, str]]:
    """Of each run; all its workers have been told the same."""
    runs = client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.extensions["notes"]["runs"])
    for told in runs.values():
        assert all(one == told[0] for one in told)
    return [told[0] for _, told in sorted(runs.items())]


def loads(client: Client) -> list[float]:
    """Part of the shuffled bytes that each worker has received or kept."""

    def taken(dask_worker: Any) -> float:
        metrics = dask_worker.extensions["gpurt"].shuffle.metrics()
        return float(metrics["bytes_received"] + metrics["bytes_local"])

    found = list(client.run(taken).values())
    return [one / sum(found) for one in found]


def part(number: int, *, hot: bool) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    key = rng.integers(0, 1 << 40, ROWS)
    if hot:
        key[rng.random(ROWS) < 0.5] = HOT
    return pd.DataFrame({"id": np.arange(ROWS) + number * ROWS, "key": key, "value": rng.random(ROWS)})


def source(*, hot: bool, inputs: int = INPUTS) -> Any:
    return dd.from_map(part, range(inputs), hot=hot, meta=part(0, hot=False).iloc[:0])


def expected(*, hot: bool) -> pd.DataFrame:
    return pd.concat([part(number, hot=hot) for number in range(INPUTS)], ignore_index=True)


def test_a_hot_key_does_not_fill_one_worker(client: Client) -> None:
    inputs = source(hot=True).persist()
    wait(inputs)
    found = inputs.shuffle("key", npartitions=OUTPUTS, shuffle_method="p2p").compute()
    pd.testing.assert_frame_equal(found.sort_values("id", ignore_index=True), expected(hot=True))
    assert max(loads(client)) < 0.6


def test_even_outputs_are_where_stock_has_them_and_nobody_asks_more_than_once(client: Client) -> None:
    inputs = source(hot=False).persist()
    wait(inputs)
    for _ in range(2):
        found = inputs.shuffle("key", npartitions=OUTPUTS, shuffle_method="p2p").compute()
        pd.testing.assert_frame_equal(found.sort_values("id", ignore_index=True), expected(hot=False))
    for worker_for in assignments(client):
        first, last = worker_for[0], worker_for[OUTPUTS - 1]
        assert first != last
        assert worker_for == {i: first if i < OUTPUTS // 2 else last for i in range(OUTPUTS)}
    # One question of each worker for each run, as in stock Dask: for its first input, or for the first that it is sent.
    assert len(questions(client)) == 2 * 2
    assert "gpurt_shuffle_open" in questions(client)


def test_sorted_inputs_are_not_taken_for_skew(client: Client) -> None:
    """Each input has the rows of one output, which looks like skew to whoever sees one of them."""
    frame = pd.DataFrame({"key": np.arange(INPUTS * ROWS), "value": 1.0})
    inputs = dd.from_pandas(frame, npartitions=INPUTS, sort=False).persist()
    divisions = [*range(0, INPUTS * ROWS, ROWS), INPUTS * ROWS]
    found = inputs.set_index("key", divisions=divisions, shuffle_method="p2p").compute()
    pd.testing.assert_frame_equal(found, frame.set_index("key"))
    (worker_for,) = assignments(client)
    assert Counter(worker_for.values()).most_common()[0][1] == INPUTS // 2


def hold(part: pd.DataFrame, name: str) -> pd.DataFrame:
    """Let a partition wait for an event, but not the worker's thread, nor the empty one by which types are found out."""
    if len(part):
        secede()
        assert Event(name).wait(60)
    return part


def joined(left: Any, right: Any) -> Any:
    return left.merge(right, on="key", npartitions=OUTPUTS, shuffle_method="p2p", broadcast=False)


def check_merged(found: pd.DataFrame, left: pd.DataFrame, right: pd.DataFrame) -> None:
    reference = left.merge(right, on="key").sort_values("id", ignore_index=True)
    found = found.sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found[reference.columns], reference)


def test_both_sides_of_a_join_are_together_and_spread_by_size(client: Client) -> None:
    left = source(hot=True).persist()
    wait(left)
    keys = pd.concat([part(0, hot=False)[["key"]], pd.DataFrame({"key": [HOT]})]).assign(other=1)
    # Of this side nothing is known when the first begins.
    right = dd.from_pandas(keys, npartitions=2, sort=False)
    right = right.map_partitions(hold, "begun", meta=right)
    check_merged(joined(left, right).compute(), expected(hot=True), keys)
    one, other = assignments(client)
    assert one == other
    assert max(loads(client)) < 0.6


def test_a_small_skewed_side_that_begins_does_not_tear_the_large_even_one_apart(client: Client) -> None:
    left = source(hot=True, inputs=2).persist()
    wait(left)
    keys = expected(hot=False)[["key"]].assign(other=1)
    right = dd.from_pandas(keys, npartitions=INPUTS, sort=False)
    right = right.map_partitions(hold, "begun", meta=right)
    found = joined(left, right).compute()
    check_merged(found, pd.concat([part(number, hot=True) for number in range(2)]), keys)
    one, other = assignments(client)
    assert one == other
    assert max(loads(client)) < 0.6


def fetched(client: Client) -> Counter[str]:
    """Count by name the results that workers have fetched from each other."""

    def count(dask_worker: Any) -> list[str]:
        return [str(key[0]) for log in dask_worker.transfer_incoming_log for key in log["keys"] if type(key) is tuple]

    return Counter(name for names in client.run(count).values() for name in names)


def indexed(name: str) -> Any:
    """Return the ids by key, by a shuffle whose outputs are known by their divisions."""
    divisions = [i * 2**40 // OUTPUTS for i in range(OUTPUTS + 1)]
    ids = source(hot=False)[["id", "key"]].rename(columns={"id": name})
    return ids.set_index("key", divisions=divisions, shuffle_method="p2p")


def check_joined(found: pd.DataFrame, *names: str) -> None:
    ids = expected(hot=False).set_index("key")["id"]
    assert ids.index.is_unique
    pd.testing.assert_frame_equal(found.sort_index(), pd.DataFrame(dict.fromkeys(names, ids)).sort_index())


def test_outputs_come_to_persisted_ones_that_they_meet(client: Client) -> None:
    left = indexed("left").persist()
    wait(left)
    for name in ("right", "other"):
        # Stock's ranges begin with another worker for each shuffle, so they would cross once.
        joined = left.join(indexed(name), how="inner").persist()
        wait(joined)
        check_joined(joined.compute(), "left", name)
    one, other, third = assignments(client)
    assert one == other == third
    assert not fetched(client)[left.__dask_keys__()[0][0]]


def test_outputs_of_two_shuffles_meet(client: Client) -> None:
    check_joined(indexed("left").join(indexed("right"), how="inner").compute(), "left", "right")
    one, other = assignments(client)
    assert one == other


def test_a_rechunk_is_spread_by_the_sizes_of_its_chunks(client: Client) -> None:
    array = np.arange(600 * 640.0).reshape(600, 640)
    chunks = (40, 40, 40, 40, 40, 40, 40, 360)
    persisted = da.from_array(array, chunks=(60, 640)).persist()
    wait(persisted)
    found = persisted.rechunk((600, chunks), method="p2p").compute()
    np.testing.assert_array_equal(found, array)
    (worker_for,) = assignments(client)
    # The large one alone, the small ones together.
    assert worker_for[0, 7] not in {worker_for[0, i] for i in range(7)}
    assert max(loads(client)) < 0.6


def test_even_chunks_are_where_stock_has_them(client: Client) -> None:
    array = np.arange(600 * 640.0).reshape(600, 640)
    found = da.from_array(array, chunks=(60, 640)).rechunk((600, 80), method="p2p").compute()
    np.testing.assert_array_equal(found, array)
    (worker_for,) = assignments(client)
    assert [worker_for[0, i] == worker_for[0, 0] for i in range(8)] == [True] * 4 + [False] * 4


def test_a_worker_without_room_gets_less(client: Client) -> None:
    def limit(dask_scheduler: Any, address: str, nbytes: int) -> int:
        worker = dask_scheduler.workers[address]
        before, worker.memory_limit = worker.memory_limit, nbytes
        return int(before)

    short, _ = client.scheduler_info()["workers"]
    array = np.arange(600 * 640.0).reshape(600, 640)
    # Enough for each task, but less than the process has.
    before = client.run_on_scheduler(limit, address=short, nbytes=20_000_000)
    try:
        found = da.from_array(array, chunks=(60, 640)).rechunk((600, 80), method="p2p").compute()
    finally:
        client.run_on_scheduler(limit, address=short, nbytes=before)
    np.testing.assert_array_equal(found, array)
    (worker_for,) = assignments(client)
    assert Counter(worker_for.values())[short] == 1


def test_chunks_come_to_what_they_are_added_to(client: Client) -> None:
    array = np.arange(600 * 640.0).reshape(600, 640)
    workers = sorted(client.scheduler_info()["workers"])
    # Otherwise than any ranges.
    homes = {(0, i): workers[i % 2] for i in range(8)}
    blocks = {
        ("there", *at): client.submit(
            np.ascontiguousarray, array[:, 80 * at[1] :][:, :80], key=("there", *at), workers=[home]
        )
        for at, home in homes.items()
    }
    there = da.Array(blocks, "there", chunks=((600,), (80,) * 8), dtype=array.dtype)
    rows = da.from_array(array, chunks=(60, 640)).persist()
    wait([rows, *blocks.values()])
    total = (rows.rechunk((600, 80), method="p2p") + there).persist()
    wait(total)
    assert assignments(client) == [homes]
    assert not fetched(client)["there"]
    np.testing.assert_array_equal(total.compute(), 2 * array)


def test_a_worker_that_dies_while_it_waits_is_not_waited_for(client: Client) -> None:
    pids = client.run(os.getpid)

    def kill_who_asks(dask_scheduler: Any, pids: dict[str, int]) -> None:
        handler = dask_scheduler.handlers["gpurt_shuffle_open"]

        async def killing(*, worker: str, **message: Any) -> Any:
            if (pid := pids.pop(worker, None)) is not None and len(pids) == 1:
                os.kill(pid, signal.SIGKILL)
            return await handler(worker=worker, **message)

        dask_scheduler.handlers["gpurt_shuffle_open"] = killing

    client.run_on_scheduler(kill_who_asks, pids=pids)
    shuffled = source(hot=True).shuffle("key", npartitions=OUTPUTS, shuffle_method="p2p")
    found = client.compute(shuffled).result(60)
    pd.testing.assert_frame_equal(found.sort_values("id", ignore_index=True), expected(hot=True))
    assert set(assignments(client)[-1].values()) <= set(client.scheduler_info()["workers"])


def hold_all_but_first(part: pd.DataFrame, name: str) -> pd.DataFrame:
    return hold(part, name) if len(part) and part["id"].iloc[0] else part


def held_but_for_one(name: str, *, hot: bool) -> Any:
    inputs = source(hot=hot)
    held = inputs.map_partitions(hold_all_but_first, name, meta=inputs)
    return held.shuffle("key", npartitions=OUTPUTS, shuffle_method="p2p")


def test_who_waits_while_it_is_uninstalled_gets_a_run_of_stock(client: Client) -> None:
    future = client.compute(held_but_for_one("uninstalled", hot=True))
    assert Event("asked").wait(60)
    dask_gpurt.uninstall(client)
    Event("uninstalled").set()
    pd.testing.assert_frame_equal(future.result(60).sort_values("id", ignore_index=True), expected(hot=True))


def test_a_worker_that_joins_late_takes_part_in_the_next_run(client: Client) -> None:
    future = client.compute(held_but_for_one("joined", hot=False))
    assert Event("begun").wait(60)
    ready = threading.Event()

    def heard(event: tuple[float, dict[str, Any]]) -> None:
        if event[1]["action"] == "worker-ready":
            ready.set()

    client.subscribe_topic("gpurt", heard)
    assert client.cluster is not None
    client.cluster.scale(3)
    assert ready.wait(60)
    Event("joined").set()
    pd.testing.assert_frame_equal(future.result(60).sort_values("id", ignore_index=True), expected(hot=False))
    # The inputs are others, so that nothing is left to be done by the shuffle before.
    found = source(hot=True).shuffle("key", npartitions=OUTPUTS, shuffle_method="p2p").compute()
    pd.testing.assert_frame_equal(found.sort_values("id", ignore_index=True), expected(hot=True))
    one, other = assignments(client)
    assert len(set(one.values())) == 2
    assert len(set(other.values())) == 3
    client.unsubscribe_topic("gpurt")


def test_a_skewed_side_that_waits_for_samples_counts_when_the_even_one_begins(client: Client) -> None:
    assert client.cluster is not None
    client.cluster.scale(3)
    client.wait_for_workers(3, timeout=60)
    client.run_on_scheduler(stop_notes)
    dask_gpurt.install(client, placement=False, memory=False)
    client.run_on_scheduler(take_notes)
    one, other, third = client.scheduler_info()["workers"]

    def placed(worker: str, data: pd.DataFrame, *events: str) -> Any:
        # A nested function is sent by value.
        return client.submit(lambda: [data, *[hold(data, name) for name in events]][-1], workers=[worker], pure=False)

    # Two of three samples tell the hot key, and the third is waited for until the even side has begun.
    parts = [part(number, hot=True) for number in range(3)]
    inputs = [placed(one, parts[0]), placed(other, parts[1]), placed(third, parts[2], "begun")]
    keys = pd.concat([part(0, hot=False)[["key"]], pd.DataFrame({"key": [HOT]})]).assign(other=1)
    right = [placed(third, half, "asked twice") for half in (keys.iloc[: ROWS // 2], keys.iloc[ROWS // 2 :])]
    merged = joined(dd.from_delayed(inputs, meta=part(0, hot=False)), dd.from_delayed(right, meta=keys))
    # It would be ten minutes if nobody woke who waits.
    found = client.compute(merged).result(60)
    check_merged(found, pd.concat(parts), keys)
    first, second = assignments(client)
    assert first == second
    assert max(loads(client)) < 0.5
