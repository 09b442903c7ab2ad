"""How many bytes lie in which tier, and who may add to them.

Theory of operation
-------------------
A tier holds *buffers*. A buffer is known by an identity and has *holders*: the blocks whose values lie in it. However
many blocks share a buffer (views of one array, arrays cut from one network message), its bytes count once, and they
are free when the last holder lets go.

Whoever is about to bring bytes into a tier takes a :class:`Reservation` first. It counts like held bytes, and it turns
into held bytes in :meth:`Ledger.hold`, or is given back by :meth:`Reservation.release`. What does not fit waits in a
:class:`Request`, strictly first in, first out, so that a large request is not starved by small ones. When nothing can
be moved out of the way any more, :meth:`Ledger.force` grants the request at the head although it does not fit: a tier
that is too small makes things slow, and never makes them hang. Only one forced grant is outstanding at a time,
unless the caller sees that nothing has moved for a while: whoever holds the last one may be waiting in the queue.

Covers: counting, limits, reservations and their queue.
Does not cover: what is moved away to make room; see :mod:`dask_gpurt.memory.spiller`.

Pure: no I/O, no clock, no threads. The caller serializes the calls. Callbacks of requests run inside the call that
grants them and must not call back into the ledger.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Hashable, Mapping

__all__ = ["Ledger", "Request", "Reservation", "Tier"]


class Tier(enum.StrEnum):
    """Where bytes lie, from the fastest to the slowest."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    OBJECT = "object"


class Reservation:
    """The right to add so many bytes to a tier; see :meth:`Ledger.reserve`."""

    __slots__ = ("_ledger", "forced", "nbytes", "tier")

    def __init__(self, ledger: Ledger, tier: Tier, nbytes: int, *, forced: bool = False) -> None:
        self._ledger = ledger
        self.tier = tier
        #: What is left of it.
        self.nbytes = nbytes
        #: Whether it was granted although it did not fit.
        self.forced = forced

    def __repr__(self) -> str:
        return f"<Reservation {self.tier} {self.nbytes}{' forced' if self.forced else ''}>"

    def release(self) -> None:
        """Give back what is left; calling it again does nothing."""
        self._ledger.release(self)

    def split(self, nbytes: int) -> Reservation:
        """Move up to ``nbytes`` of it into a reservation of its own."""
        nbytes = min(nbytes, self.nbytes)
        self.nbytes -= nbytes
        return Reservation(self._ledger, self.tier, nbytes)


class Request:
    """A place in the queue for a reservation; see :meth:`Ledger.request`."""

    __slots__ = ("cancelled", "forceable", "granted", "nbytes")

    def __init__(self, nbytes: int, granted: Callable[[Reservation], None], *, forceable: bool) -> None:
        self.nbytes = nbytes
        self.granted = granted
        self.forceable = forceable
        self.cancelled = False


class _Account:
    __slots__ = ("buffers", "forced", "held", "limit", "queue", "reserved")

    def __init__(self, limit: int | None) -> None:
        #: Bytes that may lie here; None: any number.
        self.limit = limit
        self.held = 0
        self.reserved = 0
        #: Identity of a buffer -> [its bytes, number of its holders].
        self.buffers: dict[Hashable, list[int]] = {}
        self.queue: deque[Request] = deque()
        #: The forced reservation that is outstanding.
        self.forced: Reservation | None = None


