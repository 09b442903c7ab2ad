"""What the doctor makes of facts: each finding has its level, and the line that mends it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dask_gpurt import seams
from dask_gpurt.config import Settings
from dask_gpurt.doctor import checks
from dask_gpurt.doctor.checks import Finding
from dask_gpurt.doctor.facts import Cuda, DeviceFacts, Facts, Folder, Measure, Memory, Missing, Storage, Ucx
from dask_gpurt.installation import PartStatus
from dask_gpurt.topology import Place, Rate

GIB = 2**30
NO_DRIVER = Missing("libcuda.so.1: cannot open shared object file", "OSError")
DEVICE = DeviceFacts(
    name="A device",
    total_nbytes=80 * GIB,
    capability=(9, 0),
    bus_id="0000:01:00.0",
    nvlinks=18,
    pcie_lanes=(16, 16),
    numa_node=0,
    near_cpus=frozenset({0, 1}),
)
ON_GPU: dict[str, Any] = {
    "driver_cuda": (13, 0),
    "cuda": Cuda(driver="600.1", devices=(DEVICE,)),
    "storage": Storage(compatible_only=False, usable=True),
    "rmm": "PoolMemoryResource over CudaMemoryResource",
    "ucx": Ucx(version="1.21.0", resources=("tcp/eth0", "cma/memory", "cuda_copy/cuda")),
}
GOOD = Facts(
    role="worker",
    host="node",
    python="3.11.7",
    versions=dict.fromkeys(("dask", "distributed"), seams.SUPPORTED[0])
    | {"dask-gpurt": "0.1.0", "pandas": "3.0.6", "pyarrow": "26.0.1", "numba": "0.68.1", "cuda-bindings": "13.5.0"}
    | {"cupy-cuda13x": "14.2.0", "rmm-cu13": "26.10.0", "dask-cuda": "26.10.0"},
    installed=False,
    parts={part: PartStatus(True) for part in ("memory", "shuffle")},
    memory_limit_nbytes=8 * GIB,
    cpus=frozenset({0, 1}),
    memory=Memory(
        total_nbytes=64 * GIB,
        limit_nbytes=64 * GIB,
        lockable_nbytes=2**23,
        huge_pages="madvise",
    ),
    open_files=(65536, 65536),
    visible_devices=None,
    device_files=False,
    driver_cuda=NO_DRIVER,
    cuda=NO_DRIVER,
    storage=Missing("there is no device"),
    rmm=Missing("nothing in this process has imported RMM", "LookupError"),
    rdma=(),
    ucx=Ucx(version="1.21.0", resources=("tcp/eth0", "tcp/lo", "posix/memory", "cma/memory")),
    encrypted=False,
    readable_by_others=True,
    folder=Folder(path="/scratch", refusal=None, file_system="xfs", direct=True, free_nbytes=500 * GIB),
)


def judged(config: dict[str, object] | None = None, **changes: Any) -> list[Finding]:
    return checks.of_server("w", replace(GOOD, **changes), Settings.load(config))


def memory(**changes: Any) -> dict[str, Any]:
    assert isinstance(GOOD.memory, Memory)
    return {"memory": replace(GOOD.memory, **changes)}


def folder(**changes: Any) -> dict[str, Any]:
    assert isinstance(GOOD.folder, Folder)
    return {"folder": replace(GOOD.folder, **changes)}


def device(**changes: Any) -> dict[str, Any]:
    return ON_GPU | {"cuda": Cuda(driver="600.1", devices=(replace(DEVICE, **changes),))}


def test_a_good_worker_without_a_gpu_has_one_note() -> None:
    bad = [finding for finding in judged() if finding.level != "ok"]
    assert [(finding.level, finding.topic) for finding in bad] == [("note", "devices")]
    assert "HOST is the top tier" in bad[0].text


def test_a_good_worker_with_a_gpu_has_none() -> None:
    findings = judged(**ON_GPU)
    assert {finding.level for finding in findings} == {"ok"}
    said = "\n".join(finding.text for finding in findings)
    for words in (
        *(
            "A device, 80.00 GiB, compute capability 9.0, driver 600.1, CUDA 13.0",
            "18 NVLink connections, 16 PCIe lanes",
        ),
        *("PoolMemoryResource over CudaMemoryResource", "tcp (eth0)", "KvikIO reads files to the device"),
    ):
        assert words in said


def without(*names: str) -> dict[str, Any]:
    return {"versions": {name: version for name, version in GOOD.versions.items() if name not in names}}


def status(remark: str) -> dict[str, Any]:
    return {"parts": {"memory": PartStatus(False, remark)}}


#: What was found, the level that it gives, words of the finding, words of the remedy.
CASES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"versions": {**GOOD.versions, "dask": "2026.6.0"}}, "broken", "dask 2026.6.0", "pip install 'dask>="),
    ({"versions": {**GOOD.versions, "distributed": seams.SUPPORTED[1]}}, "broken", "works with", "'distributed>="),
    (without("pandas"), "note", "pandas not installed", "dask-gpurt[dataframe]"),
    (without("numba"), "note", "numba not installed", "dask-gpurt[dataframe]"),
    (status("Dask has changed: there is no 'x'"), "broken", "memory would be left stock", "pip install 'dask>="),
    (status("not installed: pandas"), "broken", "would be left stock: not installed: pandas", "dask-gpurt[dataframe]"),
    (status("dask-cuda's JIT unspilling is on"), "broken", "would be left stock", "--disable-jit-unspill"),
    (status("a Thing was chosen for the data of this worker"), "broken", "a Thing", "without data=…"),
    (status("left out"), "note", "left out by the configuration", ""),
    (status("OSError: nothing") | {"installed": True}, "broken", "memory is stock", ""),
    ({"memory_limit_nbytes": None}, "note", "no memory limit", "--memory-limit"),
    ({"memory_limit_nbytes": 99 * GIB}, "warning", "more than there is", "--memory-limit"),
    (memory(limit_nbytes=GIB), "warning", "killed before it spills", f"--memory-limit {GIB}"),
    (memory(huge_pages="never"), "note", "no huge pages", "transparent_hugepage"),
    (memory(huge_pages=Missing("no such file")), "note", "no such file", ""),
    ({"memory": Missing("no /proc")}, "note", "no /proc", ""),
    ({"rdma": ("mlx5_0",)}, "warning", "8.00 MiB of memory can be locked", "ulimit -l unlimited"),
    ({"rdma": ("mlx5_0",)}, "warning", "UCX does not use mlx5_0", ""),
    ({"open_files": (1024, 4096)}, "note", "1024 files", "ulimit -n"),
    ({"open_files": Missing("no limits")}, "note", "no limits", ""),
    ({"visible_devices": "0"}, "broken", "CUDA_VISIBLE_DEVICES is 0", "--gpus all"),
    (
        {"visible_devices": "5", "driver_cuda": (13, 0), "cuda": Missing("CUDA_ERROR_NO_DEVICE", "CudaError")},
        "broken",
        "NO_DEVICE",
        "unset",
    ),
    ({"device_files": True}, "warning", "NVIDIA devices that cannot be used", "--gpus all"),
    (
        {"driver_cuda": (12, 4), "cuda": Missing("no cuda", "ModuleNotFoundError")},
        "warning",
        "no package",
        "dask-gpurt[cuda12]",
    ),
    (
        {"driver_cuda": (13, 1), "cuda": Missing("no cuda", "ImportError"), "visible_devices": "0"},
        "broken",
        "",
        "dask-gpurt[cuda13]",
    ),
    (ON_GPU | {"driver_cuda": (12, 4)}, "warning", "packages are for CUDA 13", "dask-gpurt[cuda12]"),
    (ON_GPU | without("cupy-cuda13x"), "note", "CuPy not installed", "dask-gpurt[cuda13]"),
    (ON_GPU | {"rmm": Missing("not imported")}, "note", "RMM is not in use", "rmm_pool_size"),
    (ON_GPU | {"rmm": "CudaMemoryResource"}, "note", "RMM has no pool", "rmm_pool_size"),
    (ON_GPU | {"storage": Missing("No module")}, "note", "no KvikIO", "pip install"),
    (ON_GPU | {"storage": Storage(compatible_only=True, usable=None)}, "note", "compatibility mode", "cufile"),
    (ON_GPU | {"storage": Storage(compatible_only=False, usable=False)}, "note", "no GPUDirect Storage", ""),
    (ON_GPU | {"ucx": GOOD.ucx}, "warning", "cannot send the memory of a device", "dask-gpurt[cuda13]"),
    (device(capability=(6, 1)), "warning", "needs compute capability 7.0", ""),
    (device(pcie_lanes=(4, 16)), "warning", "4 of 16 PCIe lanes", "slot"),
    (device(near_cpus=frozenset({8, 9})), "warning", "near its device", "dask-cuda"),
    (device(nvlinks=Missing("Not Supported")), "note", "NVLink (Not Supported)", ""),
    ({"ucx": Missing("ucxx is not installed", "ModuleNotFoundError")}, "note", "Dask's comms", "dask-gpurt[ucx]"),
    ({"ucx": Missing("UCX does not start", "TransportUnavailable")}, "warning", "does not start", ""),
    ({"encrypted": True}, "note", "encrypted", ""),
    ({"readable_by_others": False}, "note", "may not read", "ptrace_scope"),
    ({"readable_by_others": Missing("no such call")}, "note", "no such call", ""),
    ({"ucx": Ucx(version="1", resources=("tcp/lo",))}, "note", "does not use CMA", ""),
    (folder(refusal="Permission denied"), "broken", "cannot be written", "DASK_TEMPORARY_DIRECTORY"),
    (folder(file_system="tmpfs"), "warning", "lies in memory", "DASK_TEMPORARY_DIRECTORY"),
    (folder(file_system="nfs4"), "warning", "beyond a network", "DASK_TEMPORARY_DIRECTORY"),
    (folder(direct=False), "note", "O_DIRECT is refused", "XFS"),
    (folder(free_nbytes=GIB), "warning", "only 1.00 GiB", ""),
    ({"folder": Missing("gone")}, "broken", "gone", ""),
    ({"object_store": Missing("Forbidden")}, "broken", "Forbidden", "credentials"),
]


@pytest.mark.parametrize(
    ("changes", "level", "text", "remedy"), CASES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_fact_has_its_finding(changes: dict[str, Any], level: str, text: str, remedy: str) -> None:
    new = set(judged(**changes)) - set(judged(**(ON_GPU if "storage" in changes else {})))
    found = [finding for finding in new if finding.level == level and text in finding.text]
    assert len(found) == 1, new
    assert remedy in found[0].remedy
    # Nothing worse, or other, than this is said.
    assert checks.LEVELS.index(level) == max(checks.LEVELS.index(each.level) for each in new)


def test_what_is_asked_for_by_the_configuration_is_broken_where_it_is_not_there() -> None:
    config: dict[str, object] = {"memory.device-limit": "1 GiB"}
    assert [f.level for f in judged(config) if "gpurt.memory.device-limit is set" in f.text] == ["broken"]
    assert not any("broken" in f.level for f in judged(config, **ON_GPU))


def test_what_is_left_out_by_the_configuration_is_not_looked_for() -> None:
    config: dict[str, object] = {"memory.enabled": False, "shuffle.enabled": False}
    topics = {finding.topic for finding in judged(config, **folder(refusal="full"), ucx=Missing("no"))}
    assert not topics & {"disk", "UCX"}
    assert "gpurt.shuffle.transport is dask" in str(judged({"shuffle.transport": "dask"}, ucx=Missing("no")))


def test_a_server_that_does_not_answer_is_broken() -> None:
    (finding,) = checks.of_server("w", Missing("No module named 'dask_gpurt'", "ModuleNotFoundError"), Settings())
    assert (finding.level, finding.servers) == ("broken", ("w",))
    assert "same version" in finding.remedy


def test_a_cluster_whose_servers_differ_is_warned_about() -> None:
    assert checks.of_cluster({"a": GOOD, "b": GOOD}) == []
    other = replace(GOOD, python="3.12.1", versions={**GOOD.versions, "pandas": "2.3.0"})
    said = [finding.text for finding in checks.of_cluster({"a": GOOD, "b": GOOD, "c": other})]
    assert said == ["pandas differs: 2.3.0 on c; 3.0.6 on a, b", "Python differs: 3.11 on a, b; 3.12 on c"]
    assert "no workers" in checks.of_cluster({"s": replace(GOOD, role="scheduler")})[0].text


def test_what_holds_for_all_names_nobody() -> None:
    names = ["a", "b", "c"]
    found = [finding for name in names for finding in checks.of_server(name, GOOD, Settings())]
    assert all(finding.servers == () for finding in checks.merged(found, names))
    assert len(checks.merged(found, names)) == len(found) / 3
    assert {finding.servers for finding in checks.merged(found, [*names, "d"])} == {tuple(names)}


def test_links_that_cannot_be_measured_are_told() -> None:
    a, b, disk = Place("a"), Place("b"), Place("a", "disk")
    assert checks.of_measures([Measure(a, b, "UCX", Rate(0.0, 1e9), 10)]) == []
    levels = [
        (Measure(a, b, "UCX", Missing("not installed")), "note"),
        (Measure(a, b, "UCX", Missing("no answer", "TimeoutError")), "warning"),
        (Measure(a, b, "Dask's comms", Missing("refused", "OSError")), "broken"),
        (Measure(a, disk, "disk", Missing("other bytes", "CorruptDataError")), "broken"),
    ]
    assert [finding.level for finding in checks.of_measures(measure for measure, _ in levels)] == [
        level for _, level in levels
    ]
