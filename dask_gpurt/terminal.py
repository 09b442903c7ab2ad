"""What commands say while they work.

Covers: :func:`progress`, a line that says what is being done, for whatever has no count to show; :func:`connect`, which says that it waits.
Does not cover: progress bars and tables; see :mod:`dask_gpurt.demo.show`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from dask_gpurt.errors import GpurtError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Say", "connect", "progress"]

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


def connect(scheduler: str, timeout_s: float) -> Client:
    """Connect to a scheduler, and say so on a terminal meanwhile.

    Raises
    ------
    GpurtError
        If it does not answer in time.
    """
    from distributed import Client

    with progress() as say:
        say(f"Connecting to {scheduler}")
        try:
            return Client(scheduler, timeout=timeout_s, set_as_default=False)
        except OSError as error:
            raise GpurtError(f"no answer from {scheduler}: {error}") from error
