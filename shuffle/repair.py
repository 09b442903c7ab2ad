"""The scheduler's side of the repair of a shuffle that has lost a worker.

Covers: when a run is repaired instead of being restarted, who takes over the outputs of the lost worker, which inputs have to be split
again, and that the barrier waits until all is there.
Does not cover: what the workers do, which is :mod:`dask_gpurt.shuffle.run`'s, and what they keep for that
(:mod:`dask_gpurt.shuffle.kept`).

Theory of operation
    In Dask, a shuffle that loses a worker begins anew: all inputs are made, split and sent again. But most of what was sent
    lies where it is wanted. With a *repair* the run goes on. What is gone with the worker is of two kinds:

    - *Its outputs.* Workers that are left take them over. Everybody sends again what it had sent to the lost worker, which
      it has kept. As one message has shards for several new owners, it is cut, and such outputs go one by one from then on.
    - *Its inputs*, whose own shards never left it. Their tasks are done again, elsewhere, by Dask's own rules. What of them has
      arrived already is known by the input and the outputs that it is for, and is not taken in twice.

    A repair has a number, its *epoch*, one more than that of the one before. The order of things:

    1. Dask removes the worker, and takes back what it held or was to do. A barrier that was under way, or done, is taken back too
       then, by which Dask ends the run: it is restarted. So a repair is for a run whose barrier still waits for inputs.
    2. In the same step the scheduler deals the outputs, and tells all workers of the run, by their streams. A worker that asks for
       the run later finds it in the spec.
    3. Each worker sends again what it has kept, then tells for which inputs it did that (*vouches* for them), by its stream: so every
       task that it ended before it heard of the repair is known to have ended by then, and every later one is split by
       the new owners, or its messages are led to them.
    4. When all have told, the inputs that had been done when the worker was lost, and nobody vouches for, are done again: those of
       the lost worker whose results others had, too, and those whose shards could not be kept. So are those of which a worker says that
       it has *missed* some shards, which may have been done since.
    5. An input of which shards were missed, and whose task has not ended yet, as far as the scheduler knows, cannot be done again: its
       worker would take that for the same. Then the shuffle is restarted when its barrier is reached.
    6. The barrier is not answered before that. If it is under way by then and inputs have to be done again, Dask takes it back, and
       the shuffle is restarted.

    A message of the new epoch may arrive before its receiver has heard of it; it says its epoch, and is waited with.
    A worker that is lost during a repair is repaired, too; nobody waits for its word any longer.

    Two shuffles that share output tasks have to agree about owners: the second one follows the first. If one of them is restarted, Dask
    has it follow the one that goes on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from dask_gpurt import seams
from dask_gpurt.handlers import weak
from dask_gpurt.shuffle.consumers import sharing

if TYPE_CHECKING:
    from distributed import Scheduler

__all__ = ["REPAIR", "REPAIRED", "RepairableSpec", "Repairs", "new_owners"]

logger = logging.getLogger(__name__)

#: Names of the messages by which workers hear of a repair, and say that they have done their part.
REPAIR = "gpurt-shuffle-repair"
REPAIRED = "gpurt-shuffle-repaired"


@dataclass(frozen=True)
class RepairableSpec:
    """What our specs have besides those of stock.

    Parameters
    ----------
    keeps, epoch, adopted
        See :class:`~dask_gpurt.shuffle.run.Run`.
    """

    keeps: bool = False
    epoch: int = 0
    adopted: frozenset[Any] = frozenset()

    @classmethod
    def instead_of(cls, spec: Any, *, keeps: bool) -> Self:
        """Return a spec of this class for what stock's says."""
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec)}, keeps=keeps)

    def repaired(self, moved: Mapping[Any, str]) -> Self:
        """Return the spec after one repair more, by which these outputs have new owners."""
        return replace(self, epoch=self.epoch + 1, adopted=self.adopted | moved.keys())


