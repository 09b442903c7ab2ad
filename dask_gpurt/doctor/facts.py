"""What is known of one process and its machine: plain data that travels, and is judged elsewhere.

A fact that cannot be had is a :class:`Missing` with the reason. Nothing here is a judgement.

Covers: :class:`Facts` and what they are made of, :class:`Measure`.
Does not cover: finding them out (:mod:`dask_gpurt.doctor.gather`); what they mean (:mod:`dask_gpurt.doctor.checks`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from dask_gpurt.installation import PartStatus
from dask_gpurt.topology import Place, Rate

__all__ = [
    "Cuda",
    "DeviceFacts",
    "Facts",
    "Folder",
    "Measure",
    "Memory",
    "Missing",
    "Role",
    "Storage",
    "Ucx",
    "attempt",
    "plain",
]

T = TypeVar("T")

Role = Literal["machine", "scheduler", "worker"]


@dataclass(frozen=True)
class Missing:
    """A fact that cannot be had, and why."""

    reason: str
    #: The kind of error that said so; empty if it was none.
    cause: str = ""


def attempt(get: Callable[[], T]) -> T | Missing:
    """Call ``get``; what it raises is why there is no answer.

    Examples
    --------
    >>> attempt(lambda: 1), attempt(lambda: 1 // 0)
    (1, Missing(reason='integer division or modulo by zero', cause='ZeroDivisionError'))
    """
    try:
        return get()
    except Exception as error:  # noqa: BLE001  whatever it is, it is told: one fact must not cost all others
        return Missing(str(error) or type(error).__name__, type(error).__name__)


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One device that the process sees."""

    name: str
    total_nbytes: int
    #: Major and minor number.
    capability: tuple[int, int]
    #: As in ``/sys/bus/pci/devices``.
    bus_id: str
    #: NVLink connections that are up.
    nvlinks: int | Missing
    #: Lanes of PCIe in use, and those that device and slot have.
    pcie_lanes: tuple[int, int] | Missing
    numa_node: int | Missing
    #: Processors near it.
    near_cpus: frozenset[int] | Missing
    #: Ordinals of the devices whose memory it can reach by itself.
    peers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cuda:
    """The driver and what it shows."""

    #: NVIDIA's version of it.
    driver: str | Missing
    devices: tuple[DeviceFacts, ...]


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Files that a device reads by itself (GPUDirect Storage), by KvikIO."""

    #: Whether KvikIO reads and writes as any other program does.
    compatible_only: bool
    #: Whether cuFile says that it is there; None where it was not asked.
    usable: bool | Missing | None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of the host."""

    total_nbytes: int
    #: What a control group leaves of it, or all.
    limit_nbytes: int
    #: Limit of memory that a process may lock; None: there is none.
    lockable_nbytes: int | None
    #: What the kernel does about huge pages: always, madvise or never.
    huge_pages: str | Missing


@dataclass(frozen=True, kw_only=True)
class Ucx:
    """UCX, as it starts here."""

    version: str
    #: Transports and the devices that they use: ``tcp/eth0``.
    resources: tuple[str, ...]
    #: UCX_TLS and UCX_NET_DEVICES, as far as they are set.
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where spilled data goes."""

    path: str
    #: Why nothing can be written there; None: it can.
    refusal: str | None
    file_system: str | Missing
    #: Whether files go past the page cache (O_DIRECT).
    direct: bool | Missing
    free_nbytes: int | Missing


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of one process."""

    role: Role
    host: str
    python: str
    #: Distributions that are installed, of those that matter.
    versions: Mapping[str, str]
    #: Whether dask-gpurt runs here: the parts are what is, and not what would be.
    installed: bool
    parts: Mapping[str, PartStatus]
    #: What the process was given as its limit of memory; None: none, or none was asked for.
    memory_limit_nbytes: int | None
    #: Processors that the process may use.
    cpus: frozenset[int]
    memory: Memory | Missing
    #: Files that a process may have open, and what it may raise that to.
    open_files: tuple[int, int] | Missing
    #: CUDA_VISIBLE_DEVICES.
    visible_devices: str | None
    #: Whether the system has device files of NVIDIA's.
    device_files: bool
    #: The CUDA that the driver is for: major and minor number.
    driver_cuda: tuple[int, int] | Missing
    cuda: Cuda | Missing
    storage: Storage | Missing
    #: The resource that RMM allocates by in this process.
    rmm: str | Missing
    #: Devices for RDMA.
    rdma: tuple[str, ...]
    ucx: Ucx | Missing
    #: Whether Dask's comms are encrypted.
    encrypted: bool
    #: Whether another process of this user may read this one's memory, as UCX does between processes of a machine.
    readable_by_others: bool | Missing
    folder: Folder | Missing
    #: Why nothing can be written below ``gpurt.memory.object-url``; None: it can, or there is none.
    object_store: Missing | None = None


@dataclass(frozen=True)
class Measure:
    """A link, and what it carries."""

    source: Place
    target: Place
    #: By what: ``memcpy``, ``pinned``, ``UCX``.
    path: str
    rate: Rate | Missing
    #: Bytes that were moved to find out.
    nbytes: int = 0


def plain(value: Any) -> Any:
    """Turn facts into what JSON takes.

    Examples
    --------
    >>> plain({"shown": Missing("no driver"), "cpus": frozenset({1, 0})})
    {'shown': {'missing': 'no driver'}, 'cpus': [0, 1]}
    """
    if isinstance(value, Missing):
        return {"missing": value.reason}
    if isinstance(value, Place):
        return {"worker": value.worker, "tier": value.tier}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    return value
