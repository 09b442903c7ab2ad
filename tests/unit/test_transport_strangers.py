"""What reaches a port of UCX and is of no peer: refused, counted, said once, and of no consequence."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ucx_threads import busy_s

pytest.importorskip("ucxx", reason="ucxx is not installed", exc_type=ImportError)

from dask_gpurt.secret import SEAL_NBYTES, Secret
from dask_gpurt.shuffle.transport import handshake
from dask_gpurt.shuffle.transport.address import MANIFEST_NBYTES, Address, Manifest, Part, on_wire
from dask_gpurt.shuffle.transport.engine import MAX_READING, Engine
from dask_gpurt.shuffle.transport.handshake import MESSAGE_NBYTES_MAX, Handshake
from dask_gpurt.shuffle.transport.ucx import MIN_FRAME_NBYTES, TransportError, UCXTransport

SIZE = MIN_FRAME_NBYTES
KEY = b"\x11" * 16 + b"\xee" * 16
SECRET = Secret(KEY)


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 100))


class Stranger:
    """Has found out where a worker's UCX is, speaks its protocol, and does not know the secret."""

    def __init__(self, target: UCXTransport) -> None:
        self.engine = Engine(Secret.new(), loopback=True)
        self.target = Address(target._engine.address.incarnation, target._engine.address.ucx)
        self.endpoint = self.engine._endpoint(self.target)
        self.requests: list[tuple[Any, Any]] = []

    def send(self, wire_tag: int, message: Any) -> None:
        array = self.engine.wrap(message)
        self.requests.append((self.endpoint.tag_send(array, self.engine._api.UCXXTag(wire_tag)), array))

    async def until_sent(self) -> None:
        while not all(request.completed for request, _ in self.requests):
            self.engine.step()
            await asyncio.sleep(0)
        self.requests.clear()


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[UCXTransport, UCXTransport, Stranger]]:
    loop = asyncio.get_running_loop()
    a, b = UCXTransport.open(loop, SECRET, loopback=True), UCXTransport.open(loop, SECRET, loopback=True)
    stranger = Stranger(b)
    try:
        yield a, b, stranger
    finally:
        await asyncio.gather(a.close(), b.close())
        stranger.engine.close()


async def carry(a: UCXTransport, b: UCXTransport) -> None:
    tag, sent = a.new_tag(), np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    _, (got,) = await asyncio.gather(a.send(b.address, tag, [sent]), b.receive(a.address, tag, [SIZE]))
    np.testing.assert_array_equal(np.frombuffer(got, np.uint8), sent)


async def refused(b: UCXTransport, count: int) -> None:
    while b.describe()["strangers"] < count:  # noqa: ASYNC110  a thread's doing, which nobody reports
        await asyncio.sleep(0.001)
    assert b.describe()["strangers"] == count


def held(b: UCXTransport) -> tuple[int, ...]:
    engine = b._engine
    return len(engine._inbox), len(engine._reading), len(engine._endpoints), len(engine._handshake._answered)


