"""The shuffle's part of the scheduler: which data plane a run uses.

Covers: the decision, once for each new run, by the class of the spec that all workers of the run receive. So they agree
by construction, and runs that exist when this is installed or removed end on the plane on which they began.
Does not cover: which worker makes which output, which is :mod:`dask_gpurt.shuffle.assigner`'s; and everything else: run
ids, barrier and restart are distributed's, but for the one below.
See also: :mod:`dask_gpurt.shuffle.run`, which asks for a run to be declined.

Theory of operation, of a barrier that ends a run which is not its own
    What tells a worker of a restart (``shuffle-fail``, then ``free-keys``, then ``compute-task``) comes in this order, by one
    stream. So no task that belongs to a run meets the one before it there, whatever else has told the worker of the new
    run meanwhile: an old run's failure is for that run alone, and an old task's end is known by the number of the task's
    run. That is not enough for the barrier:

    1. A does the barrier of run 1. A worker is lost; run 1 ends; this is on its way to A, which is busy.
    2. The others repeat all inputs of A and theirs: run 2. Its barrier goes to A again.
    3. A hears of 1 and of 2 at once. It still does the barrier of run 1, and takes that for the one it is asked for.
    4. It ends, in whichever way. Since it is an old one, Dask takes the barrier from A, to do it again.
    5. That a barrier is taken from its worker ends, in Dask, the run: run 2 is "forgotten". Its barrier is asked for again, of
       inputs that are there, and finds no run: ``P2PConsistencyError``, for the user.

    With stock, A's barrier of run 1 lasts for as long as the scheduler tries to reach the lost worker, so there is half a
    minute for this. Therefore a shuffle whose barrier is asked for though it has no run is restarted, as Dask does where a
    worker's loss ends a run.

    It is asked for without a run, too, when all transfers have ended just before their workers heard of the end of the run, and
    were asked for them again before they had noted that: Dask takes the old results for the new ones, and nobody has begun a
    run. With many inputs that does not happen, but a shuffle may have one. (Found by simulation.)

Theory of operation, of a worker that is joining
    Dask knows a worker some moments before it has our part; the larger the library of the transport, the longer. A run that begins in
    between would be stock's, for all workers, with its shards in files without checksums. And it is then that runs begin: a worker was
    lost, its nanny brings it back, and what it took part in is restarted. So a new run waits until each worker that will say whether it has our
    part has said so, or has left, or has kept silent for :data:`JOINING_LIMIT_S`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from dask_gpurt import seams
from dask_gpurt.config import ShuffleSettings
from dask_gpurt.handlers import weak
from dask_gpurt.shuffle import dataframe, rechunk
from dask_gpurt.shuffle.assigner import Assigner
from dask_gpurt.shuffle.links import LinkBoard
from dask_gpurt.shuffle.repair import Repairs
from dask_gpurt.topology import Topology

if TYPE_CHECKING:
    from distributed import Scheduler
    from distributed.shuffle import ShuffleSchedulerPlugin

__all__ = ["DECLINED_LIMIT", "JOINING_LIMIT_S", "ShuffleScheduler", "supports"]

logger = logging.getLogger(__name__)

#: Shuffles that are remembered as declined; an older one that is forgotten is declined once more.
DECLINED_LIMIT = 10_000

#: For so long new runs wait for a worker that is joining.
JOINING_LIMIT_S = 30.0


def supports(spec: object) -> bool:
    """Whether our data plane can do what this spec of stock's asks for."""
    return rechunk.supports(spec) or dataframe.supports(spec)


