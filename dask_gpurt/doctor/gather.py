"""Finds out what there is to know of this process and its machine.

Nothing is changed: what has to be tried (a file in the folder for spilled data, UCX, a process that reads from this one) is
taken back at once. No error escapes; a fact that cannot be had says why.

Covers: :func:`gather`, :func:`readable_by_others`.
Does not cover: devices (:mod:`dask_gpurt.doctor.devices`); how fast anything is (:mod:`dask_gpurt.doctor.links`).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil

import dask_gpurt
from dask_gpurt import installer, seams
from dask_gpurt.config import Settings
from dask_gpurt.demo import machine
from dask_gpurt.doctor import devices
from dask_gpurt.doctor.facts import Facts, Folder, Memory, Missing, Role, Ucx, attempt
from dask_gpurt.installation import PartStatus
from dask_gpurt.memory import manager
from dask_gpurt.memory.disk import takes_direct
from dask_gpurt.memory.rmm import RmmResource
from dask_gpurt.plugins.parts import Parts
from dask_gpurt.plugins.scheduler import NAME
from dask_gpurt.secret import Secret

__all__ = ["gather", "readable_by_others"]

#: What :func:`gather` looks for; where two are for different versions of CUDA, both.
DISTRIBUTIONS = (
    *("dask", "distributed", "numpy", "pandas", "pyarrow", "numba"),
    *("ucxx-cu13", "ucxx-cu12", "distributed-ucxx-cu13", "distributed-ucxx-cu12", "libucx-cu13", "libucx-cu12"),
    *("cuda-bindings", "cupy-cuda13x", "cupy-cuda12x", "rmm-cu13", "rmm-cu12", "dask-cuda"),
    *("cudf-cu13", "cudf-cu12", "dask-cudf-cu13", "dask-cudf-cu12", "kvikio-cu13", "kvikio-cu12", "nvidia-ml-py"),
)

#: Reads eight bytes of another process, as UCX reads all that goes from one process of a machine to another by CMA.
_PEEK = """
import ctypes, os, sys
class Part(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
here = ctypes.create_string_buffer(8)
mine, theirs = Part(ctypes.addressof(here), 8), Part(int(sys.argv[2]), 8)
libc = ctypes.CDLL(None, use_errno=True)
one, flags = ctypes.c_ulong(1), ctypes.c_ulong(0)
nbytes = libc.process_vm_readv(int(sys.argv[1]), ctypes.byref(mine), one, ctypes.byref(theirs), one, flags)
print(os.strerror(ctypes.get_errno()) if nbytes < 0 else here.raw.hex())
"""
_PEEK_LIMIT_S = 10.0

_SIDES: Mapping[Role, tuple[seams.Side, ...]] = {
    "machine": ("scheduler", "worker"),
    "scheduler": ("scheduler",),
    "worker": ("worker",),
}


def gather(role: Role, settings: Settings, server: Any = None) -> Facts:
    """Find out everything. Takes up to some seconds, and blocks; any thread may do it.

    Parameters
    ----------
    role
        What this process is.
    settings
        What would be installed.
    server
        The scheduler or worker that runs in this process.
    """
    installed, parts = _parts(role, settings, server)
    cuda = attempt(devices.look)
    # Before UCX, which imports RMM whether anybody uses it or not.
    rmm = attempt(_rmm)
    encrypted = role == "worker" and seams.worker_encrypts(server)
    idle = role == "scheduler" or encrypted or not settings.shuffle.enabled or settings.shuffle.transport == "dask"
    ucx = Missing("it is not used") if idle else attempt(_ucx)
    return Facts(
        role=role,
        host=socket.gethostname(),
        python=platform.python_version(),
        versions=machine.versions(DISTRIBUTIONS) | {"dask-gpurt": dask_gpurt.__version__},
        installed=installed,
        parts=parts,
        memory_limit_nbytes=seams.worker_memory_limit(server) if role == "worker" else None,
        cpus=frozenset(os.sched_getaffinity(0)),
        memory=attempt(_memory),
        open_files=attempt(lambda: resource.getrlimit(resource.RLIMIT_NOFILE)),
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        device_files=any(Path("/dev").glob("nvidia[0-9]*")),
        driver_cuda=attempt(devices.driver_cuda),
        cuda=cuda,
        # KvikIO loads much, which is of no use without a device.
        storage=Missing("there is no device") if isinstance(cuda, Missing) else attempt(devices.storage),
        rmm=rmm,
        rdma=tuple(sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))),
        ucx=ucx,
        encrypted=encrypted,
        # After UCX, which asks the system to allow it.
        readable_by_others=attempt(readable_by_others),
        folder=attempt(partial(_folder, _folder_path(role, settings, server))),
        object_store=_object_store(role, settings),
    )


def _parts(role: Role, settings: Settings, server: Any) -> tuple[bool, dict[str, PartStatus]]:
    """Say whether dask-gpurt runs in this process, and the status of its parts, as it is or would be."""
    runtime: Any = None
    if role != "machine":
        runtime = server.plugins.get(NAME) if role == "scheduler" else server.extensions.get(NAME)
    if runtime is not None:
        return True, dict(runtime.parts)
    found: dict[str, PartStatus] = {}
    for side in _SIDES[role]:
        parts = Parts(side, server, settings)
        for part in ("memory", "shuffle", "placement") if side == "scheduler" else ("memory", "shuffle"):
            reason = attempt(partial(parts.refusal, part))
            if reason is None and part == "memory" and role == "worker":
                reason = attempt(lambda: manager.refusal(seams.worker_store(server)))
            text = reason.reason if isinstance(reason, Missing) else reason
            if part not in found or found[part].installed:
                found[part] = PartStatus(text is None, text or "")
    return False, found


def _memory() -> Memory:
    from distributed.system import MEMORY_LIMIT

    lockable = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Memory(
        total_nbytes=psutil.virtual_memory().total,
        limit_nbytes=int(MEMORY_LIMIT),
        lockable_nbytes=None if lockable == resource.RLIM_INFINITY else lockable,
        huge_pages=attempt(_huge_pages),
    )


def _huge_pages() -> str:
    text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    found = re.search(r"\[(\w+)\]", text)
    if found is None:
        raise ValueError(f"{text!r} names none")
    return found[1]


def _ucx() -> Ucx:
    if importlib.util.find_spec("ucxx") is None:
        raise ModuleNotFoundError("ucxx is not installed")
    from dask_gpurt.shuffle.transport.engine import Engine

    engine = Engine(Secret.new())
    try:
        found = engine.describe()
    finally:
        engine.close()
    names = ("UCX_TLS", "UCX_NET_DEVICES")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    return Ucx(version=found["version"], resources=tuple(found["resources"]), environment=environment)


def readable_by_others() -> bool:
    """Whether another process of this user may read the memory of this one. Starts one to find out."""
    here = np.frombuffer(os.urandom(8), np.uint8)
    argv = [sys.executable, "-I", "-S", "-c", _PEEK, str(os.getpid()), str(here.__array_interface__["data"][0])]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=_PEEK_LIMIT_S).stdout.strip()  # noqa: S603
    if said == here.tobytes().hex():
        return True
    if said == os.strerror(1):  # EPERM
        return False
    raise OSError(said)


def _rmm() -> str:
    if not RmmResource.in_use():
        raise LookupError("nothing in this process has imported RMM")
    resource_: Any = importlib.import_module("rmm.mr").get_current_device_resource()
    names = []
    while resource_ is not None:
        names.append(type(resource_).__name__)
        resource_ = getattr(resource_, "upstream_mr", None)
    return " over ".join(names)


def _folder_path(role: Role, settings: Settings, server: Any) -> str:
    if settings.memory.directory is not None:
        return settings.memory.directory
    if role == "worker":
        # What all workers of a machine have in common.
        return os.path.dirname(str(server.local_directory))
    return str(dask.config.get("temporary-directory", None) or tempfile.gettempdir())


def _folder(path: str) -> Folder:
    there = path
    while not os.path.isdir(there):
        # It will be made.
        there = os.path.dirname(os.path.abspath(there))
    direct: bool | Missing
    try:
        with tempfile.TemporaryDirectory(prefix="gpurt-doctor-", dir=there) as inside:
            refusal, direct = None, attempt(partial(takes_direct, inside))
    except OSError as error:
        refusal, direct = str(error), Missing("nothing can be written there")
    return Folder(
        path=path,
        refusal=refusal,
        file_system=attempt(partial(_file_system, there)),
        direct=direct,
        free_nbytes=attempt(lambda: shutil.disk_usage(there).free),
    )


def _file_system(path: str) -> str:
    real = os.path.realpath(path)
    mounted: dict[str, str] = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    # Of several that were mounted at one place, the last is seen.
    within = [point for point in mounted if os.path.commonpath([point, real]) == point]
    return mounted[max(within, key=len)]


def _object_store(role: Role, settings: Settings) -> Missing | None:
    url = settings.memory.object_url
    if url is None or role == "scheduler":
        return None
    reason = attempt(lambda: installer.object_store_refusal(url))
    if reason is None or isinstance(reason, Missing):
        return reason
    return Missing(reason)
