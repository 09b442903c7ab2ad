"""Puts the tiered store under a worker of Dask, and takes it away again.

Theory of operation
-------------------
:meth:`MemoryManager.start` puts a :class:`~dask_gpurt.memory.mapping.TieredMapping` in the place of ``worker.data``.
What stock has in memory moves over; what it has spilled stays where it is and is *adopted*, to be read when it is
needed. Both happen in one go on the event loop, so no task sees a state between.

Before a task runs (``worker.execute``), its inputs are brought into memory and pinned, and it waits while memory is
above its limit and something is on its way out: that is what slows tasks down to what the disk takes. Where everything
is in memory and there is room, a task passes with one look. While it runs, the inputs of the next one are fetched.

A peer that asks for a key which is not in memory (``get_data``) is sent the copy below as it lies.

When a copy below turns out to be missing or damaged, the worker tells the scheduler that it has no such replica
(FreeKeysEvent, as when a key is freed), and gives back the tasks that wanted it (RescheduleEvent). The scheduler takes
the key from another worker, or computes it again. A key that is lost for the fourth time fails the tasks that want it
instead. What cannot be computed again (scattered data; where a worker cannot tell, it asks the scheduler) stays on the list as *ruined*: whoever asks for it, task, peer
or client, gets the error. (Telling the scheduler would not do: 2026.7.1 tries to compute it all the same, and hangs.)

:meth:`MemoryManager.stop` moves everything back to stock's own store, key by key and off the loop as long as tasks
still put new ones, the rest in one go.

Covers: the worker's hooks, limits, what is ahead of a worker, losing keys.
Does not cover: moving (:mod:`dask_gpurt.memory.mover`), choosing (:mod:`dask_gpurt.memory.policy`).
See also: :mod:`dask_gpurt.seams` for the names of distributed that are used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Collection, Container, Hashable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import time
from typing import Any

from distributed.core import Status
from tornado.ioloop import PeriodicCallback

from dask_gpurt import seams
from dask_gpurt.config import MemorySettings
from dask_gpurt.errors import CorruptDataError, DeviceFullError, InstallError, SpillError
from dask_gpurt.memory import codec
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.cipher import Cipher
from dask_gpurt.memory.cuda import Device, is_out_of_memory
from dask_gpurt.memory.device import DeviceFrames, device_mover, on_device, pinned_pool
from dask_gpurt.memory.disk import SpillFolder, remove_leftovers
from dask_gpurt.memory.horizon import DYING, IDLE, RECENT, SERVED, Priority, Snapshot, Use, Word, next_use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore, ObjectStore, RawName
from dask_gpurt.memory.mapping import Ruined, RuinedForClient, TieredMapping, serving
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.memory.packing import Packer
from dask_gpurt.memory.rmm import Rescuer, RmmResource
from dask_gpurt.memory.shards import DeviceChunkName, DeviceShardStore, ShardStore
from dask_gpurt.memory.spare import Offers
from dask_gpurt.memory.spiller import Spiller
from dask_gpurt.memory.store import BufferStore, DictBufferStore
from dask_gpurt.memory.watch import Watch

__all__ = ["MemoryManager", "WorkerHorizon", "refusal"]

logger = logging.getLogger(__name__)

#: In a worker's own directory: what holds its spill folder.
_FOLDER = "gpurt"

#: Part of a device that is used unless something else is configured; the rest is for what is being computed.
DEVICE_FRACTION = 0.8

#: States of a worker in which it runs tasks, or will.
_ALIVE = ("init", "running", "paused", "closing_gracefully")

#: How often a key may be lost and computed again before the tasks that want it fail.
LOSSES_MAX = 3

#: Tasks per thread that have ended of which the scheduler may not have heard, or not have said what follows.
RECENT_PER_THREAD = 2
#: Keys that may have come since the scheduler spoke last, where it does: of short tasks, as many as a round trip takes.
FRESH = 64

#: From this part of a tier's limit on a worker asks the scheduler what it knows of next uses: early enough to know it when
#: something has to be moved away.
WATCH_FRACTION = 0.5
#: Words about keys that are gone, beyond as many as there are keys, that are kept until they are looked through.
WORDS_SPARE = 1000

_ABSENT = object()

_ADAPT = "gpurt-memory-adapt"
_DECAY = "gpurt-memory-decay"
#: Memory and files that wait for their next use go after one to two times so long. Enough for the next step of a job, or
#: for somebody to look at a result and go on.
DECAY_INTERVAL_S = 60.0
#: How often the limit of HOST is set anew; the memory monitor looks as often.
ADAPT_INTERVAL_S = 0.2
#: Part of its limit that HOST keeps however much of the process's memory is no data.
LEAST_FRACTION = 1 / 8
#: Of a value, as Dask's arrays and tables have it on average.
TYPICAL_NBYTES = 2**24
#: Slabs that may wait for their next use: part of the HOST limit, and bytes at most. They are memory that no key
#: accounts for; where memory gets short, and when they have waited for a while, they go back to the system.
IDLE_FRACTION = 1 / 2
IDLE_NBYTES_MAX = 4 * 2**30
#: Part of the memory monitor's mark from which on memory is short, and the part of the idle slabs that stay then: under
#: pressure blocks come and go, and memory that the next one finds need not be mapped again.
TIGHT_FRACTION = 0.9
TIGHT_IDLE_FRACTION = 1 / 4


class _Stock:
    """Stock's own store as a tier below: what it held when we came, and what it is given back when we go.

    A copy may be removed late, by a thread. :meth:`remove` sees to it that nothing but that copy is removed.
    """

    def __init__(self, store: MutableMapping[Any, Any]) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._copies: dict[Hashable, _StockCopy] = {}

    def adopt(self, key: Hashable, nbytes: int) -> _StockCopy:
        """Return a copy for what lies in the store."""
        copy = self._copies[key] = _StockCopy(self, key, nbytes)
        return copy

    def give_back(self, key: Hashable, value: object, nbytes: int) -> _StockCopy:
        """Put a value into the store; blocks while the store spills."""
        with self._lock:
            try:
                self.store[key] = value
            except Exception:
                # A store refuses what is too large and cannot be serialized. We kept it, and nothing may be lost.
                logger.debug("stock's store refused %r", key, exc_info=True)
                seams.keep_in_stock(self.store, key, value)
            return self.adopt(key, nbytes)

    def holds(self, key: Hashable, copy: object) -> bool:
        """Whether ``copy`` is what lies in the store under ``key``."""
        return copy is not None and self._copies.get(key) is copy

    def remove(self, copy: _StockCopy) -> None:
        """Remove what ``copy`` stands for."""
        with self._lock:
            if self._copies.get(copy.key) is copy:
                del self._copies[copy.key]
                del self.store[copy.key]

    def release(self, keys: Container[Hashable]) -> None:
        """Let go of the store: what is not among ``keys`` is removed now, and nothing ever after."""
        with self._lock:
            self._copies.clear()
            for key in [key for key in self.store if key not in keys]:
                del self.store[key]


class _StockCopy:
    """A value that lies in stock's own store, as a copy below."""

    __slots__ = ("_stock", "key", "nbytes")

    #: Where it is counted.
    tier = Tier.DISK

    def __init__(self, stock: _Stock, key: Hashable, nbytes: int) -> None:
        self._stock = stock
        self.key = key
        self.nbytes = nbytes

    def load(self) -> object:
        try:
            return seams.load_from_stock(self._stock.store, self.key)
        except OSError as error:
            raise SpillError(error.errno, f"cannot read {self.key!r} from stock's store: {error}") from error
        except KeyError as error:
            raise CorruptDataError(f"{self.key!r} is not in stock's store any more") from error

    def frames(self) -> None:
        return None

    def remove(self) -> None:
        self._stock.remove(self)


