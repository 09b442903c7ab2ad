"""What the cases on a GPU share: whether there is one, the rates at which it copies, frames of cuDF, packing.

Covers: :func:`missing`, :func:`where_there_is_a_gpu`, :data:`DEVICE_COPY`, :func:`pinned_rate`, :class:`CudfShuffle`, :func:`packing`.
Does not cover: who competes; see :mod:`benchmarks.contest`. How large the cases are; see :mod:`benchmarks.shuffle`,
:mod:`benchmarks.rechunk` and :mod:`benchmarks.spill`. All of them as one subject; see :mod:`benchmarks.gpu_suite`.

Both workers of a cluster use the same GPU, the first that they see. The bound is a copy from one part of its memory to
another.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from distributed import Client

from benchmarks.contest import Bound
from benchmarks.frame import BrokenRunError, Line, WrongAnswerError, line_of_pairs
from benchmarks.tables import Fingerprint, Shuffle, fingerprint, numeric, ordered_futures
from dask_gpurt.doctor import devices, links
from dask_gpurt.doctor.facts import Missing
from dask_gpurt.memory.cuda import Device
from dask_gpurt.seams import split_axes
from dask_gpurt.shuffle import bricks, tables

__all__ = [
    "DEVICE_COPY",
    "MEMORY_LIMIT_NBYTES",
    "CudfShuffle",
    "missing",
    "packing",
    "pinned_rate",
    "where_there_is_a_gpu",
]

#: Memory on the host that a worker may have: stock moves what it sends through it.
MEMORY_LIMIT_NBYTES = 24 * 2**30

COPIED_NBYTES = 2**30
#: Output partitions that a frame or an array of the packing case is split into, and how often.
PARTS, ROUNDS = 16, 9


def missing(*modules: str) -> str | None:
    """Say what is missing for a case that needs a GPU, CuPy and these modules; None: nothing."""
    if Device.find() is None:
        return "there is no CUDA device"
    absent = [name for name in ("cupy", *modules) if not _is_installed(name)]
    return f"{', '.join(absent)} not installed" if absent else None


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        # Whoever keeps a module from being imported says so in this way.
        return False


def where_there_is_a_gpu(
    case: str, run: Callable[[bool], Iterator[Line]], *modules: str
) -> Callable[[bool], Iterator[Line]]:
    """Return what runs a case where there are a GPU and these modules, and else says why it does not."""

    def run_or_say(quick: bool) -> Iterator[Line]:
        reason = missing(*modules)
        if reason is None:
            yield from run(quick)
        else:
            print(f"{case} is skipped: {reason}", flush=True)

    return run_or_say


def device_copy_rate(nbytes: int = COPIED_NBYTES, copies: int = 3) -> Callable[[], float]:
    """Return what measures the rate at which the GPU copies its memory, in bytes per second: the median of some copies."""
    cupy = importlib.import_module("cupy")
    source, target = cupy.ones(nbytes // 8), cupy.zeros(nbytes // 8)

    def copy() -> None:
        cupy.copyto(target, source)

    return lambda: float(source.nbytes / statistics.median(_seconds(copy) for _ in range(copies)))


def _seconds(work: Callable[[], object]) -> float:
    device = importlib.import_module("cupy").cuda.Device()
    device.synchronize()
    started = time.perf_counter()
    work()
    device.synchronize()
    return time.perf_counter() - started


def pinned_rate() -> float:
    """Return the rate of copies from page-locked memory to the first device, in bytes per second.

    Raises
    ------
    BrokenRunError
        If it cannot be measured.
    """
    for measure in links.to_devices("here", devices.look().devices[:1]):
        if measure.path == "pinned":
            if isinstance(measure.rate, Missing):
                raise BrokenRunError(f"the rate of pinned copies cannot be measured: {measure.rate.reason}")
            return measure.rate.bandwidth
    raise BrokenRunError("there is no CUDA device")


DEVICE_COPY = Bound("device-copy", device_copy_rate)


class CudfShuffle(Shuffle):
    """A shuffle of a table of :func:`~benchmarks.tables.numeric` that lies on the GPU.

    cuDF has a hash of its own. So what is compared are the rows of all partitions together with the truth, and the rows of
    each partition with those of the other contenders.
    """

    @classmethod
    def of_numeric(cls, *, parts: int, rows: int, hot: bool = False) -> CudfShuffle:
        """Return the shuffle of such a table."""
        return cls(functools.partial(_on_gpu, rows=rows, parts=parts, hot=hot), parts, "key", ("int_0",))

    def truth(self, client: Client, inputs: Any) -> Any:
        """Return the fingerprint of the whole."""
        return _sum(client.gather(client.map(_fingerprint, ordered_futures(inputs), pure=False)))

    def check(self, client: Client, answer: Any, truth: Any) -> None:
        """Compare the fingerprint of the whole."""
        found = _sum(self._fingerprints(client, answer))
        if found != truth:
            raise WrongAnswerError(f"the table is {found}, expected {truth}")

    def excerpt(self, client: Client, answer: Any) -> pd.DataFrame | None:
        """Return the fingerprint of each partition."""
        return pd.DataFrame(self._fingerprints(client, answer), columns=["rows", "hashes"])

    def _fingerprints(self, client: Client, answer: Any) -> list[Fingerprint]:
        found: list[Fingerprint] = client.gather(client.map(_fingerprint, ordered_futures(answer), pure=False))
        return found


def _on_gpu(part: int, *, rows: int, parts: int, hot: bool) -> Any:
    return importlib.import_module("cudf").from_pandas(numeric(part, rows=rows, parts=parts, hot=hot))


def _fingerprint(frame: Any) -> Fingerprint:
    return fingerprint(frame.to_pandas())


def _sum(parts: Sequence[Fingerprint]) -> Fingerprint:
    return sum(rows for rows, _ in parts), sum(total for _, total in parts) % 2**64


def packing(quick: bool) -> Iterator[Line]:
    """Split 1 GB for 16 outputs, into bodies that can be sent, beside a copy of as many bytes; quick: a quarter.

    A CuPy array of rows by bands of columns, and, where there is cuDF, a frame of eight columns by the ids in a ninth.
    """
    nbytes = COPIED_NBYTES // (4 if quick else 1)
    splits = {"cupy_wall_s": _array_split}
    if importlib.util.find_spec("cudf") is not None:
        splits["cudf_wall_s"] = _frame_split
    copying = device_copy_rate()
    for metric, make in splits.items():
        split = make(nbytes)
        split()
        ours, copies = [], []
        for _ in range(ROUNDS):
            ours.append(_seconds(split))
            copies.append(nbytes / copying())
        del split
        yield line_of_pairs("gpu-pack", metric, ours, copies, "copy")


def _array_split(nbytes: int) -> Callable[[], object]:
    rows, columns = nbytes // (8 * PARTS * 1024), PARTS * 1024
    array = importlib.import_module("cupy").ones((rows, columns))
    axes = split_axes(((rows,), (columns,)), ((rows,), (columns // PARTS,) * PARTS))
    worker_for: dict[tuple[int, ...], str] = {(0, part): "peer" for part in range(PARTS)}
    return lambda: bricks.split(array, (0, 0), axes, worker_for)


def _frame_split(nbytes: int) -> Callable[[], object]:
    frame = _on_gpu(0, rows=nbytes // 64, parts=1, hot=False)
    meta = frame.iloc[:0].copy()
    frame["_partitions"] = (frame["key"] % PARTS).astype(np.int32)
    return functools.partial(
        tables.split,
        tables.frames_named("cudf"),
        frame,
        0,
        "_partitions",
        worker_for=dict.fromkeys(range(PARTS), "peer"),
        meta=meta,
        allocate=lambda nbytes: memoryview(bytearray(nbytes)),
    )
