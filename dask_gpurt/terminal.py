"""What commands say while they work.

Covers: :func:`progress`, a line that says what is being done, for whatever has no count to show.
Does not cover: progress bars and tables; see :mod:`dask_gpurt.demo.show`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import click

__all__ = ["Say", "progress"]

Say = Callable[[str], None]


@contextlib.contextmanager
def progress() -> Iterator[Say]:
    """Yield what says what is being done, on a terminal; the line is gone at the end."""
    if not sys.stderr.isatty():
        yield lambda text: None  # noqa: ARG005
        return
    clear = "\r\x1b[K"
    try:
        yield lambda text: click.echo(f"{clear}{text} …", err=True, nl=False)
    finally:
        click.echo(clear, err=True, nl=False)
