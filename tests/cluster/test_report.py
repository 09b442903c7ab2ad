"""Reports and runs of shuffles, asked from clients of a real cluster."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from browser import Browser
from click.testing import CliRunner
from clusters import local_cluster
from distributed import Client, LocalCluster, wait

import dask_gpurt
from dask_gpurt import cli, reporter
from dask_gpurt.errors import GpurtError, InstallError
from dask_gpurt.observe import recorder
from dask_gpurt.observe.recording import Recording
from dask_gpurt.observe.worker import JOURNAL

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS = 200_000
#: So little that some of the work is spilled, as it is.
LITTLE = {"memory.host-limit": "64 MiB", "memory.compression": "off"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster(2, memory_limit="1 GiB") as cluster:
        yield cluster


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster) as client:
        dask_gpurt.install(client, config=LITTLE)
        yield client
        dask_gpurt.uninstall(client)


def shuffle() -> int:
    frame = pd.DataFrame({"key": np.arange(ROWS) % 1000, "value": np.ones(ROWS)})
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        return int(dd.from_pandas(frame, npartitions=8).shuffle("key").value.sum().compute())


def spill() -> Any:
    array = da.arange(32_000_000, chunks=2_000_000, dtype="f8").persist()
    wait(array)
    return array


def numbers(page: str) -> dict[str, str]:
    """What moved, as the table of a page says it."""
    return dict(re.findall(r"<tr><td>([^<]+)</td><td>([^<]+)</td><td>[^<]*/s</td></tr>", page))


def ended(client: Client) -> None:
    """Wait until no shuffle is under way: workers hear of the end of one when its results are there already."""
    while any(run.active for run in dask_gpurt.shuffles(client).runs):
        pass


def recordings(dask_scheduler: Any) -> int:
    return len(dask_scheduler.plugins["gpurt"].observer.recorders)


def test_a_report_says_what_happened(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Recording] = []
    monkeypatch.setattr(reporter.Report, "_write", lambda self, recording: kept.append(recording))
    before = shuffle()
    ended(client)
    with dask_gpurt.report(tmp_path / "run.html"):
        assert shuffle() == before == ROWS
        held = spill()
        ended(client)
    [recording] = kept
    assert client.run_on_scheduler(recordings) == 0
    sent = recording.total["ucx"] + recording.total["comm"]
    # Half of the rows, of two columns of eight bytes, and headers; the shuffle before it does not count.
    assert 0.8 < sent / (ROWS * 16 / 2) < 1.3
    matrix = recording.board.matrix
    assert matrix is not None
    assert matrix.nbytes["ucx"].sum() + matrix.nbytes["comm"].sum() == sent
    assert (np.diag(matrix.total) == 0).all()
    [run] = recording.runs
    assert (run.inputs, run.outputs, run.own_outputs) == (8, 8, 8)
    assert sum(run.sent.values()) == sent + recording.total["local"]
    assert run.transferred_s is not None
    assert run.ended_s is not None
    assert recording.begun_s - 0.1 < run.begun_s < run.transferred_s < run.ended_s < recording.begun_s + 60
    # 256 MB, of which 128 MiB have room.
    assert recording.total["host>disk"] > 60e6
    assert 2 * 32 * 2**20 < recording.peaks["host"] < 2 * 96 * 2**20
    assert recording.moved["host>disk"][-1] == recording.total["host>disk"]
    assert recording.board.total("disk")[-1] > 60e6
    assert sum((recording.board.cluster.reasons or {}).values()) > 0
    del held


def test_the_file_is_one_page_that_needs_nothing_else(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with dask_gpurt.report(path):
        shuffle()
    page = path.read_text()
    scripts = re.compile(r"<script.*?</script>", re.DOTALL)
    assert not re.findall(r"<\w[^>]* (?:src|href)=", scripts.sub("", page))
    assert not re.findall(r"<script[^>]* src=", page)
    assert set(numbers(page)) >= {"shuffle, UCX", "shuffle, comms", "inputs"}


@pytest.mark.browser
def test_the_file_in_a_browser(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with dask_gpurt.report(path):
        shuffle()
        held = spill()

    async def look() -> None:
        async with Browser("dark") as browser:
            await browser.open(path.as_uri())
            titles = "Bokeh.documents[0].roots().map(root => root.title?.text ?? '').join()"
            shown = await browser.wait_for(
                f"document.querySelectorAll('.plots [data-root-id]').length >= 8 && {titles}"
            )
            assert "Worker to worker: " in shown
            assert "Moved between tiers: " in shown
            await browser.wait_for("Bokeh.documents[0].roots().filter(root => root.inner_width > 100).length >= 6")
            assert await browser.wait_for("getComputedStyle(document.body).backgroundColor") == "rgb(27, 27, 27)"
            assert not browser.errors

    asyncio.run(look())
    del held


def test_an_asynchronous_client(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "run.html"

    async def record() -> Any:
        async with Client(cluster.scheduler_address, asynchronous=True) as ours:
            async with dask_gpurt.report(path, client=ours):
                assert await ours.submit(sum, [1, 2]) == 3
            with pytest.raises(TypeError, match="async with"), dask_gpurt.report(path, client=ours):
                pass
            answer: Any = dask_gpurt.shuffles(ours)
            return await answer

    assert asyncio.run(record()).runs == ()
    assert path.stat().st_size > 100_000


def test_a_block_that_fails_is_reported_and_fails_as_it_did(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with pytest.raises(ZeroDivisionError), dask_gpurt.report(path):
        client.submit(lambda: 1 / 0).result()
    assert path.exists()
    with pytest.raises(InstallError) as raised, dask_gpurt.report(tmp_path / "none.html"):
        install_and_fail(client)
    assert "was installed anew" in raised.value.__notes__[0]
    with pytest.raises(GpurtError, match="installed anew"), dask_gpurt.report(tmp_path / "none.html"):
        dask_gpurt.install(client)
    assert not (tmp_path / "none.html").exists()


def install_and_fail(client: Client) -> None:
    dask_gpurt.install(client)
    raise InstallError


def test_what_cannot_be_written_is_said_before_anything_runs(cluster: LocalCluster, tmp_path: Path) -> None:
    with Client(cluster) as client:
        with pytest.raises(InstallError, match="is not installed on this cluster"), dask_gpurt.report(tmp_path / "a"):
            pass
        with pytest.raises(InstallError, match="is not installed on this cluster"):
            dask_gpurt.shuffles(client)
        with pytest.raises(FileNotFoundError, match="no folder"), dask_gpurt.report("/no/such/folder/a.html"):
            pass


def test_recordings_are_few_and_go_with_their_clients(
    cluster: LocalCluster, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "RECORDERS_MAX", 1)  # the scheduler is in this process
    with Client(cluster, set_as_default=False) as other:
        dask_gpurt.report(tmp_path / "a", client=other).__enter__()
        assert client.run_on_scheduler(recordings) == 1
        with pytest.raises(GpurtError, match="no more than that"), dask_gpurt.report(tmp_path / "b"):
            pass
    while client.run_on_scheduler(recordings):
        pass


def test_shuffles_are_known_while_they_run_and_after(client: Client) -> None:
    assert str(dask_gpurt.shuffles(client)) == "no shuffle has run on dask-gpurt's data plane"
    frame = pd.DataFrame({"key": np.arange(ROWS) % 1000, "value": np.ones(ROWS)})
    with dask.config.set({"dataframe.shuffle.method": "p2p"}):
        held = dd.from_pandas(frame, npartitions=8).shuffle("key").persist()
    wait(held)
    first = dask_gpurt.shuffles(client)
    assert [run.outputs for run in first.runs] == [8]
    shuffle()
    after = dask_gpurt.shuffles(client)
    assert [run.run_id for run in after.runs] == sorted((run.run_id for run in after.runs), reverse=True)
    assert len(after.runs) == 2
    assert all(not run.stuck and sum(run.sent.values()) > ROWS * 16 * 0.9 for run in after.runs)
    assert "8 of 8" in str(after)
    assert "8 of 8" in after._repr_html_()
    del held


def test_a_worker_from_which_it_is_just_taken_away_is_left_out(client: Client) -> None:
    """Between the uninstallation of one worker and the next, whoever has the page open asks on."""
    gone, there = client.scheduler_info()["workers"]

    def lose(dask_worker: Any) -> None:
        del dask_worker.handlers[JOURNAL]

    async def asked(dask_scheduler: Any) -> Any:
        return await dask_scheduler.plugins["gpurt"].observer.journals()

    client.run(lose, workers=[gone])
    assert set(client.run_on_scheduler(asked)) == {there}


def test_the_command_records_for_some_seconds(cluster: LocalCluster, client: Client, tmp_path: Path) -> None:
    path, address = tmp_path / "run.html", cluster.scheduler_address
    result = CliRunner().invoke(cli.gpurt, ["report", "--scheduler", address, "--seconds", "0.5", str(path)])
    assert result.exit_code == 0, result.output
    assert str(path) in result.output
    assert path.stat().st_size > 100_000
    dask_gpurt.uninstall(client)
    result = CliRunner().invoke(cli.gpurt, ["report", "--scheduler", address, str(path)])
    assert result.exit_code == 1
    assert "is not installed on this cluster" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--scheduler", "tcp://127.0.0.1:1", "--timeout", "1", "a.html"], 1, "no answer from"),
        (["--scheduler", "nonsense://127.0.0.1:1", "a.html"], 2, "unknown"),
        (["--scheduler", "tcp://127.0.0.1:1", "--seconds", "0", "a.html"], 2, "is not in the range"),
        (["a.html"], 2, "Missing option '--scheduler'"),
        (["--help"], 0, "Write an HTML file"),
    ],
)
def test_bad_options_of_the_command(arguments: list[str], status: int, said: str) -> None:
    result = CliRunner().invoke(cli.gpurt, ["report", *arguments])
    assert result.exit_code == status
    assert said in result.output