def refusal(store: MutableMapping[Any, Any]) -> str | None:
    """Say why the tiers cannot take the place of ``store``, what a worker keeps its data in; None: they can."""
    if any(cls.__name__ == "ProxifyHostFile" for cls in type(store).__mro__):
        return "dask-cuda's JIT unspilling is on (ProxifyHostFile); its proxies cannot be taken over"
    if seams.is_chosen_store(store):
        return f"a {type(store).__name__} was chosen for the data of this worker, which is not taken away"
    return None


class WorkerHorizon:
    """Next uses, from what the worker knows at the moment; see :mod:`dask_gpurt.memory.horizon`.

    Parameters
    ----------
    worker
        The worker. All methods but :meth:`uses` are called on its event loop.
    """

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._loop_thread = threading.get_ident()
        self._recent: deque[set[Hashable]] = deque(maxlen=RECENT_PER_THREAD * worker.state.nthreads)
        #: Keys that came last.
        self._fresh: deque[Hashable] = deque(maxlen=FRESH)
        #: The task that ended last, as far as its result was put, which time it was given to this worker, and its priority.
        self._ended: Hashable = None
        self._ended_run: int | None = None
        #: Tasks that are over, of which the worker hears in a moment.
        self._leaving: set[Hashable] = set()
        self._ended_priority: Priority | None = None
        self._words: dict[Hashable, Word] = {}
        #: Key to the peers that have fetched it.
        self._served: dict[Hashable, set[str]] = {}

    def note(self, key: Hashable) -> None:
        """Note that ``key`` came right now."""
        self._fresh.append(key)
        task = seams.worker_task(self._worker, key)
        if task is None:
            self._recent.append({key})
            return
        self._recent.append({key, *seams.input_keys(self._worker, task)})
        if task.run_spec is not None:
            self._leaving.discard(key)
            self._ended, self._ended_run, self._ended_priority = key, task.run_id, seams.rank(task)

    def begin(self, key: Hashable) -> None:
        """Note that a task begins."""
        self._leaving.discard(key)

    def leave(self, key: Hashable) -> None:
        """Note that a task is over, before the worker is told."""
        self._leaving.add(key)

    def starting(self) -> set[Hashable]:
        """Return the tasks that start as soon as the worker hears of those that are over."""
        self._leaving &= {task.key for task in self._worker.state.executing}
        return seams.about_to_start(self._worker, self._leaving | {self._ended})

    def tell(
        self, words: Iterable[tuple[Hashable, Sequence[Any] | None, bool, Sequence[Sequence[Any]] | None, int]]
    ) -> None:
        """Take note of what the scheduler says: keys, and for each what a :class:`Word` has."""
        for key, priority, wanted, users, behind in words:
            there = None if users is None else tuple((user, address) for user, address in users)
            self._words[key] = Word(None if priority is None else tuple(priority), wanted, there, behind)

    def serve(self, keys: Iterable[Hashable], address: str) -> None:
        """Take note that a peer has got ``keys``."""
        for key in keys:
            if key in self._words:
                self._served.setdefault(key, set()).add(address)

    @property
    def has_served(self) -> bool:
        """Whether peers have got something that is still here."""
        return bool(self._served)

    def spare(self) -> list[Hashable]:
        """Return the keys that only peers need, which have fetched them."""
        served = list(self._served)
        return [key for key, use in zip(served, self.uses(served), strict=True) if use is SERVED]

    def drop(self, key: Hashable) -> None:
        """Forget what is known about a key, for it is deleted; if it comes again, that is another value."""
        self._words.pop(key, None)
        self._served.pop(key, None)

    def forget(self, keys: Container[Hashable] = ()) -> None:
        """Forget what the scheduler said about all but ``keys``."""
        self._words = {key: word for key, word in self._words.items() if key in keys}
        self._served = {key: served for key, served in self._served.items() if key in keys}

    def __len__(self) -> int:
        return len(self._words)

    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        """Say the next use of each of ``names``."""
        # The worker's state may change under the eyes of any other thread.
        snapshot = None
        starting: set[Hashable] = set()
        if threading.get_ident() == self._loop_thread:
            task = None if self._ended is None else seams.worker_task(self._worker, self._ended)
            if task is not None and task.run_id != self._ended_run:
                # It is to be done again, and needs its inputs again.
                self._ended = None
            now, ready, nworkers = seams.ahead(self._worker)
            # Between two tasks nothing is running.
            snapshot = Snapshot(self._ended_priority if now is None else now, ready, nworkers)
            starting = self.starting()
        recent = set().union(*self._recent)
        if self._words:
            # The scheduler speaks of all that has been here for a while.
            recent.update(key for key in self._fresh if key not in self._words)
        return [self._use(name, snapshot, recent, starting) for name in names]

    def _use(
        self, name: Hashable, snapshot: Snapshot | None, recent: set[Hashable], starting: Container[Hashable]
    ) -> Use:
        key = name.key if isinstance(name, DeviceFrames) else name
        if isinstance(key, DeviceChunkName):
            return key.use
        if snapshot is None:
            return IDLE
        word = self._words.get(key)
        dependents = [
            ("executing" if user in starting else state, priority)
            for user, state, priority in seams.dependents_of(self._worker, key)
            # One that ends right now is still executing, to the worker.
            if user != self._ended and not (user in self._leaving and state == "executing")
        ]
        use = next_use(dependents, snapshot, word, recent=key in recent)
        if word is not None and word.users is not None and use == RECENT:
            return self._after(key, word.users)
        return use

    def _after(self, key: Hashable, users: Iterable[tuple[Hashable, str]]) -> Use:
        """Judge the next use of a block of which all users are known, and for which none waits here."""
        served = self._served.get(key, ())
        use = DYING
        for user, address in users:
            if address == self._worker.address:
                # It may be forgotten already, as all is that was needed only by what has ended.
                if user != self._ended and not seams.worker_holds(self._worker, user):
                    return RECENT
            elif address in served:
                use = SERVED
            else:
                return RECENT
        return use


