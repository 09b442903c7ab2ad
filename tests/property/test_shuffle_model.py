"""A shuffle of toy data between endpoints whose network, memory and clock of events the model turns by hand.

Everything between a split and an unpack is the real thing: :class:`Run`, its outbox, window, carrier, credits and
shelf, and a store over ledger, mover and disk with room for a few shards. What is not: the shards are a few bytes, calls to
a peer wait until the model delivers, loses, or doubles them, and the limits are small enough for every path to be taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any
from unittest import mock

import dask
import numpy as np
import pytest
from distributed.comm.core import CommClosedError
from distributed.core import Status
from distributed.exceptions import Reschedule
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dask_gpurt import codecs
from dask_gpurt.codecs import Compressed
from dask_gpurt.config import ShuffleSettings
from dask_gpurt.memory import mover as mover_module
from dask_gpurt.memory import shards as shards_module
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.lower import DiskStore
from dask_gpurt.memory.mover import Mover
from dask_gpurt.memory.shards import ChunkName, ShardStore
from dask_gpurt.memory.spiller import Spiller
from dask_gpurt.memory.store import Buffer, Reservation
from dask_gpurt.seams import ShuffleClosedError
from dask_gpurt.shuffle import carrier as carrier_module
from dask_gpurt.shuffle import outbox as outbox_module
from dask_gpurt.shuffle import run as run_module
from dask_gpurt.shuffle import shelf as shelf_module
from dask_gpurt.shuffle.repair import new_owners
from dask_gpurt.shuffle.run import Run, Shards
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.ways import Way, Ways
from dask_gpurt.shuffle.wire import Header, Kind, WireError, decode, encode
from dask_gpurt.shuffle.worker import ShuffleWorker

# Some ten seconds of a processor, which may have other things to do.
pytestmark = pytest.mark.timeout(600)

ENDPOINTS = [f"tcp://127.0.0.{number}:1" for number in range(1, 4)]
OUTPUTS = 5
WORKER_FOR: dict[Any, str] = {output: ENDPOINTS[output % 2] for output in range(OUTPUTS)}  # The third only sends.
#: From here on a shard has a parcel to itself, which needs no packing.
LARGE_NBYTES = 120
LIMITS: list[tuple[Any, str, float]] = [
    (carrier_module, "EAGER_NBYTES", 150),
    (outbox_module, "JOIN_NBYTES", 600),
    (outbox_module, "LOT_NBYTES", 250),
    (outbox_module, "LINGER_S", 0),
    (run_module, "MESSAGE_NBYTES", 200),
    (shelf_module, "STAGE_NBYTES", 250),
    (shards_module, "CHUNK_NBYTES", 200),
    (mover_module, "PATIENCE_S", 0.002),
]
SEND_LIMIT = 700
HOST_LIMIT = 900
#: Output partition, number of the shard, and size of each shard of an input partition.
Input = list[tuple[int, int, int]]


class ToyRun(Run):
    """Shards are bytes with a number; a segment is (output partition, number, size)."""

    def __init__(self, **arguments: Any) -> None:
        self.shelved: list[Hashable] = []
        super().__init__(**arguments)

    def _split(self, data: Input, partition_id: int) -> Shards:
        small: dict[str, Input] = {}
        shards = []
        for shard in data:
            address = self.worker_for[shard[0]]
            if shard[2] >= LARGE_NBYTES or shard[0] in self._adopted:
                shards.append((address, *parcel_of(partition_id, [shard])))
            else:
                small.setdefault(address, []).append(shard)
        shards += [(address, *parcel_of(partition_id, those)) for address, those in small.items()]
        return self._sort_out(shards)

    def _identity(self, header: Header) -> Hashable:
        return header.input_id, header.segments.tobytes()

    def _cut(self, parcel: Parcel) -> list[tuple[int, Header, bytes]]:
        return [
            (segment[0], *parcel_of(parcel.header.input_id[0], [(segment[0], segment[1], segment[2])]))
            for segment, _ in shards_of(parcel.header, parcel.body)
        ]

    def _check(self, header: Header) -> None:
        if header.segments.shape[1] != 3:
            raise WireError("not of this shuffle")

    def _ready(self, parcel: Parcel) -> tuple[Hashable, list[Buffer]] | None:
        self.shelved.append(self._identity(parcel.header))
        if parcel.nbytes < LARGE_NBYTES or len(parcel.header.segments) > 1:
            return None
        return int(parcel.header.segments[0, 0]), [encode(parcel.header), parcel.body]

    def _pack(self, parcels: Sequence[Parcel]) -> dict[Hashable, list[Buffer]]:
        packed: dict[Hashable, list[tuple[list[int], bytes]]] = {}
        for parcel in parcels:
            for segment, shard in shards_of(parcel.header, parcel.body):
                packed.setdefault(segment[0], []).append((segment, shard))
        return {
            output: list(message(0, [segment for segment, _ in shards], b"".join(shard for _, shard in shards)))
            for output, shards in packed.items()
        }

    def _join(self, partition_id: Any, buffers: list[Buffer]) -> Counter[tuple[int, ...]]:
        found: Counter[tuple[int, ...]] = Counter()
        for head, body in zip(buffers[::2], buffers[1::2], strict=True):
            for segment, shard in shards_of(decode(head, body), body):
                assert shard == content(segment[1], segment[2])
                assert segment[0] == partition_id
                found[tuple(segment)] += 1
        return found


def content(number: int, nbytes: int) -> bytes:
    return bytes([number % 251]) * nbytes


def message(input_id: int, segments: Sequence[Sequence[int]], body: bytes) -> tuple[bytes, bytes]:
    return encode(Header(Kind.BRICK, (input_id,), np.array(segments, dtype=np.int64), len(body))), body


def parcel_of(input_id: int, shards: Input) -> tuple[Header, bytes]:
    body = b"".join(content(number, nbytes) for _, number, nbytes in shards)
    return Header(Kind.BRICK, (input_id,), np.array(shards, dtype=np.int64), len(body)), body


def shards_of(header: Header, body: Buffer) -> Iterator[tuple[list[int], bytes]]:
    at = 0
    for segment in header.segments.tolist():
        yield segment, bytes(memoryview(body)[at : at + segment[2]])
        at += segment[2]


class Inline(Executor):
    """Threads that are none, so that an example can be run again."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001  as an executor does
            future.set_exception(error)
        return future


