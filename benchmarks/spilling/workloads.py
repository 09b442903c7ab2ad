"""Jobs of the kinds that Dask is used for, small: blocks of 256 KB, some hundreds of them a worker.

Each is a function of a client, which is the current one; it runs the job to its end with plain ``dask.array``, ``dask.dataframe`` or
``dask.delayed``, and returns whatever its user would go on holding.

Covers: :data:`JOBS`, :data:`PASSES`.
Does not cover: recording them (:mod:`benchmarks.spilling.recorder`); the same on large data
(:mod:`benchmarks.spilling.clusters`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.base import persist
from dask.delayed import delayed
from distributed import Client, wait

__all__ = ["JOBS", "PASSES", "PASSES_NBYTES", "SPILLTEST_PASSES"]

#: Side of a square block of 256 KB.
SIDE = 181
#: Rows of a partition of 256 KB.
ROWS = 8_192
PARTS = 128
#: Blocks of the jobs that pass over persisted data.
BLOCKS = 256
#: Passes of the job spilltest.
SPILLTEST_PASSES = 5


def _square(blocks: int, seed: int = 0, scale: int = 1) -> Any:
    rows = scale * SIDE
    return da.random.default_rng(seed).random((blocks * rows, blocks * SIDE), chunks=(rows, SIDE))


def _tall(blocks: int, columns: int = 64, scale: int = 1) -> Any:
    rows = scale * SIDE * SIDE // columns
    return da.random.default_rng(0).random((blocks * rows, columns), chunks=(rows, columns))


def _frame(part: int, rows: int = ROWS, groups: int = 32) -> pd.DataFrame:
    rng = np.random.default_rng(part)
    return pd.DataFrame(
        {
            "key": rng.permutation(rows).astype("int64") * PARTS + part,
            "group": rng.integers(0, groups, rows),
            "value": rng.random(rows),
            "weight": rng.random(rows),
        },
        index=pd.RangeIndex(part * rows, (part + 1) * rows),
    )


def _table(parts: int = PARTS, scale: int = 1) -> Any:
    rows = scale * ROWS
    divisions = (*range(0, parts * rows, rows), parts * rows - 1)
    return dd.from_map(_frame, range(parts), rows=rows, meta=_frame(0, rows=1).iloc[:0], divisions=divisions)


def _persisted(collection: Any) -> Any:
    collection = collection.persist()
    wait(collection)
    return collection


# Passes over persisted data. These four can be larger, by a scale, and return what they hold and a list of answers.


def kmeans(client: Client, passes: int = 6, scale: int = 1, blocks: int = BLOCKS) -> Any:  # noqa: ARG001
    """Lloyd's algorithm: a pass over persisted points for each step."""
    points = _persisted(_tall(blocks, scale=scale))
    centres = np.random.default_rng(1).random((8, points.shape[1]))
    for _ in range(passes):
        parts = [delayed(_kmeans_part)(block, centres) for block in points.to_delayed().ravel()]
        sums, counts = delayed(_kmeans_sum)(parts).compute()
        centres = sums / np.maximum(counts, 1)[:, None]
    return points, [centres]


def _kmeans_part(points: Any, centres: Any) -> Any:
    nearest = (points**2).sum(1)[:, None] - 2 * points @ centres.T + (centres**2).sum(1)
    labels = nearest.argmin(1)
    counts = np.bincount(labels, minlength=len(centres))
    return np.stack([points[labels == i].sum(0) for i in range(len(centres))]), counts


def _kmeans_sum(parts: Any) -> Any:
    return sum(sums for sums, _ in parts), sum(counts for _, counts in parts)


def logistic_regression(client: Client, passes: int = 6, scale: int = 1, blocks: int = BLOCKS) -> Any:  # noqa: ARG001
    """Gradient descent: a pass over persisted data for each step."""
    x = _tall(blocks, scale=scale)
    y = (x.sum(axis=1) > x.shape[1] / 2).astype("float64")
    x, y = _persisted(x), _persisted(y)
    weights = np.zeros(x.shape[1])
    for _ in range(passes):
        gradient = x.T @ (1 / (1 + da.exp(-(x @ weights))) - y)
        weights -= gradient.compute() / len(y)
    return (x, y), [weights]


