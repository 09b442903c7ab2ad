"""The emulated driver keeps its promises: otherwise what is tested on it says nothing."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from cuda_emulation import counted, emulated, set_driver

pytest.importorskip("cuda.bindings.driver")

NBYTES = 2**16


def ok(answer: Any) -> Any:
    """Return what a call of the driver gave."""
    error, *found = answer
    assert int(error) == 0, error
    return found[0] if len(found) == 1 else tuple(found)


def opened() -> Any:
    """Return the driver, with the context of the first device current."""
    from cuda.bindings import driver

    ok(driver.cuInit(0))
    ok(driver.cuCtxSetCurrent(ok(driver.cuDevicePrimaryCtxRetain(0))))
    return driver


def pinned(driver: Any, nbytes: int = NBYTES) -> np.ndarray[Any, Any]:
    """Return page-locked memory, which is never freed."""
    address = int(ok(driver.cuMemHostAlloc(nbytes, 0)))
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


@emulated(devices=3, CUDA_VISIBLE_DEVICES="2,0,7,1")
def test_it_shows_the_devices_that_are_visible_and_says_what_it_is() -> None:
    driver = opened()
    assert ok(driver.cuDeviceGetCount()) == 2
    names = [ok(driver.cuDeviceGetName(99, device)).rstrip(b" \0") for device in range(2)]
    assert names == [b"Emulated device 2 (no GPU)", b"Emulated device 0 (no GPU)"]
    for library in ("rmm", "cupy"):
        with pytest.raises(ModuleNotFoundError, match="is not used with the emulated"):
            __import__(library)
    # What NVIDIA's runtime asks first.
    assert int(driver.cuGetProcAddress(b"cuGetExportTable", 13000, 0)[0]) != 0


@emulated(capacity=2**20)
def test_memory_is_limited_and_the_host_cannot_touch_it() -> None:
    driver = opened()
    first = int(ok(driver.cuMemAlloc(2**19)))
    second = int(ok(driver.cuMemAlloc(2**18)))
    third = int(ok(driver.cuMemAlloc(2**18)))
    assert int(driver.cuMemAlloc(1)[0]) == 2, "out of memory"
    ok(driver.cuMemFree(first))
    ok(driver.cuMemFree(third))
    assert ok(driver.cuMemGetInfo()) == (2**19 + 2**18, 2**20)
    assert int(driver.cuMemAlloc(2**19 + 2**18)[0]) == 2, "fragmented"
    assert tuple(map(int, ok(driver.cuMemGetAddressRange(second + 5)))) == (second, 2**18)
    host = np.zeros(4, np.uint8)
    ok(driver.cuMemcpyDtoH(host.ctypes.data, second, 4))
    assert host.tolist() == [0xA5] * 4
    assert int(driver.cuMemcpyDtoH(host.ctypes.data, second + 2**18 - 2, 4)[0]) == 1, "beyond its end"
    assert int(driver.cuMemFree(first)[0]) == 1, "freed twice"
    set_driver(fail_alloc=2)
    ok(driver.cuMemAlloc(8))
    assert int(driver.cuMemAlloc(8)[0]) == 2
    ok(driver.cuMemAlloc(8))
    code = (
        "import ctypes; from cuda.bindings import driver as d; d.cuInit(0);"
        "d.cuCtxSetCurrent(d.cuDevicePrimaryCtxRetain(0)[1]); ctypes.string_at(int(d.cuMemAlloc(4096)[1]), 8)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGSEGV


def overtaken(driver: Any, wait: Any) -> int:
    """Count how often what one stream wrote was not there yet when another read it."""
    source, target = pinned(driver), pinned(driver)
    device = ok(driver.cuMemAlloc(NBYTES))
    ones, others = (ok(driver.cuStreamCreate(1)) for _ in range(2))
    late = 0
    for number in range(40):
        source[:] = number + 1
        ok(driver.cuMemcpyHtoDAsync(device, source.ctypes.data, NBYTES, ones))
        wait(ones, others)
        ok(driver.cuMemcpyDtoHAsync(target.ctypes.data, device, NBYTES, others))
        ok(driver.cuStreamSynchronize(others))
        late += int((target != number + 1).any())
        ok(driver.cuStreamSynchronize(ones))
    return late


@emulated(lag_us=2000)
def test_streams_overtake_each_other_unless_one_waits_for_the_other() -> None:
    driver = opened()

    def by_event(ones: Any, others: Any) -> None:
        event = ok(driver.cuEventCreate(2))
        ok(driver.cuEventRecord(event, ones))
        ok(driver.cuStreamWaitEvent(others, event, 0))
        ok(driver.cuEventDestroy(event))

    assert overtaken(driver, by_event) == 0
    assert overtaken(driver, lambda ones, others: None) > 0
    # Page-locked memory is read when the copy runs.
    host, device = pinned(driver), ok(driver.cuMemAlloc(NBYTES))
    stream = ok(driver.cuStreamCreate(1))
    spoiled = 0
    for number in range(20):
        host[:] = number + 1
        ok(driver.cuMemcpyHtoDAsync(device, host.ctypes.data, NBYTES, stream))
        host[:] = 0
        ok(driver.cuStreamSynchronize(stream))
        back = np.empty(NBYTES, np.uint8)
        ok(driver.cuMemcpyDtoH(back.ctypes.data, device, NBYTES))
        spoiled += int((back != number + 1).any())
    assert spoiled > 0


@emulated(lag_us=1000)
def test_the_legacy_stream_comes_after_the_blocking_ones_and_they_after_it() -> None:
    driver = opened()
    source, device = pinned(driver), ok(driver.cuMemAlloc(NBYTES))
    blocking = ok(driver.cuStreamCreate(0))
    for number in range(20):
        source[:] = number + 1
        ok(driver.cuMemcpyHtoDAsync(device, source.ctypes.data, NBYTES, blocking))
        back = np.empty(NBYTES, np.uint8)
        ok(driver.cuMemcpyDtoH(back.ctypes.data, device, NBYTES))
        assert (back == number + 1).all()
        ok(driver.cuMemsetD8Async(device, 200, NBYTES, 0))
        ok(driver.cuMemcpyDtoHAsync(source.ctypes.data, device, NBYTES, blocking))
        ok(driver.cuStreamSynchronize(blocking))
        assert (source == 200).all()


@emulated(pinned_limit=2 * NBYTES)
def test_copies_fail_and_pinned_memory_is_limited_when_asked_to() -> None:
    driver = opened()
    host, device = np.empty(NBYTES, np.uint8), ok(driver.cuMemAlloc(NBYTES))
    ok(driver.cuMemHostRegister(host.ctypes.data, NBYTES, 0))
    pinned(driver)
    more = np.empty(NBYTES, np.uint8)
    assert int(driver.cuMemHostRegister(more.ctypes.data, NBYTES, 0)[0]) == 2
    assert int(driver.cuMemHostRegister(host.ctypes.data, 10, 0)[0]) == 712, "registered already"
    ok(driver.cuMemHostUnregister(host.ctypes.data))
    assert int(driver.cuMemHostUnregister(host.ctypes.data)[0]) == 713
    assert counted("pinned") == NBYTES
    set_driver(fail_copy=1)
    stream = ok(driver.cuStreamCreate(1))
    ok(driver.cuMemcpyHtoDAsync(device, host.ctypes.data, NBYTES, stream))
    assert int(driver.cuStreamSynchronize(stream)[0]) == 214
    ok(driver.cuStreamSynchronize(stream))
