"""The driver of CUDA, as far as the DEVICE tier needs it: copies between a device and the host, and page-locked memory.

Theory of operation
-------------------
Everything is asked of the driver's own interface (``cuda.bindings.driver``), which is below all libraries: to it the memory of
CuPy, Numba, RMM and cuDF is the same. The device is the first that the process sees; dask-cuda gives each worker one of its own.
Its primary context, which all libraries use, is retained at the first copy: a worker that never copies takes no memory there.

*Order.* A copy goes by a stream of its own, which no kernel waits in. It comes after all that was asked of the device before:
of the legacy default stream, which itself comes after every blocking stream of every thread (per-thread default streams too), and
of the stream that the array names, which may be a non-blocking one. An array that was written to by yet another non-blocking
stream, which it does not name, is one that no task could use either. The host waits for the copy before anybody hears of it, so
that whoever reads the copy, or frees the original, needs not know of streams.

Whoever waits does so in the driver, without the GIL, and sleeping.

Covers: :class:`Device`; :class:`Copier`, the copies of one move; :class:`Pinner`; :class:`Driver`.
Does not cover: what is copied when (:mod:`dask_gpurt.memory.device`); several devices in one process: what lies on the others goes
by the serialization of its library.

Nothing here imports a CUDA package unless there is a driver. Thread-safe; all methods block.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from dask_gpurt.errors import GpurtError

__all__ = ["Copier", "CudaError", "Device", "Driver", "Extent", "Pinner", "is_out_of_memory"]

logger = logging.getLogger(__name__)

#: CUDA_ERROR_OUT_OF_MEMORY
OUT_OF_MEMORY = 2
#: CU_STREAM_LEGACY, and CU_STREAM_PER_THREAD: the handles that are no streams of their own. The latter means another stream in
#: each thread; the legacy one comes after all of them.
LEGACY_STREAM = 1
PER_THREAD_STREAM = 2


class CudaError(GpurtError, RuntimeError):
    """The driver refused, or an operation failed on the device.

    Parameters
    ----------
    name
        What the driver calls the error.
    code
        Its number.
    """

    def __init__(self, name: str, code: int) -> None:
        super().__init__(name, code)
        self.name = name
        self.code = code

    def __str__(self) -> str:
        return f"{self.name} ({self.code})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a library says by ``error`` that a device has no memory left.

    Examples
    --------
    >>> is_out_of_memory(MemoryError()), is_out_of_memory(CudaError("CUDA_ERROR_OUT_OF_MEMORY", 2))
    (True, True)
    """
    # CuPy and RMM raise kinds of MemoryError, as NumPy does for the host; Numba an error of the driver's with its number.
    kind = type(error)
    if isinstance(error, MemoryError):
        return kind.__module__.partition(".")[0] != "numpy"
    return kind.__name__ in ("CudaAPIError", "CudaError") and getattr(error, "code", None) == OUT_OF_MEMORY


class Extent(NamedTuple):
    """Where contiguous memory on a device lies."""

    address: int
    nbytes: int
    #: The stream that wrote it last, as far as it is told; None: one of the default streams.
    stream: int | None

    @classmethod
    def of(cls, array: Any) -> Extent | None:
        """Read the interface of ``array``; None if it is not contiguous."""
        interface = array.__cuda_array_interface__
        item_nbytes = np.dtype(interface["typestr"]).itemsize
        nbytes = item_nbytes
        for length in interface["shape"]:
            nbytes *= length
        strides = interface.get("strides")
        if strides is not None and nbytes:
            expected = item_nbytes
            for length, stride in zip(reversed(interface["shape"]), reversed(strides), strict=True):
                if length > 1 and stride != expected:
                    return None
                expected *= length
        return cls(int(interface["data"][0] or 0), nbytes, interface.get("stream"))


class Driver:
    """``cuda.bindings.driver``, with errors raised."""

    def __init__(self, driver: Any) -> None:
        #: Its constants.
        self.names = driver

    @classmethod
    def load(cls) -> Driver:
        """Return the driver, ready to be used.

        Raises
        ------
        OSError
            If there is none.
        ImportError
            If there is no ``cuda-bindings`` to use it by.
        CudaError
            If it finds no device.
        """
        # Before anything large is imported.
        ctypes.CDLL("libcuda.so.1")
        from cuda.bindings import driver

        loaded = cls(driver)
        loaded.cuInit(0)
        return loaded

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.names, name)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            error, *found = function(*args)
            if error:
                raise CudaError(getattr(error, "name", "CUDA_ERROR"), int(error))
            return found[0] if found else None

        setattr(self, name, call)
        return call


