"""Compiled loops that the shuffle of data frames is fastest with.

Covers: scattering the rows of columns, and the strings of columns of strings, to where their output partitions are
gathered; the hashes of keys.
Does not cover: what is done where Numba is not there, or not ready; see :mod:`dask_gpurt.shuffle.scatter` and
:mod:`dask_gpurt.shuffle.hashing`.

Theory of operation: NumPy scatters a column by an array of places, into one array, from which it is copied to where it
belongs: two passes and eight bytes a row more than needed. A compiled loop writes each row right where it belongs. With
two workers on two cores, which share caches and memory, a shuffle of 1 GB takes two thirds of the time. Numba compiles
such a loop when it is first asked to, in a thread of its own, and keeps the result on disk; until then
:func:`kernels_if_ready` says that there is none.

Strings are copied in blocks of 32 bytes, whatever their lengths: what a block writes beyond its string is overwritten by
the next one. A loop over just the bytes of each takes five times as long, because the processor cannot foresee where it
ends. Only at the end of a position's strings is it a byte after the other. A block is two words of
any address, for which both the source and the output come as arrays whose elements overlap: see :class:`Memory`.
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

__all__ = ["MAX_POSITIONS", "SCATTERED", "Kernels", "Memory", "compile_kernels", "compiled_kernels", "kernels_if_ready"]

logger = logging.getLogger(__name__)

#: The kernels take positions as ``uint16``, of which the last stands for none.
MAX_POSITIONS = 2**16 - 1
#: By width in bytes: as what values of that width are scattered.
SCATTERED: dict[int, np.dtype[Any]] = {
    nbytes: np.dtype(name) for nbytes, name in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))
}
#: Half a block of a string. The widest number that Numba and NumPy both have; its values are only copied.
_BLOCK = np.dtype("c16")
#: Rows that are hashed at a time.
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Kernels:
    """Compiled functions; they release the GIL.

    Parameters
    ----------
    rank
        ``rank(positions, count, ranks)`` counts the rows before each row that have its position; positions from
        ``count`` on are passed over. Returns the number of rows of each position.
    scatter
        ``scatter(source, positions, count, ranks, bases, out)`` writes ``source[r]`` to
        ``out[bases[positions[r]] + ranks[r]]``. Nothing checks that this lies in ``out``.
    measure
        ``measure(offsets, positions, count)`` returns how many bytes the strings of each position have; string ``r``
        reaches from ``offsets[r]`` to ``offsets[r + 1]``.
    copy
        ``copy(offsets, *data, positions, count, starts, ends, *out)`` writes the strings of each position, in their
        order, from ``starts`` of it on, up to ``ends``, and leaves in ``starts`` where it ended. ``data`` and ``out``
        come as :meth:`Memory.views`. Nothing is checked.
    partition
        ``partition(memory, starts, hashed, divisor, out)`` writes, for each row, the remainder of the hash of its keys.
        The words of column ``c`` begin at ``memory[starts[c]]``; where ``hashed[c]``, they are hashes already.
    """

    rank: Callable[..., npt.NDArray[np.int64]]
    scatter: Callable[..., None]
    measure: Callable[..., npt.NDArray[np.int64]]
    copy: Callable[..., None]
    partition: Callable[..., None]


class Memory:
    """A range of addresses as NumPy understands it.

    Parameters
    ----------
    address
        Where it begins.
    dtype
        Of its elements.
    size
        Count of elements.
    stride
        Bytes from one element to the next; None: they do not overlap.
    """

    def __init__(self, address: int, dtype: np.dtype[Any], size: int, stride: int | None = None) -> None:
        self.__array_interface__ = {
            "data": (address, False),
            "typestr": dtype.str,
            "shape": (size,),
            "strides": None if stride is None else (stride,),
            "version": 3,
        }

    @classmethod
    def views(cls, address: int, nbytes: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """View its bytes, and half a block from each byte on; the latter reach beyond the end."""
        return np.asarray(cls(address, np.dtype("u1"), nbytes)), np.asarray(cls(address, _BLOCK, nbytes, 1))


class _Compilation:
    """The state of this process: not begun, under way, done, or given up."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.thread: threading.Thread | None = None
        self.kernels: Kernels | None = None