class GatedStore(ShardStore):
    """A store whose worker can be paused: it grants nothing then."""

    def __init__(self, mover: Mover) -> None:
        super().__init__(mover)
        self.gate = asyncio.Event()
        self.gate.set()

    async def reserve(self, nbytes: int) -> Reservation:
        await self.gate.wait()
        return await super().reserve(nbytes)


class Ranks:
    def uses(self, names: Sequence[Any]) -> list[Use]:
        return [name.use if isinstance(name, ChunkName) else IDLE for name in names]


class Call:
    """A call on its way to a peer."""

    def __init__(self, handler: str, target: str, arguments: dict[str, Any]) -> None:
        self.handler = handler
        self.target = target
        self.arguments = arguments
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def __repr__(self) -> str:
        return f"<{self.handler} to {self.target}>"

    def reply(self, handled: asyncio.Future[Any] | None) -> None:
        """Answer the caller; None: with a broken connection."""
        if self.answer.done():
            return
        if handled is None or handled.cancelled():
            self.answer.set_exception(CommClosedError("broken"))
        elif (error := handled.exception()) is not None:
            self.answer.set_exception(error)
        else:
            answer = handled.result()
            # As it is on the other side of a network.
            self.answer.set_result({name: getattr(value, "data", value) for name, value in answer.items()})


