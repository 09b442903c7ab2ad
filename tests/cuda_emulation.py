"""Tests on the emulated CUDA driver (tests/emulated_cuda): builds it, and runs a test with it.

Whether a process has a driver is settled when it first looks for one. So a test that is marked by :func:`emulated` runs in a
process of its own, a pytest with the driver on its library path, which its children inherit.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

__all__ = ["build", "counted", "emulated", "set_driver"]

SOURCES = Path(__file__).parent / "emulated_cuda"
LIBRARIES = {
    "libcuda.so.1": ["settings", "device", "memory", "stream", "copy", "entry", "absent"],
    "libnvidia-ml.so.1": ["nvml"],
}
#: UCX puts its own code at the beginning of functions, which an optimizer would not leave room for.
FLAGS = [
    "-std=gnu11",
    "-O0",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
]
if os.uname().machine == "x86_64":
    FLAGS.append("-fcf-protection=none")

_INSIDE = "EMULATED_CUDA_TEST"


def build(folder: Path) -> None:
    """Make the libraries in ``folder``."""
    for library, names in LIBRARIES.items():
        files = [str(SOURCES / f"{name}.c") for name in names]
        subprocess.run(["cc", *FLAGS, f"-Wl,-soname,{library}", "-o", folder / library, *files], check=True)


def emulated(timeout_s: float = 110, **settings: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test with the emulated driver and these settings: ``capacity=2**20`` is EMULATED_CUDA_CAPACITY; others are
    environment variables."""

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        if os.environ.get(_INSIDE):
            return test

        @functools.wraps(test)
        def outside(request: pytest.FixtureRequest, emulated_cuda: Path, **_: Any) -> None:
            environment = os.environ | {
                _INSIDE: "1",
                "LD_LIBRARY_PATH": os.pathsep.join(
                    filter(None, [str(emulated_cuda), os.environ.get("LD_LIBRARY_PATH")])
                ),
                "PYTHONPATH": os.pathsep.join(filter(None, [str(SOURCES / "site"), os.environ.get("PYTHONPATH")])),
            }
            for name, value in settings.items():
                environment[f"EMULATED_CUDA_{name.upper()}" if name.islower() else name] = str(value)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
            ended = subprocess.run(
                command,
                check=False,
                env=environment,
                cwd=request.config.rootpath,
                capture_output=True,
                text=True,
                timeout=timeout_s,
            )
            assert ended.returncode == 0, f"{ended.stdout[-8000:]}\n{ended.stderr[-4000:]}"
            assert "1 passed" in ended.stdout, ended.stdout[-2000:]

        # Its own fixtures are for the process inside.
        del outside.__wrapped__
        return outside

    return mark


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def set_driver(**settings: int) -> None:
    """Change settings of this process's driver."""
    for name, value in settings.items():
        assert _driver().emulated_set(name.encode(), ctypes.c_long(value)), name


def counted(name: str) -> int:
    """What this process's driver has counted."""
    get = _driver().emulated_get
    get.restype = ctypes.c_long
    return int(get(name.encode()))