_state = _Compilation()


def compiled_kernels() -> Kernels | None:
    """Return the kernels if they are ready."""
    return _state.kernels


def kernels_if_ready() -> Kernels | None:
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


def compile_kernels() -> Kernels:
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
    # Unsigned, as an index has to be that is not to be compared with zero each time.
    bounds = types.Array(types.uint64, 1, "C", readonly=True)
    octets = types.Array(types.uint8, 1, "C"), types.Array(types.complex128, 1, "A", aligned=False)

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
            for word in (types.uint8, types.uint16, types.uint32, types.uint64, types.complex128)
        )
    )(_scatter)
    measure = compiled(types.Array(types.int64, 1, "C")(bounds, positions, types.int64))(_measure)
    starts = types.Array(types.uint64, 1, "C")
    copy = compiled(types.void(bounds, *octets, positions, types.int64, starts, bounds, *octets))(_copy)
    words = types.Array(types.uint64, 1, "C")
    partition = compiled(
        *(
            types.void(words, bounds, types.Array(types.boolean, 1, "C", readonly=True), types.uint64, out)
            for out in (types.Array(word, 1, "C") for word in (types.int8, types.int16, types.int32, types.int64))
        )
    )(_partition)
    return Kernels(rank, scatter, measure, copy, partition)


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


def _measure(offsets: Any, positions: Any, count: Any) -> Any:
    sizes = np.zeros(count, np.int64)
    for row in range(len(positions)):
        position = positions[row]
        if position < count:
            sizes[position] += offsets[row + 1] - offsets[row]
    return sizes


def _copy(  # noqa: PLR0917
    offsets: Any,
    data: Any,
    data_blocks: Any,
    positions: Any,
    count: Any,
    starts: Any,
    ends: Any,
    out: Any,
    out_blocks: Any,
) -> None:
    half, whole = np.uint64(16), np.uint64(32)
    for row in range(len(positions)):
        position = positions[row]
        if position >= count:
            continue
        begin, end = offsets[row], offsets[row + 1]
        start = starts[position]
        stop = start + (end - begin)
        starts[position] = stop
        # What is yet to come of this position comes from behind this string: as much as it has room, there is to read.
        if stop + whole <= ends[position]:
            while start < stop:
                out_blocks[start] = data_blocks[begin]
                out_blocks[start + half] = data_blocks[begin + half]
                start += whole
                begin += whole
        else:
            while start < stop:
                out[start] = data[begin]
                start += np.uint64(1)
                begin += np.uint64(1)


def _partition(memory: Any, starts: Any, hashed: Any, divisor: Any, out: Any) -> None:
    # pandas' hash of a row: words mixed as by SplitMix64, folded as Python folds the hashes of a tuple. Some rows at a time
    # through all columns, so that a compiler makes vectors of the loops, and their results stay in the cache.
    one = np.uint64(1)
    columns = np.uint64(len(starts))
    hashes = np.empty(_BLOCK_ROWS, np.uint64)
    for begin in range(0, len(out), _BLOCK_ROWS):
        rows = min(_BLOCK_ROWS, len(out) - begin)
        hashes[:] = np.uint64(0x345678)
        factor = np.uint64(1_000_003)
        for column in range(columns):
            first = starts[column] + np.uint64(begin)
            words = memory[first : first + np.uint64(rows)]
            if hashed[column]:
                for row in range(rows):
                    hashes[row] = (hashes[row] ^ words[row]) * factor
            else:
                for row in range(rows):
                    word = words[row]
                    word ^= word >> np.uint64(30)
                    word *= np.uint64(0xBF58476D1CE4E5B9)
                    word ^= word >> np.uint64(27)
                    word *= np.uint64(0x94D049BB133111EB)
                    word ^= word >> np.uint64(31)
                    hashes[row] = (hashes[row] ^ word) * factor
            factor += np.uint64(82_520) + np.uint64(2) * (columns - column)
        end = np.uint64(97_531)
        part = out[begin : begin + rows]
        if divisor & (divisor - one):
            for row in range(rows):
                part[row] = (hashes[row] + end) % divisor
        else:
            # A power of two: without a division.
            for row in range(rows):
                part[row] = (hashes[row] + end) & (divisor - one)
