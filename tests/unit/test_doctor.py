"""The doctor on this machine, as it is: what it says is so, what cannot be had says why, and nothing is left behind."""

from __future__ import annotations

import json
import os
import platform
import resource
import tempfile
from importlib.metadata import version
from pathlib import Path

import dask
import pytest
from click.testing import CliRunner, Result
from cuda_emulation import counted, emulated, set_driver

from dask_gpurt import cli
from dask_gpurt.config import Settings
from dask_gpurt.doctor import app, gather, links
from dask_gpurt.doctor.facts import Cuda, Facts, Folder, Measure, Memory, Missing, Ucx, attempt

MIB = 2**20


def doctor(*arguments: str, color: bool = False, **environment: str) -> Result:
    return CliRunner().invoke(cli.gpurt, ["doctor", *arguments], color=color, env=environment)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return gather.gather("machine", Settings.load())


def test_what_it_says_of_this_machine_is_so(facts: Facts) -> None:
    assert facts.python == platform.python_version()
    assert facts.versions["distributed"] == version("distributed")
    assert facts.cpus == os.sched_getaffinity(0)
    assert facts.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert isinstance(facts.memory, Memory)
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert facts.memory.total_nbytes == int(line.split()[1]) * 1024
    assert 0 < facts.memory.limit_nbytes <= facts.memory.total_nbytes
    assert {part: status.installed for part, status in facts.parts.items()} == dict.fromkeys(
        ("memory", "shuffle", "placement"), True
    )
    assert not facts.installed
    assert isinstance(facts.ucx, Ucx), "ucxx is installed for the tests"
    assert "tcp/lo" in facts.ucx.resources
    assert facts.object_store is None


def test_it_finds_as_many_gpus_as_there_are_and_without_one_says_why(facts: Facts, gpus: int) -> None:
    if gpus:
        assert isinstance(facts.cuda, Cuda)
        assert len(facts.cuda.devices) == gpus
        return
    assert isinstance(facts.cuda, Missing)
    assert facts.cuda.reason
    assert isinstance(facts.storage, Missing)
    assert links.to_devices("here", ()) == []


def mounted(path: Path) -> str:
    """Return the file system of ``path``, by the number of its device."""
    number = path.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == f"{os.major(number)}:{os.minor(number)}":
            return after.split()[0]
    raise LookupError(path)


@pytest.mark.parametrize("parent", ["/dev/shm", None], ids=["memory", "disk"])
def test_the_folder_for_spilled_data(parent: str | None, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=parent or tmp_path) as path:
        folder = gather.gather("machine", Settings.load({"memory.directory": f"{path}/not/there/yet"})).folder
        assert isinstance(folder, Folder)
        assert folder.refusal is None
        assert folder.path == f"{path}/not/there/yet"
        assert folder.file_system == mounted(Path(path))
        assert os.listdir(path) == [], "it is looked at, and not made"


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path, direct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert direct
    monkeypatch.setattr(links, "DISK_NBYTES_MAX", 32 * MIB)
    folder = Folder(path=str(tmp_path), refusal=None, file_system="x", direct=True, free_nbytes=2**40)
    copied, written, read = links.memory_and_disk("here", folder)
    assert [(m.source.tier, m.target.tier) for m in (copied, written, read)] == [
        ("host", "host"),
        ("host", "disk"),
        ("disk", "host"),
    ]
    assert all(not isinstance(m.rate, Missing) and m.rate.bandwidth > 1e6 for m in (copied, written, read))
    assert 0 < read.nbytes == written.nbytes <= 32 * MIB
    assert written.path == "past the page cache"
    assert os.listdir(tmp_path) == []

    def spoil(fd: int, buffers: list[memoryview], offset: int) -> int:
        buffers[0][5] ^= 1
        return len(buffers[0])

    monkeypatch.setattr(os, "preadv", spoil)
    assert why(links.memory_and_disk("here", folder)[1]).cause == "CorruptDataError"
    full = Folder(path=str(tmp_path), refusal=None, file_system="x", direct=True, free_nbytes=MIB)
    assert "all but full" in why(links.memory_and_disk("here", full)[1]).reason
    assert os.listdir(tmp_path) == []


def why(measure: Measure) -> Missing:
    assert isinstance(measure.rate, Missing), measure
    return measure.rate


def test_memory_that_may_not_be_read_is_told_from_a_test_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(gather.readable_by_others(), bool)
    monkeypatch.setattr(os, "getpid", lambda: 2**22 + 1)  # beyond the highest number of a process
    assert "No such process" in attempt(gather.readable_by_others).reason  # type: ignore[union-attr]


def test_no_error_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("it went wrong")

    for module, name in (
        ("psutil", "virtual_memory"),
        ("psutil", "disk_partitions"),
        ("resource", "getrlimit"),
        ("shutil", "disk_usage"),
    ):
        monkeypatch.setattr(f"dask_gpurt.doctor.gather.{module}.{name}", fail)
    monkeypatch.setattr("dask_gpurt.shuffle.transport.engine.Engine.describe", fail)
    monkeypatch.setattr("dask_gpurt.plugins.parts.Parts.refusal", fail)
    found = gather.gather("machine", Settings.load())
    assert {found.memory, found.open_files, found.ucx} == {Missing("it went wrong", "RuntimeError")}
    assert {status.remark for status in found.parts.values()} == {"it went wrong"}
    assert "it went wrong" in app.show(
        app.Report(None, {app.HERE: found}, app.judge({app.HERE: found}, Settings.load(), []), [])
    )


