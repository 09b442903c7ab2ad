"""Where the outputs of a shuffle are wanted, as far as the scheduler's graph says.

Covers: the worker that has, or will have, what an output meets next (:func:`wanted_on`); the shuffles whose outputs it meets there
(:func:`sharing`).
Does not cover: whether the output goes there; :mod:`dask_gpurt.shuffle.assignment`.

An output meets what its task, or a task that takes its result, takes besides: the partition of a persisted frame that
it is joined with, the block of an array that it is added to. Those lie somewhere already, or are outputs of another
shuffle, whose workers are known once it has begun. Tasks with one input and one taker, on either side, change nothing
in that. What many tasks take is not looked at, nor tasks that take many results: such a one is no partner of one output.

Outputs and tasks are matched by order, which is how Dask numbers them. Where somebody numbers them in another way, outputs
go where they are not wanted, and the consumers fetch what they need, as ever.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dask_gpurt import seams

if TYPE_CHECKING:
    from distributed.scheduler import TaskState

__all__ = ["PARTNERS_MAX", "STEPS_MAX", "sharing", "wanted_on"]

#: A task with more inputs than this, or a result with more takers, joins no two partners.
PARTNERS_MAX = 4
#: Tasks that are followed from an output to where it meets something, and from there to where that comes from.
STEPS_MAX = 4

#: Output to worker, of a run.
WorkerFor = Mapping[Any, str]


def sharing(barrier: TaskState) -> list[str]:
    """Return the ids of the shuffles that share output tasks with the one of this barrier."""
    tasks = {other for task in barrier.dependents for other in task.dependencies if other is not barrier}
    return sorted(shuffle_id for task in tasks if (shuffle_id := seams.barrier_shuffle(task)) is not None)


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
    #: Barrier of a shuffle to the tasks that make its outputs, and where.
    runs: dict[TaskState, dict[TaskState, str]] = {}

    def home_of(task: TaskState) -> str | None:
        for _ in range(STEPS_MAX):
            if task.who_has:
                # What lies on several workers draws to none of them.
                return next(iter(task.who_has)).address if len(task.who_has) == 1 else None
            for source in task.dependencies:
                if (shuffle_id := seams.barrier_shuffle(source)) is not None:
                    if source not in runs:
                        run = run_of(shuffle_id) or {}
                        runs[source] = {maker: run[output] for maker, output in _makers(source, list(run)).items()}
                    return runs[source].get(task)
            if len(task.dependencies) != 1:
                return None
            (task,) = task.dependencies
        return None

    for task, output in _makers(barrier, outputs).items():
        waiting: defaultdict[str, int] = defaultdict(int)
        for partner in _partners(task):
            if (home := home_of(partner)) is not None:
                waiting[home] += max(partner.nbytes, 1)
        if waiting:
            found[output] = dict(waiting)
    return found


def _makers(barrier: TaskState, outputs: Sequence[Any]) -> dict[TaskState, Any]:
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


def _partners(task: TaskState) -> Iterator[TaskState]:
    """Give what a task takes besides the shuffle, and what those take that take its result."""
    yield from _others(task, None)
    for _ in range(STEPS_MAX):
        if len(task.dependents) > PARTNERS_MAX:
            return
        for taker in task.dependents:
            yield from _others(taker, task)
        if len(task.dependents) != 1:
            return
        (taker,) = task.dependents
        if len(taker.dependencies) != 1:
            return
        task = taker


def _others(taker: TaskState, task: TaskState | None) -> Iterator[TaskState]:
    if len(taker.dependencies) > PARTNERS_MAX:
        return
    for other in taker.dependencies:
        if other is not task and len(other.dependents) <= PARTNERS_MAX and seams.barrier_shuffle(other) is None:
            yield other