class Endpoint:
    """A worker without a server."""

    def __init__(self, address: str, folder: str, network: list[Call]) -> None:
        self.address = address
        self.folder = SpillFolder(folder, BlockPool(2**20))
        self.ledger = Ledger({Tier.HOST: HOST_LIMIT})
        self.lost: list[object] = []
        loop = asyncio.get_running_loop()
        self.mover = Mover(Spiller(self.ledger, Ranks()), DiskStore(self.folder), loop, lambda *a: self.lost.append(a))
        self.store = GatedStore(self.mover)
        self.network = network
        self.barriers = 0
        #: What this worker has told the scheduler.
        self.told: list[dict[str, Any]] = []
        #: Bytes of messages that are being taken in.
        self.taking_nbytes = 0
        self.tasks: dict[Any, Any] = {}
        worker: Any = SimpleNamespace(
            address=address,
            rpc=self.rpc,
            digest_metric=lambda *_: None,
            scheduler=SimpleNamespace(shuffle_barrier=self.shuffle_barrier, shuffle_get=self.shuffle_get),
            loop=None,
            batched_stream=SimpleNamespace(closed=lambda: False, send=self.told.append),
            status=Status.running,
            memory_manager=SimpleNamespace(memory_limit=None),
            security=SimpleNamespace(require_encryption=False),
            state=SimpleNamespace(tasks=self.tasks),
            extensions={"shuffle": SimpleNamespace(shuffle_runs=self)},
        )
        self.part = ShuffleWorker(worker, ShuffleSettings(transport="dask", send_limit=SEND_LIMIT), self.store)
        self.open(1)

    def open(self, run_id: int, *, keeps: bool = False) -> None:
        self.tasks.clear()
        self.told.clear()
        plugin: Any = SimpleNamespace(worker=self.part.worker, _executor=Inline())
        self.run = ToyRun(
            id="toy", run_id=run_id, span_id=None, worker_for=WORKER_FOR, plugin=plugin, part=self.part, keeps=keeps
        )

    def rpc(self, address: str) -> Any:
        def call(handler: str) -> Callable[..., Coroutine[Any, Any, Any]]:
            async def send(**arguments: Any) -> Any:
                self.network.append(call := Call(handler, address, arguments))
                try:
                    return await call.answer
                finally:
                    if call in self.network:
                        self.network.remove(call)

            return send

        return SimpleNamespace(gpurt_shuffle_credit=call("credit"), gpurt_shuffle_take=call("take"))

    async def shuffle_barrier(self, **_: Any) -> None:
        self.barriers += 1

    async def shuffle_get(self, **_: Any) -> dict[str, Any]:
        return {"status": "OK", "run_spec": SimpleNamespace(run_id=self.run.run_id)}

    async def get_with_run_id(self, shuffle_id: str, run_id: int) -> ToyRun:
        if (shuffle_id, run_id) != (self.run.id, self.run.run_id) or self.run.closed:
            raise ShuffleClosedError(f"{run_id} is over")
        return self.run

    async def handle(self, call: Call) -> Any:
        arguments = dict(call.arguments)
        if call.handler == "take":
            # What comes over a network lies in memory of its own.
            arguments["buffers"] = [bytes(memoryview(buffer)) for buffer in arguments["buffers"].data]
            nbytes = sum(map(len, arguments["buffers"]))
            self.taking_nbytes += nbytes
            try:
                return await self.part.carrier.take(**arguments)
            finally:
                self.taking_nbytes -= nbytes
        return await self.part.carrier.credit(**arguments)

    def check(self, window_nbytes: int) -> None:
        """Compare the books with what is there."""
        run, ledger = self.run, self.ledger
        assert not self.lost
        assert len(run.shelved) == len(set(run.shelved)), "a parcel was taken in twice"
        for tier in Tier:
            assert ledger.held(tier) >= 0
            assert ledger.reserved(tier) >= 0
        values: Any = self.mover._values.values()
        assert ledger.held(Tier.HOST) == sum(memoryview(buffer).nbytes for value in values for buffer in value)
        staged = sum(reservation.nbytes for _, reservation in run._shelf._host._staged)
        granted = sum(credit.result().nbytes for credit in run._credits.values() if credit.done())
        # A message that waits, for those shards that it brings again to be in, keeps what is reserved for it.
        taking = ledger.reserved(Tier.HOST) - staged - granted
        assert 0 <= taking <= self.taking_nbytes, (staged, granted, self.taking_nbytes, ledger)
        assert run._outbox.pending_nbytes + window_nbytes == self.part.window.used_nbytes
        state = run.state()
        assert state["credits_nbytes"] == granted
        assert state["outbox_nbytes"] == run._outbox.pending_nbytes

    def check_empty(self) -> None:
        """See that nothing is held or reserved."""
        assert not any(self.ledger.used(tier) for tier in Tier), self.ledger
        assert not self.store._chunks
        assert not self.part._runs
        assert not self.run._credits
        assert not self.run._attended
        assert not self.run._unanswered
        assert not self.taking_nbytes
        assert not self.part.allowance.used_nbytes

    async def close(self) -> None:
        await self.mover.close()
        self.folder.close()