class MemoryManager:
    """The tiers of one worker.

    Parameters
    ----------
    worker
        A distributed worker. All methods are called on its event loop.
    settings
        The settings.
    """

    def __init__(self, worker: Any, settings: MemorySettings) -> None:
        self._worker = worker
        self._settings = settings
        limits = seams.memory_limits(worker)
        self._limits = limits
        host_nbytes = _limit(settings.host_limit, limits.limit_nbytes)
        if settings.host_limit is None:
            host_nbytes = limits.target_nbytes
        self._gpu = Device.find()
        device_nbytes = self._device_limit()
        disk_nbytes = min((n for n in (settings.disk_limit, limits.disk_nbytes) if n is not None), default=None)
        #: The books. What has no limit is not spilled.
        self.ledger = Ledger(
            {
                Tier.HOST: host_nbytes,
                Tier.DEVICE: device_nbytes,
                Tier.DISK: disk_nbytes,
                Tier.OBJECT: settings.object_limit,
            }
        )
        #: Where shuffles keep their shards, those on the host and those on a device.
        self.store: BufferStore = DictBufferStore()
        self.device_store: BufferStore = DictBufferStore()
        self._active = host_nbytes is not None or limits.spill_nbytes is not None or device_nbytes is not None
        self._host: Mover | None = None
        self._device: Mover | None = None
        self._mapping: TieredMapping | None = None
        self._folder: SpillFolder | None = None
        self._objects: ObjectFolder | None = None
        self._packers: dict[Tier, Packer] = {}
        #: Lends host memory to whatever is read back, and to shuffles.
        self._idle_nbytes_max = min(IDLE_NBYTES_MAX, int((host_nbytes or IDLE_NBYTES_MAX) * IDLE_FRACTION))
        self.pool = BlockPool(self._idle_nbytes_max)
        #: The same for what goes to a device and comes from it.
        self._device_pool = self.pool if self._gpu is None else pinned_pool(self._gpu, host_nbytes)
        self._device_idle_nbytes_max = self._device_pool.idle_limit_nbytes
        #: Whether the process is short of memory.
        self._tight = False
        self._stock: _Stock | None = None
        self._hooks: seams.WorkerHooks | None = None
        self._losses: Counter[Hashable] = Counter()
        self._last_error: dict[Hashable, Exception] = {}
        #: Keys that are ruined unless the scheduler, which is being asked, knows how to make them.
        self._doubts: dict[Hashable, asyncio.Task[None]] = {}
        self._prefetching: asyncio.Task[None] | None = None
        self._prefetched_for: Hashable = None
        #: Whether it will be looked for the next task in a moment.
        self._looking = False
        self._horizon: WorkerHorizon | None = None
        self._watch: Watch | None = None
        self._offers: Offers | None = None
        self._rescuer: Rescuer | None = None
        self._rmm: RmmResource | None = None
        #: Whether nobody has looked yet what there is of RMM.
        self._unguarded = False

    def __repr__(self) -> str:
        state = "stock" if self._mapping is None else repr(self._mapping)
        return f"<MemoryManager of {getattr(self._worker, 'address', '?')}: {state}, {self.ledger!r}>"

    # The beginning

    async def start(self) -> None:
        """Put the tiers under the worker. A worker without any limit is left as it is.

        Raises
        ------
        InstallError, SpillError, SeamError
            If that cannot be; the worker is as it was then.
        """
        if not self._active:
            return
        store = seams.worker_store(self._worker)
        if (reason := refusal(store)) is not None:
            raise InstallError(reason)
        hooks = seams.worker_hooks(self._worker)
        loop = asyncio.get_running_loop()
        parent = self._settings.directory or os.path.join(self._worker.local_directory, _FOLDER)
        # What others had no time to remove is there.
        await loop.run_in_executor(None, remove_leftovers, os.path.dirname(self._worker.local_directory))
        if self._settings.object_url is not None:
            self._objects = await loop.run_in_executor(None, ObjectFolder, self._settings.object_url, self.pool)
        self._folder = await loop.run_in_executor(None, SpillFolder, parent, self.pool)
        if self._objects is not None:
            # Not waited for: a store may take its time, and what dead workers have left there may be much.
            loop.run_in_executor(None, _begin, self._objects)
        cipher = Cipher(self.pool.lease) if self._settings.encryption else None
        horizon = self._horizon = WorkerHorizon(self._worker)
        self._watch = Watch(self._worker, self._tell)
        self._offers = Offers(horizon.spare, self._watch.offer)
        host = self._host = Mover(
            Spiller(
                self.ledger,
                horizon,
                overflow=Tier.OBJECT if self._objects else None,
                dearness=self._object_dearness,
                # What Dask takes for spilled data is keys: neither shards, nor frames of what it knows to be on a device.
                counted=lambda name: not isinstance(name, RawName),
            ),
            DiskStore(self._folder, self._packer(Tier.DISK, self._folder), cipher),
            loop,
            self._on_lost,
            overflow=ObjectStore(self._objects, self._packer(Tier.OBJECT, self._objects), cipher)
            if self._objects
            else None,
        )
        if self.ledger.limit(Tier.DEVICE) is not None:
            self._device = device_mover(
                host, horizon, loop, self._on_lost, device=self._gpu, lease=self._device_pool.lease
            )
            self._rescuer = Rescuer(self._device, loop, self._whose_allocation, others=[host])
            self._unguarded = True
            self._guard_allocations()
        mapping = TieredMapping(
            host,
            self._need_nbytes,
            device=self._device,
            on_device=on_device,
            announce=self._announce,
            dropped=horizon.drop,
            known_nbytes=lambda key: seams.worker_result_nbytes(self._worker, key),
        )
        host_nbytes_max = self.ledger.limit(Tier.HOST)
        # From here on nothing waits: the worker sees one store or the other.
        stock = _Stock(store)
        moved: list[Hashable] = []
        try:
            for key in list(store):
                if seams.stock_copy_below(store, key):
                    self._adopt(mapping, key, stock.adopt(key, self._nbytes(key)))
                else:
                    mapping[key] = store[key]
                    moved.append(key)
        except BaseException:
            # Everything is still in stock's store.
            await self._close_movers()
            raise
        for key in moved:
            del store[key]
        self._stock = stock
        self._mapping = mapping
        self._hooks = hooks
        # Where Dask stops them when the worker closes.
        decay = self._worker.periodic_callbacks[_DECAY] = PeriodicCallback(self._decay, 1000 * DECAY_INTERVAL_S)
        decay.start()
        if host_nbytes_max is not None and self._limits.spill_nbytes is not None:
            adapt = PeriodicCallback(partial(self._adapt, host_nbytes_max), 1000 * ADAPT_INTERVAL_S)
            self._worker.periodic_callbacks[_ADAPT] = adapt
            adapt.start()
        self.store = ShardStore(host)
        if self._device is not None:
            self.device_store = DeviceShardStore(self._device)
        seams.set_worker_store(self._worker, mapping)
        seams.set_worker_hooks(self._worker, seams.WorkerHooks(execute=self._execute, get_data=self._get_data))

    # Allocations of RMM

    def _guard_allocations(self) -> None:
        """Have RMM call back when it is out of memory, if it is in use, and does not yet."""
        if self._rescuer is None or not RmmResource.in_use() or (self._rmm is not None and self._rmm.installed):
            return
        self._unguarded = False
        if self._rmm is not None:
            # Somebody has put another resource there.
            self._rmm.uninstall()
        try:
            self._rmm = self._rescuer.resource = RmmResource(self._rescuer.rescue)
        except RuntimeError as error:
            logger.debug("RMM is there, and no device that it could use: %s", error)
        else:
            logger.debug("allocations are guarded: %r", self._rmm)

    def _whose_allocation(self) -> str:
        key = seams.running_key(self._worker, threading.get_ident())
        what = f"thread {threading.current_thread().name!r}" if key is None else f"task {key!r}"
        return f"{what} on worker {self._worker.address}"

    # What the scheduler knows

    def may_watch(self) -> None:
        """Take note that the scheduler will tell what it knows of next uses, once it is asked."""
        if self._watch is not None:
            self._watch.available = True

    def _announce(self, key: Hashable) -> None:
        assert self._horizon is not None
        assert self._watch is not None
        self._horizon.note(key)
        if self._unguarded:
            self._guard_allocations()
        if self._watch.available and not self._watch.on and self._filled() > WATCH_FRACTION:
            self._watch.set(True)

    def _filled(self) -> float:
        """Return the part of its limit that the fullest tier holds."""
        limits = ((tier, self.ledger.limit(tier)) for tier in (Tier.HOST, Tier.DEVICE))
        return max((self.ledger.used(tier) / limit for tier, limit in limits if limit), default=0.0)

    def _tell(self, words: Iterable[Any]) -> None:
        assert self._horizon is not None
        self._horizon.tell(words)
        if self._mapping is not None and len(self._horizon) > 2 * len(self._mapping) + WORDS_SPARE:
            self._horizon.forget(self._mapping)
        self._offer()

    def _offer(self) -> None:
        """Offer what only peers need, if there may be such a key."""
        if self._offers is not None and self._horizon is not None and self._horizon.has_served:
            self._offers.soon()

    # The end

    async def stop(self) -> None:
        """Put stock's own store back with all that there is; calling it again does nothing."""
        await self._end(give_back=True)

    async def close(self) -> None:
        """End for a worker that closes: what is on DISK goes with it, and what is in memory stays, for peers that ask."""
        await self._end(give_back=False)

    async def _end(self, *, give_back: bool) -> None:
        mapping, stock, hooks = self._mapping, self._stock, self._hooks
        if mapping is None or stock is None or hooks is None:
            return
        if self._prefetching is not None:
            self._prefetching.cancel()
        if self._offers is not None:
            self._offers.close()
        if self._watch is not None and give_back:
            await self._watch.close()
        for name in (_ADAPT, _DECAY):
            callback = self._worker.periodic_callbacks.pop(name, None)
            if callback is not None:
                callback.stop()
        for mover in self._movers():
            mover.set_limit(None)
        if give_back:
            await self._return_all(mapping, stock)
        else:
            for key in mapping:
                value = mapping.home(key).in_memory.get(key, _ABSENT)
                if value is not _ABSENT:
                    seams.keep_in_stock(stock.store, key, value)
            stock.release(mapping)
        self._mapping = None
        self.store = DictBufferStore()
        self.device_store = DictBufferStore()
        seams.set_worker_store(self._worker, stock.store)
        seams.restore_worker_hooks(self._worker, hooks)
        # Beside the worker's own directory, which Dask removes when the worker closes.
        await self._close_movers(None if give_back else os.path.dirname(self._worker.local_directory))

    async def _return_all(self, mapping: TieredMapping, stock: _Stock) -> None:
        """Move every key to ``stock``: off the loop what is there now, in one go what came meanwhile."""
        loop = asyncio.get_running_loop()
        for key in list(mapping):
            if key not in mapping or stock.holds(key, mapping.home(key).copy_of(key)):
                continue
            home = mapping.home(key)
            try:
                pinned = await home.ensure([key])
            except MemoryError:
                continue  # there may be room when all others have gone
            except SpillError:
                continue  # it was reported lost
            if key not in home:
                # Deleted while it was read.
                home.unpin(pinned)
            elif pinned:
                value = home.get(key)
                copy = await loop.run_in_executor(None, stock.give_back, key, value, self._nbytes(key))
                home.unpin(pinned)
                if key in mapping and mapping.home(key) is home and home.in_memory.get(key) is value:
                    home.delete(key)
                    self._adopt(mapping, key, copy)
                else:
                    # It was deleted meanwhile, or means another value by now.
                    stock.remove(copy)
        # From here on nothing waits.
        for key in list(mapping):
            if not stock.holds(key, mapping.home(key).copy_of(key)):
                try:
                    value = mapping[key]
                except MemoryError as error:
                    # Stock has no place for it either.
                    mapping.home(key).delete(key)
                    self._on_lost(key, error)
                except (KeyError, SpillError) as error:
                    logger.debug("%r was lost: %r", key, error)  # and reported
                    mapping.forget(key)
                else:
                    stock.give_back(key, value, 0)
        stock.release(mapping)

    def _adopt(self, mapping: TieredMapping, key: Hashable, copy: _StockCopy) -> None:
        assert self._host is not None
        self._host.adopt(key, copy.nbytes, copy)
        mapping.adopt(key)

    def _nbytes(self, key: Hashable) -> int:
        task = seams.worker_task(self._worker, key)
        return 0 if task is None else int(task.nbytes or 0)

    async def _close_movers(self, aside: str | None = None) -> None:
        self._unguarded = False
        if self._rescuer is not None:
            self._rescuer.close()
            self._rescuer = None
        if self._rmm is not None:
            self._rmm.uninstall()
            self._rmm = None
        for mover in self._movers():
            await mover.close()
        self._device = None
        self._host = None
        if self._folder is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._folder.close, aside)
            self._folder = None
            if self._settings.directory is None:
                # Made for it; another worker's may be there.
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.join(self._worker.local_directory, _FOLDER))
        if self._objects is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._objects.close)
            self._objects = None
        self.pool.trim()
        # To unlock memory takes a while.
        await asyncio.get_running_loop().run_in_executor(None, self._device_pool.trim)

    def _adapt(self, nbytes_max: int) -> None:
        """Leave room below the mark of the memory monitor for what is in the process and not in the books.

        Code, and what running tasks take: no spilling makes these smaller. Where they are large the process would pass
        the mark, a worker that passes the next one is paused, and at the last one it is killed.
        """
        mark = self._limits.spill_nbytes
        assert mark is not None
        assert self._host is not None
        process_nbytes = seams.process_memory_nbytes(self._worker)
        # What only waits for its next use is the first to go.
        tight = process_nbytes > mark * TIGHT_FRACTION
        idle_nbytes_max = self._idle_nbytes_max
        self.pool.set_idle_limit(int(idle_nbytes_max * TIGHT_IDLE_FRACTION) if tight else idle_nbytes_max)
        if tight is not self._tight and self._device_pool is not self.pool:
            # To unlock memory takes a while.
            idle_nbytes = int(self._device_idle_nbytes_max * (TIGHT_IDLE_FRACTION if tight else 1))
            asyncio.get_running_loop().run_in_executor(None, self._device_pool.set_idle_limit, idle_nbytes)
        self._tight = tight
        room = mark - process_nbytes + self.ledger.used(Tier.HOST)
        self._host.set_limit(max(int(nbytes_max * LEAST_FRACTION), min(nbytes_max, room)))

    async def _decay(self) -> None:
        """Give back memory and files that were kept for later, when later does not come."""
        self.pool.decay()
        self._guard_allocations()
        if self._prefetching is not None and not seams.is_to_run(self._worker, self._prefetched_for):
            # Its task was taken away, and maybe none comes after it.
            self._prefetching.cancel()
        if self._device_pool is not self.pool:
            # To unlock memory takes a while.
            await asyncio.get_running_loop().run_in_executor(None, self._device_pool.decay)
        if self._watch is not None and self._watch.on:
            short = self._filled() > WATCH_FRACTION / 2 or not self._calm()
            if not short:
                self._watch.set(False)
                assert self._horizon is not None
                self._horizon.forget()
        if self._folder is not None and self._folder.idle_nbytes:
            await asyncio.get_running_loop().run_in_executor(None, self._folder.decay)
        if self._objects is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._objects.renew)

    def _object_dearness(self) -> float:
        """How many times as long OBJECT takes as DISK, as far as that is known."""
        if self._folder is None or self._objects is None:
            return 1.0
        there, here = (folder.meter.link.price(TYPICAL_NBYTES) for folder in (self._objects, self._folder))
        return there / here

    def _packer(self, tier: Tier, folder: SpillFolder | ObjectFolder) -> Packer | None:
        if self._settings.compression == "off":
            return None
        packer = self._packers[tier] = Packer(folder.meter, self.pool.lease)
        return packer

    def _calm(self) -> bool:
        """Whether everything is in memory and there is room. Asked for each task, and more."""
        host, device = self._host, self._device
        return (host is None or host.spiller.calm) and (device is None or device.spiller.calm)

    def _movers(self) -> list[Mover]:
        # From the top down: what is above may still need what is below.
        return [mover for mover in (self._device, self._host) if mover is not None]

    # Limits

    def _device_limit(self) -> int | None:
        configured = self._settings.device_limit
        if isinstance(configured, int):
            return configured
        if self._gpu is None:
            return None
        total = self._gpu.total_nbytes
        if configured is not None:
            return int(total * configured)
        # dask-cuda's own store knows what the worker was told.
        told = getattr(getattr(seams.worker_store(self._worker), "device_buffer", None), "n", None)
        return int(total * DEVICE_FRACTION) if told is None else int(told)

    def _need_nbytes(self) -> int:
        """Bytes by which the process is above the mark that stock's memory monitor spills down to."""
        mark = self._limits.target_nbytes or self._limits.spill_nbytes
        return 0 if mark is None else seams.process_memory_nbytes(self._worker) - mark

    # Tasks

    def task_came(self) -> None:
        """Take note that a task was given to the worker, or has got its inputs: it may be the next one."""
        if self._looking or self._mapping is None or self._calm():
            return
        self._looking = True
        # The worker is in the midst of it. Others may come in the same message, or the task starts right away.
        asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._looking = False
        # One that is paused starts nothing, and needs its memory.
        if self._worker.status is Status.running:
            self._prefetch(making_room=False)

    def _execute(self, key: Hashable, *, stimulus_id: str) -> Any:
        hooks = self._hooks
        assert hooks is not None
        if not self._losses and self._calm():
            return self._run(key, stimulus_id, hooks)
        return self._execute_when_ready(key, stimulus_id, hooks)

    def _run(self, key: Hashable, stimulus_id: str, hooks: seams.WorkerHooks) -> Any:
        running = hooks.execute(key, stimulus_id=stimulus_id)
        return running if self._device is None else self._again_with_room(running, key, stimulus_id, hooks)

    async def _again_with_room(
        self, running: Awaitable[Any], key: Hashable, stimulus_id: str, hooks: seams.WorkerHooks
    ) -> Any:
        """Run a task once more that found the device full, after all that nobody uses has left it."""
        event = await running
        error = seams.failure_of(event)
        device = self._device
        if error is None or device is None or isinstance(error, DeviceFullError) or not is_out_of_memory(error):
            return event
        task = seams.worker_task(self._worker, key)
        if task is None or self._worker.status.name not in _ALIVE:
            return event
        try:
            pinned = await device.ensure(seams.input_keys(self._worker, task))
        except (SpillError, MemoryError) as missing:
            logger.debug("%r is not run again, for its inputs are not there: %s", key, missing)
            return event
        try:
            gone_nbytes = await device.make_room(self.ledger.held(Tier.DEVICE))
            if not gone_nbytes:
                return event
            logger.info("%r found the device full; %d bytes went to the host, and it is run again", key, gone_nbytes)
            return await hooks.execute(key, stimulus_id=stimulus_id)
        finally:
            device.unpin(pinned)

    async def _execute_when_ready(self, key: Hashable, stimulus_id: str, hooks: seams.WorkerHooks) -> Any:
        task = seams.worker_task(self._worker, key)
        if task is None or self._worker.status.name not in _ALIVE:
            return await hooks.execute(key, stimulus_id=stimulus_id)
        if self._prefetched_for == key and self._prefetching is not None:
            self._prefetching.cancel()
        inputs = seams.input_keys(self._worker, task)
        run_id = task.run_id
        if self._horizon is not None:
            self._horizon.begin(key)
        await self._no_doubt(inputs)
        pinned: list[tuple[Mover, tuple[Hashable, ...]]] = []
        try:
            try:
                for mover in self._movers():
                    pinned.append((mover, await mover.ensure(inputs)))  # noqa: PERF401 - what was pinned must be known
                for mover in self._movers():
                    # Wait for room, as long as something is on its way out.
                    (await mover.reserve(0)).release()
            except MemoryError as error:
                return seams.failure_event(key, run_id, error, f"gpurt-no-room-for-input-{time()}")
            except SpillError as error:
                await self._no_doubt(inputs)
                ruined = self._mapping is not None and any(k in self._mapping.ruined for k in inputs)
                if ruined:
                    return seams.failure_event(key, run_id, error, f"gpurt-ruined-input-{time()}")
                return self._give_up(key, run_id, inputs, error)
            # What was lost before it could be pinned may have come into doubt while there was no room.
            await self._no_doubt(inputs)
            lost = [k for k in inputs if self._is_lost(k)]
            if lost:
                return self._give_up(key, run_id, lost, self._last_error.get(lost[0]))
            self._prefetch(making_room=True)
            return await self._run(key, stimulus_id, hooks)
        finally:
            if self._horizon is not None:
                self._horizon.leave(key)
            for mover, names in pinned:
                mover.unpin(names)

    def _is_lost(self, key: Hashable) -> bool:
        """Whether ``key`` cannot be read back; the worker may hear of that in a moment only."""
        if self._mapping is not None and self._mapping.lost(key):
            return True
        return key in self._losses and key not in seams.worker_store(self._worker)

    def _give_up(self, key: Hashable, run_id: int, inputs: list[Hashable], error: Exception | None) -> Any:
        """Give a task back because inputs are gone, or fail it when they are gone again and again."""
        worst = max(inputs, key=lambda k: self._losses[k], default=None)
        if error is not None and worst is not None and self._losses[worst] > LOSSES_MAX:
            logger.error("%r fails: its input %r was lost %d times", key, worst, self._losses[worst])
            return seams.failure_event(key, run_id, error, f"gpurt-lost-input-{time()}")
        return seams.reschedule_event(key, f"gpurt-lost-input-{time()}")

    def _prefetch(self, *, making_room: bool) -> None:
        """Begin to fetch the inputs of the task that comes next; one task ahead."""
        task = None if self._mapping is None else seams.next_task(self._worker)
        if task is None:
            return
        under_way = self._prefetching is not None and not self._prefetching.done()
        if under_way and self._prefetched_for == task.key:
            return
        inputs = seams.input_keys(self._worker, task)
        movers = [m for m in self._movers() if any(k in m.absent for k in inputs)]
        if movers and (making_room or all(mover.has_room_for(inputs) for mover in movers)):
            if under_way and self._prefetching is not None:
                # That one comes later now. What is being read for it arrives all the same.
                self._prefetching.cancel()
            self._prefetched_for = task.key
            self._prefetching = asyncio.create_task(_fetch(movers, inputs), name=f"gpurt-prefetch-{task.key!r}")

    # Peers

    async def _get_data(
        self, comm: Any, keys: Any, who: str | None = None, serializers: list[str] | None = None
    ) -> Any:
        hooks = self._hooks
        assert hooks is not None
        movers = self._movers()
        await self._no_doubt(keys)
        # What a peer asked for and does not get, it asks the scheduler for.
        keys = [key for key in keys if not self._is_lost(key)]
        absent = [(mover, key) for mover in movers for key in keys if key in mover.absent]
        if not absent and not (self._mapping is not None and self._mapping.ruined):
            return await self._send(hooks, comm, keys, who, serializers)
        served: dict[Hashable, Any] = {}
        pinned: list[tuple[Mover, tuple[Hashable, ...]]] = []
        reservation = None
        # Where nothing is serialized (inproc), the value itself is wanted, and so it is if it has no frames on disk.
        raised = [
            (mover, key)
            for mover, key in absent
            if mover is not self._host
            or comm.peer_address.startswith("inproc://")
            or isinstance(mover.copy_of(key), _StockCopy)
        ]
        as_they_lie = [(mover, key) for mover, key in absent if (mover, key) not in raised]
        try:
            for mover, key in raised:
                with self._reporting(mover, key, who):
                    pinned.append((mover, await mover.ensure([key])))
            if as_they_lie and self._host is not None:
                # For all at once: to hold some while waiting for more would hold up others that do the same.
                reservation = await self._host.reserve(sum(mover.raised_nbytes(key) for mover, key in as_they_lie))
                for mover, key in as_they_lie:
                    with self._reporting(mover, key, who):
                        frames = await mover.frames(key)
                        if frames is not None:
                            served[key] = codec.serialized(*frames)
            await self._no_doubt(keys)
            self._serve_ruined(keys, who, served)
            with serving(served):
                return await self._send(hooks, comm, keys, who, serializers)
        finally:
            if reservation is not None:
                reservation.release()
            for mover, names in pinned:
                mover.unpin(names)

    async def _send(
        self, hooks: seams.WorkerHooks, comm: Any, keys: Any, who: str | None, serializers: list[str] | None
    ) -> Any:
        answer = await hooks.get_data(comm, keys, who=who, serializers=serializers)
        # A worker that sends to as many peers as it may answers that it is busy, and is asked again.
        if answer is Status.dont_reply and who is not None and self._horizon is not None:
            self._horizon.serve(keys, who)
            self._offer()
        return answer

    def _serve_ruined(self, keys: Iterable[Hashable], who: str | None, served: dict[Hashable, Any]) -> None:
        ruined = {} if self._mapping is None else self._mapping.ruined
        for key in keys:
            if key in ruined:
                reason = f"{key!r} was lost and cannot be computed again: {ruined[key]}"
                # Workers say who they are; clients, and the scheduler on their behalf, do not.
                served[key] = RuinedForClient(reason) if who is None else Ruined(reason)

    @contextmanager
    def _reporting(self, mover: Mover, key: Hashable, who: str | None) -> Iterator[None]:
        """Let a peer know that a key which cannot be read is not here; it asks the scheduler then."""
        try:
            yield
        except SpillError as error:
            logger.warning("Cannot serve %r to %s: %s", key, who, error)
            if self._mapping is not None and key not in mover:
                self._strike(self._mapping, key, error)

    # Losses

    def _on_lost(self, name: Hashable, error: Exception) -> None:
        """Tell the scheduler that a value is gone."""
        if isinstance(name, DeviceChunkName | DeviceFrames):
            return  # whoever takes it is told
        logger.error("Lost %r: %s", name, error)
        self._losses[name] += 1
        self._last_error[name] = error
        if self._mapping is None:
            return
        for mover in self._movers():
            if name in mover:
                return  # it is there again already
        if self._strike(self._mapping, name, error):
            seams.forget_replica(self._worker, name, f"gpurt-lost-data-{time()}")

    def _strike(self, mapping: TieredMapping, key: Hashable, error: Exception) -> bool:
        """Take a lost key off the list if it can be made again; say whether it was."""
        if not seams.is_pure_data(self._worker, key):
            mapping.forget(key)
            return True
        mapping.ruin(key, error)
        if key not in self._doubts:
            self._doubts[key] = asyncio.create_task(self._doubt(mapping, key), name=f"gpurt-doubt-{key!r}")
        return False

    async def _doubt(self, mapping: TieredMapping, key: Hashable) -> None:
        """Give up a ruined key if the scheduler knows how it is made: a peer that is gone had made it."""
        try:
            assert self._watch is not None
            if await self._watch.can_make(key) and mapping is self._mapping and key in mapping.ruined:
                mapping.forget(key)
                seams.forget_replica(self._worker, key, f"gpurt-lost-data-{time()}")
        finally:
            del self._doubts[key]

    async def _no_doubt(self, keys: Collection[Hashable]) -> None:
        """Wait until it is known of these keys whether they are ruined."""
        while self._doubts and (doubts := [self._doubts[key] for key in keys if key in self._doubts]):
            await asyncio.wait(doubts)

    # Figures

    def tiers(self) -> dict[Tier, tuple[int, int, int | None]]:
        """Return the tiers that the worker has, from the top down: bytes held, bytes reserved, and the limit."""
        there = {
            Tier.DEVICE: self._device is not None,
            Tier.HOST: self._host is not None,
            Tier.DISK: self._folder is not None,
            Tier.OBJECT: self._objects is not None,
        }
        ledger = self.ledger
        return {t: (ledger.held(t), ledger.reserved(t), ledger.limit(t)) for t, is_there in there.items() if is_there}

    def moves(self) -> dict[tuple[Tier, Tier], int]:
        """Return cumulative bytes by the tier that they came from, and the one that they went to."""
        return {move: nbytes for mover in self._movers() for move, nbytes in mover.moves.items()}

    def metrics(self) -> dict[str, int]:
        """Return cumulative counts and bytes, and what lies in each tier now."""
        figures = {
            f"{tier}_{what}_nbytes": value
            for tier in Tier
            for what, value in (("held", self.ledger.held(tier)), ("reserved", self.ledger.reserved(tier)))
        }
        for tier, mover in ((Tier.HOST, self._host), (Tier.DEVICE, self._device)):
            if mover is None:
                continue
            figures |= {
                f"{tier}_written_nbytes": mover.written_nbytes,
                f"{tier}_read_nbytes": mover.read_nbytes,
                f"{tier}_dropped_unwritten_nbytes": mover.spiller.dropped_unwritten_nbytes,
                f"{tier}_dropped_clean_nbytes": mover.spiller.dropped_clean_nbytes,
                f"{tier}_moved_below_nbytes": mover.spiller.moved_nbytes,
                f"{tier}_waits": mover.waits,
                f"{tier}_write_failures": mover.write_failures,
                f"{tier}_corrupt_blocks": mover.lost_blocks,
            }
        if self._folder is not None:
            figures |= {"disk_idle_files": self._folder.idle_files, "disk_idle_file_nbytes": self._folder.idle_nbytes}
        if self._rescuer is not None:
            figures |= {
                "device_allocation_failures": self._rescuer.failures,
                "device_allocation_refusals": self._rescuer.refusals,
            }
        for tier, packer in self._packers.items():
            figures |= {
                f"{tier}_compressed_nbytes": packer.raw_nbytes,
                f"{tier}_compressed_to_nbytes": packer.packed_nbytes,
            }
        return figures


def _limit(configured: float | None, total: int | None) -> int | None:
    if isinstance(configured, int) or configured is None:
        return configured
    return None if total is None else int(total * configured)


def _begin(objects: ObjectFolder) -> None:
    try:
        objects.begin()
        objects.renew()
    except SpillError as error:
        # The store may be back when it is needed, which is asked then. A worker is not left without tiers for that.
        logger.warning("The OBJECT tier is not there yet: %s", error)


async def _fetch(movers: list[Mover], names: list[Hashable]) -> None:
    for mover in movers:
        try:
            mover.unpin(await mover.ensure(names, forceable=False))
        except (SpillError, MemoryError) as error:
            logger.debug("prefetch: %s", error)  # whoever wants it will be told
