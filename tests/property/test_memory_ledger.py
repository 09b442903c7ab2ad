"""The ledger against a model that recounts everything: no byte unaccounted, no request lost or overtaken."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dask_gpurt.memory.ledger import Ledger, Request, Reservation, Tier

SIZES = st.integers(0, 60)
LIMIT = 100


class Books(RuleBasedStateMachine):
    holds = Bundle("holds")
    reservations = Bundle("reservations")
    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger({Tier.HOST: LIMIT})
        self.sizes: dict[int, int] = {}
        self.holders: dict[int, int] = {}
        self.live: list[Reservation] = []
        self.queue: list[Request] = []
        self.granted: list[Request] = []
        self.forced = False

    def note(self, reservation: Reservation) -> Reservation:
        self.live.append(reservation)
        return reservation

    @rule(target=holds, buffer=st.integers(0, 5), nbytes=SIZES)
    def hold(self, buffer: int, nbytes: int) -> int:
        nbytes = self.sizes.setdefault(buffer, nbytes)
        new = self.ledger.hold(Tier.HOST, buffer, nbytes)
        assert new == (nbytes if not self.holders.get(buffer) else 0)
        self.holders[buffer] = self.holders.get(buffer, 0) + 1
        return buffer

    @rule(target=holds, reservation=consumes(reservations), buffer=st.integers(6, 9), nbytes=SIZES)
    def pay(self, reservation: Reservation, buffer: int, nbytes: int) -> int:
        nbytes = self.sizes.setdefault(buffer, nbytes)
        self.ledger.hold(Tier.HOST, buffer, nbytes, reservation)
        assert reservation.nbytes == 0
        self.holders[buffer] = self.holders.get(buffer, 0) + 1
        return buffer

    @rule(buffer=consumes(holds))
    def drop(self, buffer: int) -> None:
        self.holders[buffer] -= 1
        freed = self.ledger.drop(Tier.HOST, buffer)
        if self.holders[buffer]:
            assert freed == 0
        else:
            assert freed == self.sizes.pop(buffer)

    @rule(target=reservations, nbytes=SIZES)
    def reserve(self, nbytes: int) -> Reservation:
        return self.note(self.ledger.reserve(Tier.HOST, nbytes))

    @rule(nbytes=SIZES)
    def try_reserve(self, nbytes: int) -> None:
        used, waiting = self.ledger.used(Tier.HOST), any(request.forceable for request in self.queue)
        reservation = self.ledger.try_reserve(Tier.HOST, nbytes)
        assert (reservation is not None) == (not waiting and used + nbytes <= LIMIT)
        if reservation is not None:
            reservation.release()
            reservation.release()

    @rule(target=reservations, reservation=reservations, nbytes=SIZES)
    def split(self, reservation: Reservation, nbytes: int) -> Reservation:
        before = reservation.nbytes
        part = self.note(reservation.split(nbytes))
        assert part.nbytes + reservation.nbytes == before
        return part

    @rule(reservation=consumes(reservations))
    def release(self, reservation: Reservation) -> None:
        reservation.release()

    @rule(target=requests, nbytes=SIZES, forceable=st.booleans())
    def request(self, nbytes: int, forceable: bool) -> Request:
        box: list[Any] = []

        def granted(reservation: Reservation) -> None:
            assert not any(r is self.current for r in self.granted)
            self.note(reservation)
            box.append(reservation)

        # The callback may come before the call returns, so the request is known by its place in the queue.
        self.current = None
        place: dict[str, Request] = {}

        def outer(reservation: Reservation) -> None:
            granted(reservation)
            if place:
                self.granted.append(place["request"])
                if not self.forced:
                    assert self.queue[0] is place["request"], "overtaken"
                self.queue.remove(place["request"])

        request = self.ledger.request(Tier.HOST, nbytes, outer, forceable=forceable)
        if not box:
            place["request"] = request
            self.queue.append(request)
            # In the order of the calls, but that who may be forced through goes before who may not.
            self.queue.sort(key=lambda request: not request.forceable)
        return request

    @rule(request=requests)
    def cancel(self, request: Request) -> None:
        if request in self.queue:
            self.queue.remove(request)
        self.ledger.cancel(Tier.HOST, request)

    @rule()
    def force(self) -> None:
        outstanding = any(r.forced and r.nbytes for r in self.live)
        candidates = [r for r in self.queue if r.forceable]
        self.forced = True
        done = self.ledger.force(Tier.HOST)
        self.forced = False
        if done:
            assert candidates
            assert self.granted[-1] is candidates[0]
        elif candidates:
            assert outstanding or any(r.forced for r in self.live)

    @invariant()
    def every_byte_is_accounted_for(self) -> None:
        assert self.ledger.held(Tier.HOST) == sum(self.sizes[b] for b, n in self.holders.items() if n)
        assert self.ledger.reserved(Tier.HOST) == sum(r.nbytes for r in self.live)
        assert self.ledger.waiting(Tier.HOST) == len(self.queue)

    @invariant()
    def nobody_waits_who_need_not(self) -> None:
        if self.queue:
            assert self.ledger.used(Tier.HOST) + self.queue[0].nbytes > LIMIT


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
