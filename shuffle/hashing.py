"""The output partition of each row of a frame: Dask's own answer, in one pass over the keys.

Theory of operation
    Dask hashes the keys of a frame with pandas, column by column, and takes the remainder by the number of output
    partitions. Each step makes an array of eight bytes a row, ten of them for one column, and memory that is large and new
    has to be mapped by the system: in a worker that costs three times as much as the arithmetic. A compiled loop takes each
    row through all steps, and it does so for all rows in one call, for to get the GIL again, which the event loop may
    have, takes as long as all of the arithmetic.

    Small frames have another problem: Dask selects the keys' columns as a frame, of the partition and of its empty
    likeness, casts that, and hashes it, in a millisecond of which the arithmetic is a tenth. Where the keys are plain columns
    by their names, they are taken as arrays, by NumPy if nothing is compiled.

    What this gives is what Dask gives, to the bit: workers that have compiled it and workers that have not, or not yet, send
    the rows of one key to one output partition. Columns that pandas does not keep as NumPy numbers (strings,
    nullable types) are hashed by pandas, and only what follows is done here; anything else is left to Dask.

Covers: the arithmetic, and the replacement of Dask's functions in a process, which ends with the last worker that wants it.
Does not cover: which columns are keys, and where rows go; see :mod:`dask_gpurt.shuffle.plan`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dask_gpurt import seams
from dask_gpurt.shuffle.kernels import Memory, compiled_kernels
from dask_gpurt.shuffle.merging import over_merge_chunk

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

    from dask_gpurt.shuffle.kernels import Kernels

__all__ = ["Replacement", "partitioning_index"]

_WORD = np.dtype(np.uint64)


#: A column of keys as 64 bits a row, and whether these are hashes already.
_Words = tuple["npt.NDArray[np.uint64]", bool]


def partitioning_index(frame: pd.DataFrame, npartitions: int, kernels: Kernels | None) -> pd.Series[int]:
    """Return the output partition of each row, as ``dask.dataframe.shuffle.partitioning_index`` does.

    Parameters
    ----------
    frame
        The keys: at least one column.
    npartitions
        Count of output partitions, from 1 on.
    kernels
        The compiled loops; None: NumPy does it.

    Returns
    -------
    pandas.Series
        With the index of ``frame``, of the smallest signed type that has room for ``-npartitions - 1``.
    """
    return _partitions([_words(column) for _, column in frame.items()], frame.index, npartitions, kernels)


def _partitions(keys: Sequence[_Words], index: pd.Index, npartitions: int, kernels: Kernels | None) -> pd.Series[int]:
    import pandas as pd

    dtype = np.min_scalar_type(-npartitions - 1)
    if kernels is None or not len(index):
        found = _fold(keys, len(index), npartitions).astype(dtype)
    else:
        found = np.empty(len(index), dtype)
        addresses = np.array([words.ctypes.data for words, _ in keys], np.uint64)
        origin = int(addresses.min())
        starts, left = np.divmod(addresses - np.uint64(origin), np.uint64(_WORD.itemsize))
        assert not left.any(), "arrays of words begin at multiples of a word"
        # One array over all columns, and over what lies between them: only by ``starts`` is it known what is theirs.
        memory = np.asarray(Memory(origin, _WORD, int(starts.max()) + len(index)))
        kernels.partition(memory, starts, np.array([hashed for _, hashed in keys]), npartitions, found)
    return pd.Series(found, index=index, copy=False)


def _fold(keys: Sequence[_Words], rows: int, npartitions: int) -> npt.NDArray[np.uint64]:
    """Do what the compiled loop does."""
    import pandas as pd

    hashes = np.full(rows, 0x345678, _WORD)
    factor = 1_000_003
    for number, (words, hashed) in enumerate(keys):
        hashes ^= words if hashed else pd.util.hash_array(words, categorize=False)
        hashes *= np.uint64(factor)
        factor += 82_520 + 2 * (len(keys) - number)
    hashes += np.uint64(97_531)
    hashes %= np.uint64(npartitions)
    return hashes


def _keys(frame: pd.DataFrame, labels: Any, meta: Any) -> list[_Words] | None:
    """Return the keys as Dask casts them, if they are columns by these names that it is known for; else None.

    Dask makes floats of numbers, by the types of ``meta``, so that equal keys of different types meet.
    """
    import pandas as pd

    if type(frame) is not pd.DataFrame or type(meta) is not pd.DataFrame or type(labels) is not list:
        return None
    if not labels or not all(type(label) is str for label in labels) or len(set(labels)) != len(labels):
        return None
    if not (frame.columns.is_unique and meta.columns.is_unique):
        return None
    keys = []
    for label in labels:
        if label not in frame.columns or label not in meta.columns:
            return None
        column, expected = frame[label], meta[label].dtype
        if isinstance(expected, pd.CategoricalDtype):
            return None
        if not pd.api.types.is_numeric_dtype(expected):
            keys.append(_words(column))
        elif _is_real(expected) and _is_real(column.dtype):
            cast = np.ascontiguousarray(column.to_numpy(), np.float64)
            keys.append((np.require(cast.view(_WORD), _WORD, ("A",)), False))
        else:
            return None
    return keys


def _is_real(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "biuf"


def _words(column: pd.Series[Any]) -> _Words:
    """Return the bits of each value, or its hash, and whether it is a hash."""
    import pandas as pd

    dtype = column.dtype
    if isinstance(dtype, np.dtype) and dtype.isnative and dtype.itemsize in (1, 2, 4, 8) and dtype.kind in "biufmM":
        # pandas hashes instants as what they are stored as.
        bits = np.ascontiguousarray(column.to_numpy()).view(f"u{dtype.itemsize}")
        return np.require(bits, _WORD, ("A",)), False
    return np.require(pd.util.hash_pandas_object(column, index=False).to_numpy(), _WORD, ("C", "A")), True


#: Puts what is made of a function in its place, and returns how to undo it.
_Put = Callable[[Callable[[Any], Any]], Callable[[], None]]


class Replacement:
    """Stands in the place of Dask's functions in this process, as long as somebody wants it to.

    Parameters
    ----------
    parts
        For each function: what puts another one in its place, and what makes that of stock's.
    """

    def __init__(self, *parts: tuple[_Put, Callable[[Any], Any]]) -> None:
        self._parts = parts
        self._guard = threading.Lock()
        self._owners: set[int] = set()
        self._undo: list[Callable[[], None]] = []

    def attach(self, owner: object) -> None:
        """Have Dask's functions replaced for ``owner``; may be said again and again."""
        if id(owner) in self._owners:
            return
        with self._guard:
            self._owners.add(id(owner))
            if not self._undo:
                self._undo = [put(over) for put, over in self._parts]

    def detach(self, owner: object) -> None:
        """Let go of it; with the last owner Dask's functions are put back."""
        with self._guard:
            self._owners.discard(id(owner))
            if not self._owners:
                for undo in self._undo:
                    undo()
                self._undo = []


