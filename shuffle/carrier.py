"""Carries the messages of a worker's runs to its peers, by UCX where both have it and by Dask's own comms elsewhere.

Covers: the choice of the path, credits, the handlers on the receiver's side, and what happens when a path fails.
Does not cover: what is in a message (:mod:`dask_gpurt.shuffle.run`); how many bytes are under way
(:mod:`dask_gpurt.shuffle.outbox`); UCX itself (:mod:`dask_gpurt.shuffle.transport`).

Theory of operation
    Control always goes over Dask's own comms, with their identities, retries and encryption. A *credit* is a reservation
    of a message's bytes in the receiver's ledger; without it no message of more than :data:`EAGER_NBYTES` moves.

    *By UCX*: one call of ``gpurt_shuffle_take`` carries the small buffers, the sizes of the large ones, and a tag. The
    receiver takes the credit, then begins to receive into memory of its pool; UCX holds the sender back until then. The
    answer of the call says that all of it is in.

    *By Dask's comms*: a call of ``gpurt_shuffle_credit`` is answered when the credit was taken, then
    ``gpurt_shuffle_take`` carries everything.

    UCX is started when the first run begins, aside; until it is there, and with peers that have none, Dask's comms do.
    A delivery that UCX fails goes by Dask's comms, and so do all later ones to that peer. Where Dask's comms are
    encrypted, UCX, which is not, is never started. Peers prove to each other that they are of one installation
    (:mod:`dask_gpurt.shuffle.transport.handshake`); on a worker that has no secret, UCX is not started either. Where a
    worker is reached by the loopback address only, so is its UCX.

    *Buffers on a device* go by UCX from there into memory of the receiver's device, whose tier pays for them; where that
    cannot be allocated, into memory of the host, which UCX can do as well. Dask's comms carry a copy on the host, and the
    receiver keeps it there until the output is made. A message with such buffers waits for UCX to start.

    *Measuring.* Every delivery says what its way is worth: by UCX the receiver tells how long the bytes took once it had
    the credit; by Dask's comms it is the time of the call, without what the receiver spent on the message after it had
    it. By these prices the path is chosen (:mod:`dask_gpurt.shuffle.paths`), and whether to compress
    (:mod:`dask_gpurt.compression`). For a compressed buffer the receiver reserves the raw size beside the other,
    gives up the other when it has decompressed it, and believes no size that it is told
    (:mod:`dask_gpurt.codecs`).
"""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import dask.config
from distributed.comm.core import CommClosedError
from distributed.core import ErrorMessage, OKMessage, error_message
from distributed.metrics import context_meter
from distributed.protocol.serialize import to_serialize

from dask_gpurt import codecs, seams
from dask_gpurt.codecs import Compressed, Packed, plain
from dask_gpurt.handlers import weak
from dask_gpurt.memory.store import Buffer, DeviceBuffer, Reservation, buffer_nbytes
from dask_gpurt.seams import P2PConsistencyError, ShuffleClosedError
from dask_gpurt.secret import Secret
from dask_gpurt.shuffle import paths
from dask_gpurt.shuffle.device import DeviceBody, allocate, library_named
from dask_gpurt.shuffle.shelves import TieredReservation
from dask_gpurt.shuffle.transport.ucx import MIN_FRAME_NBYTES, TransportError, TransportUnavailable, UCXTransport
from dask_gpurt.shuffle.ways import Way, Ways, on_loopback
from dask_gpurt.shuffle.wire import WireError, check_epoch, check_nbytes, check_sizes, pack_list
from dask_gpurt.topology import Gauge, Place, Topology

if TYPE_CHECKING:
    from distributed import Worker

    from dask_gpurt.shuffle.run import Run
    from dask_gpurt.shuffle.worker import ShuffleWorker

__all__ = ["EAGER_NBYTES", "Carrier", "nbytes_of"]

logger = logging.getLogger(__name__)

#: Smaller messages by Dask's comms need no credit: asking would take longer than the message, and there are at most
#: two under way from each peer.
EAGER_NBYTES = 2**20

#: Deliveries that senders have given up which are remembered; they matter for as long as one message takes.
ABANDONED_MAX = 1000
#: Senders for which it is noted what else arrives from them meanwhile.
GAUGES_MAX = 4096
#: What :meth:`Carrier.path` says where UCX is used.
UCX = "by UCX"