def test_nothing_of_a_stranger_is_taken_kept_or_answered(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        rng = random.Random(7)
        async with pair() as (a, b, stranger):
            await carry(a, b)
            before, count = held(b), 0
            for part in (Part.FRAME, Part.MANIFEST, Part.WITHDRAWAL, Part.GREETING):
                for nbytes in (1, MANIFEST_NBYTES, MANIFEST_NBYTES + SEAL_NBYTES, MESSAGE_NBYTES_MAX, 8192, SIZE):
                    for tag in (0, rng.getrandbits(62), (1 << 62) - 1):
                        stranger.send(on_wire(tag, part), rng.randbytes(nbytes))
                        count += 1
            await stranger.until_sent()
            await refused(b, count)
            assert held(b) == before
            await carry(a, b)

    with caplog.at_level(logging.DEBUG):
        run(main)
    (said,) = [record for record in caplog.records if "not of this installation" in record.message]
    assert said.levelno == logging.WARNING
    assert KEY.hex() not in caplog.text


def test_many_messages_of_a_stranger_leave_nothing() -> None:
    async def main() -> None:
        async with pair() as (a, b, stranger):
            await carry(a, b)
            before = held(b)
            for _ in range(20):
                for number in range(200):
                    stranger.send(on_wire(number, Part(number % 4)), bytes(SIZE if number % 4 == 0 else 64))
                await stranger.until_sent()
            await refused(b, 4000)
            await carry(a, b)
            assert held(b) == before
            while b._engine._minor:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    run(main)


def test_a_greeting_that_was_overheard_does_nothing() -> None:
    async def main() -> None:
        async with pair() as (a, b, stranger):
            await carry(a, b)
            gc.collect()
            # To the letter what A would say; A answers nothing to what it did not ask for.
            own = Handshake(SECRET, a._engine.address)
            for _ in range(3 * MAX_READING):
                stranger.send(on_wire(0, Part.GREETING), own.greet(stranger.target, 0.0))
            await stranger.until_sent()
            await refused(a, 3 * MAX_READING)
            assert b.describe()["strangers"] == 0
            # A is still known by what it has proven.
            await carry(a, b)

    run(main)


def test_who_sees_the_tags_can_still_say_nothing_of_a_delivery() -> None:
    async def main() -> None:
        async with pair() as (a, b, stranger):
            await carry(a, b)
            tag = a.new_tag()
            receiving = asyncio.create_task(b.receive(a.address, tag, [SIZE, SIZE]))
            # Announced as something else, and withdrawn, with seals that are none, or of another message.
            for part in (Part.MANIFEST, Part.WITHDRAWAL):
                for manifest in (Manifest.of([SIZE]), Manifest.of([SIZE, SIZE]), Manifest(0, 0)):
                    stranger.send(on_wire(tag, part), manifest.encode() + bytes(SEAL_NBYTES))
                    stranger.send(on_wire(tag, part), manifest.encode())
            await stranger.until_sent()
            await refused(b, 12)
            assert not receiving.done()
            await a.send(b.address, tag, [b"\x01" * SIZE, b"\x02" * SIZE])
            assert [bytes(frame) for frame in await receiving] == [b"\x01" * SIZE, b"\x02" * SIZE]

    run(main)


def test_a_worker_of_another_installation_is_not_spoken_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pair() as (a, b, _):
            other = UCXTransport.open(asyncio.get_running_loop(), Secret.new(), loopback=True)
            # By its address alone.
            with pytest.raises(TransportError, match="none of this installation"):
                await a.send(other.address, a.new_tag(), [bytes(SIZE)])
            with pytest.raises(TransportError, match="none of this installation"):
                other.check(a.address)
            # And should it have come by one that it can read: B does not answer it.
            forged = b._engine.address.encode(other._secret)
            with monkeypatch.context() as patch:
                patch.setattr(handshake, "HANDSHAKE_S", 0.3)
                with pytest.raises(TransportError, match="not proven within"):
                    await other.send(forged, other.new_tag(), [bytes(SIZE)])
            await refused(b, 1)
            assert b._engine._handshake.pending is False
            await carry(a, b)
            await other.close()

    run(main)


def test_a_greeting_without_a_proof_is_forgotten_with_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_S", 0.2)

    async def main() -> None:
        async with pair() as (_, b, stranger):
            pending: list[bool] = []
            hear = b._engine._handshake.hear

            def noted(message: bytes, now_s: float) -> Any:
                answer = hear(message, now_s)
                pending.append(b._engine._handshake.pending)
                return answer

            monkeypatch.setattr(b._engine._handshake, "hear", noted)
            # It was overheard, and its sender is gone, or does not care.
            silent = Handshake(SECRET, stranger.engine.address)
            stranger.send(on_wire(0, Part.GREETING), silent.greet(stranger.target, 0.0))
            await stranger.until_sent()
            await refused(b, 1)
            assert pending == [True]
            while b._engine._endpoints:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            assert held(b) == (0, 0, 0, 0)

    run(main)


def test_a_delivery_that_waits_for_a_greeting_can_be_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with pair() as (a, b, _):
            sent = a._engine.send

            def held_up(transfer: Any) -> None:
                # Given up right after the greeting has gone out, and before its answer was looked at.
                sent(transfer)
                a._engine.withdraw(transfer)

            monkeypatch.setattr(a._engine, "send", held_up)
            tag = a.new_tag()
            with pytest.raises(TransportError, match="withdrawn"):
                await a.send(b.address, tag, [bytes(SIZE)])
            with pytest.raises(TransportError, match="withdrawn by its sender"):
                await b.receive(a.address, tag, [SIZE])
            monkeypatch.undo()
            await carry(a, b)

    run(main)


def listening() -> set[tuple[str, int]]:
    """Where this process listens."""
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        with_name = Path("/proc/self/fd", fd)
        if with_name.is_symlink():
            own.add(os.readlink(with_name))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in own:
            host, port = local.split(":")
            found.add((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found


def test_where_peers_are_on_this_host_only_nothing_listens_on_the_network() -> None:
    async def main() -> None:
        before = listening()
        async with pair() as (a, b, _):
            await carry(a, b)
            new = listening() - before
            assert new
            assert {host for host, _ in new} == {"127.0.0.1"}

    run(main)


def test_connections_that_say_nothing_or_nonsense_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setenv("UCX_LOG_LEVEL", "fatal")

    async def main() -> None:
        before = listening()
        async with pair() as (a, b, _):
            await carry(a, b)
            rng = random.Random(3)
            #: What UCX begins a connection with, so that it reads on.
            magic = (0xCAFEBABE12345678).to_bytes(8, "little")
            with_nothing = [socket.create_connection(where) for where in listening() - before for _ in range(20)]
            for where in listening() - before:
                for start in (b"", magic):
                    for nbytes in (1, 8, 100, 5000):
                        with socket.create_connection(where) as connection:
                            connection.sendall(start + rng.randbytes(nbytes))
            await carry(a, b)
            # Nor does it keep the thread busy.
            started = busy_s()
            await asyncio.sleep(0.2)
            assert busy_s() - started < 0.1
            for connection in with_nothing:
                connection.close()
            await carry(a, b)

    run(main)
