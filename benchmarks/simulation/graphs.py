"""What is computed in the simulator: graphs of the kinds that Dask is used for, of dask.array, dask.dataframe and dask.delayed.

Two thirds are :data:`TUNED` on: the placement's constants were chosen by them. A third is :data:`ASIDE`: it has been looked at for
the results alone, and no constant and no rule was made for it.

Covers: the graphs; :func:`workload`.
Does not cover: how large they are; see :mod:`benchmarks.simulation.workload`. A block of an array has 134 MB here unless something else is
said, and a table's partition about 150.
"""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from dask.array.core import PerformanceWarning
from dask.delayed import delayed

from benchmarks.simulation.workload import LONG, Recorder, Workload

__all__ = ["ASIDE", "GRAPHS", "TUNED", "workload"]

#: What the functions of tasks take and return.
Block = Any
#: Side of a square block as it is run, and how much longer it is in the simulation: 4096, which is 134 MB.
SIDE = 32
SCALE = 128
#: Rows of a partition as it is run, and how many more it has in the simulation.
ROWS = 512
ROWS_SCALE = 10_000
#: Days in a block: too few to grow.
DAYS = 4


def _block(rows: slice, columns: slice, width: int) -> Block:
    index = np.arange(rows.start, rows.stop)[:, None] * width + np.arange(columns.start, columns.stop)[None, :]
    return np.sin(index + 1.0)


def _array(name: str, rows: int, columns: int, height: int = SIDE, width: int = SIDE) -> Any:
    """Make an array of blocks, each by a root task."""
    graph = {
        (name, i, j): (
            _block,
            slice(i * height, (i + 1) * height),
            slice(j * width, (j + 1) * width),
            columns * width,
        )
        for i in range(rows)
        for j in range(columns)
    }
    return da.Array(graph, name, ((height,) * rows, (width,) * columns), dtype="f8")


def _cube(name: str, times: int) -> Any:
    """Make an array of days by longitude by latitude, in blocks of four days: 537 MB."""
    graph = {(name, t, 0, 0): (_days, DAYS * t) for t in range(times)}
    return da.Array(graph, name, ((DAYS,) * times, (SIDE,), (SIDE,)), dtype="f8")


def _days(first: int) -> Block:
    return np.sin(np.arange(DAYS * SIDE * SIDE).reshape(DAYS, SIDE, SIDE) + first)


def _frame(part: int, groups: int = 6, rows: int = ROWS) -> pd.DataFrame:
    at = np.arange(part * rows, (part + 1) * rows)
    return pd.DataFrame({"key": at * 7919 % 10_007, "group": at % groups, "value": np.sin(at), "weight": np.cos(at)})


def _table(parts: int) -> Any:
    return dd.from_map(_frame, range(parts), meta=_frame(0).iloc[:0])


# --- tuned on -------------------------------------------------------------------------------------------------------------


def _matmul(user: Recorder) -> None:
    user.compute(_array("x", 10, 10) @ _array("y", 10, 10))


def _matmul_persisted(user: Recorder) -> None:
    x, y = user.persist(_array("x", 10, 10)), user.persist(_array("y", 10, 10))
    user.compute(x @ y)


def _gram_sum(user: Recorder) -> None:
    x = _array("x", 10, 10)
    user.compute((x @ x.T).sum())


def _spd_block(i: int, j: int, side: int) -> Block:
    block = np.sin(np.arange(side)[:, None] * np.arange(side)[None, :] + i + j)
    return (block + block.T) / 2 + (np.eye(side) * side * 100 if i == j else 0)


def _cholesky(user: Recorder) -> None:
    n = 16
    graph = {("spd", i, j): (_spd_block, i, j, SIDE) for i in range(n) for j in range(n)}
    user.compute(da.linalg.cholesky(da.Array(graph, "spd", ((SIDE,) * n, (SIDE,) * n), dtype="f8"), lower=True))


