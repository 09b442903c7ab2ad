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

__all__ = ["BrokenError", "Books", "rest"]

#: For so long a worker may hold more than its limit though something could leave: events are what makes it look.
OVER_S = 5.0

_IN_MEMORY = (State.RESIDENT, State.WRITING, State.CLEAN)
_BELOW = (State.CLEAN, State.SPILLED, State.READING)


class BrokenError(AssertionError):
    """What must hold does not."""


def _claim(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenError(what)


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
        ledger, blocks = memory.ledger, memory._host.spiller.blocks.values()
        held = dict.fromkeys(Tier, 0)
        pledged = dict.fromkeys(Tier, 0)
        buffers = {}
        for block in blocks:
            if block.state in _IN_MEMORY:
                buffers[block.buffer] = block.buffer_nbytes
            if block.state in _BELOW and block.tier is not None:
                held[block.tier] += block.copy_nbytes
            if block.reservation is not None:
                pledged[block.reservation.tier] += block.reservation.nbytes
        held[Tier.HOST] = sum(buffers.values())
        for tier in (Tier.HOST, Tier.DISK):
            _claim(
                ledger.held(tier) == held[tier], f"{name}: {ledger.held(tier)} bytes on {tier}, blocks have {held[tier]}"
            )
            _claim(
                ledger.reserved(tier) >= pledged[tier],
                f"{name}: {ledger.reserved(tier)} bytes reserved on {tier}, operations have {pledged[tier]}",
            )
        limit = ledger.limit(Tier.DISK)
        _claim(limit is None or ledger.used(Tier.DISK) <= limit, f"{name}: DISK is over its limit: {ledger!r}")
        self._over_limit(name, memory)

    def _over_limit(self, name: str, memory: Any) -> None:
        ledger, spiller = memory.ledger, memory._host.spiller
        limit = ledger.limit(Tier.HOST)
        could_leave = (
            limit is not None
            and ledger.held(Tier.HOST) > limit
            and not spiller.busy
            and not spiller.blocked
            and any(
                block.state in (State.RESIDENT, State.CLEAN) and not block.pins and not block.unwritable
                for block in spiller.blocks.values()
                if ledger.holders(Tier.HOST, block.buffer) == 1 and block.buffer_nbytes
            )
        )
        now = self._world.loop.now
        if not could_leave or self._world.hosts[name].stopped is not None:
            self._over.pop(memory, None)
        else:
            since = self._over.setdefault(memory, now)
            _claim(now - since < OVER_S, f"{name}: HOST is over its limit since {now - since:.1f} s: {ledger!r}")

    def _shuffle(self, name: str, part: Any) -> None:
        window = part.window
        pending = sum(run._outbox.pending_nbytes for run in part._runs.values())
        _claim(window.used_nbytes == pending, f"{name}: {window!r}, and outboxes have {pending}")


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
            if parts.shuffle._runs:
                left.append(f"{name} has runs {list(parts.shuffle._runs)}")
    return left
