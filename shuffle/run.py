"""One execution of a shuffle on one worker, over our data plane.

Covers: what data frames and arrays have in common: the way of a partition through split, outbox, shelf and unpack; the
answers to peers; what happens when shards are needed twice.
Does not cover: run ids, barrier and restart, which are distributed's own and call this class as they call theirs.
See also: :class:`distributed.shuffle._core.ShuffleRun`, whose contract this fulfils; :mod:`dask_gpurt.shuffle.dataframe`
and :mod:`dask_gpurt.shuffle.rechunk`, the two kinds of run.

Theory of operation
    *Transfer* (a task's thread): the partition is split; messages for peers are posted, which waits while too many bytes
    are under way; own shards go onto the shelf without a detour. *Receive* (event loop): a message is checked, and its
    parcels go onto the shelf before it is answered. A parcel that is sent again, after a connection broke, is
    known by where it is from and for, and not taken in twice; its sender is answered when the first is in. *Barrier*: when all
    messages are answered. *Unpack* (a task's thread): the shards of one output partition leave the store.

    Shards are kept until the task that asked for them has its result in memory: a task that is
    run again finds them again. When they are needed later than that (the result was lost with another worker), the
    shuffle is restarted, together with the others that the same task reads. So stock's rule holds that shards can be
    read again, without keeping all of them to the end.

    Where the settings say so, what was sent is *kept* until the barrier (:mod:`dask_gpurt.shuffle.kept`). When a worker is lost before, the
    run goes on without it (:mod:`dask_gpurt.shuffle.repair`): its outputs have new owners, and everything that is, or was, on
    its way to it is cut by output and led to them. Messages for a lost worker go through the outbox as any other does, and are
    led away where they would be delivered, so that the same limits hold for them.

    What our plane does not support is found out when data is seen. Then the run is *declined*: the scheduler
    restarts the shuffle, and the next run is stock's.

========  =====================================  ===========================================================
phase     what the worker does                   ends by
========  =====================================  ===========================================================
TRANSFER  splits inputs, sends their shards,     inputs done (the barrier) -> UNPACK;
          takes in those of peers                a worker lost -> TRANSFER (repaired) or CLOSED;
                                                 declined -> CLOSED
UNPACK    hands out its output partitions        done (or shards needed again) -> CLOSED
CLOSED    nothing, and has no data               restarted (as another run) -> TRANSFER
========  =====================================  ===========================================================
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import enum
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Generator, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import dask.config
from dask.typing import Key
from dask.utils import parse_timedelta
from distributed.comm.core import CommClosedError
from distributed.core import ErrorMessage, OKMessage, clean_exception, error_message
from distributed.exceptions import Reschedule
from distributed.metrics import context_meter, thread_time
from distributed.utils import sync
from distributed.utils_comm import retry

from dask_gpurt import seams
from dask_gpurt.errors import SpillError
from dask_gpurt.memory.store import Reservation
from dask_gpurt.seams import P2PConsistencyError, P2POutOfDiskError, ShuffleClosedError, ShuffleRun
from dask_gpurt.shuffle.account import Account
from dask_gpurt.shuffle.carrier import nbytes_of
from dask_gpurt.shuffle.kept import Kept
from dask_gpurt.shuffle.outbox import Outbox
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.shelves import Shelves, TieredReservation
from dask_gpurt.shuffle.wire import Header, NotHeldError, WireError, decode, encode

if TYPE_CHECKING:
    from distributed.shuffle import ShuffleWorkerPlugin

    from dask_gpurt.shuffle.worker import ShuffleWorker

__all__ = ["MAX_RESTARTS", "MESSAGE_NBYTES", "Declined", "Phase", "Run", "Shards"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: States of a task that has, or had, its result. It stays known as released as long as what was made of it is here.
_DONE = (None, "memory", "released", "forgotten")

#: How often one run asks for its restart before it is an error. Once is enough where the scheduler can do it.
MAX_RESTARTS = 3

#: Shards for a peer go out in messages of about so many bytes, so that the first are on their way, and taken in, while
#: the others wait for their turn.
MESSAGE_NBYTES = 8 * 2**20

#: The shards of an input that are no more than this are handed to the event loop without waiting for it: its thread can
#: prepare the next input meanwhile, and has at most one such ahead. Larger ones take longer than the waiting.
HANDED_NBYTES = 2**20

#: Address of a peer to the messages for it, each of headers and bodies in turn; and what stays here.
Shards = tuple[dict[str, list[list[Any]]], list[Parcel]]


class Phase(enum.StrEnum):
    """How far a run is; see the table in the module's documentation."""

    TRANSFER = "transfer"
    UNPACK = "unpack"
    CLOSED = "closed"