class Ledger:
    """The books of one worker.

    Parameters
    ----------
    limits
        Bytes that each tier may hold; None: no limit. Tiers that are left out have none.

    Examples
    --------
    >>> ledger = Ledger({Tier.HOST: 100})
    >>> ledger.hold(Tier.HOST, "a", 60), ledger.hold(Tier.HOST, "a", 60), ledger.used(Tier.HOST)
    (60, 0, 60)
    >>> ledger.try_reserve(Tier.HOST, 50) is None
    True
    >>> ledger.drop(Tier.HOST, "a"), ledger.drop(Tier.HOST, "a"), ledger.used(Tier.HOST)
    (0, 60, 0)
    """

    def __init__(self, limits: Mapping[Tier, int | None] | None = None) -> None:
        limits = limits or {}
        #: Requests granted so far.
        self.grants = 0
        self._accounts = {tier: _Account(limits.get(tier)) for tier in Tier}

    def __repr__(self) -> str:
        tiers = (f"{t} {a.held}+{a.reserved}/{a.limit} queue={len(a.queue)}" for t, a in self._accounts.items())
        return f"<Ledger {', '.join(tiers)}>"

    # Reading the books

    def limit(self, tier: Tier) -> int | None:
        """Bytes that ``tier`` may hold; None: no limit."""
        return self._accounts[tier].limit

    def held(self, tier: Tier) -> int:
        """Bytes of all buffers in ``tier``."""
        return self._accounts[tier].held

    def reserved(self, tier: Tier) -> int:
        """Bytes that reservations in ``tier`` still stand for."""
        return self._accounts[tier].reserved

    def used(self, tier: Tier) -> int:
        """Bytes held and reserved in ``tier``."""
        account = self._accounts[tier]
        return account.held + account.reserved

    def holders(self, tier: Tier, buffer: Hashable) -> int:
        """Number of blocks that share ``buffer`` in ``tier``."""
        entry = self._accounts[tier].buffers.get(buffer)
        return entry[1] if entry else 0

    def wanted(self, tier: Tier) -> int:
        """Bytes over the limit, counting the request that waits at the head of the queue; negative: bytes free."""
        account = self._accounts[tier]
        if account.limit is None:
            return 0
        head = account.queue[0].nbytes if account.queue else 0
        return account.held + account.reserved + head - account.limit

    def waiting(self, tier: Tier) -> int:
        """Number of requests in the queue of ``tier``."""
        return len(self._accounts[tier].queue)

    def set_limit(self, tier: Tier, limit: int | None) -> None:
        """Change the limit of ``tier``; requests that fit now are granted."""
        self._accounts[tier].limit = limit
        self._grant(tier)

    # Holding

    def hold(self, tier: Tier, buffer: Hashable, nbytes: int, reservation: Reservation | None = None) -> int:
        """Add a holder to ``buffer``, paid from ``reservation``, which is used up. Returns the bytes that are new."""
        account = self._accounts[tier]
        entry = account.buffers.get(buffer)
        if entry is None:
            account.buffers[buffer] = [nbytes, 1]
            account.held += nbytes
            added = nbytes
        else:
            entry[1] += 1
            added = 0
        if reservation is not None:
            self.release(reservation)
        return added

    def grow(self, tier: Tier, buffer: Hashable, nbytes: int, reservation: Reservation | None = None) -> None:
        """Add ``nbytes`` to a buffer that is held already."""
        account = self._accounts[tier]
        account.buffers[buffer][0] += nbytes
        account.held += nbytes
        if reservation is not None:
            self.release(reservation)

    def drop(self, tier: Tier, buffer: Hashable) -> int:
        """Take a holder from ``buffer``. Returns the bytes that became free: 0 while others hold it."""
        account = self._accounts[tier]
        entry = account.buffers[buffer]
        entry[1] -= 1
        if entry[1]:
            return 0
        del account.buffers[buffer]
        account.held -= entry[0]
        if account.queue:
            self._grant(tier)
        return entry[0]

    # Reserving

    def reserve(self, tier: Tier, nbytes: int) -> Reservation:
        """Reserve at once, whether it fits or not."""
        self._accounts[tier].reserved += nbytes
        return Reservation(self, tier, nbytes)

    def try_reserve(self, tier: Tier, nbytes: int) -> Reservation | None:
        """Reserve if it fits and nobody waits who may be forced through."""
        account = self._accounts[tier]
        if account.queue and account.queue[0].forceable:
            return None
        if account.limit is not None and account.held + account.reserved + nbytes > account.limit:
            return None
        return self.reserve(tier, nbytes)

    def request(
        self, tier: Tier, nbytes: int, granted: Callable[[Reservation], None], *, forceable: bool = True
    ) -> Request:
        """Wait for ``nbytes`` of ``tier``; ``granted`` is called with the reservation, now or later.

        Who may be forced through goes before who may not, and can do without.
        """
        request = Request(nbytes, granted, forceable=forceable)
        queue = self._accounts[tier].queue
        place = (
            next((i for i, other in enumerate(queue) if not other.forceable), len(queue)) if forceable else len(queue)
        )
        queue.insert(place, request)
        self._grant(tier)
        return request

    def cancel(self, tier: Tier, request: Request) -> None:
        """Leave the queue; nothing happens if it was left already."""
        account = self._accounts[tier]
        request.cancelled = True
        if request in account.queue:
            account.queue.remove(request)
            self._grant(tier)

    def force(self, tier: Tier, *, again: bool = False) -> bool:
        """Grant the oldest request that may be forced, unless a forced reservation is outstanding.

        With ``again``, even then.
        """
        account = self._accounts[tier]
        if account.forced is not None and not again:
            return False
        for request in account.queue:
            if request.forceable:
                account.queue.remove(request)
                reservation = self.reserve(tier, request.nbytes)
                self.grants += 1
                if request.nbytes:
                    reservation.forced = True
                    account.forced = reservation
                request.granted(reservation)
                return True
        return False

    def release(self, reservation: Reservation) -> None:
        """Give back what is left of ``reservation``; see :meth:`Reservation.release`."""
        account = self._accounts[reservation.tier]
        account.reserved -= reservation.nbytes
        reservation.nbytes = 0
        if account.forced is reservation:
            account.forced = None
        if account.queue:
            self._grant(reservation.tier)

    def _grant(self, tier: Tier) -> None:
        account = self._accounts[tier]
        while account.queue:
            nbytes = account.queue[0].nbytes
            if account.limit is not None and account.held + account.reserved + nbytes > account.limit:
                return
            request = account.queue.popleft()
            self.grants += 1
            request.granted(self.reserve(tier, nbytes))
