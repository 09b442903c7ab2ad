"""The output partition of each row of a frame: Dask's own answer, in one pass over the keys.

Theory of operation
    Dask hashes the keys of a frame with pandas, column by column, and takes the remainder by the number of output
    partitions. Each step makes an array of eight bytes a row, ten of them for one column, and memory that is large and new
    has to be mapped by the system: in a worker that costs three times as much as the arithmetic. A compiled loop takes each
    row through all steps, and it does so for all rows in one call, for to get the GIL again, which the event loop may
    have, takes as long as all of the arithmetic.

    What it gives is what Dask gives, to the bit: workers that have compiled it and workers that have not, or not yet, send
    the rows of one key to one output partition. Columns that pandas does not keep as NumPy numbers (strings, categories,
    nullable types) are hashed by pandas, and only what follows is done here; anything else is left to Dask.

Covers: the arithmetic, and the replacement of Dask's function in a process, which ends with the last worker that wants it.
Does not cover: which columns are keys, and where rows go; see :mod:`dask_gpurt.shuffle.plan`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_gpurt import seams
from dask_gpurt.shuffle.kernels import Memory

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    from dask_gpurt.shuffle.kernels import Kernels

__all__ = ["Replacement", "partitioning_index"]

_WORD = np.dtype(np.uint64)


def partitioning_index(frame: pd.DataFrame, npartitions: int, kernels: Kernels) -> pd.Series[int]:
    """Return the output partition of each row, as ``dask.dataframe.shuffle.partitioning_index`` does.

    Parameters
    ----------
    frame
        The keys: at least one column.
    npartitions
        Count of output partitions, from 1 on.
    kernels
        The compiled loops.

    Returns
    -------
    pandas.Series
        With the index of ``frame``, of the smallest signed type that has room for ``-npartitions - 1``.
    """
    import pandas as pd

    columns = [_words(column) for _, column in frame.items()]
    found = np.empty(len(frame), np.min_scalar_type(-npartitions - 1))
    if len(frame):
        addresses = np.array([words.ctypes.data for words, _ in columns], np.uint64)
        origin = int(addresses.min())
        starts, left = np.divmod(addresses - np.uint64(origin), np.uint64(_WORD.itemsize))
        assert not left.any(), "arrays of words begin at multiples of a word"
        # One array over all columns, and over what lies between them: only by ``starts`` is it known what is theirs.
        memory = np.asarray(Memory(origin, _WORD, int(starts.max()) + len(frame)))
        kernels.partition(memory, starts, np.array([hashed for _, hashed in columns]), npartitions, found)
    return pd.Series(found, index=frame.index, copy=False)


def _words(column: pd.Series[Any]) -> tuple[npt.NDArray[np.uint64], bool]:
    """Return the bits of each value, or its hash, and whether it is a hash."""
    import pandas as pd

    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.isnative and dtype.itemsize in (1, 2, 4, 8) and dtype.kind in "biufmM":
        # pandas hashes instants as what they are stored as.
        bits = np.ascontiguousarray(column.to_numpy()).view(f"u{dtype.itemsize}")
        return np.require(bits, _WORD, ("A",)), False
    return np.require(pd.util.hash_pandas_object(column, index=False).to_numpy(), _WORD, ("C", "A")), True


class Replacement:
    """Stands in the place of Dask's function in this process, as long as somebody wants it to.

    Parameters
    ----------
    put
        Puts a function in the place of Dask's, which it is given, and returns how to undo it.
    """

    def __init__(self, put: Callable[[Callable[[Any], Any]], Callable[[], None]]) -> None:
        self._put = put
        self._guard = threading.Lock()
        self._owners: set[int] = set()
        self._undo: Callable[[], None] | None = None

    def attach(self, owner: object, kernels: Kernels) -> None:
        """Have Dask's function replaced for ``owner``; may be said again and again."""
        if id(owner) in self._owners:
            return
        with self._guard:
            self._owners.add(id(owner))
            if self._undo is None:
                self._undo = self._put(functools.partial(_over, kernels=kernels))

    def detach(self, owner: object) -> None:
        """Let go of it; with the last owner Dask's function is put back."""
        with self._guard:
            self._owners.discard(id(owner))
            if self._undo is not None and not self._owners:
                self._undo()
                self._undo = None


def _over(stock: Callable[..., Any], *, kernels: Kernels) -> Callable[..., Any]:
    """Return what takes frames of numbers and strings to the kernels, and anything else to ``stock``."""
    import pandas as pd

    # Its name is stock's, so that a graph that is made in this process says stock's name to others.
    @functools.wraps(stock)
    def over(df: Any, npartitions: int, cast_dtype: Any = None) -> Any:
        if cast_dtype is None and type(df) is pd.DataFrame and len(df.columns):
            return partitioning_index(df, int(npartitions), kernels)
        return stock(df, npartitions, cast_dtype)

    return over


#: That of this process.
replacement = Replacement(seams.replace_partitioning_index)
