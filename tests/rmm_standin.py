"""A stand-in for RMM and a device with little memory, for machines without one.

It has what dask-gpurt asks of ``rmm.mr``, under the same names, and allocates as RMM does: through the current resource and
all that stands below it, of which an adaptor for failures calls back until it is told not to try again. Arrays that are made
by it give their memory back when the last one lets go of them; distributed can copy them to the host. A worker imports this
module by the path that it has from its parent.
"""

from __future__ import annotations

import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from distributed.protocol.serialize import dask_deserialize, dask_serialize

__all__ = ["Array", "Device", "Resource", "device", "plant"]


class Device:
    """Memory, and how much of it is used."""

    def __init__(self, total_nbytes: int) -> None:
        self.total_nbytes = total_nbytes
        self.used_nbytes = 0
        #: How many allocations have succeeded.
        self.count = 0
        #: Bytes that are free and of no use, for they lie in pieces; half of them join others whenever something is freed.
        self.fragments_nbytes = 0
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> bool:
        """Use ``nbytes`` more, if they are there."""
        with self._lock:
            if self.used_nbytes + self.fragments_nbytes + nbytes > self.total_nbytes:
                return False
            self.used_nbytes += nbytes
            self.count += 1
            return True

    def give(self, nbytes: int) -> None:
        """Give bytes back."""
        with self._lock:
            self.used_nbytes -= nbytes
            self.fragments_nbytes //= 2


class Resource:
    """All of RMM's resources and adaptors that are needed."""

    def __init__(self, upstream_mr: Resource | Device, callback: Callable[[int], bool] | None = None) -> None:
        self.upstream_mr = upstream_mr
        self.callback = callback

    @property
    def allocation_counts(self) -> Any:
        """What an adaptor for statistics counts."""
        on = self.device
        return types.SimpleNamespace(total_count=on.count, current_bytes=on.used_nbytes)

    @property
    def device(self) -> Device:
        """The device below."""
        return self.upstream_mr if isinstance(self.upstream_mr, Device) else self.upstream_mr.device

    def allocate(self, nbytes: int) -> None:
        """Take memory of the device; MemoryError if there is none."""
        if isinstance(self.upstream_mr, Device):
            if not self.upstream_mr.take(nbytes):
                raise MemoryError("std::bad_alloc: out_of_memory")
            return
        while True:
            try:
                self.upstream_mr.allocate(nbytes)
            except MemoryError:
                if self.callback is None or not self.callback(nbytes):
                    raise
            else:
                return


class Array:
    """Bytes on the device, all of which are the same number."""

    def __init__(self, number: int, nbytes: int) -> None:
        sys.modules["rmm"].mr.get_current_device_resource().allocate(nbytes)
        self.number = number
        self.nbytes = nbytes
        weakref.finalize(self, device().give, nbytes).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (0, False), "version": 3}

    def __sizeof__(self) -> int:
        return self.nbytes


@dask_serialize.register(Array)  # type: ignore[untyped-decorator]
def _to_host(array: Array) -> tuple[dict[str, Any], list[Any]]:
    return {}, [np.full(array.nbytes, array.number, dtype="u1").data]


@dask_deserialize.register(Array)  # type: ignore[untyped-decorator]
def _to_device(header: dict[str, Any], frames: list[Any]) -> Array:
    (frame,) = frames
    return Array(int(frame[0]), memoryview(frame).nbytes)


def plant(total_nbytes: int) -> Any:
    """Put the stand-in where RMM is imported from; returns it."""
    package: Any = types.ModuleType("rmm")
    mr: Any = types.ModuleType("rmm.mr")
    mr.device = Device(total_nbytes)
    mr.current = Resource(mr.device)
    mr.get_current_device_resource = lambda: mr.current
    mr.set_current_device_resource = lambda resource: setattr(mr, "current", resource)
    mr.FailureCallbackResourceAdaptor = mr.StatisticsResourceAdaptor = Resource
    mr.available_device_memory = lambda: (mr.device.total_nbytes - mr.device.used_nbytes, mr.device.total_nbytes)
    package.mr = mr
    sys.modules["rmm"], sys.modules["rmm.mr"] = package, mr
    return mr


def device() -> Device:
    """The device of the stand-in that was planted."""
    found: Device = sys.modules["rmm.mr"].device
    return found
