"""What moves when memory is short: bytes beside the least possible and beside stock's, and what that takes.

``bytes-25``, ``bytes-50``, ``kmeans-25`` … and ``stalls-25``, ``stalls-50`` are replays of the traces of real jobs with room
for 25 % and 50 % of what they hold at their peak; see :mod:`benchmarks.spilling.replay`. Of ``bytes-25`` the line against
``lpmin`` is the mean over all jobs (geometric, of the ratios), after a line for each; ``lru`` is stock's store, ``oracle``
is ours with a horizon that knows the future, and ``worst`` is the job in which ours is worst beside ``lru``. Blocks of the
recorded jobs are of 1 MB, and count as 64.

The traces are recorded once in a run. No two of them are alike: which task runs when and where is decided by the clock.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.frame import Line, Subject, line_of_pairs
from benchmarks.spilling.bound import least_nbytes
from benchmarks.spilling.recorder import record_on_cluster
from benchmarks.spilling.replay import Moved, replay_lru, replay_oracle, replay_ours
from benchmarks.spilling.trace import Trace
from benchmarks.spilling.workloads import JOBS, PASSES
from dask_gpurt.demo.runner import quotient

PERCENTS = (25, 50)

#: Blocks of 1 MB stand for the 64 MB that Dask recommends: what an operation costs beside its bytes is to count as there.
SCALE = 64

#: A quick run leaves out every second job, beside those that have cases of their own.
QUICK_STEP = 2


@dataclass(frozen=True)
class Replayed:
    """What the stores moved in a job, on all workers."""

    ours: Moved
    oracle: Moved
    lru: Moved
    least_nbytes: float


@functools.cache
def traces(*, quick: bool) -> Mapping[str, Sequence[Trace]]:
    """Record the jobs."""
    others = [name for name in JOBS if name not in PASSES]
    names = {*PASSES, *(others[::QUICK_STEP] if quick else others)}
    jobs = {name: job for name, job in JOBS.items() if name in names}
    return {name: [trace.scaled(SCALE) for trace in of_job] for name, of_job in record_on_cluster(jobs)}


@functools.cache
def replayed(name: str, percent: int, *, quick: bool) -> Replayed:
    """Replay a job of :func:`traces` with so much of its peak."""
    return replayed_traces(traces(quick=quick)[name], percent)


def replayed_traces(recorded: Sequence[Trace], percent: int) -> Replayed:
    """Replay the traces of the workers with so much of the peak of each."""
    of_job = [(trace, trace.peak_nbytes * percent // 100) for trace in recorded]
    ours, oracle, lru = (
        _sum([replay(trace, capacity_nbytes) for trace, capacity_nbytes in of_job])
        for replay in (replay_ours, replay_oracle, replay_lru)
    )
    return Replayed(ours, oracle, lru, sum(least_nbytes(*each) for each in of_job))


def _sum(moved: Sequence[Moved]) -> Moved:
    return Moved(
        sum(each.written_nbytes for each in moved),
        sum(each.read_nbytes for each in moved),
        sum(each.waits for each in moved),
        max(each.beyond_nbytes for each in moved),
    )


def _line(case: str, ours: float, peer: float, peer_name: str) -> Line:
    return line_of_pairs(case, "moved_nbytes", [ours], [peer], peer_name)


def _mean(case: str, lines: Sequence[Line]) -> Line:
    """Make a line of the lines of all jobs."""
    ratios = [line.ratio for line in lines]
    mean = math.exp(statistics.fmean(math.log(ratio) if ratio else -math.inf for ratio in ratios))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ours, peer = sum(line.ours for line in lines), sum(line.peer for line in lines)
    return Line(case, lines[0].metric, mean, ours, peer, lines[0].peer_name, (low, high), len(lines))


def bytes_moved(percent: int, *, quick: bool) -> Iterator[Line]:
    """Compare ours in each job with the bound, and in all of them with the others."""
    case = f"bytes-{percent}"
    found = {name: replayed(name, percent, quick=quick) for name in traces(quick=quick)}
    bounds = [_line(f"{case}-{name}", each.ours.nbytes, each.least_nbytes, "lpmin") for name, each in found.items()]
    lru = [_line(f"{case}-{name}", each.ours.nbytes, each.lru.nbytes, "lru") for name, each in found.items()]
    oracle = [_line(case, each.ours.nbytes, each.oracle.nbytes, "oracle") for each in found.values()]
    for pair in zip(bounds, lru, strict=True):
        yield from pair
    yield _mean(case, bounds)
    yield _mean(case, oracle)
    yield _mean(case, lru)
    worst = min(lru, key=lambda line: line.ratio)
    yield line_of_pairs(f"{case}-worst", "moved_nbytes", [worst.ours], [worst.peer], "lru")


def job_bytes(name: str, percent: int, *, quick: bool) -> Iterator[Line]:
    """Compare ours in a job with stock's store."""
    found = replayed(name, percent, quick=quick)
    yield _line(f"{name}-{percent}", found.ours.nbytes, found.lru.nbytes, "lru")


def stalls(percent: int, *, quick: bool) -> Iterator[Line]:
    """Count values that were asked for and were not in memory, in all jobs."""
    found = [replayed(name, percent, quick=quick) for name in traces(quick=quick)]
    ours, lru = (sum(waits) for waits in zip(*((each.ours.waits, each.lru.waits) for each in found), strict=True))
    yield Line(f"stalls-{percent}", "waits", quotient(lru, ours), ours, lru, "lru", (quotient(lru, ours),) * 2, 1)


def _case(run: Callable[..., Iterator[Line]], *arguments: object) -> Callable[[bool], Iterator[Line]]:
    return lambda quick: run(*arguments, quick=quick)


CASES: Mapping[str, Callable[[bool], Iterator[Line]]] = (
    {f"bytes-{percent}": _case(bytes_moved, percent) for percent in PERCENTS}
    | {f"{name}-{percent}": _case(job_bytes, name, percent) for name in PASSES for percent in PERCENTS}
    | {f"stalls-{percent}": _case(stalls, percent) for percent in PERCENTS}
)

SUBJECT = Subject.of_cases("spill", "bytes moved and time lost when memory is short", CASES)
