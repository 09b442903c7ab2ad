"""What of the benchmarks for a GPU can run without one: on the emulated driver, at a small size, and where there is none."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cuda_emulation import counted, emulated

from benchmarks import spill
from benchmarks.__main__ import NOTHING_RUN, main, subjects
from benchmarks.frame import BrokenRunError
from benchmarks.gpu import pinned_rate
from benchmarks.spilling import device
from benchmarks.spilling.clusters import Limited, has_spilled
from dask_gpurt.demo import machine
from dask_gpurt.demo.cluster import ClusterSpec
from dask_gpurt.memory.cuda import Device
from dask_gpurt.memory.mover import Mover

MIB = 2**20


def test_every_case_that_needs_a_gpu_is_in_the_suite() -> None:
    known = subjects()
    cases = {case for name, subject in known.items() if name != "gpu" for case in subject.cases if "gpu" in case}
    assert cases == set(known["gpu"].cases)
    assert {"gpu-rechunk", "gpu-shuffle", "gpu-pack", "gpu-down", "gpu-up", "gpu-array"} <= cases


@pytest.mark.parametrize("arguments", [["gpu"], ["gpu", "--case", "gpu-up"], ["spill", "--case", "gpu-array"]])
def test_where_there_is_no_gpu_it_says_so_once_and_not_that_all_is_well(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Device, "find", lambda: None)
    file = tmp_path / "out.json"
    assert main([*arguments, "--json", str(file)]) == NOTHING_RUN == 77
    (line,) = capsys.readouterr().out.splitlines()
    assert "there is no CUDA device" in line
    assert not file.exists()


@emulated(capacity=64 * MIB)
def test_down_and_up_beside_pinned_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dask_cuda")
    pytest.importorskip("numba_cuda")
    downs, ups = device.down_and_up(16 * MIB, pairs=2, library="numba", array_nbytes=2 * MIB)
    for rates in (downs, ups):
        assert len(rates.ours) == len(rates.raw) == 2
        assert min(*rates.ours, *rates.raw) > 0
    assert counted("pinned") == 0, "all is given back"
    line = spill.line_of_rates("gpu-down", downs, "memcpy")
    assert (line.metric, line.pairs) == ("gb_per_s", 2)
    assert pinned_rate() > 0
    shown = machine.describe()["machine"]
    assert shown["gpus"] == [{"name": "Emulated device 0 (no GPU)", "memory_nbytes": 64 * MIB}]
    assert (shown["driver"], shown["driver_cuda"]) == ("0.0 (emulated)", "13.0")

    # dask-cuda's store, of which the benchmark has to know whether it spilled.
    store = importlib.import_module("dask_cuda.device_host_file").DeviceHostFile(
        str(tmp_path), device_memory_limit=2 * MIB
    )
    worker: Any = SimpleNamespace(data=store, extensions={})
    for number, spilled in enumerate((False, False, True)):
        store[number] = device.LIBRARIES["numba"](number, MIB)
        assert has_spilled(worker) is spilled

    # What does not come back as it was is no result.
    made = device.LIBRARIES["numba"]
    get = Mover.get

    def other(mover: Mover, name: Any) -> Any:
        return made(5, 2 * MIB) if mover.tier == "device" else get(mover, name)

    monkeypatch.setattr(Mover, "get", other)
    with pytest.raises(BrokenRunError, match="an array is not what it was"):
        device.down_and_up(16 * MIB, pairs=1, library="numba", array_nbytes=2 * MIB)


def test_a_worker_with_a_gpu_has_one_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.spilling.clusters.count_gpus", lambda: 1)
    limited = Limited(scale=4, part=0.5, gpu=True)
    assert limited.spec == ClusterSpec(workers=1, threads=1, memory_limit_nbytes=128 * MIB, gpu=True)
    assert Limited(scale=4, part=0.5).workers == 2
