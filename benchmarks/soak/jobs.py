"""Random programs of ``dask.array`` and ``dask.dataframe``, and what they give.

A program has a few collections, each beside its value as NumPy or pandas has it. It takes steps: an operation on some of them makes
another one, which is persisted or left as a graph; one is dropped; one is begun and given up. At the end each of them is
compared with what it should be. All numbers are integers, so that no order of operations makes a difference.

Covers: :func:`array_program`, :func:`frame_program`.
Does not cover: clusters; the programs run on the current client.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
from distributed import wait

__all__ = ["MismatchError", "array_program", "frame_program"]

Rng = np.random.Generator
#: Above all keys of frames.
KEYS = 2**20
#: A collection, and what it should be.
Pair = tuple[Any, Any]


class MismatchError(Exception):
    """A collection is not what it should be."""


def _program(rng: Rng, pool: list[Pair], step: Callable[[Rng, list[Pair]], Pair], check: Callable[..., None]) -> None:
    """Take steps, and check everything that is left at the end."""
    kept = len(pool)
    for _ in range(int(rng.integers(5, 10))):
        collection, expected = step(rng, pool)
        if rng.random() < 0.7:
            collection = collection.persist()
            if rng.random() < 0.15:
                # Given up while it is under way.
                continue
            wait(collection)
        pool.append((collection, expected))
        if len(pool) > kept + 1:
            pool.pop(int(rng.integers(len(pool))))
    for number in rng.permutation(len(pool)):
        check(rng, *pool[number])


# Arrays


def array_program(rng: Rng, side: int) -> None:
    """Run a random program on square arrays of ``side`` numbers a side."""
    pool = [_square(rng, side) for _ in range(3)]
    _program(rng, [(x.persist(), expected) for x, expected in pool], _array_step, _check_array)


def _cells(seed: int, block_info: Any = None) -> np.ndarray[Any, Any]:
    (top, bottom), (left, right) = block_info[None]["array-location"]
    cells: np.ndarray[Any, Any] = _formula(seed, np.arange(top, bottom)[:, None], np.arange(left, right)[None, :])
    return cells


def _formula(seed: int, row: Any, column: Any) -> Any:
    return (row * 31 + column * 17 + row * column % 13 + seed) % 1009 - 500


def _chunks(rng: Rng, side: int) -> tuple[int, int]:
    return tuple(int(side / rng.uniform(1.5, 8)) for _ in range(2))  # type: ignore[return-value]


def _square(rng: Rng, side: int) -> Pair:
    seed = int(rng.integers(1009))
    chunks = da.core.normalize_chunks(_chunks(rng, side), (side, side))
    x = da.map_blocks(_cells, seed, chunks=chunks, dtype="i8", meta=np.empty((0, 0), "i8"))
    return x, _formula(seed, np.arange(side)[:, None], np.arange(side)[None, :])


def _array_step(rng: Rng, pool: list[Pair]) -> Pair:
    (x, a), (y, b) = (pool[number] for number in rng.integers(len(pool), size=2))
    side = len(a)
    shift, axis = int(rng.integers(1, side)), int(rng.integers(2))
    operations: list[Callable[[], Pair]] = [
        lambda: (x + y, a + b),
        lambda: (x * 3 - y, a * 3 - b),
        lambda: (x + y.T, a + b.T),
        lambda: (x.rechunk(_chunks(rng, side)), a),
        lambda: (da.roll(x, shift, axis), np.roll(a, shift, axis)),
        lambda: (da.where(x > y, x, y), np.where(a > b, a, b)),
        lambda: (da.concatenate([x[shift:], y[:shift]]), np.concatenate([a[shift:], b[:shift]])),
        lambda: (x - x.sum(axis=axis, keepdims=True), a - a.sum(axis=axis, keepdims=True)),
        lambda: (x.cumsum(axis=axis) % 1009, a.cumsum(axis=axis) % 1009),
        lambda: (_product(x, y), _product(a, b)),
    ]
    return operations[rng.integers(len(operations))]()


def _product(x: Any, y: Any) -> Any:
    # Of floats, for the sake of speed; small enough to be exact.
    return ((x % 64).astype("f8") @ (y % 64).astype("f8")).astype("i8")


def _check_array(rng: Rng, x: Any, a: np.ndarray[Any, Any]) -> None:
    axis = int(rng.integers(2))
    questions: list[Callable[[Any], Any]] = [
        lambda v: v,
        lambda v: v.sum(axis=axis),
        lambda v: v[:: axis + 1, -7:],
        lambda v: (v % 10 == axis).sum(),
        lambda v: v.max(axis=axis) - v.min(axis=axis),
    ]
    ask = questions[rng.integers(len(questions))]
    found, expected = ask(x).compute(), ask(a)
    if not np.array_equal(found, expected):
        differ = np.count_nonzero(np.asarray(found != expected))
        raise MismatchError(f"{differ} of {np.size(expected)} numbers of an array differ")


# Frames


def frame_program(rng: Rng, rows: int) -> None:
    """Run a random program on frames of ``rows`` rows, fewer than :data:`KEYS`."""
    pool = [_table(rng, rows) for _ in range(2)]
    _program(rng, [(x.persist(), expected) for x, expected in pool], _frame_step, _check_frame)


def _part(number: int, rows: int, parts: int, seed: int) -> pd.DataFrame:
    # The keys of all parts together are 0, 1, 2 …, so that a join is never larger than what is joined.
    key = np.arange(number, rows, parts)
    return pd.DataFrame(
        {
            "key": (key * 7919 + seed) % rows if np.gcd(7919, rows) == 1 else key,
            "group": key * 31 % 97,
            "value": (key * 17 + seed) % 1009,
            "text": (key % 1000).astype("U") if not len(key) else np.char.add("text-", (key % 1000).astype("U")),
        }
    ).astype({"text": "str"})


def _table(rng: Rng, rows: int) -> Pair:
    seed, parts = int(rng.integers(1009)), int(rng.integers(4, 16))
    options = {"rows": rows, "parts": parts, "seed": seed}
    collection = dd.from_map(_part, range(parts), **options, meta=_part(0, **options).iloc[:0])
    return collection, pd.concat([_part(number, **options) for number in range(parts)])


def _frame_step(rng: Rng, pool: list[Pair]) -> Pair:
    (x, a), (y, b) = (pool[number] for number in rng.integers(len(pool), size=2))
    parts, modulus = int(rng.integers(3, 16)), int(rng.integers(2, 9))
    operations: list[Callable[[], Pair]] = [
        lambda: (x[x.value % modulus != 0], a[a.value % modulus != 0]),
        lambda: (x.assign(value=x.value * modulus - x.group), a.assign(value=a.value * modulus - a.group)),
        lambda: (x.shuffle("group", npartitions=parts), a),
        lambda: (_sorted(x, parts), a),
        lambda: (x.repartition(npartitions=parts), a),
        lambda: (_join(x, y), _join(a, b)),
        lambda: (_share(x), _share(a)),
    ]
    return operations[rng.integers(len(operations))]()


def _sorted(x: Any, parts: int) -> Any:
    # Divisions that are not given are computed while the graph is being made, under a lock of Python 3.11's cached_property
    # that a scheduler in the same process needs too: stock Dask hangs.
    last = KEYS - 1
    return x.set_index("key", divisions=tuple(int(d) for d in np.linspace(0, last, parts + 1))).reset_index()


def _join(x: Any, y: Any) -> Any:
    other = y[["key", "value"]].rename(columns={"value": "other"})
    joined = x.merge(other, on="key")
    return joined.assign(value=joined.value + joined.other)[["key", "group", "value", "text"]]


def _share(x: Any) -> Any:
    total = x.groupby("group").value.sum().reset_index().rename(columns={"value": "total"})
    joined = x.merge(total, on="group")
    return joined.assign(value=joined.total - joined.value)[["key", "group", "value", "text"]]


def _check_frame(rng: Rng, x: Any, a: pd.DataFrame) -> None:
    questions: list[Callable[[Any], Any]] = [
        lambda v: v,
        lambda v: v.groupby("group").agg({"value": "sum", "key": "max", "text": "count"}).reset_index(),
        lambda v: v[["text", "group"]].drop_duplicates(),
        lambda v: v.groupby("text").value.max().reset_index(),
    ]
    ask = questions[rng.integers(len(questions))]
    found, expected = (_canonical(frame) for frame in (ask(x).compute(), ask(a)))
    try:
        pd.testing.assert_frame_equal(found, expected)
    except AssertionError as error:
        raise MismatchError(f"a frame of {len(expected)} rows is not what it should be: {error}") from error


def _canonical(frame: pd.DataFrame) -> pd.DataFrame:
    if "text" in frame.columns:
        # Dask has a type of its own for strings.
        frame = frame.astype({"text": "object"})
    return frame.sort_values(list(frame.columns)).reset_index(drop=True)
