"""Shuffles of dataframes: large partitions, strings, many small partitions, more than memory, a hot key, a GPU.

See :mod:`benchmarks.contest` for what is compared with what, and :mod:`benchmarks.tables` for the data, and for when an
answer is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.contest import KEEPING, P2P, P2P_MEMORY, TASKS, Case, runner
from benchmarks.frame import Subject
from benchmarks.gpu import DEVICE_COPY, MEMORY_LIMIT_NBYTES, CudfShuffle, packing, where_there_is_a_gpu
from benchmarks.tables import Shuffle, SummedShuffle
from dask_gpurt.demo.data import default_cache, ensure_tables

#: Rows of a numeric partition of 64 MB, which is in the range that Dask's documentation recommends.
ROWS = 1_000_000


def numeric_16(*, quick: bool) -> Case:
    """Shuffle 1 GB of numbers in partitions of 64 MB; quick: a quarter of it."""
    return Case(
        name="numeric-16",
        workload=Shuffle.of_numeric(parts=16, rows=ROWS // 4 if quick else ROWS),
        small=Shuffle.of_numeric(parts=16, rows=ROWS // 16),
        peers=(P2P, TASKS, P2P_MEMORY),
        rounds=3 if quick else 7,
    )


def lineitem_16(*, quick: bool) -> Case:
    """Shuffle TPC-H's lineitem, all columns as dask.dataframe reads them, by order; quick: a tenth of it."""
    return Case(
        name="lineitem-16",
        workload=Shuffle.of_lineitem(parts=16, files=_lineitem_files(0.1 if quick else 1.0)),
        small=Shuffle.of_lineitem(parts=16, files=_lineitem_files(0.01)),
        peers=(P2P,),
        rounds=3 if quick else 5,
    )


def _lineitem_files(scale: float) -> list[Path]:
    return sorted((ensure_tables(scale, default_cache()) / "lineitem").iterdir())


def many_500(*, quick: bool) -> Case:
    """Shuffle 256 MB in 500 partitions, which is mostly tasks; quick: 150 partitions."""
    parts = 150 if quick else 500
    return Case(
        name=f"many-{parts}",
        workload=Shuffle.of_numeric(parts=parts, rows=8_000),
        # More than 32 partitions, from where on stock's tasks go in stages.
        small=Shuffle.of_numeric(parts=40, rows=1_000),
        peers=(P2P, TASKS),
        rounds=1 if quick else 3,
    )


def beyond_memory(*, quick: bool) -> Case:
    """Shuffle 4 GB through two workers of 1 GB, which make the data and sum them up; quick: 1.5 GB.

    In partitions of 32 MB: with 64 MB, stock's workers exceed their limit and are killed, again and again.
    """
    return Case(
        name="beyond-memory",
        workload=SummedShuffle.of_numeric(parts=48 if quick else 128, rows=ROWS // 2),
        small=SummedShuffle.of_numeric(parts=16, rows=ROWS // 64),
        peers=(P2P,),
        rounds=1 if quick else 3,
        memory_limit_nbytes=10**9,
        against_limit=True,
    )


def hot_key(*, quick: bool) -> Case:
    """Shuffle 1 GB of numbers of which half the rows have one key; quick: a quarter of it."""
    return Case(
        name="hot-key",
        workload=Shuffle.of_numeric(parts=16, rows=ROWS // 4 if quick else ROWS, hot=True),
        small=Shuffle.of_numeric(parts=16, rows=ROWS // 16, hot=True),
        peers=(P2P,),
        rounds=3 if quick else 5,
        peaks_against=(P2P,),
    )


def kept_16(*, quick: bool) -> Case:
    """Shuffle 1 GB of numbers as ``numeric-16``, and once more by workers that keep what they send; quick: a quarter of it."""
    return Case(
        name="kept-16",
        workload=Shuffle.of_numeric(parts=16, rows=ROWS // 4 if quick else ROWS),
        small=Shuffle.of_numeric(parts=16, rows=ROWS // 16),
        peers=(KEEPING,),
        rounds=3 if quick else 7,
        peaks_against=(KEEPING,),
    )


def gpu_shuffle(*, quick: bool) -> Case:
    """Shuffle 8 GB of numbers in cuDF frames of 512 MB between two workers on one GPU; quick: an eighth of it."""
    return Case(
        name="gpu-shuffle",
        workload=CudfShuffle.of_numeric(parts=16, rows=ROWS if quick else 8 * ROWS),
        small=CudfShuffle.of_numeric(parts=16, rows=ROWS // 4),
        peers=(P2P, TASKS),
        rounds=1 if quick else 3,
        memory_limit_nbytes=MEMORY_LIMIT_NBYTES,
        bound=DEVICE_COPY,
    )


#: Makes a case, given whether it is to be quick.
CASES: Mapping[str, Callable[..., Case]] = {
    "numeric-16": numeric_16,
    "lineitem-16": lineitem_16,
    "many-500": many_500,
    "beyond-memory": beyond_memory,
    "hot-key": hot_key,
    "kept-16": kept_16,
}

SUBJECT = Subject.of_cases(
    "shuffle",
    "dataframe shuffles beside stock p2p and tasks",
    {name: runner(make) for name, make in CASES.items()}
    | {
        "gpu-shuffle": where_there_is_a_gpu("gpu-shuffle", runner(gpu_shuffle), "cudf", "dask_cudf"),
        "gpu-pack": where_there_is_a_gpu("gpu-pack", packing),
    },
)