Reply = OKMessage | ErrorMessage


def nbytes_of(buffers: Sequence[Buffer | DeviceBuffer]) -> int:
    """Bytes of all ``buffers``."""
    return sum(map(buffer_nbytes, buffers))


class Carrier:
    """Carries messages between this worker and its peers.

    Parameters
    ----------
    worker
        The worker.
    part
        Its part of the shuffle.
    ucx
        Whether UCX may be used.
    secret
        By which peers know each other; None: UCX is not used.
    compress
        Whether messages may be compressed.
    """

    def __init__(
        self, worker: Worker, part: ShuffleWorker, *, ucx: bool, secret: Secret | None = None, compress: bool = True
    ) -> None:
        self._worker = worker
        self._part = part
        #: Why UCX is not used; None: it is, or will be.
        self.without_ucx: str | None = None if ucx else "so it is configured"
        self._secret = secret
        self._transport: UCXTransport | None = None
        self._opening: asyncio.Task[None] | None = None
        #: Address of a worker to that of its transport; None: it is not to be used.
        self._peers: dict[str, bytes | None] = {}
        #: Address of a worker to those of its transports, one for each installation, that may send to this one.
        self._askers: dict[str, set[bytes]] = {}
        self._handlers: dict[str, Callable[..., Any]] = {
            "gpurt_shuffle_address": weak(self.address),
            "gpurt_shuffle_credit": weak(self.credit),
            "gpurt_shuffle_take": weak(self.take),
            "gpurt_shuffle_abandon": weak(self.abandon),
        }
        self._deafen: Callable[[], None] | None = None
        #: (sender, tag) of what is being received, and of what its sender has given up.
        self._receiving: dict[tuple[bytes, int], asyncio.Task[Any]] = {}
        self._abandoned: deque[tuple[bytes, int]] = deque(maxlen=ABANDONED_MAX)
        #: Libraries whose device is current in the transport's thread.
        self._current: set[str] = set()
        #: Bytes sent by UCX, those of them from the memory of a device, bytes sent by Dask's comms, and seconds that were
        #: spent waiting for credits.
        self.ucx_nbytes = 0
        self.device_nbytes = 0
        self.comm_nbytes = 0
        self.credit_wait_s = 0.0
        #: (address of a peer, path) to the bytes sent, for peers that are there.
        self.sent: Counter[tuple[str, str]] = Counter()
        #: What moving bytes from this worker to its peers costs.
        self.topology = Topology()
        # Where Dask's comms compress, ours would be for nothing.
        comm = not dask.config.get("distributed.comm.compression")
        on = [path for path, allowed in ((paths.UCX, compress), (paths.COMM, compress and comm)) if allowed]
        self.ways = Ways(self.topology, Place(worker.address), on)
        #: For what arrives by UCX, by sender.
        self._gauges: dict[bytes, Gauge] = {}

    def __repr__(self) -> str:
        return f"<Carrier of {self._worker.address}: {self._transport or self.without_ucx or 'UCX not started'}>"

    def start(self) -> None:
        """Answer peers."""
        self._worker.handlers.update(self._handlers)
        self._deafen = seams.hear_removed_workers(self._worker, self.peer_gone)

    async def close(self) -> None:
        """Stop; no run of ours is left."""
        for name, handler in self._handlers.items():
            if self._worker.handlers.get(name) is handler:
                del self._worker.handlers[name]
        if self._deafen is not None:
            self._deafen()
            self._deafen = None
        if self._opening is not None:
            await self._opening
        if self._transport is not None:
            await self._transport.close()

    def path(self) -> str:
        """Say in words what carries messages."""
        if self.without_ucx is None and seams.worker_encrypts(self._worker):
            self.without_ucx = "they are encrypted, UCX is not"
        if self.without_ucx is None and self._secret is None:
            self.without_ucx = "the scheduler has given no secret"
        if self.without_ucx is None and importlib.util.find_spec("ucxx") is None:
            self.without_ucx = "ucxx is not installed"
        return UCX if self.without_ucx is None else f"by Dask's comms: {self.without_ucx}"

    # UCX

    def prepare(self) -> None:
        """Start UCX, aside, if that is to be and was not done yet."""
        if self._opening is None and self.path() == UCX:
            self._opening = asyncio.create_task(self._open(), name="gpurt-shuffle-ucx")

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        assert self._secret is not None
        begin = functools.partial(UCXTransport.open, loop, self._secret, loopback=on_loopback(self._worker.address))
        try:
            self._transport = await loop.run_in_executor(None, begin)
        except TransportUnavailable as reason:
            self.without_ucx = str(reason)
            logger.info("The shuffle goes by Dask's own comms: %s", reason)

    async def address(self, asker: str | None = None, peer: bytes | None = None) -> bytes | None:
        """Answer with the address of this worker's transport. Handler for peers, who say who and where they are."""
        self.prepare()
        if self._opening is not None:
            await self._opening
        if self._transport is None:
            return None
        if isinstance(asker, str) and peer is not None:
            try:
                self._transport.check(peer)
            except TransportError as error:
                # It is of another installation, and would not be met.
                logger.warning("UCX is not used with %s: %s", asker, error)
                return None
            self._askers.setdefault(asker, set()).add(peer)
        return self._transport.address

    def peer_gone(self, address: str) -> None:
        """End what is under way with a worker that has left."""
        peers = self._askers.pop(address, set())
        if (known := self._peers.pop(address, None)) is not None:
            peers.add(known)
        self.ways.forget(address)
        for path in (paths.UCX, paths.COMM):
            self.sent.pop((address, path), None)
        if self._transport is not None:
            for peer in peers:
                self._transport.drop_peer(peer)

    def _reaches(self, libraries: Iterable[str]) -> bool:
        """Whether UCX can use the memory of these libraries; from now on it finds their devices."""
        assert self._transport is not None
        for name in set(libraries) - self._current:
            library = library_named(name)
            if not library.transports.issubset(self._transport.describe()["found"]):
                return False
            self._transport.in_thread(library.make_current)
            self._current.add(name)
        return True

    async def _peer(self, address: str) -> bytes | None:
        if self._transport is None:
            return None
        if address not in self._peers:
            # Two that ask at a time get the same answer.
            found = await self._worker.rpc(address).gpurt_shuffle_address(
                asker=self._worker.address, peer=self._transport.address
            )
            try:
                if found is not None:
                    self._transport.check(found)
            except TransportError as error:
                logger.warning("UCX is not used to %s: %s", address, error)
                found = None
            self._peers[address] = found
        return self._peers.get(address)

    # Sending

    async def deliver(self, run: Run, address: str, buffers: Sequence[Any], credit: str) -> Reply:
        """Deliver a message to the peer's part of a run; returns its answer.

        ``credit`` names what the peer reserves for it, the same in every attempt.

        Raises
        ------
        OSError
            If the connection breaks. The message may have arrived.
        """
        libraries = {buffer.library.name for buffer in buffers if isinstance(buffer, DeviceBody)}
        if libraries and self._opening is not None:
            await asyncio.shield(self._opening)
            if self._transport is not None and not self._reaches(libraries):
                buffers, libraries = await self._on_host(buffers), set()
        peer = await self._peer(address)
        if libraries and peer is None:
            buffers, libraries = await self._on_host(buffers), set()
        path = paths.UCX if libraries else paths.COMM
        if peer is not None and not libraries:
            path = self.ways.choose(address, nbytes_of(buffers))
        way = self.ways.way(address, path)
        with context_meter.meter("compress"):
            message = plain(buffers) if libraries else await self.ways.pack(way, str(run.id), buffers, run.executor)
        if peer is not None and path == paths.UCX:
            try:
                return await self._deliver_by_ucx(run, address, peer, message, way)
            except TransportError as error:
                run.raise_if_closed()
                logger.warning("UCX to %s is given up, Dask's comms carry on: %s", address, error)
                if self._peers.get(address) == peer:
                    self._peers[address] = None
                way = self.ways.way(address, paths.COMM)
                if libraries:
                    message = plain(await self._on_host(buffers))
        return await self._deliver_by_comm(run, address, message, credit, way)

    async def _on_host(self, buffers: Sequence[Any]) -> list[Buffer]:
        """Copy what lies on a device, in a thread."""
        lend = self._part.pool.lease
        return await asyncio.get_running_loop().run_in_executor(
            None, lambda: [buffer.on_host(lend) if isinstance(buffer, DeviceBody) else buffer for buffer in buffers]
        )

    async def _deliver_by_ucx(self, run: Run, address: str, peer: bytes, message: Compressed, way: Way) -> Reply:
        assert self._transport is not None
        views = [buffer if isinstance(buffer, DeviceBody) else memoryview(buffer) for buffer in message.buffers]
        libraries = [view.library.name if isinstance(view, DeviceBody) else "" for view in views]
        large = [view for view in views if view.nbytes >= MIN_FRAME_NBYTES]
        tag = self._transport.new_tag()
        sending = asyncio.create_task(self._transport.send(peer, tag, large), name="gpurt-shuffle-send")
        call = asyncio.ensure_future(
            self._worker.rpc(address).gpurt_shuffle_take(
                shuffle_id=run.id,
                run_id=run.run_id,
                epoch=run.epoch,
                buffers=to_serialize([b"" if view.nbytes >= MIN_FRAME_NBYTES else view for view in views]),
                sizes=[view.nbytes if view.nbytes >= MIN_FRAME_NBYTES else 0 for view in views],
                libraries=libraries if any(libraries) else None,
                tag=tag,
                peer=self._transport.address,
                packed=_told(message),
            )
        )
        try:
            await asyncio.wait({call, sending}, return_when=asyncio.FIRST_COMPLETED)
            if not call.done() and sending.exception() is not None:
                # The peer need not have noticed, and would wait for ever.
                await self._worker.rpc(address).gpurt_shuffle_abandon(tag=tag, peer=self._transport.address)
            reply = _answered(await call, address)
            if reply["status"] == "transport-error":
                failed = sending.done() and not sending.cancelled() and sending.exception() is not None
                raise TransportError(str(sending.exception()) if failed else reply["reason"])
            if reply["status"] == "OK":
                await sending
                nbytes, called_nbytes = nbytes_of(large), nbytes_of(views) - nbytes_of(large)
                self._note(run, address, paths.UCX, nbytes)
                self._note(run, address, paths.COMM, called_nbytes)
                self.device_nbytes += sum(view.nbytes for view in large if isinstance(view, DeviceBody))
                self._note_wait(run, reply["waited_s"])
                context_meter.digest_metric("send-ucx", nbytes, "bytes")
                context_meter.digest_metric("send-comm", called_nbytes, "bytes")
                # The memory of a device is another place, at another price.
                if large and not any(libraries):
                    way.carried(nbytes, (reply["carried_nbytes"], reply["carried_s"]))
        finally:
            for task in (call, sending):
                if not task.done():
                    task.cancel()
            # What they ended with is known, or does not matter any more.
            await asyncio.gather(call, sending, return_exceptions=True)
        return reply  # type: ignore[no-any-return]

    async def _deliver_by_comm(self, run: Run, address: str, message: Compressed, credit: str, way: Way) -> Reply:
        rpc = self._worker.rpc(address)
        nbytes = nbytes_of(message.buffers)
        if nbytes + message.raw_nbytes > EAGER_NBYTES:
            started = asyncio.get_running_loop().time()
            reply = _answered(
                await rpc.gpurt_shuffle_credit(
                    shuffle_id=run.id, run_id=run.run_id, credit=credit, nbytes=nbytes + message.raw_nbytes
                ),
                address,
            )
            self._note_wait(run, asyncio.get_running_loop().time() - started)
            if reply["status"] != "OK":
                return reply  # type: ignore[no-any-return]
        begun = way.gauge.begin(time.perf_counter())
        answer = _answered(
            await rpc.gpurt_shuffle_take(
                shuffle_id=run.id,
                run_id=run.run_id,
                epoch=run.epoch,
                buffers=to_serialize(message.buffers),
                credit=credit,
                packed=_told(message),
            ),
            address,
        )
        if answer["status"] == "OK":
            carried_nbytes, elapsed_s = way.gauge.end(begun, nbytes, time.perf_counter())
            self._note(run, address, paths.COMM, nbytes)
            context_meter.digest_metric("send-comm", nbytes, "bytes")
            way.carried(nbytes, (carried_nbytes, elapsed_s - answer["handled_s"]))
        return answer  # type: ignore[no-any-return]

    def _note(self, run: Run, address: str, path: str, nbytes: int) -> None:
        if path == paths.UCX:
            self.ucx_nbytes += nbytes
        else:
            self.comm_nbytes += nbytes
        self.sent[address, path] += nbytes
        run.account.sent[path] += nbytes

    def _note_wait(self, run: Run, elapsed_s: float) -> None:
        self.credit_wait_s += elapsed_s
        run.account.credit_wait_s += elapsed_s
        context_meter.digest_metric("credit-wait", elapsed_s, "seconds")

    # Receiving

    async def credit(self, shuffle_id: str, run_id: int, credit: str, nbytes: int) -> Reply:
        """Reserve memory for a message that is to come. Handler for peers."""
        check_nbytes(nbytes)
        if not isinstance(credit, str):
            raise WireError(f"a credit has a name, and not a {type(credit).__name__}")
        try:
            run = await seams.shuffle_run(self._worker, shuffle_id, run_id)
            await run.attend(run.grant(credit, nbytes))
        except (P2PConsistencyError, ShuffleClosedError) as error:
            return error_message(error)
        return {"status": "OK"}

    async def take(  # noqa: PLR0917  a message of a peer
        self,
        shuffle_id: str,
        run_id: int,
        buffers: Sequence[Buffer],
        sizes: Sequence[int] | None = None,
        tag: int = 0,
        peer: bytes = b"",
        credit: str | None = None,
        libraries: Sequence[str] | None = None,
        packed: Sequence[Sequence[Any]] = (),
        epoch: int = 0,
    ) -> Any:
        """Take in a message. Handler for peers."""
        check_epoch(epoch)
        try:
            run = await seams.shuffle_run(self._worker, shuffle_id, run_id)
            if epoch > run.epoch:
                await run.attend(run.reach(epoch))
            told = pack_list(packed, len(buffers))
            if sizes is None:
                return await run.attend(self._take_by_comm(run, list(buffers), told, credit, epoch))
            if told and libraries is not None:
                raise WireError("a message from the memory of a device has no compressed buffers")
            return await run.attend(self._take_by_ucx(run, list(buffers), told, sizes, libraries, tag, peer, epoch))
        except TransportError as error:
            return {"status": "transport-error", "reason": str(error)}
        except (P2PConsistencyError, ShuffleClosedError) as error:
            return error_message(error)

    async def _take_by_comm(
        self, run: Run, buffers: list[Buffer], packed: Sequence[Packed], credit: str | None, epoch: int
    ) -> dict[str, Any]:
        began_s = time.perf_counter()
        run.meter("receive-comm", nbytes_of(buffers), "bytes")
        # Redeemed in the task that answers for it: one that is cancelled before it begins has nothing to give back.
        reservation = run.redeem(credit)
        if packed and reservation is None:
            # Small, or the same again.
            reservation = await run.reserve(nbytes_of(buffers) + _raw_nbytes(packed))
        if reservation is not None:
            await self._unpack(run, buffers, packed, reservation)
        reply: Any = await run.receive(buffers, reservation, epoch)
        return {**reply, "handled_s": time.perf_counter() - began_s}

    async def _take_by_ucx(  # noqa: PLR0917  a message of a peer
        self,
        run: Run,
        buffers: list[Any],
        packed: Sequence[Packed],
        sizes: Sequence[int],
        libraries: Sequence[str] | None,
        tag: int,
        peer: bytes,
        epoch: int,
    ) -> dict[str, Any]:
        if self._transport is None:
            raise TransportError("this worker has no UCX any more")
        # Before anything is reserved for it.
        check_sizes(sizes, libraries, len(buffers))
        self._transport.check(peer, tag)
        large = [number for number, nbytes in enumerate(sizes) if nbytes]
        called_nbytes = nbytes_of(buffers)
        asked_s = time.perf_counter()
        reservation, frames = await self._memory_for(
            run,
            called_nbytes + _raw_nbytes(packed),
            [(libraries[number] if libraries else "", sizes[number]) for number in large],
        )
        waited_s = time.perf_counter() - asked_s
        identity = (peer, tag)
        try:
            if len(self._gauges) > GAUGES_MAX:
                # Most of them are of peers that have left.
                self._gauges.clear()
            gauge = self._gauges.setdefault(peer, Gauge())
            begun = gauge.begin(time.perf_counter())
            receiving = self._receiving[identity] = asyncio.create_task(
                self._transport.receive(peer, tag, [sizes[number] for number in large], frames)
            )
            if identity in self._abandoned:
                receiving.cancel()
            try:
                received = await receiving
            except asyncio.CancelledError:
                receiving.cancel()
                if identity in self._abandoned:
                    raise TransportError("the sender has given up") from None
                raise
            carried_nbytes, carried_s = gauge.end(begun, sum(sizes), time.perf_counter())
            run.meter("receive", carried_s, "seconds")
            run.meter("receive-ucx", sum(sizes), "bytes")
            run.meter("receive-comm", called_nbytes, "bytes")
            for number, frame in zip(large, received, strict=True):
                buffers[number] = frame
            del received
        except BaseException:
            reservation.release()
            raise
        finally:
            self._receiving.pop(identity, None)
        await self._unpack(run, buffers, packed, reservation)
        reply: Any = await run.receive(buffers, reservation, epoch)
        return {**reply, "waited_s": waited_s, "carried_nbytes": carried_nbytes, "carried_s": carried_s}

    async def _unpack(
        self, run: Run, buffers: list[Buffer], packed: Sequence[Packed], reservation: Reservation | TieredReservation
    ) -> None:
        """Decompress in place what was compressed, within what is reserved; where that fails, it is given back."""
        if not packed:
            return
        assert not isinstance(reservation, TieredReservation), "nothing on a device is compressed"
        wire_nbytes = nbytes_of([buffers[each.number] for each in packed])
        if reservation.nbytes < nbytes_of(buffers) + _raw_nbytes(packed):
            reservation.release()
            raise WireError(f"{_raw_nbytes(packed)} bytes after decompression are more than was asked for")
        try:
            loop = asyncio.get_running_loop()
            with run.metered(), context_meter.meter("decompress"):
                buffers[:] = await loop.run_in_executor(
                    run.executor, codecs.decompress, buffers, packed, self._part.pool.lease
                )
        except codecs.CodecError as error:
            reservation.release()
            raise WireError(str(error)) from error
        except BaseException:
            reservation.release()
            raise
        reservation.split(wire_nbytes).release()

    async def _memory_for(
        self, run: Run, others_nbytes: int, frames: Sequence[tuple[str, int]]
    ) -> tuple[Reservation | TieredReservation, Callable[[int], Any]]:
        """Reserve for a message whose large buffers are ``frames``, and say what gives their memory, in their order."""
        wanted = [(name, nbytes) for name, nbytes in frames if name]
        lend = self._part.pool.lease
        if wanted and self._reaches(name for name, _ in wanted):
            device_nbytes = sum(nbytes for _, nbytes in wanted)
            host_nbytes = others_nbytes + sum(nbytes for _, nbytes in frames) - device_nbytes
            reservation = await run.reserve_tiers(host_nbytes, device_nbytes)
            try:
                bodies = iter(await asyncio.get_running_loop().run_in_executor(None, allocate, wanted))
            except MemoryError:
                reservation.release()
                logger.info("The device has no room for %d bytes, the host takes them", device_nbytes)
            except BaseException:
                reservation.release()
                raise
            else:
                names = iter([name for name, _ in frames])
                return reservation, lambda nbytes: next(bodies) if next(names) else lend(nbytes)
        return await run.reserve(others_nbytes + sum(nbytes for _, nbytes in frames)), lend

    async def abandon(self, tag: int, peer: bytes) -> None:
        """Stop waiting for a delivery that its sender has given up. Handler for peers."""
        if self._transport is None:
            return
        self._transport.check(peer, tag)
        identity = (peer, tag)
        self._abandoned.append(identity)
        receiving = self._receiving.get(identity)
        if receiving is not None:
            receiving.cancel()


def _answered(reply: Any, address: str) -> Any:
    """Return a peer's answer. Dask answers nothing for a worker that has not the handler any more, or not yet.

    It may be closing, which is not known here yet: as if the connection had broken.
    """
    if reply is None:
        raise CommClosedError(f"{address} has no part in shuffles")
    return reply


def _told(message: Compressed) -> list[tuple[int, str, int, int]]:
    return [(each.number, each.codec, each.nbytes, each.digest) for each in message.packed]


def _raw_nbytes(packed: Sequence[Packed]) -> int:
    return sum(each.nbytes for each in packed)
