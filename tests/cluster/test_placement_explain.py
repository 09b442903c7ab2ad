"""``explain`` on a real cluster: by keys, futures and collections, from Python and from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from click.testing import CliRunner
from clusters import local_cluster
from dask.delayed import delayed
from distributed import Client, wait

import dask_gpurt
from dask_gpurt import cli
from dask_gpurt.plugins import stealing


@pytest.fixture(scope="module")
def placed() -> Iterator[Client]:
    with (
        # On a busy machine, tasks that wait long are asked for and taken over, which would be explained, too.
        dask.config.set({"distributed.scheduler.work-stealing": False}),
        pytest.MonkeyPatch.context() as patch,
        local_cluster(2, processes=False, memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        patch.setattr(stealing, "pays", lambda *_: False)
        dask_gpurt.install(client, memory=False, shuffle=False)
        yield client


def test_a_persisted_collection_was_planned_by_position(placed: Client) -> None:
    x = da.ones((8, 10), chunks=(1, 10)).persist()
    wait(x)
    answer = dask_gpurt.explain(placed, x)
    assert answer.reasons() == {"planned": 8}
    assert [task.key for task in answer.tasks] == [(x.name, i, 0) for i in range(8)]
    where = placed.who_has(x)
    for task in answer.tasks:
        (decision,) = task.decisions
        assert (task.state, task.workers) == ("memory", where[task.key])
        assert decision.family is not None
        assert (decision.family.kind, decision.family.home) == ("position", task.workers[0])
    assert "neighbouring blocks" in repr(answer)


def test_a_task_with_inputs_on_two_workers_says_what_was_compared(placed: Client) -> None:
    one, two = placed.scheduler_info(n_workers=-1)["workers"]
    small = placed.submit(np.ones, 1_000, workers=[one], pure=False)
    large = placed.submit(np.ones, 100_000, workers=[two], pure=False)
    wait([small, large])
    total = placed.submit(lambda *parts: sum(map(len, parts)), small, large)
    assert total.result() == 101_000
    (task,) = dask_gpurt.explain(placed, total).tasks
    (decision,) = task.decisions
    assert (decision.reason, decision.worker) == ("most-bytes", two)
    nbytes = {alternative.worker: alternative.missing_nbytes for alternative in decision.alternatives}
    assert nbytes[two] < 10_000
    assert nbytes[one] >= 800_000
    prices = [alternative.price_s for alternative in decision.alternatives]
    assert prices == sorted(prices)
    assert all(alternative.price_s >= alternative.wait_s >= 0 for alternative in decision.alternatives)
    # The same on the dashboard.
    cluster: Any = placed.cluster
    shown = {placing.key: placing.why for placing in cluster.scheduler.plugins["gpurt"].observer.look().latest}
    assert shown[total.key].splitlines() == list(decision.lines())
    assert shown[total.key].count("to fetch in") == 2


def test_what_dask_decided_is_said_with_its_reason(placed: Client) -> None:
    one, _ = placed.scheduler_info(n_workers=-1)["workers"]
    lone = placed.submit(int, 5)
    tied = placed.submit(int, 6, workers=[one])
    follows = placed.submit(int, tied, workers=[one])
    wait([lone, tied, follows])
    answer = dask_gpurt.explain(placed, [lone, tied, follows, "nobody"])
    assert [task.reason for task in answer.tasks] == ["lone", "restricted", "restricted", ""]
    assert answer[tied.key].workers == (one,)
    assert answer["nobody"].state == "unknown"


def test_what_has_no_plan_says_why(placed: Client) -> None:
    # A reduction in one step gathers all blocks; results that meet nobody are no blocks of a collection.
    total = da.ones(400, chunks=10).sum(split_every=100)
    ends = [delayed(int)(delayed(int)(i, dask_key_name=f"begin-{i}"), dask_key_name=f"end-{i}") for i in range(3)]
    summed, *rest = placed.compute([total, *ends], optimize_graph=False)
    wait([summed, *rest])
    blocks = [key for key in total.__dask_graph__() if key[0].startswith("ones")]
    assert len(blocks) == 40
    assert dask_gpurt.explain(placed, blocks).reasons() == {"gathered": 40}
    assert dask_gpurt.explain(placed, [f"begin-{i}" for i in range(3)]).reasons() == {"apart": 3}


def test_on_one_worker_nothing_is_planned() -> None:
    with local_cluster(1, processes=False, memory_limit=0) as cluster, Client(cluster) as client:
        dask_gpurt.install(client, memory=False, shuffle=False)
        x = da.ones((4, 10), chunks=(1, 10)).persist()
        wait(x)
        assert dask_gpurt.explain(client, x).reasons() == {"few-workers": 4}


def test_by_the_command_line(placed: Client) -> None:
    x = da.ones((4, 10), chunks=(1, 10)).persist()
    wait(x)
    address = placed.scheduler_info()["address"]
    invoke: Any = CliRunner().invoke
    result = invoke(cli.gpurt, ["explain", str((x.name, 0, 0)), "--scheduler", address])
    assert result.exit_code == 0, result.output
    assert "planned tcp://" in result.output
    result = invoke(cli.gpurt, ["explain", "nobody", "--scheduler", address])
    assert result.exit_code == 1
    assert "no such task" in result.output
    result = invoke(cli.gpurt, ["explain", "x", "--scheduler", "tcp://127.0.0.1:1", "--timeout", "0.3"])
    assert result.exit_code == 1
    assert "no answer from tcp://127.0.0.1:1" in result.output


def test_without_the_placement_all_is_dasks() -> None:
    with local_cluster(1, processes=False, memory_limit=0) as cluster, Client(cluster) as client:
        answer = dask_gpurt.explain(client, "x")
        assert not answer.installed
        assert "not installed" in repr(answer)