class Declined(Exception):  # noqa: N818  a decision, not an error
    """What was seen is for stock's data plane."""


class Run(ShuffleRun[Any, Any]):
    """State of one run on one worker.

    Parameters
    ----------
    id, run_id, span_id
        Identity, as distributed gives it.
    worker_for
        Output partition to the address of its worker.
    plugin
        distributed's plugin, which owns the run.
    part
        Our part of the worker: the store, the limits and the counters.
    keeps
        Whether what is sent is kept, as far as there is room, in case that a worker is lost.
    epoch
        How often the run has been repaired.
    adopted
        Output partitions that lost workers had.
    """

    def __init__(  # the base's own makes the buffers that this class replaces
        self,
        *,
        id: str,  # noqa: A002
        run_id: int,
        span_id: str | None,
        worker_for: Mapping[Any, str],
        plugin: ShuffleWorkerPlugin,
        part: ShuffleWorker,
        keeps: bool = False,
        epoch: int = 0,
        adopted: Collection[Any] = (),
    ) -> None:
        worker = plugin.worker
        self.id = id  # type: ignore[assignment]
        self.run_id = run_id
        self.span_id = span_id
        self.local_address = worker.address
        self.executor = seams.shuffle_executor(plugin)
        self.rpc = worker.rpc
        self.digest_metric = worker.digest_metric
        self.scheduler = worker.scheduler
        self.closed = False
        self.transferred = False
        self.received = set()
        self.total_recvd = 0
        self.start_time = time.time()
        self._exception = None
        self._closed_event = asyncio.Event()
        self._loop = worker.loop
        self.RETRY_COUNT = dask.config.get("distributed.p2p.comm.retry.count")
        self.RETRY_DELAY_MIN = parse_timedelta(dask.config.get("distributed.p2p.comm.retry.delay.min"), default="s")
        self.RETRY_DELAY_MAX = parse_timedelta(dask.config.get("distributed.p2p.comm.retry.delay.max"), default="s")

        self.worker_for = worker_for
        self.part = part
        self._worker = worker
        own = [partition for partition, address in worker_for.items() if address == self.local_address]
        self._outbox = Outbox(self._deliver, part.window)
        self._ranks = {partition: rank for rank, partition in enumerate(own)}
        self._shelf = Shelves(
            part.store,
            part.device_store,
            ready=self._ready,
            pack=self._pack,
            offload=self._offload_pack,
            name=f"{id}-{run_id}",
            ranks=self._ranks,
            meter=self._moved,
        )
        self._own = frozenset(own)
        # What a repair needs: see there.
        self.epoch = epoch
        self._adopted = frozenset(adopted)
        self._reached = asyncio.Event()
        self._kept = Kept(part.store, part.allowance, name=f"{id}-{run_id}") if keeps else None
        #: Input partition to the task that adds, or has added, it; and those that were added as a whole.
        self._adders: dict[Any, Key] = {}
        self._added: set[Any] = set()
        #: Workers that were lost, and by worker what is being delivered.
        self._lost: set[str] = set()
        self._delivering: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self._repairing: set[asyncio.Task[None]] = set()
        #: Identity of a parcel to what is done when it is in.
        self._arrivals: dict[Hashable, asyncio.Future[None]] = {}
        #: Output partition to the task that asked for it, and its buffers.
        self._handed: dict[Any, tuple[Key, list[Any]]] = {}
        #: Output partitions whose shards are no more.
        self._gone: set[Any] = set()
        self._restarts = 0
        #: What is done for peers.
        self._attended: set[asyncio.Task[Any]] = set()
        #: What is reserved for messages to come, or is being reserved.
        self._credits: dict[str, asyncio.Future[Reservation]] = {}
        #: Output partition to the turn of who asks for it.
        self._turns: defaultdict[Any, asyncio.Lock] = defaultdict(asyncio.Lock)
        # For the watchdog: what is done, and what is being waited for since when.
        self._numbers = itertools.count()
        self._inputs = 0
        #: By thread: what it has handed to the event loop last without waiting.
        self._ahead: dict[int, Future[None]] = {}
        #: Output partitions that were made; several tasks may read the same one.
        self._outputs: set[Any] = set()
        self._granted = 0
        # For the dashboard: bytes to and from DISK, files written, and the seconds of all deliveries.
        self._disk_nbytes = {"write": 0, "read": 0}
        self._files = 0
        self._sending_s = 0.0
        self.account = Account(self.start_time)
        self._tasks: dict[int, tuple[str, Any, float]] = {}
        self._unanswered: dict[int, tuple[str, Any, float]] = {}
        part.opened(self)

    # What the two kinds of run define

    @abc.abstractmethod
    def _split(self, data: Any, partition_id: Any) -> Shards:
        """Split an input partition. Raises :class:`Declined`."""

    @abc.abstractmethod
    def _ready(self, parcel: Parcel) -> tuple[Hashable, list[Any]] | None:
        """Give the packed form of a parcel that needs no packing."""

    @abc.abstractmethod
    def _identity(self, header: Header) -> Hashable:
        """Say by what a parcel is known that is sent again. Raises :class:`WireError`."""

    @abc.abstractmethod
    def _pack(self, parcels: Sequence[Parcel]) -> dict[Hashable, list[Any]]:
        """Regroup parcels by output partition."""

    @abc.abstractmethod
    def _check(self, header: Header) -> None:
        """Check the header of a peer. Raises :class:`WireError`."""

    @abc.abstractmethod
    def _join(self, partition_id: Any, buffers: list[Any]) -> Any:
        """Make an output partition of its shards."""

    @abc.abstractmethod
    def _cut(self, parcel: Parcel) -> Sequence[tuple[Any, Header, Any]]:
        """Cut a parcel into shards by themselves: for each its output partition, its header and its body."""

    def _planned(self) -> None:
        """Take in that outputs have new owners."""

    def _sort_out(self, shards: Sequence[tuple[str, Header, Any]]) -> Shards:
        messages: dict[str, list[list[Any]]] = {}
        own = []
        room: dict[str, int] = {}
        for address, header, body in shards:
            if address == self.local_address:
                own.append(Parcel(header, body, header.body_nbytes))
                continue
            if room.get(address, 0) <= 0:
                messages.setdefault(address, []).append([])
                room[address] = MESSAGE_NBYTES
            messages[address][-1] += [encode(header), body]
            room[address] -= header.body_nbytes
        return messages, own

    def _allocate(self, nbytes: int) -> memoryview:
        return self.part.pool.lease(nbytes)

    # Transfer

    def add_partition(self, data: Any, partition_id: Any) -> int:
        """Split and send an input partition. Called in a task's thread."""
        self.raise_if_closed()
        if self.transferred:
            raise RuntimeError(f"Cannot add more partitions to {self}")
        self.validate_data(data)
        if self._kept is not None:
            self._adders[partition_id] = seams.thread_key()
        with self._noted(self._tasks, "input", partition_id), seams.capture_shuffle_metrics(self, "foreground"):
            started = time.perf_counter()
            with (
                context_meter.meter("p2p-shard-partition-noncpu"),
                context_meter.meter("p2p-shard-partition-cpu", func=thread_time),
            ):
                try:
                    messages, own = self._split(data, partition_id)
                except Declined as reason:
                    messages, own = {}, []
                    declined = str(reason)
                else:
                    declined = ""
            if declined:
                sync(self._loop, self._decline, declined)
                raise ShuffleClosedError(f"{self} goes to stock's data plane: {declined}")
            self.part.split_s += time.perf_counter() - started
            sent = [nbytes_of(message) for peer in messages.values() for message in peer]
            context_meter.digest_metric("p2p-shards", sum(sent) + sum(parcel.nbytes for parcel in own), "bytes")
            context_meter.digest_metric("p2p-shards", len(sent) + bool(own), "count")
            del data
            nbytes = sum(sent) + sum(parcel.nbytes for parcel in own)
            self._hand_over(messages, own, nbytes)
        self._inputs += 1
        if self._kept is not None:
            self._added.add(partition_id)
        return self.run_id

    def _hand_over(self, messages: dict[str, list[list[Any]]], own: list[Parcel], nbytes: int) -> None:
        """Give shards to the event loop, and wait until it has taken them, or those before them if these are small."""
        thread = threading.get_ident()
        before = self._ahead.pop(thread, None)
        if before is not None:
            with context_meter.meter("p2p-comms-limiter"):
                before.result()
        if nbytes > HANDED_NBYTES:
            self._call(self._dispatch, messages, own).result()
            return
        # What it waits for is not this task's, which may have ended by then.
        with context_meter.clear_callbacks():
            self._ahead[thread] = self._call(self._dispatch, messages, own)

    def _call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        """Have the event loop do something, from a thread, in its context. Takes a third of the time of Dask's ``sync``."""
        loop: Any = self._loop
        return asyncio.run_coroutine_threadsafe(function(*args), loop.asyncio_loop)

    async def _dispatch(self, messages: dict[str, list[list[Any]]], own: list[Parcel]) -> None:
        self.raise_if_closed()
        # Peers first, in turn: they can begin while own shards are taken in.
        while messages:
            for address, queue in list(messages.items()):
                message = queue.pop(0)
                if not queue:
                    del messages[address]
                await self._post(address, message, nbytes_of(message))
        if own:
            nbytes = sum(parcel.nbytes for parcel in own)
            await self._take_in(own)
            self.part.local_nbytes += nbytes
            self.account.sent["local"] += nbytes

    async def _post(self, address: str, buffers: list[Any], nbytes: int) -> None:
        try:
            # As stock calls it: a task waits here while too many bytes are under way.
            with context_meter.meter("p2p-comms-limiter"):
                await self._outbox.post(address, buffers, nbytes)
        except RuntimeError:
            # Closed while this waited for its turn.
            self.raise_if_closed()
            raise

    async def _deliver(self, address: str, buffers: list[Any]) -> None:
        if self._kept is None:
            await self._exchange(address, buffers)
            return
        if address not in self._lost:
            exchange = asyncio.create_task(self._exchange(address, buffers))
            self._delivering[address].add(exchange)
            try:
                await exchange
            except (asyncio.CancelledError, OSError):
                task = asyncio.current_task()
                if address not in self._lost or (task is not None and task.cancelling()):
                    raise
            finally:
                self._delivering[address].discard(exchange)
            nbytes = nbytes_of(buffers)
            if address not in self._lost and await self._kept.keep(
                address, buffers, nbytes, wanted=lambda: address not in self._lost
            ):
                return
        await self._lead_away(buffers)

    async def _lead_away(self, buffers: list[Any]) -> None:
        """Deliver what was meant for a lost worker to those who have its outputs now."""
        parcels = [
            Parcel(decode(head, body), body, nbytes_of([body]))
            for head, body in zip(buffers[::2], buffers[1::2], strict=True)
        ]
        cut = await self.offload(self._cut_all, parcels)
        del parcels
        messages, own = self._sort_out([(self.worker_for[output], header, body) for output, header, body in cut])
        del cut
        if own:
            await self._take_in(own)
        for address, queue in messages.items():
            for message in queue:
                await self._deliver(address, message)

    def _cut_all(self, parcels: Sequence[Parcel]) -> list[tuple[Any, Header, Any]]:
        return [shard for parcel in parcels for shard in self._cut(parcel)]

    async def _exchange(self, address: str, buffers: list[Any]) -> None:
        # One for all attempts: what was reserved for one of them is there for the next.
        credit = f"{self.local_address}-{next(self._numbers)}"
        nbytes = nbytes_of(buffers)

        async def attempt() -> OKMessage | ErrorMessage:
            self.raise_if_closed()
            reply = await self.part.carrier.deliver(self, address, buffers, credit)
            if self._kept is not None and reply["status"] == "error":
                _, error, _ = clean_exception(**reply)
                if isinstance(error, P2PConsistencyError) and await self._is_current():
                    # The peer is closing: it is asked again, until that is known here.
                    raise CommClosedError(f"{address} has left {self}") from error
            return reply

        # The meter leaves out what is metered inside by another name: waiting for the credit, compressing.
        with self._noted(self._unanswered, address, nbytes), self.metered():
            with context_meter.meter("send"):
                started = time.perf_counter()
                reply: Any = await retry(
                    attempt, count=self.RETRY_COUNT, delay_min=self.RETRY_DELAY_MIN, delay_max=self.RETRY_DELAY_MAX
                )
                self._sending_s += time.perf_counter() - started
            context_meter.digest_metric("send", 1, "count")
        if reply["status"] == "moved":
            # The word of it is on its way here, and ends this.
            await self.reach(reply["epoch"])
            raise P2PConsistencyError(f"{address} does not hold what {self} has for it")
        if reply["status"] == "error":
            _, error, traceback = clean_exception(**reply)
            assert error is not None
            if isinstance(error, P2PConsistencyError) and not await self._is_current():
                # The peer knows already of a restart that is still on its way here.
                raise ShuffleClosedError(f"{self} is over") from error
            raise error.with_traceback(traceback)
        self.part.sent_nbytes += nbytes
        self.part.messages += 1

    async def inputs_done(self) -> None:
        """Say that all input partitions were added; returns when peers have what was sent to them."""
        self.raise_if_closed()
        self.transferred = True
        try:
            # All inputs were added, so that no thread adds to these any more.
            for ahead in list(self._ahead.values()):
                await asyncio.shield(asyncio.wrap_future(ahead))
            for repair in list(self._repairing):
                await asyncio.shield(repair)
            await self._outbox.flush()
        except Exception as error:
            self.raise_if_closed()
            self._exception = error
            raise
        if self._kept is not None:
            # From now on a worker that is lost costs a restart.
            self._kept.forget()
            self._adders.clear()
            self._added.clear()
        self.account.transferred_s = time.time()

    # Repair

    def repair(self, epoch: int, lost: str, moved: Iterable[tuple[Any, str]]) -> None:
        """Go on without a worker, whose outputs others have now. The scheduler's word; see :mod:`dask_gpurt.shuffle.repair`."""
        if self.closed or epoch <= self.epoch:
            # It ends anyway, or began after that.
            self.part.repaired(str(self.id), self.run_id, epoch, [], [])
            return
        owners = dict(moved)
        self.epoch = epoch
        self.worker_for = {**self.worker_for, **owners}
        self._adopted |= owners.keys()
        own = [output for output, address in owners.items() if address == self.local_address]
        self._own |= frozenset(own)
        self._ranks.update(zip(own, itertools.count(len(self._ranks)), strict=False))
        self._planned()
        self._lost.add(lost)
        self._reached.set()
        self._reached = asyncio.Event()
        for credit in [credit for credit in self._credits if credit.rpartition("-")[0] == lost]:
            self._credits.pop(credit).add_done_callback(_give_back)
        for exchange in self._delivering.pop(lost, ()):
            exchange.cancel()
        task = asyncio.create_task(self._repair(epoch, lost, frozenset(self._added)), name="gpurt-shuffle-repair")
        self._repairing.add(task)
        task.add_done_callback(self._repairing.discard)

    async def _repair(self, epoch: int, lost: str, added: frozenset[Any]) -> None:
        """Send again what was kept, vouch for the inputs of which that is all, and say of which it is not."""
        vouched: list[Key] = []
        missed = list(self._adders.values())
        try:
            if self._kept is not None:
                async for buffers, nbytes in self._kept.take(lost):
                    await self._post(lost, buffers, nbytes)
                missing = self._kept.missing(lost)
                adders = dict(self._adders)
                missed = [key for partition, key in adders.items() if _numbers(partition) in missing]
                vouched = [adders[partition] for partition in added if _numbers(partition) not in missing]
        except Exception as error:  # noqa: BLE001  the outbox keeps it, and tells whoever waits for the end of the transfer
            logger.debug("%s was not repaired: %s", self, error)
        finally:
            self.part.repaired(str(self.id), self.run_id, epoch, vouched, missed)

    async def reach(self, epoch: int) -> None:
        """Wait until this worker has heard of a repair that a peer knows of."""
        while epoch > self.epoch:
            await self._reached.wait()

    async def barrier(self, run_ids: Sequence[int]) -> int:
        """Wait for all workers to have what was sent to them, or for the end of this run.

        The scheduler asks them, and tries for half a minute to reach one that has left. The run was restarted by then, and
        its next barrier may be this task, if it goes on: the worker takes a task that it is asked for again, while it still
        does it, for the same. It would fail with what is wrong with this run, and the next one with it. That the run has
        ended may not be known here yet: the answer to a call can overtake what the scheduler has sent before.
        """
        try:
            return await self.attend(super().barrier(run_ids))
        except Exception:
            if self.closed or not await self._is_current():
                raise Reschedule from None
            raise

    async def _is_current(self) -> bool:
        """Ask the scheduler whether this is still the run of its shuffle."""
        reply = await self.scheduler.shuffle_get(id=self.id, worker=self.local_address)
        return bool(reply["status"] == "OK" and reply["run_spec"].run_id == self.run_id)

    # Receive

    async def attend(self, work: Coroutine[Any, Any, T]) -> T:
        """Do what a peer has asked for, which ends when the run does.

        Raises
        ------
        ShuffleClosedError
            If the run ended meanwhile.
        """
        task = asyncio.create_task(work)
        self._attended.add(task)
        task.add_done_callback(self._attended.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if self.closed:
                raise ShuffleClosedError(str(self)) from None
            task.cancel()
            raise

    async def reserve(self, nbytes: int) -> Reservation:
        """Wait until ``nbytes`` may be held here."""
        self.raise_if_closed()
        reservation = await self.part.store.reserve(nbytes)
        if self.closed:
            reservation.release()
            self.raise_if_closed()
        return reservation

    async def reserve_tiers(self, host_nbytes: int, device_nbytes: int) -> TieredReservation:
        """Wait until so much may be held here, on the host and on the device."""
        host = await self.reserve(host_nbytes)
        try:
            device = await self.part.device_store.reserve(device_nbytes)
        except BaseException:
            host.release()
            raise
        reservation = TieredReservation(host, device)
        if self.closed:
            reservation.release()
            self.raise_if_closed()
        return reservation

    async def grant(self, credit: str, nbytes: int) -> None:
        """Reserve ``nbytes`` for the message that will come with ``credit``; a second call waits for the first."""
        if (granted := self._credits.get(credit)) is not None:
            await asyncio.shield(granted)
            return
        granted = self._credits[credit] = asyncio.get_running_loop().create_future()
        try:
            granted.set_result(await self.reserve(nbytes))
            if credit.rpartition("-")[0] in self._lost:
                _give_back(self._credits.pop(credit, granted))
        except BaseException as error:
            self._credits.pop(credit, None)
            granted.set_exception(error if isinstance(error, Exception) else ShuffleClosedError(str(self)))
            granted.exception()
            raise
        self._granted += 1

    def redeem(self, credit: str | None) -> Reservation | None:
        """Hand out what was reserved for a message, once."""
        if credit is None or credit not in self._credits or not self._credits[credit].done():
            return None
        return self._credits.pop(credit).result()

    async def receive(
        self, data: Sequence[Any], reservation: Reservation | TieredReservation | None = None, epoch: int = 0
    ) -> OKMessage | ErrorMessage:
        """Take in what a peer has sent: headers and bodies alternate. The reservation pays for it.

        ``epoch`` is how many repairs the peer knew of.
        """
        try:
            self.raise_if_closed()
            if len(data) % 2:
                raise WireError(f"headers and bodies alternate, got {len(data)} buffers")
            parcels = []
            for head, body in zip(data[::2], data[1::2], strict=True):
                header = decode(head, body)
                self._check(header)
                parcels.append(Parcel(header, body, header.body_nbytes))
            del data
            nbytes = sum(parcel.nbytes for parcel in parcels)
            await self._take_in(parcels, reservation)
            self.total_recvd += nbytes
            self.part.received_nbytes += nbytes
        except (P2PConsistencyError, P2POutOfDiskError, SpillError) as error:
            # Answered, not raised: a sender tries again after an OSError, which the last two are.
            return error_message(error)
        except NotHeldError:
            if epoch >= self.epoch:
                raise
            # The sender means the worker that was lost, whose address this one has now, and has not heard of it.
            return {"status": "moved", "epoch": self.epoch}  # type: ignore[return-value]
        finally:
            if reservation is not None:
                reservation.release()
        return {"status": "OK"}

    async def _take_in(
        self, parcels: Sequence[Parcel], reservation: Reservation | TieredReservation | None = None
    ) -> None:
        fresh = []
        arrival = asyncio.get_running_loop().create_future()
        before = []
        for parcel in parcels:
            identity = self._identity(parcel.header)
            if (other := self._arrivals.get(identity)) is not None:
                # The same again, because its answer was lost or the task ran twice. It is in when the first is in.
                before.append(other)
            else:
                self._arrivals[identity] = arrival
                fresh.append(parcel)
        del parcels
        if fresh:
            try:
                await self._shelf.add(fresh, reservation)
            except BaseException as error:
                if isinstance(error, Exception):
                    self._exception = error
                # Nobody has to be waiting, and whoever is must hear of it as of their own.
                arrival.set_exception(error if isinstance(error, Exception) else ShuffleClosedError(str(self)))
                arrival.exception()
                raise
            arrival.set_result(None)
        for other in before:
            await asyncio.shield(other)
        # While it was taken in, the run may have been closed, and have thrown it away.
        self.raise_if_closed()

    async def _offload_pack(self, *args: Any) -> Any:
        with self.metered():
            return await self.offload(*args)

    @contextlib.contextmanager
    def metered(self, where: str = "background-comms") -> Generator[None]:
        """Give what is metered inside to this run, and not to the task that happens to have begun it."""
        with context_meter.clear_callbacks(), seams.capture_shuffle_metrics(self, where):
            yield

    def meter(self, activity: str, value: float, unit: str) -> None:
        """Note something that was done for this run in the background."""
        with self.metered():
            context_meter.digest_metric(activity, value, unit)

    def _moved(self, action: str, nbytes: int) -> None:
        self._disk_nbytes[action] += nbytes
        if action == "write":
            self._files += 1
            self.account.written_nbytes += nbytes
        with self.metered("background-disk"):
            context_meter.digest_metric(f"disk-{action}", nbytes, "bytes")
            context_meter.digest_metric(f"disk-{action}", 1, "count")

    # Unpack

    def get_output_partition(self, partition_id: Any, key: Key, **kwargs: Any) -> Any:  # noqa: ARG002  stock's signature
        """Make an output partition of its shards. Called in a task's thread."""
        self.raise_if_closed()
        with self._noted(self._tasks, "output", partition_id), seams.capture_shuffle_metrics(self, "foreground"):
            with context_meter.meter("p2p-shards-read"):
                buffers = self._call(self._collect, partition_id, key).result()
            with (
                context_meter.meter("p2p-get-output-noncpu"),
                context_meter.meter("p2p-get-output-cpu", func=thread_time),
            ):
                started = time.perf_counter()
                output = self._join(partition_id, buffers)
                self.part.unpack_s += time.perf_counter() - started
        self._outputs.add(partition_id)
        return output

    async def _collect(self, partition_id: Any, key: Key) -> list[Any]:
        await self._ensure_output_worker(partition_id, key)
        if not self.transferred:
            raise RuntimeError("`get_output_partition` called before barrier task")
        # Who asks while another one's are being read would find none.
        async with self._turns[partition_id]:
            return await self._hand_out(partition_id, key)

    async def _hand_out(self, partition_id: Any, key: Key) -> list[Any]:
        self.raise_if_closed()
        for partition, (task, _) in list(self._handed.items()):
            if partition != partition_id and seams.worker_task_state(self._worker, task) in _DONE:
                del self._handed[partition]
                self._gone.add(partition)
        if partition_id in self._handed:
            _, buffers = self._handed[partition_id]
            self._handed[partition_id] = (key, buffers)
            return buffers
        if partition_id in self._gone:
            await self._restart(key, f"the shards of output partition {partition_id} are needed again")
        try:
            await self._shelf.flush()
            buffers = await self._shelf.take(partition_id)
        except SpillError as error:
            # Damaged, gone, or out of reach: whichever it is, they can be made again.
            await self._restart(key, str(error))
        except Exception as error:
            self.raise_if_closed()
            self._exception = error
            raise
        self.raise_if_closed()
        self._handed[partition_id] = (key, buffers)
        return buffers

    async def _restart(self, key: Key, reason: str) -> None:
        """Have the scheduler restart this shuffle and those of ours that the task ``key`` reads too."""
        if self._restarts == MAX_RESTARTS:
            raise RuntimeError(f"{self} was not restarted, though {reason}")
        self._restarts += 1
        logger.warning("%s is restarted: %s", self, reason)
        ids = seams.worker_task_shuffles(self._worker, key) | {str(self.id)}
        # One alone would need the shards of the others again, and they those of this one, and so on without an end.
        for run in self.part.runs_of(ids):
            await run.ask_for_restart()
        raise Reschedule

    async def ask_for_restart(self) -> None:
        """Have the scheduler restart this shuffle, unless it did already."""
        try:
            await self.scheduler.shuffle_barrier(id=self.id, run_id=self.run_id, consistent=False)
        except (KeyError, ValueError) as error:
            logger.debug("%s is not active any more: %s", self, error)

    async def _decline(self, reason: str) -> None:
        reply = await self.scheduler.gpurt_shuffle_decline(id=self.id, run_id=self.run_id, reason=reason)
        if reply is None:
            # The scheduler has our part no more: every new run is stock's.
            await self.ask_for_restart()

    # Life

    async def close(self) -> None:
        """Stop, and forget all data."""
        if self.closed:
            await self._closed_event.wait()
            return
        self.closed = True
        for task in (*self._attended, *self._repairing):
            task.cancel()
        try:
            await self._outbox.close()
            await self._shelf.close()
        finally:
            # Whatever went wrong: others wait for the end, and bytes that stay reserved are missing for good.
            for granted in self._credits.values():
                if granted.done():
                    granted.result().release()
            self._credits.clear()
            if self._kept is not None:
                self._kept.forget()
            self._handed.clear()
            self.account.ended_s = time.time()
            await self.part.ended(self)
            self._closed_event.set()

    async def move(self) -> None:
        """Take the data over to the store that the part has now."""
        if self._kept is not None:
            self._kept.forget()
        await self._shelf.move(self.part.store, self.part.device_store)

    def heartbeat(self) -> dict[str, Any]:
        """Report in the form that the dashboard knows.

        Its disk buffer is, here, what waits to be unpacked: how much of that is in memory, against the limit of the tier,
        and what went to DISK and came back. Nothing has gone there while there was room.
        """
        outbox, shelf, disk = self._outbox, self._shelf, self._disk_nbytes
        return {
            "disk": {
                "memory": max(shelf.held_nbytes - max(disk["write"] - disk["read"], 0), 0),
                "total": shelf.staged_nbytes + shelf.put_nbytes,
                "buckets": shelf.partitions,
                "written": disk["write"],
                "read": disk["read"],
                "avg_size": disk["write"] / self._files if self._files else 0.0,
                "avg_duration": 0.0,
                "memory_limit": self.part.store.limit_nbytes,
            },
            "comm": {
                "memory": outbox.pending_nbytes,
                "total": outbox.pending_nbytes + outbox.sent_nbytes,
                "buckets": outbox.peers,
                "written": outbox.sent_nbytes,
                "read": self.total_recvd,
                "avg_size": outbox.sent_nbytes / outbox.messages if outbox.messages else 0.0,
                "avg_duration": self._sending_s / outbox.messages if outbox.messages else 0.0,
                "memory_limit": self.part.window.limit_nbytes,
            },
            "start": self.start_time,
        }

    def state(self) -> dict[str, Any]:
        """Say what is done, and what is being waited for; see :mod:`dask_gpurt.shuffle.watchdog`."""
        outbox, shelf, now = self._outbox, self._shelf, time.monotonic()
        granted = [credit.result().nbytes for credit in self._credits.values() if credit.done()]
        return {
            "phase": (Phase.CLOSED if self.closed else Phase.UNPACK if self.transferred else Phase.TRANSFER).value,
            "closed": self.closed,
            "transferred": self.transferred,
            "inputs": self._inputs,
            "outputs": len(self._outputs),
            "own_outputs": len(self._own),
            "posted_nbytes": outbox.pending_nbytes + outbox.sent_nbytes,
            "sent_nbytes": outbox.sent_nbytes,
            "outbox_nbytes": outbox.pending_nbytes,
            "received_nbytes": self.total_recvd,
            "parcels": len(self._arrivals),
            "attended": len(self._attended),
            "epoch": self.epoch,
            "kept_nbytes": 0 if self._kept is None else self._kept.nbytes,
            "credits_granted": self._granted,
            "credits_nbytes": sum(granted),
            "credits_wanted": len(self._credits) - len(granted),
            "staged_nbytes": shelf.staged_nbytes,
            "put_nbytes": shelf.put_nbytes,
            "taken_nbytes": shelf.taken_nbytes,
            "unanswered": [
                {"peer": peer, "nbytes": nbytes, "since_s": now - since}
                for peer, nbytes, since in self._unanswered.values()
            ],
            # Tasks come and go in threads.
            "tasks": [
                {"what": what, "partition": str(partition), "since_s": now - since}
                for what, partition, since in list(self._tasks.values())
            ],
        }

    @contextlib.contextmanager
    def _noted(self, where: dict[int, tuple[str, Any, float]], what: str, which: Any) -> Generator[None]:
        number = next(self._numbers)
        where[number] = (what, which, time.monotonic())
        try:
            yield
        finally:
            del where[number]

    # What the base declares for its own buffers, which are not here

    def _get_assigned_worker(self, i: Any) -> str:
        return self.worker_for[i]

    async def _receive(self, data: Any) -> None:
        await self.receive(data)

    def _shard_partition(self, data: Any, partition_id: Any) -> Any:
        return self._split(data, partition_id)

    def _get_output_partition(self, partition_id: Any, key: Key, **kwargs: Any) -> Any:
        return self.get_output_partition(partition_id, key, **kwargs)

    async def flush_receive(self) -> None:
        """Put all that has arrived into the store."""
        await self._shelf.flush()

    def read(self, path: Any) -> Any:
        """Stock's disk buffer is not used."""
        raise NotImplementedError(path)

    def deserialize(self, buffer: Any) -> Any:
        """Stock's memory buffer is not used."""
        raise NotImplementedError(type(buffer))


def _numbers(partition: Any) -> tuple[int, ...]:
    """Give an input partition the form that it has in headers."""
    return tuple(partition) if isinstance(partition, tuple) else (int(partition),)


def _give_back(granted: asyncio.Future[Reservation]) -> None:
    if not granted.cancelled() and granted.exception() is None:
        granted.result().release()
