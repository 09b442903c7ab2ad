"""The data plane of Dask's own peer-to-peer shuffle: split once, no pickle, memory first."""

from __future__ import annotations

if __name__ != "dask_gpurt.shuffle":
    raise ImportError(f"import dask_gpurt.shuffle, not {__name__}: a second copy would keep a second state")
