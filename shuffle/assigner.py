"""The scheduler's side of the assignment: what is known of sizes, workers and consumers when a run begins.

Covers: samples of inputs, and how long they are waited for; the room of workers; the answer to stock's question which
worker makes which output.
Does not cover: the decision itself, which is :mod:`dask_gpurt.shuffle.assignment`, and the estimate of sizes, which is
:mod:`dask_gpurt.shuffle.sizes`.
See also: :mod:`dask_gpurt.shuffle.sampler`, which takes the samples; :mod:`dask_gpurt.shuffle.consumers`.

Theory of operation
    A run's assignment is fixed when the run is created, by the scheduler, in one step, as in stock Dask. So all its workers
    have the same one, the restrictions of output tasks follow from it, and a restart decides anew, with the workers that
    are there then. All that is known has to be known at that moment. The chunks of a rechunk are in its spec. For a frame,
    the first input of each worker says something (:mod:`dask_gpurt.shuffle.sizes` says how much), and comes with the
    worker's question for the run.

    The first sample that comes decides whether others are waited for. Where all inputs being like it would leave stock's
    ranges as they are, the run begins at once: that is so in most shuffles. Otherwise the question waits for samples of
    :data:`SAMPLES_WANTED` workers, at most as long as could be won: the time that the fullest worker's surplus takes, and never
    more than :data:`PATIENCE_S`. A worker that asks without a sample ends the waiting, because it creates the run.

    The second side of a join takes over the first one's assignment, which is stock's rule, so what is there of both
    lies together. It is the first side's sizes that count.

    Interleavings that matter:

    1. A's question waits; A dies. Its answer goes nowhere; its sample is as true as before.
    2. A's question waits; B's creates the run. A is woken, and is given that run.
    3. A's question waits; the shuffle is forgotten or cancelled. A is woken by the clock, and told so by stock's checks.
    4. A's question waits; dask-gpurt is uninstalled. A is woken, and gets a run of stock's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dask_gpurt import seams
from dask_gpurt.shuffle.assignment import Host, assign, fullness, ranges, targets
from dask_gpurt.shuffle.consumers import wanted_on
from dask_gpurt.shuffle.dataframe import FrameSpec
from dask_gpurt.shuffle.rechunk import BrickSpec
from dask_gpurt.shuffle.sizes import Sample, expected_sizes

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.scheduler import WorkerState
    from distributed.shuffle import ShuffleSchedulerPlugin

__all__ = ["PATIENCE_S", "SAMPLES_WANTED", "Assigner"]

Floats = npt.NDArray[np.float64]

#: From so many workers a sample is wanted. Two tell a hot key from sorted data; with some more, neighbouring inputs that
#: happen to be alike are not taken for all.
SAMPLES_WANTED = 4
#: Samples are waited for no longer than this, ...
PATIENCE_S = 0.5
#: ... and no longer than the fullest worker needs for what others could take from it, at this rate: about what a worker
#: splits, receives and joins in a second.
RATE_NBYTES_S = 1e9

#: What a worker may hold before it spills, of its limit; Dask's own default.
ROOM_FRACTION = 0.6

#: A rechunk's spec has no dtype: that of most arrays.
ITEM_NBYTES = 8


@dataclass
class _Poll:
    """Samples of one shuffle, while questions for its run wait."""

    samples: dict[str, Sample] = field(default_factory=dict)
    #: Questions that wait, or are being answered.
    asking: int = 0
    #: Set when nobody has to wait any longer.
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Assigner:
    """Assigns outputs to workers.

    Parameters
    ----------
    scheduler
        The scheduler.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        #: At most so long a question waits, and no longer than what could be won takes at this rate.
        self.patience_s = PATIENCE_S
        self.rate_nbytes_s = RATE_NBYTES_S
        #: Shuffle to its samples.
        self._polls: dict[str, _Poll] = {}

    @property
    def _plugin(self) -> ShuffleSchedulerPlugin:
        return self.scheduler.plugins["shuffle"]  # type: ignore[return-value]

    def stop(self) -> None:
        """Let nobody wait any longer."""
        for poll in self._polls.values():
            poll.over.set()

    # Samples

    async def open(self, shuffle_id: str, key: Any, worker: str, sample: dict[str, Any]) -> Any:
        """Answer a worker's question for the run of a shuffle of which it has seen an input. Handler for workers."""
        poll = self._polls.setdefault(shuffle_id, _Poll())
        poll.samples[worker] = Sample.from_message(sample)
        poll.asking += 1
        try:
            if patience_s := self._patience_s(shuffle_id, poll):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(poll.over.wait(), patience_s)
            # From here to the run's creation nothing else happens on the scheduler.
            return self._plugin.get_or_create(shuffle_id, key, worker)  # type: ignore[arg-type]
        finally:
            poll.asking -= 1
            if not poll.asking:
                del self._polls[shuffle_id]

    def _patience_s(self, shuffle_id: str, poll: _Poll) -> float:
        """Say how long to wait for the samples of others."""
        if shuffle_id in self._plugin.active_shuffles:
            return 0.0
        spec = seams.shuffle_spec(self._plugin, shuffle_id)
        if not isinstance(spec, FrameSpec) or self._joined(spec):
            return 0.0
        barrier = seams.shuffle_barrier(self.scheduler, shuffle_id)
        hosts = self._candidates(barrier)
        inputs = len(barrier.dependencies)
        if len(poll.samples) >= min(SAMPLES_WANTED, inputs, len(hosts)):
            return 0.0
        outputs = np.array(list(spec.output_partitions), dtype=np.int64)
        # As if all inputs were like those that were seen.
        seen = [sample for sample in poll.samples.values() if sample.column == spec.column]
        sizes = expected_sizes(seen, outputs, len(seen)) * (inputs / max(len(seen), 1)) if seen else np.zeros(0)
        total = float(sizes.sum())
        if not total:
            return 0.0
        shares = targets(hosts, total)
        stock = ranges(len(outputs), len(hosts))
        surplus = fullness(stock, sizes, shares) - fullness(assign(stock, sizes, shares), sizes, shares)
        return min(surplus * total / len(hosts) / self.rate_nbytes_s, self.patience_s)

    # The assignment

    def assign(self, spec: Any, stock: dict[Any, str]) -> Mapping[Any, str]:
        """Say which worker makes which output of a new run; ``stock`` is Dask's own answer."""
        poll = self._polls.get(str(spec.id))
        if poll is not None:
            poll.over.set()
        if not isinstance(spec, FrameSpec | BrickSpec) or self._joined(spec) or not stock:
            return stock
        barrier = seams.shuffle_barrier(self.scheduler, str(spec.id))
        workers = self._workers(barrier)
        addresses = list(workers)
        if len(addresses) == 1:
            return dict.fromkeys(stock, addresses[0])
        number = {address: i for i, address in enumerate(addresses)}
        if number.keys() >= set(stock.values()):
            dealt = np.fromiter((number[address] for address in stock.values()), np.intp, len(stock))
        else:
            # Where tasks were meant for a worker that has left, and may run elsewhere, Dask's own answer is that worker.
            dealt = ranges(len(stock), len(addresses))
        wanted = wanted_on(barrier, list(stock), self._worker_for)
        sizes = self._sizes(spec, poll, len(barrier.dependencies))
        shares = targets(
            [_host(workers[address]) for address in addresses], None if sizes is None else float(sizes.sum())
        )
        if sizes is None or not sizes.any():
            sizes = np.ones(len(stock))
        owners = assign(
            dealt,
            sizes,
            shares,
            np.fromiter((_best(wanted.get(output), number) for output in stock), np.intp, len(stock)),
        )
        return {output: addresses[owner] for output, owner in zip(stock, owners.tolist(), strict=True)}

    def _sizes(self, spec: FrameSpec | BrickSpec, poll: _Poll | None, inputs: int) -> Floats | None:
        if isinstance(spec, BrickSpec):
            sizes = np.full(1, float(ITEM_NBYTES))
            for axis in spec.new:
                # An axis of unknown length is not cut: it is the same for all.
                lengths = np.nan_to_num(np.array(axis, dtype=np.float64), nan=1.0)
                sizes = np.multiply.outer(sizes, lengths).ravel()
            return sizes
        samples = [] if poll is None else [sample for sample in poll.samples.values() if sample.column == spec.column]
        if not samples:
            return None
        return expected_sizes(samples, np.array(list(spec.output_partitions), dtype=np.int64), inputs)

    def _joined(self, spec: Any) -> bool:
        """Whether another shuffle, which has been assigned already, shares output tasks with this one."""
        barrier = seams.shuffle_barrier(self.scheduler, str(spec.id))
        others = {other for task in barrier.dependents for other in task.dependencies if other is not barrier}
        return any(seams.barrier_shuffle(other) in self._plugin.active_shuffles for other in others)

    def _worker_for(self, shuffle_id: str) -> Mapping[Any, str] | None:
        active = self._plugin.active_shuffles.get(shuffle_id)  # type: ignore[call-overload]
        return None if active is None else active.run_spec.worker_for

    def _workers(self, barrier: Any) -> dict[str, WorkerState]:
        """Return the workers that stock would take into account, as far as they are there."""
        workers = self.scheduler.workers
        allowed = set(barrier.worker_restrictions or ()) & workers.keys() or workers.keys()
        return {address: ws for address, ws in workers.items() if address in allowed}

    def _candidates(self, barrier: Any) -> list[Host]:
        return [_host(ws) for ws in self._workers(barrier).values()]


def _host(ws: WorkerState) -> Host:
    room = ROOM_FRACTION * ws.memory_limit - ws.memory.optimistic if ws.memory_limit else None
    return Host(ws.nthreads, None if room is None else max(room, 0.0))


def _best(waiting: Mapping[str, int] | None, number: Mapping[str, int]) -> int:
    """Return the number of the worker where most bytes wait, or -1."""
    known = {number[address]: nbytes for address, nbytes in (waiting or {}).items() if address in number}
    return max(known, key=lambda worker: (known[worker], -worker)) if known else -1
