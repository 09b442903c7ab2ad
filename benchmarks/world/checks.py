"""What must hold in the simulated world: after each step, and when all is over.

Covers: :func:`books`: on each worker, the ledger agrees with the blocks, the window with the outboxes, and no limit is exceeded;
:func:`rest`: nothing is left of work that has ended.
Does not cover: whether answers are right; those are compared by the jobs (:mod:`benchmarks.world.jobs`).
"""

from __future__ import annotations

from typing import Any

from benchmarks.world.cluster import World
from dask_gpurt.memory.ledger import Tier
from dask_gpurt.memory.spiller import State

__all__ = ["Books", "BrokenError", "parts_of", "rest"]

#: For so long a worker may hold more than its limit though something could leave: events are what makes it look.
OVER_S = 5.0

_IN_MEMORY = (State.RESIDENT, State.WRITING, State.CLEAN)
_BELOW = (State.CLEAN, State.SPILLED, State.READING)


class BrokenError(AssertionError):
    """What must hold does not.

    Parameters
    ----------
    message
        What, and where.
    kind
        ``books`` that do not agree, an answer that is ``wrong``, a ``hang``, or something that is ``left`` behind.
    """

    def __init__(self, message: str, kind: str = "books") -> None:
        super().__init__(message)
        self.kind = kind


def parts_of(worker: Any) -> Any:
    """Return what dask-gpurt has on a worker; None: nothing yet, or nothing any more."""
    return worker.extensions.get("gpurt")


class Books:
    """Looks at the books of all workers."""

    def __init__(self, world: World) -> None:
        self._world = world
        #: Worker to since when it has held more than its limit.
        self._over: dict[Any, float] = {}
        self.looks = 0

    def __call__(self) -> None:
        """Look."""
        self.looks += 1
        for name, worker in self._world.workers.items():
            parts = parts_of(worker)
            if parts is None or not self._world.hosts[name].alive:
                continue
            if parts.memory is not None and parts.memory._host is not None:
                self._memory(name, parts.memory)
            if parts.shuffle is not None:
                self._shuffle(name, parts.shuffle)

    def _memory(self, name: str, memory: Any) -> None:
        ledger = memory.ledger
        disk_nbytes = 0
        pledged = {Tier.HOST: 0, Tier.DISK: 0}
        holders: dict[Any, int] = {}
        for block in memory._host.spiller.blocks.values():
            if block.state in _IN_MEMORY:
                holders[block.buffer] = holders.get(block.buffer, 0) + 1
            if block.state in _BELOW and block.tier is Tier.DISK:
                disk_nbytes += block.copy_nbytes
            if block.reservation is not None:
                pledged[block.reservation.tier] += block.reservation.nbytes
        host = ledger._accounts[Tier.HOST]
        if holders != {buffer: count for buffer, (_, count) in host.buffers.items()}:
            raise BrokenError(f"{name}: blocks hold {holders}, the ledger knows {host.buffers}")
        if host.held != sum(nbytes for nbytes, _ in host.buffers.values()):
            raise BrokenError(f"{name}: buffers are {host.buffers}: {ledger!r}")
        if ledger.held(Tier.DISK) != disk_nbytes:
            raise BrokenError(f"{name}: blocks have {disk_nbytes} bytes on DISK: {ledger!r}")
        for tier, nbytes in pledged.items():
            if ledger.reserved(tier) < nbytes:
                raise BrokenError(f"{name}: operations have reserved {nbytes} bytes on {tier}: {ledger!r}")
        limit = ledger.limit(Tier.DISK)
        if limit is not None and ledger.used(Tier.DISK) > limit:
            raise BrokenError(f"{name}: DISK is over its limit: {ledger!r}")
        self._over_limit(name, memory)

    def _over_limit(self, name: str, memory: Any) -> None:
        ledger, spiller = memory.ledger, memory._host.spiller
        limit = ledger.limit(Tier.HOST)
        if limit is None or ledger.held(Tier.HOST) <= limit or self._world.hosts[name].stopped is not None:
            self._over.pop(memory, None)
            return
        disk_limit = ledger.limit(Tier.DISK)
        room = float("inf") if disk_limit is None else disk_limit - ledger.used(Tier.DISK)
        could_leave = (
            not spiller.busy
            and not spiller.blocked
            and any(
                (block.state is State.CLEAN or (block.state is State.RESIDENT and block.nbytes < room / 2))
                and not block.pins
                and not block.unwritable
                for block in spiller.blocks.values()
                if block.buffer_nbytes and ledger.holders(Tier.HOST, block.buffer) == 1
            )
        )
        if not could_leave:
            self._over.pop(memory, None)
            return
        over_s = self._world.loop.now - self._over.setdefault(memory, self._world.loop.now)
        if over_s > OVER_S:
            raise BrokenError(f"{name}: HOST is over its limit since {over_s:.1f} s: {ledger!r}")

    def _shuffle(self, name: str, part: Any) -> None:
        pending_nbytes = sum(run._outbox.pending_nbytes for run in part._runs.values())
        if part.window.used_nbytes != pending_nbytes:
            raise BrokenError(f"{name}: {part.window!r}, and outboxes have {pending_nbytes}")
        kept_nbytes = sum(run._kept.nbytes for run in part._runs.values() if run._kept is not None)
        # What is just being kept has its part of the allowance already.
        if not kept_nbytes <= part.allowance.used_nbytes <= max(part.allowance.limit_nbytes, 0):
            raise BrokenError(f"{name}: {part.allowance!r}, and runs keep {kept_nbytes}")


def rest(world: World) -> list[str]:
    """Say what is left on the workers when nothing should be."""
    left = []
    for name, worker in world.workers.items():
        parts = parts_of(worker)
        if worker.data:
            left.append(f"{name} holds {sorted(map(str, worker.data))}")
        if worker.state.tasks:
            left.append(f"{name} knows {sorted(map(str, worker.state.tasks))}")
        if parts is None:
            continue
        if parts.memory is not None:
            ledger = parts.memory.ledger
            used = {str(tier): ledger.used(tier) for tier in Tier if ledger.used(tier) or ledger.waiting(tier)}
            if used:
                left.append(f"{name} accounts for {used}: {ledger!r}")
            if parts.memory._host is not None and parts.memory._host.spiller.blocks:
                left.append(f"{name} has blocks {list(parts.memory._host.spiller.blocks)}")
        if parts.shuffle is not None:
            if parts.shuffle.window.used_nbytes or parts.shuffle.window.waiting:
                left.append(f"{name}: {parts.shuffle.window!r}")
            if parts.shuffle.allowance.used_nbytes:
                left.append(f"{name}: {parts.shuffle.allowance!r}")
            if parts.shuffle._runs:
                left.append(f"{name} has runs {list(parts.shuffle._runs)}")
    return left
