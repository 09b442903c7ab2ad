"""The transport with the real UCX, between two workers of one process."""

from __future__ import annotations

import asyncio
import gc
import os
import pathlib
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import device_standin
import numpy as np
import pytest
from ucx_threads import busy_s, ucx_threads

pytest.importorskip("ucxx", reason="ucxx is not installed", exc_type=ImportError)

from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.device import SMALL_NBYTES, DeviceBody, allocate
from dask_gpurt.shuffle.transport.address import Address
from dask_gpurt.shuffle.transport.ucx import (
    MIN_FRAME_NBYTES,
    TransportError,
    TransportUnavailable,
    UCXTransport,
    host_buffer,
)

SIZE = MIN_FRAME_NBYTES
SECRET = Secret.new()


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 100))


@asynccontextmanager
async def two() -> AsyncIterator[tuple[UCXTransport, UCXTransport]]:
    loop = asyncio.get_running_loop()
    a, b = UCXTransport.open(loop, SECRET), UCXTransport.open(loop, SECRET)
    try:
        yield a, b
    finally:
        await asyncio.gather(a.close(), b.close())


def frames(*sizes: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does and nobody reports."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


async def carry(a: UCXTransport, b: UCXTransport, sent: list[np.ndarray]) -> None:
    tag = a.new_tag()
    sizes = [frame.nbytes for frame in sent]
    _, got = await asyncio.gather(a.send(b.address, tag, sent), b.receive(a.address, tag, sizes))
    assert len(got) == len(sent)
    for frame, buffer in zip(sent, got, strict=True):
        np.testing.assert_array_equal(np.frombuffer(buffer, dtype=np.uint8), frame)


@pytest.mark.parametrize(
    "sizes", [(SIZE,), (SIZE + 1, SIZE, 3 * SIZE), (256 * 2**20,), (SIZE,) * 500], ids=["least", "few", "large", "many"]
)
def test_a_delivery_arrives_as_it_was_sent(sizes: tuple[int, ...]) -> None:
    async def main() -> None:
        async with two() as (a, b):
            await carry(a, b, frames(*sizes))
            assert a.sent_nbytes == b.received_nbytes == sum(sizes)

    run(main)


def test_many_deliveries_at_once_both_ways() -> None:
    async def main() -> None:
        async with two() as (a, b):
            jobs = [carry(*pair, frames(*[SIZE + i] * 5, seed=i)) for i in range(20) for pair in ((a, b), (b, a))]
            await asyncio.gather(*jobs)

    run(main)


def test_a_worker_may_send_to_itself() -> None:
    async def main() -> None:
        async with two() as (a, _):
            await carry(a, a, frames(SIZE, 2**20))

    run(main)


def test_buffers_on_a_device_are_sent_and_received_where_they_lie() -> None:
    async def main() -> None:
        assert SMALL_NBYTES >= MIN_FRAME_NBYTES, "no smaller body is sent from a device"
        library = device_standin.library()
        names: list[str] = []
        async with two() as (a, b):
            a.in_thread(lambda: names.append(threading.current_thread().name))
            (sent,) = frames(2**20)
            sizes = [sent.nbytes, sent.nbytes]
            bodies = allocate([("device_standin", nbytes) for nbytes in sizes])
            # From the device to the device, and to the host where the receiver wants it so.
            buffers: list[Any] = [bodies[0], host_buffer(sent.nbytes)]
            waiting = iter(buffers)
            body = DeviceBody(library, device_standin.asarray(sent))
            copies = library.ups, library.downs
            tag = a.new_tag()
            _, got = await asyncio.gather(
                a.send(b.address, tag, [body, body]), b.receive(a.address, tag, sizes, lambda _: next(waiting))
            )
            assert got == buffers
            assert (library.ups, library.downs) == copies
            np.testing.assert_array_equal(device_standin.asnumpy(bodies[0].array), sent)
            np.testing.assert_array_equal(np.frombuffer(got[1], np.uint8), sent)
            # What is to be done in the thread is done before what is asked of it later.
            assert names == ["gpurt-ucx"]
        a.in_thread(lambda: names.append("closed"))
        assert names == ["gpurt-ucx"]

    run(main)


def test_any_host_buffer_will_do() -> None:
    async def main() -> None:
        async with two() as (a, b):
            sent: list[Any] = [
                b"\x01" * SIZE,
                bytearray(b"\x02" * SIZE),
                memoryview(b"\x03" * SIZE),
                np.ones((SIZE // 8, 1)),
            ]
            tag = a.new_tag()
            allocated: list[bytearray] = []

            def allocate(nbytes: int) -> bytearray:
                allocated.append(bytearray(nbytes))
                return allocated[-1]

            _, got = await asyncio.gather(a.send(b.address, tag, sent), b.receive(a.address, tag, [SIZE] * 4, allocate))
            assert [bytes(memoryview(buffer).cast("B")) for buffer in sent] == [bytes(buffer) for buffer in got]
            assert all(mine is theirs for mine, theirs in zip(allocated, got, strict=True))

    run(main)


def test_nothing_moves_before_the_receiver_is_ready() -> None:
    async def main() -> None:
        async with two() as (a, b):
            tag = a.new_tag()
            send = asyncio.create_task(a.send(b.address, tag, frames(SIZE, 4 * 2**20)))
            # Another delivery goes there and back: so the first had its chance.
            await carry(a, b, frames(SIZE))
            await carry(b, a, frames(SIZE))
            assert not send.done()
            await b.receive(a.address, tag, [SIZE, 4 * 2**20])
            await send

    run(main)


@pytest.mark.parametrize(
    ("sent", "announced"),
    [
        ((SIZE, SIZE), (SIZE,)),
        ((SIZE,), (SIZE, SIZE)),
        ((SIZE,), (SIZE + 1,)),
        ((SIZE + 1,), (SIZE,)),
        ((SIZE, 2 * SIZE), (2 * SIZE, SIZE)),
    ],
    ids=["more frames", "fewer frames", "shorter", "longer", "another order"],
)
def test_what_is_not_as_announced_is_refused(sent: tuple[int, ...], announced: tuple[int, ...]) -> None:
    async def main() -> None:
        async with two() as (a, b):
            tag = a.new_tag()
            buffers = [bytearray(nbytes) for nbytes in announced]
            spare = iter(buffers)
            send = asyncio.create_task(a.send(b.address, tag, [b"\xff" * nbytes for nbytes in sent]))
            with pytest.raises(TransportError, match="announced"):
                await b.receive(a.address, tag, announced, lambda _: next(spare))
            # The sender is not left waiting.
            await send
            assert not any(any(buffer) for buffer in buffers)
            await carry(a, b, frames(SIZE))

    run(main)


def test_a_cancelled_receive_is_never_written_to() -> None:
    async def main() -> None:
        async with two() as (a, b):
            tag, buffer = a.new_tag(), bytearray(SIZE)
            receive = asyncio.create_task(b.receive(a.address, tag, [SIZE], lambda _: buffer))
            await carry(a, b, frames(SIZE))
            receive.cancel()
            with pytest.raises(asyncio.CancelledError):
                await receive
            # The sender, which comes late, is refused.
            await a.send(b.address, tag, [b"\xff" * SIZE])
            assert not any(buffer)
            assert b.describe()["quarantined_nbytes"] == 0

    run(main)


def test_a_cancelled_send_gives_its_buffers_free() -> None:
    async def main() -> None:
        async with two() as (a, b):
            tag, sent = a.new_tag(), frames(SIZE, SIZE)
            gone = weakref.ref(sent[0])
            send = asyncio.create_task(a.send(b.address, tag, sent))
            await carry(a, b, frames(SIZE))
            send.cancel()
            with pytest.raises(asyncio.CancelledError):
                await send
            del sent, send

            def is_gone() -> bool:
                gc.collect()
                return gone() is None

            # The peer, which never asked for it, refuses it. What it asks for later has been withdrawn.
            await until(is_gone)
            with pytest.raises(TransportError, match="withdrawn"):
                await b.receive(a.address, tag, [SIZE, SIZE])
            assert a.describe()["quarantined_nbytes"] == 0

    run(main)


def test_a_dropped_peer_ends_what_is_under_way_with_it_and_nothing_else() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with two() as (a, b):
            c = UCXTransport.open(loop, SECRET)
            await carry(a, b, frames(SIZE))
            tag_out, tag_in, tag_other = a.new_tag(), b.new_tag(), c.new_tag()
            pending = [
                asyncio.create_task(a.send(b.address, tag_out, frames(2**20))),
                asyncio.create_task(a.receive(b.address, tag_in, [2**20])),
            ]
            other = asyncio.create_task(a.receive(c.address, tag_other, [2**20]))
            await carry(c, a, frames(SIZE))
            a.drop_peer(b.address)
            a.drop_peer(b.address)
            for task in pending:
                with pytest.raises(TransportError, match="gone"):
                    await asyncio.wait_for(task, 5)
            with pytest.raises(TransportError, match="gone"):
                await a.send(b.address, a.new_tag(), frames(SIZE))
            assert not other.done()
            await c.send(a.address, tag_other, frames(2**20))
            await other
            await c.close()

    run(main)


def test_closing_ends_everything_and_leaves_nothing() -> None:
    def held() -> tuple[int, int, int]:
        gc.collect()
        segments = pathlib.Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        mine = [line for line in segments if line.split()[4] == str(os.getpid())]
        # Others come and go with what else this process does.
        return len(os.listdir("/proc/self/fd")), len(ucx_threads()), len(mine)

    async def main() -> None:
        async def once() -> None:
            async with two() as (a, b):
                await carry(a, b, frames(SIZE))
                tag = a.new_tag()
                waiting = asyncio.create_task(b.receive(a.address, tag, [SIZE]))
                sending = asyncio.create_task(a.send(b.address, a.new_tag(), frames(SIZE)))
                await carry(a, b, frames(SIZE))
                await a.close()
                await b.close()
                for task in (waiting, sending):
                    with pytest.raises(TransportError):
                        await task
                with pytest.raises(TransportError, match="closed"):
                    await a.send(b.address, tag, frames(SIZE))
                a.drop_peer(b.address)

        await once()
        before = held()
        for _ in range(3):
            await once()
        assert held() == before

    run(main)


def test_it_is_idle_where_nothing_moves() -> None:
    async def main() -> None:
        async with two() as (a, b):
            await carry(a, b, frames(SIZE))
            receive = asyncio.create_task(b.receive(a.address, a.new_tag(), [SIZE]))
            await carry(b, a, frames(SIZE))
            started = busy_s()
            await asyncio.sleep(1)
            assert busy_s() - started < 0.05
            receive.cancel()

    run(main)


def test_what_cannot_be_sent_is_said_so_at_once() -> None:
    async def main() -> None:
        async with two() as (a, b):
            with pytest.raises(ValueError, match="too small"):
                await a.send(b.address, a.new_tag(), [b"small"])
            with pytest.raises(ValueError, match="contiguous"):
                await a.send(b.address, a.new_tag(), [np.zeros(2 * SIZE, dtype=np.uint8)[::2]])
            with pytest.raises(ValueError, match="no tag"):
                await a.send(b.address, b.new_tag(), frames(SIZE))
            with pytest.raises(TransportError, match="no tag"):
                await b.receive(a.address, b.new_tag(), [SIZE])
            with pytest.raises(TransportError, match="announced"):
                await b.receive(a.address, a.new_tag(), [1])
            with pytest.raises(TransportError, match="no address"):
                await a.send(b"", a.new_tag(), frames(SIZE))
            with pytest.raises(ValueError, match="not of the sizes"):
                await b.receive(a.address, a.new_tag(), [SIZE], lambda nbytes: bytearray(nbytes + 1))
            await a.send(b.address, a.new_tag(), [])
            assert await b.receive(a.address, a.new_tag(), []) == []

    run(main)


def test_an_address_that_reaches_nobody() -> None:
    async def main() -> None:
        async with two() as (a, b):
            known = Address.decode(b.address, SECRET)
            broken = Address(known.incarnation, known.ucx[:7] + bytes(len(known.ucx) - 7)).encode(SECRET)
            with pytest.raises(TransportError):
                await asyncio.wait_for(a.send(broken, a.new_tag(), frames(SIZE)), 5)
            await carry(a, b, frames(SIZE))

    run(main)


def test_without_ucxx_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setitem(sys.modules, "ucxx", None)
        with pytest.raises(TransportUnavailable, match="cannot be imported"):
            UCXTransport.open(asyncio.get_running_loop(), SECRET)

    run(main)


def test_where_ucx_does_not_start_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setenv("UCX_TLS", "no_such_transport")
        monkeypatch.setenv("UCX_LOG_LEVEL", "fatal")
        with pytest.raises(TransportUnavailable, match="does not start"):
            UCXTransport.open(asyncio.get_running_loop(), SECRET)

    run(main)


def test_what_the_user_has_set_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setenv("UCX_TLS", "tcp")
        async with two() as (a, b):
            assert a.describe()["found"] == ["tcp"]
            await carry(a, b, frames(SIZE, 4 * 2**20))

    run(main)


def test_what_goes_wrong_in_the_thread_reaches_those_who_wait(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise ZeroDivisionError("planted")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with two() as (a, _):
            failed = UCXTransport.open(loop, SECRET, prepare_thread=broken)
            with pytest.raises(TransportError):
                await failed.send(a.address, failed.new_tag(), frames(SIZE))
            await failed.close()

    run(main)
    assert "planted" in caplog.text


def test_it_describes_itself() -> None:
    async def main() -> None:
        async with two() as (a, _):
            description = a.describe()
            assert description["transport"] == "ucx"
            assert "tcp" in description["found"]
            assert not {"posix", "sysv", "xpmem"} & set(description["found"]), "no shared memory"
            assert description["under_way"] == 0
            assert "0 under way" in repr(a)

    run(main)


def test_fresh_host_memory_can_be_written() -> None:
    buffer = host_buffer(3)
    buffer[:] = b"abc"
    assert bytes(buffer) == b"abc"
