"""What one run has sent to its peers, kept in case that one of them is lost.

Covers: which messages are kept, where, how much of them, and which inputs cannot be sent again from here.
Does not cover: when they are sent again, and to whom; see :mod:`dask_gpurt.shuffle.run` and :mod:`dask_gpurt.shuffle.repair`.

Theory of operation: a message is kept as it was sent, in the worker's store, where it is the first that goes down the tiers: nobody may
ever ask for it. It is written down by peer, with the inputs that it has shards of. What finds no place (over the limit of the
worker, no room on DISK, in the memory of a device) is not kept, nor is it an error: its inputs are noted as *missing* for this peer, and are
split again should it be lost. A reservation is waited for with nothing else in hand that others could wait for but the window's bytes
of this message, which a store that moves things down gives back by itself.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dask_gpurt.errors import SpillError
from dask_gpurt.memory.store import BufferStore, DeviceBuffer
from dask_gpurt.shuffle.wire import input_id

__all__ = ["Allowance", "Kept", "KeptMessage"]

logger = logging.getLogger(__name__)

#: After every shard that will be unpacked, of which there are fewer than that.
LAST_RANK = 2**40

Inputs = frozenset[tuple[int, ...]]


class Allowance:
    """How many bytes all runs of a worker may keep.

    Parameters
    ----------
    limit_nbytes
        That many.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.used_nbytes = 0

    def __repr__(self) -> str:
        return f"<Allowance {self.used_nbytes}/{self.limit_nbytes} bytes>"

    def take(self, nbytes: int) -> bool:
        """Take ``nbytes`` of it if there is so much left; says whether it did."""
        if self.used_nbytes + nbytes > self.limit_nbytes:
            return False
        self.used_nbytes += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Give back what was taken."""
        self.used_nbytes -= nbytes
        assert self.used_nbytes >= 0, self


@dataclass(frozen=True)
class KeptMessage:
    """A message in the store.

    Parameters
    ----------
    name
        What it is called there.
    nbytes
        Its size.
    inputs
        Input partitions that it has shards of.
    """

    name: str
    nbytes: int
    inputs: Inputs


class Kept:
    """Messages of one run, by the peer that they were sent to. Used on one event loop only.

    Parameters
    ----------
    store
        Where they are kept.
    allowance
        How much that may be.
    name
        Prefix of their names in the store.
    """

    def __init__(self, store: BufferStore, allowance: Allowance, *, name: str) -> None:
        self._store: BufferStore | None = store
        self._allowance = allowance
        self._name = name
        self._numbers = itertools.count()
        self._held: dict[str, list[KeptMessage]] = {}
        #: Peer to the inputs whose shards for it are not kept.
        self._missing: dict[str, set[tuple[int, ...]]] = {}
        #: Bytes that are kept, wherever they lie.
        self.nbytes = 0

    def __repr__(self) -> str:
        return f"<Kept {self._name}: {self.nbytes} bytes for {len(self._held)} peers>"

    async def keep(self, address: str, buffers: Sequence[Any], nbytes: int, *, wanted: Callable[[], bool]) -> bool:
        """Keep a message that ``address`` has taken in, if there is room for it.

        Room may have to be waited for. Then ``wanted`` is asked whether it is still to be kept: the peer may be lost, and what it was sent
        be under way again. Says whether the message has been dealt with, kept or noted as missing.
        """
        inputs = frozenset(map(input_id, buffers[::2]))
        on_device = any(isinstance(buffer, DeviceBuffer) for buffer in buffers)
        if self._store is None or on_device or not self._allowance.take(nbytes):
            self._miss(address, inputs)
            return True
        store = self._store
        try:
            reservation = await store.reserve(nbytes)
        except SpillError as error:
            logger.info("%r keeps %d bytes less: %s", self, nbytes, error)
            self._allowance.give_back(nbytes)
            if not wanted():
                return False
            self._miss(address, inputs)
            return True
        except BaseException:
            self._allowance.give_back(nbytes)
            raise
        if self._store is not store or not wanted():
            # Forgotten, or lost, while this waited.
            reservation.release()
            self._allowance.give_back(nbytes)
            if wanted():
                self._miss(address, inputs)
                return True
            return False
        message = KeptMessage(f"{self._name}-sent-{next(self._numbers)}", nbytes, inputs)
        store.put(message.name, buffers, reservation, rank=LAST_RANK)
        self._held.setdefault(address, []).append(message)
        self.nbytes += nbytes
        return True

    def _miss(self, address: str, inputs: Inputs) -> None:
        self._missing.setdefault(address, set()).update(inputs)

    async def take(self, address: str) -> AsyncIterator[tuple[list[Any], int]]:
        """Hand out, one after the other, the messages that a peer was sent, and their sizes; they are not kept any longer.

        What cannot be read back is noted as missing.
        """
        while self._store is not None and (held := self._held.get(address)):
            message = held.pop()
            try:
                buffers = await self._store.take(message.name)
            except SpillError as error:
                logger.warning("%r: what %s was sent cannot be read again: %s", self, address, error)
                self._miss(address, message.inputs)
                continue
            finally:
                self._gone(message)
            yield buffers, message.nbytes
            del buffers

    def missing(self, address: str) -> set[tuple[int, ...]]:
        """Return, and forget, the inputs that what was kept for a peer does not have all shards of."""
        return self._missing.pop(address, set())

    def forget(self) -> None:
        """Keep nothing any longer, nor of what is sent from now on."""
        for address, held in self._held.items():
            for message in held:
                self._miss(address, message.inputs)
            self._discard(held)
        self._held.clear()
        self._store = None

    def _discard(self, held: list[KeptMessage]) -> None:
        while held:
            message = held.pop()
            if self._store is not None:
                self._store.discard(message.name)
            self._gone(message)

    def _gone(self, message: KeptMessage) -> None:
        self.nbytes -= message.nbytes
        self._allowance.give_back(message.nbytes)
