"""Arrays in the memory of a device: which libraries make them, and bodies of shards that lie there.

Covers: the few things that the shuffle asks of an array library (:class:`ArrayLibrary`), the register of libraries,
CuPy, and :class:`DeviceBody`.
Does not cover: what a body holds (:mod:`dask_gpurt.shuffle.bricks`, :mod:`dask_gpurt.shuffle.tables`); where bodies lie
until they are joined (:mod:`dask_gpurt.memory.shards`); how they travel (:mod:`dask_gpurt.shuffle.carrier`).

Theory of operation
    A body on a device is a flat array of bytes. It says by itself where it lies; the header before it says which
    library the output is to be made with, so a body may travel, and wait, on the host as well: small ones do
    (:data:`SMALL_NBYTES`), those that Dask's comms carry, and those for which the receiver's device had no room.

    *Order.* Kernels and copies of a device run behind the back of the thread that asked for them, and UCX asks for none of
    them. So the device is waited for at three points, each time for all that was asked of it: after a partition was
    split, for UCX or another thread may read the bodies next; after memory was taken for a body that UCX writes to,
    for what was freed there may still be in use by a kernel; and after an output was joined, for the bodies are freed
    then.

    Arrays are used as NumPy's are: ``view``, ``reshape``, slices, assignment to slices. A library is known by the name of
    the package that its arrays are defined in. What is not CuPy can be registered (:func:`register`), in each worker.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from dask.sizeof import sizeof
from distributed.protocol.cuda import cuda_deserialize, cuda_serialize
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from dask_gpurt.memory.store import Buffer, DeviceBuffer
from dask_gpurt.shuffle.libraries import Registry
from dask_gpurt.shuffle.wire import Header

__all__ = [
    "SMALL_NBYTES",
    "ArrayLibrary",
    "CupyLibrary",
    "DeviceBody",
    "allocate",
    "finish",
    "library_named",
    "library_of",
    "register",
]

#: Smaller bodies go by way of the host: UCX would not hold them back until their receiver is ready for them, and a copy of
#: that size costs as much as any other message to a device.
SMALL_NBYTES = 2**16

#: Lends so many bytes of host memory, for as long as somebody refers to the view.
Allocate = Callable[[int], memoryview]


class ArrayLibrary(Protocol):
    """What the shuffle asks of a library of arrays on a device. Any thread may ask.

    Attributes
    ----------
    name
        Name of the package of its arrays.
    transports
        Transports that UCX has to have found, for it to read and write the memory of this library.
    """

    name: str
    transports: frozenset[str]

    def owns(self, value: object) -> bool:
        """Whether ``value`` is an array of this library."""

    def empty(self, nbytes: int) -> Any:
        """Return a flat array of bytes with any content."""

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        """Return flat arrays of bytes as one."""

    def from_host(self, data: memoryview) -> Any:
        """Return a flat array with the bytes of ``data``, which is not to change before :meth:`synchronize`."""

    def to_host(self, array: Any, out: memoryview) -> None:
        """Copy a flat array of bytes to ``out``; it is there when this returns."""

    def synchronize(self) -> None:
        """Wait until the device has done all that it was asked for."""

    def make_current(self) -> None:
        """Make the device that of the thread that calls this, for others who use it there."""


class CupyLibrary:
    """CuPy, on the first device that the process sees; dask-cuda gives each worker one of its own."""

    name = "cupy"
    transports = frozenset({"cuda_copy"})

    def __init__(self) -> None:
        self._cupy: Any = importlib.import_module("cupy")

    def owns(self, value: object) -> bool:
        """Whether ``value`` is a CuPy array."""
        return type(value) is self._cupy.ndarray

    def empty(self, nbytes: int) -> Any:
        """Return memory of CuPy's allocator, which is RMM's where it was told so."""
        return self._cupy.empty(nbytes, dtype=np.uint8)

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        """Return flat arrays of bytes as one."""
        return self._cupy.concatenate(arrays)

    def from_host(self, data: memoryview) -> Any:
        """Copy to the device."""
        array = self.empty(data.nbytes)
        if data.nbytes:
            array.set(np.frombuffer(data, np.uint8))
        return array

    def to_host(self, array: Any, out: memoryview) -> None:
        """Copy from the device."""
        if out.nbytes:
            array.get(out=np.frombuffer(out, np.uint8))

    def synchronize(self) -> None:
        """Wait for all streams: tasks may have used others than this thread's."""
        self._cupy.cuda.Device().synchronize()

    def make_current(self) -> None:
        """Make the device's primary context current."""
        self._cupy.cuda.Device().use()
        self.synchronize()


