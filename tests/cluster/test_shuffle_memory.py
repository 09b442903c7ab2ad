"""A shuffle of more than its workers may hold goes through the tiers, and no worker stays paused."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import dask.dataframe as dd
import numpy as np
import pandas as pd
from clusters import local_cluster
from distributed import Client

import dask_gpurt

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, COLUMNS, PARTITIONS = 200_000, 8, 48


def part(number: int) -> pd.DataFrame:
    rng = np.random.default_rng(number)
    columns = {f"c{i}": rng.random(ROWS) for i in range(COLUMNS - 1)}
    return pd.DataFrame({**columns, "key": rng.integers(0, 1 << 40, ROWS)})


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"rows": [len(frame)], "sum": [frame["c0"].sum()], "key": [frame["key"].sum()]})


def trims(dask_worker: Any) -> bool:
    return any(name.startswith("gpurt-shuffle") for name in dask_worker.periodic_callbacks)


def test_more_than_memory_is_shuffled() -> None:
    with (
        local_cluster(2, memory_limit="450 MiB", silence_logs=False) as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client, placement=False)
        assert all(client.run(trims).values())
        source = dd.from_map(part, range(PARTITIONS), meta=part(0).iloc[:0])
        shuffled = source.shuffle("key", npartitions=PARTITIONS, shuffle_method="p2p")
        found = client.compute(shuffled.map_partitions(summary, meta=summary(part(0)).iloc[:0])).result(90)
        expected = pd.concat([summary(part(number)) for number in range(PARTITIONS)])
        assert found["rows"].sum() == expected["rows"].sum()
        assert found["key"].sum() == expected["key"].sum()
        np.testing.assert_allclose(found["sum"].sum(), expected["sum"].sum())
        dask_gpurt.uninstall(client)
        assert not any(client.run(trims).values())
