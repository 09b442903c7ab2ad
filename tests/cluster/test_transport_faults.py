"""The transport between processes that are killed, stopped and replaced, over each kind of link that one host has."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ucxx", reason="ucxx is not installed", exc_type=ImportError)

from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.transport import handshake
from dask_gpurt.shuffle.transport.ucx import TransportError, UCXTransport

#: A delivery: enough of it that a peer dies within.
SIZES = [4 * 2**20] * 8
#: Whoever waits for a dropped peer hears of it at once, and not when a handshake, which takes twice as long, or UCX gives up.
PROMPT_S = 5

#: A peer: says its address, then does what it is told in lines of JSON, all at the same time.
PEER = """
import asyncio, json, sys
import numpy as np
from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.transport.ucx import UCXTransport, TransportError

async def main():
    loop = asyncio.get_running_loop()
    transport = UCXTransport.open(loop, Secret(bytes(32)))
    stdin = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    say = lambda **what: print(json.dumps(what), flush=True)
    say(address=transport.address.hex(), tags=[transport.new_tag() for _ in range(100)])

    async def do(what, peer, tag, sizes):
        peer = bytes.fromhex(peer)
        try:
            if what == "send":
                await transport.send(peer, tag, [np.full(size, 1 + i % 255, np.uint8) for i, size in enumerate(sizes)])
                good = True
            else:
                got = await transport.receive(peer, tag, sizes)
                good = all((np.frombuffer(b, np.uint8) == 1 + i % 255).all() for i, b in enumerate(got))
            say(tag=tag, good=bool(good))
        except TransportError as error:
            say(tag=tag, error=str(error))

    tasks = []
    while line := await stdin.readline():
        tasks.append(loop.create_task(do(**json.loads(line))))
    await transport.close()

