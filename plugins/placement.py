"""The placement: lets the policy choose workers on a running scheduler, and takes it back.

Covers: :class:`Placement`, which plans root tasks as graphs arrive, keeps planned tasks in order for
their workers, chooses workers for tasks whose inputs are in memory, and balances what waits.
Does not cover: the decisions themselves, which are pure: :mod:`dask_gpurt.plugins.families` (who belongs together, and
where), :mod:`dask_gpurt.plugins.policy` (where a task with inputs goes), :mod:`dask_gpurt.plugins.stealing` (when to
leave a plan), :mod:`dask_gpurt.plugins.copies` (what a worker short of memory forgets); what moves cost,
:mod:`dask_gpurt.plugins.prices`; what idle workers take at once, :mod:`dask_gpurt.plugins.sharing`; and the order in which planned
tasks wait, :mod:`dask_gpurt.plugins.queues`.
See also: :mod:`dask_gpurt.seams`, which replaces and restores the scheduler's functions.

Theory of operation
-------------------
Dask asks for a worker when a task becomes ready (``waiting -> processing``) and when a worker may have become free
(``stimulus_queue_slots_maybe_opened``). Both go through here first:

=====================  ================================================================================================
task                   what happens
=====================  ================================================================================================
planned                it goes to the worker of its family if that has a free slot, in the sense of Dask's
                       ``worker-saturation``; else it is ``queued``, as in stock Dask, and in the queue of that worker
planned, of which      it goes to its worker as soon as it is ready, as long as there is room for what that has been
inputs are shared      given so far; else it waits for a free slot (see :mod:`dask_gpurt.plugins.crossings`)
planned and taken by   beside the tasks that fill the slots, which may wait for such results themselves, a worker makes
those: *early*         some of them at a time, before all else; fewer if it is short of memory and nobody is idle
with inputs            it stays with its input bytes, see the policy
anything else          Dask's own decision: roots that were not planned, restrictions of any kind, actors
=====================  ================================================================================================

Dask's own set of queued tasks stays the truth: every task that waits here is in ``scheduler.queued`` and in the state
``queued``, so that its timeouts, its dashboard, its adaptive scaling and its validation go on to hold. The queues here
are an order over it. So uninstalling loses nothing: the order goes, the tasks stay queued.

==========  ==========================================  =======================================================
state       where a planned task waits                  ends by
==========  ==========================================  =======================================================
WAITING     for its inputs                              its worker has a slot -> PROCESSING; it has none -> QUEUED
QUEUED      in ``scheduler.queued``, and here, in the   a slot opens -> PROCESSING; nobody wants it -> released
            order of its worker
PROCESSING  on its worker, or on one that has stolen    done -> memory; failed -> erred; its worker is lost -> released
            it, as the plan did not pay any more
==========  ==========================================  =======================================================

What cannot happen: a planned task that waits for a worker that is gone or paused stays there no longer than one turn
of the balancer (:data:`BALANCE_INTERVAL_S`), which also lets an idle worker take over families of a busy one.

An exception in a decision is counted, logged once, and answered with Dask's own decision. Every decision is noted, those that are left
to Dask with the reason; see :mod:`dask_gpurt.plugins.decisions`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from time import time
from typing import TYPE_CHECKING, Any

from distributed.comm.addressing import get_address_host
from distributed.diagnostics.plugin import SchedulerPlugin
from tornado.ioloop import PeriodicCallback

from dask_gpurt import seams
from dask_gpurt.explanation import REFUSED, UNPLANNED, TaskExplanation
from dask_gpurt.plugins import copies, crossings, families, policy, stealing
from dask_gpurt.plugins.decisions import Decisions, Lately, explain_family
from dask_gpurt.plugins.families import Family
from dask_gpurt.plugins.prices import Neighbourhoods, Prices
from dask_gpurt.plugins.queues import Queues
from dask_gpurt.plugins.sharing import Sharing
from dask_gpurt.plugins.view import Backlog, Candidate, Share, Tail
from dask_gpurt.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from distributed.scheduler import Scheduler, TaskState, WorkerState

    from dask_gpurt.config import PlacementSettings
    from dask_gpurt.explanation import Decision

__all__ = ["BALANCE_INTERVAL_S", "Placement"]

logger = logging.getLogger(__name__)

#: How often idle workers are compared with what waits for others; the interval of Dask's own stealing.
BALANCE_INTERVAL_S = 0.1
#: Early roots that a worker has for each of its threads at most, beside the tasks that fill its slots.
EARLY = 4
#: Idle workers that are helped in one turn of the balancer, so that a turn stays short on a large cluster.
HELPED = 32
#: Families that are looked at for one idle worker.
LOOKED_AT = 64
#: Tasks to come of which it is remembered where their inputs are made.
SIBLINGS = 100_000
#: Task prefixes whose sizes are remembered.
PREFIXES = 10_000

_NAME = "gpurt-placement"
#: More than a graph has tasks: ranks of the tasks of one graph differ by less.
_MANY_TASKS = 2**40


class _Queued:
    """The answer "not now": the task waits for its planned worker."""


_QUEUED = _Queued()
_NOTHING_DUE: tuple[Any, Any] = (None, None)


class _Hooks(SchedulerPlugin):
    """Lead the scheduler's events to a placement.

    A plugin's own ``start`` is a coroutine that a starting scheduler awaits; the placement's is not, so the two are two
    objects. The hooks are set on the instance because Dask calls ``transition`` several times for each task.
    """

    name = _NAME

    def __init__(self, placement: Placement) -> None:
        for hook in ("update_graph", "transition", "add_worker", "remove_worker", "restart"):
            setattr(self, hook, getattr(placement, hook))


class Placement:
    """Choose workers on ``scheduler`` from :meth:`start` to :meth:`stop`.

    Parameters
    ----------
    scheduler
        The running scheduler.
    settings
        The part's settings.
    topology
        What is known of the links between workers.

    Attributes
    ----------
    prices
        What moves cost.
    near
        Which workers are near to each other.
    """

    def __init__(self, scheduler: Scheduler, settings: PlacementSettings, topology: Topology | None = None) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self._stock: seams.ChoiceOverrides | None = None
        self._add_to_processing = seams.add_to_processing(scheduler)
        self._slots_available = seams.task_slots_available()
        # The scheduler changes these three in place and never replaces them.
        self._running: set[WorkerState] = scheduler.running
        self._with_slots: set[WorkerState] = scheduler.idle_task_count
        self._tasks: dict[Any, TaskState] = scheduler.tasks
        #: Key of a planned task to its family, until its result is in memory or it is gone.
        self._plan: dict[Any, Family] = {}
        self.near = Neighbourhoods(get_address_host, settings.racks)
        self.prices = Prices(Topology() if topology is None else topology, self.near)
        self._queues = Queues()
        #: Key of a planned task in the state "queued" to its family; the queues' own dict, read on every event.
        self._waiting = self._queues.waiting
        #: The task that is being dequeued, and for which worker.
        self._dequeuing: tuple[Any, WorkerState] | None = None
        #: Key of an early root that runs to its worker, and worker to the number of those.
        self._early: dict[Any, Any] = {}
        self._nearly: Counter[Any] = Counter()
        #: Workers that may be able to take another early root.
        self._opened: set[Any] = set()
        #: Whether early roots may be among those that wait.
        self._early_wait = False
        #: Task group to whether it is root-like, for as long as neither graph nor cluster change.
        self._rootish: dict[Any, bool] = {}
        #: Task prefix to the size of its latest planned result.
        self._output_nbytes: dict[str, int] = {}
        #: Key of a task that is not ready yet to the worker that was chosen last for one of its inputs.
        self._siblings: dict[Any, Any] = {}
        self._counts: Counter[str] = Counter()
        self._errors = 0
        #: What was decided lately; for those who ask, and for displays.
        self.decisions = Decisions()
        self._note = self.decisions.note
        #: Key of a root without a plan, until it is decided about it, to why it has none; a lone task has no entry.
        self._unplanned: Lately[str] = Lately()
        #: Key to the address of the worker from which stealing it was refused last.
        self._refused: Lately[str] = Lately()
        self._sharing = Sharing(
            scheduler,
            self._plan,
            self._output_nbytes,
            self.prices,
            duration_of=_expected_s,
            may_move=lambda ts: not _is_unusual(ts),
        )
        #: Whether crossings may be among the planned tasks.
        self._crossings = False
        self._hooks = _Hooks(self)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to choose. The second of two calls does nothing.

        Raises
        ------
        SeamError
            If something else has replaced the scheduler's choice; nothing was changed then.
        """
        if self._stock is not None:
            return
        stock = seams.stock_choice(self.scheduler)
        for address in self.scheduler.workers:
            self.prices.add_worker(address)
        self.prices.refresh(self.scheduler.bandwidth)
        callback = PeriodicCallback(self._balance, BALANCE_INTERVAL_S * 1000)
        self._stock = stock
        seams.override_choice(
            self.scheduler,
            seams.ChoiceOverrides(
                waiting_processing=self._waiting_processing,
                waiting_queued=self._waiting_queued,
                queued_processing=self._queued_processing,
                slots_opened=self._slots_opened,
                get_thief=None if stock.get_thief is None else self._get_thief,
            ),
        )
        self.scheduler.add_plugin(self._hooks, name=_NAME)
        self.scheduler.periodic_callbacks[_NAME] = callback
        callback.start()

    def stop(self) -> None:
        """Leave all choices to Dask again; what waits here waits in Dask's queue. Calling it again does nothing."""
        if self._stock is None:
            return
        self._stock = None
        seams.restore_choice(self.scheduler)
        callback = self.scheduler.periodic_callbacks.pop(_NAME, None)
        if callback is not None:
            callback.stop()
        if self.scheduler.plugins.get(_NAME) is self._hooks:
            self.scheduler.remove_plugin(_NAME)
        self._forget()
        # Workers may be free whose planned tasks were all done, while others' tasks waited.
        self.scheduler.stimulus_queue_slots_maybe_opened(stimulus_id=f"{_NAME}-stop-{time()}")

    def settle(self, worker: str, island: str | None) -> None:
        """Take down what a worker that is ready says of its GPU; see :mod:`dask_gpurt.plugins.islands`."""
        self.near.settle(worker, island)
        if worker in self.scheduler.workers:
            self.prices.add_worker(worker)

    def metrics(self) -> dict[str, Any]:
        """Count the decisions by reason.

        Returns
        -------
        ``decisions``: reason to count (``planned``, ``urgent``, ``only-holder``, ``most-bytes``, ``earlier-elsewhere``; of
        families ``rehomed`` and ``relieved``; of Dask's stealing ``steal-allowed`` and ``steal-refused``; of copies
        ``copy-dropped``); ``errors``: decisions that fell to Dask because of an exception; ``planned``: tasks with a plan that
        are not done; ``waiting``: those of them that wait in the scheduler.
        """
        return {
            "decisions": dict(self._counts),
            "errors": self._errors,
            "planned": len(self._plan),
            "waiting": len(self._waiting),
        }

    def explain(self, keys: Collection[Any]) -> list[TaskExplanation]:
        """Say of each of ``keys`` where it is, and what is remembered of the decisions about it."""
        decisions = self.decisions.about(set(keys))
        return [self._explain(key, tuple(decisions.get(key, ()))) for key in keys]

    def _explain(self, key: Any, decisions: tuple[Decision, ...]) -> TaskExplanation:
        ts = self._tasks.get(key)
        if ts is None:
            return TaskExplanation(key, "unknown", decisions=decisions)
        # What has no plan is passed on unseen.
        if decisions and decisions[0].reason in UNPLANNED and _is_unusual(ts):
            decisions = (replace(decisions[0], reason="restricted"), *decisions[1:])
        workers = ts.who_has or ((ts.processing_on,) if ts.processing_on is not None else ())
        family = self._plan.get(key)
        return TaskExplanation(
            key,
            str(ts.state),
            tuple(ws.address for ws in workers),
            decisions,
            None if family is None else explain_family(family),
            0 if family is None else self._queues.backlog(family.home),
        )

    # --- hooks of a SchedulerPlugin -----------------------------------------------------------------------------------

    def update_graph(self, scheduler: Scheduler, *, tasks: Sequence[Any], **kwargs: Any) -> None:  # noqa: ARG002
        """Plan the roots of a graph that has arrived, before its first transition."""
        self._rootish.clear()
        try:
            self.prices.refresh(scheduler.bandwidth)
            self._plan_graph(tasks)
        except Exception as error:  # noqa: BLE001 - a plan is a luxury: without one, the graph runs as in stock Dask
            self._note_unplanned(tasks, "failed")
            self._failed("a graph could not be planned", error)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Follow the planned tasks: out of the queue, and out of the plan when they are done or gone."""
        if finish == "memory" and start == "processing":
            ws = self.scheduler.workers.get(kwargs.get("worker", ""))
            if ws is not None and copies.is_full(ws):
                try:
                    self._drop_copies(self._tasks[key], kwargs.get("stimulus_id", ""))
                except Exception as error:  # noqa: BLE001 - Dask would swallow it; copies stay, as in stock Dask
                    self._failed("copies could not be dropped", error)
        if not self._plan:
            return
        if start == "queued" and self._waiting:
            try:
                self._queues.leave(key)
            except Exception as error:  # noqa: BLE001 - a task that has left and still seems to wait would be sent for ever
                self._give_up("a task could not leave its queue", error)
        if self._early and start == "processing":
            early = self._early.pop(key, None)
            if early is not None:
                self._nearly[early] -= 1
                if not self._nearly[early]:
                    del self._nearly[early]
                self._opened.add(early)
        if finish == "memory":
            if self._plan.pop(key, None) is not None and len(self._output_nbytes) < PREFIXES:
                self._output_nbytes[self._tasks[key].prefix.name] = kwargs.get("nbytes") or 0
        elif finish in ("forgotten", "erred"):
            self._plan.pop(key, None)

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:  # noqa: ARG002
        """Give a worker that joins what waits for workers that are gone; the balancer gives it the rest."""
        self.prices.add_worker(worker)
        self._rootish.clear()
        self._try_to_rehome_all()

    def remove_worker(self, scheduler: Scheduler, worker: str, **kwargs: Any) -> None:  # noqa: ARG002
        """Deal what waits for a worker that has left to the others."""
        self.prices.remove_worker(worker)
        self.near.settle(worker, None)
        self._rootish.clear()
        if self._try_to_rehome_all():
            self._dispatch(f"{_NAME}-remove-worker-{time()}")

    def restart(self, scheduler: Scheduler) -> None:  # noqa: ARG002
        """Forget all plans: the scheduler has forgotten all tasks."""
        self._forget()
        self._output_nbytes.clear()

    # --- planning -----------------------------------------------------------------------------------------------------

    def _plan_graph(self, keys: Sequence[Any]) -> None:
        if len(keys) < 2:
            return
        shares = [Share(ws, ws.nthreads) for ws in self.scheduler.workers.values() if ws in self._running]
        if len(shares) < 2:
            self._note_unplanned(keys, "few-workers")
            return
        roots: dict[Any, TaskState] = {}
        others: list[TaskState] = []
        leads_on = False
        for key in keys:
            ts = self._tasks[key]
            if ts.state != "released":
                continue
            dependents = ts.dependents
            if ts.dependencies:
                if not self._is_rootish(ts):
                    if dependents:
                        others.append(ts)
                    continue
            elif not dependents and type(key) is not tuple:
                continue  # nothing can be known about a lone task, such as one of Client.map
            if _is_unusual(ts) or ts.run_spec is None:
                continue
            leads_on = leads_on or bool(dependents)
            roots[key] = ts
        if len(roots) + len(others) < 2:
            return
        meets: dict[Any, Any] = {}
        ends: dict[Any, Any] = roots
        if leads_on or others:
            meets, ends = families.meetings([*roots.values(), *others], roots)
        plan = self._plan
        for family in self._families(roots, others, shares, meets, ends):
            for key in family.keys:
                plan[key] = family
        for key in roots:
            if key not in plan:
                # What meets others and is in no family is gathered, see families.by_meeting.
                self._unplanned[key] = "gathered" if key in meets else "apart"

    def _note_unplanned(self, keys: Iterable[Any], reason: str) -> None:
        for key in keys:
            self._unplanned[key] = reason

    def _families(
        self,
        roots: dict[Any, TaskState],
        others: list[TaskState],
        shares: list[Share],
        meets: dict[Any, Any],
        ends: dict[Any, Any],
    ) -> Iterator[Family]:
        crossing, crossed, homes = crossings.by_crossing(others, roots, meets, shares)
        self._crossings = self._crossings or bool(crossing)
        yield from crossing
        yield from crossed
        dealt = {key for family in crossed for key in family.keys}
        meeting = [ts for key, ts in roots.items() if key in meets and key not in dealt]
        if meeting:
            meeting.sort(key=_priority)

            def holder_of(node: Any) -> Any | None:
                return homes.get(node.key) or self._holder_of(node)

            yield from families.by_meeting(meeting, meets, shares, holder_of, _expected_s)
        collections: defaultdict[str, list[tuple[Any, tuple[int, ...]]]] = defaultdict(list)
        for key in roots:
            if key not in meets and key not in dealt:
                block = families.index_of(ends[key].key) or families.index_of(key)
                if block is not None:
                    collections[block[0]].append((key, block[1]))
        for blocks in collections.values():
            if len(blocks) > 1:
                yield from families.by_position(blocks, shares)

    def _holder_of(self, meeting: Any) -> Any | None:
        """Find the worker that holds most of what ``meeting`` takes and that is in memory."""
        present = [dts for dts in meeting.dependencies if dts.who_has]
        if not present:
            return None
        held, _ = policy.holdings(present, len(self._running))
        best = policy.best_holders(held, self._running, limit=1)
        return best[0] if best else None

    def _is_rootish(self, ts: TaskState) -> bool:
        """Answer as the scheduler does, by group: it counts the group's tasks anew for each of them."""
        if _is_unusual(ts):
            return False
        group = ts.group
        known = self._rootish.get(group)
        if known is None:
            known = self._rootish[group] = bool(self.scheduler.is_rootish(ts)) and self._all_need(ts)
        if known or ts.run_spec is None:
            return known
        return bool(ts.run_spec.data_producer)

    def _all_need(self, ts: TaskState) -> bool:
        """Whether all workers will need inputs of the tasks like ``ts``: they all take the same ones, or there are too few for all workers."""
        ninputs = sum(map(len, ts.group.dependencies))
        return len(ts.dependencies) >= ninputs or ninputs < len(self._running)

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _waiting_processing(self, scheduler: Any, key: Any, stimulus_id: str) -> seams.Answer:
        assert self._stock is not None
        ts = self._tasks[key]
        if ts.dependencies or key in self._plan:
            try:
                answer = self._decide(ts)
            except Exception as error:  # noqa: BLE001 - an error in the policy must not stall a graph
                self._note((key, "failed", None, self._plan.pop(key, None), None))
                self._failed("a choice failed", error)
                answer = None
            if answer is _QUEUED:
                return {key: "queued"}, {}, {}
            if answer is not None:
                return self._sent(ts, answer, stimulus_id)
        else:
            self._note((key, self._why_unplanned(ts), None, None, None))
        return self._stock.waiting_processing(scheduler, key, stimulus_id)

    def _waiting_queued(self, scheduler: Any, key: Any, stimulus_id: str) -> seams.Answer:
        assert self._stock is not None
        if not self._plan:
            return self._stock.waiting_queued(scheduler, key, stimulus_id)
        family = self._plan.get(key)
        ts = self._tasks[key]
        if family is None:
            answer = self._stock.waiting_queued(scheduler, key, stimulus_id)
            self._queues.enter_unplanned(key, ts.priority)
            return answer
        if scheduler.validate:
            seams.assert_ready(scheduler, ts)
        ts.state = "queued"
        scheduler.queued.add(ts)
        try:
            self._enter(ts, family)
        except Exception as error:  # noqa: BLE001 - an error in the policy must not stall a graph
            self._plan.pop(key, None)
            self._give_up("a task could not wait for its worker", error)
        return {}, {}, {}

    def _queued_processing(self, scheduler: Any, key: Any, stimulus_id: str) -> seams.Answer:
        assert self._stock is not None
        if self._dequeuing is None or self._dequeuing[0] != key:
            return self._stock.queued_processing(scheduler, key, stimulus_id)
        ws = self._dequeuing[1]
        ts = self._tasks[key]
        family = self._plan.get(key)
        early = family is not None and family.early and family.home is ws
        # Whether another early one may be opened has just been judged, where an error stalls nothing.
        if ws not in self._with_slots and not early:
            return {}, {}, {}
        scheduler.queued.discard(ts)
        if early:
            assert family is not None
            self._note_early(key, family)
        return self._sent(ts, ws, stimulus_id)

    def _sent(self, ts: TaskState, ws: Any, stimulus_id: str) -> seams.Answer:
        answer = self._add_to_processing(ts, ws, stimulus_id)
        if ts.key in self._early:
            for message in answer[2][ws.address]:
                message["priority"] = _ahead_of_all(ts.priority)
        return answer

    def _decide(self, ts: TaskState) -> Any:
        """Choose a worker; _QUEUED for a planned task that has to wait, None to leave the choice to Dask."""
        if _is_unusual(ts):
            return self._left_to_dask(ts, "restricted")
        family = self._plan.get(ts.key) if self._plan else None
        if family is not None:
            return self._decide_planned(ts, family)
        if self._is_rootish(ts):
            return self._left_to_dask(ts, self._why_unplanned(ts))
        return self._decide_by_inputs(ts)

    def _decide_planned(self, ts: TaskState, family: Family) -> Any:
        if family.home not in self._running and not self._rehome(family):
            del self._plan[ts.key]
            return self._left_to_dask(ts, "plan-without-worker", family)
        ws: Any = family.home
        if ts.dependencies and not self._pays_to_fetch(ts, family):
            del self._plan[ts.key]
            return self._decide_by_inputs(ts)
        if (
            (not family.waits and not self._will_be_full(ws))
            or ws in self._with_slots
            or (family.early and self._may_open(ws))
            or math.isinf(self.scheduler.WORKER_SATURATION)
            or not seams.is_queueable(ts)
        ):
            self._note_early(ts.key, family)
            return self._decided(ts, ws, "planned", family)
        return _QUEUED

    def _note_early(self, key: Any, family: Family) -> None:
        if family.early:
            self._early[key] = family.home
            self._nearly[family.home] += 1

    def _may_open(self, ws: Any) -> bool:
        """Whether a worker may make another result that others wait for, though it has tasks enough: they may wait, too."""
        if ws not in self._running or self._nearly[ws] >= EARLY * ws.nthreads:
            return False
        # What an idle worker waits for is made, whatever room it takes.
        return bool(self.scheduler.idle) or not copies.is_full(ws)

    def _will_be_full(self, ws: Any) -> bool:
        """Whether a worker is short of memory, or will be when it has what it was given tasks for."""
        return copies.is_full(ws, seams.incoming_nbytes(ws))

    def _pays_to_fetch(self, ts: TaskState, family: Family) -> bool:
        ws: Any = family.home
        coming = ws.needs_what
        absent = [d for d in ts.dependencies if ws not in (d.who_has or ()) and d not in coming]
        if not absent:
            return True
        missing = sum(d.get_nbytes() for d in absent)
        held, total = policy.holdings(ts.dependencies, len(self._running))
        output_nbytes = self._output_nbytes.get(ts.prefix.name)
        holders = policy.best_holders(held, self._running, limit=1)
        if output_nbytes is not None:
            best = total - max(held.values(), default=0)
            pays = policy.accepts(missing, self._queues.backlog(ws) + 1, best, output_nbytes)
        else:
            pays = True
        if pays and family.waits and holders:
            there_s = self._wait_s(holders[0]) + (output_nbytes or 0) * self.prices.typical_s
            pays = policy.starts_sooner(missing * self.prices.typical_s, self._consumers(absent, ws), there_s)
        if not pays:
            compared = [(ws, missing), *((holder, total - held[holder]) for holder in holders)]
            candidates = [self._candidate(worker, nbytes) for worker, nbytes in compared]
            self._note((ts.key, "plan-does-not-pay", ws, family, candidates))
        return pays

    def _candidate(self, ws: Any, missing: int) -> Candidate:
        return Candidate(ws, missing, self._wait_s(ws), missing * self.prices.typical_s)

    def _consumers(self, inputs: Sequence[TaskState], ws: Any) -> int:
        """Count the tasks planned at ``ws`` that take the first of ``inputs``; of many tasks, a part is looked at."""
        waiters = inputs[0].waiters or ()
        seen = [self._plan.get(waiter.key) for waiter in islice(waiters, LOOKED_AT)]
        here = sum(family is not None and family.home is ws for family in seen)
        return max(1, here * len(waiters) // max(len(seen), 1))

    def _decide_by_inputs(self, ts: TaskState) -> Any:
        inputs = ts.dependencies
        running = self._running
        if len(inputs) == 1:
            (dts,) = inputs
            holders = dts.who_has or ()
            if len(holders) == 1:
                (ws,) = holders
                return self._decided(ts, ws, "only-holder") if ws in running else self._left_to_dask(ts, "no-holder")
        self._siblings.pop(ts.key, None)
        nworkers = len(running)
        held, total = policy.holdings(inputs, nworkers)
        workers = policy.best_holders(held, running, total_nbytes=total)
        if not workers:
            return self._left_to_dask(ts, "no-holder")
        if len(workers) == 1:
            return self._decided(ts, workers[0], "only-holder")
        workers = policy.with_room(workers)
        consumer = next(iter(ts.dependents)).key if len(ts.dependents) == 1 else None
        sibling = self._siblings.get(consumer)
        # What this task makes has to come to its siblings' results, unless it is made beside them.
        apart_nbytes = policy.result_nbytes(total, len(inputs)) if sibling is not None else 0
        prices = self.prices
        at = {ws.address: nbytes for ws, nbytes in held.items()} if prices.two else {}
        candidates = []
        for ws in workers:
            missing = total - held[ws]
            if ws is not sibling:
                missing += apart_nbytes
            coming = ws.needs_what
            if missing and coming:
                missing -= sum(policy.share_nbytes(d, nworkers) for d in inputs if d in coming)
            candidates.append(Candidate(ws, missing, self._wait_s(ws), prices.move_s(ws.address, missing, at)))
        if self._waiting and policy.alike(candidates):
            # What is planned there comes later than this task, and by this task later still.
            candidates = [
                Candidate(ws, missing, wait_s + self._queues.backlog(ws) * policy.UNKNOWN_S / ws.nthreads, move_s)
                for ws, (_, missing, wait_s, move_s) in zip(workers, candidates, strict=True)
            ]
        choice = policy.choose(candidates)
        if consumer is not None:
            if len(self._siblings) >= SIBLINGS:
                self._siblings.clear()
            self._siblings[consumer] = choice.worker
        return self._decided(ts, choice.worker, choice.reason, None, candidates)

    def _wait_s(self, ws: WorkerState) -> float:
        """Estimate when a thread of ``ws`` is free; tasks of unknown duration count for little, see the policy."""
        return self._busy_s(ws, policy.UNKNOWN_S) / ws.nthreads + seams.incoming_nbytes(ws) * self.prices.typical_s

    def _begins_s(self, ts: TaskState, ws: WorkerState) -> float:
        """Estimate when ``ws`` begins a task that it was given; 0 if nobody knows how long that takes.

        What goes before it is like the others that the worker was given; of unknown duration, these are like the task itself.
        """
        own_s = _duration_s(ts.prefix)
        if not own_s:
            return 0.0
        given = sum(ws.task_prefix_count.values())
        other_s = (self._busy_s(ws, own_s) - own_s) / (given - 1) if given > 1 else own_s
        return max(given - ws.nthreads, 1) * other_s / ws.nthreads

    def _busy_s(self, ws: WorkerState, unknown_s: float) -> float:
        """Sum the durations of what ``ws`` was given, but for long-running tasks; those that nobody knows take ``unknown_s``."""
        prefixes = self.scheduler.task_prefixes
        busy_s = 0.0
        for name, count in ws.task_prefix_count.items():
            busy_s += count * (_duration_s(prefixes[name]) or unknown_s)
        return busy_s

    def _decided(
        self,
        ts: TaskState,
        ws: Any,
        reason: str,
        family: Family | None = None,
        compared: Sequence[Candidate] | None = None,
    ) -> Any:
        self._counts[reason] += 1
        self._note((ts.key, reason, ws, family, compared))
        return ws

    def _left_to_dask(self, ts: TaskState, reason: str, family: Family | None = None) -> None:
        self._note((ts.key, reason, None, family, None))

    def _why_unplanned(self, ts: TaskState) -> str:
        return self._unplanned.pop(ts.key) or ("unplanned" if ts.dependents else "lone")

    def _failed(self, what: str, error: Exception) -> None:
        """Count an exception, and show the first one."""
        self._errors += 1
        if self._errors == 1:
            again = "here and if it happens again (counted, not shown)"
            logger.error("%s; Dask decides instead, %s", what, again, exc_info=error)

    def _give_up(self, what: str, error: Exception) -> None:
        """Leave all tasks that wait here to Dask, in whose queue they are."""
        for key in self._waiting:
            self._note((key, "failed", None, self._plan.pop(key, None), None))
        self._queues.clear()
        self._early_wait = False
        self._failed(what, error)

    # --- memory -------------------------------------------------------------------------------------------------------

    def _drop_copies(self, ts: TaskState, stimulus_id: str) -> None:
        """Let workers that are short of memory forget copies of inputs of ``ts``, which is done."""
        for dts in ts.dependencies:
            if len(dts.who_has or ()) > 1:
                for ws in copies.droppable(dts, self._place_of):
                    self.scheduler.request_remove_replicas(ws.address, [dts.key], stimulus_id=stimulus_id)
                    self._counts["copy-dropped"] += 1

    def _place_of(self, ts: TaskState) -> Any | None:
        """Tell where a task runs, or is planned to; None if nobody knows."""
        family = self._plan.get(ts.key)
        return ts.processing_on or (None if family is None else family.home)

    # --- queues -------------------------------------------------------------------------------------------------------

    def _enter(self, ts: TaskState, family: Family) -> None:
        """Let a task wait for the worker of its family."""
        first = not self._waiting
        self._early_wait = family.early or (self._early_wait and not first)
        self._queues.enter(ts.key, self._rank(ts, family), family)
        if first:
            for queued in self.scheduler.queued:
                if queued is not ts:
                    self._queues.enter_unplanned(queued.key, queued.priority)

    def _forget(self) -> None:
        self._plan.clear()
        self._rootish.clear()
        self._siblings.clear()
        self._early.clear()
        self._nearly.clear()
        self._opened.clear()
        self._early_wait = False
        self._queues.clear()
        self._unplanned.clear()
        self._refused.clear()

    def _slots_opened(self, *, stimulus_id: str) -> None:
        """Stand in for ``stimulus_queue_slots_maybe_opened``."""
        assert self._stock is not None
        if self._waiting:
            self._dispatch(stimulus_id)
        else:
            self._stock.slots_opened(stimulus_id=stimulus_id)
        if self._crossings:
            self._crossings = bool(self._plan)
            try:
                self._share_out()
            except Exception as error:  # noqa: BLE001 - what waits on busy workers waits on, as in stock Dask
                self._failed("idle workers could not be helped", error)

    def _dispatch(self, stimulus_id: str) -> None:
        """Send queued tasks to the workers that have free slots."""
        assert self._stock is not None
        due = self._due()
        while True:
            try:
                key, ws = next(due, _NOTHING_DUE)
            except Exception as error:  # noqa: BLE001 - an error in the policy must not stall a graph
                self._give_up("queued tasks could not be dealt out", error)
                break
            if ws is None:
                break
            self._dequeuing = (key, ws)
            try:
                self.scheduler.transitions({key: "processing"}, stimulus_id)
            finally:
                self._dequeuing = None
        if not self._waiting:
            self._stock.slots_opened(stimulus_id=stimulus_id)

    def _due(self) -> Iterator[tuple[Any, Any]]:
        """Go through the tasks that are to be sent, and their workers: a task a worker and round."""
        scheduler = self.scheduler
        free = self._queues.able(self._with_slots)
        if len(free) > 1:
            free.sort(key=_load)
        if self._early_wait and self.scheduler.idle:
            self._opened.update(islice(self._queues.wanted, HELPED))
        if self._opened:
            free += [ws for ws in self._opened if ws in self._queues.wanted and ws not in self._with_slots]
            self._opened.clear()
        while free and self._waiting:
            served = []
            for ws in free:
                slots = ws in self._with_slots
                able = slots or (self._early_wait and self._may_open(ws))
                key = self._queues.next_for(ws, self._is_queued) if able else None
                if key is None or not (slots or (key in self._waiting and self._waiting[key].early)):
                    continue
                ts: Any = self._tasks[key]
                first: Any = scheduler.queued.peek()
                if first.priority[0] < ts.priority[0]:
                    if not slots:
                        continue
                    # Priorities that users gave hold across all queues, as in Dask, whatever the plan.
                    key = first.key
                    self._decided(first, ws, "urgent")
                elif key in self._waiting:
                    self._decided(ts, ws, "planned", self._waiting[key])
                yield key, ws
                served.append(ws)
            free = served

    def _is_queued(self, key: Any) -> bool:
        ts = self._tasks.get(key)
        return ts is not None and ts.state == "queued"

    def _priority_of(self, key: Any) -> Any:
        return self._rank(self._tasks[key], self._waiting[key])

    def _rank(self, ts: TaskState, family: Family) -> Any:
        return _ahead_of_all(ts.priority) if family.early else ts.priority

    # --- balance ------------------------------------------------------------------------------------------------------

    def _rehome(self, family: Family) -> bool:
        """Give a family whose home is gone or paused to the running worker with the least waiting for it."""
        able = [ws for ws in self.scheduler.workers.values() if ws in self._running]
        if not able:
            return False
        home = min(able, key=lambda ws: self._queues.backlog(ws) / ws.nthreads)
        self._queues.move(family, home, "rehomed", self._priority_of)
        self._counts["rehomed"] += 1
        return True

    def _rehome_all(self) -> bool:
        """Give away everything that waits for workers that are gone or paused; False if there was nothing to give."""
        moved = False
        for ws in self._queues.homes():
            if ws not in self._running:
                for family, _ in self._queues.families_of(ws):
                    moved = self._rehome(family) or moved
        return moved

    def _try_to_rehome_all(self) -> bool:
        try:
            return self._rehome_all()
        except Exception as error:  # noqa: BLE001 - an error in the policy must not stall a graph
            self._give_up("tasks of a worker that is gone could not be dealt again", error)
            return True

    def _balance(self) -> None:
        """Let paused workers' families go elsewhere, and idle workers take over families of busy ones."""
        if self._stock is None:
            return
        moved = False
        try:
            self.prices.refresh(self.scheduler.bandwidth)
            if self._waiting:
                moved = self._rehome_all()
                for thief in self._idle_workers():
                    moved = self._relieve(thief) or moved
        except Exception as error:  # noqa: BLE001 - without it, tasks may wait for workers that are gone
            self._give_up("balancing failed", error)
            moved = True
        if self._early_wait:
            # Some may have been short of memory.
            self._opened.update(self._queues.wanted)
        if moved or self._opened:
            self._dispatch(f"{_NAME}-balance-{time()}")

    def _idle_workers(self) -> list[WorkerState]:
        """List workers with a thread that has nothing to do and nothing to wait for."""
        idle = (
            ws
            for ws in self._with_slots
            if len(ws.processing) - len(ws.long_running) < ws.nthreads and not self._queues.backlog(ws)
        )
        return list(islice(idle, HELPED))

    def _relieve(self, thief: WorkerState) -> bool:
        """Let ``thief`` take over families from the end of the longest queue, as far as that pays."""
        queues = self._queues
        victim = max(queues.homes(), key=lambda ws: queues.backlog(ws) / ws.nthreads, default=None)
        if victim is None or victim is thief or not queues.backlog(victim):
            return False
        tails: list[Tail] = []
        found: list[Family] = []
        duration_s = 0.0
        for family, keys in queues.families_of(victim, LOOKED_AT):
            prefix = self._tasks[keys[0]].prefix
            tails.append(Tail(len(keys), len(keys) * self._output_nbytes.get(prefix.name, 0)))
            found.append(family)
            duration_s = _duration_s(prefix)
        taken = stealing.relief(
            Backlog(queues.backlog(victim), victim.nthreads, duration_s),
            Backlog(0, thief.nthreads, duration_s),
            tails,
            self.prices.bandwidth,
        )
        for family in found[:taken]:
            queues.move(family, thief, "relieved", self._priority_of)
        if taken:
            self._counts["relieved"] += taken
        return taken > 0

    def _share_out(self) -> None:
        """Let workers that have nothing to do take crossings that wait on busy ones."""
        if not self._sharing.is_due(time()):
            return
        for ts, family, thief, compared in self._sharing.turn(self._idle_workers()):
            if family.home is not thief:
                self._queues.move(family, thief, "relieved", self._priority_of)
                self._counts["relieved"] += 1
            self._decided(ts, thief, "steal-allowed", family, compared)

    def _get_thief(self, scheduler: Any, ts: TaskState, potential_thieves: Any, *, occupancies: Any) -> Any:
        """Stand in for ``WorkStealing._get_thief``: no thief where staying pays, by the price of what would have to be moved."""
        assert self._stock is not None
        assert self._stock.get_thief is not None
        thief = self._stock.get_thief(scheduler, ts, potential_thieves, occupancies=occupancies)
        try:
            return self._consented(ts, thief)
        except Exception as error:  # noqa: BLE001 - stealing goes on as in stock Dask
            self._failed("a steal could not be judged", error)
            return thief

    def _consented(self, ts: TaskState, thief: Any) -> Any:
        """Return ``thief`` if it may have ``ts``, or None."""
        victim = ts.processing_on
        if thief is None or victim is None:
            return thief
        family = self._plan.get(ts.key) if self._plan else None
        if family is not None and family.home is victim:
            nbytes = self._output_nbytes.get(ts.prefix.name, 0)
        elif ts.dependencies:
            nbytes = sum(d.get_nbytes() for d in ts.dependencies if thief not in (d.who_has or ()))
        else:
            return thief
        wait_s = self._begins_s(ts, victim)
        pays = stealing.pays(wait_s, nbytes, self.prices.bandwidth)
        if not pays:
            self._counts[REFUSED] += 1
            if self._refused.get(ts.key) == victim.address:
                return None
            self._refused[ts.key] = victim.address
        compared = (
            Candidate(victim, 0, wait_s, 0.0),
            Candidate(thief, nbytes, 0.0, nbytes / self.prices.bandwidth),
        )
        if pays:
            return self._decided(ts, thief, "steal-allowed", family, compared)
        self._note((ts.key, REFUSED, victim, family, compared))
        return None


def _is_unusual(ts: TaskState) -> Collection[Any] | bool | None:
    """Whether someone has said where the task may run: Dask decides about those."""
    return ts.worker_restrictions or ts.host_restrictions or ts.resource_restrictions or ts.actor


def _priority(ts: TaskState) -> Any:
    return ts.priority


def _ahead_of_all(priority: Any) -> Any:
    """Rank what others wait for before all else of its graph, and after all that its user has put before it."""
    return (*priority[:-1], priority[-1] - _MANY_TASKS)


def _expected_s(ts: Any) -> float:
    return _duration_s(ts.prefix)


def _load(ws: WorkerState) -> float:
    return float(len(ws.processing) / ws.nthreads)


def _duration_s(prefix: Any) -> float:
    """Expected duration of a task; 0 if nothing is known, unlike in Dask, which then assumes half a second."""
    if prefix.duration_average >= 0:
        return float(prefix.duration_average)
    return float(max(2 * prefix.max_exec_time, 0))
