"""The doctor on clusters of processes: every server looks at itself, links between workers are measured, nothing stays behind."""

from __future__ import annotations

import asyncio
import importlib
import json
from typing import Any

import pytest
from click.testing import CliRunner
from cuda_emulation import emulated
from distributed import Client, LocalCluster

import dask_gpurt
from dask_gpurt import cli
from dask_gpurt.demo.cluster import ClusterSpec, open_client
from dask_gpurt.doctor import cluster as doctor
from dask_gpurt.doctor.app import consult
from dask_gpurt.doctor.checks import Finding
from dask_gpurt.doctor.facts import Cuda, Facts, Missing

MIB = 2**20


def said(findings: Any, topic: str, level: str = "ok") -> dict[str, tuple[str, ...]]:
    return {f.text: f.servers for f in findings if isinstance(f, Finding) and (f.topic, f.level) == (topic, level)}


def traces(dask_worker: Any) -> list[str]:
    return [name for name in (*dask_worker.handlers, *dask_worker.extensions) if "doctor" in name]


def test_every_server_is_examined_and_every_way_is_measured(cluster: LocalCluster, client: Client) -> None:
    steps: list[str] = []
    report = consult(client, measure=True, say=steps.append)
    workers = sorted(client.scheduler_info()["workers"])
    assert not report.broken, report.findings
    assert sorted(report.facts) == sorted(["the scheduler", *workers])
    for name, facts in report.facts.items():
        assert isinstance(facts, Facts), facts
        assert facts.role == ("worker" if name in workers else "scheduler")
        assert facts.memory_limit_nbytes == (2**30 if name in workers else None)
    assert said(report.findings, "parts") == {
        "memory can be installed": (),
        "shuffle can be installed": (),
        "placement can be installed": ("the scheduler",),
    }
    ways = {
        (m.source.worker, m.target.worker, m.path): m for m in report.measures if m.source.worker != m.target.worker
    }
    one, other = workers
    assert set(ways) == {(*way, path) for way in ((one, other), (other, one)) for path in ("Dask's comms", "UCX")}
    for measure in ways.values():
        assert not isinstance(measure.rate, Missing), measure
        assert 1e6 < measure.rate.bandwidth < 1e12
        assert 0 <= measure.rate.latency_s < 1
    # One worker measures the disk of the machine that both are on.
    assert len({m.source.worker for m in report.measures if m.target.tier == "disk"}) == 1
    assert "Between workers, 2 of 2" in steps
    assert client.run(traces) == {worker: [] for worker in workers}


def test_what_is_installed_and_what_does_not_fit(client: Client) -> None:
    dask_gpurt.install(client, shuffle=False)
    one, other = sorted(client.scheduler_info()["workers"])
    client.run(lambda: setattr(importlib.import_module("dask_gpurt"), "__version__", "9.9"), workers=[other])
    report = consult(client, measure=False)
    assert report.broken
    assert said(report.findings, "parts")["memory is installed"] == ("the scheduler", one)
    assert "shuffle is left out by the configuration" in said(report.findings, "parts", "note")
    assert [f.servers for f in report.findings if f.level == "broken" and "it has dask-gpurt 9.9" in f.text] == [
        (other,)
    ]


def test_the_command(cluster: LocalCluster) -> None:
    address = cluster.scheduler_address
    result = CliRunner().invoke(cli.gpurt, ["doctor", "--scheduler", address, "--no-measure"])
    assert result.exit_code == 0, result.output
    assert f"the cluster at {address}" in result.output
    assert "memory can be installed" in result.output
    result = CliRunner().invoke(cli.gpurt, ["doctor", "--scheduler", address, "--no-measure", "--json"])
    assert json.loads(result.stdout)["scheduler"] == address


def test_a_worker_that_cannot_be_reached_costs_none_of_the_others(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = sorted(client.scheduler_info()["workers"])

    async def greet(dask_worker: Any) -> str:
        if dask_worker.address == first:
            await asyncio.Event().wait()
        return dask_gpurt.__version__

    honest, others = doctor._look, asyncio.Semaphore(0)

    async def look(run: Any, *args: Any) -> Any:
        if getattr(run, "args", ())[1:] != (first,):
            found = await honest(run, *args)
            others.release()
            return found
        # However slow the machine is, it is only this one that takes longer than the limit.
        for _ in range(2):
            await others.acquire()
        monkeypatch.setattr(doctor, "GREETING_LIMIT_S", 1.0)
        return await honest(run, *args)

    monkeypatch.setattr(doctor, "_own_version", greet)
    monkeypatch.setattr(doctor, "_look", look)
    report = consult(client, measure=True)
    assert report.facts[first] == Missing("no answer within 1 s", "TimeoutError")
    assert isinstance(report.facts[other], Facts)
    assert report.broken
    assert {m.target.tier for m in report.measures} == {"host", "disk"}


@emulated(devices=2, capacity=256 * MIB, UCX_RNDV_FRAG_ALLOC_COUNT="host:8,cuda:2")
def test_each_worker_measures_its_own_device() -> None:
    pytest.importorskip("dask_cuda", reason="dask-cuda makes the cluster")
    # As the demonstration and the benchmarks open it where there is a GPU.
    with open_client(ClusterSpec(workers=2, memory_limit_nbytes=64 * MIB, gpu=True)) as client:
        report = consult(client, measure=True)
        assert not report.broken, report.findings
        firsts = set()
        for worker in client.scheduler_info()["workers"]:
            facts = report.facts[worker]
            assert isinstance(facts, Facts)
            assert isinstance(facts.cuda, Cuda)
            firsts.add(facts.cuda.devices[0].name)
            measured = {m.path for m in report.measures if (m.source.worker, m.target.tier) == (worker, "device 0")}
            assert measured == {"pinned", "pageable", "copy", "UCX"}
        assert firsts == {f"Emulated device {number} (no GPU)" for number in range(2)}
        assert not any(isinstance(m.rate, Missing) for m in report.measures), report.measures
