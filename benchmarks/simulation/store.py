"""What a worker holds, and its disk: a limit on memory, least recently used first, at the price of the disk.

Covers: :class:`Store`, the mapping behind a worker's state machine.
Does not cover: dask-gpurt's own store, whose choices are the business of ``benchmarks spill``: here both sides have the same one, as
Dask has by default, so that a difference comes from the placement.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from benchmarks.simulation.clock import Clock

__all__ = ["Store"]


class Store(MutableMapping[Any, object]):
    """Values of known sizes.

    Parameters
    ----------
    clock
        The clock.
    sizes
        Key to the bytes of its value.
    limit_nbytes
        Bytes in memory at most.
    disk_bandwidth
        Bytes per second, read or written; one at a time.

    Attributes
    ----------
    held_nbytes, peak_nbytes
        Bytes held now and at most, in memory or on disk.
    spilled_nbytes
        Bytes written to disk so far.
    free_at
        When the disk has done all that it was asked for. The worker waits for that.
    """

    def __init__(self, clock: Clock, sizes: Mapping[Any, int], limit_nbytes: float, disk_bandwidth: float) -> None:
        self._clock = clock
        self._sizes = sizes
        self._limit_nbytes = limit_nbytes
        self._disk_bandwidth = disk_bandwidth
        #: The values in memory, the one used last at the end, and those on disk.
        self._memory: OrderedDict[Any, object] = OrderedDict()
        self._disk: dict[Any, object] = {}
        self._memory_nbytes = 0
        self.held_nbytes = self.peak_nbytes = self.spilled_nbytes = 0
        self.free_at = 0.0

    def __setitem__(self, key: Any, value: object) -> None:
        self.pop(key, None)
        nbytes = self._sizes[key]
        self.held_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.held_nbytes)
        self._raise(key, value)

    def __getitem__(self, key: Any) -> object:
        return self._memory[key] if key in self._memory else self._disk[key]

    def __delitem__(self, key: Any) -> None:
        if key in self._memory:
            del self._memory[key]
            self._memory_nbytes -= self._sizes[key]
        else:
            del self._disk[key]
        self.held_nbytes -= self._sizes[key]

    def __contains__(self, key: object) -> bool:
        return key in self._memory or key in self._disk

    def __iter__(self) -> Iterator[Any]:
        yield from self._memory
        yield from self._disk

    def __len__(self) -> int:
        return len(self._memory) + len(self._disk)

    def use(self, key: Any) -> None:
        """Bring a value into memory, if it is not there; :attr:`free_at` says when it is."""
        if key in self._memory:
            self._memory.move_to_end(key)
        elif key in self._disk:
            self._occupy(self._sizes[key])
            self._raise(key, self._disk.pop(key))

    def _raise(self, key: Any, value: object) -> None:
        self._memory[key] = value
        self._memory_nbytes += self._sizes[key]
        while self._memory_nbytes > self._limit_nbytes and len(self._memory) > 1:
            oldest, below = self._memory.popitem(last=False)
            nbytes = self._sizes[oldest]
            self._memory_nbytes -= nbytes
            self._disk[oldest] = below
            self.spilled_nbytes += nbytes
            self._occupy(nbytes)

    def _occupy(self, nbytes: int) -> None:
        self.free_at = max(self.free_at, self._clock.now) + nbytes / self._disk_bandwidth
