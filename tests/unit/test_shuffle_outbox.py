"""The outbox and its window: limits, joining, failures, closing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dask_gpurt.shuffle import outbox as outbox_module
from dask_gpurt.shuffle.credits import ByteWindow
from dask_gpurt.shuffle.outbox import JOIN_NBYTES, LINGER_S, LOT_NBYTES, SENDERS, Outbox


class Wire:
    """Peers that answer when they are told to."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.came = asyncio.Event()
        self.sent: list[tuple[str, list[Any]]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.error: Exception | None = None

    async def __call__(self, address: str, buffers: list[Any]) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.in_flight, self.most_in_flight)
        try:
            await self.open.wait()
            if self.error is not None:
                raise self.error
            self.sent.append((address, buffers))
            self.came.set()
        finally:
            self.in_flight -= 1


async def turns(count: int = 20) -> None:
    """Let everything that can go on do so."""
    for _ in range(count):
        await asyncio.sleep(0)


def test_the_window_is_first_come_first_served() -> None:
    async def main() -> None:
        window = ByteWindow(10)
        order = []

        async def take(name: str, nbytes: int) -> None:
            await window.acquire(nbytes)
            order.append(name)

        await window.acquire(6)
        tasks = [asyncio.create_task(take(name, nbytes)) for name, nbytes in (("big", 8), ("small", 1), ("huge", 99))]
        await turns()
        assert order == []  # The small one fits, and does not overtake.
        window.release(6)
        await turns()
        assert order == ["big", "small"]
        window.release(9)
        await asyncio.gather(*tasks)
        assert order == ["big", "small", "huge"]  # Over the limit, but alone.
        assert window.used_nbytes == 99
        window.release(99)
        assert "0/10" in repr(window)

    asyncio.run(main())


def test_who_is_cancelled_as_bytes_come_back_is_cancelled() -> None:
    async def main() -> None:
        window = ByteWindow(10)
        await window.acquire(10)
        waiting = asyncio.create_task(window.acquire(10))
        await turns()
        waiting.cancel()
        # Takes it from the queue before it wakes.
        window.release(10)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert window.used_nbytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("granted", [False, True])
def test_who_is_cancelled_takes_nothing_along(granted: bool) -> None:
    async def main() -> None:
        window = ByteWindow(10)
        await window.acquire(10)
        first = asyncio.create_task(window.acquire(10))
        second = asyncio.create_task(window.acquire(3))
        await turns()
        if granted:
            window.release(10)  # Grants the first, which is cancelled before it runs.
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        if not granted:
            window.release(10)
        await second
        assert window.used_nbytes == 3

    asyncio.run(main())


def test_messages_are_joined_and_limited() -> None:
    async def main() -> None:
        wire, window = Wire(), ByteWindow(100)
        outbox = Outbox(wire, window)
        for number in range(10):
            await outbox.post("a", [bytes([number])], 10)
        await turns()
        assert outbox.pending_nbytes == window.used_nbytes == 100
        waiting = asyncio.create_task(outbox.post("b", [b"last"], 1))
        await turns()
        assert not waiting.done()
        assert 1 <= wire.in_flight <= SENDERS  # Nothing is held back of what somebody waits for.
        wire.open.set()
        await waiting
        await outbox.flush()
        assert [n for address, buffers in wire.sent for n in buffers if address == "a"] == [
            bytes([number]) for number in range(10)
        ]
        assert ("b", [b"last"]) in wire.sent
        assert wire.most_in_flight <= 2 * SENDERS
        assert outbox.messages == len(wire.sent) < 11
        assert (outbox.pending_nbytes, window.used_nbytes, outbox.sent_nbytes) == (0, 0, 101)

    asyncio.run(main())


def test_large_messages_go_alone() -> None:
    async def main() -> None:
        wire = Wire()
        wire.open.set()
        outbox = Outbox(wire, ByteWindow(10 * JOIN_NBYTES))
        for number in range(4):
            await outbox.post("a", [bytes([number])], JOIN_NBYTES)
        await outbox.flush()
        assert sorted(wire.sent) == [("a", [bytes([number])]) for number in range(4)]

    asyncio.run(main())


