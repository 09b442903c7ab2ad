"""The shelves of one run: one for shards on the host, one for those on a device, made when the first of them arrives.

Covers: which parcel goes where, and what is reserved for a message with buffers of both kinds.
Does not cover: what a shelf does (:mod:`dask_gpurt.shuffle.shelf`), nor where it keeps things
(:mod:`dask_gpurt.memory.shards`).

Theory of operation: each shelf has a store over its own tier, and each tier its own account; so shards on a device are
reserved and held in the account of DEVICE, and are moved down when it is full. A message is reserved for on HOST first,
then on DEVICE. Making room on DEVICE takes room on HOST without waiting for it, so a request for DEVICE that waits with a
reservation on HOST in hand waits for nobody who waits for HOST.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dask_gpurt.memory.store import BufferStore, DeviceBuffer, Meter, Reservation
from dask_gpurt.shuffle.shelf import Pack, Parcel, Ready, Shelf

__all__ = ["Shelves", "TieredReservation"]


@dataclass
class TieredReservation:
    """What is reserved for a message: on the host, and on the device.

    Parameters
    ----------
    host, device
        The reservations.
    """

    host: Reservation
    device: Reservation

    def release(self) -> None:
        """Give back what is left of both."""
        self.host.release()
        self.device.release()


#: What pays for parcels.
Paid = Reservation | TieredReservation | None


class Shelves:
    """The arrived shards of one run. Used on one event loop only.

    Parameters
    ----------
    store, device_store
        Where packed shards lie: those on the host, and those on a device.
    ready, pack, offload, name, ranks, meter
        As :class:`~dask_gpurt.shuffle.shelf.Shelf` takes them.
    """

    def __init__(
        self,
        store: BufferStore,
        device_store: BufferStore,
        *,
        ready: Ready,
        pack: Pack,
        offload: Callable[..., Awaitable[Any]],
        name: str,
        ranks: dict[Any, int],
        meter: Meter | None = None,
    ) -> None:
        self._make: Callable[[BufferStore], Shelf] = lambda store: Shelf(
            store, ready=ready, pack=pack, offload=offload, name=name, ranks=ranks, meter=meter
        )
        self._device_store = device_store
        self._host = self._make(store)
        self._device: Shelf | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Shelves {', '.join(map(repr, self._all))}>"

    @property
    def _all(self) -> list[Shelf]:
        return [self._host] if self._device is None else [self._host, self._device]

    @property
    def partitions(self) -> int:
        """Output partitions of which something is held, on the host or on the device."""
        return sum(shelf.partitions for shelf in self._all)

    @property
    def staged_nbytes(self) -> int:
        """Bytes that wait to be packed."""
        return sum(shelf.staged_nbytes for shelf in self._all)

    @property
    def put_nbytes(self) -> int:
        """Bytes ever put into the stores."""
        return sum(shelf.put_nbytes for shelf in self._all)

    @property
    def held_nbytes(self) -> int:
        """Bytes that wait to be unpacked, in whatever tier."""
        return self.staged_nbytes + self.put_nbytes - self.taken_nbytes

    @property
    def taken_nbytes(self) -> int:
        """Bytes ever taken from the stores."""
        return sum(shelf.taken_nbytes for shelf in self._all)

    async def add(self, parcels: Sequence[Parcel], paid: Paid = None) -> None:
        """Take parcels in; see :meth:`dask_gpurt.shuffle.shelf.Shelf.add`."""
        host_paid, device_paid = (paid.host, paid.device) if isinstance(paid, TieredReservation) else (paid, None)
        on_device = [parcel for parcel in parcels if isinstance(parcel.body, DeviceBuffer)]
        on_host = [parcel for parcel in parcels if not isinstance(parcel.body, DeviceBuffer)] if on_device else parcels
        del parcels
        if on_host:
            await self._host.add(on_host, host_paid)
        if on_device and not self._closed:
            if self._device is None:
                self._device = self._make(self._device_store)
            await self._device.add(on_device, device_paid)

    async def flush(self) -> None:
        """Pack all that is staged."""
        for shelf in self._all:
            await shelf.flush()

    async def take(self, partition: Any) -> list[Any]:
        """Remove the shards of an output partition; header and body alternate. Call :meth:`flush` before."""
        return [buffer for shelf in self._all for buffer in await shelf.take(partition)]

    async def move(self, store: BufferStore, device_store: BufferStore) -> None:
        """Move everything to other stores."""
        self._device_store = device_store
        await self._host.move(store)
        if self._device is not None:
            await self._device.move(device_store)

    async def close(self) -> None:
        """Forget everything."""
        self._closed = True
        for shelf in self._all:
            await shelf.close()
