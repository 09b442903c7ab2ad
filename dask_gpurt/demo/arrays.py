"""Array jobs on more data than the workers have memory: ``x + x.T``, an all-to-all rechunk, ``x @ y``.

Covers: the jobs with dask.array, on NumPy or CuPy blocks, and the true answers, by NumPy alone.
Does not cover: how much memory the workers have; see :mod:`dask_gpurt.demo.runner`.

An answer would be larger than the client's memory, so what is compared is a checksum of each of its blocks: the
bilinear form ``u @ block @ v`` with weights that follow from the row and column numbers in the whole array. Blocks or
elements that are lost, changed, moved or doubled change it; rounding changes it by about 1e-13. All elements are
positive, so that nothing cancels.

The elements are integer hashes of row and column. They come out the same, to the bit, from every library, so that the
truth needs one block at a time: ``u @ (x @ y) @ v`` is ``(u @ x) @ (y @ v)``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ARRAY_JOBS", "ArrayJob", "Shape", "checksums"]

Array = np.ndarray[Any, np.dtype[np.float64]]

ITEM_NBYTES = 8
#: Rows and columns of a block: 18 MiB, so that a worker of a demonstration can hold a few dozen.
SIDE = 1536


@dataclass(frozen=True)
class Shape:
    """How large the arrays are, in blocks.

    Parameters
    ----------
    grid
        Blocks a side of the square array.
    side
        Rows and columns of a block.
    module
        Library of the blocks, ``"numpy"`` or ``"cupy"``.

    Examples
    --------
    >>> Shape.larger_than(2 * 2**30)
    Shape(grid=11, side=1536, module='numpy')
    >>> round(Shape.larger_than(2 * 2**30).nbytes / 2**30, 2)
    2.13
    """

    grid: int
    side: int = SIDE
    module: str = "numpy"

    @classmethod
    def larger_than(cls, nbytes: int, *, side: int = SIDE, module: str = "numpy") -> Shape:
        """Return the smallest square array that has at least ``nbytes``."""
        return cls(math.ceil(math.sqrt(nbytes / (ITEM_NBYTES * side**2))), side, module)

    @property
    def length(self) -> int:
        """Rows, and columns, of the square array."""
        return self.grid * self.side

    @property
    def nbytes(self) -> int:
        """Bytes of the square array."""
        return ITEM_NBYTES * self.length**2

    @property
    def flat(self) -> tuple[int, int]:
        """Rows and columns of a block of the left factor of a product: flat, so that the product is small."""
        return 2 * self.side // 3, 3 * self.side // 2

    @property
    def inner(self) -> tuple[int, int]:
        """Blocks along the outer and the inner dimension of a product whose two factors have the square's bytes.

        The outer one is short: the work of a product grows with it, and the demonstration is about data.
        """
        outer = max(1, self.grid // 5)
        return outer, math.ceil(self.grid**2 / (2 * outer))


@dataclass(frozen=True)
class ArrayJob:
    """A job: what is computed, and what should come out."""

    name: str
    title: str
    #: Makes what is to be persisted first.
    sources: Callable[[Shape], tuple[Any, ...]]
    #: Makes the lazy answer from it.
    build: Callable[[Shape, tuple[Any, ...]], Any]
    #: Calculates the checksums of the answer without Dask.
    truth: Callable[[Shape], Array]

    def run(self, shape: Shape) -> Array:
        """Compute the checksums of the answer with dask.array on the current client."""
        import distributed

        sources = self.sources(shape)
        if sources:
            sources = distributed.get_client().persist(sources)
            distributed.wait(sources)
        answer = checksums(self.build(shape, sources)).compute()
        return np.asarray(answer.get() if hasattr(answer, "get") else answer)


def elements(rows: slice, columns: slice, seed: int, module: str = "numpy") -> Any:
    """Return a part of the array with this seed: numbers in (0, 1] that follow from row and column.

    Examples
    --------
    >>> bool((elements(slice(0, 4), slice(2, 6), 1)[1:, 1:] == elements(slice(1, 4), slice(3, 6), 1)).all())
    True
    """
    xp = importlib.import_module(module)
    i = xp.arange(rows.start, rows.stop, dtype="uint32")[:, None] + xp.uint32(seed * 7919)
    j = xp.arange(columns.start, columns.stop, dtype="uint32")[None, :]
    # Wraps around on purpose; odd multipliers keep all 32 bits in play.
    mixed = (i * xp.uint32(2654435761)) ^ (j * xp.uint32(2246822519))
    mixed *= xp.uint32(3266489917)
    mixed >>= 8
    part = mixed.astype("float64")
    part += 1.0
    part *= 2.0**-24
    return part


def weights(indices: slice, seed: int, like: Any) -> Any:
    """Return the weights of these rows or columns in a checksum: numbers in [0.5, 1.5)."""
    i = np.arange(indices.start, indices.stop, dtype="uint32", like=like)
    mixed = (i + np.uint32(seed)) * np.uint32(2654435761)
    return (mixed >> 8).astype("float64") * 2.0**-24 + 0.5


def checksum(block: Any, rows: slice, columns: slice) -> Any:
    """Return ``u @ block @ v`` for a block that has these rows and columns of the whole."""
    return weights(rows, 1, block) @ block @ weights(columns, 2, block)


def checksums(array: Any) -> Any:
    """Return the lazy array that has the checksum of each block of a two-dimensional Dask array."""
    import dask.array as da

    chunks = tuple((1,) * len(sizes) for sizes in array.chunks)
    return da.map_blocks(_checksum_block, array, chunks=chunks, dtype="float64")


def _checksum_block(block: Any, block_info: Any = None) -> Any:
    if block_info is None:
        return block
    rows, columns = (slice(*bounds) for bounds in block_info[0]["array-location"])
    return checksum(block, rows, columns).reshape(1, 1)


def _source(shape: Shape, seed: int, chunks: tuple[Any, Any], size: tuple[int, int]) -> Any:
    import dask.array as da

    chunks = da.core.normalize_chunks(chunks, shape=size, dtype="float64")
    meta = importlib.import_module(shape.module).empty((0, 0))
    return da.map_blocks(_source_block, seed, shape.module, chunks=chunks, dtype="float64", meta=meta)


def _source_block(seed: int, module: str, block_info: Any = None) -> Any:
    rows, columns = (slice(*bounds) for bounds in block_info[None]["array-location"])
    return elements(rows, columns, seed, module)


def _square(shape: Shape) -> tuple[Any, ...]:
    return (_source(shape, 1, (shape.side, shape.side), (shape.length, shape.length)),)


def _factors(shape: Shape) -> tuple[Any, ...]:
    low, wide = shape.flat
    outer, inner = shape.inner[0] * low, shape.inner[1] * wide
    return _source(shape, 2, (low, wide), (outer, inner)), _source(shape, 3, (wide, low), (inner, outer))


def _add_transposed(_: Shape, sources: tuple[Any, ...]) -> Any:
    (x,) = sources
    return x + x.T


def _rows_to_columns(shape: Shape, _: tuple[Any, ...]) -> Any:
    import dask

    thin = max(1, shape.side // shape.grid)
    rows = _source(shape, 1, (thin, shape.length), (shape.length, shape.length))
    # Dask joins small blocks before a rechunk up to its preferred size, which is made for workers with more memory
    # than a demonstration's: stock Dask would be killed.
    with dask.config.set({"array.chunk-size": 2 * ITEM_NBYTES * shape.side**2}):
        return rows.rechunk((shape.length, thin), method="p2p")


def _multiply(_: Shape, sources: tuple[Any, ...]) -> Any:
    x, y = sources
    return x @ y


def _spans(blocks: int, side: int) -> list[slice]:
    return [slice(i * side, (i + 1) * side) for i in range(blocks)]


def _truth_add_transposed(shape: Shape) -> Array:
    spans = _spans(shape.grid, shape.side)
    truth = np.zeros((shape.grid, shape.grid))
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            block = elements(rows, columns, 1)
            truth[i, j] += checksum(block, rows, columns)
            # Transposed, its rows become columns and the other way round.
            truth[j, i] += checksum(block.T, columns, rows)
    return truth


def _truth_rows_to_columns(shape: Shape) -> Array:
    thin = max(1, shape.side // shape.grid)
    everything = slice(0, shape.length)
    projected = np.zeros(shape.length)
    for rows in _spans(shape.grid, shape.side):
        for columns in _spans(shape.grid, shape.side):
            block = elements(rows, columns, 1)
            projected[columns] += weights(rows, 1, block) @ block
    projected *= weights(everything, 2, projected)
    return np.add.reduceat(projected, np.arange(0, shape.length, thin))[None, :]


def _truth_multiply(shape: Shape) -> Array:
    (outer, inner), (low, wide) = shape.inner, shape.flat
    left = np.zeros((outer, inner * wide))
    right = np.zeros((inner * wide, outer))
    for i, span in enumerate(_spans(outer, low)):
        for shared in _spans(inner, wide):
            block = elements(span, shared, 2)
            left[i, shared] = weights(span, 1, block) @ block
            block = elements(shared, span, 3)
            right[shared, i] = block @ weights(span, 2, block)
    product: Array = left @ right
    return product


#: All array jobs by name.
ARRAY_JOBS = {
    job.name: job
    for job in (
        ArrayJob("transpose", "x + x.T of a persisted array", _square, _add_transposed, _truth_add_transposed),
        ArrayJob(
            "rechunk", "From bands of rows to bands of columns", lambda _: (), _rows_to_columns, _truth_rows_to_columns
        ),
        ArrayJob("matmul", "x @ y of persisted arrays", _factors, _multiply, _truth_multiply),
    )
}