class Device:
    """A device that this process sees; the tiers use the first, see :meth:`find`.

    Parameters
    ----------
    driver
        The driver.
    ordinal
        Its number in this process.
    """

    def __init__(self, driver: Driver, ordinal: int = 0) -> None:
        self._driver = driver
        self._number = self._driver.cuDeviceGet(ordinal)
        #: Bytes of memory that it has.
        self.total_nbytes = int(self._driver.cuDeviceTotalMem(self._number))
        # A garbage collection, which comes at any moment, may unlock memory in the thread that holds it.
        self._lock = threading.RLock()
        self._context: Any = None
        self._idle_streams: list[Any] = []

    def __repr__(self) -> str:
        return f"<Device {self.name!r}, {self.total_nbytes} bytes>"

    @property
    def name(self) -> str:
        """What it calls itself."""
        return str(self._driver.cuDeviceGetName(128, self._number).split(b"\0")[0].decode().strip())

    @staticmethod
    def find() -> Device | None:
        """Return the first device; None if there is none, or no ``cuda-bindings`` to use it by."""
        try:
            return Device(Driver.load())
        except (OSError, ImportError, CudaError) as error:
            logger.debug("there is no CUDA device that can be used: %s", error)
            return None

    @property
    def context(self) -> Any:
        """Its primary context, which is retained when it is first asked for."""
        with self._lock:
            if self._context is None:
                self._context = self._driver.cuDevicePrimaryCtxRetain(self._number)
            return self._context

    @contextmanager
    def current(self) -> Iterator[Any]:
        """Have the primary context current in this thread; yields the driver."""
        self._driver.cuCtxPushCurrent(self.context)
        try:
            yield self._driver
        finally:
            self._driver.cuCtxPopCurrent()

    def use(self) -> None:
        """Have the primary context current in this thread from now on."""
        self._driver.cuCtxSetCurrent(self.context)

    def holds(self, extent: Extent) -> bool:
        """Whether that memory is on this device."""
        if not extent.nbytes:
            return True
        names = self._driver.names
        try:
            ordinal = self._driver.cuPointerGetAttribute(
                names.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, extent.address
            )
        except CudaError:
            return False
        return int(ordinal) == int(self._number)

    @contextmanager
    def copying(self, after: Iterable[int | None]) -> Iterator[Copier]:
        """Copy within, after all that was asked of the default streams and of those in ``after``.

        At the end, however it comes, all copies are done.

        Raises
        ------
        CudaError
            If one of them failed.
        """
        with self.current() as driver:
            with self._lock:
                stream = self._idle_streams.pop() if self._idle_streams else None
            if stream is None:
                stream = driver.cuStreamCreate(driver.names.CUstream_flags.CU_STREAM_NON_BLOCKING)
            copier = Copier(driver, stream, self.context)
            try:
                others = {handle for handle in after if handle not in (None, 0, LEGACY_STREAM, PER_THREAD_STREAM)}
                for handle in (LEGACY_STREAM, *others):
                    copier.come_after(handle)
                yield copier
            except BaseException:
                # What is under way reads and writes memory that is given up now.
                with contextlib.suppress(CudaError):
                    copier.finish()
                raise
            else:
                copier.finish()
            finally:
                with self._lock:
                    self._idle_streams.append(stream)


