"""dask-gpurt: placement, spilling and shuffling for Dask clusters, with and without GPUs."""

from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
