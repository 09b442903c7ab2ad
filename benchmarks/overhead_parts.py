"""What each part costs by itself where there is nothing to gain; see :mod:`benchmarks.overhead`."""

from __future__ import annotations

from benchmarks.frame import Subject
from benchmarks.overhead import run
from dask_gpurt.config import PARTS
from dask_gpurt.demo.cluster import Side

SIDES = {f"-{part}": Side(part, (part,)) for part in PARTS}

SUBJECT = Subject(
    "overhead_parts", "what each part costs by itself, likewise", lambda quick: run(quick=quick, sides=SIDES)
)