def new_owners(
    worker_for: Mapping[Any, str], lost: str, living: Iterable[str], agreed: Mapping[Any, str]
) -> dict[Any, str] | None:
    """Deal the outputs of a lost worker to the other owners, those with the fewest first; None: there is no other.

    Parameters
    ----------
    worker_for
        Output partition to the address of its worker.
    lost
        The worker that is lost.
    living
        Workers that are there.
    agreed
        Output partition to the worker that has to have it, as far as that is there.

    Examples
    --------
    >>> new_owners({0: "a", 1: "b", 2: "c", 3: "c", 4: "a"}, "a", ["b", "c"], {})
    {0: 'b', 4: 'b'}
    >>> new_owners({0: "a", 1: "b", 2: "c"}, "a", ["b", "c"], {0: "c"})
    {0: 'c'}
    >>> new_owners({0: "a"}, "a", ["b"], {})
    """
    alive = set(living)
    counts = Counter(address for address in worker_for.values() if address != lost and address in alive)
    if not counts:
        return None
    # Where several have as few, the first by its address: the same for everybody who asks.
    owners = sorted(counts)
    moved = {}
    for output, address in worker_for.items():
        if address != lost:
            continue
        owner = agreed.get(output, lost)
        if owner not in counts:
            owner = min(owners, key=counts.__getitem__)
        counts[owner] += 1
        moved[output] = owner
    return moved


@dataclass
class _Repair:
    """A repair under way."""

    shuffle_id: str
    run_id: int
    epoch: int
    lost: str
    #: Workers that have not told yet.
    awaited: set[str]
    #: Tasks of inputs that had their results when the worker was lost.
    done: set[Any]
    #: Those of them that somebody vouches for.
    vouched: set[Any]
    #: Tasks of inputs of which somebody could not keep all shards for the lost worker.
    missed: set[Any]