def test_small_messages_wait_for_others_to_the_same_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "LINGER_S", 3600)

    async def main() -> None:
        wire = Wire()
        wire.open.set()
        outbox = Outbox(wire, ByteWindow(10 * LOT_NBYTES))
        for number in range(3):
            await outbox.post("a", [bytes([number])], LOT_NBYTES // 3)
            await outbox.post("b", [bytes([number])], LOT_NBYTES // 4)
            await turns()
            assert wire.sent == []
        await outbox.post("a", [b"more"], LOT_NBYTES // 3)
        await turns()
        assert wire.sent == [("a", [b"\0", b"\1", b"\2", b"more"])]
        await outbox.post("a", [b"last"], 1)
        await turns()
        assert len(wire.sent) == 1
        await outbox.flush()
        assert sorted(wire.sent[1:]) == [("a", [b"last"]), ("b", [b"\0", b"\1", b"\2"])]

    asyncio.run(main())


def test_small_messages_wait_no_longer_than_they_should() -> None:
    async def main() -> None:
        wire = Wire()
        wire.open.set()
        outbox = Outbox(wire, ByteWindow(100))
        posted_s = asyncio.get_running_loop().time()
        await outbox.post("a", [b"1"], 1)
        for more in (b"2", b"3"):
            await outbox.post("a", [more], 1)
            await asyncio.wait_for(wire.came.wait(), 30)
            wire.came.clear()
            assert asyncio.get_running_loop().time() - posted_s >= LINGER_S
            posted_s = asyncio.get_running_loop().time()
        assert wire.sent == [("a", [b"1", b"2"]), ("a", [b"3"])]
        await outbox.post("a", [b"4"], 1)
        await outbox.close()
        await turns()
        assert (outbox.pending_nbytes, len(wire.sent)) == (0, 2)

    asyncio.run(main())


def test_the_first_failure_is_kept_and_nothing_is_held_back() -> None:
    async def main() -> None:
        wire, window = Wire(), ByteWindow(5)
        wire.error = ValueError("no such peer")
        outbox = Outbox(wire, window)
        await outbox.post("a", [b"1"], 5)
        late = asyncio.create_task(outbox.post("a", [b"2"], 5))
        await turns()
        wire.open.set()
        with pytest.raises(ValueError, match="no such peer"):
            await outbox.flush()
        with pytest.raises(ValueError, match="no such peer"):
            await late
        with pytest.raises(ValueError, match="no such peer"):
            await outbox.post("b", [b"3"], 1)
        assert (outbox.pending_nbytes, window.used_nbytes) == (0, 0)

    asyncio.run(main())


def test_closing_drops_what_is_under_way() -> None:
    async def main() -> None:
        wire, window = Wire(), ByteWindow(10)
        outbox = Outbox(wire, window)
        await outbox.post("a", [b"1"], 5)
        await turns()
        await outbox.post("a", [b"2"], 5)
        late = asyncio.create_task(outbox.post("a", [b"3"], 5))
        await turns()
        await outbox.close()
        with pytest.raises(RuntimeError, match="closed"):
            await late
        assert (wire.in_flight, wire.sent, window.used_nbytes, outbox.peers) == (0, [], 0, 0)

    asyncio.run(main())


def test_a_message_that_is_queued_when_all_senders_end_is_sent() -> None:
    async def main() -> None:
        wire = Wire()
        outbox = Outbox(wire, ByteWindow(10 * JOIN_NBYTES))
        for _ in range(SENDERS):
            await outbox.post("a", [b""], JOIN_NBYTES)
        await turns()
        assert wire.in_flight == SENDERS

        async def post_late() -> None:
            # Woken after all senders, which have ended then, in the same turn of the loop.
            await wire.open.wait()
            assert wire.in_flight == 0
            await outbox.post("a", [b"late"], JOIN_NBYTES)

        late = asyncio.create_task(post_late())
        await turns()
        wire.open.set()
        await late
        await outbox.flush()
        assert [buffers for _, buffers in wire.sent] == [[b""], [b""], [b"late"]]
        assert outbox.pending_nbytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("end", ["close", "fail", "cancel"])
def test_who_waits_for_bytes_of_others_hears_of_the_end(end: str) -> None:
    async def main() -> None:
        wire, window = Wire(), ByteWindow(10)
        await window.acquire(6)
        outbox = Outbox(wire, window)
        await outbox.post("a", [b"1"], 4)
        late = asyncio.create_task(outbox.post("a", [b"2"], 5))
        await turns()
        if end == "close":
            await outbox.close()
            with pytest.raises(RuntimeError, match="closed"):
                await late
        elif end == "fail":
            wire.error = ValueError("no such peer")
            wire.open.set()
            with pytest.raises(ValueError, match="no such peer"):
                await late
        else:
            late.cancel()
            with pytest.raises(asyncio.CancelledError):
                await late
            wire.open.set()
            await outbox.flush()
        await turns()
        assert window.used_nbytes == 6
        window.release(6)
        assert "0/10 bytes, 0 waiting" in repr(window)

    asyncio.run(main())
