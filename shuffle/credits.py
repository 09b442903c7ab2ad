"""How many bytes a worker may have under way to its peers.

Covers: :class:`ByteWindow`, one for a worker, shared by its runs.
Does not cover: what a receiver may hold; it reserves that in its store before it answers, and a sender gives its bytes
back to the window only after the answer, so that a slow receiver slows its senders.
See also: :mod:`dask_gpurt.shuffle.outbox`.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["ByteWindow"]


class ByteWindow:
    """A first-come-first-served limit on bytes. Used on one event loop only.

    A request larger than the limit is granted once nothing else is under way: with a small limit a worker is slow,
    and does not hang.

    Parameters
    ----------
    limit_nbytes
        What may be under way.
    """

    def __init__(self, limit_nbytes: int) -> None:
        self.limit_nbytes = limit_nbytes
        self.used_nbytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"<ByteWindow {self.used_nbytes}/{self.limit_nbytes} bytes, {len(self._waiting)} waiting>"

    @property
    def waiting(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def try_acquire(self, nbytes: int) -> bool:
        """Acquire ``nbytes`` if nobody has to wait for that; says whether it did."""
        if self._waiting or not self._fits(nbytes):
            return False
        self.used_nbytes += nbytes
        return True

    async def acquire(self, nbytes: int) -> None:
        """Wait until ``nbytes`` may be under way."""
        if self.try_acquire(nbytes):
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((nbytes, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                # Granted and cancelled in the same turn of the loop: nobody is left to give it back.
                self.release(nbytes)
            else:
                # Where bytes came back in the same turn, it has left the queue already.
                if (nbytes, granted) in self._waiting:
                    self._waiting.remove((nbytes, granted))
                self._grant()
            raise

    def release(self, nbytes: int) -> None:
        """Give back what was acquired."""
        self.used_nbytes -= nbytes
        assert self.used_nbytes >= 0, self
        self._grant()

    def _fits(self, nbytes: int) -> bool:
        return not self.used_nbytes or self.used_nbytes + nbytes <= self.limit_nbytes

    def _grant(self) -> None:
        while self._waiting and (self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])):
            nbytes, granted = self._waiting.popleft()
            if not granted.done():
                self.used_nbytes += nbytes
                granted.set_result(None)
