"""The shuffle's part of a worker: what its runs share.

Covers: the store, the limit on bytes under way, the counters, and which runs there are.
Does not cover: distributed's own ``ShuffleWorkerPlugin``, which stays in place and owns the runs.
See also: :mod:`dask_gpurt.shuffle.scheduler`, where it is decided which data plane a run uses.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from tornado.ioloop import PeriodicCallback

from dask_gpurt import seams
from dask_gpurt.config import ShuffleSettings
from dask_gpurt.handlers import weak
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.store import BufferStore, DictBufferStore
from dask_gpurt.seams import ShuffleClosedError
from dask_gpurt.secret import Secret
from dask_gpurt.shuffle import hashing
from dask_gpurt.shuffle.account import Account
from dask_gpurt.shuffle.carrier import Carrier
from dask_gpurt.shuffle.credits import ByteWindow
from dask_gpurt.shuffle.kept import Allowance
from dask_gpurt.shuffle.links import LinkReporter
from dask_gpurt.shuffle.repair import REPAIR, REPAIRED
from dask_gpurt.shuffle.sampler import Sampler
from dask_gpurt.shuffle.shortcut import Shortcut
from dask_gpurt.shuffle.watchdog import Watchdog, describe, interval_s

if TYPE_CHECKING:
    from dask.typing import Key
    from distributed import Worker

    from dask_gpurt.shuffle.run import Run

__all__ = ["ENDED_MAX", "TRIM_FRACTION", "TRIM_INTERVAL_S", "ShuffleWorker", "part_of"]

#: From this part of a worker's memory limit on, Arrow's allocator has to give back what it only keeps for later. Dask
#: pauses a worker at 0.8 of its limit, and nothing that a paused worker does would make Arrow give anything back.
TRIM_FRACTION = 0.7
#: How often that is looked at, which costs some ten microseconds; giving back costs milliseconds.
TRIM_INTERVAL_S = 0.2

#: A compiler takes about 100 MiB of memory, which workers with a lower limit have better use for.
COMPILER_MEMORY_LIMIT = 2 * 2**30
#: Slabs that may wait for their next use, in a pool that only shuffles use.
IDLE_NBYTES = 64 * 2**20

#: Runs that are remembered after their end.
ENDED_MAX = 32

_TRIM = "gpurt-shuffle-trim"
_WATCH = "gpurt-shuffle-watchdog"

logger = logging.getLogger(__name__)


class ShuffleWorker:
    """What the runs of one worker share.

    Parameters
    ----------
    worker
        The worker.
    settings
        Its settings.
    store
        Where runs keep shards until they are unpacked.
    pool
        Lends the memory of shards and outputs; None: one of its own.
    device_store
        Where runs keep shards that lie on a device; None: one without a limit.
    secret
        By which peers know each other; see :mod:`dask_gpurt.secret`.
    """

    def __init__(
        self,
        worker: Worker,
        settings: ShuffleSettings,
        store: BufferStore,
        pool: BlockPool | None = None,
        device_store: BufferStore | None = None,
        *,
        secret: Secret | None = None,
    ) -> None:
        self.worker = worker
        self.store = store
        self.device_store = DictBufferStore() if device_store is None else device_store
        self.pool = BlockPool(IDLE_NBYTES) if pool is None else pool
        self.window = ByteWindow(settings.send_limit)
        self.allowance = Allowance(settings.keep_sent or 0)
        self.carrier = Carrier(
            worker,
            self,
            ucx=settings.transport != "dask",
            secret=secret,
            compress=settings.compression != "off",
        )
        self.sampler = Sampler(worker)
        self._shortcut = Shortcut(worker)
        self._reporter = LinkReporter(worker, self.carrier.topology)
        limit = seams.worker_memory_limit(worker)
        #: Whether there is room for compiled kernels.
        self.compiles = limit is None or limit >= COMPILER_MEMORY_LIMIT
        self._started = False
        self._stopped = False
        self._repair: Callable[..., Any] | None = None
        self._runs: dict[tuple[str, int], Run] = {}
        #: What the scheduler has said of runs that are not here, of the last of them.
        self._repairs: dict[tuple[str, int], list[tuple[int, str, Any]]] = {}
        #: Of runs that ended lately, oldest first: their last states, and what they did.
        self.ended_runs: deque[tuple[dict[str, Any], Account]] = deque(maxlen=ENDED_MAX)
        self._watchdog = None if settings.watchdog is None else Watchdog(settings.watchdog)
        #: Runs ever begun here.
        self.runs = 0
        #: Exchanges with peers.
        self.messages = 0
        #: Bytes by path: to peers, from peers, and from this worker to itself.
        self.sent_nbytes = 0
        self.received_nbytes = 0
        self.local_nbytes = 0
        #: Seconds that tasks spent splitting and unpacking.
        self.split_s = 0.0
        self.unpack_s = 0.0

    def __repr__(self) -> str:
        return f"<ShuffleWorker {self.worker.address} {len(self._runs)} active, {self.runs} begun, {self.window!r}>"

    def start(self) -> None:
        """Begin; runs find this object through ``worker.extensions["gpurt"].shuffle``.

        Dask's own plugin, which owns the runs, need not be there yet: a worker that joins is given both at once, and
        one that preloads dask-gpurt has it first.
        """
        self._started = True
        # Where Dask stops them when the worker closes.
        self.carrier.start()
        self.worker.stream_handlers[REPAIR] = self._repair = weak(self.repair, late_is_no_error=True)
        self.sampler.start()
        self._shortcut.start()
        self._reporter.start()
        trim = self.worker.periodic_callbacks[_TRIM] = PeriodicCallback(self.trim, 1000 * TRIM_INTERVAL_S)
        trim.start()
        if self._watchdog is not None:
            interval_ms = 1000 * interval_s(self._watchdog.patience_s)
            watch = self.worker.periodic_callbacks[_WATCH] = PeriodicCallback(self.watch, interval_ms)
            watch.start()

    async def stop(self) -> None:
        """End. Runs that are under way go on to their end with what they hold, in memory, for the store may go now."""
        self.sampler.stop()
        self._shortcut.stop()
        self._started = False
        hashing.replacement.detach(self)
        self._reporter.stop()
        for name in (_TRIM, _WATCH):
            callback = self.worker.periodic_callbacks.pop(name, None)
            if callback is not None:
                callback.stop()
        self.store = DictBufferStore()
        self.device_store = DictBufferStore()
        for run in list(self._runs.values()):
            # One that is closed meanwhile gives its data to nobody.
            with contextlib.suppress(ShuffleClosedError):
                await run.move()
        self._stopped = True
        if not self._runs:
            await self._leave()

    async def _leave(self) -> None:
        """Answer nobody any longer."""
        if self.worker.stream_handlers.get(REPAIR) is self._repair:
            del self.worker.stream_handlers[REPAIR]
        await self.carrier.close()

    def trim(self) -> None:
        """Have memory given back that is only kept for later, where memory is short."""
        if self.runs and seams.worker_memory_fraction(self.worker) > TRIM_FRACTION:
            self.pool.trim()
            if "pyarrow" in sys.modules:
                import pyarrow as pa

                pa.default_memory_pool().release_unused()

    def watch(self) -> None:
        """Report runs that make no progress."""
        if self._watchdog is None:
            return
        states = {str(run): run.state() for run in self._runs.values()}
        verdict = self._watchdog.look(states, time.monotonic())
        for name, still_s in verdict.stuck.items():
            state = states[name]
            around = {
                "address": self.worker.address,
                "status": self.worker.status.name,
                "window": repr(self.window),
                "store": repr(self.store),
            }
            logger.warning("%s makes no progress since %.1f s:%s", name, still_s, describe(state, around))
            self._tell("shuffle-stuck", name, still_s=still_s, state=state, worker=around)
        for name in verdict.going_on:
            logger.info("%s goes on again", name)
            self._tell("shuffle-goes-on", name)

    def _tell(self, action: str, run: str, **what: Any) -> None:
        # Where there is no connection to the scheduler it is dropped, and the worker ends anyway.
        self.worker.log_event("gpurt", {"action": action, "run": run, **what})

    def replace_functions(self) -> None:
        """Have Dask's functions for frames replaced in this process, from start to stop. Call it when they are loaded."""
        if self._started:
            hashing.replacement.attach(self)

    def opened(self, run: Run) -> None:
        """Note a run."""
        self.runs += 1
        self._runs[str(run.id), run.run_id] = run
        self.sampler.attach()
        self._shortcut.attach()
        self._reporter.attach()
        self.carrier.prepare()
        for repair in self._repairs.pop((str(run.id), run.run_id), ()):
            run.repair(*repair)

    def repair(self, shuffle_id: str, run_id: int, epoch: int, lost: str, moved: Any) -> None:
        """Have a run go on without a worker. Handler for the scheduler."""
        found = self._runs.get((shuffle_id, run_id))
        if found is not None:
            found.repair(epoch, lost, moved)
            return
        # It has ended, or its spec, as it was before that, is still on its way here.
        self._repairs.setdefault((shuffle_id, run_id), []).append((epoch, lost, moved))
        while len(self._repairs) > ENDED_MAX:
            del self._repairs[next(iter(self._repairs))]
        self.repaired(shuffle_id, run_id, epoch, [], [])

    def repaired(self, shuffle_id: str, run_id: int, epoch: int, keys: Sequence[Key], missed: Sequence[Key]) -> None:
        """Tell the scheduler that a run has done its part of a repair, for which inputs, and for which it could not."""
        # A worker whose stream is closed is lost itself.
        stream = self.worker.batched_stream
        if not stream.closed():
            stream.send(
                {
                    "op": REPAIRED,
                    "shuffle_id": shuffle_id,
                    "run_id": run_id,
                    "epoch": epoch,
                    "keys": list(keys),
                    "missed": list(missed),
                }
            )

    async def ended(self, run: Run) -> None:
        """Forget a run, but for what it did."""
        self._runs.pop((str(run.id), run.run_id), None)
        self.ended_runs.append((self._state(run), run.account))
        if self._stopped and not self._runs:
            await self._leave()

    def runs_of(self, ids: Collection[str]) -> list[Run]:
        """The active runs of these shuffles."""
        return [run for (shuffle_id, _), run in self._runs.items() if shuffle_id in ids]

    def states(self) -> list[dict[str, Any]]:
        """Return the states of the active runs, oldest first, with their names and whether they are reported as stuck."""
        return [self._state(run) for run in self._runs.values()]

    def accounts(self) -> list[tuple[dict[str, Any], Account]]:
        """Return the states of the runs that ended lately and of the active ones, oldest first, and what each did."""
        return [*self.ended_runs, *((self._state(run), run.account) for run in self._runs.values())]

    def _state(self, run: Run) -> dict[str, Any]:
        stuck = self._watchdog is not None and str(run) in self._watchdog.stuck
        return {"id": str(run.id), "run_id": run.run_id, "stuck": stuck, **run.state()}

    def metrics(self) -> dict[str, float]:
        """Counters since the start, in bytes and seconds."""
        carrier, ways = self.carrier, self.carrier.ways
        return {
            "runs": self.runs,
            "messages": self.messages,
            "bytes_sent": self.sent_nbytes,
            "bytes_sent_ucx": carrier.ucx_nbytes,
            "bytes_sent_device": carrier.device_nbytes,
            "bytes_sent_comm": carrier.comm_nbytes,
            "bytes_before_compression": ways.raw_nbytes,
            "bytes_after_compression": ways.wire_nbytes,
            "bytes_received": self.received_nbytes,
            "bytes_local": self.local_nbytes,
            "split_s": self.split_s,
            "unpack_s": self.unpack_s,
            "compress_s": ways.compress_s,
            "compress_sample_s": ways.sample_s,
            "credit_wait_s": carrier.credit_wait_s,
        }


def part_of(worker: Worker) -> ShuffleWorker:
    """Find the part of a worker.

    A worker that joined after a run began, and has no part (yet), can be asked to send to that run. It gets a part for
    this run alone; it holds no output of it.
    """
    extension: Any = worker.extensions.get("gpurt")
    part: ShuffleWorker | None = getattr(extension, "shuffle", None)
    return part if part is not None else ShuffleWorker(worker, ShuffleSettings(transport="dask"), DictBufferStore())
