"""Bugs that are planted to see whether the simulated world finds them: one for each thing that it checks.

Covers: :data:`BUGS`, by name; :func:`plant`. What is to be said of each stands in ``tests/simulation/test_world.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["BUGS", "plant"]


def _lost_message() -> None:
    """Every tenth message is said to have been delivered, and was not."""
    from dask_gpurt.shuffle.run import Run

    patched: Any = Run
    deliver = Run._deliver
    messages = 0

    async def delivered(self: Any, address: str, buffers: list[Any]) -> None:
        nonlocal messages
        messages += 1
        if messages % 10:
            await deliver(self, address, buffers)

    patched._deliver = delivered


def _taken_twice() -> None:
    """What is sent again, because the answer was lost, is taken in again."""
    from dask_gpurt.shuffle.run import Run

    patched: Any = Run
    take_in = Run._take_in

    async def taken_in(self: Any, parcels: Any, reservation: Any = None) -> None:
        self._arrivals.clear()
        await take_in(self, parcels, reservation)

    patched._take_in = taken_in


def _kept_window() -> None:
    """A run that ends keeps what its messages have of the window."""
    from dask_gpurt.shuffle.outbox import Outbox

    patched: Any = Outbox
    drop = Outbox._drop

    def dropped(self: Any) -> None:
        if self._closed:
            self._queues.clear()
        drop(self)

    patched._drop = dropped


def _kept_shards() -> None:
    """A run that ends leaves its shards in the store."""
    from dask_gpurt.shuffle.shelf import Shelf

    patched: Any = Shelf
    close = Shelf.close

    async def closed(self: Any) -> None:
        self._held.clear()
        await close(self)

    patched.close = closed


def _unchecked_file() -> None:
    """What is read is not compared with its checksum."""
    from dask_gpurt.memory.disk import SpillFolder

    patched: Any = SpillFolder
    patched.read = lambda self, copy: self._read(copy)


def _boundless_disk() -> None:
    """DISK takes more than its limit."""
    from dask_gpurt.memory.spiller import Spiller

    patched: Any = Spiller
    patched._reserve_below = lambda self, tier, nbytes, instructions: self.ledger.reserve(tier, nbytes)


def _unheard_loss() -> None:
    """A key that is lost is not reported to the scheduler, nor to the tasks that want it."""
    from dask_gpurt import seams
    from dask_gpurt.memory.manager import MemoryManager

    patched: Any = seams
    patched.forget_replica = lambda *args: None
    patched = MemoryManager
    patched._give_up = lambda self, key, *args: seams.reschedule_event(key, "planted")
    patched._strike = lambda *args: False


def _deaf_run() -> None:
    """A peer's message is never answered once a connection has been lost."""
    import asyncio

    from dask_gpurt.shuffle.run import Run

    patched: Any = Run
    receive = Run.receive

    async def received(self: Any, *args: Any) -> Any:
        if self.total_recvd > 20_000:
            await asyncio.Event().wait()
        return await receive(self, *args)

    patched.receive = received


def _forgotten_holder() -> None:
    """A buffer that two blocks share is free when the first of them has gone."""
    from dask_gpurt.memory.ledger import Ledger

    patched: Any = Ledger
    hold = Ledger.hold

    def held(self: Any, tier: Any, buffer: Any, nbytes: int, reservation: Any = None) -> int:
        added = hold(self, tier, buffer, nbytes, reservation)
        self._accounts[tier].buffers[buffer][1] = 1
        return added

    patched.hold = held


def _lost_repair() -> None:
    """What was sent to a worker that is lost is not sent again, though it was kept."""
    from dask_gpurt.shuffle.run import Run

    patched: Any = Run
    post = Run._post

    async def posted(self: Any, address: str, buffers: Any, nbytes: int) -> None:
        if address not in self._lost:
            await post(self, address, buffers, nbytes)

    patched._post = posted


def _trusted_inputs() -> None:
    """An input whose shards could not be kept is vouched for."""
    from dask_gpurt.shuffle.kept import Kept

    patched: Any = Kept

    def missing(self: Any, address: str) -> set[tuple[int, ...]]:
        self._missing.pop(address, None)
        return set()

    patched.missing = missing


#: Name of a bug to what plants it.
BUGS: dict[str, Callable[[], None]] = {
    "lost-message": _lost_message,
    "taken-twice": _taken_twice,
    "unchecked-file": _unchecked_file,
    "kept-window": _kept_window,
    "kept-shards": _kept_shards,
    "forgotten-holder": _forgotten_holder,
    "boundless-disk": _boundless_disk,
    "unheard-loss": _unheard_loss,
    "deaf-run": _deaf_run,
    "lost-repair": _lost_repair,
    "trusted-inputs": _trusted_inputs,
}


def plant(name: str) -> None:
    """Plant a bug in this process."""
    BUGS[name]()
