"""What the CUDA driver and NVML show: devices, and how they are joined to each other and to the machine.

Nothing here makes a context, or takes memory of a device. What the driver does not tell, NVML or the system does; a fact that
neither has is missing by itself, and the others are there.

Covers: :func:`look`, :func:`driver_cuda`, :func:`storage`.
Does not cover: how fast the devices are (:mod:`dask_gpurt.doctor.links`).
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dask_gpurt.doctor.facts import Cuda, DeviceFacts, Missing, Storage, attempt
from dask_gpurt.memory.cuda import Driver

__all__ = ["driver_cuda", "look", "storage"]

#: Words of processors in a mask of NVML's: 64 a word, and no machine has more than 4,096.
_CPU_WORDS = 64


def driver_cuda() -> tuple[int, int]:
    """Return the version of CUDA that the driver is for. It needs no ``cuda-bindings``, and no device.

    Raises
    ------
    OSError
        If there is no driver.
    """
    version = ctypes.c_int()
    code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if code:
        raise OSError(code, "cuDriverGetVersion failed")
    return version.value // 1000, version.value % 1000 // 10


def look() -> Cuda:
    """Look at all devices that this process sees.

    Raises
    ------
    OSError, ImportError, CudaError
        As :meth:`~dask_gpurt.memory.cuda.Driver.load` does.
    """
    driver = Driver.load()
    count = int(driver.cuDeviceGetCount())
    with _nvml() as nvml:
        return Cuda(
            driver=nvml if isinstance(nvml, Missing) else attempt(lambda: _text(nvml.nvmlSystemGetDriverVersion())),
            devices=tuple(_device(driver, nvml, ordinal, count) for ordinal in range(count)),
        )


def storage() -> Storage:
    """Say what KvikIO can do here.

    Raises
    ------
    ImportError
        If it is not installed.
    """
    defaults: Any = importlib.import_module("kvikio.defaults")
    if defaults.is_compat_mode_preferred():
        return Storage(compatible_only=True, usable=None)
    driver: Any = importlib.import_module("kvikio.cufile_driver")
    return Storage(compatible_only=False, usable=attempt(lambda: bool(driver.get("is_gds_available"))))


@contextmanager
def _nvml() -> Iterator[Any]:
    """Yield NVML, started, or why it is not there."""

    def start() -> Any:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return nvml

    nvml = attempt(start)
    try:
        yield nvml
    finally:
        if not isinstance(nvml, Missing):
            attempt(nvml.nvmlShutdown)


def _device(driver: Driver, nvml: Any, ordinal: int, count: int) -> DeviceFacts:
    device = driver.cuDeviceGet(ordinal)
    attributes = driver.names.CUdevice_attribute

    def ask(name: str) -> int:
        return int(driver.cuDeviceGetAttribute(getattr(attributes, f"CU_DEVICE_ATTRIBUTE_{name}"), device))

    bus_id = f"{ask('PCI_DOMAIN_ID'):04x}:{ask('PCI_BUS_ID'):02x}:{ask('PCI_DEVICE_ID'):02x}.0"
    handle = (
        nvml if isinstance(nvml, Missing) else attempt(lambda: nvml.nvmlDeviceGetHandleByUUID(_uuid(driver, device)))
    )

    def of_nvml(get: Any) -> Any:
        return handle if isinstance(handle, Missing) else attempt(lambda: get(nvml, handle))

    others = ((other, driver.cuDeviceGet(other)) for other in range(count) if other != ordinal)
    return DeviceFacts(
        name=_text(driver.cuDeviceGetName(128, device)),
        total_nbytes=int(driver.cuDeviceTotalMem(device)),
        capability=(ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")),
        bus_id=bus_id,
        nvlinks=of_nvml(_nvlinks),
        pcie_lanes=of_nvml(_pcie_lanes),
        numa_node=attempt(partial(_numa_node, bus_id)),
        near_cpus=of_nvml(_near_cpus),
        peers=tuple(other for other, peer in others if driver.cuDeviceCanAccessPeer(device, peer)),
    )


def _text(found: Any) -> str:
    # Bytes that end with zeros, or text, by the version of the library.
    return (found.split(b"\0")[0].decode() if isinstance(found, bytes) else str(found)).strip()


def _uuid(driver: Driver, device: Any) -> str:
    digits = bytes(driver.cuDeviceGetUuid(device).bytes)[:16].hex()
    return "GPU-" + "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _nvlinks(nvml: Any, handle: Any) -> int:
    up = 0
    for link in range(nvml.NVML_NVLINK_MAX_LINKS):
        try:
            up += bool(nvml.nvmlDeviceGetNvLinkState(handle, link))
        except (nvml.NVMLError_InvalidArgument, nvml.NVMLError_NotSupported):
            # There are no more, or none at all.
            break
    return up


def _pcie_lanes(nvml: Any, handle: Any) -> tuple[int, int]:
    return int(nvml.nvmlDeviceGetCurrPcieLinkWidth(handle)), int(nvml.nvmlDeviceGetMaxPcieLinkWidth(handle))


def _near_cpus(nvml: Any, handle: Any) -> frozenset[int]:
    words = nvml.nvmlDeviceGetCpuAffinity(handle, _CPU_WORDS)
    return frozenset(64 * number + bit for number, word in enumerate(words) for bit in range(64) if word >> bit & 1)


def _numa_node(bus_id: str) -> int:
    return int(Path("/sys/bus/pci/devices", bus_id, "numa_node").read_text(encoding="ascii"))