class ShuffleModel(RuleBasedStateMachine):
    """Runs on three endpoints, one after the other, and what they should come to."""

    #: Whether what is sent is kept.
    keeps = False

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        for module, name, value in LIMITS:
            self.stack.enter_context(mock.patch.object(module, name, value))
        retries = {f"distributed.p2p.comm.retry.{key}": value for key, value in RETRY.items()}
        self.stack.enter_context(dask.config.set(retries))
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.network: list[Call] = []
        #: Tasks of the model, kept until they are seen to be done.
        self.handling: set[asyncio.Future[Any]] = set()
        self.competing: dict[str, list[tuple[asyncio.Future[None], int]]] = {address: [] for address in ENDPOINTS}
        self.numbers = 0
        self.endpoints: dict[str, Endpoint] = {}
        for address in ENDPOINTS:
            folder = self.stack.enter_context(tempfile.TemporaryDirectory())
            self.do(self.equip(address, folder))
        #: Who makes which output; workers that were lost.
        self.worker_for = dict(WORKER_FOR)
        self.dead: set[str] = set()
        self.run_id = 1
        ShuffleModel.begin(self)

    @property
    def living(self) -> list[Endpoint]:
        return [endpoint for address, endpoint in self.endpoints.items() if address not in self.dead]

    def alive(self, address: str) -> Endpoint:
        """This endpoint, or one that is there for it."""
        return self.living[0] if address in self.dead else self.endpoints[address]

    def begin(self) -> None:
        self.inputs: dict[int, Input] = {}
        self.adding: list[asyncio.Future[None]] = []
        self.flushing: list[asyncio.Future[None]] = []
        self.handed: set[int] = set()
        self.gone: set[int] = set()

    async def equip(self, address: str, folder: str) -> None:
        self.endpoints[address] = Endpoint(address, folder, self.network)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(asyncio.wait_for(work, 60))

    @property
    def barred(self) -> bool:
        return bool(self.flushing)

    @property
    def unpacking(self) -> bool:
        return self.barred and all(task.done() for task in self.flushing)

    async def settle(self) -> None:
        """Let everything go on that can, which is what happens while a real network takes its time."""
        quiet = 0
        while quiet < 3:
            for _ in range(20):
                await asyncio.sleep(0)
            busy = False
            for endpoint in self.endpoints.values():
                await endpoint.mover.settle()
                busy |= bool(endpoint.ledger.waiting(Tier.HOST) or endpoint.mover._pending)
            quiet = 0 if busy else quiet + 1
            if busy:
                await asyncio.sleep(0.001)

    # What happens

    @precondition(lambda self: not self.barred and len(self.inputs) < 12)
    @rule(
        address=st.sampled_from(ENDPOINTS),
        shards=st.lists(st.tuples(st.integers(0, OUTPUTS - 1), st.sampled_from([1, 20, 90, 130, 400])), max_size=6),
    )
    def add(self, address: str, shards: list[tuple[int, int]]) -> None:
        data = [(output, self.numbers + number, nbytes) for number, (output, nbytes) in enumerate(shards)]
        self.numbers += len(data)
        self.inputs[len(self.inputs)] = data
        self.do(self.start_adding(address, len(self.inputs) - 1))

    @precondition(lambda self: not self.barred and self.inputs)
    @rule(address=st.sampled_from(ENDPOINTS), which=st.integers(0, 99))
    def add_again(self, address: str, which: int) -> None:
        self.do(self.start_adding(address, which % len(self.inputs)))

    async def start_adding(self, address: str, number: int) -> None:
        run = self.alive(address).run
        self.adding.append(asyncio.ensure_future(run._dispatch(*run._split(self.inputs[number], number))))

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 99))
    def deliver(self, which: int) -> None:
        self.do(self.handle(self.network[which % len(self.network)]))

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 99))
    def deliver_twice(self, which: int) -> None:
        call = self.network[which % len(self.network)]
        self.do(self.handle(call, times=2))

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 99))
    def lose_the_request(self, which: int) -> None:
        self.network[which % len(self.network)].reply(None)

    @precondition(lambda self: self.network)
    @rule(which=st.integers(0, 99), at_once=st.booleans())
    def lose_the_answer(self, which: int, at_once: bool) -> None:
        call = self.network[which % len(self.network)]
        self.do(self.handle(call, answered=False))
        if not at_once:
            self.do(self.settle())
        call.reply(None)

    async def handle(self, call: Call, *, times: int = 1, answered: bool = True) -> None:
        self.network.remove(call)
        if call.target in self.dead:
            call.reply(None)
            return
        for _ in range(times):
            handling = asyncio.ensure_future(self.endpoints[call.target].handle(call))
            self.handling.add(handling)
            handling.add_done_callback(self.handling.discard)
            if answered:
                handling.add_done_callback(call.reply)

    @rule(address=st.sampled_from(ENDPOINTS[:2]))
    def pause(self, address: str) -> None:
        self.endpoints[address].store.gate.clear()

    @rule(address=st.sampled_from(ENDPOINTS[:2]))
    def resume(self, address: str) -> None:
        self.endpoints[address].store.gate.set()

    @rule(address=st.sampled_from(ENDPOINTS), nbytes=st.sampled_from([1, 300, 700]))
    def another_run_sends(self, address: str, nbytes: int) -> None:
        async def acquire() -> None:
            waiting = asyncio.ensure_future(self.endpoints[address].part.window.acquire(nbytes))
            self.competing[address].append((waiting, nbytes))

        self.do(acquire())

    @precondition(lambda self: any(self.competing.values()))
    @rule(address=st.sampled_from(ENDPOINTS))
    def the_other_run_ends(self, address: str) -> None:
        """Cancels who waits and releases what others have, in the same turn."""

        async def end() -> None:
            competing, self.competing[address] = self.competing[address], []
            had = [nbytes for waiting, nbytes in competing if waiting.done()]
            for waiting, _ in competing:
                waiting.cancel()
            for nbytes in had:
                self.endpoints[address].part.window.release(nbytes)
            for waiting, _ in competing:
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting

        self.do(end())

    @precondition(lambda self: not self.barred and all(task.done() for task in self.adding))
    @rule()
    def bar(self) -> None:
        async def start() -> None:
            self.flushing = [asyncio.ensure_future(e.run.inputs_done()) for e in self.living]

        self.do(start())

    @precondition(lambda self: self.unpacking)
    @rule(output=st.integers(0, OUTPUTS - 1), times=st.integers(1, 2))
    def unpack(self, output: int, times: int) -> None:
        endpoint = self.endpoints[self.worker_for[output]]
        # Others whose task has its result by now are let go.
        for other in [other for other in self.handed if self.worker_for[other] == endpoint.address and other != output]:
            if endpoint.tasks[other].state == "memory":
                self.handed.discard(other)
                self.gone.add(other)
        endpoint.tasks.setdefault(output, SimpleNamespace(state="executing", dependencies=()))

        async def collect() -> list[list[Buffer] | BaseException]:
            found: list[list[Buffer] | BaseException] = await asyncio.gather(
                *(endpoint.run._collect(output, output) for _ in range(times)), return_exceptions=True
            )
            return found

        endpoint.store.gate.set()
        barriers = endpoint.barriers
        expected = Counter(shard for data in self.inputs.values() for shard in data if shard[0] == output)
        for found in self.do(collect()):
            if output in self.gone:
                # Not there any more: that is for the scheduler, or, asked too often, for the user.
                assert isinstance(found, Reschedule | RuntimeError), found
                assert endpoint.barriers > barriers or isinstance(found, RuntimeError)
                continue
            assert isinstance(found, list), found
            assert endpoint.run._join(output, found) == expected
            self.handed.add(output)

    @precondition(lambda self: self.handed)
    @rule(which=st.integers(0, 99))
    def have_the_result(self, which: int) -> None:
        output = sorted(self.handed)[which % len(self.handed)]
        self.endpoints[self.worker_for[output]].tasks[output].state = "memory"

    @rule(turns=st.integers(0, 12))
    def close_while_everything_arrives(self, turns: int) -> None:
        async def arrive_and_close() -> None:
            for call in list(self.network):
                await self.handle(call)
            for _ in range(turns):
                await asyncio.sleep(0)
            await self.close_all()

        self.do(arrive_and_close())

    async def close_all(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.store.gate.set()
        await asyncio.gather(*(endpoint.run.close() for endpoint in self.endpoints.values()))
        for task in [*self.adding, *self.flushing, *self.handling]:
            with contextlib.suppress(ShuffleClosedError, CommClosedError):
                await task
        await self.settle()
        assert not self.network
        self.run_id += 1
        self.dead.clear()
        self.worker_for = dict(WORKER_FOR)
        for endpoint in self.endpoints.values():
            endpoint.check_empty()
            endpoint.open(self.run_id, keeps=self.keeps)
        self.begin()

    # What is always so

    @invariant()
    def books_are_right(self) -> None:
        self.do(self.settle())
        for address, endpoint in self.endpoints.items():
            had = sum(nbytes for waiting, nbytes in self.competing[address] if waiting.done())
            endpoint.check(had)
            # What was under way to a worker that was lost has failed with it.
            if address not in self.dead:
                assert endpoint.run._exception is None
                assert endpoint.run._outbox.error is None

    def teardown(self) -> None:
        """Bring what is under way to its end, which has to be the right one."""
        try:
            self.finish()
        finally:
            self.do(self.end())
            self.stack.close()

    def finish(self) -> None:
        for address, endpoint in self.endpoints.items():
            endpoint.store.gate.set()
            self.the_other_run_ends(address)
        self.do(self.deliver_all())
        if not self.barred:
            self.bar()
        self.do(self.deliver_all())
        assert self.unpacking
        assert all(task.exception() is None for task in [*self.adding, *self.flushing])
        for output in range(OUTPUTS):
            self.unpack(output, 2)
        self.books_are_right()
        assert not any(endpoint.run._credits for endpoint in self.endpoints.values()), "every credit was used"
        self.do(self.close_all())

    async def deliver_all(self) -> None:
        await self.settle()
        while self.network:
            await self.handle(self.network[0])
            await self.settle()

    async def end(self) -> None:
        for endpoint in self.endpoints.values():
            await endpoint.close()


RETRY = {"count": 1000, "delay.min": "0s", "delay.max": "0s"}

TestShuffleModel = ShuffleModel.TestCase
TestShuffleModel.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


class CompressedModel(ShuffleModel):
    """The same, where every message that can be is compressed."""

    def __init__(self) -> None:
        async def pack(ways: Ways, way: Way, kind: str, buffers: Sequence[Buffer], executor: Executor) -> Compressed:
            return codecs.compress(buffers, "lz4")

        super().__init__()
        self.stack.enter_context(mock.patch.object(codecs, "MIN_NBYTES", 100))
        self.stack.enter_context(mock.patch.object(Ways, "pack", pack))


TestCompressedModel = CompressedModel.TestCase
TestCompressedModel.settings = settings(TestShuffleModel.settings, max_examples=60)


class RepairModel(ShuffleModel):
    """The same, where workers are lost while inputs are added, and the others go on, hearing of it whenever they do.

    The model is the scheduler: it deals outputs by :func:`new_owners`, and has inputs added again as :class:`Repairs` does, which has tests
    of its own.
    """

    keeps = True

    def __init__(self) -> None:
        super().__init__()
        self.do(self.close_all())

    def begin(self) -> None:
        super().begin()
        self.epoch = 0
        #: By endpoint, what the scheduler has said and it has not heard.
        self.words: dict[str, list[tuple[int, str, list[tuple[int, str]]]]] = {address: [] for address in ENDPOINTS}
        #: Input to those that have added it.
        self.adders: dict[int, set[str]] = {}
        #: Input to those whose task has ended.
        self.done: dict[int, set[str]] = {}
        #: By endpoint, the tasks that add inputs there.
        self.adding_on: dict[str, list[asyncio.Future[None]]] = {}
        #: Inputs to be added once more when their task has ended.
        self.late: set[int] = set()
        #: By epoch: who has not told yet, what had been done, and what of that nobody vouches for.
        self.awaited: dict[int, set[str]] = {}
        self.unvouched: dict[int, set[int]] = {}
        self.may_keep(10**6)

    async def start_adding(self, address: str, number: int) -> None:
        endpoint = self.alive(address)
        run = endpoint.run
        run._adders[number] = number
        await super().start_adding(endpoint.address, number)
        self.adders.setdefault(number, set()).add(endpoint.address)
        self.adding_on.setdefault(endpoint.address, []).append(self.adding[-1])

        def ended(_: object = None) -> None:
            run._added.add(number)
            if run is endpoint.run:
                self.done.setdefault(number, set()).add(endpoint.address)

        # The task of a small input may end before its shards have been handed over.
        if sum(nbytes for _, _, nbytes in self.inputs[number]) < LARGE_NBYTES:
            ended()
        else:
            self.adding[-1].add_done_callback(ended)

    @rule(nbytes=st.sampled_from([0, 300, 10**6]))
    def may_keep(self, nbytes: int) -> None:
        for endpoint in self.endpoints.values():
            endpoint.part.allowance.limit_nbytes = nbytes

    @precondition(lambda self: not self.barred and self.inputs and len(self.dead) < 2)
    @rule(address=st.sampled_from(ENDPOINTS), known=st.integers(0, 2**12 - 1))
    def lose(self, address: str, known: int) -> None:
        """A worker is lost; of the inputs that it has added, others have the results of those in ``known``."""
        living = [endpoint.address for endpoint in self.living if endpoint.address != address]
        moved = new_owners(self.worker_for, address, living, {})
        if address in self.dead or moved is None:
            return
        self.dead.add(address)
        self.epoch += 1
        self.worker_for |= moved
        for each in living:
            self.words[each].append((self.epoch, address, list(moved.items())))
        self.words[address].clear()
        for awaited in self.awaited.values():
            awaited.discard(address)
        self.awaited[self.epoch] = set(living)
        done = {n for n, workers in self.done.items() if workers - self.dead or (workers and known >> n & 1)}
        self.unvouched[self.epoch] = done
        alone = {n for n, adders in self.adders.items() if adders <= self.dead}
        self.do(self.bury(address, sorted(alone - done)))

    async def bury(self, address: str, again: Sequence[int]) -> None:
        endpoint = self.endpoints[address]
        endpoint.store.gate.set()
        mine = self.endpoints[address].run
        await mine.close()
        # What it was adding ends with it, and is nobody's any more.
        ends = self.adding_on.pop(address, [])
        await asyncio.gather(*ends, return_exceptions=True)
        self.adding = [task for task in self.adding if task not in ends or task.exception() is None]
        for call in [call for call in self.network if call.target == address]:
            await self.handle(call)
        for number in again:
            await self.start_adding(self.living[0].address, number)

    @precondition(lambda self: any(self.words.values()))
    @rule(which=st.integers(0, 99))
    def hear(self, which: int) -> None:
        hearing = [address for address in ENDPOINTS if self.words[address]]
        self.do(self.tell(hearing[which % len(hearing)]))

    async def tell(self, address: str) -> None:
        self.endpoints[address].run.repair(*self.words[address].pop(0))

    def listen(self) -> None:
        """Take in what workers have told, and have added again what nobody vouches for."""
        for endpoint in self.living:
            while endpoint.told:
                word = endpoint.told.pop(0)
                self.unvouched[word["epoch"]].difference_update(word["keys"])
                # A restart would do the same, and more.
                self.late.update(word["missed"])
                self.awaited[word["epoch"]].discard(endpoint.address)
        for number in [number for number in self.late if self.done.get(number)]:
            self.late.discard(number)
            self.do(self.start_adding(self.living[-1].address, number))
        for epoch in [epoch for epoch, awaited in self.awaited.items() if not awaited]:
            del self.awaited[epoch]
            for number in sorted(self.unvouched.pop(epoch)):
                self.do(self.start_adding(self.living[-1].address, number))

    @precondition(
        lambda self: (
            not self.barred
            and all(task.done() for task in self.adding)
            and not self.awaited
            and not self.late
            and not any(self.words.values())
        )
    )
    @rule()
    def bar(self) -> None:
        super().bar()

    @invariant()
    def books_are_right(self) -> None:
        super().books_are_right()
        self.listen()
        for endpoint in self.living:
            kept = endpoint.run._kept
            assert kept is not None
            assert 0 <= kept.nbytes <= endpoint.part.allowance.used_nbytes

    def finish(self) -> None:
        if not self.barred and self.inputs and not self.dead:
            # In most examples nobody was lost: in each of them somebody is, sooner or later.
            self.lose(ENDPOINTS[self.numbers % 3], known=7 * self.numbers)
        for address in ENDPOINTS:
            while self.words[address]:
                self.do(self.tell(address))
        for endpoint in self.endpoints.values():
            endpoint.store.gate.set()
            self.the_other_run_ends(endpoint.address)
        for _ in range(20):
            self.do(self.deliver_all())
            self.listen()
            if not self.awaited and not self.late and not self.network:
                break
        assert not self.awaited
        assert not self.late
        self.do(self.deliver_all())
        super().finish()


TestRepairModel = RepairModel.TestCase
TestRepairModel.settings = settings(TestShuffleModel.settings, max_examples=100)
