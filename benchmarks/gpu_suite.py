"""Everything that is measured on a GPU, in one run: the ``gpu`` cases of the shuffle, the rechunk and the store.

Each stands beside its peers and beside its roof: the rate at which the device copies its own memory, or that of copies from and
to page-locked memory, measured in the same run.

Covers: :data:`SUBJECT`.
Does not cover: the cases (:mod:`benchmarks.shuffle`, :mod:`benchmarks.rechunk`, :mod:`benchmarks.spill`).
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import rechunk, shuffle, spill
from benchmarks.frame import Line, Subject
from benchmarks.gpu import missing

CASES = {
    name: run
    for subject in (rechunk.SUBJECT, shuffle.SUBJECT, spill.SUBJECT)
    for name, run in subject.cases.items()
    if name.startswith("gpu-")
}


def every(quick: bool) -> Iterator[Line]:
    """Run all cases, or say once why none can be run."""
    reason = missing()
    if reason is not None:
        print(f"nothing can be run: {reason}", flush=True)
        return
    for run in CASES.values():
        yield from run(quick)


SUBJECT = Subject("gpu", "all cases that need a GPU, beside their peers and their roofs", every, CASES)