class Copier:
    """Copies by one stream; see :meth:`Device.copying`."""

    def __init__(self, driver: Any, stream: Any, context: Any) -> None:
        self._driver = driver
        self._stream = stream
        self._context = context
        flags = driver.names.CUevent_flags
        #: Who waits for an event sleeps, and nobody asks when it was.
        self._event_flags = flags.CU_EVENT_DISABLE_TIMING | flags.CU_EVENT_BLOCKING_SYNC
        self._events: list[Any] = []

    def come_after(self, stream: Any) -> None:
        """Let what follows wait for what was asked of ``stream`` so far."""
        self._driver.cuStreamWaitEvent(self._stream, self._mark(stream), 0)

    def to_host(self, target: memoryview, address: int) -> Any:
        """Begin to fill ``target`` from the device; returns what :meth:`wait` takes."""
        self._driver.cuMemcpyDtoHAsync(_address(target), address, target.nbytes, self._stream)
        return self._mark(self._stream)

    def to_device(self, address: int, source: memoryview) -> None:
        """Begin to copy ``source`` to the device. It must stay as it is until :meth:`finish`."""
        self._driver.cuMemcpyHtoDAsync(address, _address(source), source.nbytes, self._stream)

    def within(self, target: int, source: int, nbytes: int) -> None:
        """Begin to copy from one place on the device to another."""
        self._driver.cuMemcpyDtoDAsync(target, source, nbytes, self._stream)

    def from_peer(self, target: int, source: int, nbytes: int, peer: Device) -> None:
        """Begin to copy from another device of this process."""
        self._driver.cuMemcpyPeerAsync(target, self._context, source, peer.context, nbytes, self._stream)

    def wait(self, mark: Any) -> None:
        """Wait for a copy."""
        self._driver.cuEventSynchronize(mark)

    def finish(self) -> None:
        """Wait for all copies."""
        try:
            self._driver.cuEventSynchronize(self._mark(self._stream))
        finally:
            while self._events:
                self._driver.cuEventDestroy(self._events.pop())

    def _mark(self, stream: Any) -> Any:
        event = self._driver.cuEventCreate(self._event_flags)
        self._events.append(event)
        self._driver.cuEventRecord(event, stream)
        return event


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


class Pinner:
    """Page-locks memory of the host, up to a limit, so that a device copies from and to it by itself.

    Where the system refuses (``ulimit -l``, no memory), one warning is logged, and memory stays pageable: copies are slower then,
    for the driver makes them by way of memory of its own.

    Parameters
    ----------
    device
        The device.
    limit_nbytes
        Bytes that may be page-locked at a time: the system can do nothing else with them.
    """

    def __init__(self, device: Device, limit_nbytes: int) -> None:
        self._device = device
        self.limit_nbytes = limit_nbytes
        # As above.
        self._lock = threading.RLock()
        #: Bytes that are page-locked.
        self.nbytes = 0
        self._warned = False

    def __repr__(self) -> str:
        return f"<Pinner {self.nbytes} of {self.limit_nbytes} bytes>"

    def pin(self, memory: mmap.mmap, offset: int, nbytes: int) -> object | None:
        """Page-lock ``memory`` from ``offset`` on, until the object that is returned is no more; None if that cannot be."""
        with self._lock:
            if self.nbytes + nbytes > self.limit_nbytes:
                return None
            self.nbytes += nbytes
        try:
            with self._device.current() as driver:
                address = _address(memoryview(memory)) + offset
                driver.cuMemHostRegister(address, nbytes, driver.names.CU_MEMHOSTREGISTER_PORTABLE)
        except CudaError as error:
            with self._lock:
                self.nbytes -= nbytes
                warned, self._warned = self._warned, True
            if not warned:
                logger.warning("Memory cannot be page-locked, copies to and from the device are slower: %s", error)
            return None
        return _Pinned(self, memory, address, nbytes)

    def unpin(self, address: int, nbytes: int) -> None:
        """Let go of what :meth:`pin` locked."""
        try:
            with self._device.current() as driver:
                driver.cuMemHostUnregister(address)
        except CudaError as error:
            # The driver is on its way out, or the device has failed: both take the lock with them.
            logger.debug("memory at %#x is not unlocked: %s", address, error)
        with self._lock:
            self.nbytes -= nbytes


class _Pinned:
    """Keeps memory page-locked, and mapped as long as it is."""

    __slots__ = ("_address", "_memory", "_nbytes", "_pinner")

    def __init__(self, pinner: Pinner, memory: mmap.mmap, address: int, nbytes: int) -> None:
        self._pinner = pinner
        self._memory = memory
        self._address = address
        self._nbytes = nbytes

    def __del__(self) -> None:
        # At the end of the process the system lets go of everything, and the driver may be gone.
        if not sys.is_finalizing():
            self._pinner.unpin(self._address, self._nbytes)
