"""``python -m benchmarks load --minutes N [--seed S] [--fault-every S] [--stock] [--json FILE]``.

Several clients run random jobs on worker processes that may hold a quarter of what the jobs hold at their peak, while faults happen.
Now and then the jobs that are under way are waited for; all workers must be there again, and hold nothing; then the figures of
:mod:`benchmarks.soak.growth` are taken of the scheduler, of the workers that live, and of what they share.

Exit status 1 if an answer was wrong, a job hung or was given up, an error was not one that says that Dask gave up, or something
was left behind or grew. With ``--stock`` the same happens to stock Dask, with the same limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dask
import psutil
from distributed import Client, LocalCluster, WorkerPlugin

from benchmarks.frame import BrokenRunError
from benchmarks.load.desks import Desks, Ledger
from benchmarks.load.faults import Fault, Injector, plan
from benchmarks.soak.__main__ import BOUNDED
from benchmarks.soak.figures import books, file_nbytes, measure_process, measure_worker, written_nbytes
from benchmarks.soak.growth import ROUNDS_MIN, complaints
from benchmarks.soak.rounds import FULL, MEMORY_LIMIT_NBYTES, SETTLE_LIMIT_S, Load
from dask_gpurt import install
from dask_gpurt.demo import machine

__all__ = ["Report", "load", "main"]

WORKERS = 3
#: A job holds some 40 MB at its peak, so that three of them want four times what three workers of 10 MB may hold.
CLIENTS = 3

#: Errors by which Dask says that it gives a job up, stock Dask too: a task was on too many workers that died, a shuffle on workers that
#: came and went.
CLEAR = ("KilledWorker", "P2PConsistencyError")

#: An epoch is as long as that, or shorter, so that there are enough to see what grows.
EPOCH_S_MAX = 300.0
EPOCHS = 2 * ROUNDS_MIN

#: What Dask keeps in the folder where workers have theirs.
DASK_LOCKS = ("global.lock", "purge.lock")

#: Both sides. A worker that was killed again after long may be a nanny that the cluster is just giving up.
CONFIG = {
    **BOUNDED,
    "distributed.deploy.lost-worker-timeout": "1 hour",
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}


@dataclass
class Report:
    """What has happened."""

    ledger: Ledger = field(default_factory=Ledger)
    faults: Counter[str] = field(default_factory=Counter)
    #: By process, as they die; what a worker wrote between its last question and its death is not counted.
    written_nbytes: dict[str, int] = field(default_factory=dict)
    #: What was still there when nothing was wanted any more.
    left: list[str] = field(default_factory=list)
    #: Figures by process, after each epoch.
    epochs: list[dict[str, dict[str, float]]] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """Return how many outcomes were of this kind."""
        return sum(outcome.verdict == verdict for _, outcome in self.ledger.others)

    def errors(self) -> Counter[str]:
        """Return errors by kind."""
        return Counter(outcome.kind for _, outcome in self.ledger.others if outcome.verdict == "error")

    def objections(self) -> list[str]:
        """Say what is not as it should be."""
        found = [
            f"job {number}: {asdict(outcome)}" for number, outcome in self.ledger.others if _objectionable(outcome)
        ]
        found += [f"job {number} was given up" for number in self.ledger.given_up]
        return found + self.left + complaints(self.epochs)


def _objectionable(outcome: Any) -> bool:
    return outcome.verdict != "error" or not any(name in outcome.kind.split(" from ") for name in CLEAR)


def load(
    size: Load, minutes: float, seed: int, *, fault_every_s: float, stock: bool = False, clients: int = CLIENTS
) -> Report:
    """Run it, and say what has happened."""
    report = Report()
    target = size.host_limit_nbytes / MEMORY_LIMIT_NBYTES
    config = CONFIG | ({"distributed.worker.memory.target": target} if stock else {})
    with tempfile.TemporaryDirectory(prefix="gpurt-load-") as folder, dask.config.set(config):
        with (
            LocalCluster(
                n_workers=WORKERS,
                threads_per_worker=1,
                memory_limit=MEMORY_LIMIT_NBYTES,
                local_directory=folder,
                host="127.0.0.1",
                protocol="tcp",
                dashboard_address="127.0.0.1:0",
                silence_logs="CRITICAL",
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.wait_for_workers(WORKERS)
            client.register_plugin(_Quiet(), name="gpurt-load-quiet")
            if not stock:
                answer = install(client, config={"memory.host-limit": size.host_limit_nbytes})
                if not answer.installed("memory"):
                    raise BrokenRunError(str(answer))
            injector = Injector(cluster, client, WORKERS)
            schedule = _Schedule(plan(seed), fault_every_s)
            desks = Desks(
                cluster.scheduler_address,
                clients,
                seed,
                size,
                state=lambda: _state(client),
                progress=lambda: client.run_on_scheduler(_transitions),
            )
            report.ledger = desks.ledger
            try:
                for end in _epochs(minutes * 60):
                    with desks.at_work():
                        _let_happen(report, injector, client, schedule.until(end))
                    living = [worker.folder for worker in injector.whole()]
                    report.epochs.append(_settled(report, client, folder, living))
                    print(_line(report), flush=True)
            finally:
                desks.close()
        report.left += [f"file {path}" for path in _files(folder)]
    report.left += [f"process {child.pid} {child.name()}" for child in _descendants()]
    return report


class _Quiet(WorkerPlugin):
    """Each fault would fill pages of the workers' log."""

    def setup(self, worker: object) -> None:  # noqa: ARG002 - Dask's interface
        for name in ("distributed", "dask_gpurt"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _epochs(total_s: float) -> Iterator[float]:
    """Yield the end of each epoch; the jobs that are begun in it last longer, so that there may be fewer than were meant."""
    begun = time.monotonic()
    length_s = min(EPOCH_S_MAX, total_s / EPOCHS)
    numbers = itertools.count()
    while time.monotonic() - begun < total_s or next(numbers) < min(EPOCHS, ROUNDS_MIN):
        yield time.monotonic() + length_s


class _Schedule:
    """A fault every so many seconds, across epochs, as far as the one before is over."""

    def __init__(self, faults: Iterator[Fault], every_s: float) -> None:
        self._faults = faults
        self._every_s = every_s
        self._due = time.monotonic() + every_s

    def until(self, end: float) -> Iterator[Fault]:
        """Yield each when its time has come, until the end of the epoch."""
        while self._due < end:
            time.sleep(max(0.0, self._due - time.monotonic()))
            self._due = time.monotonic() + self._every_s
            yield next(self._faults)
        time.sleep(max(0.0, end - time.monotonic()))


def _let_happen(report: Report, injector: Injector, client: Client, faults: Iterator[Fault]) -> None:
    for fault in faults:
        begun = time.monotonic()
        _note_written(report, client)
        victim = injector.inject(fault)
        report.faults[fault.kind] += 1
        print(f"{fault.kind} of worker {victim}, {time.monotonic() - begun:.1f} s", flush=True)


def _note_written(report: Report, client: Client) -> None:
    found = client.run(_pid_and_written, on_error="ignore")
    report.written_nbytes.update(dict(found.values()))


def _pid_and_written(dask_worker: Any) -> tuple[str, int]:
    return f"worker {dask_worker.name}, process {os.getpid()}", written_nbytes(dask_worker)


def _pid_and_measures(dask_worker: Any) -> tuple[str, dict[str, float]]:
    return _pid_and_written(dask_worker)[0], measure_worker(dask_worker)


def _settled(report: Report, client: Client, folder: str, living: Sequence[str]) -> dict[str, dict[str, float]]:
    """Wait until nothing is held any more, and measure."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    while left := {address: held for address, held in client.run(books).items() if any(held.values())}:
        if time.monotonic() > deadline:
            report.left.append(f"after epoch {len(report.epochs)} nothing is wanted any more, and workers hold {left}")
            break
        time.sleep(0.05)
    _note_written(report, client)
    figures: dict[str, dict[str, float]] = dict(client.run(_pid_and_measures).values())
    return {**figures, "scheduler": measure_process(), "all": _measure_machine(folder, living)}


def _measure_machine(folder: str, living: Sequence[str]) -> dict[str, float]:
    # What the dead have left. Beside a worker's folder lies Dask's lock of it.
    files = [path for path in _files(folder) if not path.startswith(tuple(living))]
    children = _descendants()
    pids = {str(child.pid) for child in children}
    segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text(encoding="ascii").splitlines()[1:]]
    return {
        "files": len(files),
        "file_nbytes": sum(map(file_nbytes, files)),
        "processes": len(children),
        "segments": sum(segment[4] in pids for segment in segments),
    }


def _files(folder: str) -> list[str]:
    found = (os.path.join(where, name) for where, _, names in os.walk(folder) for name in names)
    return [path for path in found if os.path.basename(path) not in DASK_LOCKS]


def _descendants() -> list[psutil.Process]:
    # Python's own helper, of which there is one a process.
    return [
        child
        for child in psutil.Process().children(recursive=True)
        if child.is_running() and "resource_tracker" not in " ".join(child.cmdline())
    ]


def _state(client: Client) -> str:
    calls = client.call_stack()
    return str({"processing": client.processing(), "calls": {w: list(tasks) for w, tasks in calls.items()}})


def _transitions(dask_scheduler: Any) -> int:
    return int(dask_scheduler.transition_counter)


def _line(report: Report) -> str:
    rss = " ".join(
        f"{figures['rss_nbytes'] / 2**20:.0f}" for figures in report.epochs[-1].values() if "rss_nbytes" in figures
    )
    return (
        f"epoch {len(report.epochs) - 1}: {report.ledger.right} jobs right, {report.count('wrong')} wrong, "
        f"{report.count('hang')} hang, errors {dict(report.errors())}, {sum(report.faults.values())} faults, "
        f"{sum(report.written_nbytes.values()) / 1e9:.2f} GB spilled, MiB {rss}"
    )


def _summary(report: Report, objections: Sequence[str]) -> dict[str, Any]:
    return {
        "jobs_right": report.ledger.right,
        "jobs_retried": report.ledger.retried,
        "jobs_given_up": report.ledger.given_up,
        "longest_job_s": round(report.ledger.longest_s, 1),
        "answers_wrong": report.count("wrong"),
        "hangs": report.count("hang"),
        "errors": dict(report.errors()),
        "faults": dict(report.faults),
        "written_nbytes": sum(report.written_nbytes.values()),
        "left": report.left,
        "grown": complaints(report.epochs),
        "objections": list(objections),
        "epochs": report.epochs,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks load", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="for how long (10)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the jobs and the faults (the time)")
    parser.add_argument("--fault-every", type=float, default=30.0, metavar="S", help="seconds from fault to fault (30)")
    parser.add_argument("--stock", action="store_true", help="stock Dask, for comparison")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what has happened to FILE")
    options = parser.parse_args(arguments)
    side = "stock" if options.stock else "dask-gpurt"
    try:
        report = load(FULL, options.minutes, options.seed, fault_every_s=options.fault_every, stock=options.stock)
    except (BrokenRunError, TimeoutError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    objections = report.objections()
    if not any(report.written_nbytes.values()):
        objections.append("nothing was spilled: the jobs were not what they should be")
    summary = _summary(report, objections)
    if options.json is not None:
        content = {"side": side, "seed": options.seed, "minutes": options.minutes, "fault_every_s": options.fault_every}
        content |= machine.describe() | summary
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for objection in objections:
        print(objection, file=sys.stderr)
    print(
        f"load: {side}, seed {options.seed}: "
        + json.dumps({k: v for k, v in summary.items() if k not in ("epochs", "objections")})
    )
    return 1 if objections else 0


if __name__ == "__main__":
    sys.exit(main())
