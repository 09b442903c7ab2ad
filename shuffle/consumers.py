"""Where the outputs of a shuffle are wanted, as far as the scheduler's graph says.

Covers: the worker that has, or will have, what an output meets next (:func:`wanted_on`).
Does not cover: whether the output goes there; :mod:`dask_gpurt.shuffle.assignment`.

An output meets what its task, or a task that takes its result, takes besides: the partition of a persisted frame that
it is merged with, the block of an array that it is added to. Those lie somewhere already, or are outputs of another
shuffle, whose workers are known once it has begun. What many tasks take is not looked at, nor tasks that take many
results: such a one is no partner of one output.

Outputs and tasks are matched by order, which is how Dask numbers them. Where somebody numbers them in another way, outputs
go where they are not wanted, and the consumers fetch what they need, as ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dask_gpurt import seams

if TYPE_CHECKING:
    from distributed.scheduler import TaskState

__all__ = ["PARTNERS_MAX", "wanted_on"]

#: A task with more inputs than this, or a result with more takers, joins no two partners.
PARTNERS_MAX = 4

#: Output to worker, of a run.
WorkerFor = Mapping[Any, str]


def wanted_on(
    barrier: TaskState, outputs: Sequence[Any], run_of: Callable[[str], WorkerFor | None]
) -> dict[Any, dict[str, int]]:
    """Return for outputs of a shuffle the bytes that wait for them, by the address of the worker where they do.

    Parameters
    ----------
    barrier
        The shuffle's.
    outputs
        Its outputs, in their order.
    run_of
        Gives the workers of another shuffle's outputs, by its id; None if it has not begun.
    """
    found: dict[Any, dict[str, int]] = {}
    #: Barrier of another shuffle to the tasks that make its outputs, and where.
    others: dict[TaskState, dict[TaskState, str]] = {}

    def homes(other: TaskState, shuffle_id: str) -> dict[TaskState, str]:
        if other not in others:
            run = run_of(shuffle_id) or {}
            others[other] = {task: run[output] for task, output in _tasks_of(other, list(run)).items()}
        return others[other]

    for task, output in _tasks_of(barrier, outputs).items():
        waiting: defaultdict[str, int] = defaultdict(int)
        for partner in _partners(task):
            # What is not there yet will be made where that lies which it is made of.
            for source in [partner] if partner.who_has else _inputs(partner):
                if (shuffle_id := seams.barrier_shuffle(source)) is not None:
                    if (address := homes(source, shuffle_id).get(partner)) is not None:
                        waiting[address] += 1
                # What lies on several workers draws to none of them.
                elif source.who_has and len(source.who_has) == 1:
                    (home,) = source.who_has
                    waiting[home.address] += max(source.get_nbytes(), 1)
        if waiting:
            found[output] = dict(waiting)
    return found


def _tasks_of(barrier: TaskState, outputs: Sequence[Any]) -> dict[TaskState, Any]:
    """Match the tasks that make a shuffle's outputs with those; nothing where their number differs."""
    numbered = [(task.key[1:], task) for task in barrier.dependents if isinstance(task.key, tuple)]
    if len(numbered) != len(outputs) or len(numbered) != len(barrier.dependents):
        return {}
    try:
        numbered.sort(key=lambda entry: entry[0])
    except TypeError:
        # Numbers and names in one place: not Dask's numbering.
        return {}
    return {task: output for (_, task), output in zip(numbered, outputs, strict=True)}


def _partners(task: TaskState) -> list[TaskState]:
    """Return what a task takes besides the shuffle, and what those take that take its result."""
    takers = [task, *task.dependents] if len(task.dependents) <= PARTNERS_MAX else [task]
    return [
        partner
        for taker in takers
        for partner in _inputs(taker)
        if partner is not task and len(partner.dependents) <= PARTNERS_MAX and seams.barrier_shuffle(partner) is None
    ]


def _inputs(task: TaskState) -> Collection[TaskState]:
    return task.dependencies if len(task.dependencies) <= PARTNERS_MAX else ()