asyncio.run(main())
"""


class Peer:
    """A process with a transport."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        assert process.stdin is not None
        self.process, self._out, self._in = process, process.stdout, process.stdin
        self.address = b""
        self.tags: list[int] = []

    @classmethod
    async def start(cls) -> Peer:
        pipe = asyncio.subprocess.PIPE
        peer = cls(await asyncio.create_subprocess_exec(sys.executable, "-c", PEER, stdin=pipe, stdout=pipe))
        said = await peer.hear()
        peer.address, peer.tags = bytes.fromhex(said["address"]), said["tags"]
        return peer

    async def hear(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(await self._out.readline())
        return said

    def tell(self, what: str, peer: bytes, tag: int) -> None:
        order = {"what": what, "peer": peer.hex(), "tag": tag, "sizes": SIZES}
        self._in.write(json.dumps(order).encode() + b"\n")

    def stop(self) -> None:
        """Stop it, and wait until all its threads stand still: one that has the processor goes on for a while."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self._in.close()
            assert await self.process.wait() == 0
        # So that no transport of a pipe outlives the event loop.
        self._in.close()
        await self._out.read()


@asynccontextmanager
async def peers(count: int) -> AsyncIterator[tuple[UCXTransport, list[Peer]]]:
    own = UCXTransport.open(asyncio.get_running_loop(), Secret(bytes(32)))
    found = await asyncio.gather(*(Peer.start() for _ in range(count)))
    try:
        yield own, list(found)
    finally:
        await own.close()
        await asyncio.gather(*(peer.end() for peer in found))


def frames() -> list[np.ndarray]:
    return [np.full(size, 1 + i % 255, dtype=np.uint8) for i, size in enumerate(SIZES)]


def check(got: list[Any]) -> None:
    for frame, buffer in zip(frames(), got, strict=True):
        np.testing.assert_array_equal(np.frombuffer(buffer, dtype=np.uint8), frame)


async def to(own: UCXTransport, peer: Peer) -> None:
    tag = own.new_tag()
    peer.tell("receive", own.address, tag)
    await own.send(peer.address, tag, frames())
    assert await peer.hear() == {"tag": tag, "good": True}


async def back(own: UCXTransport, peer: Peer) -> None:
    tag = peer.tags.pop()
    peer.tell("send", own.address, tag)
    check(await own.receive(peer.address, tag, SIZES))
    assert await peer.hear() == {"tag": tag, "good": True}


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 100))


@pytest.fixture(params=["default", "all", "tcp"])
def link(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used of what UCX finds; a user who asks for all of it; where one process may not read another's memory."""
    if request.param == "default":
        monkeypatch.delenv("UCX_TLS", raising=False)
    else:
        monkeypatch.setenv("UCX_TLS", request.param)
    # A peer that is killed is no error here.
    monkeypatch.setenv("UCX_LOG_LEVEL", "fatal")


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("link", ["tcp"], indirect=True)
def test_deliveries_cross_processes_both_ways_at_once() -> None:
    async def main() -> None:
        async with peers(1) as (own, (peer,)):
            tags_out, tags_in = [own.new_tag() for _ in range(5)], [peer.tags.pop() for _ in range(5)]
            for tag in tags_out:
                peer.tell("receive", own.address, tag)
            for tag in tags_in:
                peer.tell("send", own.address, tag)
            sends = [own.send(peer.address, tag, frames()) for tag in tags_out]
            receives = [own.receive(peer.address, tag, SIZES) for tag in tags_in]
            await asyncio.gather(*sends)
            for got in await asyncio.gather(*receives):
                check(got)
            heard = [await peer.hear() for _ in range(10)]
            assert sorted(said["tag"] for said in heard) == sorted(tags_out + tags_in)
            assert all(said["good"] for said in heard)

    run(main)


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("direction", ["send", "receive"])
def test_a_peer_that_is_killed_while_data_moves(direction: str) -> None:
    async def main() -> None:
        async with peers(2) as (own, (victim, other)):
            await to(own, other)
            deliveries: list[asyncio.Task[Any]] = []
            for _ in range(12):
                tag = own.new_tag() if direction == "send" else victim.tags.pop()
                victim.tell("receive" if direction == "send" else "send", own.address, tag)
                deliveries.append(
                    asyncio.create_task(
                        own.send(victim.address, tag, frames())
                        if direction == "send"
                        else own.receive(victim.address, tag, SIZES)
                    )
                )
            # The rest is under way, or is about to be.
            await asyncio.wait(deliveries, return_when=asyncio.FIRST_COMPLETED)
            await victim.kill()
            late = asyncio.create_task(own.receive(victim.address, victim.tags.pop(), SIZES))
            # What was there before it was killed may still arrive; nothing else does.
            await back(own, other)
            own.drop_peer(victim.address)
            done, pending = await asyncio.wait([*deliveries, late], timeout=PROMPT_S)
            assert not pending
            with pytest.raises(TransportError):
                await late
            for task in done:
                error = task.exception()
                assert error is None or isinstance(error, TransportError)
                if error is None and direction == "receive":
                    check(task.result())
            await to(own, other)
            await back(own, other)
            while own.describe()["quarantined_nbytes"]:  # noqa: ASYNC110  a thread's doing, which nobody reports
                await asyncio.sleep(0.001)
            await own.close()
            assert own.describe()["quarantined_nbytes"] == 0

    run(main)


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("link", ["default"], indirect=True)
def test_a_peer_that_is_stopped_can_be_given_up_and_goes_on_later() -> None:
    async def main() -> None:
        async with peers(1) as (own, (peer,)):
            await to(own, peer)
            await back(own, peer)
            peer.stop()
            tag_in = peer.tags.pop()
            peer.tell("send", own.address, tag_in)
            tasks: list[asyncio.Task[Any]] = [
                asyncio.create_task(own.send(peer.address, own.new_tag(), frames())),
                asyncio.create_task(own.receive(peer.address, tag_in, SIZES)),
            ]
            done, _ = await asyncio.wait(tasks, timeout=0.1)
            assert not done
            for task in tasks:
                task.cancel()
            done, pending = await asyncio.wait(tasks, timeout=PROMPT_S)
            assert not pending
            assert all(task.cancelled() for task in done)
            peer.process.send_signal(signal.SIGCONT)
            # What it sends then is refused, which is the end of it on its side, and it refuses what was withdrawn.
            assert await peer.hear() == {"tag": tag_in, "good": True}
            await to(own, peer)
            await back(own, peer)
            while own.describe()["quarantined_nbytes"]:  # noqa: ASYNC110  a thread's doing, which nobody reports
                await asyncio.sleep(0.001)

    run(main)


@pytest.mark.usefixtures("link")
@pytest.mark.parametrize("link", ["default", "tcp"], indirect=True)
def test_a_peer_that_is_stopped_before_it_is_met_is_given_up_and_met_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with peers(1) as (own, (peer,)):
            peer.stop()
            with monkeypatch.context() as patch:
                patch.setattr(handshake, "HANDSHAKE_S", 0.3)
                with pytest.raises(TransportError, match="not proven within"):
                    await own.send(peer.address, own.new_tag(), frames())
            late = asyncio.create_task(own.send(peer.address, tag := own.new_tag(), frames()))
            peer.process.send_signal(signal.SIGCONT)
            peer.tell("receive", own.address, tag)
            await late
            assert await peer.hear() == {"tag": tag, "good": True}
            await back(own, peer)
            await to(own, peer)

    run(main)


def test_a_peer_in_the_place_of_another_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setenv("UCX_LOG_LEVEL", "fatal")
        async with peers(1) as (own, (before,)):
            await to(own, before)
            await before.kill()
            own.drop_peer(before.address)
            after = await Peer.start()
            assert after.address != before.address
            with pytest.raises(TransportError, match="no tag"):
                await own.receive(after.address, before.tags.pop(), SIZES)
            with pytest.raises(TransportError, match="gone"):
                await own.send(before.address, own.new_tag(), frames())
            await to(own, after)
            await back(own, after)
            await after.end()

    run(main)
