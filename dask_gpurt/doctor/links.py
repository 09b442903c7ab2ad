"""Measures what the links of one machine carry: memory, the disk under the spill folder, devices.

Each takes :data:`LIMIT_S` seconds and moves :data:`LIMIT_NBYTES` at most, in pieces, of which the first, which finds memory that
nobody has touched yet, does not count. What has been moved to a device or a file, and back, is compared: a link that loses a bit is an error,
and no rate. A link that cannot be measured says why.

Covers: :func:`memory_and_disk`, :func:`to_devices`, both of this process.
Does not cover: links between workers (:mod:`dask_gpurt.doctor.peers`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np

from dask_gpurt.doctor.facts import DeviceFacts, Folder, Measure, Missing, attempt
from dask_gpurt.errors import CorruptDataError
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cuda import Copier, CudaError, Device, Driver, Pinner
from dask_gpurt.topology import Place, Rate

__all__ = ["DISK_NBYTES_MAX", "LIMIT_NBYTES", "LIMIT_S", "memory_and_disk", "memory_of", "timed", "to_devices"]

#: For each direction of each link.
LIMIT_S = 2.0
#: Bytes that go through memory, or to and from a device: enough for a tenth of a second at the rate of HBM.
LIMIT_NBYTES = 2**33
#: Bytes that are written to a disk: it wears.
DISK_NBYTES_MAX = 2**28
#: Of a disk's free space, one part in so many is written at most.
DISK_PART = 10

#: Larger than caches of processors, and small beside any memory.
PIECE_NBYTES = 2**26
#: As spilled blocks are.
DISK_PIECE_NBYTES = 2**23
#: Of a device's memory, one part in so many is taken at most, for its owner has most of the rest.
DEVICE_PART = 32
#: A rate of a device is known after so long.
DEVICE_S = 0.2

#: CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
PEER_ACCESS_ALREADY_ENABLED = 704

Move = Callable[[], object]


def timed(move: Move, nbytes: int, limit_nbytes: int = LIMIT_NBYTES, limit_s: float = LIMIT_S) -> tuple[Rate, int]:
    """Call ``move``, which moves ``nbytes`` each time, until one of the limits is reached; return its rate and all bytes.

    Examples
    --------
    >>> rate, moved_nbytes = timed(lambda: None, nbytes=10, limit_nbytes=30)
    >>> rate.bandwidth > 0, moved_nbytes
    (True, 30)
    """
    moved_nbytes = 0
    began = time.perf_counter()
    while True:
        move()
        moved_nbytes += nbytes
        elapsed_s = time.perf_counter() - began
        if moved_nbytes >= limit_nbytes or elapsed_s >= limit_s:
            return Rate(0.0, moved_nbytes / max(elapsed_s, 1e-9)), moved_nbytes


def _measure(
    source: Place,
    target: Place,
    path: str,
    move: Move,
    nbytes: int,
    *,
    limit_nbytes: int = LIMIT_NBYTES,
    limit_s: float = LIMIT_S,
) -> Measure:
    found = attempt(lambda: timed(move, nbytes, limit_nbytes, limit_s))
    return Measure(source, target, path, found) if isinstance(found, Missing) else Measure(source, target, path, *found)


def memory_and_disk(who: str, folder: Folder | Missing) -> list[Measure]:
    """Measure one thread that copies memory, and the disk under the folder for spilled data."""
    host, disk = Place(who), Place(who, "disk")
    source, target = np.ones(PIECE_NBYTES, np.uint8), np.zeros(PIECE_NBYTES, np.uint8)
    measures = [_measure(host, host, "memcpy", lambda: np.copyto(target, source), PIECE_NBYTES, limit_s=LIMIT_S / 4)]
    found = folder if isinstance(folder, Missing) else attempt(lambda: _disk(host, disk, folder))
    if isinstance(found, Missing):
        return [*measures, Measure(host, disk, "disk", found), Measure(disk, host, "disk", found)]
    return measures + found


def _disk(host: Place, disk: Place, folder: Folder) -> list[Measure]:
    if folder.refusal is not None:
        raise OSError(folder.refusal)
    if isinstance(folder.free_nbytes, Missing):
        raise OSError(folder.free_nbytes.reason)
    pieces = min(DISK_NBYTES_MAX, folder.free_nbytes // DISK_PART) // DISK_PIECE_NBYTES
    if not pieces:
        raise OSError(f"{folder.path} is all but full")
    direct = folder.direct is True
    path = "past the page cache" if direct else "through the page cache"
    pool = BlockPool(0)
    data, back = pool.lease(DISK_PIECE_NBYTES), pool.lease(DISK_PIECE_NBYTES)
    data[:] = os.urandom(DISK_PIECE_NBYTES)
    with _nameless_file(folder.path, os.O_DIRECT if direct else 0) as fd:
        offset = 0

        def write() -> None:
            nonlocal offset
            _whole(os.pwritev(fd, [data], offset))
            offset += DISK_PIECE_NBYTES
            if not direct and offset >= pieces * DISK_PIECE_NBYTES:
                os.fsync(fd)

        def read() -> None:
            nonlocal offset
            offset -= DISK_PIECE_NBYTES
            _whole(os.preadv(fd, [back], offset))

        written = _measure(host, disk, path, write, DISK_PIECE_NBYTES, limit_nbytes=pieces * DISK_PIECE_NBYTES)
        if isinstance(written.rate, Missing):
            return [written, Measure(disk, host, path, written.rate)]
        read_back = _measure(disk, host, path, read, DISK_PIECE_NBYTES, limit_nbytes=written.nbytes)
        if back != data:
            raise CorruptDataError(f"{folder.path} gives back something else than was written")
    return [written, read_back]


def _whole(nbytes: int) -> None:
    if nbytes != DISK_PIECE_NBYTES:
        raise OSError(f"{nbytes} bytes of {DISK_PIECE_NBYTES} were moved")


@contextmanager
def _nameless_file(folder: str, flags: int) -> Iterator[int]:
    """Open a file that is gone with this process, however that ends."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    with tempfile.TemporaryDirectory(prefix="gpurt-doctor-", dir=folder) as inside:
        fd = os.open(os.path.join(inside, "file"), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def to_devices(who: str, facts: Sequence[DeviceFacts]) -> list[Measure]:
    """Measure the copies from and to, within and between the first devices that this process sees, of which these are the facts.

    The primary context of each is made, if there is none yet.
    """
    driver = attempt(Driver.load)
    if isinstance(driver, Missing):
        return []
    places = [Place(who, f"device {ordinal}") for ordinal in range(len(facts))]
    devices = [attempt(partial(Device, driver, ordinal)) for ordinal in range(len(facts))]
    measures = []
    for place, device in zip(places, devices, strict=True):
        found = device if isinstance(device, Missing) else attempt(partial(_within, device, place))
        measures += [Measure(Place(who), place, "pinned", found)] if isinstance(found, Missing) else found
    for number, other in itertools.permutations(range(len(facts)), 2):
        source, target = devices[number], devices[other]
        if not isinstance(source, Missing) and not isinstance(target, Missing):
            reaches = number in facts[other].peers
            path = "peer access" if reaches else "by way of the host"
            between = attempt(partial(_between, source, target, reaches=reaches))
            rate, nbytes = (between, 0) if isinstance(between, Missing) else between
            measures.append(Measure(places[number], places[other], path, rate, nbytes))
    return measures


def _piece_nbytes(*devices: Device) -> int:
    return min(PIECE_NBYTES, *(device.total_nbytes // DEVICE_PART for device in devices))


@contextmanager
def memory_of(device: Device, nbytes: int) -> Iterator[int]:
    """Have memory on a device, from the driver itself; yields its address."""
    with device.current() as driver:
        address = int(driver.cuMemAlloc(nbytes))
    try:
        yield address
    finally:
        with device.current() as driver:
            driver.cuMemFree(address)


def _copies(device: Device, begin: Callable[[Copier], object]) -> Move:
    """Return what makes a copy by ``device``, and waits for it."""

    def move() -> None:
        with device.copying(()) as copier:
            begin(copier)

    return move


def _within(device: Device, place: Place) -> list[Measure]:
    """Measure the ways from the host to a device, there from one place to another, and back."""
    host, nbytes = Place(place.worker), _piece_nbytes(device)
    pinner = Pinner(device, 4 * PIECE_NBYTES)
    measures = []
    with memory_of(device, nbytes) as memory, memory_of(device, nbytes) as other:
        across = _copies(device, lambda copier: copier.within(other, memory, nbytes))
        for path, pool in {"pinned": BlockPool(0, pinner), "pageable": BlockPool(0)}.items():
            data, back = pool.lease(nbytes), pool.lease(nbytes)
            if path == "pinned" and not pinner.nbytes:
                measures.append(Measure(host, place, path, Missing("the system locks no memory")))
                continue
            data[:] = os.urandom(nbytes)
            up = _copies(device, partial(_up, memory, data))
            down = _copies(device, partial(_down, other, back))
            for move in (up, across, down):
                # The first time finds memory that nobody has touched.
                move()
            if back != data:
                raise CorruptDataError(f"{place.tier} gives back something else than was copied to it")
            measures.append(_measure(host, place, path, up, nbytes, limit_s=DEVICE_S))
            measures.append(_measure(place, host, path, down, nbytes, limit_s=DEVICE_S))
        measures.append(_measure(place, place, "copy", across, nbytes, limit_s=DEVICE_S))
    return measures


def _up(address: int, data: memoryview, copier: Copier) -> None:
    copier.to_device(address, data)


def _down(address: int, back: memoryview, copier: Copier) -> None:
    copier.to_host(back, address)


def _between(source: Device, target: Device, *, reaches: bool) -> tuple[Rate, int]:
    nbytes = _piece_nbytes(source, target)
    data, back = memoryview(os.urandom(nbytes)), memoryview(bytearray(nbytes))
    with (
        _peer_access(source, target) if reaches else contextlib.nullcontext(),
        memory_of(source, nbytes) as there,
        memory_of(target, nbytes) as here,
    ):
        across = _copies(target, lambda copier: copier.from_peer(here, there, nbytes, source))
        _copies(source, partial(_up, there, data))()
        across()
        _copies(target, partial(_down, here, back))()
        if back != data:
            raise CorruptDataError("a device gets something else than lies on the other")
        return timed(across, nbytes, limit_s=DEVICE_S)


@contextmanager
def _peer_access(source: Device, target: Device) -> Iterator[None]:
    """Let ``target`` reach the memory of ``source``; if somebody else has done so, it stays."""
    with target.current() as driver:
        try:
            driver.cuCtxEnablePeerAccess(source.context, 0)
        except CudaError as error:
            if error.code != PEER_ACCESS_ALREADY_ENABLED:
                raise
            ours = False
        else:
            ours = True
    try:
        yield
    finally:
        if ours:
            with target.current() as driver:
                driver.cuCtxDisablePeerAccess(source.context)
