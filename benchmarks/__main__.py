"""``python -m benchmarks NAME [--quick] [--json FILE]``.

The exit status is 0 if all that was asked for has run, 1 for a wrong answer or a run that broke, 2 for a wrong command line, and
:data:`NOTHING_RUN` if there was nothing that could be run, for lack of a GPU, say: no file is written then.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import benchmarks
from benchmarks.frame import BrokenRunError, Subject, WrongAnswerError, run_subject

#: Exit status where nothing was run: what test runners (automake, meson) take for "skipped".
NOTHING_RUN = 77

#: Modules of this folder that are no subjects.
FRAME = (
    "__main__",
    "contest",
    "frame",
    "gpu",
    "load",
    "simulation",
    "soak",
    "spilling",
    "tables",
    "tpch_large",
    "tpch_queries",
    "world",
)


def subjects() -> dict[str, Subject]:
    """Return all subjects by name: each module of this folder has one, under the name ``SUBJECT``."""
    found = {}
    for module in pkgutil.iter_modules(benchmarks.__path__):
        if module.name not in FRAME:
            subject = importlib.import_module(f"benchmarks.{module.name}").SUBJECT
            found[subject.name] = subject
    return found


#: Names that are commands of their own, with options of their own, and what they are for.
COMMANDS = {
    "load": "the same of several clients, with a fault every half a minute; also on stock Dask (--minutes N --stock)",
    "soak": "random jobs with little memory: right answers, and nothing that grows (--minutes N)",
}


def main(arguments: Sequence[str] | None = None, known: dict[str, Subject] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        command: Callable[[Sequence[str]], int] = importlib.import_module(f"benchmarks.{arguments[0]}.__main__").main
        return command(arguments[1:])
    known = subjects() if known is None else known
    titles = {name: subject.title for name, subject in known.items()} | COMMANDS
    listed = "\n".join(f"  {name:<16}{title}" for name, title in sorted(titles.items()))
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure dask-gpurt beside its peers.",
        epilog=f"subjects:\n{listed}\n\nThe exit status is {NOTHING_RUN} where nothing could be run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="the subject")
    parser.add_argument("--quick", action="store_true", help="fewer runs: two minutes on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, machine and versions to FILE")
    parser.add_argument(
        "--case",
        action="append",
        metavar="CASE",
        help="only this case; can be given several times; not all subjects can",
    )
    parser.add_argument("--scale", type=float, metavar="N", help="size of the data, where a subject has one to choose")
    options = parser.parse_args(arguments)
    if options.name not in known:
        parser.print_usage(sys.stderr)
        print(f"there is no subject {options.name!r}; there are:\n{listed}", file=sys.stderr)
        return 2
    subject = known[options.name]
    if options.scale is not None:
        if subject.scaled is None or options.scale <= 0:
            print(f"{subject.name} can't be run at scale {options.scale:g}", file=sys.stderr)
            return 2
        subject = subject.scaled(options.scale)
    if options.case:
        if missing := [case for case in options.case if case not in subject.cases]:
            there = f"there are {', '.join(subject.cases)}" if subject.cases else "it runs as a whole"
            print(f"{subject.name} has no case {missing[0]!r} to run alone; {there}", file=sys.stderr)
            return 2
        subject = subject.only(options.case)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        print(f"there is no folder to write {options.json} to", file=sys.stderr)
        return 2
    try:
        lines = run_subject(
            subject,
            quick=options.quick,
            json_path=options.json,
            say=lambda text: print(text, flush=True),
        )
    except WrongAnswerError as error:
        print(f"wrong answer: {error}", file=sys.stderr)
        return 1
    except BrokenRunError as error:
        print(f"broken run: {error}", file=sys.stderr)
        return 1
    return 0 if lines else NOTHING_RUN


if __name__ == "__main__":
    sys.exit(main())
