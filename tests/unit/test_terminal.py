"""What commands say while they work: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from dask_gpurt.terminal import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_the_line_is_for_terminals_and_gone_at_the_end(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    shown.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", shown)
    with progress() as say:
        say("doing one thing")
        say("doing another")
    assert ("doing one thing" in shown.getvalue()) is terminal
    assert not terminal or shown.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize(
    "command",
    [["explain", "x"], ["report", "a.html"], ["bench"], ["doctor"]],
    ids=lambda command: command[0],
)
def test_whoever_waits_for_a_scheduler_is_told(command: list[str]) -> None:
    """On a terminal of its own, as a user has it; a scheduler that is not there is waited for."""
    ours, its = pty.openpty()
    address = "tcp://127.0.0.1:1"
    line = [sys.executable, "-m", "dask", "gpurt", *command, "--scheduler", address, "--timeout", "0.2"]
    with subprocess.Popen(line, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        said = b""
        try:
            while piece := os.read(ours, 4096):
                said += piece
        except OSError:  # Linux's way to say that nobody is at the other end any more
            pass
        finally:
            os.close(ours)
    assert process.returncode == 1
    waiting, error = f"Connecting to {address}".encode(), f"Error: no answer from {address}".encode()
    if command == ["doctor"]:
        error = f"Error: there is no scheduler at {address}".encode()
    assert 0 <= said.find(waiting) < said.find(error), said