class ShuffleScheduler:
    """Gives our spec to new runs that our data plane can do, on a cluster whose workers all can.

    Parameters
    ----------
    scheduler
        The scheduler.
    settings
        Its settings.
    topology
        Takes up what workers measure of their links; None: one of its own.
    joining
        Whether a worker, by its address, will say whether it has our part, and has not yet.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        settings: ShuffleSettings,
        topology: Topology | None = None,
        joining: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.scheduler = scheduler
        self.settings = settings
        self._joining = joining
        #: Workers that are joining, to when that was noticed.
        self._since: dict[str, float] = {}
        #: Set, and replaced, whenever a worker has said whether it has our part, or has left.
        self._changed = asyncio.Event()
        self.links = LinkBoard(scheduler, Topology() if topology is None else topology)
        self.assigner = Assigner(scheduler, self.links.topology)
        self.repairs = Repairs(scheduler, self._able)
        self._capable: set[str] = set()
        # Ordered, for the oldest to be dropped.
        self._declined: dict[str, str] = {}
        self._restore: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        return f"<ShuffleScheduler {len(self._capable)} workers capable, {len(self._declined)} shuffles declined>"

    def start(self) -> None:
        """Decide for new runs from now on."""
        if self._restore:
            return
        plugin: ShuffleSchedulerPlugin = self.scheduler.plugins["shuffle"]  # type: ignore[assignment]
        self._restore = [
            seams.override_shuffle_spec(plugin, self.choose),
            seams.override_shuffle_creation(self.scheduler, weak(self.joined)),
            seams.override_shuffle_assignment(plugin, self.assigner.assign),
            self.links.start(),
            seams.hear_ended_runs(plugin, self._ended),
        ]
        self.repairs.start()
        self.scheduler.handlers["gpurt_shuffle_decline"] = weak(self.decline)
        self.scheduler.handlers["gpurt_shuffle_open"] = weak(self.assigner.open)

    def stop(self) -> None:
        """Leave new runs to stock."""
        for restore in self._restore:
            restore()
        self._restore.clear()
        self.repairs.stop()
        self._since.clear()
        self._change()
        self.scheduler.handlers.pop("gpurt_shuffle_decline", None)
        self.scheduler.handlers.pop("gpurt_shuffle_open", None)
        self.assigner.stop()

    def _ended(self, shuffle_id: str) -> None:
        # When all that follows from it has been decided: mostly it is restarted then, or nobody wants it any more.
        asyncio.get_running_loop().call_soon(self._see_to, shuffle_id)

    def _see_to(self, shuffle_id: str) -> None:
        if seams.restart_without_run(self.scheduler, shuffle_id):
            logger.info("Shuffle %s is restarted: its run ended with a barrier that was none of its own", shuffle_id)

    def set_capable(self, address: str, capable: bool) -> None:
        """Note whether a worker has our part."""
        if capable:
            self._capable.add(address)
        else:
            self._capable.discard(address)
        self._change(address)

    def remove_worker(self, address: str) -> None:
        """Forget a worker that has left."""
        self._capable.discard(address)
        self._change(address)
        self.links.remove_worker(address)

    def _change(self, address: str | None = None) -> None:
        """Have those look again who wait for workers that are joining, of which this is none any more."""
        if address is not None:
            self._since.pop(address, None)
        self._changed.set()
        self._changed = asyncio.Event()

    def _awaited(self) -> dict[str, float]:
        """Return the workers that are waited for, and until when."""
        now = monotonic()
        joining = [address for address in self.scheduler.workers if self._joining(address)]
        until = {address: self._since.setdefault(address, now) + JOINING_LIMIT_S for address in joining}
        return {address: end for address, end in until.items() if end > now}

    async def joined(self, shuffle_id: Any) -> None:
        """Wait, before a new run of a shuffle begins, for the workers that are joining."""
        active = self.scheduler.plugins["shuffle"].active_shuffles  # type: ignore[attr-defined]
        while shuffle_id not in active and (awaited := self._awaited()):
            try:
                async with asyncio.timeout(min(awaited.values()) - monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                if silent := sorted(awaited.keys() - self._awaited().keys()):
                    logger.warning("Shuffles do not wait any longer to hear from %s", ", ".join(silent))

    def _able(self, workers: set[str]) -> bool:
        return self._capable.issuperset(workers)

    def choose(self, spec: Any) -> Any:
        """Answer stock's spec for a new run with ours, where we can."""
        if str(spec.id) in self._declined or not self._capable.issuperset(self.scheduler.workers) or not supports(spec):
            return spec
        ours: Any = rechunk.BrickSpec if rechunk.supports(spec) else dataframe.FrameSpec
        return ours.of(spec, keeps=self.settings.keep_sent is not None)

    def decline(self, id: str, run_id: int, reason: str) -> bool:  # noqa: A002  the worker's message
        """Restart a shuffle on stock's data plane. Handler for workers; the answer says whether it was still active."""
        self._declined[id] = reason
        while len(self._declined) > DECLINED_LIMIT:
            del self._declined[next(iter(self._declined))]
        restarted = seams.restart_shuffle(self.scheduler, id, run_id)
        if restarted:
            logger.info("Shuffle %s is done by Dask's own data plane: %s", id, reason)
        return restarted
