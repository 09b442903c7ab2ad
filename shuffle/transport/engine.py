"""All that is said to UCX: a context, a worker, an endpoint a peer, and the requests that are under way.

Covers: the settings UCX needs, sends and receives as requests, what becomes of them when a peer is gone, and when a
buffer is free again.
Does not cover: which message is taken (:mod:`dask_gpurt.shuffle.transport.inbox`); how peers prove who they are
(:mod:`dask_gpurt.shuffle.transport.handshake`); threads and the event loop (:mod:`dask_gpurt.shuffle.transport.ucx`). All
methods are called from one thread.

Theory of operation
    *Credits.* Every frame is larger than the threshold above which UCX sends by rendezvous: the sender sends a few
    bytes, and no byte of the frame moves before the receiver has given a buffer for it. Since a receiver reserves the
    memory first, a sender cannot make it hold more than it has reserved.

    *Strangers.* Whoever reaches a port of UCX can send messages. One that is not of a peer that has proven itself is
    refused when its first bytes are there: no memory is given for it, nothing is kept, and nothing is answered; it is
    counted, and the first is logged. What a peer says of a delivery counts with its seal only. A message that is smaller
    than the threshold below has come in whole by then, into memory of UCX's own, which is free at once.

    *Endpoints have error handling.* Without it, UCX ends the process of the survivor (SIGABRT) when it reads from the
    memory of a peer that was killed.

    *No shared memory.* There, all peers of a worker write into one queue of its. Who is killed while it writes leaves a
    place in the queue that is never filled, and UCX (1.21) reads nothing that comes after it: three of sixty kills in the
    midst of a delivery ended all that the survivor was sent, by whomever. What waits for room in the queue of a peer that
    is killed never ends either. Between the processes of a host UCX reads from the other's memory (CMA), which is as
    fast, or where it may not do that, goes over the loopback device, at three quarters of the speed.

    *Buffers.* UCX cannot take back a request that is under way. What a caller has cancelled is answered at once, but its
    buffers stay referenced here until UCX is done with them: they are in *quarantine*. A send ends when its peer takes
    it, refuses it (which a withdrawal makes it do), or is dropped; a receive ends by itself or with the endpoint.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from dask_gpurt.secret import SEAL_NBYTES, Secret
from dask_gpurt.shuffle.transport.address import (
    ADDRESS_NBYTES_MAX,
    MANIFEST_NBYTES,
    Address,
    Manifest,
    Part,
    TransportError,
    TransportUnavailable,
    off_wire,
    on_wire,
    owner_of,
)
from dask_gpurt.shuffle.transport.handshake import HANDSHAKE_S, MESSAGE_NBYTES_MAX, Handshake, Met, Say
from dask_gpurt.shuffle.transport.inbox import Fail, Inbox, Instruction, Receipt, Refuse, Take

__all__ = ["MAX_GONE", "MAX_READING", "RENDEZVOUS_NBYTES", "Engine", "Transfer"]

logger = logging.getLogger(__name__)

#: Messages from this size on go by rendezvous. UCX's own choice depends on the link, and may be a megabyte.
RENDEZVOUS_NBYTES = 8192

#: Incarnations of dropped peers that are remembered. Dask itself forgets a worker that is gone.
MAX_GONE = 4096

#: Messages of greetings that have come in part. They are small: mostly there is none.
MAX_READING = 64
#: Messages that are looked at before anything else has its turn.
_MESSAGES_PER_STEP = 256
#: Size of what is said of a delivery.
_SAID_NBYTES = MANIFEST_NBYTES + SEAL_NBYTES

#: How long requests are given to end when the transport is closed, and how often they are looked at.
_CLOSING_S = 0.2
_CLOSING_STEP_S = 0.0005

#: Settings that UCX needs, where the user has not set another in the environment.
_DEFAULTS = {
    # All that UCX finds but shared memory. Where errors are to be handled, UCX leaves that out by itself; this spares
    # the segments.
    "TLS": "^posix,sysv,xpmem",
    # CMA (one process reads from the other's memory) is to be used together with error handling.
    "CMA_MEMORY_INVALIDATE": "y",
}
#: What UCX may use of the network where all peers are on this host.
_LOOPBACK = {"NET_DEVICES": "lo"}
#: Settings without which credits would not hold.
_FORCED = {"RNDV_THRESH": str(RENDEZVOUS_NBYTES)}


def _load() -> tuple[Any, Any]:
    """Import ucxx: what it offers of UCX, and what it wraps buffers in."""
    # ucxx sets this too, but only once UCX has been loaded, so that it has no effect but a warning.
    os.environ.setdefault("UCX_MEMTYPE_CACHE", "n")
    try:
        from ucxx import libucxx
        from ucxx._lib.arr import Array
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # Shared libraries that do not fit together say so in many ways.
        raise TransportUnavailable(f"ucxx cannot be imported: {error}") from error
    return libucxx, Array


class Transfer:
    """A delivery on its way out or in.

    Parameters
    ----------
    peer
        The other side.
    tag
        Tag of the delivery.
    arrays
        Its frames, wrapped by :meth:`Engine.wrap`.
    """

    __slots__ = ("arrays", "peer", "posted", "receipt", "requests", "settle", "settled", "tag")

    def __init__(self, peer: Address, tag: int, arrays: Sequence[Any]) -> None:
        self.peer = peer
        self.tag = tag
        self.arrays = arrays
        #: Called once: with None when all is over, or with the error.
        self.settle: Callable[[TransportError | None], None] = lambda _: None
        self.settled = False
        #: What was asked of the inbox, for a receive.
        self.receipt: Receipt | None = None
        #: Requests under way, each with the array that UCX works on.
        self.requests: deque[tuple[Any, Any]] = deque()
        #: Frames for which there was a request.
        self.posted = 0

    def __repr__(self) -> str:
        state = "settled" if self.settled else "under way"
        return f"<Transfer {self.tag:#x} {self.posted}/{len(self.arrays)} posted, {len(self.requests)} open, {state}>"


class Engine:
    """UCX, and the state of all deliveries of one worker.

    Parameters
    ----------
    secret
        By which peers know each other.
    loopback
        Whether peers are on this host only: then nothing listens on the network.

    Raises
    ------
    TransportUnavailable
        If UCX does not start here.
    """

    def __init__(self, secret: Secret, *, loopback: bool = False) -> None:
        defaults = _DEFAULTS | (_LOOPBACK if loopback else {})
        settings = {key: value for key, value in defaults.items() if f"UCX_{key}" not in os.environ} | _FORCED
        self._api, self._array = _load()
        api = self._api
        features = (api.Feature.TAG, api.Feature.WAKEUP)
        try:
            try:
                self._context = api.UCXContext(settings, features)
            except api.UCXInvalidParamError:
                # An older UCX does not know all of the defaults. It is slower on one host then, and as safe.
                self._context = api.UCXContext(_FORCED, features)
            self._worker = api.UCXWorker(self._context, enable_delayed_submission=False, enable_python_future=False)
            self._worker.init_blocking_progress_mode()
            self.address = Address.new(api.UCXAddress.create_from_worker(self._worker).tobytes())
        except (api.UCXError, RuntimeError, OSError) as error:
            raise TransportUnavailable(f"UCX does not start: {error}") from error
        if len(self.address.encode(secret)) > ADDRESS_NBYTES_MAX:
            raise TransportUnavailable(f"UCX has an address of {len(self.address.ucx)} bytes")
        self._handshake = Handshake(secret, self.address)
        self._any_tag = api.UCXXTag(0)
        self._any_mask = api.UCXXTagMask(0)
        #: Where messages are put that are refused.
        self._nowhere = self._array(np.empty(1, dtype=np.uint8))
        self._inbox = Inbox()
        #: Incarnation to the deliveries for it that wait for its answer to a greeting.
        self._greeting: dict[int, list[Transfer]] = {}
        #: Messages of greetings that are not there as a whole: requests, each with the array that UCX works on.
        self._reading: list[tuple[Any, Any]] = []
        #: Messages that were refused, as nobody has proven that they are from a peer. Any thread may look.
        self.strangers = 0
        #: Incarnation to endpoint.
        self._endpoints: dict[int, Any] = {}
        #: Deliveries that have requests open, or wait for messages.
        self._transfers: dict[Transfer, None] = {}
        #: Receipt to its delivery.
        self._receiving: dict[Receipt, Transfer] = {}
        #: Small messages and refusals: requests, each with the array that UCX works on.
        self._minor: deque[tuple[Any, Any]] = deque()
        #: Incarnations that were dropped, oldest first.
        self._gone: dict[int, None] = {}

    def __repr__(self) -> str:
        return f"<Engine {len(self._endpoints)} peers, {len(self._transfers)} transfers, {self._inbox!r}>"

    # What the environment needs to know

    @property
    def event_fd(self) -> int:
        """A file descriptor that becomes readable when there is something to do, after :meth:`arm`."""
        fd: int = self._worker.epoll_file_descriptor
        return fd

    def arm(self) -> bool:
        """Whether it is safe to wait on :attr:`event_fd`; else there is something to do already."""
        return bool(self._worker.arm())

    def wrap(self, buffer: Any) -> Any:
        """Return a buffer in host or device memory as UCX takes it. Any thread may ask."""
        return self._array(buffer)

    def describe(self) -> dict[str, Any]:
        """Say which UCX this is, and what it found on this machine."""
        import ucxx

        resources = _resources(self._context.info)
        return {
            "transport": "ucx",
            "version": ".".join(map(str, ucxx.get_ucx_version())),
            "found": list(dict.fromkeys(resource.partition("/")[0] for resource in resources)),
            "resources": resources,
        }

    @property
    def quarantined_nbytes(self) -> int:
        """Bytes of buffers whose callers have their answer, and UCX is not done. Any thread may ask."""
        # Copied before they are looked at: copying is one step for the interpreter.
        return sum(array.nbytes for t in list(self._transfers) if t.settled for _, array in list(t.requests))

    # What the worker asks for

    def send(self, transfer: Transfer) -> None:
        """Begin to send, with a greeting if there was none."""
        peer = transfer.peer
        try:
            endpoint = self._endpoint(peer)
            if self._handshake.met(peer.incarnation):
                self._begin(endpoint, transfer)
                return
            if peer.incarnation not in self._greeting:
                self._greet(endpoint, self._handshake.greet(peer, time.monotonic()))
            self._greeting.setdefault(peer.incarnation, []).append(transfer)
            self._transfers[transfer] = None
        except (TransportError, self._api.UCXError) as error:
            self._settle(transfer, _as_transport_error(error))

    def _begin(self, endpoint: Any, transfer: Transfer) -> None:
        manifest = Manifest.of([array.nbytes for array in transfer.arrays])
        self._say(endpoint, transfer, Part.MANIFEST, manifest)
        self._transfers[transfer] = None
        tag = self._api.UCXXTag(on_wire(transfer.tag, Part.FRAME))
        for array in transfer.arrays:
            transfer.requests.append((endpoint.tag_send(array, tag), array))
            transfer.posted += 1

    def withdraw(self, transfer: Transfer) -> None:
        """Give up sending; the peer is asked to refuse what it has not taken."""
        if transfer.settled:
            return
        self._settle(transfer, TransportError("withdrawn"))
        endpoint = self._endpoints.get(transfer.peer.incarnation)
        # A peer that was not met hears of it when it is.
        if endpoint is not None and self._handshake.met(transfer.peer.incarnation):
            try:
                self._say(endpoint, transfer, Part.WITHDRAWAL, Manifest(transfer.posted, 0))
            except self._api.UCXError:
                # It has failed, and its requests end by that.
                self._fail_peer(transfer.peer.incarnation, "the connection failed")

    def receive(self, transfer: Transfer) -> None:
        """Begin to receive: messages are taken as they come."""
        try:
            # The endpoint that UCX takes data from is this one if it is made first, and can be closed then.
            self._endpoint(transfer.peer)
        except (TransportError, self._api.UCXError) as error:
            self._settle(transfer, _as_transport_error(error))
            return
        transfer.receipt = Receipt(transfer.tag, tuple(array.nbytes for array in transfer.arrays))
        self._receiving[transfer.receipt] = transfer
        self._transfers[transfer] = None
        self._follow(self._inbox.want(transfer.receipt))

    def cancel(self, transfer: Transfer) -> None:
        """Give up receiving; what comes is refused."""
        if not transfer.settled:
            self._abandon(transfer, TransportError("cancelled"))

    def drop(self, peer: Address) -> None:
        """End all that is under way with a peer, for good."""
        self._gone.pop(peer.incarnation, None)
        self._gone[peer.incarnation] = None
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
        self._handshake.gone(peer.incarnation)
        self._fail_peer(peer.incarnation, "the peer is gone")

    def close(self, reason: str = "the transport is closed") -> None:
        """End everything and give up UCX."""
        for transfer in list(self._transfers):
            if transfer.receipt is not None:
                self._abandon(transfer, TransportError(reason))
            else:
                self.withdraw(transfer)
        for incarnation in {owner_of(tag) for tag in self._inbox.tags}:
            self._follow(self._inbox.gone(incarnation, reason))
        # Peers that live end in this time what is under way. It is worth the wait: a send that ends with its endpoint
        # leaves something behind in ucxx, which keeps the UCX worker and its files to the end of the process.
        self._drain()
        for incarnation in list(self._endpoints):
            self._fail_peer(incarnation, reason)
        self._drain()
        # UCX is done with all buffers when its worker is no more.
        del self._worker, self._context
        self._transfers.clear()
        self._greeting.clear()
        self._reading.clear()
        self._minor.clear()

    def _drain(self) -> None:
        deadline_s = time.monotonic() + _CLOSING_S
        while self.step() or self._transfers or self._minor:
            if time.monotonic() > deadline_s:
                break
            time.sleep(_CLOSING_STEP_S)

    # What happens

    def step(self) -> bool:
        """Let UCX go on, and do what follows from it; says whether there was anything."""
        self._worker.progress()
        busy = False
        for _ in range(_MESSAGES_PER_STEP):
            probe = self._worker.tag_probe(self._any_tag, self._any_mask, True)
            if not probe.matched:
                break
            busy = True
            self._message(probe)
        if self._reading:
            self._read_on()
        while self._minor and self._minor[0][0].completed:
            # A refusal always ends with an error, and a peer that a small message cannot reach is found out by the rest.
            self._minor.popleft()
        for transfer in list(self._transfers):
            busy |= self._advance(transfer)
        if self._handshake.pending:
            self._expire()
        return busy

    def _message(self, probe: Any) -> None:
        tag, part = off_wire(probe.sender_tag.value)
        owner = owner_of(tag)
        if part == Part.GREETING:
            self._read(probe)
        elif owner in self._gone:
            self._refuse(probe)
        elif not self._handshake.proven(owner):
            self._refuse(probe)
            self._stranger("a message of a peer that has not proven itself")
        elif part == Part.FRAME:
            self._follow(self._inbox.arrived(tag, probe.length, probe))
        else:
            self._hear(probe, tag, part)

    def _hear(self, probe: Any, tag: int, part: int) -> None:
        """Take in what a peer says of a delivery."""
        if probe.length != _SAID_NBYTES:
            self._refuse(probe)
            self._stranger(f"{probe.length} bytes about a delivery")
            return
        said = np.empty(_SAID_NBYTES, dtype=np.uint8)
        request = self._worker.tag_recv_with_handle(self._array(said), probe)
        # Small messages come with their data.
        body, seal = said[:MANIFEST_NBYTES].tobytes(), said[MANIFEST_NBYTES:].tobytes()
        if not request.completed or not self._handshake.verifies(owner_of(tag), probe.sender_tag.value, body, seal):
            self._minor.append((request, said))
            self._stranger("a message about a delivery without a proof")
            return
        request.check_error()
        if part == Part.MANIFEST:
            self._follow(self._inbox.announced(tag, Manifest.decode(body)))
        else:
            self._follow(self._inbox.withdrawn(tag))

    # Greetings

    def _read(self, probe: Any) -> None:
        if not 0 < probe.length <= MESSAGE_NBYTES_MAX or len(self._reading) >= MAX_READING:
            self._refuse(probe)
            self._stranger(f"a greeting of {probe.length} bytes")
            return
        message = np.empty(probe.length, dtype=np.uint8)
        self._reading.append((self._worker.tag_recv_with_handle(self._array(message), probe), message))
        self._read_on()

    def _read_on(self) -> None:
        waiting, self._reading = self._reading, []
        for request, message in waiting:
            if not request.completed:
                self._reading.append((request, message))
                continue
            try:
                request.check_error()
                heard = self._handshake.hear(message.tobytes(), time.monotonic())
            except (TransportError, self._api.UCXError) as error:
                self._stranger(str(error))
                continue
            try:
                self._heard(heard)
            except (TransportError, self._api.UCXError) as error:
                # It has left meanwhile.
                logger.debug("a greeting is not answered: %s", error)

    def _heard(self, heard: Say | Met | None) -> None:
        if heard is None:
            return
        endpoint = self._endpoint(heard.peer)
        self._greet(endpoint, heard.message)
        if isinstance(heard, Say):
            return
        for transfer in self._greeting.pop(heard.peer.incarnation, ()):
            try:
                if transfer.settled:
                    self._say(endpoint, transfer, Part.WITHDRAWAL, Manifest(0, 0))
                else:
                    self._begin(endpoint, transfer)
            except self._api.UCXError as error:
                self._settle(transfer, _as_transport_error(error))

    def _expire(self) -> None:
        expired = self._handshake.expire(time.monotonic())
        for incarnation in expired.silent:
            error = TransportError(f"the peer has not proven within {HANDSHAKE_S:g} s that it is one")
            for transfer in self._greeting.pop(incarnation, ()):
                self._settle(transfer, error)
        for incarnation in expired.unproven:
            self._stranger("a greeting that was not proven")
            in_use = self._handshake.met(incarnation) or self._handshake.proven(incarnation)
            if not in_use and all(transfer.peer.incarnation != incarnation for transfer in self._transfers):
                self._fail_peer(incarnation, "the peer has not proven that it is one")

    def _stranger(self, what: str) -> None:
        self.strangers += 1
        if self.strangers == 1:
            logger.warning(
                "UCX was sent what is not of this installation, and refuses it: %s. More is only counted", what
            )

    def _follow(self, instructions: Iterable[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Take(message, receipt, index):
                    transfer = self._receiving[receipt]
                    array = transfer.arrays[index]
                    transfer.posted += 1
                    transfer.requests.append((self._worker.tag_recv_with_handle(array, message), array))
                    if transfer.posted == len(transfer.arrays):
                        del self._receiving[receipt]
                case Refuse(message):
                    self._refuse(message)
                case Fail(receipt, reason):
                    transfer = self._receiving.pop(receipt)
                    self._settle(transfer, TransportError(reason))

    def _advance(self, transfer: Transfer) -> bool:
        requests = transfer.requests
        moved = False
        while requests and requests[0][0].completed:
            request, _ = requests.popleft()
            moved = True
            try:
                request.check_error()
            except self._api.UCXError as error:
                self._abandon(transfer, _as_transport_error(error))
                endpoint = self._endpoints.get(transfer.peer.incarnation)
                if endpoint is not None and not endpoint.alive:
                    self._fail_peer(transfer.peer.incarnation, f"the connection failed: {error}")
        if not requests and transfer.posted == len(transfer.arrays):
            self._settle(transfer, None)
        if not requests and transfer.settled:
            self._transfers.pop(transfer, None)
            transfer.arrays = ()
        return moved

    def _abandon(self, transfer: Transfer, error: TransportError) -> None:
        self._settle(transfer, error)
        receipt = transfer.receipt
        if receipt is not None and self._receiving.pop(receipt, None) is not None:
            self._follow(self._inbox.cancel(receipt))

    def _settle(self, transfer: Transfer, error: TransportError | None) -> None:
        if not transfer.settled:
            transfer.settled = True
            transfer.settle(error)

    def _fail_peer(self, incarnation: int, reason: str) -> None:
        error = TransportError(reason)
        self._handshake.lost(incarnation)
        self._greeting.pop(incarnation, None)
        self._follow(self._inbox.gone(incarnation, reason))
        for transfer in list(self._transfers):
            if transfer.peer.incarnation == incarnation:
                self._abandon(transfer, error)
        endpoint = self._endpoints.pop(incarnation, None)
        if endpoint is not None:
            endpoint.close_blocking()

    def _refuse(self, message: Any) -> None:
        # Too small for it: UCX tells the sender that it is done, and moves nothing.
        self._minor.append((self._worker.tag_recv_with_handle(self._nowhere, message), self._nowhere))

    def _say(self, endpoint: Any, transfer: Transfer, part: Part, manifest: Manifest) -> None:
        tag, body = on_wire(transfer.tag, part), manifest.encode()
        self._post(endpoint, tag, body + self._handshake.seal(transfer.peer.incarnation, tag, body))

    def _greet(self, endpoint: Any, message: bytes) -> None:
        self._post(endpoint, on_wire(0, Part.GREETING), message)

    def _post(self, endpoint: Any, wire_tag: int, message: bytes) -> None:
        array = self._array(message)
        self._minor.append((endpoint.tag_send(array, self._api.UCXXTag(wire_tag)), array))

    def _endpoint(self, peer: Address) -> Any:
        if peer.incarnation in self._gone:
            raise TransportError("the peer is gone")
        endpoint = self._endpoints.get(peer.incarnation)
        if endpoint is not None and not endpoint.alive:
            self._fail_peer(peer.incarnation, "the connection failed")
            endpoint = None
        if endpoint is None:
            address = self._api.UCXAddress.create_from_buffer(peer.ucx)
            endpoint = self._api.UCXEndpoint.create_from_worker_address(self._worker, address, True)
            self._endpoints[peer.incarnation] = endpoint
        return endpoint


def _as_transport_error(error: Exception) -> TransportError:
    return error if isinstance(error, TransportError) else TransportError(f"UCX: {error}")


def _resources(info: str) -> list[str]:
    """Find transports and the devices that they use in what UCX prints about a context.

    Examples
    --------
    >>> _resources("# resource 0 : md 0 dev 0 flags -- self/memory")
    ['self/memory']
    """
    return list(dict.fromkeys(line.split()[-1] for line in info.splitlines() if " resource " in line))
