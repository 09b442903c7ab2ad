"""What is computed in the simulated world, and what comes of it.

Covers: :class:`Job`, :func:`make_jobs`: shuffles and merges of frames with numbers and strings, rechunks of arrays, results that are held
and used again, each with its answer from pandas or NumPy.
Does not cover: how they are run; see :mod:`benchmarks.world.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.base import optimize

__all__ = ["Job", "make_jobs"]


@dataclass(frozen=True)
class Job:
    """A graph, and how its results are judged.

    Parameters
    ----------
    name
        What it is.
    graph, keys
        As Dask runs it, and the results that are wanted.
    judge
        Raises AssertionError unless the results are right.
    """

    name: str
    graph: dict[Any, Any]
    keys: list[Any]
    judge: Callable[[Sequence[Any]], None]


def _frame(rows: int, seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "id": np.arange(rows),
            "k": random.integers(0, 40, rows),
            "v": random.random(rows),
            # What Dask makes of strings.
            "s": pd.array([f"row-{'x' * int(n)}-{n}" for n in random.integers(0, 30, rows)], dtype="string[pyarrow]"),
        }
    )


def _job(name: str, collection: Any, judge: Callable[[Sequence[Any]], None]) -> Job:
    optimized = collection.optimize() if isinstance(collection, dd.DataFrame) else optimize(collection)[0]
    return Job(name, dict(optimized.__dask_graph__()), list(_flat(optimized.__dask_keys__())), judge)


def _flat(keys: Any) -> Any:
    for key in keys:
        if isinstance(key, list):
            yield from _flat(key)
        else:
            yield key


def _shuffle(rows: int, inputs: int, outputs: int, seed: int) -> Job:
    expected = _frame(rows, seed)

    def judge(results: Sequence[Any]) -> None:
        assert len(results) == outputs
        got = pd.concat(results).sort_values("id").reset_index(drop=True)
        pd.testing.assert_frame_equal(got, expected)
        places = [set(part.k) for part in results]
        assert sum(map(len, places)) == len(set().union(*places)), "rows of one key lie in two partitions"

    frame = dd.from_pandas(expected, npartitions=inputs).map_partitions(_slow, meta=expected.iloc[:0])
    return _job(f"shuffle {inputs} to {outputs}", frame.shuffle("k", npartitions=outputs, force=True), judge)


def _merge(rows: int, inputs: int, outputs: int, seed: int) -> Job:
    left, right = _frame(rows, seed), _frame(rows // 8, seed + 1).rename(columns={"id": "other"})
    expected = left.merge(right, on="k").sort_values(["id", "other"]).reset_index(drop=True)

    def judge(results: Sequence[Any]) -> None:
        got = pd.concat(results).sort_values(["id", "other"]).reset_index(drop=True)
        pd.testing.assert_frame_equal(got, expected)

    a, b = dd.from_pandas(left, npartitions=inputs), dd.from_pandas(right, npartitions=inputs)
    merged = a.merge(b, on="k", shuffle_method="p2p", npartitions=outputs, broadcast=False)
    return _job(f"merge {inputs} to {outputs}", merged, judge)


def _rechunk(side: int, tall: int, wide: int) -> Job:
    expected = np.arange(side * side, dtype="f8").reshape(side, side)
    chunks = -(-side // wide)

    def judge(results: Sequence[Any]) -> None:
        np.testing.assert_array_equal(np.concatenate(results, axis=1), expected)

    array = da.from_array(expected, chunks=(-(-side // tall), side)).map_blocks(_slow)
    return _job(f"rechunk {tall} to {wide}", array.rechunk((side, chunks), method="p2p") + 0.0, judge)


def _held(side: int, blocks: int) -> Job:
    """Blocks that are used twice, and are more than memory holds."""
    expected = np.arange(side * blocks, dtype="f8")

    def judge(results: Sequence[Any]) -> None:
        np.testing.assert_array_equal(np.concatenate(results), expected + expected.mean())

    made = da.arange(side * blocks, chunks=side, dtype="f8").map_blocks(_slow)
    return _job(f"held {blocks}", made + made.mean(), judge)


def _slow(part: Any) -> Any:
    import time

    # In the world's time.
    time.sleep(0.003)
    return part + 0.0 if isinstance(part, np.ndarray) else part


def make_jobs() -> list[Job]:
    """Return the jobs that a seed chooses from."""
    return [
        _shuffle(1500, 6, 4, 1),
        _shuffle(4000, 9, 7, 2),
        _shuffle(600, 3, 5, 3),
        _merge(1200, 4, 3, 4),
        _merge(600, 3, 5, 6),
        _rechunk(96, 6, 5),
        _rechunk(160, 4, 8),
        _held(4000, 9),
        _held(9000, 6),
    ]
