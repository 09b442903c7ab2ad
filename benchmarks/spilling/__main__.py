"""For work on the policy: ``python -m benchmarks.spilling FILE [JOB …]`` records once, and replays as often as you like.

The traces are kept in FILE; where it is there, nothing is recorded. A line a job and capacity: megabytes of the bound, and
what stock's store, ours, and ours with an oracle for a horizon move as multiples of it, with the values that were waited
for.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.spill import PERCENTS, replayed_traces, traces
from benchmarks.spilling.trace import Trace
from dask_gpurt.demo.runner import quotient


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spilling", description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="only these")
    options = parser.parse_args()
    if not options.file.exists():
        options.file.write_bytes(pickle.dumps(dict(traces(quick=False))))
    recorded: dict[str, Sequence[Trace]] = pickle.loads(options.file.read_bytes())  # noqa: S301 - written by ourselves
    chosen = {name: recorded[name] for name in options.jobs or recorded}
    for percent in PERCENTS:
        print(f"{percent} % of the peak{'lpmin MB':>16}  {'lru':>6}{'ours':>6}{'oracle':>7}   waits: lru, ours, oracle")
        ratios = []
        started = time.process_time()
        for name, of_job in chosen.items():
            found = replayed_traces(of_job, percent)
            stores = (found.lru, found.ours, found.oracle)
            ratios.append([quotient(moved.nbytes, found.least_nbytes) for moved in stores])
            row = "".join(f"{ratio:7.2f}" for ratio in ratios[-1])
            waits = ", ".join(str(moved.waits) for moved in stores)
            print(f"{name:<20}{found.least_nbytes / 1e6:>12.0f} {row}   {waits}")
        means = "".join(f"{statistics.geometric_mean(column):7.2f}" for column in zip(*ratios, strict=True))
        print(f"{'geometric mean':<20}{'':>12} {means}   ({time.process_time() - started:.1f} s)\n")


if __name__ == "__main__":
    main()
