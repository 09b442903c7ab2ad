"""Slow links and fast ones: compression where it pays and only there, the path by its price, and damage on the way.

A *throttle* in each worker process holds back what the shuffle sends to so many bytes a second, on one path or on both. What a shuffle
takes there is counted in bytes, and what samples take in processor time: the clock would tell of whatever else the machine does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import cloudpickle
import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import beat
from distributed import Client, Nanny, Scheduler, SpecCluster, wait

import dask_gpurt
from dask_gpurt.topology import NEWS_FACTOR

pytest.importorskip("ucxx", reason="ucxx is not installed")

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SLOW, FAST = 8e6, 1e9
BOTH_SLOW, BOTH_FAST = {"ucx": SLOW, "comm": SLOW}, {"ucx": FAST, "comm": FAST}
PARTITIONS, ROWS = 6, 100_000


def compressible(number: int) -> Any:
    rng = np.random.default_rng(number)
    columns = {f"c{i}": rng.integers(0, 100, ROWS) for i in range(4)}
    return pd.DataFrame({"key": rng.integers(0, 10_000, ROWS), "id": np.arange(ROWS) + number * ROWS, **columns})


def incompressible(number: int) -> Any:
    numbers = np.random.default_rng(number).integers(-(2**63), 2**63 - 1, (7, ROWS))
    columns = {f"c{i}": column for i, column in enumerate(numbers[3:])}
    return pd.DataFrame({"key": numbers[0], "id": numbers[1], **columns}, index=numbers[2])


def replace(owner: Any, name: str, function: Any) -> None:
    """Replace a function of a worker process until :func:`put_back`."""
    import builtins

    # This module is another one in each call.
    vars(builtins).setdefault("_test_originals", []).append((owner, name, getattr(owner, name)))
    setattr(owner, name, function)


def put_back() -> None:
    import builtins

    for owner, name, function in vars(builtins).pop("_test_originals", []):
        setattr(owner, name, function)


def throttle(rates: dict[str, float]) -> None:
    """Let so many bytes a second out of this process, path by path."""
    from distributed.comm.tcp import TCP

    from dask_gpurt.shuffle.transport.ucx import UCXTransport

    free_at = dict.fromkeys(rates, 0.0)
    send: Any = UCXTransport.send
    write: Any = TCP.write

    async def hold_back(path: str, buffers: Any) -> None:
        if path in rates:
            now = time.monotonic()
            nbytes = sum(memoryview(buffer).nbytes for buffer in buffers)
            free_at[path] = max(now, free_at[path]) + nbytes / rates[path]
            await asyncio.sleep(free_at[path] - now)

    async def slow_send(transport: Any, peer: bytes, tag: int, buffers: Any) -> None:
        await hold_back("ucx", buffers)
        await send(transport, peer, tag, buffers)

    async def slow_write(comm: Any, msg: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(msg, dict) and msg.get("op") == "gpurt_shuffle_take":
            await hold_back("comm", msg["buffers"].data)
        return await write(comm, msg, *args, **kwargs)

    replace(UCXTransport, "send", slow_send)
    replace(TCP, "write", slow_write)


def tell_the_time(rates: dict[str, float]) -> None:
    """Let transfers have taken what they would at these bytes a second, whatever they took."""
    from dask_gpurt.shuffle.ways import Ways
    from dask_gpurt.topology import Link

    to: Any = Ways._to

    def told(ways: Any, address: str) -> Any:
        found = to(ways, address)
        for path, way in found.items():
            link, rate = way.link, rates[path]
            link.observe = lambda nbytes, _, link=link, rate=rate: Link.observe(link, nbytes, nbytes / rate)
        return found

    replace(Ways, "_to", told)


def damage() -> None:
    """Compress all that can be, whether it pays or not, and flip a bit of it."""
    from dask_gpurt import codecs
    from dask_gpurt.compression import LinkCompression

    replace(LinkCompression, "slow", True)
    replace(LinkCompression, "codec", lambda *_: "lz4")
    compress = codecs.compress

    def damaged(*args: Any) -> Any:
        message = compress(*args)
        for each in message.packed:
            wire = bytearray(message.buffers[each.number])
            wire[len(wire) // 2] ^= 1
            message.buffers[each.number] = wire
        return message

    replace(codecs, "compress", damaged)


def own_metrics(dask_worker: Any) -> Any:
    return dask_worker.extensions["gpurt"].shuffle.metrics()


def metrics(client: Client) -> dict[str, float]:
    """Sum over the workers."""
    each = client.run(own_metrics).values()
    return {name: sum(worker[name] for worker in each) for name in next(iter(each))}


def cluster(*hosts: str) -> SpecCluster:
    """A worker on each of these hosts, as far as they know."""
    options = {"nthreads": 1, "memory_limit": "2 GiB", "silence_logs": logging.WARNING}
    return SpecCluster(
        scheduler={"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}},
        workers={number: {"cls": Nanny, "options": {"host": host, **options}} for number, host in enumerate(hosts)},
        silence_logs=logging.WARNING,
    )


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with cluster("127.0.0.1", "127.0.0.2") as both, Client(both) as client:
        client.wait_for_workers(2)
        yield client


@contextlib.contextmanager
def installed(
    client: Client, rates: dict[str, float], *, workers: list[str] | None = None, **settings: Any
) -> Iterator[None]:
    client.run(throttle, rates, workers=workers)
    with dask.config.set({f"gpurt.shuffle.{key}": value for key, value in settings.items()}):
        dask_gpurt.install(client, placement=False)
    try:
        # Both sides have UCX from the first message on.
        client.run(open_ucx)
        yield
    finally:
        dask_gpurt.uninstall(client)
        client.run(put_back)


async def open_ucx(dask_worker: Any) -> None:
    carrier = dask_worker.extensions["gpurt"].shuffle.carrier
    assert (await carrier.address() is None) == (carrier.without_ucx is not None)


def frames(make: Callable[[int], Any]) -> Any:
    source = dd.from_map(make, range(PARTITIONS), meta=make(0).iloc[:0]).persist()
    wait(source)
    return source


def shuffle(source: Any, npartitions: int) -> Any:
    result = source.shuffle("key", npartitions=npartitions, shuffle_method="p2p").persist()
    wait(result)
    return result


def check(result: Any, make: Callable[[int], Any]) -> None:
    expected = pd.concat([make(number) for number in range(PARTITIONS)])
    order = ["key", "id"]
    found = result.compute().sort_values(order, ignore_index=True)
    pd.testing.assert_frame_equal(found, expected.sort_values(order, ignore_index=True))


def wire_nbytes(metrics: dict[str, float]) -> float:
    return metrics["bytes_sent_ucx"] + metrics["bytes_sent_comm"]


def over_slow_links(client: Client, source: Any, **settings: str) -> tuple[Any, dict[str, float], dict[str, float]]:
    """Shuffle three times, the first two to learn. Returns the last result, and the metrics before it and after it."""
    with installed(client, BOTH_SLOW, workers=None, **settings):
        shuffle(source, 6)
        shuffle(source, 7)
        before = metrics(client)
        return shuffle(source, 8), before, metrics(client)


@pytest.mark.parametrize("transport", ["auto", "dask"])
def test_a_slow_link_is_compressed(client: Client, transport: str) -> None:
    source = frames(compressible)
    result, before, packed = over_slow_links(client, source, transport=transport, compression="auto")
    check(result, compressible)
    assert 0 < packed["bytes_after_compression"] < 0.6 * packed["bytes_before_compression"]
    assert wire_nbytes(packed) < 0.8 * packed["bytes_sent"]
    # Once that is learned, all is.
    assert wire_nbytes(packed) - wire_nbytes(before) < (packed["bytes_sent"] - before["bytes_sent"]) / 1.5
    # A sample takes a millisecond where the machine does something else, too.
    assert packed["compress_sample_s"] < 0.02


def test_what_is_not_to_be_compressed_is_not(client: Client) -> None:
    _, _, plain = over_slow_links(client, frames(compressible), compression="off")
    assert wire_nbytes(plain) >= plain["bytes_sent"]
    assert plain["bytes_before_compression"] == plain["compress_sample_s"] == plain["compress_s"] == 0


def test_what_does_not_become_smaller_is_not_compressed(client: Client) -> None:
    source = frames(incompressible)
    result, _, found = over_slow_links(client, source, compression="auto")
    check(result, incompressible)
    assert found["bytes_before_compression"] == found["compress_s"] == 0
    # Samples are all that it costs, next to nothing of what the link takes.
    assert 0 < found["compress_sample_s"] < 0.05 * wire_nbytes(found) / SLOW


def test_peers_on_one_host_are_left_alone() -> None:
    """Their link is memory, and what makes it slow would make a codec slow, too."""
    with cluster("127.0.0.1", "127.0.0.1") as both, Client(both) as client:
        client.wait_for_workers(2)
        source = frames(compressible)
        with installed(client, {"ucx": 10 * SLOW}):
            for npartitions in (6, 7, 8):
                result = shuffle(source, npartitions)
            check(result, compressible)
            found = metrics(client)
            assert found["bytes_sent_ucx"] > 0
            assert found["bytes_before_compression"] == found["compress_sample_s"] == found["compress_s"] == 0


def test_ucx_is_left_where_dasks_comms_are_quicker(client: Client) -> None:
    source = frames(incompressible)
    with installed(client, {}):
        client.run(tell_the_time, {"ucx": 120e6, "comm": 1e9})
        for npartitions in range(6, 20):
            before = metrics(client)
            result = shuffle(source, npartitions)
            after = metrics(client)
            if after["bytes_sent_ucx"] == before["bytes_sent_ucx"]:
                break
        assert after["bytes_sent_ucx"] == before["bytes_sent_ucx"] > 0
        assert after["bytes_sent_comm"] > before["bytes_sent_comm"]
        check(result, incompressible)


def prices_of(dask_worker: Any) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = dask_worker.extensions["gpurt"].shuffle.carrier.topology.prices()
    return found


def prices(dask_scheduler: Any) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = dask_scheduler.plugins["gpurt"].topology.prices()
    return found


def test_the_scheduler_learns_the_links_and_gives_less_to_who_receives_slowly(client: Client) -> None:
    source = frames(incompressible)
    a, b = client.scheduler_info()["workers"]
    with installed(client, {}, compression="off"):
        client.run(tell_the_time, BOTH_SLOW, workers=[a])
        client.run(tell_the_time, BOTH_FAST, workers=[b])
        while len(client.run_on_scheduler(prices)) < 2:
            result = shuffle(source, 6)
            assert Counter(who for (who,) in client.who_has(result).values()) == {a: 3, b: 3}
            del result
            client.run(beat)
        known = client.run_on_scheduler(prices)
        measured = {pair: price_s for each in client.run(prices_of).values() for pair, price_s in each.items()}
        assert known.keys() == measured.keys() == {(a, b), (b, a)}
        for pair, price_s in measured.items():
            assert 1 / NEWS_FACTOR <= known[pair] / price_s <= NEWS_FACTOR
        assert known[a, b] > 100 * known[b, a]
        result = shuffle(source, 16)
        assert Counter(who for (who,) in client.who_has(result).values())[b] <= 2
        check(result, incompressible)
        # A scheduler without our part passes over what the workers go on to tell, and they live.
        client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.plugins["gpurt"].shuffle.stop())
        result = shuffle(source, 7)
        client.run(beat)
        check(result, incompressible)


def test_what_is_damaged_on_its_way_is_an_error(client: Client) -> None:
    source = frames(compressible)
    with installed(client, {}):
        client.run(damage)
        with pytest.raises(Exception, match="failed during") as caught:
            source.shuffle("key", npartitions=7, shuffle_method="p2p").compute()
        assert "damaged on its way" in str(caught.value.__cause__)
        # What else was on its way ends with the run.
        patience_until = time.monotonic() + 30
        while any(client.run(reserved).values()):
            assert time.monotonic() < patience_until
    with installed(client, BOTH_SLOW):
        check(shuffle(source, 8), compressible)


def reserved(dask_worker: Any) -> int:
    return int(dask_worker.extensions["gpurt"].memory.ledger.reserved("host"))