def _over_partitioning(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes frames of numbers and strings to the kernels, and anything else to ``stock``."""
    import pandas as pd

    # Its name is stock's, so that a graph that is made in this process says stock's name to others.
    @functools.wraps(stock)
    def over(df: Any, npartitions: int, cast_dtype: Any = None) -> Any:
        kernels = compiled_kernels()
        if kernels is not None and cast_dtype is None and type(df) is pd.DataFrame and len(df.columns):
            return partitioning_index(df, int(npartitions), kernels)
        return stock(df, npartitions, cast_dtype)

    return over


def _over_assigning(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return what assigns the output partitions of frames with plain keys itself, and leaves anything else to ``stock``."""

    @functools.wraps(stock)
    def over(df: Any, index: Any, name: str, npartitions: int, meta: Any, index_shuffle: bool) -> Any:  # noqa: PLR0917
        keys = None if index_shuffle else _keys(df, index, meta)
        if keys is None:
            return stock(df, index, name, npartitions, meta, index_shuffle)
        return df.assign(**{name: _partitions(keys, df.index, int(npartitions), compiled_kernels())})

    return over


#: Those of this process.
replacement = Replacement(
    (seams.replace_partitioning_index, _over_partitioning),
    (seams.replace_assigning, _over_assigning),
    (seams.replace_merge_chunk, over_merge_chunk),
)
