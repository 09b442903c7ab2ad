"""The mapping that stands in for ``worker.data``.

Covers: what stock distributed asks of ``worker.data``: a :class:`~collections.abc.MutableMapping`; ``fast``, ``slow``
and :meth:`TieredMapping.evict` for the memory monitor (distributed's ``ManualEvictProto``); ``spilled_total`` for the
dashboard; ``cumulative_metrics`` for Prometheus.
Does not cover: moving; see :mod:`dask_gpurt.memory.mover`.

While a peer is being served, some keys are answered with their copy below, as it lies, see :func:`serving`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator, Mapping, MutableMapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from dask_gpurt.errors import CorruptDataError, GpurtError
from dask_gpurt.memory.lower import RawName
from dask_gpurt.memory.mover import Mover

__all__ = ["Ruined", "RuinedForClient", "Spilled", "TieredMapping", "serving"]

#: Part of what is in memory that goes, because the process is too large, before that is measured again.
STEP_FRACTION = 1 / 16

_serving: ContextVar[Mapping[Hashable, object] | None] = ContextVar("gpurt_serving", default=None)


class Spilled(NamedTuple):
    """Bytes of what is not in the process's memory, as ``sizeof`` says and as they lie on disk."""

    memory: int
    disk: int


class Ruined:
    """Stands for a value that is lost for good, on its way to another worker, whose mapping refuses it to tasks.

    A worker takes an error in the place of an answer for the end of the key alone, and lets the tasks that need it wait
    for ever; so the key is delivered, and the tasks fail.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __getattr__(self, name: str) -> object:
        # A worker without the tiers hands it to a task as it is.
        if name.startswith("__"):
            raise AttributeError(name)
        raise CorruptDataError(self.__dict__.get("reason", "lost"))


class RuinedForClient:
    """As :class:`Ruined`, for a client: unpacking it raises the error, where another answer is asked for again."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return _refuse, (self.reason,)


def _refuse(reason: str) -> object:
    raise GpurtError(reason)


@contextmanager
def serving(values: Mapping[Hashable, object]) -> Iterator[None]:
    """Within this context (and this task), answer these keys with these values, if they are not in memory."""
    token = _serving.set(values)
    try:
        yield
    finally:
        _serving.reset(token)


