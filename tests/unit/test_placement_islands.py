"""Which GPUs of a machine are near to each other, by what an emulated NVML says of them."""

from __future__ import annotations

import pytest
from cuda_emulation import emulated

from dask_gpurt.plugins.islands import island_of, look


@pytest.mark.parametrize(
    ("own", "count", "joined", "island"),
    [
        (0, 1, {}, None),
        # Nobody is nearer than others; all are.
        (0, 4, {}, None),
        (1, 3, {(0, 1): "nvlink", (0, 2): "nvlink", (1, 2): "nvlink"}, None),
        # By way of others, too.
        (3, 5, {(0, 1): "nvlink", (1, 2): "nvlink", (2, 3): "nvlink", (3, 4): "pcie"}, "nvlink-0"),
        (4, 5, {(0, 1): "nvlink", (1, 2): "nvlink", (2, 3): "nvlink", (3, 4): "pcie"}, "pcie-3"),
        # The quickest way counts that there is.
        (2, 4, {(0, 1): "nvlink", (2, 3): "pcie", (0, 2): "numa"}, "pcie-2"),
        (2, 4, {(0, 1): "nvlink", (2, 3): "numa"}, "numa-2"),
        (2, 3, {(0, 1): "nvlink"}, None),
    ],
)
def test_islands(own: int, count: int, joined: dict[tuple[int, int], str], island: str | None) -> None:
    assert island_of(own, count, joined) == island


pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py asks NVML")


@emulated(devices=8, nvlink=2, switch=4)
def test_nvlink_before_switches() -> None:
    assert [look(str(number)) for number in range(8)] == [f"nvlink-{number // 2 * 2}" for number in range(8)]
    # The first is the worker's own; it may be named by its UUID, too, as far as NVML knows it.
    assert look("5,6,7,0") == "nvlink-4"
    pynvml.nvmlInit()
    uuid = pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(3))
    assert look(f"{uuid},1") == "nvlink-2"
    assert look("GPU-nobody") is look("MIG-1") is look("8") is look("none") is look("") is look("-1") is None


@emulated(devices=4)
def test_what_is_nearer_than_the_rest_is_an_island(monkeypatch: pytest.MonkeyPatch) -> None:
    def islands(**joined: int) -> list[str | None]:
        for name in ("nvlink", "switch", "numa"):
            monkeypatch.setenv(f"EMULATED_CUDA_{name.upper()}", str(joined.get(name, 1)))
        return [look(str(number)) for number in range(4)]

    assert islands(switch=2, numa=4) == ["pcie-0", "pcie-0", "pcie-2", "pcie-2"]
    assert islands(numa=2) == ["numa-0", "numa-0", "numa-2", "numa-2"]
    assert islands(nvlink=4, switch=2) == islands() == [None] * 4
