"""A rechunk of an array that lies in memory, from bands of rows to bands of columns: of 1 GB, and of 8 GB on a GPU.

The elements are integer hashes of row and column, so that each output block is compared with what it has to be, to the
bit. See :mod:`benchmarks.contest` for what is compared with what.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pandas as pd
from distributed import Client, wait

from benchmarks.contest import P2P, TASKS, Case, runner
from benchmarks.frame import Subject, WrongAnswerError
from benchmarks.gpu import DEVICE_COPY, MEMORY_LIMIT_NBYTES, where_there_is_a_gpu
from benchmarks.tables import in_parts, ordered_futures
from dask_gpurt.demo.arrays import elements

SEED = 1


@dataclass(frozen=True)
class RowsToColumns:
    """A rechunk of a square array from ``bands`` bands of ``thin`` rows to as many of ``thin`` columns.

    Parameters
    ----------
    bands, thin
        Bands, and the rows or columns of each.
    module
        Library of the blocks, ``"numpy"`` or ``"cupy"``.
    """

    bands: int
    thin: int
    module: str = "numpy"

    @property
    def side(self) -> int:
        """Rows, and columns, of the array."""
        return self.bands * self.thin

    def _band(self, number: int) -> slice:
        return slice(number * self.thin, (number + 1) * self.thin)

    def make(self, part: int) -> Any:
        """Make an input block."""
        return elements(self._band(part), slice(0, self.side), SEED, self.module)

    def right(self, block: Any, part: int) -> bool:
        """Whether a block is the one of this number of the output."""
        true = elements(slice(0, self.side), self._band(part), SEED, self.module)
        equal = importlib.import_module(self.module).array_equal
        return type(block) is type(true) and block.dtype == true.dtype and bool(equal(block, true))

    def load(self, client: Client) -> Any:
        """Make the array on the workers."""
        import dask.array as da
        from dask.delayed import delayed

        shape = (self.thin, self.side)
        blocks = [
            da.from_delayed(delayed(future), shape=shape, dtype="float64")
            for future in in_parts(client, self.make, self.bands)
        ]
        array = client.persist(da.concatenate(blocks))
        wait(array)
        return array

    def nbytes(self, client: Client, inputs: Any) -> int:  # noqa: ARG002
        """Return what the array knows."""
        return int(inputs.nbytes)

    def build(self, inputs: Any) -> Any:
        """Return the array in bands of columns."""
        return inputs.rechunk((self.side, self.thin))

    def truth(self, client: Client, inputs: Any) -> Any:  # noqa: ARG002
        """Return nothing: each block is judged by itself."""
        return None

    def check(self, client: Client, answer: Any, truth: Any) -> None:  # noqa: ARG002
        """Judge each block where it lies."""
        futures = ordered_futures(answer)
        right = client.gather(client.map(self.right, futures, range(self.bands), pure=False))
        if len(futures) != self.bands or not all(right):
            raise WrongAnswerError(f"{right.count(False)} of {len(futures)} blocks are wrong")

    def excerpt(self, client: Client, answer: Any) -> pd.DataFrame | None:  # noqa: ARG002
        """Return nothing: every element was compared."""
        return None


def rows_to_columns(*, quick: bool) -> Case:
    """Rechunk 1 GB in blocks of 64 MB; quick: a quarter of it."""
    return Case(
        name="rows-to-columns",
        workload=RowsToColumns(bands=16, thin=352 if quick else 704),
        small=RowsToColumns(bands=16, thin=176),
        peers=(P2P, TASKS),
        rounds=3 if quick else 7,
    )


def gpu_rechunk(*, quick: bool) -> Case:
    """Rechunk 8 GB of CuPy blocks of 512 MB between two workers on one GPU; quick: an eighth of it.

    Stock's p2p refuses CuPy, so its tasks are what its users have.
    """
    return Case(
        name="gpu-rechunk",
        workload=RowsToColumns(bands=16, thin=704 if quick else 1984, module="cupy"),
        small=RowsToColumns(bands=16, thin=352, module="cupy"),
        peers=(TASKS,),
        rounds=3 if quick else 5,
        memory_limit_nbytes=MEMORY_LIMIT_NBYTES,
        bound=DEVICE_COPY,
    )


SUBJECT = Subject.of_cases(
    "rechunk",
    "array rechunks beside stock p2p and tasks",
    {
        "rows-to-columns": runner(rows_to_columns),
        "gpu-rechunk": where_there_is_a_gpu("gpu-rechunk", runner(gpu_rechunk)),
    },
)
