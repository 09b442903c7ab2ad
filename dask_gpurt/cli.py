"""``dask gpurt``: the subcommands of Dask's own command line."""

from __future__ import annotations

import click

__all__ = ["gpurt"]


@click.group()
def gpurt() -> None:
    """Place, spill and shuffle better: dask-gpurt."""
