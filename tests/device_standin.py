"""A stand-in for libraries of arrays and of frames on a device, for machines without one.

The arrays lie in memory of the host, behind pointers that UCX takes for a device's, and nothing reads them by accident:
they are no NumPy arrays, have no buffer, and refuse to become either. What the device is asked for it does late, when it is
waited for: whoever reads a pointer before that finds noise. Copies to and from the host are counted, and memory can be made
scarce. The frames are pandas frames of another type, which are packed into such arrays. A worker imports
this module by the path that it has from its parent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from dask_gpurt.shuffle import device, tables
from dask_gpurt.shuffle.wire import WireError

__all__ = ["Array", "Frame", "Frames", "Library", "asarray", "asnumpy", "library"]


class Array:
    """An array that NumPy must not touch."""

    __slots__ = ("_memory",)
    __array_ufunc__ = None

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self._memory = memory

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError("implicit copy from the device")

    def __iter__(self) -> Any:
        raise TypeError("implicit copy from the device")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self._memory.__array_interface__, "version": 3, "mask": None}

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = self._memory.dtype
        return dtype

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self._memory.shape
        return shape

    @property
    def ndim(self) -> int:
        return self._memory.ndim

    @property
    def size(self) -> int:
        return self._memory.size

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def view(self, dtype: Any) -> Array:
        return Array(self._memory.view(dtype))

    def reshape(self, *shape: Any) -> Array:
        return Array(self._memory.reshape(*shape))

    def __getitem__(self, where: Any) -> Array:
        return Array(self._memory[where])

    def __setitem__(self, where: Any, value: Array) -> None:
        assert type(value) is Array, "implicit copy to the device"
        library().later(lambda: np.copyto(self._memory[where], value._memory))


class Library:
    """The library, and what was asked of it."""

    name = "device_standin"
    transports: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Bytes, and copies, to and from the host.
        self.up_nbytes = self.down_nbytes = 0
        self.ups = self.downs = 0
        self.synchronized = 0
        self.current: set[str] = set()
        #: Allocations that fail from now on.
        self.failing = 0
        #: What was asked for and is not done.
        self._pending: list[Callable[[], object]] = []

    def owns(self, value: object) -> bool:
        return type(value) is Array

    def empty(self, nbytes: int) -> Array:
        with self._lock:
            if self.failing:
                self.failing -= 1
                raise MemoryError("the device is full")
        return Array(np.full(nbytes, 0xA5, np.uint8))

    def later(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._pending.append(work)

    def concatenate(self, arrays: Sequence[Array]) -> Array:
        out = self.empty(sum(array.nbytes for array in arrays))
        self.later(lambda: np.concatenate([array._memory for array in arrays], out=out._memory))
        return out

    def from_host(self, data: memoryview) -> Array:
        with self._lock:
            self.ups += 1
            self.up_nbytes += data.nbytes
        array = self.empty(data.nbytes)
        self.later(lambda: np.copyto(array._memory, np.frombuffer(bytes(data), np.uint8)))
        return array

    def to_host(self, array: Array, out: memoryview) -> None:
        with self._lock:
            self.downs += 1
            self.down_nbytes += array.nbytes
        self._work_off()
        if out.nbytes:
            np.frombuffer(out, np.uint8)[...] = array._memory

    def synchronize(self) -> None:
        with self._lock:
            self.synchronized += 1
        self._work_off()

    @property
    def idle(self) -> bool:
        """Whether all that was asked for is done."""
        return not self._pending

    def _work_off(self) -> None:
        # In order, and nobody who waits goes on before it is done.
        with self._lock:
            for work in self._pending:
                work()
            self._pending.clear()

    def make_current(self) -> None:
        self.current.add(threading.current_thread().name)


def library() -> Library:
    """Return the library that is registered in this process."""
    found = device.library_named(Library.name)
    assert isinstance(found, Library)
    return found


def asarray(array: np.ndarray[Any, Any]) -> Array:
    """Copy to the device, uncounted."""
    return Array(np.array(array))


def asnumpy(array: Array) -> np.ndarray[Any, Any]:
    """Copy from the device, uncounted."""
    assert type(array) is Array, type(array)
    # Outputs are done when a task has them: other libraries may read them.
    return array._memory.copy()


@dask_serialize.register(Array)  # type: ignore[untyped-decorator]
def _serialize(array: Array) -> tuple[dict[str, Any], list[memoryview]]:
    return {"dtype": array.dtype.str, "shape": array.shape}, [np.ascontiguousarray(array._memory).data]


@dask_deserialize.register(Array)  # type: ignore[untyped-decorator]
def _deserialize(header: dict[str, Any], frames: list[Any]) -> Array:
    return Array(np.frombuffer(bytes(frames[0]), header["dtype"]).copy().reshape(header["shape"]))


device.register(Library())


class Frame(pd.DataFrame):  # type: ignore[misc]
    """A frame that is no pandas frame to those who look at its type."""

    @property
    def _constructor(self) -> type[Frame]:
        return Frame


class Frames:
    """The library of such frames."""

    name = "device_standin"

    def __init__(self) -> None:
        self.arrays: device.ArrayLibrary = library()

    def owns(self, value: object) -> bool:
        return type(value) is Frame

    def supports(self, meta: Any) -> bool:
        return all(dtype.kind in "iuf" for dtype in meta.dtypes)

    def split(self, frame: Any, column: Hashable, partitions: Sequence[int], meta: Any) -> list[tables.Piece]:
        if frame.isna().to_numpy().any():
            raise tables.UnsupportedFrameError("a missing value")
        pieces = []
        for partition in partitions:
            part = pd.DataFrame(frame[frame[column] == partition])[list(meta.columns)]
            if len(part):
                packed = pa.table({str(name): part[name] for name in part.columns} | {"__index__": part.index})
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, packed.schema) as writer:
                    writer.write_table(packed)
                array = asarray(np.frombuffer(sink.getvalue(), np.uint8))
                pieces.append(tables.Piece(int(partition), len(part), f"{len(part)} rows".encode(), array))
        return pieces

    def check(self, description: bytes, rows: int, nbytes: int, meta: Any) -> None:
        if description != f"{rows} rows".encode() or nbytes < rows * 8 * (len(meta.columns) + 1):
            raise WireError(f"{description!r} for {rows} rows of {len(meta.columns)} columns in {nbytes} bytes")

    def join(self, pieces: Sequence[tuple[bytes, Any]], meta: Any) -> Any:
        parts = []
        for description, array in pieces:
            part = pa.ipc.open_stream(pa.py_buffer(asnumpy(array))).read_all().to_pandas().set_index("__index__")
            assert description == f"{len(part)} rows".encode()
            parts.append(part)
        frame = pd.concat(parts).rename_axis(meta.index.name)
        return Frame(frame)


tables.register_frames(Frames())
