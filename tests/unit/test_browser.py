"""Tests that want a browser: where there is none they are skipped aloud, and where CI is set they fail."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("ci", "status", "said"),
    [
        ("", 0, "1 of the dashboard and of reports in a browser: there is no Chromium"),
        ("false", 0, "1 of the dashboard and of reports in a browser: there is no Chromium"),
        ("true", 1, "where CI is set, that is no reason to skip"),
    ],
)
def test_without_a_browser(ci: str, status: int, said: str, tmp_path: pathlib.Path) -> None:
    # A folder without programs.
    environment = {**os.environ, "CI": ci, "PATH": str(tmp_path)}
    which = "tests/cluster/test_dashboard.py::test_an_open_page_stands_still_after_an_uninstall"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout
