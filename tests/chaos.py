"""Faults on real processes, all cases, module by module, each for so long at most: ``python tests/chaos.py [--minutes N] [MODULE ...]``.

``make chaos`` runs it. At the end it prints a line a module: how many tests there are, passed, failed, were skipped and, for lack of time,
not run; with ``--json FILE`` it writes the same. The exit status is 1 if a test failed. With ``--stock`` it runs the modules that can do
their faults to Dask without dask-gpurt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

__all__ = ["main"]

#: Those that can do it to stock Dask, too.
STOCK = ("test_machine_faults", "test_network_faults", "test_shuffle_scale", "test_shuffle_kill")
MODULES = (
    *STOCK,
    "test_memory_faults",
    "test_shuffle_loss",
    "test_transport_faults",
    "test_hygiene",
)

FOLDER = Path(__file__).parent / "cluster"


def run(module: str, limit_s: float, options: Sequence[str]) -> dict[str, float]:
    """Run a module; say what came of its tests."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "exhaustive or not exhaustive", *options]
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command += [f"--session-timeout={limit_s:g}", f"--junitxml={report}", str(FOLDER / f"{module}.py")]
        listed = subprocess.run([*command, "--collect-only", "--quiet"], capture_output=True, text=True, check=True)
        count = sum("::" in line for line in listed.stdout.splitlines())
        status = subprocess.run(command, check=False).returncode
        suite = next(ET.parse(report).iter("testsuite")) if report.exists() else None
    figures = {
        what: int(suite.attrib[what]) if suite is not None else 0 for what in ("tests", "failures", "errors", "skipped")
    }
    failed = figures["failures"] + figures["errors"]
    return {
        "tests": count,
        "passed": figures["tests"] - failed - figures["skipped"],
        "failed": failed if suite is not None else count,
        "skipped": figures["skipped"],
        "not_run": count - figures["tests"],
        "elapsed_s": round(time.monotonic() - begun),
        "status": status,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python tests/chaos.py", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as test_shuffle_kill (all)")
    parser.add_argument("--minutes", type=float, default=20.0, metavar="N", help="a module takes at most (20)")
    parser.add_argument("--stock", action="store_true", help="the modules that can do it, on stock Dask")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it to FILE")
    options = parser.parse_args(arguments)
    modules = options.modules or (STOCK if options.stock else MODULES)
    found: dict[str, dict[str, float]] = {}
    for module in modules:
        found[module] = run(module, options.minutes * 60, ["--stock"] if options.stock else [])
        if options.json is not None:
            options.json.write_text(
                json.dumps({"stock": options.stock, "modules": found}, indent=1) + "\n", encoding="utf-8"
            )
    lines = ["module", *found]
    columns = ["tests", "passed", "failed", "skipped", "not_run", "elapsed_s"]
    width = max(map(len, lines))
    sys.stdout.write(f"{'module':<{width}} " + " ".join(f"{column:>9}" for column in columns) + "\n")
    for module, figures in found.items():
        sys.stdout.write(f"{module:<{width}} " + " ".join(f"{figures[column]:>9g}" for column in columns) + "\n")
    return int(any(figures["failed"] for figures in found.values()))


if __name__ == "__main__":
    sys.exit(main())
