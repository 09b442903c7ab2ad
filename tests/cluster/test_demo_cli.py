"""``dask gpurt demo`` as a user calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from dask_gpurt import cli
from dask_gpurt.demo import runner
from dask_gpurt.demo.arrays import ARRAY_JOBS, Shape
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec
from dask_gpurt.demo.compare import array_differences
from dask_gpurt.demo.tpch import QUERIES
from dask_gpurt.errors import InstallError

SPEC = ClusterSpec(workers=1, memory_limit_nbytes=2**29)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(cli.gpurt, ["demo", *arguments])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_small_demo(tmp_path: Any, monkeypatch: Any) -> None:
    # Half of the jobs: each takes two clusters. All queries and all truths have tests of their own.
    monkeypatch.setattr(runner, "QUERIES", {name: QUERIES[name] for name in ("q9", "q18")})
    monkeypatch.setattr(runner, "ARRAY_JOBS", {name: ARRAY_JOBS[name] for name in ("transpose", "rechunk")})
    report, figures = tmp_path / "report.html", tmp_path / "figures.json"
    result = invoke(
        *("--scale", "0.01", "--array-size", "4MB", "--memory-limit", "600MB", "--cache", str(tmp_path / "cache")),
        *("--report", str(report), "--json", str(figures)),
    )
    assert result.exit_code == 0, result.output
    assert "All answers agreed" in result.output
    written = json.loads(figures.read_text())
    assert [job["job"] for job in written["jobs"]] == ["q9", "q18", "transpose", "rechunk"]
    for job in written["jobs"]:
        assert sorted(run["side"] for run in job["runs"]) == ["dask-gpurt", "stock"]
        assert job["ratios"]["wall_s"] > 0
    assert report.stat().st_size > 100_000


def test_a_wrong_answer_gives_status_1(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(runner, "array_differences", lambda answer, truth: array_differences(answer + 1, truth))
    monkeypatch.setattr(runner, "ARRAY_JOBS", {"transpose": ARRAY_JOBS["transpose"]})
    options = ("--only", "array", "--array-size", "1MB", "--workers", "1")
    result = invoke(*options, "--without", "memory", "--without", "shuffle", "--without", "placement")
    assert result.exit_code == 1, result.output
    assert "expected" in result.output
    assert "transpose on stock again" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scale", "0"], "0.0 is not in the range"),
        (["--memory-limit", "plenty"], "'plenty' is not a size such as '2 GiB'"),
        (["--memory-limit", "100MB"], "is too little"),
        (["--array-size", "0"], "is not above zero"),
        (["--only", "sums"], "'sums' is not one of"),
        (["--report", "/nowhere/at/all.html"], "there is no folder /nowhere/at"),
        (["--scale", "0.01", "--cache", "/proc/nowhere"], "can't be written"),
    ],
)
def test_bad_options(arguments: Any, said: Any) -> None:
    result = invoke(*arguments)
    assert result.exit_code in (1, 2)
    assert said in result.output


def test_a_missing_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr(cli, "DEMO_MODULES", ("pandas", "no_such_module_here"))
    result = invoke()
    assert result.exit_code == 1
    assert "no_such_module_here not installed; try: pip install 'dask-gpurt[demo]'" in result.output


def test_help() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert "TPC-H scale factor" in result.output


def job(run: Any, check: Any = lambda answer: []) -> Any:
    return runner.Job("job", "a job", run, check)


def test_a_run_that_fails_is_a_result() -> None:
    outcome = runner.run_once(job(lambda: 1 / 0), STOCK, SPEC)
    assert outcome.error == "ZeroDivisionError: division by zero"
    assert not outcome.right


def test_a_side_that_cannot_be_installed_is_a_result(monkeypatch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InstallError("not on this cluster")

    monkeypatch.setattr("dask_gpurt.installer.install", refuse)
    outcome = runner.run_once(job(lambda: 1), GPURT, SPEC)
    assert outcome.error == "InstallError: not on this cluster"


def test_a_run_that_hangs_is_given_up() -> None:
    import distributed

    def hang() -> None:
        distributed.Event("never").wait()

    outcome = runner.run_once(job(lambda: distributed.get_client().submit(hang).result()), STOCK, SPEC, limit_s=1)
    assert outcome.error == "given up after 1 s"


@pytest.mark.parametrize("name", ARRAY_JOBS)
def test_the_truth_of_the_array_jobs(name: Any) -> None:
    # Against NumPy on whole arrays, which the blockwise truth never makes.
    from dask_gpurt.demo.arrays import checksum, elements

    shape = Shape(grid=6, side=12)
    n, (low, wide) = shape.length, shape.flat
    outer, inner = shape.inner[0] * low, shape.inner[1] * wide
    x = elements(slice(0, n), slice(0, n), 1)
    whole, rows, columns = {
        "transpose": (x + x.T, 12, 12),
        "rechunk": (x, n, 2),
        "matmul": (
            elements(slice(0, outer), slice(0, inner), 2) @ elements(slice(0, inner), slice(0, outer), 3),
            low,
            low,
        ),
    }[name]
    expected = [
        [
            checksum(whole[i : i + rows, j : j + columns], slice(i, i + rows), slice(j, j + columns))
            for j in range(0, whole.shape[1], columns)
        ]
        for i in range(0, whole.shape[0], rows)
    ]
    assert array_differences(ARRAY_JOBS[name].truth(shape), expected) == []
    whole[3, 1] += 1e-3
    changed = checksum(whole[:rows, :columns], slice(0, rows), slice(0, columns))
    assert changed != expected[0][0]
