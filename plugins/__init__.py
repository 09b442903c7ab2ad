"""The scheduler plugin and the worker extension, and the placement policy."""

from __future__ import annotations

if __name__ != "dask_gpurt.plugins":
    raise ImportError(f"import dask_gpurt.plugins, not {__name__}: a second copy would keep a second state")