def groupby(client: Client, passes: int = 5, scale: int = 1, blocks: int = BLOCKS) -> Any:  # noqa: ARG001
    """Ask persisted data one question after another."""
    table = _persisted(_table(blocks // 2, scale=2 * scale))
    answers = []
    for number in range(passes):
        chosen = table[table.value > number / 10]
        answers.append(chosen.groupby("group").agg({"value": "mean", "weight": "sum"}).compute())
    return table, answers


def spill_test(client: Client, passes: int = SPILLTEST_PASSES, scale: int = 1, blocks: int = BLOCKS) -> Any:  # noqa: ARG001
    """Persist, and read all of it again and again."""
    x = _persisted(_square(math.isqrt(blocks), scale=scale))
    return x, [float((x + number).sum().compute()) for number in range(passes)]


def standardize_iterated(client: Client, passes: int = 4) -> Any:  # noqa: ARG001
    """Each pass makes the data that the next one reads."""
    x = _persisted(_tall(192))
    for _ in range(passes):
        x = _persisted(x - x.mean(axis=0))
    return x


# Arrays


def transpose_sum(client: Client) -> Any:  # noqa: ARG001
    """Add an array and its transpose."""
    x = _persisted(_square(14))
    return x, _persisted(x + x.T)


def zscore(client: Client) -> Any:  # noqa: ARG001
    """Subtract the mean and divide by the deviation."""
    x = _tall(288)
    return ((x - x.mean(axis=0)) / x.std(axis=0)).max(axis=0).compute()


def map_overlap(client: Client) -> Any:  # noqa: ARG001
    """Three stencils one after another."""
    x = _square(14)
    for _ in range(3):
        x = x.map_overlap(_smooth, depth=2, boundary="periodic")
    return x.sum().compute()


def _smooth(block: Any) -> Any:
    return (np.roll(block, 1, 0) + block + np.roll(block, -1, 1)) / 3


def double_diff(client: Client) -> Any:  # noqa: ARG001
    """Differences along both axes: slices of blocks, which are views."""
    x = _persisted(_square(14))
    x = x[1:] - x[:-1]
    x = x[:, 1:] - x[:, :-1]
    return abs(x).mean().compute()


def matmul(client: Client) -> Any:  # noqa: ARG001
    """Multiply two matrices."""
    return _persisted(_square(10) @ _square(10, seed=1))


def gram(client: Client) -> Any:  # noqa: ARG001
    """Multiply a matrix and its transpose."""
    x = _square(12)
    return (x @ x.T).sum(axis=0).compute()


def svd_compressed(client: Client) -> Any:  # noqa: ARG001
    """A randomized decomposition, with two power iterations."""
    x = _square(12)
    _, s, _ = da.linalg.svd_compressed(x, 8, n_power_iter=2, seed=0)
    return s.compute()


def qr(client: Client) -> Any:  # noqa: ARG001
    """QR of a tall matrix."""
    return [_persisted(factor) for factor in persist(*da.linalg.qr(_tall(192)))]


def least_squares(client: Client) -> Any:  # noqa: ARG001
    """The normal equations, then what is left over."""
    x = _tall(224)
    y = x.sum(axis=1)
    solution = da.linalg.solve(
        (x.T @ x).rechunk((x.shape[1], x.shape[1])), (x.T @ y).rechunk((x.shape[1],)), assume_a="pos"
    )
    return ((x @ solution - y) ** 2).sum().compute()


def covariance(client: Client) -> Any:  # noqa: ARG001
    """Covariance of the columns."""
    return da.cov(_tall(256), rowvar=False).compute()


def _climate(years: int = 24) -> Any:
    # Steps in time by place: a block holds a month.
    return da.random.default_rng(0).random((years * 12, SIDE, SIDE), chunks=(1, SIDE, SIDE))


def anomaly(client: Client, years: int = 24) -> Any:  # noqa: ARG001
    """What each month differs from the mean of its like."""
    x = _climate(years)
    means = [x[month::12].mean(axis=0) for month in range(12)]
    differences = [x[month::12] - means[month] for month in range(12)]
    return da.stack([abs(d).max(axis=0) for d in differences]).max().compute()


def seasonal_mean(client: Client, years: int = 24) -> Any:  # noqa: ARG001
    """Means by month and by year of the same data, as xarray writes a groupby."""
    x = _climate(years)
    by_month = [x[month::12].mean(axis=0) for month in range(12)]
    by_year = [x[12 * year : 12 * year + 12].mean(axis=0) for year in range(years)]
    return _persisted(da.stack([*by_month, *by_year]))


def rechunk_reduce(client: Client) -> Any:  # noqa: ARG001
    """From squares to columns, then a reduction that needs whole columns."""
    x = da.random.default_rng(0).random((8 * SIDE, 36 * SIDE), chunks=(SIDE, SIDE))
    return da.median(x.rechunk((8 * SIDE, SIDE // 8), method="tasks"), axis=0).sum().compute()


def fourier(client: Client) -> Any:  # noqa: ARG001
    """Transform along one axis, then along the other."""
    x = da.random.default_rng(0).random((2048, 1024), chunks=(32, 1024))
    columns = da.fft.rfft(x, axis=1).rechunk((2048, 8), method="tasks")
    return abs(da.fft.fft(columns, axis=0)).sum().compute()


def cumsum(client: Client) -> Any:  # noqa: ARG001
    """Running sums, beside the total."""
    x = _tall(224)
    return (da.cumsum(x, axis=0) / x.sum(axis=0)).max(axis=0).compute()


def tree_reduction(client: Client) -> Any:
    """Add blocks that are there by twos."""
    leaves = client.map(_leaf, range(256), pure=False)
    wait(leaves)
    blocks = [delayed(leaf) for leaf in leaves]
    del leaves
    while len(blocks) > 1:
        blocks = [delayed(_add)(*pair) for pair in zip(blocks[::2], blocks[1::2], strict=True)]
    return client.compute(blocks[0]).result()


def _leaf(number: int) -> Any:
    return np.full((SIDE, SIDE), float(number))


def _add(first: Any, second: Any) -> Any:
    return first + second


# Dataframes


def set_index(client: Client) -> Any:  # noqa: ARG001
    """Sort by a column that becomes the index."""
    return _persisted(_table(96).set_index("key", shuffle_method="tasks"))


def sort_values(client: Client) -> Any:  # noqa: ARG001
    """Sort by a column."""
    return _table(96).sort_values("value", shuffle_method="tasks").value.diff().min().compute()


def merge(client: Client) -> Any:  # noqa: ARG001
    """Join two tables by a key."""
    left, right = _table(64), _table(64)
    joined = left.merge(right[["key", "weight"]], on="key", shuffle_method="tasks", broadcast=False)
    return joined.groupby("group").weight_y.sum().compute()


def broadcast_join(client: Client) -> Any:  # noqa: ARG001
    """Join a persisted table with a small one, twice."""
    table = _persisted(_table(128))
    small = pd.DataFrame({"group": range(32), "name": [f"group {number:04}" for number in range(32)]})
    first = table.merge(small, on="group").groupby("name").value.sum().compute()
    return table, first, table.merge(small, on="group").groupby("name").weight.max().compute()


def shuffle(client: Client) -> Any:  # noqa: ARG001
    """Bring equal groups together, and hold the result."""
    return _persisted(_table(96).shuffle("group", shuffle_method="tasks"))


def rolling(client: Client) -> Any:  # noqa: ARG001
    """Means over windows, less the mean of all."""
    table = _persisted(_table(128))[["value", "weight"]]
    return (table.rolling(50).mean() - table.mean()).abs().max().compute()


def normalize_by_group(client: Client) -> Any:  # noqa: ARG001
    """Divide each value by the mean of its group."""
    table = _table(128)
    means = table.groupby("group").value.mean().rename("mean").reset_index()
    joined = table.merge(means, on="group", broadcast=True)
    return (joined.value / joined["mean"]).sum().compute()


#: Name -> job.
JOBS: Mapping[str, Callable[..., Any]] = {
    "kmeans": kmeans,
    "logreg": logistic_regression,
    "groupby": groupby,
    "spilltest": spill_test,
    "standardize-iterated": standardize_iterated,
    "transpose-sum": transpose_sum,
    "zscore": zscore,
    "map-overlap": map_overlap,
    "double-diff": double_diff,
    "matmul": matmul,
    "gram": gram,
    "svd-compressed": svd_compressed,
    "qr": qr,
    "least-squares": least_squares,
    "covariance": covariance,
    "anomaly": anomaly,
    "seasonal-mean": seasonal_mean,
    "rechunk-reduce": rechunk_reduce,
    "fourier": fourier,
    "cumsum": cumsum,
    "tree-reduction": tree_reduction,
    "set-index": set_index,
    "sort-values": sort_values,
    "merge": merge,
    "broadcast-join": broadcast_join,
    "shuffle": shuffle,
    "rolling": rolling,
    "normalize-by-group": normalize_by_group,
}

#: The jobs that pass over persisted data again and again, and the bytes that each holds at scale 1, in 256 blocks or 64 of four times
#: the scale.
PASSES = ("kmeans", "logreg", "groupby", "spilltest")
PASSES_NBYTES = 64 * 2**20
