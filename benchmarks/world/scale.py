"""Sizes from which on things are done otherwise, made small: a world of kilobytes is to take all the ways of one of gigabytes.

Covers: :func:`scale`. Does not cover: pages of files, which are those of the system.
"""

from __future__ import annotations

from random import Random
from typing import Any

from dask_gpurt.memory import disk, shards
from dask_gpurt.shuffle import carrier, outbox, run

__all__ = ["scale"]


def scale(drawn: Random) -> None:
    """Draw these sizes."""
    sizes: list[tuple[Any, str, list[int]]] = [
        (carrier, "EAGER_NBYTES", [1_000, 20_000]),
        (run, "MESSAGE_NBYTES", [2_000, 20_000]),
        (run, "HANDED_NBYTES", [0, 10_000]),
        (outbox, "LOT_NBYTES", [1_000, 100_000]),
        (outbox, "JOIN_NBYTES", [5_000, 100_000]),
        (shards, "CHUNK_NBYTES", [2_000, 50_000]),
        (disk, "IDLE_FILE_NBYTES_MIN", [4_000, 50_000]),
    ]
    for module, name, choices in sizes:
        assert isinstance(getattr(module, name), int), name
        setattr(module, name, drawn.choice([*choices, getattr(module, name)]))
