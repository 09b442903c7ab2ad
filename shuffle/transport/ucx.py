"""The transport of one worker over UCX, as the worker's event loop sees it.

Covers: sending and receiving deliveries, cancellation, peers that are gone, opening and closing; and the thread that
works for it.
Does not cover: what UCX is told (:mod:`dask_gpurt.shuffle.transport.engine`); who is alive, which Dask knows and says by
:meth:`UCXTransport.drop_peer`; how many bytes may be under way, which the caller limits. There are no timeouts here, but for a
peer that does not prove that it is one (:mod:`dask_gpurt.shuffle.transport.handshake`).

A delivery, from both sides
    1. The sender takes a tag (:meth:`UCXTransport.new_tag`), calls an RPC of the receiver with the tag, the sizes of the
       frames and its own :attr:`UCXTransport.address`, and at the same time awaits :meth:`UCXTransport.send`.
    2. The receiver reserves memory for the sizes, and awaits :meth:`UCXTransport.receive`, within the RPC. Only now do
       frames move.
    3. The receiver answers the RPC. That answer says that the delivery arrived; the end of ``send`` says only that the
       buffers are free, for UCX tells a sender nothing of a receiver that refused. If the answer is an error, or the
       connection breaks, the sender cancels ``send``; if the RPC is cancelled, the receiver cancels ``receive``.

    A tag is used once. What is sent again gets another.

Theory of operation
    UCX is used from one thread, which sleeps in ``poll`` until UCX or the event loop has something for it. Copies, which
    within a host and with TCP are this process's own work, are done there without the GIL; on the event loop they would
    hold up everything else for as long as they take.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.transport.address import (
    TAG_BITS,
    Address,
    TagCounter,
    TransportError,
    TransportUnavailable,
    owner_of,
)
from dask_gpurt.shuffle.transport.engine import RENDEZVOUS_NBYTES, Engine, Transfer

__all__ = ["MIN_FRAME_NBYTES", "TransportError", "TransportUnavailable", "UCXTransport", "host_buffer"]

logger = logging.getLogger(__name__)

#: Frames have to be of this size at least: smaller ones travel better within the RPC, and would not be held back until
#: the receiver is ready for them.
MIN_FRAME_NBYTES = 8 * RENDEZVOUS_NBYTES

#: UCX is looked at this often where it does not call. It should never be needed, and costs microseconds.
_PATIENCE_S = 0.5

_Answer = tuple["asyncio.Future[None]", TransportError | None]


def host_buffer(nbytes: int) -> memoryview:
    """Allocate host memory that is not cleared, and not there until it is written to."""
    return np.empty(nbytes, dtype=np.uint8).data


class UCXTransport:
    """Carries deliveries between workers. Made by :meth:`open`; its methods are called on one event loop.

    Parameters
    ----------
    loop
        The event loop.
    engine
        UCX, which from now on belongs to the thread of this transport.
    secret
        By which addresses are known.
    prepare_thread
        Called first in that thread.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        engine: Engine,
        secret: Secret,
        prepare_thread: Callable[[], None] | None = None,
    ) -> None:
        self._loop = loop
        self._engine = engine
        self._secret = secret
        self._address = engine.address.encode(secret)
        self._prepare_thread = prepare_thread
        self._tags = TagCounter(engine.address.incarnation)
        self._description = engine.describe()
        #: What the thread is to do, oldest first; None: end.
        self._commands: deque[Callable[[], None] | None] = deque()
        #: Answers that the event loop is to hear next. Only the thread touches it.
        self._answers: list[_Answer] = []
        #: Those who wait. Only the event loop touches it.
        self._waiting: set[asyncio.Future[None]] = set()
        self._closing = False
        #: Done when the thread has ended.
        self._ended: asyncio.Future[None] = loop.create_future()
        self._waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="gpurt-ucx", daemon=True)
        self._thread.start()
        # A daemon thread that is in UCX while the process is taken down would bring it down with a signal.
        atexit.register(self._stop)
        #: Bytes that went out and came in.
        self.sent_nbytes = 0
        self.received_nbytes = 0

    def __repr__(self) -> str:
        state = "closed" if self._ended.done() else "closing" if self._closing else f"{len(self._waiting)} under way"
        return f"<UCXTransport {state}, {self.sent_nbytes} bytes out, {self.received_nbytes} bytes in>"

    @classmethod
    def open(
        cls,
        loop: asyncio.AbstractEventLoop,
        secret: Secret,
        prepare_thread: Callable[[], None] | None = None,
        *,
        loopback: bool = False,
    ) -> UCXTransport:
        """Start UCX for a worker. The first time in a process this takes half a second; any thread may do it.

        Parameters
        ----------
        loop
            The event loop that the transport will be used on.
        secret
            What all peers know; from whoever does not nothing is taken.
        prepare_thread
            Called first in the thread that works for the transport; where there are device buffers, it makes their CUDA
            context current.
        loopback
            Whether all peers are on this host: then UCX listens on the loopback address only.

        Raises
        ------
        TransportUnavailable
            If ucxx is not installed, or UCX does not start.
        """
        return cls(loop, Engine(secret, loopback=loopback), secret, prepare_thread)

    @property
    def address(self) -> bytes:
        """What peers need to reach this worker, and to tell it from what was in its place before. Opaque."""
        return self._address

    def check(self, peer: object, tag: object = None) -> None:
        """Check what somebody says is the address of a peer, and a tag of it.

        Raises
        ------
        TransportError
            If nobody has made it who knows the secret, or the tag is that of another.
        """
        address = self._decode(peer)
        if tag is not None and (type(tag) is not int or tag >> TAG_BITS or owner_of(tag) != address.incarnation):
            raise TransportError(f"{tag!r:.40} is no tag of that peer")

    def _decode(self, peer: Any) -> Address:
        return Address.decode(peer, self._secret)

    def new_tag(self) -> int:
        """Return the tag for a delivery that this worker is to send."""
        return self._tags.next()

    def describe(self) -> dict[str, Any]:
        """Say which UCX this is, what it found on this machine, and what is under way."""
        return self._description | {
            "under_way": len(self._waiting),
            "quarantined_nbytes": self._engine.quarantined_nbytes,
            "strangers": self._engine.strangers,
            "sent_nbytes": self.sent_nbytes,
            "received_nbytes": self.received_nbytes,
        }

    async def send(self, peer: bytes, tag: int, buffers: Sequence[Any]) -> None:
        """Send a delivery. Returns when UCX is done with the buffers: the peer has taken or refused all of them.

        The buffers must not change before that. If the awaiting task is cancelled, the peer is asked to refuse what it
        has not taken; until then the buffers stay referenced, and are read from.

        Parameters
        ----------
        peer
            Address of the receiver.
        tag
            From :meth:`new_tag`.
        buffers
            Contiguous, in host or device memory, of :data:`MIN_FRAME_NBYTES` at least.

        Raises
        ------
        TransportError
            If the peer is gone, the connection broke, or this transport is closed.
        """
        address = self._decode(peer)
        arrays = [self._frame(buffer) for buffer in buffers]
        if owner_of(tag) != self._engine.address.incarnation:
            raise ValueError(f"{tag:#x} is no tag of this transport")
        if arrays:
            await self._carry(Transfer(address, tag, arrays), self._engine.send, self._engine.withdraw)
            self.sent_nbytes += sum(array.nbytes for array in arrays)

    async def receive(
        self, peer: bytes, tag: int, sizes: Sequence[int], allocate: Callable[[int], Any] = host_buffer
    ) -> list[Any]:
        """Receive a delivery. Returns its frames in order.

        If the awaiting task is cancelled, or this raises, the frames that are being written at that moment stay
        referenced until UCX is done with them. So the memory of a frame may be used again when the object that
        ``allocate`` returned for it is no more, and not before.

        Parameters
        ----------
        peer
            Address of the sender.
        tag
            As the sender has announced it.
        sizes
            Of the frames, as the sender has announced them.
        allocate
            Makes a contiguous, writable buffer of so many bytes.

        Raises
        ------
        TransportError
            If the peer is gone or withdrew, sends something else than was announced, or this transport is closed.
        """
        address = self._decode(peer)
        self.check(peer, tag)
        if any(nbytes < MIN_FRAME_NBYTES for nbytes in sizes):
            raise TransportError(f"a frame of under {MIN_FRAME_NBYTES} bytes was announced")
        buffers = [allocate(nbytes) for nbytes in sizes]
        arrays = [self._frame(buffer) for buffer in buffers]
        if [array.nbytes for array in arrays] != list(sizes):
            raise ValueError("the buffers are not of the sizes that were asked for")
        if arrays:
            await self._carry(Transfer(address, tag, arrays), self._engine.receive, self._engine.cancel)
            self.received_nbytes += sum(sizes)
        return buffers

    def in_thread(self, function: Callable[[], None]) -> None:
        """Call ``function`` in the thread that works for this transport, before it does what is asked of it after this."""
        if not self._closing:
            self._submit(function)

    def drop_peer(self, peer: bytes) -> None:
        """End all that is under way with a peer that is known to be dead; whoever waits for it gets TransportError.

        Nothing can be sent to or received from this incarnation after that.
        """
        address = self._decode(peer)
        if not self._closing:
            self._submit(functools.partial(self._engine.drop, address))

    async def close(self) -> None:
        """End all that is under way, and give up UCX. May be called more than once."""
        self._stop_soon()
        await asyncio.shield(self._ended)

    # On the event loop

    def _frame(self, buffer: Any) -> Any:
        array = self._engine.wrap(buffer)
        if not array.c_contiguous:
            raise ValueError("a frame has to be contiguous")
        if array.nbytes < MIN_FRAME_NBYTES:
            raise ValueError(f"a frame of {array.nbytes} bytes is too small, {MIN_FRAME_NBYTES} are the least")
        return array

    async def _carry(
        self, transfer: Transfer, begin: Callable[[Transfer], None], give_up: Callable[[Transfer], None]
    ) -> None:
        if self._closing or self._ended.done():
            raise TransportError("the transport is closed")
        answer: asyncio.Future[None] = self._loop.create_future()
        transfer.settle = lambda error: self._answers.append((answer, error))
        self._waiting.add(answer)
        self._submit(functools.partial(begin, transfer))
        try:
            await answer
        except asyncio.CancelledError:
            self._submit(functools.partial(give_up, transfer))
            raise
        finally:
            self._waiting.discard(answer)

    def _submit(self, command: Callable[[], None] | None) -> None:
        self._commands.append(command)
        if not self._ended.done():
            os.eventfd_write(self._waker, 1)

    def _hear(self, answers: list[_Answer]) -> None:
        for answer, error in answers:
            if answer.done():
                # Cancelled meanwhile.
                continue
            if error is None:
                answer.set_result(None)
            else:
                answer.set_exception(error)

    def _stop_soon(self) -> None:
        if not self._closing:
            self._closing = True
            self._submit(None)

    def _stop(self) -> None:
        self._stop_soon()
        self._thread.join()

    def _has_ended(self, failure: BaseException | None) -> None:
        self._thread.join()
        self._ended.set_result(None)
        self._closing = True
        atexit.unregister(self._stop)
        os.close(self._waker)
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(TransportError(f"the transport ended: {failure!r}"))

    # In the thread

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            if self._prepare_thread is not None:
                self._prepare_thread()
            self._work()
        except BaseException as error:
            # Whatever it was: those who wait have to hear of it.
            logger.exception("the UCX transport ends")
            failure = error
        finally:
            try:
                self._engine.close()
            finally:
                self._tell(self._hear, self._answers)
                self._tell(self._has_ended, failure)

    def _work(self) -> None:
        engine = self._engine
        poll = select.poll()
        poll.register(engine.event_fd, select.POLLIN)
        poll.register(self._waker, select.POLLIN)
        while True:
            while self._commands:
                command = self._commands.popleft()
                if command is None:
                    return
                command()
                # It holds the buffers.
                del command
            busy = engine.step()
            if self._answers:
                self._tell(self._hear, self._answers)
                self._answers = []
            if busy or self._commands:
                continue
            if engine.arm() and any(fd == self._waker for fd, _ in poll.poll(1000 * _PATIENCE_S)):
                os.eventfd_read(self._waker)

    def _tell(self, function: Callable[[Any], None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, argument)
        except RuntimeError:
            # The event loop was closed without closing this: nobody is left who waits.
            if not self._loop.is_closed():
                raise
