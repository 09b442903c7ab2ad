"""Messages on their way to the peers of one run.

Covers: a queue a peer, the joining of small messages, the limit on bytes under way, and what happens when a message
cannot be delivered.
Does not cover: how a message is sent; that is the ``send`` given to the constructor. What a peer does with it.
See also: :class:`dask_gpurt.shuffle.credits.ByteWindow`.

Theory of operation: :meth:`Outbox.post` takes bytes from the window before a message is queued, so the queues need no
limit of their own; the bytes return when the peer has answered. A peer has at most :data:`SENDERS` messages in flight:
one on the wire while another is being taken in. What is queued meanwhile goes together into the next one.

An exchange costs the two event loops about a millisecond together, however small the message is. So a queue is *ripe*
once it holds :data:`LOT_NBYTES`, or has something that has waited for :data:`LINGER_S`, or somebody waits for the end of it
(:meth:`Outbox.flush`) or for the bytes that it holds of the window. Only a ripe queue is sent; once it is, all of it is.

A sender leaves in the same step in which it finds nothing ripe: were it still counted when the next message is queued, that
one would have nobody to send it. The first failure ends the outbox: it is kept, and raised by every later call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.credits import ByteWindow

__all__ = ["JOIN_NBYTES", "LINGER_S", "LOT_NBYTES", "SENDERS", "Outbox"]

#: Messages in flight to one peer.
SENDERS = 2
#: Queued messages go together until they have so many bytes: an exchange costs about a millisecond, in which a
#: megabyte and more goes over the wire.
JOIN_NBYTES = 8 * 2**20
#: From so many bytes on nothing would be won by waiting for more of them.
LOT_NBYTES = 2 * 2**20
#: So long a smaller message waits for others to the same peer. A worker that makes fewer in this time has little to gain,
#: and the end of a shuffle, which is not kept waiting, has less than :data:`LOT_NBYTES` a peer left to send.
LINGER_S = 0.05


class Outbox:
    """Sends in the background. Used on one event loop only.

    Parameters
    ----------
    send
        Delivers buffers to an address, and returns when the peer has taken them in.
    window
        The limit on bytes under way.
    """

    def __init__(self, send: Callable[[str, list[Buffer]], Awaitable[None]], window: ByteWindow) -> None:
        self._send = send
        self._window = window
        self._queues: dict[str, deque[tuple[Sequence[Buffer], int]]] = {}
        self._senders: dict[str, set[asyncio.Task[None]]] = {}
        #: Bytes in each queue, and the queues that are ripe, until they are empty.
        self._queued_nbytes: dict[str, int] = {}
        self._ripe: set[str] = set()
        #: Runs while there may be a message that is not ripe.
        self._linger: asyncio.TimerHandle | None = None
        #: Those who wait for the window.
        self._turns: set[asyncio.Task[None]] = set()
        self._closed = False
        #: What went wrong first.
        self.error: BaseException | None = None
        #: Bytes posted and not yet answered.
        self.pending_nbytes = 0
        #: Bytes that peers have taken in.
        self.sent_nbytes = 0
        #: Exchanges with peers.
        self.messages = 0

    def __repr__(self) -> str:
        queued = sum(map(len, self._queues.values()))
        return f"<Outbox {queued} queued, {self.pending_nbytes} bytes pending, {self.sent_nbytes} sent>"

    @property
    def peers(self) -> int:
        """Peers that something is under way to."""
        return sum(1 for senders in self._senders.values() if senders)

    async def post(self, address: str, buffers: Sequence[Buffer], nbytes: int) -> None:
        """Queue a message of ``nbytes``; waits while the limit on bytes under way is reached."""
        self._check()
        if not self._window.try_acquire(nbytes):
            # What is held back here may be what this would wait for.
            self._press()
            await self._turn(nbytes)
        try:
            self._check()
        except BaseException:
            self._window.release(nbytes)
            raise
        self.pending_nbytes += nbytes
        self._queues.setdefault(address, deque()).append((buffers, nbytes))
        self._queued_nbytes[address] = self._queued_nbytes.get(address, 0) + nbytes
        if self._queued_nbytes[address] >= LOT_NBYTES or self._window.waiting:
            self._ripe.add(address)
        if address in self._ripe:
            self._start(address)
        elif self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(LINGER_S, self._press)

    def _start(self, address: str) -> None:
        senders = self._senders.setdefault(address, set())
        if len(senders) < SENDERS:
            task = asyncio.create_task(self._drain(address), name=f"gpurt-shuffle-send-{address}")
            senders.add(task)
            task.add_done_callback(senders.discard)

    def _press(self) -> None:
        """Hold nothing back of what is queued now."""
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        for address, queue in self._queues.items():
            if queue:
                self._ripe.add(address)
                self._start(address)

    async def _turn(self, nbytes: int) -> None:
        """Wait for the window, or for the end: what holds the window may be another run's, and take long."""
        turn = asyncio.create_task(self._window.acquire(nbytes))
        self._turns.add(turn)
        try:
            await asyncio.wait([turn])
        except asyncio.CancelledError:
            if not turn.cancel() and not turn.cancelled():
                self._window.release(nbytes)
            raise
        finally:
            self._turns.discard(turn)
        if turn.cancelled():
            self._check()

    async def flush(self) -> None:
        """Wait until all that was posted is delivered, and raise what went wrong."""
        self._press()
        while tasks := [task for senders in self._senders.values() for task in senders]:
            await asyncio.wait(tasks)
            self._press()
        self._check()
        if any(self._queues.values()):
            # To go on without them would be a wrong answer.
            raise RuntimeError(f"{self!r} has messages that nobody sends")

    async def close(self) -> None:
        """Drop what is under way."""
        self._closed = True
        self._drop()
        tasks = [task for senders in self._senders.values() for task in senders]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._drop()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
        if self._closed:
            raise RuntimeError(f"{self!r} is closed")

    def _drop(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        for turn in self._turns:
            turn.cancel()
        for queue in self._queues.values():
            while queue:
                self._delivered(queue.popleft()[1])
        self._queued_nbytes = dict.fromkeys(self._queued_nbytes, 0)
        self._ripe.clear()

    def _delivered(self, nbytes: int) -> None:
        self.pending_nbytes -= nbytes
        self._window.release(nbytes)

    async def _drain(self, address: str) -> None:
        queue = self._queues[address]
        while queue and address in self._ripe:
            joined: list[Buffer] = []
            nbytes = 0
            while queue and (not joined or nbytes + queue[0][1] <= JOIN_NBYTES):
                buffers, size = queue.popleft()
                joined.extend(buffers)
                nbytes += size
            self._queued_nbytes[address] -= nbytes
            if not queue:
                self._ripe.discard(address)
            try:
                await self._send(address, joined)
                self.sent_nbytes += nbytes
                self.messages += 1
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  kept, and raised by whoever waits for the delivery
                if self.error is None:
                    self.error = error
                self._drop()
            finally:
                self._delivered(nbytes)
        task = asyncio.current_task()
        assert task is not None
        self._senders[address].discard(task)
