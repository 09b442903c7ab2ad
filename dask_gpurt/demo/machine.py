"""What a figure was measured on: the machine, the versions, the command."""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from typing import Any

import psutil

from dask_gpurt.doctor import devices
from dask_gpurt.doctor.facts import plain
from dask_gpurt.memory.cuda import CudaError

__all__ = ["describe", "versions"]

#: Distributions whose version goes into a report.
DISTRIBUTIONS = (
    *("dask-gpurt", "dask", "distributed", "numpy", "pandas", "pyarrow", "duckdb", "tpchgen-cli"),
    # Where there is a GPU; of those for two versions of CUDA, the ones that are installed.
    *(f"{name}-cu{number}" for number in (13, 12) for name in ("ucxx", "rmm", "cudf", "dask-cudf", "kvikio")),
    *("cupy-cuda13x", "cupy-cuda12x", "dask-cuda", "cuda-bindings", "numba", "numba-cuda"),
)


def describe() -> dict[str, Any]:
    """Return machine, versions and command as plain data for JSON.

    Examples
    --------
    >>> sorted(describe())
    ['command', 'machine', 'time', 'versions']
    """
    return {
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_nbytes": psutil.virtual_memory().total,
            **_gpus(),
        },
        "versions": {"python": platform.python_version(), **versions(DISTRIBUTIONS)},
    }


def _gpus() -> dict[str, Any]:
    """Say what the driver shows; nothing where there is none."""
    try:
        cuda = devices.look()
    except (OSError, ImportError, CudaError):
        return {}
    shown = [{"name": device.name, "memory_nbytes": device.total_nbytes} for device in cuda.devices]
    return {"gpus": shown, "driver": plain(cuda.driver), "driver_cuda": ".".join(map(str, devices.driver_cuda()))}


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of those of these distributions that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except FileNotFoundError:
        pass
    return platform.processor()


def command(argv: list[str]) -> str:
    """Write a command line as one would type it.

    Examples
    --------
    >>> command(["/somewhere/benchmarks/__main__.py", "demo", "--quick"])
    'python -m benchmarks demo --quick'
    >>> command(["/somewhere/bin/dask", "gpurt", "demo"])
    'dask gpurt demo'
    """
    folder, name = os.path.split(argv[0])
    program = ["python", "-m", os.path.basename(folder)] if name == "__main__.py" else [name]
    return shlex.join([*program, *argv[1:]])
