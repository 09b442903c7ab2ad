"""What moves when memory is short: bytes beside the least possible and beside stock's, and what that takes.

``bytes-25``, ``bytes-50``, ``kmeans-25`` … and ``stalls-25``, ``stalls-50`` are replays of the traces of real jobs with room
for 25 % and 50 % of what they hold at their peak; see :mod:`benchmarks.spilling.replay`. Of ``bytes-25`` the line against
``lpmin`` is the mean over all jobs (geometric, of the ratios), after a line for each; ``lru`` is stock's store, ``oracle``
is ours with a horizon that knows the future, and ``worst`` is the job in which ours is worst beside ``lru``. Blocks of the
recorded jobs are of 256 KB, and count as 64 MB.

The traces are recorded once in a run. No two of them are alike: which task runs when and where is decided by the clock.

``wall-25`` and ``loop`` are runs on real clusters (:mod:`benchmarks.spilling.clusters`), ``idle`` is what the memory part costs
where nothing is spilled (:mod:`benchmarks.overhead`), ``disk-write`` and ``disk-read`` are the files beside the bare disk
(:mod:`benchmarks.spilling.disk`), and the ``gpu`` cases, which are left out where there is none, the way from and to a device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import dask

from benchmarks import overhead
from benchmarks.frame import Line, Subject, line_of_pairs
from benchmarks.gpu import pinned_rate, where_there_is_a_gpu
from benchmarks.spilling.bound import least_nbytes
from benchmarks.spilling.clusters import Limited, Run, beside_stock, with_room
from benchmarks.spilling.device import down_and_up
from benchmarks.spilling.disk import Rates, file_store
from benchmarks.spilling.recorder import record_on_cluster
from benchmarks.spilling.replay import Moved, replay_lru, replay_oracle, replay_ours
from benchmarks.spilling.trace import Trace
from benchmarks.spilling.workloads import JOBS, PASSES, PASSES_NBYTES, SPILLTEST_PASSES
from dask_gpurt.demo.cluster import Side, open_client, warm_up
from dask_gpurt.demo.runner import quotient

PERCENTS = (25, 50)

#: Blocks of 256 KB stand for the 64 MB that Dask recommends: what an operation costs beside its bytes is to count as there.
SCALE = 256
#: What Dask takes for the size of a chunk where it chooses one, as between the steps of a rechunk.
CHUNK_NBYTES = 128 * 2**20

#: A quick run has every third job, beside those that have cases of their own.
QUICK_STEP = 3


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
    with dask.config.set({"array.chunk-size": CHUNK_NBYTES // SCALE}):
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


def wall(*, quick: bool) -> Iterator[Line]:
    """Run the jobs that pass over their data with room for 25 % of it, and with room for all; quick: less data, once."""
    limited, pairs = Limited(scale=8 if quick else 32, part=0.25), 1 if quick else 3
    beside: dict[str, list[Line]] = {"stock": [], "in-memory": []}
    roomy = with_room(PASSES, limited, pairs)
    for name, ours, stock in beside_stock(PASSES, limited, pairs):
        for peer_name, peer in (("stock", stock), ("in-memory", roomy[name])):
            beside[peer_name].append(_line_of_walls(f"wall-25-{name}", ours, peer, peer_name))
            yield beside[peer_name][-1]
    for lines in beside.values():
        yield _mean("wall-25", lines)


def loop(*, quick: bool) -> Iterator[Line]:
    """Watch the event loops of the workers while they spill."""
    limited = Limited(scale=8 if quick else 64, part=0.25)
    for _, ours, stock in beside_stock(["spilltest"], limited, pairs=1 if quick else 3):
        ticks = [run.tick_s for run in ours], [run.tick_s for run in stock]
        yield line_of_pairs("loop", "longest_tick_s", *ticks, "stock")
        working = [run.working_tick_s for run in ours]
        # Python collects its garbage in any process; what the machine itself keeps from running, nobody can use.
        yield line_of_pairs("loop", "longest_working_tick_s", working, [run.working_tick_s for run in stock], "stock")
        yield line_of_pairs("loop", "longest_working_tick_s", working, [run.idle_tick_s for run in ours], "idle")


def _line_of_walls(case: str, ours: Sequence[Run], peer: Sequence[Run], peer_name: str) -> Line:
    return line_of_pairs(case, "wall_s", [run.wall_s for run in ours], [run.wall_s for run in peer], peer_name)


def idle(*, quick: bool) -> Iterator[Line]:
    """Run some of everything where all fits."""
    with open_client(overhead.SPEC) as client:
        warm_up(client)
        side = Side("memory", ("memory",))
        yield overhead.compare(client, "idle", side, overhead.small_workload, pairs=3 if quick else 7)


def disk(direction: int, case: str, *, quick: bool) -> Iterator[Line]:
    """Write and read files."""
    rates = _file_store(quick=quick)
    if rates is None:
        print(f"{case} is skipped: the file system of the workers' folders cannot go past its cache", flush=True)
    else:
        yield line_of_rates(case, rates[direction], "raw")


@functools.cache
def _file_store(*, quick: bool) -> tuple[Rates, Rates] | None:
    return file_store(2**28 if quick else 2**30, pairs=3 if quick else 9)


def gpu(direction: int, case: str, *, quick: bool) -> Iterator[Line]:
    """Move 4 GB from a device to the host, and back; quick: 1 GB."""
    yield line_of_rates(case, _down_and_up(quick=quick)[direction], "memcpy")


@functools.cache
def _down_and_up(*, quick: bool) -> tuple[Rates, Rates]:
    return down_and_up(2**30 if quick else 2**32, pairs=3 if quick else 9)


def gpu_array(*, quick: bool) -> Iterator[Line]:
    """Read an array of twice the device limit again and again, beside dask-cuda's own store.

    What has to move, whatever the store: once down, and in each pass up, what the devices have no room for.
    """
    limited = Limited(scale=64 if quick else 256, part=0.5, gpu=True)
    for _, ours, stock in beside_stock(["spilltest"], limited, pairs=1 if quick else 3):
        yield _line_of_walls("gpu-array", ours, stock, "dask-cuda")
        least_nbytes = (1 + SPILLTEST_PASSES) * (
            limited.scale * PASSES_NBYTES / limited.workers - limited.capacity_nbytes
        )
        roofs = [least_nbytes / pinned_rate() for _ in ours]
        yield line_of_pairs("gpu-array", "wall_s", [run.wall_s for run in ours], roofs, "pinned-copy")


def line_of_rates(case: str, rates: Rates, peer_name: str) -> Line:
    """Make a line of rates, of which more is better."""
    line = line_of_pairs(
        case, "gb_per_s", [1 / rate for rate in rates.ours], [1 / rate for rate in rates.raw], peer_name
    )
    return dataclasses.replace(line, ours=statistics.median(rates.ours) / 1e9, peer=statistics.median(rates.raw) / 1e9)


def _case(run: Callable[..., Iterator[Line]], *arguments: object) -> Callable[[bool], Iterator[Line]]:
    return lambda quick: run(*arguments, quick=quick)


CASES: Mapping[str, Callable[[bool], Iterator[Line]]] = (
    {f"bytes-{percent}": _case(bytes_moved, percent) for percent in PERCENTS}
    | {f"{name}-{percent}": _case(job_bytes, name, percent) for name in PASSES for percent in PERCENTS}
    | {f"stalls-{percent}": _case(stalls, percent) for percent in PERCENTS}
    | {"wall-25": _case(wall), "loop": _case(loop), "idle": _case(idle)}
    | {case: _case(disk, number, case) for number, case in enumerate(("disk-write", "disk-read"))}
    | {case: where_there_is_a_gpu(case, _case(gpu, number, case)) for number, case in enumerate(("gpu-down", "gpu-up"))}
    | {"gpu-array": where_there_is_a_gpu("gpu-array", _case(gpu_array), "dask_cuda")}
)

SUBJECT = Subject.of_cases("spill", "bytes moved and time lost when memory is short", CASES)
