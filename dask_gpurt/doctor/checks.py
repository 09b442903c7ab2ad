"""Judges what was found: facts in, findings out. Pure: no I/O, no clock.

A finding has a level. What is **broken** was asked for, by the configuration or by how the process was started, and does not
work. A **warning** is what works, but slower or with less than people expect. A **note** is what is not there, and is not missed
unless somebody wants it. Where something can be mended, the finding has the one line that mends it.

Covers: :func:`of_server`, :func:`of_cluster`, :func:`of_measures`, :func:`merged`.
Does not cover: how facts are found out (:mod:`dask_gpurt.doctor.gather`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from packaging.version import Version

from dask_gpurt import seams
from dask_gpurt.doctor.facts import Facts, Folder, Measure, Missing
from dask_gpurt.memory.rescue import in_words
from dask_gpurt.plugins.parts import LEFT_OUT

if TYPE_CHECKING:
    from dask_gpurt.config import Settings

__all__ = ["LEVELS", "Finding", "Level", "merged", "of_cluster", "of_measures", "of_server"]

Level = Literal["ok", "note", "warning", "broken"]
#: From good to bad.
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "broken")

GIB = 2**30
#: Less is soon full.
FREE_NBYTES_MIN = 10 * GIB
#: A worker has a connection or two to each other one, and files of its own.
OPEN_FILES_MIN = 4096
#: The least that RAPIDS runs on.
CAPABILITY_MIN = (7, 0)
#: What RMM allocates by where nobody has chosen.
DEFAULT_RESOURCE = "CudaMemoryResource"
POOL = "LocalCUDACluster(rmm_pool_size=…), or dask cuda worker --rmm-pool-size …"
#: File systems that lie in memory, and those that lie beyond a network.
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
BEYOND_NETWORK = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "fuse.sshfs",
        "glusterfs",
        "afs",
        "9p",
        "virtiofs",
    }
)
#: What CUDA_VISIBLE_DEVICES says where nobody wants a device.
NO_DEVICES = frozenset({"", "-1", "NoDevFiles", "none", "void"})


@dataclass(frozen=True)
class Finding:
    """A judgement."""

    level: Level
    #: What it is about, in a word.
    topic: str
    text: str
    #: The one line that mends it; empty if there is none, or no need.
    remedy: str = ""
    #: Whom it is about; none: everybody who was asked.
    servers: tuple[str, ...] = ()


def merged(findings: Iterable[Finding], servers: Sequence[str]) -> list[Finding]:
    """Put together what was found on several servers. What holds for all of ``servers`` names none.

    Examples
    --------
    >>> alike = [Finding("ok", "disk", "fast", servers=(name,)) for name in "ab"]
    >>> merged(alike, ["a", "b"]) == merged(alike[:1], ["a"])
    True
    """
    names: dict[Finding, list[str]] = {}
    for finding in findings:
        names.setdefault(replace(finding, servers=()), []).extend(finding.servers)
    return [replace(finding, servers=() if set(of) >= set(servers) else tuple(of)) for finding, of in names.items()]


def of_server(name: str, facts: Facts | Missing, settings: Settings) -> list[Finding]:
    """Judge one process."""
    if isinstance(facts, Missing):
        return [replace(_unheard(facts), servers=(name,))]
    found = [
        *_versions(facts),
        *_parts(facts, settings),
        *_cuda(facts, settings),
        *_memory(facts),
        *_ucx(facts, settings),
    ]
    if facts.role != "scheduler":
        found += [*_libraries(facts), *_spilling(facts, settings), *_rmm_and_storage(facts)]
    found += _open_files(facts)
    return [replace(finding, servers=(name,)) for finding in found]


def of_cluster(facts: Mapping[str, Facts | Missing]) -> list[Finding]:
    """Judge whether the servers of a cluster, and who asks, go together."""
    known = {name: each for name, each in facts.items() if isinstance(each, Facts)}
    found = []
    if not any(each.role == "worker" for each in known.values()):
        found.append(Finding("note", "cluster", "there are no workers: nothing is known of them"))
    for what in ("dask", "distributed", "numpy", "pandas", "pyarrow"):
        found += _differing(what, {name: each.versions.get(what, "none") for name, each in known.items()})
    minors = {name: each.python.rpartition(".")[0] for name, each in known.items()}
    return found + list(_differing("Python", minors))


def of_measures(measures: Iterable[Measure]) -> list[Finding]:
    """Judge what could not be measured."""
    found = []
    for measure in measures:
        rate = measure.rate
        if not isinstance(rate, Missing):
            continue
        between = (
            f"{measure.source.worker} to {measure.target.worker}"
            if measure.source.worker != measure.target.worker
            else ""
        )
        where = between or f"{measure.source.tier} to {measure.target.tier}"
        level: Level = "note" if not rate.cause else "warning"
        if rate.cause == "CorruptDataError" or measure.path == "Dask's comms":
            level = "broken"
        path = f", {measure.path}" if measure.path else ""
        text = f"{where}{path}: cannot be measured: {rate.reason}"
        found.append(Finding(level, "links", text, servers=() if between else (measure.source.worker,)))
    return found


def _differing(what: str, versions: Mapping[str, str]) -> Iterator[Finding]:
    groups: dict[str, list[str]] = {}
    for name, version in versions.items():
        groups.setdefault(version, []).append(name)
    if len(groups) > 1:
        said = "; ".join(f"{version} on {_some(names)}" for version, names in sorted(groups.items()))
        yield Finding("warning", "cluster", f"{what} differs: {said}", f"install one version of {what} everywhere")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unheard(facts: Missing) -> Finding:
    remedy = ""
    if facts.cause in ("ModuleNotFoundError", "ImportError", "AttributeError", "OtherVersion"):
        remedy = "install the same version of dask-gpurt there"
    return Finding("broken", "cluster", f"cannot be examined: {facts.reason}", remedy)


def _versions(facts: Facts) -> Iterator[Finding]:
    lowest, highest = map(Version, seams.SUPPORTED)
    said = f"Python {facts.python}, " + ", ".join(
        f"{name} {facts.versions.get(name, 'not installed')}" for name in ("dask", "distributed", "dask-gpurt")
    )
    unfit = [
        name
        for name in ("dask", "distributed")
        if name not in facts.versions or not lowest <= Version(facts.versions[name]) < highest
    ]
    if unfit:
        remedy = "pip install " + " ".join(f"'{name}>={lowest},<{highest}'" for name in unfit)
        yield Finding(
            "broken", "versions", f"{said}: it works with dask and distributed >= {lowest}, < {highest}", remedy
        )
    else:
        yield Finding("ok", "versions", said)


def _parts(facts: Facts, settings: Settings) -> Iterator[Finding]:
    is_, would = ("is installed", "is stock") if facts.installed else ("can be installed", "would be left stock")
    for part, status in facts.parts.items():
        if status.installed:
            remark = f" ({status.remark})" if status.remark else ""
            yield Finding("ok", "parts", f"{part} {is_}{remark}")
        elif status.remark == LEFT_OUT or not settings.enabled(part):
            yield Finding("note", "parts", f"{part} is left out by the configuration")
        else:
            yield Finding("broken", "parts", f"{part} {would}: {status.remark}", _remedy_of_part(status.remark))
    if facts.role == "worker" and facts.memory_limit_nbytes is None and settings.memory.host_limit is None:
        text = "the worker has no memory limit: nothing goes from HOST to DISK"
        yield Finding("note", "parts", text, "dask worker --memory-limit auto …")


def _remedy_of_part(reason: str) -> str:
    if "Dask has changed" in reason:
        lowest, highest = seams.SUPPORTED
        return f"pip install 'dask>={lowest},<{highest}' 'distributed>={lowest},<{highest}'"
    if "not installed: " in reason:
        return "pip install 'dask-gpurt[dataframe]'"
    if "JIT unspilling" in reason:
        return "start the workers without jit_unspill (--disable-jit-unspill)"
    return "start the workers without data=…" if "was chosen for the data" in reason else ""


def _libraries(facts: Facts) -> Iterator[Finding]:
    if missing := [name for name in ("pandas", "pyarrow") if name not in facts.versions]:
        text = f"{' and '.join(missing)} not installed: no dataframes are shuffled here"
        yield Finding("note", "libraries", text, "pip install 'dask-gpurt[dataframe]'")
    elif "numba" not in facts.versions:
        text = "numba not installed: NumPy does what compiled kernels do faster"
        yield Finding("note", "libraries", text, "pip install 'dask-gpurt[dataframe]'")


# Devices


def _extra(facts: Facts) -> str:
    """Name the extra for the CUDA of the driver."""
    version = facts.driver_cuda
    return "cuda12" if not isinstance(version, Missing) and version < (13, 0) else "cuda13"


def _wants_devices(facts: Facts, settings: Settings) -> str:
    """Say by what devices were asked for; nothing if they were not."""
    if facts.role != "scheduler" and settings.memory.device_limit is not None:
        return "gpurt.memory.device-limit is set"
    if facts.visible_devices is not None and facts.visible_devices not in NO_DEVICES:
        return f"CUDA_VISIBLE_DEVICES is {facts.visible_devices}"
    return ""


def _cuda(facts: Facts, settings: Settings) -> Iterator[Finding]:
    cuda = facts.cuda
    if isinstance(cuda, Missing):
        yield _no_device(facts, cuda, _wants_devices(facts, settings))
        return
    version = facts.driver_cuda
    driver = f"driver {cuda.driver}, " if not isinstance(cuda.driver, Missing) else ""
    for_ = "" if isinstance(version, Missing) else f"{driver}CUDA {version[0]}.{version[1]}"
    # dask-cuda shows each worker all of them, its own first.
    for ordinal, device in enumerate(cuda.devices[:1] if facts.role == "worker" else cuda.devices):
        capability = ".".join(map(str, device.capability))
        said = f"device {ordinal}: {device.name}, {in_words(device.total_nbytes)}, compute capability {capability}, {for_}, at {device.bus_id}"
        yield Finding("ok", "devices", said)
        yield from _placed(ordinal, facts)
        if device.capability < CAPABILITY_MIN:
            least = ".".join(map(str, CAPABILITY_MIN))
            yield Finding("warning", "devices", f"device {ordinal}: RAPIDS needs compute capability {least}")
    bindings = facts.versions.get("cuda-bindings")
    if bindings and not isinstance(version, Missing) and Version(bindings).major > version[0]:
        text = f"the packages are for CUDA {Version(bindings).major}, the driver is for CUDA {version[0]}.{version[1]}"
        yield Finding(
            "warning", "devices", text, f"install a newer driver, or: pip install 'dask-gpurt[{_extra(facts)}]'"
        )
    number = _extra(facts)[-2:]
    wanted = {"CuPy": f"cupy-cuda{number}x", "RMM": f"rmm-cu{number}", "dask-cuda": "dask-cuda"}
    if missing := [name for name, package in wanted.items() if package not in facts.versions]:
        text = f"{', '.join(missing)} not installed"
        yield Finding("note", "libraries", text, f"pip install 'dask-gpurt[{_extra(facts)}]'")


def _no_device(facts: Facts, why: Missing, wanted: str) -> Finding:
    no_driver = isinstance(facts.driver_cuda, Missing)
    if not no_driver and why.cause in ("ImportError", "ModuleNotFoundError"):
        text, remedy = (
            f"there is a CUDA driver, and no package to use it by ({why.reason})",
            f"pip install 'dask-gpurt[{_extra(facts)}]'",
        )
        return Finding("broken" if wanted else "warning", "devices", f"{text}{wanted and ': '}{wanted}", remedy)
    if wanted:
        remedy = (
            "install NVIDIA's driver (in a container: --gpus all)"
            if no_driver
            else "unset CUDA_VISIBLE_DEVICES, or correct it"
        )
        return Finding("broken", "devices", f"{wanted}, and there is no device that can be used ({why.reason})", remedy)
    if facts.device_files:
        text = f"the machine has NVIDIA devices that cannot be used here ({why.reason})"
        return Finding("warning", "devices", text, "install NVIDIA's driver (in a container: --gpus all)")
    return Finding("note", "devices", f"no GPU ({why.reason}): HOST is the top tier")


def _placed(ordinal: int, facts: Facts) -> Iterator[Finding]:
    """Judge how a device is joined to the rest."""
    assert not isinstance(facts.cuda, Missing)
    devices = facts.cuda.devices
    device = devices[ordinal]
    unknown = []
    if isinstance(device.nvlinks, Missing):
        unknown.append(f"NVLink ({device.nvlinks.reason})")
    if isinstance(device.pcie_lanes, Missing):
        unknown.append(f"PCIe ({device.pcie_lanes.reason})")
    elif device.pcie_lanes[0] < device.pcie_lanes[1]:
        text = f"device {ordinal}: {device.pcie_lanes[0]} of {device.pcie_lanes[1]} PCIe lanes are in use"
        yield Finding("warning", "devices", text, "seat the card in a slot with all lanes")
    if isinstance(device.numa_node, Missing):
        unknown.append(f"NUMA node ({device.numa_node.reason})")
    near = device.near_cpus
    if isinstance(near, Missing):
        unknown.append(f"near processors ({near.reason})")
    elif facts.role == "worker" and ordinal == 0 and near and not near & facts.cpus:
        text = "the worker may not use the processors that are near its device"
        yield Finding("warning", "devices", text, "start workers by dask-cuda, which binds them to these")
    known = []
    if not isinstance(device.nvlinks, Missing):
        known.append(f"{device.nvlinks} NVLink connections" if device.nvlinks else "no NVLink")
    if not isinstance(device.pcie_lanes, Missing):
        known.append(f"{device.pcie_lanes[0]} PCIe lanes")
    if not isinstance(device.numa_node, Missing) and device.numa_node >= 0:
        known.append(f"NUMA node {device.numa_node}")
    if len(devices) > 1:
        known.append(
            f"reaches device {', '.join(map(str, device.peers))}" if device.peers else "reaches no other device"
        )
    if known:
        yield Finding("ok", "devices", f"device {ordinal}: {', '.join(known)}")
    if unknown:
        yield Finding("note", "devices", f"device {ordinal}: not known: {'; '.join(unknown)}")


def _rmm_and_storage(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.cuda, Missing):
        return
    if facts.role == "worker":
        if isinstance(facts.rmm, Missing):
            text = f"RMM is not in use ({facts.rmm.reason}): a task that finds the device full is run again, and not its allocation alone"
            yield Finding("note", "RMM", text, POOL)
        elif facts.rmm == DEFAULT_RESOURCE:
            yield Finding("note", "RMM", "RMM has no pool: each of its allocations asks the driver", POOL)
        else:
            yield Finding("ok", "RMM", f"allocations go by {facts.rmm}")
    storage = facts.storage
    if isinstance(storage, Missing):
        yield Finding("note", "GDS", f"no KvikIO ({storage.reason})", f"pip install 'dask-gpurt[{_extra(facts)}]'")
    elif storage.compatible_only:
        text = "KvikIO reads by way of the host (compatibility mode)"
        yield Finding(
            "note",
            "GDS",
            text,
            f"pip install 'cuda-toolkit[cufile]=={_extra(facts)[-2:]}.*'; in a container: --volume /run/udev:/run/udev:ro",
        )
    elif storage.usable is True:
        yield Finding("ok", "GDS", "KvikIO reads files to the device (cuFile)")
    else:
        why = f": {storage.usable.reason}" if isinstance(storage.usable, Missing) else ""
        yield Finding("note", "GDS", f"KvikIO has cuFile, which has no GPUDirect Storage here{why}")


# The machine


def _memory(facts: Facts) -> Iterator[Finding]:
    memory = facts.memory
    if isinstance(memory, Missing):
        yield Finding("note", "memory", f"not known: {memory.reason}")
        return
    said = in_words(memory.total_nbytes)
    if memory.limit_nbytes < memory.total_nbytes:
        said = f"{in_words(memory.limit_nbytes)} of {said}, by a control group"
    if facts.memory_limit_nbytes is not None:
        said += f"; limit of the worker {in_words(facts.memory_limit_nbytes)}"
    yield Finding("ok", "memory", said)
    if facts.memory_limit_nbytes is not None and facts.memory_limit_nbytes > memory.limit_nbytes:
        text = "the worker's limit is more than there is: it can be killed before it spills"
        yield Finding("warning", "memory", text, f"dask worker --memory-limit {memory.limit_nbytes} …")
    if memory.huge_pages == "never":
        text = "the kernel gives no huge pages: memory is slower when it is first touched"
        yield Finding("note", "memory", text, "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")
    elif isinstance(memory.huge_pages, Missing):
        yield Finding("note", "memory", f"huge pages: not known: {memory.huge_pages.reason}")
    else:
        yield Finding("ok", "memory", f"huge pages: {memory.huge_pages}")
    if memory.lockable_nbytes is None:
        yield Finding("ok", "memory", "memory can be locked without a limit")
    elif facts.rdma:
        text = f"{in_words(memory.lockable_nbytes)} of memory can be locked (ulimit -l), too little for RDMA by {_some(facts.rdma)}"
        yield Finding(
            "warning",
            "memory",
            text,
            "ulimit -l unlimited (LimitMEMLOCK=infinity; in a container: --ulimit memlock=-1)",
        )
    else:
        said = f"{in_words(memory.lockable_nbytes)} of memory can be locked (ulimit -l); there is no RDMA here that wants more"
        yield Finding("ok", "memory", said)


def _ucx(facts: Facts, settings: Settings) -> Iterator[Finding]:
    if facts.role == "scheduler" or not settings.shuffle.enabled:
        return
    if settings.shuffle.transport == "dask":
        yield Finding("ok", "UCX", "not used: gpurt.shuffle.transport is dask")
        return
    if facts.encrypted:
        yield Finding("note", "UCX", "not used: Dask's comms are encrypted, and UCX is not")
        return
    ucx = facts.ucx
    if isinstance(ucx, Missing):
        absent = ucx.cause == "ModuleNotFoundError"
        extra = "ucx" if isinstance(facts.cuda, Missing) else _extra(facts)
        text = f"shuffles go by Dask's comms: {ucx.reason}"
        yield Finding(
            "note" if absent else "warning", "UCX", text, f"pip install 'dask-gpurt[{extra}]'" if absent else ""
        )
        return
    transports: dict[str, list[str]] = {}
    for transport, _, device in (resource.partition("/") for resource in ucx.resources):
        transports.setdefault(transport, []).append(device)
    said = ", ".join(
        name if devices == ["memory"] else f"{name} ({', '.join(devices)})" for name, devices in transports.items()
    )
    settings_ = "".join(f", {name}={value}" for name, value in ucx.environment.items())
    yield Finding("ok", "UCX", f"UCX {ucx.version}: {said}{settings_}")
    remedy = "unset UCX_TLS" if "UCX_TLS" in ucx.environment else ""
    if not isinstance(facts.cuda, Missing) and "cuda_copy" not in transports:
        text = "UCX cannot send the memory of a device: it goes by way of the host"
        yield Finding("warning", "UCX", text, remedy or f"pip install 'dask-gpurt[{_extra(facts)}]'")
    if facts.rdma and not any(name.startswith(("rc", "dc", "ud")) for name in transports):
        yield Finding("warning", "UCX", f"UCX does not use {_some(facts.rdma)}", remedy)
    yield from _one_machine(facts, transports)


def _one_machine(facts: Facts, transports: Mapping[str, object]) -> Iterator[Finding]:
    """Judge what is between the processes of one machine."""
    remedy = "sudo sysctl kernel.yama.ptrace_scope=0 (in a container: --cap-add SYS_PTRACE)"
    if isinstance(facts.readable_by_others, Missing):
        yield Finding(
            "note",
            "UCX",
            f"whether processes may read each other's memory is not known: {facts.readable_by_others.reason}",
        )
    elif not facts.readable_by_others:
        text = "processes may not read each other's memory (CMA): what goes between them goes by TCP"
        yield Finding("note", "UCX", text, remedy)
    elif "cma" not in transports:
        yield Finding("note", "UCX", "UCX does not use CMA: what goes between the processes of a machine goes by TCP")


def _spilling(facts: Facts, settings: Settings) -> Iterator[Finding]:
    if not settings.memory.enabled:
        return
    folder = facts.folder
    if isinstance(folder, Missing):
        yield Finding("broken", "disk", f"the folder for spilled data cannot be looked at: {folder.reason}")
    else:
        yield from _folder(folder, settings)
    if facts.object_store is not None:
        text = f"gpurt.memory.object-url cannot be used: {facts.object_store.reason}"
        yield Finding("broken", "disk", text, "create the bucket or folder, and check the credentials of fsspec")
    elif settings.memory.object_url is not None:
        yield Finding("ok", "disk", "gpurt.memory.object-url can be written")


def _folder(folder: Folder, settings: Settings) -> Iterator[Finding]:
    elsewhere = (
        "set gpurt.memory.directory to a folder on a local disk"
        if settings.memory.directory is not None
        else "DASK_TEMPORARY_DIRECTORY=/a/folder/on/a/local/disk"
    )
    if folder.refusal is not None:
        yield Finding("broken", "disk", f"{folder.path} cannot be written: {folder.refusal}", elsewhere)
        return
    kind = "unknown file system" if isinstance(folder.file_system, Missing) else folder.file_system
    free = "free space unknown" if isinstance(folder.free_nbytes, Missing) else f"{folder.free_nbytes // GIB} GiB free"
    yield Finding("ok", "disk", f"spilled data goes to {folder.path}: {kind}, {free}")
    if kind in IN_MEMORY:
        text = f"{folder.path} lies in memory ({kind}): what is spilled there frees nothing"
        yield Finding("warning", "disk", text, elsewhere)
    elif kind in BEYOND_NETWORK:
        yield Finding("warning", "disk", f"{folder.path} lies beyond a network ({kind})", elsewhere)
    elif folder.direct is not True:
        why = f" ({folder.direct.reason})" if isinstance(folder.direct, Missing) else ""
        text = f"files in {folder.path} go through the page cache{why}: O_DIRECT is refused"
        yield Finding("note", "disk", text, "use ext4 or XFS")
    if not isinstance(folder.free_nbytes, Missing) and folder.free_nbytes < FREE_NBYTES_MIN:
        yield Finding("warning", "disk", f"only {in_words(folder.free_nbytes)} are free in {folder.path}", elsewhere)


def _open_files(facts: Facts) -> Iterator[Finding]:
    if isinstance(facts.open_files, Missing):
        yield Finding("note", "open files", f"not known: {facts.open_files.reason}")
        return
    soft, _ = facts.open_files
    if 0 <= soft < OPEN_FILES_MIN:
        text = f"a process may have {soft} files open, connections among them; on a large cluster that is too little"
        yield Finding("note", "open files", text, "ulimit -n 65536 (LimitNOFILE=65536)")
    else:
        yield Finding("ok", "open files", f"a process may have {soft if soft >= 0 else 'any number of'} files open")