def test_it_answers_as_json() -> None:
    result = doctor("--json", "--no-measure")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["broken"] is False
    assert said["measures"] == []
    here = said["facts"]["this machine"]
    assert here["parts"]["shuffle"] == {"installed": True, "remark": ""}
    assert {finding["level"] for finding in said["findings"]} <= {"ok", "note", "warning"}


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"gpurt.memory.directory": "/proc/nowhere"}, "/proc/nowhere cannot be written"),
        ({"gpurt.memory.directroy": "/tmp"}, "gpurt.memory.directroy: '/tmp' is not allowed"),
        ({"gpurt.memory.object-url": "file:///proc/nowhere"}, "gpurt.memory.object-url cannot be used"),
    ],
)
def test_what_is_asked_for_and_does_not_work_gives_status_1(config: dict[str, str], text: str) -> None:
    with dask.config.set(config):
        result = doctor("--no-measure")
    assert result.exit_code == 1, result.output
    assert text in result.output
    assert "1 broken" in result.output


@pytest.mark.parametrize(
    "arguments", [["--scheduler", "foo://x"], ["--timeout", "0"], ["--json", "file"], ["--measures"]]
)
def test_usage_errors_give_status_2(arguments: list[str]) -> None:
    result = doctor(*arguments)
    assert result.exit_code == 2
    assert "Usage: " in result.output


def test_a_scheduler_that_is_not_there_gives_status_1() -> None:
    result = doctor("--scheduler", "tcp://127.0.0.1:1", "--timeout", "0.2")
    assert result.exit_code == 1
    assert "there is no scheduler at tcp://127.0.0.1:1" in result.output


def test_colours_are_for_terminals_and_not_for_those_who_want_none() -> None:
    assert "\x1b[" in doctor("--no-measure", color=True).output
    assert "\x1b[" not in doctor("--no-measure", color=True, NO_COLOR="1").output
    assert "\x1b[" not in doctor("--no-measure").output


def rates(measures: list[Measure]) -> dict[tuple[str, str, str], float | str]:
    return {
        (m.source.tier, m.target.tier, m.path): m.rate.reason if isinstance(m.rate, Missing) else m.rate.bandwidth
        for m in measures
    }


@emulated(devices=2, capacity=256 * MIB, copy_rate=2 * 10**9, CUDA_VISIBLE_DEVICES="1,0")
def test_devices_are_found_and_their_links_are_measured() -> None:
    pytest.importorskip("cuda.bindings.driver")
    found = gather.gather("machine", Settings.load())
    assert isinstance(found.cuda, Cuda)
    assert found.driver_cuda == (13, 0)
    assert [(d.name, d.total_nbytes, d.capability, d.bus_id, d.peers) for d in found.cuda.devices] == [
        (f"Emulated device {number} (no GPU)", 256 * MIB, (9, 0), f"0000:{number + 1:02x}:00.0", ())
        for number in (1, 0)
    ]
    # What its NVML does not know, it says, and only that.
    for device in found.cuda.devices:
        assert isinstance(device.nvlinks, Missing)
        assert device.near_cpus == frozenset(range(os.cpu_count() or 0))
    assert isinstance(found.ucx, Ucx)
    assert "cuda_copy/cuda" in found.ucx.resources
    measured = rates(links.to_devices("here", found.cuda.devices))
    one, other = "device 0", "device 1"
    assert set(measured) == {
        *((*way, path) for d in (one, other) for way in (("host", d), (d, "host")) for path in ("pinned", "pageable")),
        *((d, d, "copy") for d in (one, other)),
        *((a, b, "by way of the host") for a, b in ((one, other), (other, one))),
    }
    # It is the copies that take the time.
    assert all(isinstance(rate, float) and 2e7 < rate < 2.2e9 for rate in measured.values()), measured
    assert counted("used") == 0
    assert counted("pinned") == 0
    set_driver(fail_copy=1)
    first = rates(links.to_devices("here", found.cuda.devices[:1]))
    assert first == {("host", one, "pinned"): "CUDA_ERROR_ECC_UNCORRECTABLE (214)"}
    set_driver(pinned_limit=1)
    assert (
        rates(links.to_devices("here", found.cuda.devices[:1]))["host", one, "pinned"] == "the system locks no memory"
    )
    result = doctor("--no-measure")
    assert result.exit_code == 0, result.output
    assert "device 0: Emulated device 1 (no GPU), 256.00 MiB, compute capability 9.0" in result.output


@emulated(devices=1, CUDA_VISIBLE_DEVICES="7")
def test_a_device_that_is_asked_for_and_not_there_gives_status_1() -> None:
    pytest.importorskip("cuda.bindings.driver")
    result = doctor("--no-measure")
    assert result.exit_code == 1
    assert (
        "CUDA_VISIBLE_DEVICES is 7, and there is no device that can be used (CUDA_ERROR_NO_DEVICE (100))"
        in result.output
    )


def test_help_says_the_exit_statuses() -> None:
    result = doctor("--help")
    assert result.exit_code == 0
    assert "The exit status is 0 if nothing is broken" in " ".join(result.output.split())
