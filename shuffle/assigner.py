"""The scheduler's side of the assignment: what is known of sizes, workers and consumers when a run begins.

Covers: samples of inputs, and how long they are waited for; the room of workers, and their links; the answer to stock's
question which worker makes which output.
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
    lies together. So what both sides bring counts, as far as it is known by then: the other side's samples, where its
    question waits at that moment; else it is taken for even, and its inputs for as large as those that were seen
    (:func:`~dask_gpurt.shuffle.sizes.joint_sizes`). It is not waited for; whoever waits on its side may go on.

    Interleavings that matter:

    1. A's question waits; A dies. Its answer goes nowhere; its sample is as true as before.
    2. A's question waits; B's creates the run, or that of the other side of a join. A is woken, and is given its run.
    3. A's question waits; the shuffle is forgotten or cancelled. A is woken by the clock, and told so by stock's checks.
    4. A's question waits; dask-gpurt is uninstalled. A is woken, and gets a run of stock's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dask_gpurt import seams
from dask_gpurt.shuffle.assignment import WORK_NBYTES_S, Host, assign, fullness, link_prices, ranges, targets
from dask_gpurt.shuffle.consumers import sharing, wanted_on
from dask_gpurt.shuffle.dataframe import FrameSpec
from dask_gpurt.shuffle.rechunk import BrickSpec
from dask_gpurt.shuffle.sizes import Sample, expected_sizes, joint_sizes
from dask_gpurt.topology import MESSAGE_NBYTES, Topology

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.scheduler import WorkerState
    from distributed.shuffle import ShuffleSchedulerPlugin

__all__ = ["PATIENCE_S", "SAMPLES_WANTED", "Assigner"]

Floats = npt.NDArray[np.float64]

#: From so many workers a sample is wanted. Two tell a hot key from sorted data; with some more, neighbouring inputs that
#: happen to be alike are not taken for all.
SAMPLES_WANTED = 4
#: Samples are waited for no longer than this, and no longer than the fullest worker needs for what others could take.
PATIENCE_S = 0.5

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
    topology
        What workers have measured of the links between them.
    """

    def __init__(self, scheduler: Scheduler, topology: Topology) -> None:
        self.scheduler = scheduler
        self.topology = topology
        #: At most so long a question waits, and no longer than what could be won takes at this rate.
        self.patience_s = PATIENCE_S
        self.rate_nbytes_s = WORK_NBYTES_S
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
        seen = Sample.from_message(sample)
        poll = self._polls.setdefault(shuffle_id, _Poll())
        poll.samples[worker] = seen
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
        barrier = seams.shuffle_barrier(self.scheduler, shuffle_id)
        others = sharing(barrier)
        if not isinstance(spec, FrameSpec) or self._begun(others):
            return 0.0
        workers = self._workers(barrier)
        inputs = len(barrier.dependencies)
        if len(poll.samples) >= min(SAMPLES_WANTED, inputs, len(workers)):
            return 0.0
        outputs = np.array(list(spec.output_partitions), dtype=np.int64)
        # As if all inputs were like those that were seen.
        seen = [sample for sample in poll.samples.values() if sample.column == spec.column]
        like_seen = expected_sizes(seen, outputs, len(seen)) * (inputs / len(seen)) if seen else None
        # What others bring is no reason to wait for samples of this one: they are taken for even.
        sizes = joint_sizes([(like_seen, inputs), *[(None, self._side(other)[1]) for other in others]], len(outputs))
        if sizes is None:
            return 0.0
        total = float(sizes.sum())
        shares = self._targets(workers, total)
        stock = ranges(len(outputs), len(workers))
        surplus = fullness(stock, sizes, shares) - fullness(assign(stock, sizes, shares), sizes, shares)
        return min(surplus * total / len(workers) / self.rate_nbytes_s, self.patience_s)

    # The assignment

    def assign(self, spec: Any, stock: dict[Any, str]) -> Mapping[Any, str]:
        """Say which worker makes which output of a new run; ``stock`` is Dask's own answer."""
        barrier = seams.shuffle_barrier(self.scheduler, str(spec.id))
        others = sharing(barrier)
        for shuffle_id in (str(spec.id), *others):
            if (poll := self._polls.get(shuffle_id)) is not None:
                poll.over.set()
        if not isinstance(spec, FrameSpec | BrickSpec) or self._begun(others) or not stock:
            return stock
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
        sides = [(self._sizes(spec), len(barrier.dependencies)), *map(self._side, others)]
        sizes = joint_sizes(sides, len(stock))
        shares = self._targets(workers, None if sizes is None else float(sizes.sum()))
        if sizes is None:
            sizes = np.ones(len(stock))
        owners = assign(
            dealt,
            sizes,
            shares,
            np.fromiter((_best(wanted.get(output), number) for output in stock), np.intp, len(stock)),
        )
        return {output: addresses[owner] for output, owner in zip(stock, owners.tolist(), strict=True)}

    def _sizes(self, spec: Any) -> Floats | None:
        """Return the expected bytes of a shuffle's outputs, as far as something is known of them."""
        if isinstance(spec, BrickSpec):
            sizes = np.full(1, float(ITEM_NBYTES))
            for axis in spec.new:
                # An axis of unknown length is not cut: it is the same for all.
                lengths = np.nan_to_num(np.array(axis, dtype=np.float64), nan=1.0)
                sizes = np.multiply.outer(sizes, lengths).ravel()
            return sizes
        poll = self._polls.get(str(spec.id))
        if poll is None or not isinstance(spec, FrameSpec):
            return None
        samples = [sample for sample in poll.samples.values() if sample.column == spec.column]
        if not samples:
            return None
        inputs = len(seams.shuffle_barrier(self.scheduler, str(spec.id)).dependencies)
        return expected_sizes(samples, np.array(list(spec.output_partitions), dtype=np.int64), inputs)

    def _side(self, shuffle_id: str) -> tuple[Floats | None, int]:
        """Return what another shuffle brings: the expected bytes of its outputs, if they are known, and its inputs."""
        spec = seams.shuffle_spec(self._plugin, shuffle_id)
        inputs = len(seams.shuffle_barrier(self.scheduler, shuffle_id).dependencies)
        return (None if spec is None else self._sizes(spec)), inputs

    def _begun(self, shuffle_ids: Iterable[str]) -> bool:
        """Whether one of these shuffles has been assigned already."""
        return any(shuffle_id in self._plugin.active_shuffles for shuffle_id in shuffle_ids)

    def _worker_for(self, shuffle_id: str) -> Mapping[Any, str] | None:
        active = self._plugin.active_shuffles.get(shuffle_id)  # type: ignore[call-overload]
        return None if active is None else active.run_spec.worker_for

    def _workers(self, barrier: Any) -> dict[str, WorkerState]:
        """Return the workers that stock would take into account, as far as they are there."""
        workers = self.scheduler.workers
        allowed = set(barrier.worker_restrictions or ()) & workers.keys() or workers.keys()
        return {address: ws for address, ws in workers.items() if address in allowed}

    def _targets(self, workers: Mapping[str, WorkerState], total_nbytes: float | None) -> Floats:
        """Say how much of a shuffle each worker should get."""
        known = self.topology.prices(MESSAGE_NBYTES)
        prices = link_prices(list(workers), {pair: price_s / MESSAGE_NBYTES for pair, price_s in known.items()})
        return targets([_host(ws) for ws in workers.values()], total_nbytes, prices)


def _host(ws: WorkerState) -> Host:
    room = ROOM_FRACTION * ws.memory_limit - ws.memory.optimistic if ws.memory_limit else None
    return Host(ws.nthreads, None if room is None else max(room, 0.0))


def _best(waiting: Mapping[str, int] | None, number: Mapping[str, int]) -> int:
    """Return the number of the worker where most bytes wait, or -1."""
    known = {number[address]: nbytes for address, nbytes in (waiting or {}).items() if address in number}
    return max(known, key=lambda worker: (known[worker], -worker)) if known else -1