class Repairs:
    """Repairs runs of one scheduler.

    Parameters
    ----------
    scheduler
        The scheduler.
    able
        Whether all these workers have our part.
    """

    def __init__(self, scheduler: Scheduler, able: Callable[[set[str]], bool]) -> None:
        self.scheduler = scheduler
        self._able = able
        #: Shuffle to its repairs under way.
        self._open: dict[str, list[_Repair]] = {}
        #: Set, and replaced, whenever one of them ends.
        self._ended = asyncio.Event()
        #: Run to the inputs that it cannot have all shards of.
        self._late: dict[int, set[Any]] = {}
        self._restore: list[Callable[[], None]] = []
        #: Repairs ever begun.
        self.count = 0

    def __repr__(self) -> str:
        return f"<Repairs {self.count} begun, {sum(map(len, self._open.values()))} under way>"

    def start(self) -> None:
        """Repair runs that lose a worker from now on."""
        self._restore = [
            seams.override_shuffle_loss(self._plugin, self.remove_worker),
            seams.override_shuffle_barrier(self.scheduler, weak(self.barrier)),
        ]
        self.scheduler.stream_handlers[REPAIRED] = weak(self.repaired, late_is_no_error=True)

    def stop(self) -> None:
        """Leave lost workers to stock. Repairs that are under way come to their end."""
        for restore in self._restore:
            restore()
        self._restore.clear()
        if not self._open:
            self.scheduler.stream_handlers.pop(REPAIRED, None)

    # Beginning

    def remove_worker(self, worker: str, stimulus_id: str, stock: Callable[[], None]) -> None:
        """Have runs repaired that have lost a worker; ``stock`` restarts those that it finds the worker in."""
        for repair in [repair for repairs in self._open.values() for repair in repairs]:
            repair.awaited.discard(worker)
        runs = {state.run_id for state in self._active()}
        self._late = {run_id: late for run_id, late in self._late.items() if run_id in runs}
        begun = [state for state in self._active() if self._repairable(state, worker)]
        for state in begun:
            state.participating_workers.discard(worker)
        stock()
        for state in begun:
            if self._current(str(state.id), state.run_id) is state:
                self._begin(state, worker)
        for repair in [repair for repairs in self._open.values() for repair in repairs]:
            self._see_to(repair, stimulus_id)

    @property
    def _plugin(self) -> Any:
        return self.scheduler.plugins["shuffle"]

    def _active(self) -> list[Any]:
        return list(self._plugin.active_shuffles.values())

    def _current(self, shuffle_id: str, run_id: int) -> Any:
        state = self._plugin.active_shuffles.get(shuffle_id)
        return state if state is not None and state.run_id == run_id else None

    def _repairable(self, state: Any, worker: str) -> bool:
        if not getattr(state.run_spec.spec, "keeps", False):
            return False
        owners = state.run_spec.worker_for
        if worker not in state.participating_workers and worker not in owners.values():
            return False
        barrier = seams.shuffle_barrier(self.scheduler, str(state.id))
        return (
            barrier.state == "waiting"
            and self._able(state.participating_workers - {worker})
            and new_owners(owners, worker, self.scheduler.workers, {}) is not None
        )

    def _begin(self, state: Any, lost: str) -> None:
        barrier = seams.shuffle_barrier(self.scheduler, str(state.id))
        owners = state.run_spec.worker_for
        moved = new_owners(owners, lost, self.scheduler.workers, self._agreed(barrier))
        assert moved is not None
        spec = state.run_spec.spec.repaired(moved)
        seams.amend_shuffle_run(state, spec, {**owners, **moved})
        told = {address for address in state.participating_workers if address in self.scheduler.workers}
        repair = _Repair(
            str(state.id),
            state.run_id,
            spec.epoch,
            lost,
            awaited=told,
            done={task.key for task in barrier.dependencies if task.state == "memory"},
            vouched=set(),
            missed=set(),
        )
        self._open.setdefault(repair.shuffle_id, []).append(repair)
        self.count += 1
        message = {
            "op": REPAIR,
            "shuffle_id": repair.shuffle_id,
            "run_id": repair.run_id,
            "epoch": repair.epoch,
            "lost": lost,
            "moved": list(moved.items()),
        }
        for address in told:
            self.scheduler.worker_send(address, message)
        logger.info("Shuffle %s goes on without %s: %d of its outputs move", repair.shuffle_id, lost, len(moved))

    def _agreed(self, barrier: Any) -> dict[Any, str]:
        """Return the owners in the runs that share output tasks with the one of this barrier."""
        agreed: dict[Any, str] = {}
        for shuffle_id in sharing(barrier):
            if (other := self._plugin.active_shuffles.get(shuffle_id)) is not None:
                agreed.update(other.run_spec.worker_for)
        return agreed

    # Ending

    def repaired(
        self, worker: str, shuffle_id: str, run_id: int, epoch: int, *, keys: Iterable[Any], missed: Iterable[Any]
    ) -> None:
        """Note that a worker has done its part, for which inputs, and for which it could not. Handler for workers."""
        for repair in self._open.get(shuffle_id, ()):
            if (repair.run_id, repair.epoch) == (run_id, epoch) and worker in repair.awaited:
                repair.awaited.discard(worker)
                repair.vouched.update(keys)
                repair.missed.update(missed)
                self._see_to(repair, f"gpurt-shuffle-repaired-{time.time()}")
                return

    def _see_to(self, repair: _Repair, stimulus_id: str) -> None:
        """End a repair that nobody is awaited for any more."""
        if repair.awaited:
            return
        repairs = self._open[repair.shuffle_id]
        repairs.remove(repair)
        if not repairs:
            del self._open[repair.shuffle_id]
        if not self._restore and not self._open:
            self.scheduler.stream_handlers.pop(REPAIRED, None)
        again: list[Any] = []
        if self._current(repair.shuffle_id, repair.run_id) is not None:
            tasks = self.scheduler.tasks
            wanted = {key for key in (repair.done - repair.vouched) | repair.missed if key in tasks}
            again = [key for key in wanted if tasks[key].state == "memory"]
            if late := {key for key in repair.missed & wanted if tasks[key].state == "processing"}:
                self._late.setdefault(repair.run_id, set()).update(late)
            if again:
                self.scheduler.transitions(dict.fromkeys(again, "released"), stimulus_id=stimulus_id)
                self.scheduler.stimulus_queue_slots_maybe_opened(stimulus_id=stimulus_id)
            self.scheduler.log_event(
                "gpurt",
                {
                    "action": "shuffle-repaired",
                    "shuffle": repair.shuffle_id,
                    "lost": repair.lost,
                    "inputs-again": len(again),
                },
            )
        self._ended.set()
        self._ended = asyncio.Event()

    async def barrier(self, stock: Callable[..., Any], id: str, run_id: int, consistent: bool) -> Any:  # noqa: A002
        """Answer a barrier when all that was lost is there again; ``stock`` answers."""
        # Whoever says that something is wrong is not kept waiting for more of it.
        while consistent and any(repair.run_id == run_id for repair in self._open.get(id, ())):
            await self._ended.wait()
        if late := self._late.pop(run_id, None):
            logger.info("Shuffle %s begins anew: %d inputs ended while a worker was lost", id, len(late))
            consistent = False
        return await stock(id=id, run_id=run_id, consistent=consistent)
