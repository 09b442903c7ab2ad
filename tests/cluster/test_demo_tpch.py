"""The TPC-H queries on stock Dask say what DuckDB says, and a fault in them would be noticed."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client

from dask_gpurt.demo import data
from dask_gpurt.demo.tpch import QUERIES, truth
from dask_gpurt.errors import GpurtError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    return data.ensure_tables(0.01, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def client() -> Any:
    # In-process: what is tested is the queries, not the cluster.
    with (
        local_cluster(1, 2, processes=False) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("name", QUERIES)
def test_answers(client: Any, folder: Any, name: Any) -> None:
    query = QUERIES[name]
    expected = truth(query, folder)
    assert len(expected) > 0
    answer = query.run(folder)
    assert query.differences(answer, expected) == []
    # The same comparison finds a cent in one row, and a row too few.
    name = next(name for name in answer.columns if answer[name].dtype.kind == "f")
    cents = pd.Series([0.01] + [0.0] * (len(answer) - 1))
    assert query.differences(answer.assign(**{name: answer[name] + cents}), expected)
    assert query.differences(answer.iloc[1:], expected)


def test_tables_are_made_once(folder: Any) -> None:
    before = folder.stat().st_mtime_ns
    assert data.ensure_tables(0.01, folder.parent) == folder
    assert folder.stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name for path in folder.iterdir()} == set(data.TABLES)


def test_a_failed_generator_leaves_nothing(tmp_path: Any, monkeypatch: Any) -> None:
    program = tmp_path / "tpchgen-cli"
    program.write_text("#!/bin/sh\necho the disk is full >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    cache = tmp_path / "cache"
    with pytest.raises(GpurtError, match="status 3: the disk is full"):
        data.ensure_tables(0.01, cache)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GpurtError, match="can't be written"):
        data.ensure_tables(0.01, tmp_path / "file" / "cache")


def test_the_cache_follows_xdg(monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(data.default_cache()) == "/somewhere/dask-gpurt"