def _tsqr(user: Recorder) -> None:
    # Tall blocks, and an R of a sixteenth of them.
    user.compute(*da.linalg.tsqr(_array("x", 128, 1, height=4 * SIDE, width=SIDE // 4)))


def _svd(user: Recorder) -> None:
    user.compute(*da.linalg.svd_compressed(_array("x", 64, 1, height=2 * SIDE), k=4, n_power_iter=1, seed=0))


def _gather(parts: Any, axis: Any, keepdims: Any) -> Any:
    del axis, keepdims
    return functools.reduce(operator.add, parts) if isinstance(parts, list) else parts


def _keep(block: Any, axis: Any, keepdims: Any) -> Any:
    del axis, keepdims
    return block


def _thin_tree(user: Recorder) -> None:
    x = _array("x", 256, 1)
    user.compute(
        da.reduction(
            x, chunk=_keep, combine=_gather, aggregate=_gather, axis=0, dtype="f8", concatenate=False, split_every=4
        )
    )


def _mean_tree(user: Recorder) -> None:
    user.compute(_array("x", 16, 16).mean(axis=0))


def _vorticity(user: Recorder) -> None:
    u, v = _cube("u", 64), _cube("v", 64)
    dx, dy = da.diff(u[:-1] + u[1:], axis=1), da.diff(v[:-1] + v[1:], axis=1)
    user.compute((dx - dy).mean(axis=(1, 2)), dx + dy)


def _aligned(user: Recorder) -> None:
    x, y = user.persist(_array("x", 16, 16)), user.persist(_array("y", 16, 16))
    user.compute(x + y)


def _transposed(user: Recorder) -> None:
    x = user.persist(_array("x", 16, 16))
    user.compute(x + x.T)


def _broadcast_join(user: Recorder) -> None:
    small = dd.from_map(_dimension, range(1), meta=_dimension(0).iloc[:0])
    user.compute(_table(128).merge(small, on="key", how="left", broadcast=True).groupby("group").weight.sum())


def _dimension(part: int) -> pd.DataFrame:
    return pd.DataFrame({"key": np.arange(part, part + 10 * ROWS), "rate": np.arange(10.0 * ROWS)})


def _task_shuffle(user: Recorder) -> None:
    user.compute(_table(32).shuffle("key", shuffle_method="tasks"))


def _stencil(user: Recorder) -> None:
    x = _array("x", 12, 12)
    for _ in range(2):
        x = da.map_overlap(_smooth, x, depth=1, boundary="none", dtype="f8", meta=np.empty((0, 0)))
    user.compute(x)


def _smooth(block: Block) -> Block:
    return (np.roll(block, 1, 0) + np.roll(block, -1, 0)) / 2


def _anomaly(user: Recorder) -> None:
    x = _array("x", 256, 1)
    user.compute(((x - x.mean(axis=0)) ** 2).mean(axis=0))


def _climatology(user: Recorder) -> None:
    # Each block is a month; the same months of all years are a group.
    x, year = _cube("x", 96), 12
    parts = [da.concatenate([x[DAYS * t : DAYS * (t + 1)] for t in range(month, 96, year)]) for month in range(year)]
    user.compute(*[part - part.mean(axis=0) for part in parts])


def _double_diff(user: Recorder) -> None:
    x = _array("x", 12, 12)
    user.compute((x[1:] - x[:-1]).sum(axis=1), (x[:, 1:] - x[:, :-1]).sum(axis=0))


def _kmeans(user: Recorder) -> None:
    x = user.persist(_array("x", 128, 1, height=4 * SIDE))
    centers = delayed(np.ones)((4, SIDE))
    for _ in range(4):
        parts = [delayed(_nearest)(block, centers) for block in x.to_delayed().ravel()]
        while len(parts) > 1:
            parts = [delayed(sum)(parts[i : i + 8]) for i in range(0, len(parts), 8)]
        centers = parts[0]
    user.compute(centers)


def _nearest(block: Block, centers: Block) -> Block:
    return centers + block[:4]


def _groupby(user: Recorder) -> None:
    user.compute(_table(256).groupby("group").agg({"value": ["sum", "mean"], "weight": "max"}))


def _rows_to_columns(user: Recorder) -> None:
    # All to all, by way of blocks that are some rows and some columns: with as much as six blocks in each.
    parts = 24
    side = parts * LONG
    rows = _array("x", parts, 1, height=LONG, width=side)
    columns = rows.rechunk((side, LONG), method="tasks", block_size_limit=6 * LONG * side * 8)
    user.compute(da.map_blocks(_ranks, columns, dtype="f8"))


def _shuffled_join(user: Recorder) -> None:
    # A table and one of half its size, both cut anew by what they are joined on.
    left, right = _table(24), _table(12)
    user.compute(left.merge(right, on="key", how="left", shuffle_method="tasks").weight_y.count())


def _ranks(block: Block) -> Block:
    return block.argsort(axis=0).astype("f8")


# --- kept aside -----------------------------------------------------------------------------------------------------------


def _rechunked_fft(user: Recorder) -> None:
    side = 16 * LONG
    x = da.fft.fft(_array("x", 16, 1, height=LONG, width=side), axis=1)
    user.compute(da.fft.fft(x.rechunk((side, LONG), method="tasks", block_size_limit=4 * LONG * side * 16), axis=0))


def _topk(user: Recorder) -> None:
    user.compute(da.topk(_array("x", 256, 1), 5, axis=0))


def _running_sum(user: Recorder) -> None:
    user.compute(da.cumsum(_array("x", 64, 4), axis=0, method="blelloch"))


def _lu(user: Recorder) -> None:
    n = 10
    graph = {("m", i, j): (_spd_block, i, j, SIDE) for i in range(n) for j in range(n)}
    user.compute(*da.linalg.lu(da.Array(graph, "m", ((SIDE,) * n, (SIDE,) * n), dtype="f8"))[1:])


def _power_iteration(user: Recorder) -> None:
    x = user.persist(_array("x", 12, 12))
    v = da.ones(12 * SIDE, chunks=SIDE)
    for _ in range(4):
        v = x @ v
        v = v / da.sqrt((v**2).sum())
    user.compute(v)


def _covariance(user: Recorder) -> None:
    x = _array("x", 96, 2)
    centered = x - x.mean(axis=0)
    user.compute(centered.T @ centered)


def _pairwise_merge(user: Recorder) -> None:
    # Sorted runs that are merged two by two: results grow on the way.
    runs = [delayed(np.sort)(delayed(_run_of)(i)) for i in range(64)]
    while len(runs) > 1:
        runs = [delayed(_merge)(*runs[i : i + 2]) for i in range(0, len(runs), 2)]
    user.compute(runs[0])


def _run_of(i: int) -> Block:
    return np.sin(np.arange(LONG * SIDE).reshape(LONG, SIDE) + i)


def _merge(left: Block, right: Block) -> Block:
    return np.sort(np.concatenate([left, right]), axis=0)


def _chains(user: Recorder) -> None:
    def stage(value: Any, name: str) -> Any:
        return delayed(_smooth)(value, dask_key_name=name)

    ends = []
    for i in range(200):
        value = delayed(_run_of)(i, dask_key_name=f"load-{i}")
        for step in range(3):
            value = stage(value, f"stage{step}-{i}")
        ends.append(value)
    user.compute(*ends)


def _table_join(user: Recorder) -> None:
    left, right = _table(16), _table(16)
    user.compute(left.merge(right, on="key", shuffle_method="tasks").groupby("group_x").value_x.sum())


def _inference(user: Recorder) -> None:
    # One model, and many blocks that it is applied to.
    model = delayed(_block)(slice(0, SIDE), slice(0, SIDE), SIDE)
    rows = _array("x", 96, 1)
    scores = [delayed(np.matmul)(block, model) for block in rows.to_delayed().ravel()]
    user.compute(*[delayed(np.argmax)(score, axis=1) for score in scores])


def _staged_shuffle(user: Recorder) -> None:
    # By two digits of the output's number, one after the other; that of _task_shuffle has one stage, in which all meet all.
    user.compute(_table(64).shuffle("key", shuffle_method="tasks", max_branch=8))


TUNED: Mapping[str, Callable[[Recorder], None]] = {
    "matmul": _matmul,
    "matmul-persisted": _matmul_persisted,
    "gram-sum": _gram_sum,
    "cholesky": _cholesky,
    "tsqr": _tsqr,
    "svd": _svd,
    "thin-tree": _thin_tree,
    "mean-tree": _mean_tree,
    "vorticity": _vorticity,
    "aligned": _aligned,
    "transposed": _transposed,
    "broadcast-join": _broadcast_join,
    "task-shuffle": _task_shuffle,
    "stencil": _stencil,
    "anomaly": _anomaly,
    "climatology": _climatology,
    "double-diff": _double_diff,
    "kmeans": _kmeans,
    "groupby": _groupby,
    "rows-to-columns": _rows_to_columns,
    "shuffled-join": _shuffled_join,
}
ASIDE: Mapping[str, Callable[[Recorder], None]] = {
    "rechunked-fft": _rechunked_fft,
    "topk": _topk,
    "running-sum": _running_sum,
    "lu": _lu,
    "power-iteration": _power_iteration,
    "covariance": _covariance,
    "pairwise-merge": _pairwise_merge,
    "chains": _chains,
    "table-join": _table_join,
    "inference": _inference,
    "staged-shuffle": _staged_shuffle,
}
GRAPHS: Mapping[str, Callable[[Recorder], None]] = {**TUNED, **ASIDE}


@functools.cache
def workload(name: str) -> Workload:
    """Return a graph, with sizes and durations."""
    user = Recorder(name, SCALE, ROWS_SCALE)
    with (
        dask.config.set(
            # Names of delayed tasks come of what they do, and are no new ones each time: their order is a part of what a seed says.
            {"dataframe.convert-string": False, "dataframe.shuffle.method": "tasks", "delayed_pure": True}
        ),
        warnings.catch_warnings(),
    ):
        # A product of blocks has more of them, and Dask warns of that.
        warnings.simplefilter("ignore", PerformanceWarning)
        GRAPHS[name](user)
    return user.workload
