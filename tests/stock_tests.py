"""distributed's own tests, on stock Dask and with dask-gpurt on every scheduler: ``python tests/stock_tests.py CHECKOUT [FILE ...]``.

CHECKOUT is a working copy of distributed, of any version near the installed one, from which only the tests are taken; what they test is the
installed distributed. A FILE is named as in the checkout, or by its name alone: ``test_steal.py``, ``shuffle/tests/test_merge.py``; without any,
it is all of :data:`FILES`. Each file runs on stock, then with dask-gpurt. What only passes on stock runs ``--again`` so many times by itself on
both, so that what fails now and then is told from what always does.

What is changed of the tests: the names by which they refer to each other; warnings are not errors, as those of the libraries of the day are none
of theirs; ``dask.persist`` takes an asynchronous client; see :mod:`stock_witness`.

The exit status is 1 if a test passes on stock alone, each time that it was run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stock_witness import OUTCOMES

__all__ = ["FILES", "Outcome", "Result", "main"]

#: What placement, memory and shuffle are in the way of, in the order in which it is run.
FILES = (
    *(
        f"distributed/tests/test_{name}.py"
        for name in (
            "scheduler",
            "steal",
            "client",
            "priorities",
            "reschedule",
            "resources",
            "failed_workers",
            "stress",
            "active_memory_manager",
            "actor",
            "cancelled_state",
            "worker_client",
            "client_executor",
            "as_completed",
            "queues",
            "variable",
            "publish",
            "nanny",
            "worker",
            "worker_state_machine",
            "events",
            "locks",
            "semaphore",
            "spans",
            "collections",
            "dask_collections",
        )
    ),
    *(
        f"distributed/shuffle/tests/test_{name}.py"
        for name in (
            "shuffle",
            "rechunk",
            "merge",
            "merge_column_and_index",
            "graph",
            "shuffle_plugins",
            "metrics",
        )
    ),
)

#: Folder of a checkout to the one that its tests are copied to, and to what their names begin with there. Only those of the shuffle are a package.
PLACES = {"distributed/tests": ("cluster_tests", ""), "distributed/shuffle/tests": ("shuffle_tests", "shuffle_tests.")}

SIDES = {"stock": {}, "dask-gpurt": {"DASK_DISTRIBUTED__SCHEDULER__PRELOAD": "dask_gpurt"}}

#: A test that takes longer has failed; those of distributed give up after 30 s by themselves, mostly.
LIMIT_S = 120
#: A process of tests that ends early, or has to be ended, is followed by one for the rest, so many times.
PROCESSES_MAX = 10


@dataclass(frozen=True)
class Outcome:
    """What came of one test."""

    #: "passed", "failed", "skipped", or "died" if the process of the tests ended with it.
    outcome: str = "died"
    #: The error of one that has failed.
    why: str = ""
    #: Schedulers that were started in the process of the test.
    schedulers: int = 0
    #: Those of them that ran all parts of dask-gpurt.
    gpurt_schedulers: int = 0
    #: Workers that told such a scheduler that they run all parts.
    gpurt_workers: int = 0
    #: Workers that told it that they do not.
    partly_stock_workers: int = 0

    @property
    def passed(self) -> bool:
        """Whether it has passed."""
        return self.outcome == "passed"


@dataclass
class Result:
    """What came of the tests of one file.

    Attributes
    ----------
    sides
        Name of the side to test to outcome.
    again
        Test that passed on stock alone to, by side, how many times it passed of those that it was run again.
    """

    sides: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    again: dict[str, dict[str, int]] = field(default_factory=dict)

    def passes(self, side: str) -> int:
        """Count the tests that pass on ``side``."""
        return sum(outcome.passed for outcome in self.sides[side].values())

    @property
    def tests(self) -> int:
        """Count those that were run: what is skipped on both sides is none."""
        run = {test for tests in self.sides.values() for test, found in tests.items() if found.outcome != "skipped"}
        return len(run)

    @property
    def seen(self) -> int:
        """Count the tests with dask-gpurt on a scheduler that the witness saw."""
        return sum(outcome.gpurt_schedulers > 0 for outcome in self.sides["dask-gpurt"].values())

    def only(self, side: str) -> list[str]:
        """List the tests that pass on ``side`` and not on the other one."""
        other = next(name for name in SIDES if name != side)
        others = self.sides[other]
        return [
            test for test, found in self.sides[side].items() if found.passed and not others.get(test, Outcome()).passed
        ]


def copied(checkout: Path, folder: Path) -> None:
    """Copy the tests of ``checkout`` to ``folder``, where nothing else of distributed lies beside them, so that the installed one is imported."""
    for source, (target, prefix) in PLACES.items():
        shutil.copytree(checkout / source, folder / target)
        for path in (folder / target).glob("*.py"):
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(source.replace("/", ".") + ".", prefix), encoding="utf-8")
    # Of the settings in pyproject.toml, only how the tests are run is of use here: by this module.
    shutil.copy(checkout / "conftest.py", folder)
    shutil.copy(Path(__file__).with_name("stock_witness.py"), folder)
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")


def place(file: str) -> str:
    """Say where ``file`` of the checkout lies among the copied.

    >>> place("test_steal.py"), place("shuffle/tests/test_merge.py")
    ('cluster_tests/test_steal.py', 'shuffle_tests/test_merge.py')
    """
    path = Path(file)
    return f"{'shuffle_tests' if 'shuffle' in path.parts else 'cluster_tests'}/{path.name}"


def run(folder: Path, side: str, tests: Sequence[str], options: Sequence[str]) -> dict[str, Outcome]:
    """Run ``tests``, files or single ones, on ``side``."""
    root = Path(__file__).parent.parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "stock_witness",
        "-p",
        "no:cacheprovider",
        "--quiet",
        "--disable-warnings",
    ]
    command += [f"--timeout={LIMIT_S}", "--timeout-method=signal", "--tb=short", *options, *tests]
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = Path(scratch) / "outcomes"
        environment = {
            **os.environ,
            **SIDES[side],
            OUTCOMES: str(outcomes),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        }
        for _ in range(PROCESSES_MAX):
            # 0: all passed, 1: some failed, 5: there was nothing left to run.
            if subprocess.run(command, check=False, cwd=folder, env=environment).returncode in (0, 1, 5):
                break
        return outcomes_of(outcomes.read_text(encoding="utf-8") if outcomes.exists() else "")


def outcomes_of(text: str) -> dict[str, Outcome]:
    """Read what the witness has written.

    >>> outcomes_of('{"test": "a", "event": "begun"}')["a"].outcome
    'died'
    """
    found: dict[str, Outcome] = {}
    for line in text.splitlines():
        fields = json.loads(line)
        test, event = fields.pop("test"), fields.pop("event")
        found[test] = Outcome(**fields) if event == "ended" else Outcome()
    return found


def compare(folder: Path, file: str, options: Sequence[str], again: int) -> Result:
    """Run ``file`` on both sides, and what passes on stock alone once more."""
    result = Result({side: run(folder, side, [file], options) for side in SIDES})
    for test in result.only("stock"):
        passed = dict.fromkeys(SIDES, 0)
        for _ in range(again):
            for side in SIDES:
                passed[side] += run(folder, side, [test], options).get(test, Outcome()).passed
        result.again[test] = passed
    return result


def table(results: Mapping[str, Result]) -> str:
    """Show ``results`` as Markdown."""
    lines = ["| file | tests | stock passes | dask-gpurt passes | with dask-gpurt seen |", "|---|---|---|---|---|"]
    lines += [
        f"| `{file}` | {found.tests} | {found.passes('stock')} | {found.passes('dask-gpurt')} | {found.seen} |"
        for file, found in results.items()
    ]
    for file, found in results.items():
        lines += [f"\nOnly on stock, `{file}`:\n"] if found.only("stock") else []
        for test in found.only("stock"):
            passed = found.again.get(test, {})
            lines.append(
                f"- `{test.partition('::')[2]}`: again, " + ", ".join(f"{side} {n}" for side, n in passed.items())
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python tests/stock_tests.py", description=__doc__)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="a working copy of distributed")
    parser.add_argument("files", nargs="*", metavar="FILE", help="such as test_steal.py (all that are of interest)")
    parser.add_argument("--again", type=int, default=3, metavar="N", help="runs of what only passes on stock (3)")
    parser.add_argument("--slow", action="store_true", help="tests that are marked as slow, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of each test to FILE")
    options = parser.parse_args(arguments)
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copied(options.checkout, folder)
        for file in options.files or FILES:
            slow = ["--runslow"] if options.slow else []
            results[file] = compare(folder, place(file), slow, options.again)
            # After each file: it may take hours, and be ended before.
            if options.json is not None:
                found = {file: asdict(result) for file, result in results.items()}
                options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write("\n" + table({file: results[file]}) + "\n")
            sys.stdout.flush()
    sys.stdout.write("\n" + table(results))
    return int(any(not passed["dask-gpurt"] for found in results.values() for passed in found.again.values()))


if __name__ == "__main__":
    sys.exit(main())
