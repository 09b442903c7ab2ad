"""Compiled loops that the shuffle of data frames is fastest with.

Covers: scattering the rows of columns to where their output partitions are gathered.
Does not cover: what is done where Numba is not there, or not ready; see :mod:`dask_gpurt.shuffle.frames`.

Theory of operation: NumPy scatters a column by an array of places, into one array, from which it is copied to where it
belongs: two passes and eight bytes a row more than needed. A compiled loop writes each row right where it belongs. With
two workers on two cores, which share caches and memory, a shuffle of 1 GB takes two thirds of the time. Numba compiles
such a loop when it is first asked to, in a thread of its own, and keeps the result on disk; until then
:func:`scatter_kernels` says that there is none.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_POSITIONS", "ScatterKernels", "compile_kernels", "scatter_kernels"]

logger = logging.getLogger(__name__)

#: The kernels take positions as ``uint16``, of which the last stands for none.
MAX_POSITIONS = 2**16 - 1


@dataclass(frozen=True)
class ScatterKernels:
    """Compiled functions; they release the GIL.

    Parameters
    ----------
    rank
        ``rank(positions, count, ranks)`` counts the rows before each row that have its position; positions from
        ``count`` on are passed over. Returns the number of rows of each position.
    scatter
        ``scatter(source, positions, count, ranks, bases, out)`` writes ``source[r]`` to
        ``out[bases[positions[r]] + ranks[r]]``. Nothing checks that this lies in ``out``.
    """

    rank: Callable[..., npt.NDArray[np.int64]]
    scatter: Callable[..., None]


class _Compilation:
    """The state of this process: not begun, under way, done, or given up."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.thread: threading.Thread | None = None
        self.kernels: ScatterKernels | None = None


_state = _Compilation()


def scatter_kernels() -> ScatterKernels | None:
    """Return the kernels if they are ready; else see to it that they are, some time."""
    if _state.kernels is None and _state.thread is None:
        with _state.guard:
            if _state.thread is None:
                _state.thread = threading.Thread(target=_compile_aside, name="gpurt-compile", daemon=True)
                _state.thread.start()
    return _state.kernels


def _compile_aside() -> None:
    if importlib.util.find_spec("numba") is None:
        logger.debug("Numba is not installed: NumPy does it")
        return
    try:
        _state.kernels = compile_kernels()
    except Exception:
        # Whatever a compiler may fail with: it is an accelerator, and without it the results are the same.
        logger.warning("The kernels of the shuffle could not be compiled; it goes on with NumPy", exc_info=True)


def compile_kernels() -> ScatterKernels:
    """Compile the kernels, or load them from Numba's cache.

    Raises
    ------
    ImportError
        If Numba is not installed.
    """
    import numba
    from numba import types

    positions = types.Array(types.uint16, 1, "C", readonly=True)
    ranks = types.Array(types.uint32, 1, "C")
    bases = types.Array(types.int64, 1, "C", readonly=True)

    def compiled(*signatures: Any) -> Any:
        try:
            return numba.njit(list(signatures), nogil=True, cache=True)
        except RuntimeError:
            # There is no folder that a cache could be kept in.
            return numba.njit(list(signatures), nogil=True)

    rank = compiled(types.Array(types.int64, 1, "C")(positions, types.int64, ranks))(_rank)
    scatter = compiled(
        *(
            types.void(
                types.Array(word, 1, "C", readonly=True),
                positions,
                types.int64,
                ranks,
                bases,
                types.Array(word, 1, "C"),
            )
            for word in (types.uint8, types.uint16, types.uint32, types.uint64)
        )
    )(_scatter)
    return ScatterKernels(rank, scatter)


def _rank(positions: Any, count: Any, ranks: Any) -> Any:
    sizes = np.zeros(count, np.int64)
    for row in range(len(positions)):
        position = positions[row]
        if position < count:
            ranks[row] = sizes[position]
            sizes[position] += 1
    return sizes


def _scatter(source: Any, positions: Any, count: Any, ranks: Any, bases: Any, out: Any) -> None:  # noqa: PLR0917
    for row in range(len(source)):
        position = positions[row]
        if position < count:
            out[bases[position] + ranks[row]] = source[row]
