"""The DEVICE tier: objects in the memory of a GPU go down to HOST, and from there to DISK like everything else.

Theory of operation
-------------------
A device object goes down as the frames that distributed's serialization makes of it (which copies it to the host), and
these frames are a block of the HOST mover: they count in its ledger, and go on to DISK under its pressure. On the way
up the frames are read, if need be from DISK, and deserialized, which copies them to the device. So a
:class:`~dask_gpurt.memory.mover.Mover` for DEVICE over :class:`HostFrames` is all there is to it.

Covers: what is a device object, how much the device may hold, the copies on HOST.
Does not cover: failed allocations (RMM's failure callback), pinned memory, streams.

Nothing here imports a CUDA package unless there is one, and this module can be tested without any: whatever has
``__cuda_array_interface__``, and a way to be serialized, is a device object.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Hashable
from typing import Any

from dask_gpurt.errors import CorruptDataError
from dask_gpurt.memory import codec
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.lower import Copy, RawName
from dask_gpurt.memory.mover import Mover

__all__ = ["DeviceFrames", "HostFrames", "device_total_nbytes", "on_device"]

logger = logging.getLogger(__name__)

#: Packages whose tables and columns live on a device without having the array interface.
_TABLES = ("cudf", "pylibcudf")

#: Type -> whether its instances live on a device.
_known: dict[type, bool] = {}


def on_device(value: object) -> bool:
    """Whether ``value`` lives on a device.

    Examples
    --------
    >>> on_device([1, 2])
    False
    """
    kind = type(value)
    known = _known.get(kind)
    if known is None:
        known = hasattr(kind, "__cuda_array_interface__") or kind.__module__.partition(".")[0] in _TABLES
        if len(_known) < 10_000:  # types can be made in a loop
            _known[kind] = known
    return known


def device_total_nbytes() -> int | None:
    """Return the bytes of the device that this process uses; None if there is none."""
    try:
        runtime: Any = importlib.import_module("cupy").cuda.runtime
        return int(runtime.memGetInfo()[1])
    except ImportError:
        return None
    except Exception as error:  # noqa: BLE001 - CuPy's own error type cannot be named where there is no CuPy
        logger.debug("there is no usable device: %s", error)
        return None


class DeviceFrames(RawName):
    """Name of the frames of a device object to the HOST mover; equal only to itself."""

    __slots__ = ("key",)

    def __init__(self, key: Hashable) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<device frames of {self.key!r}>"


class _CopyOnHost:
    __slots__ = ("_header", "_host", "_name", "nbytes")

    tier = Tier.HOST

    def __init__(self, header: bytes, host: Mover, name: DeviceFrames, nbytes: int) -> None:
        self._header = header
        self._host = host
        self._name = name
        self.nbytes = nbytes

    def load(self) -> object:
        header, frames = self.frames()
        return codec.decode(header, frames)

    def frames(self) -> tuple[bytes, list[Any]]:
        try:
            frames: Any = self._host.get(self._name)
        except KeyError:
            raise CorruptDataError(f"the host's copy of {self._name.key!r} was lost") from None
        return self._header, list(frames)

    def remove(self) -> None:
        if self._name in self._host:
            self._host.delete(self._name)


class HostFrames:
    """The HOST tier as the one below DEVICE; see :class:`~dask_gpurt.memory.mover.Lower`.

    Parameters
    ----------
    host
        Holds the frames.
    """

    def __init__(self, host: Mover) -> None:
        self._host = host

    def store(self, name: Hashable, value: object) -> Copy:
        """Copy ``value`` to the host."""
        header, frames = codec.encode(value)
        host_name = DeviceFrames(name)
        self._host.put(host_name, frames)
        return _CopyOnHost(header, self._host, host_name, sum(memoryview(frame).nbytes for frame in frames))