_libraries: Registry[ArrayLibrary] = Registry("arrays", CupyLibrary.name, CupyLibrary)


def register(library: ArrayLibrary) -> None:
    """Make a library known in this process, in place of one of that name."""
    _libraries.add(library)


def library_named(name: str) -> ArrayLibrary:
    """Return a library; see :meth:`~dask_gpurt.shuffle.libraries.Registry.named`."""
    return _libraries.named(name)


def library_of(value: object) -> ArrayLibrary | None:
    """Return the library whose array ``value`` is; None if it is none that is known here.

    Examples
    --------
    >>> library_of(np.ones(3)) is None
    True
    """
    return _libraries.of(value)


class DeviceBody(DeviceBuffer):
    """A body on a device.

    Parameters
    ----------
    library
        Whose array it is.
    array
        A flat array of bytes.
    """

    __slots__ = ("array", "library")

    def __init__(self, library: ArrayLibrary, array: Any) -> None:
        super().__init__(int(array.nbytes))
        self.library = library
        self.array = array

    def __repr__(self) -> str:
        return f"<DeviceBody of {self.library.name}: {self.nbytes} bytes>"

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """By which UCX finds it."""
        interface: dict[str, Any] = self.array.__cuda_array_interface__
        return interface

    @classmethod
    def of_host(cls, library: ArrayLibrary, data: Buffer) -> DeviceBody:
        """Copy a body to the device; ``data`` has to stay until the device was waited for."""
        return cls(library, library.from_host(memoryview(data)))

    def on_host(self, lend: Allocate) -> memoryview:
        """Copy the body to the host."""
        out = lend(self.nbytes)
        self.library.to_host(self.array, out)
        return out


def allocate(wanted: Sequence[tuple[str, int]]) -> list[DeviceBody]:
    """Return bodies of these libraries and sizes that anybody may write to at once. Blocks while the device works.

    Raises
    ------
    MemoryError
        If the device has no room for them.
    LibraryMissingError
        If a library is missing.
    """
    libraries = {name: library_named(name) for name, _ in wanted}
    bodies = [DeviceBody(libraries[name], libraries[name].empty(nbytes)) for name, nbytes in wanted]
    for library in libraries.values():
        library.synchronize()
    return bodies


def finish(
    library: ArrayLibrary, shards: Sequence[tuple[str, Header, Any]], lend: Allocate
) -> list[tuple[str, Header, Any]]:
    """Wait until the bodies of ``shards`` can be read by anybody, and take the small ones to the host."""
    library.synchronize()
    return [
        (address, header, body.on_host(lend) if isinstance(body, DeviceBody) and body.nbytes < SMALL_NBYTES else body)
        for address, header, body in shards
    ]


def _lend(nbytes: int) -> memoryview:
    return np.empty(nbytes, np.uint8).data


# Going down to HOST, and up again, is what serialization does with it; see dask_gpurt.memory.device. Where the driver can copy it,
# the array goes as it is.


@sizeof.register(DeviceBody)  # type: ignore[untyped-decorator]
def _sizeof(body: DeviceBody) -> int:
    return body.nbytes


@cuda_serialize.register(DeviceBody)  # type: ignore[untyped-decorator]
def _serialize_in_place(body: DeviceBody) -> tuple[dict[str, str], list[Any]]:
    return {"library": body.library.name}, [body.array]


@cuda_deserialize.register(DeviceBody)  # type: ignore[untyped-decorator]
def _deserialize_in_place(header: dict[str, str], frames: list[Any]) -> DeviceBody:
    return DeviceBody(library_named(header["library"]), frames[0])


@dask_serialize.register(DeviceBody)  # type: ignore[untyped-decorator]
def _serialize(body: DeviceBody) -> tuple[dict[str, str], list[memoryview]]:
    return {"library": body.library.name}, [body.on_host(_lend)]


@dask_deserialize.register(DeviceBody)  # type: ignore[untyped-decorator]
def _deserialize(header: dict[str, str], frames: list[Any]) -> DeviceBody | memoryview:
    library = library_named(header["library"])
    try:
        body = DeviceBody.of_host(library, frames[0])
    except MemoryError:
        # The bytes are not lost. Where the output is made they are copied up, or the task fails with this error.
        return memoryview(frames[0])
    library.synchronize()
    return body
