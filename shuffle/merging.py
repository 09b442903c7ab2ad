"""Two output partitions that are merged on whole numbers which the right one has once each: as pandas does it, in less time.

Covers: what Dask calls to merge two partitions, where it is an inner join on one column of NumPy's integers, and no other
column has a name on both sides.
Does not cover: any other merge, which is pandas'.
See also: :mod:`dask_gpurt.shuffle.hashing`, which stands in Dask's place in the same way.

Theory of operation: half of the time of such a merge pandas numbers the keys of the right side (for each a place in a hash
table, and one in a list that grows), to find out that they differ, and looks up those of the left side in what it has made.
An index of pandas answers the same questions in half the time. The frames are put together as pandas does: rows in the
order of the left side, columns of the left side first, a new index.

Whether keys differ is found out by making the index, which would be for nothing where they do not. So some of them are
looked at before: where keys come more than once, they mostly do so among a few thousand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ROWS_MIN", "inner_merge", "over_merge_chunk"]

#: Smaller partitions are merged in a few milliseconds by pandas.
ROWS_MIN = 50_000
#: So many keys are looked at before all are.
_SAMPLED_ROWS = 4096


def inner_merge(left: pd.DataFrame, right: pd.DataFrame, key: str) -> pd.DataFrame | None:
    """Return ``left.merge(right, on=key)``, or None where that is for pandas to do."""
    import pandas as pd

    if not (_plain(left, key) and _plain(right, key)) or len(left.columns.intersection(right.columns)) != 1:
        return None
    own, others = left[key].to_numpy(), pd.Index(right[key].to_numpy(), copy=False)
    if own.dtype != others.dtype or max(len(left), len(right)) < ROWS_MIN or not len(left) or not len(right):
        return None
    sample = others[:_SAMPLED_ROWS]
    if not sample.is_unique or (others.is_monotonic_increasing and pd.Index(own).is_monotonic_increasing):
        # What is sorted is merged by pandas without a hash table.
        return None
    if not others.is_unique:
        return None
    found = others.get_indexer(own)
    if (found < 0).any():
        left = left.take(np.flatnonzero(found >= 0))
        found = found[found >= 0]
    index = pd.RangeIndex(len(found))
    right = right.drop(columns=key).take(found)
    return pd.concat([left.set_axis(index), right.set_axis(index)], axis=1)


def _plain(frame: Any, key: str) -> bool:
    import pandas as pd

    if type(frame) is not pd.DataFrame or not frame.columns.is_unique or key not in frame.columns:
        return False
    dtype = frame.dtypes[key]
    return (
        isinstance(dtype, np.dtype)
        and dtype.kind in "iu"
        and frame.columns.nlevels == 1
        and frame.columns.name is None
        and key not in frame.index.names
        and not frame.attrs
        and frame.flags.allows_duplicate_labels
    )


#: The arguments with which Dask asks for a merge that may be one of these.
_EXPECTED = {"how": "inner", "left_index": False, "right_index": False, "indicator": False}


def over_merge_chunk(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the merges of this module from ``stock``, which is Dask's function."""

    @functools.wraps(stock)
    def over(lhs: Any, *args: Any, result_meta: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and kwargs.keys() <= {*_EXPECTED, "left_on", "right_on", "suffixes"}:
            asked = {**_EXPECTED, "how": None, **{name: kwargs[name] for name in kwargs.keys() & _EXPECTED.keys()}}
            left_on, right_on = (_label(kwargs.get(name)) for name in ("left_on", "right_on"))
            categories = any(dtype.name == "category" for dtype in result_meta.dtypes)
            if asked == _EXPECTED and left_on is not None and left_on == right_on and not categories:
                merged = inner_merge(lhs, args[0], left_on)
                if merged is not None and len(merged):
                    return merged
        return stock(lhs, *args, result_meta=result_meta, **kwargs)

    return over


def _label(on: Any) -> str | None:
    """Return the name of a single column."""
    if isinstance(on, list) and len(on) == 1:
        (on,) = on
    return on if type(on) is str else None