class TieredMapping(MutableMapping[Hashable, object]):
    """Keys and values over the tiers.

    Parameters
    ----------
    host
        Holds the values on HOST and DISK.
    device
        Holds the values that live on a device, where there is one.
    on_device
        Whether a value lives on a device.
    announce
        Hears of a key right before its value is put.
    dropped
        Hears of a key that was deleted.
    known_nbytes
        Says how many bytes the value of a key has that is about to be put, if somebody has counted them already.
    need
        Bytes by which the process is above the mark that the memory monitor spills to.
    """

    def __init__(
        self,
        host: Mover,
        need: Callable[[], int],
        *,
        device: Mover | None = None,
        on_device: Callable[[object], bool] = lambda value: False,  # noqa: ARG005
        announce: Callable[[Hashable], None] = lambda key: None,  # noqa: ARG005
        dropped: Callable[[Hashable], None] = lambda key: None,  # noqa: ARG005
        known_nbytes: Callable[[Hashable], int | None] = lambda key: None,  # noqa: ARG005
    ) -> None:
        self._host = host
        self._device = device
        self._on_device = on_device
        self._need = need
        self._announce = announce
        self._dropped = dropped
        self._descent: asyncio.Task[None] | None = None
        self._known_nbytes = known_nbytes
        #: Keys in the order in which they were put -> where they are.
        self._homes: dict[Hashable, Mover] = {}
        #: Keys whose value is lost for good -> why.
        self.ruined: dict[Hashable, Exception] = {}

    def __repr__(self) -> str:
        return f"<TieredMapping of {len(self)} keys, {len(self.fast)} in memory>"

    # MutableMapping

    def __getitem__(self, key: Hashable) -> object:
        home = self._homes[key]
        served = _serving.get()
        if served is not None and key in served and (key in home.absent or key in self.ruined):
            return served[key]
        if self.ruined and key in self.ruined:
            raise self.ruined[key]
        return home.get(key)

    def __setitem__(self, key: Hashable, value: object) -> None:
        home = self._host if self._device is None or not self._on_device(value) else self._device
        old = self._homes.get(key)
        if old is not None and old is not home and key in old:
            old.delete(key)
        self._homes[key] = home
        if type(value) is Ruined:
            if key in home:
                home.delete(key)
            self.ruined[key] = CorruptDataError(value.reason)
            return
        self.ruined.pop(key, None)
        self._announce(key)
        home.put(key, value, nbytes=self._known_nbytes(key))

    def __delitem__(self, key: Hashable) -> None:
        home = self._homes.pop(key)
        self.ruined.pop(key, None)
        if key in home:
            home.delete(key)
        self._dropped(key)

    def __iter__(self) -> Iterator[Hashable]:
        # A copy: keys come and go while others iterate, as they may with stock's store.
        return iter(list(self._homes))

    def __len__(self) -> int:
        return len(self._homes)

    def __contains__(self, key: object) -> bool:
        return key in self._homes

    # For the worker

    def home(self, key: Hashable) -> Mover:
        """The mover that holds ``key``."""
        return self._homes[key]

    def lost(self, key: Hashable) -> bool:
        """Whether the mover of ``key`` has lost it, and neither :meth:`forget` nor :meth:`ruin` has been called for it yet."""
        home = self._homes.get(key)
        return home is not None and key not in home and key not in self.ruined

    def forget(self, key: Hashable) -> None:
        """Take a key that its mover has lost off the list."""
        self._homes.pop(key, None)
        self.ruined.pop(key, None)

    def ruin(self, key: Hashable, error: Exception) -> None:
        """Keep a key that its mover has lost on the list; whoever asks for it gets ``error``."""
        if key in self._homes:
            self.ruined[key] = error

    def adopt(self, key: Hashable) -> None:
        """Put a key on the list that the HOST mover has adopted."""
        self._homes[key] = self._host

    # For stock's memory monitor, dashboard and Prometheus

    @property
    def fast(self) -> Mapping[Hashable, object]:
        """What is in memory. Look, do not touch."""
        return self._host.in_memory

    @property
    def slow(self) -> AbstractSet[Hashable]:
        """Keys that are not in memory. Look, do not touch."""
        return {name for name in self._host.absent if not isinstance(name, RawName)}

    def evict(self) -> int:
        """Move data out of memory because the process has become too large. Never raises, never blocks.

        It goes in steps, after each of which the process is measured again, until it is below the mark or nothing more can go: a
        value may take much more memory than it says.

        Returns
        -------
        int
            Bytes that are gone from memory already, or -1: what is under way takes its time, or nothing can go. The
            memory monitor leaves off then, and looks again a moment later.
        """
        need_nbytes = max(1, self._need())
        step_nbytes = self._step_nbytes()
        gone_nbytes = self._host.press(min(need_nbytes, step_nbytes))
        if need_nbytes > step_nbytes and (self._descent is None or self._descent.done()):
            self._descent = asyncio.get_running_loop().create_task(self._descend(), name="gpurt-descent")
        return gone_nbytes or -1

    async def _descend(self) -> None:
        while (need_nbytes := self._need()) > 0:
            if not await self._host.make_room(min(need_nbytes, self._step_nbytes())):
                return

    def _step_nbytes(self) -> int:
        return max(1, int(self._host.ledger.held(self._host.tier) * STEP_FRACTION))

    @property
    def spilled_total(self) -> Spilled:
        """Bytes that are not in the process's memory."""
        spiller = self._host.spiller
        device_nbytes = 0
        if self._device is not None:
            # Neither what is in the device nor what went down from there lies in the process as Dask counts it; its
            # frames on HOST are counted there.
            device = self._device.spiller
            device_nbytes = self._device.ledger.held(self._device.tier) + device.absent_nbytes
        return Spilled(spiller.absent_nbytes + device_nbytes, spiller.absent_copy_nbytes)

    @property
    def cumulative_metrics(self) -> dict[tuple[str, str], float]:
        """(label, unit) -> ever-increasing value, under the names that stock uses."""
        return {
            ("disk-read", "bytes"): float(self._host.read_nbytes),
            ("disk-write", "bytes"): float(self._host.written_nbytes),
        }
