"""The ways to peers: what is compressed for whom, and what a receiver does with sizes that are not true."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from dask_gpurt import codecs
from dask_gpurt.codecs import Compressed
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.store import DictBufferStore
from dask_gpurt.shuffle.carrier import Carrier, nbytes_of
from dask_gpurt.shuffle.paths import COMM, UCX
from dask_gpurt.shuffle.ways import Ways
from dask_gpurt.shuffle.wire import WireError
from dask_gpurt.topology import Place, Topology

pytest.importorskip("pyarrow", reason="pyarrow brings the codecs")

HERE, NEIGHBOUR, FAR = "tcp://10.0.0.1:1000", "tcp://10.0.0.1:2000", "tcp://10.0.0.2:1000"
MESSAGE = [b"header", bytes(range(250)) * 4000, b"header", b"small"]


def ways_with(paths: tuple[str, ...] = (UCX, COMM), bandwidth: float = 20e6) -> Ways:
    """Make ways that are known to have this bandwidth."""
    ways = Ways(Topology(), Place(HERE), paths)
    for address in (NEIGHBOUR, FAR):
        for path in (UCX, COMM):
            for _ in range(10):
                ways.way(address, path).carried(10**6, (10**6, 10**6 / bandwidth))
    return ways


def packed_by(ways: Ways, address: str, path: str) -> Compressed:
    with ThreadPoolExecutor(1) as executor:
        return asyncio.run(ways.pack(ways.way(address, path), "run", MESSAGE, executor))


def test_a_slow_way_is_compressed_and_counted() -> None:
    ways = ways_with()
    message = packed_by(ways, FAR, UCX)
    assert [each.number for each in message.packed] == [1]
    assert (ways.raw_nbytes, ways.wire_nbytes) == (10**6, nbytes_of(message.buffers[1:2]))
    assert ways.wire_nbytes < 10**5
    assert ways.compress_s > 0
    assert ways.sample_s > 0


@pytest.mark.parametrize(
    ("address", "path", "paths", "bandwidth"),
    [
        (NEIGHBOUR, UCX, (UCX, COMM), 20e6),
        (FAR, COMM, (UCX,), 20e6),
        (FAR, UCX, (UCX, COMM), 3e9),
    ],
    ids=["on the same host", "where Dask compresses", "fast"],
)
def test_other_ways_are_left_alone(address: str, path: str, paths: tuple[str, ...], bandwidth: float) -> None:
    ways = ways_with(paths, bandwidth)
    message = packed_by(ways, address, path)
    assert message.buffers == MESSAGE
    assert not message.packed
    assert ways.sample_s == ways.compress_s == 0


def test_a_peer_that_left_is_forgotten() -> None:
    ways = ways_with()
    ways.choose(FAR, 10**6)
    before = ways.way(FAR, UCX)
    ways.forget(FAR)
    assert ways.way(FAR, UCX) is not before
    assert ways.way(FAR, UCX).link.transfers == 0


def carrier() -> Carrier:
    part: Any = SimpleNamespace(pool=BlockPool(0))
    worker: Any = SimpleNamespace(address=HERE)
    return Carrier(worker, part, ucx=False)


def test_a_receiver_gives_back_what_it_reserved_for_the_compressed_bytes() -> None:
    async def main() -> None:
        message = codecs.compress(MESSAGE, "lz4")
        wire_nbytes = nbytes_of(message.buffers)
        reservation = await DictBufferStore().reserve(wire_nbytes + message.raw_nbytes)
        buffers = list(message.buffers)
        with ThreadPoolExecutor(1) as executor:
            run: Any = SimpleNamespace(executor=executor, metered=contextlib.nullcontext)
            await carrier()._unpack(run, buffers, message.packed, reservation)
        assert [bytes(memoryview(buffer)) for buffer in buffers] == MESSAGE
        assert reservation.nbytes == nbytes_of(MESSAGE)

    asyncio.run(main())


def test_no_more_is_decompressed_than_was_asked_for() -> None:
    async def main() -> None:
        message = codecs.compress(MESSAGE, "lz4")
        reservation = await DictBufferStore().reserve(nbytes_of(message.buffers) + message.raw_nbytes - 1)
        run: Any = SimpleNamespace(executor=None)
        with pytest.raises(WireError, match="more than was asked for"):
            await carrier()._unpack(run, list(message.buffers), message.packed, reservation)
        assert reservation.nbytes == 0

    asyncio.run(main())


@pytest.mark.parametrize("sizes", [[-1], [2**20, -(2**20)], [1.5]], ids=str)
def test_nothing_is_reserved_for_a_size_that_is_none(sizes: list[Any]) -> None:
    receiver = carrier()
    receiver._transport = SimpleNamespace()  # type: ignore[assignment]
    buffers = [b""] * len(sizes)
    # The run is not asked for memory.
    with pytest.raises(WireError, match="a size that was announced is none"):
        asyncio.run(receiver._take_by_ucx(SimpleNamespace(), buffers, (), sizes, None, 1, b"peer", 0))  # type: ignore[arg-type]
