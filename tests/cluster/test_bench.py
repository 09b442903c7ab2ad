"""``dask gpurt bench`` on a cluster that is lent: it measures, checks, and leaves the cluster as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distributed
import pytest
from click.testing import CliRunner
from clusters import local_cluster
from distributed import Client, LocalCluster

import dask_gpurt
from dask_gpurt import cli
from dask_gpurt.demo import bench, frames, runner
from dask_gpurt.demo.cluster import GPURT, STOCK
from dask_gpurt.doctor.cluster import installed_settings


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(2, memory_limit="600 MiB") as cluster:
        yield cluster


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.gpurt, ["bench", *arguments])


def left_behind(dask_scheduler: Any) -> list[str]:
    return sorted(name for name in (*dask_scheduler.worker_plugins, *dask_scheduler.plugins) if "gpurt" in name)


def test_a_cluster_that_is_lent_is_measured_and_left_as_it_was(cluster: LocalCluster, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    with Client(cluster, set_as_default=False) as client:
        assert client.run_on_scheduler(left_behind) == []
        arguments = ("--scheduler", cluster.scheduler_address, "--size", "1 MiB", "--json", str(figures))
        result = invoke(*arguments, "--only", "shuffle", "--only", "merge")
        assert result.exit_code == 0, result.output
        assert "All answers were right" in result.output
        assert client.run_on_scheduler(left_behind) == []
        written = json.loads(figures.read_text())
        assert [job["job"] for job in written["jobs"]] == ["shuffle", "merge"]
        for job in written["jobs"]:
            assert [run["side"] for run in job["runs"]] in (["stock", "dask-gpurt"], ["dask-gpurt", "stock"])
            assert job["ratios"]["wall_s"] > 0
            assert all(run["usage"]["moved_nbytes"] > 100_000 for run in job["runs"])


def test_what_was_installed_is_installed_again(cluster: LocalCluster, monkeypatch: Any) -> None:
    # A partition is lost.
    judge = frames.Tables.shuffle_differences
    monkeypatch.setattr(frames.Tables, "shuffle_differences", lambda self, answer: judge(self, answer.iloc[1:]))
    with Client(cluster, set_as_default=False) as client:
        dask_gpurt.install(client, shuffle=False, config={"memory.host-limit": "123 MiB"})
        before = installed_settings(client)
        result = invoke("--scheduler", cluster.scheduler_address, "--size", "1 MiB", "--only", "shuffle")
        assert result.exit_code == 1, result.output
        assert "shuffle on stock: there are" in result.output
        assert before is not None
        assert installed_settings(client) == before
        dask_gpurt.uninstall(client)


def test_a_run_that_hangs_is_given_up_and_the_cluster_goes_on(cluster: LocalCluster) -> None:
    def hang() -> None:
        distributed.Event("released").wait(30)

    job = runner.Job("job", "a job", lambda: distributed.get_client().submit(hang).result(), lambda _: [])
    with Client(cluster, set_as_default=False) as client:
        outcome = runner.run_once(job, GPURT, bench.Lent(client), limit_s=4)
        assert outcome.error == "given up after 4 s"
        distributed.Event("released", client=client).set()
        assert client.submit(sum, [1, 2]).result() == 3
        assert client.run_on_scheduler(left_behind) == []
        assert runner.run_once(
            runner.Job("job", "", lambda: 1, lambda _: []), STOCK, bench.Lent(client), limit_s=30
        ).right


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--scheduler", "tcp://127.0.0.1:1", "--timeout", "1"], 1, "no answer from"),
        (["--only", "sums"], 2, "'sums' is not one of"),
        (["--size", "0"], 2, "is not above zero"),
        (["--json", "/nowhere/at/all.json"], 1, "there is no folder /nowhere/at"),
        (["--help"], 0, "Measure on your own cluster"),
    ],
)
def test_bad_options(arguments: list[str], status: int, said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == status
    assert said in result.output


def test_a_missing_library_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(cli, "BENCH_MODULES", ("pandas", "no_such_module_here"))
    assert "no_such_module_here not installed" in invoke().output


@pytest.mark.parametrize(
    ("memory_nbytes", "only", "names", "left_out"),
    [
        (2**20, (), ["shuffle", "merge", "rechunk", "spill"], None),
        (2**40, (), ["shuffle", "merge", "rechunk"], "--only spill asks for it"),
        (None, (), ["shuffle", "merge", "rechunk"], "no memory limit"),
        (2**20, ("spill", "merge"), ["merge", "spill"], None),
    ],
)
def test_what_suits_a_cluster_is_run(memory_nbytes: int | None, only: Any, names: list[str], left_out: Any) -> None:
    jobs, why = bench.jobs(bench.Size(2, memory_nbytes), 2**20, only)
    assert [job.name for job in jobs] == names
    assert (why is None) if left_out is None else (left_out in (why or ""))
