"""The DEVICE tier: objects in the memory of a GPU go down to HOST, and from there to DISK like everything else.

Theory of operation
-------------------
A device object goes down as the frames that distributed's own ``cuda`` serialization makes of it: a header, and flat arrays that
lie where the object lies, whatever library it is of. The frames are copied to blocks of the host by the driver
(:mod:`dask_gpurt.memory.cuda`), and the blocks are a block of the HOST mover: they count in its ledger, and go on to DISK under its
pressure. On the way up the blocks are read, if need be from DISK, and copied to arrays that the library of the object allocates, of
which that serialization makes the object again. So a :class:`~dask_gpurt.memory.mover.Mover` for DEVICE over :class:`HostFrames` is
all there is to it.

A large frame is copied in pieces (:data:`PIECE_NBYTES`), and the checksum of one is computed while the next is on its way. The
checksums stay with the copy; what comes up is compared with them while it is being copied, and not returned if it differs.

An object of a type for which distributed has no ``cuda`` serialization, or that lies on another device, goes down as what its
library makes of it for the host, as with stock.

Where the device has no memory for what comes up, as others use it too, the mover is asked to make room, here and now. If
that does not help, nothing is lost: the copy below stays, and who wanted the object gets
:class:`~dask_gpurt.errors.DeviceFullError`.

Covers: what is a device object, how much the device may hold, the copies on HOST.
Does not cover: allocations of tasks that fail (:mod:`dask_gpurt.memory.rmm`).

Nothing here imports a CUDA package unless there is one, and this module can be tested without any: whatever has
``__cuda_array_interface__``, and a way to be serialized, is a device object.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import xxhash

from dask_gpurt.errors import CorruptDataError, DeviceFullError, SpillError
from dask_gpurt.memory import codec
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cuda import CudaError, Device, Extent, Pinner, is_out_of_memory
from dask_gpurt.memory.horizon import Horizon
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.lower import Copy, RawName
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.shards import DeviceChunkName
from dask_gpurt.memory.spiller import Spiller
from dask_gpurt.memory.store import DeviceBuffer

__all__ = ["DeviceFrames", "HostFrames", "device_mover", "on_device", "pinned_pool"]

T = TypeVar("T")

#: How much is copied between two looks at it. At 50 GB/s a third of a millisecond: long beside what it takes to begin a copy.
PIECE_NBYTES = 16 * 2**20
#: Page-locked memory for what goes to a device and comes from it: part of the HOST limit, and bytes at most. The system can do
#: nothing else with it; blocks are used again, so that it need not hold all that is on HOST.
PINNED_FRACTION = 1 / 4
PINNED_NBYTES_MAX = 8 * 2**30
#: How often room is made for one allocation before it is given up: others may take the room in between.
ALLOCATION_TRIES = 10

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
        known = hasattr(kind, "__cuda_array_interface__") or _package(value) in _TABLES
        if len(_known) < 10_000:  # types can be made in a loop
            _known[kind] = known
    return known


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]


# How each library makes a flat array of bytes, with its own allocator.


def _cupy(nbytes: int) -> Any:
    return importlib.import_module("cupy").empty(nbytes, "u1")


def _numba(nbytes: int) -> Any:
    return importlib.import_module("numba.cuda").device_array(nbytes, "u1")


def _rmm(nbytes: int) -> Any:
    return importlib.import_module("rmm").DeviceBuffer(size=nbytes)


_ALLOCATORS: dict[str, Callable[[int], Any]] = {
    "cupy": _cupy,
    "numba": _numba,
    "rmm": _rmm,
    # Its buffers are RMM's.
    "cudf": _rmm,
    "pylibcudf": _rmm,
}


class DeviceFrames(RawName):
    """Name of the frames of a device object to the HOST mover; equal only to itself."""

    __slots__ = ("key",)

    def __init__(self, key: Hashable) -> None:
        self.key = key

    def __repr__(self) -> str:
        return f"<device frames of {self.key!r}>"


class _Origin(NamedTuple):
    """Where a frame came from, and goes back to."""

    #: The library that allocates it.
    package: str
    #: Of its pieces.
    digests: list[int]


class _CopyOnHost:
    __slots__ = ("_header", "_may_stay", "_name", "_origins", "_store", "nbytes")

    tier = Tier.HOST

    def __init__(
        self,
        store: HostFrames,
        header: bytes,
        name: DeviceFrames,
        origins: Sequence[_Origin | None],
        nbytes: int,
        *,
        may_stay: bool,
    ) -> None:
        self._store = store
        self._header = header
        self._name = name
        #: None: a frame that is one of the host.
        self._origins = origins
        self._may_stay = may_stay
        self.nbytes = nbytes

    def load(self) -> object:
        lowered = self._read()
        try:
            frames = self._store.raise_frames(self._name, lowered, self._origins)
        except DeviceFullError:
            if not self._may_stay:
                raise
            (body,) = lowered
            return memoryview(body)
        # A library that was not asked for frames may allocate here.
        return self._store.with_room(self._name, self.nbytes, lambda: codec.decode(self._header, frames))

    def frames(self) -> tuple[bytes, list[Any]] | None:
        # What was made for a device is of no use to a peer on the host.
        return None if any(self._origins) else (self._header, self._read())

    def _read(self) -> list[Any]:
        try:
            frames: Any = self._store.host.get(self._name)
        except KeyError:
            raise CorruptDataError(f"the host's copy of {self._name.key!r} was lost") from None
        return list(frames)

    def remove(self) -> None:
        if self._name in self._store.host:
            self._store.host.delete(self._name)


class HostFrames:
    """The HOST tier as the one below DEVICE; see :class:`~dask_gpurt.memory.mover.Lower`.

    Parameters
    ----------
    host
        Holds the frames.
    device
        Copies them; None: their libraries do.
    lease
        Lends the memory of the host that they are copied to.
    """

    def __init__(
        self, host: Mover, device: Device | None = None, lease: Callable[[int], memoryview] | None = None
    ) -> None:
        self.host = host
        self._device = device
        self._lease = lease or (lambda nbytes: memoryview(bytearray(nbytes)))
        #: Is asked to make so much room on the device; says how much it made.
        self.relieve: Callable[[int], int] = lambda nbytes: 0  # noqa: ARG005

    def store(self, name: Hashable, value: object) -> Copy:
        """Copy ``value`` to the host."""
        dtype = getattr(value, "dtype", None)
        if getattr(dtype, "names", None):
            # Of a type, distributed's serialization keeps what the array interface says, which is the size of a row.
            raise TypeError(f"distributed's serialization would lose the fields of {dtype}")
        try:
            header, frames, origins = self._lowered(value)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # To be put together in one piece, a view with gaps needs memory itself. Later, perhaps.
            raise SpillError(f"cannot take {name!r} from the device, which is full: {error}") from None
        host_name = DeviceFrames(name)
        self.host.put(host_name, frames)
        nbytes = sum(memoryview(frame).nbytes for frame in frames)
        return _CopyOnHost(self, header, host_name, origins, nbytes, may_stay=isinstance(value, DeviceBuffer))

    # Down

    def _lowered(self, value: object) -> tuple[bytes, list[Any], Sequence[_Origin | None]]:
        lowered = None if self._device is None else self._lower(self._device, value)
        if lowered is None:
            header, frames = codec.encode(value)
            lowered = header, frames, [None] * len(frames)
        return lowered

    def _lower(self, device: Device, value: object) -> tuple[bytes, list[Any], list[_Origin | None]] | None:
        """Copy ``value`` to the host; None if it is none that the driver can copy as it lies."""
        with device.current():
            # Whoever serializes it may ask the driver for something.
            header, frames = codec.encode(value, on_device=True)
        extents: list[Extent | None] = []
        for frame in frames:
            extent = None
            if on_device(frame):
                extent = Extent.of(frame) if hasattr(frame, "__cuda_array_interface__") else None
                if extent is None or _package(frame) not in _ALLOCATORS or not device.holds(extent):
                    return None
            extents.append(extent)
        origins: list[_Origin | None] = [
            None if extent is None else _Origin(_package(frame), [])
            for frame, extent in zip(frames, extents, strict=True)
        ]
        lowered = [
            frame if extent is None else self._lease(extent.nbytes)
            for frame, extent in zip(frames, extents, strict=True)
        ]
        try:
            # The object knows its stream; the frames, which were made of it just now, may not.
            streams = {extent.stream for extent in extents if extent is not None} | {_stream_of(value)}
            with device.copying(streams) as copier:
                moves = [
                    (copier.to_host(piece, extent.address + begin), piece, origin.digests)
                    for view, extent, origin in zip(lowered, extents, origins, strict=True)
                    if extent is not None and origin is not None
                    for begin, piece in _pieces(view)
                ]
                for mark, piece, digests in moves:
                    copier.wait(mark)
                    digests.append(xxhash.xxh3_64_intdigest(piece))
        except CudaError as error:
            raise SpillError(f"cannot copy {type(value).__qualname__} from the device: {error}") from error
        return header, lowered, origins

    # Up

    def raise_frames(self, name: DeviceFrames, frames: Sequence[Any], origins: Sequence[_Origin | None]) -> list[Any]:
        """Copy those of ``frames`` that came from a device to where they came from.

        Raises
        ------
        CorruptDataError
            If they are not what went down.
        DeviceFullError
            If there is no room for them.
        SpillError
            If the device fails.
        """
        device = self._device
        if device is None or not any(origins):
            return list(frames)
        with device.current():
            raised = [
                frame if origin is None else self._allocated(name, origin.package, memoryview(frame).nbytes)
                for frame, origin in zip(frames, origins, strict=True)
            ]
        extents = [None if origin is None else Extent.of(r) for r, origin in zip(raised, origins, strict=True)]
        try:
            with device.copying(extent.stream for extent in extents if extent is not None) as copier:
                for frame, extent in zip(frames, extents, strict=True):
                    if extent is not None and extent.nbytes:
                        copier.to_device(extent.address, memoryview(frame).cast("B"))
                for number, (frame, origin) in enumerate(zip(frames, origins, strict=True)):
                    if origin is not None and _digests(frame) != origin.digests:
                        raise CorruptDataError(f"frame {number} of {name.key!r} does not match its checksum")
        except CudaError as error:
            raise SpillError(f"cannot copy {name.key!r} to the device: {error}") from error
        return raised

    def _allocated(self, name: DeviceFrames, package: str, nbytes: int) -> Any:
        return self.with_room(name, nbytes, lambda: _ALLOCATORS[package](nbytes))

    def with_room(self, name: DeviceFrames, nbytes: int, allocate: Callable[[], T]) -> T:
        """Call ``allocate``, and again where the device is full and room can be made.

        Raises
        ------
        DeviceFullError
            If no room can be made.
        """
        for _ in range(ALLOCATION_TRIES):
            try:
                return allocate()
            except Exception as error:
                # Each library has an error of its own for it.
                if not is_out_of_memory(error):
                    raise
                # The error itself keeps all frames up to here alive, and what they hold on the device.
                reason = str(error)
            if not self.relieve(nbytes):
                break
        raise DeviceFullError(f"the device has no room for {nbytes} bytes of {name.key!r}: {reason}")


def pinned_pool(device: Device, host_nbytes: int | None) -> BlockPool:
    """Return the pool of page-locked blocks of a worker that may hold ``host_nbytes`` on HOST."""
    share = PINNED_NBYTES_MAX if host_nbytes is None else int(host_nbytes * PINNED_FRACTION)
    limit_nbytes = min(PINNED_NBYTES_MAX, share)
    return BlockPool(limit_nbytes, Pinner(device, limit_nbytes))


def device_mover(
    host: Mover,
    horizon: Horizon,
    loop: asyncio.AbstractEventLoop,
    lost: Callable[[Hashable, Exception], None],
    *,
    device: Device | None = None,
    lease: Callable[[int], memoryview] | None = None,
) -> Mover:
    """Return the DEVICE mover over ``host``, in whose ledger it counts; see :class:`HostFrames` for ``device`` and ``lease``."""
    below = HostFrames(host, device, lease)
    # The bytes of the copies are counted by the HOST mover, which holds them.
    spiller = Spiller(
        host.ledger, horizon, upper=Tier.DEVICE, lower=None, counted=lambda name: not isinstance(name, DeviceChunkName)
    )
    # One thread copies while another computes checksums, and one copies up while another copies down.
    mover = Mover(spiller, below, loop, lost, threads=2)
    below.relieve = mover.relieve
    return mover


def _stream_of(value: object) -> int | None:
    interface: dict[str, Any] = getattr(value, "__cuda_array_interface__", {})
    return interface.get("stream")


def _pieces(view: memoryview) -> list[tuple[int, memoryview]]:
    return [(begin, view[begin : begin + PIECE_NBYTES]) for begin in range(0, view.nbytes, PIECE_NBYTES)]


def _digests(frame: Any) -> list[int]:
    return [xxhash.xxh3_64_intdigest(piece) for _, piece in _pieces(memoryview(frame).cast("B"))]
