"""Arrays on a device through a rechunk on two processes, with a stand-in for the device: by UCX, and by Dask's comms."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import dask
import dask.array as da
import dask.dataframe as dd
import device_standin
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from dask.delayed import delayed
from distributed import Client, wait

import dask_gpurt
from dask_gpurt.shuffle import carrier, run
from dask_gpurt.shuffle.transport.ucx import TransportError, UCXTransport
from dask_gpurt.shuffle.wire import Header, encode

# The servers cannot import this module; the stand-in they can, by the path that they have from here.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Bands of 1.7 MiB, whose shards have 288 KiB each: large ones.
BANDS, THIN = 6, 192
SIDE = BANDS * THIN
SHARD_NBYTES = THIN * THIN * 8


def source() -> np.ndarray[Any, Any]:
    return np.arange(SIDE * SIDE, dtype=np.float64).reshape(SIDE, SIDE)


def band(number: int) -> device_standin.Array:
    return device_standin.asarray(source()[number * THIN : (number + 1) * THIN])


def figures(dask_worker: Any) -> dict[str, Any]:
    library = device_standin.library()
    part = dask_worker.extensions["gpurt"]
    return {
        "ups": library.ups,
        "downs": library.downs,
        "synchronized": library.synchronized,
        "current": len(library.current),
        "reserved": sum(part.memory.ledger.reserved(tier) for tier in ("device", "host")),
        **part.shuffle.metrics(),
        **part.memory.metrics(),
    }


@contextmanager
def workers(**config: object) -> Iterator[Client]:
    with (
        local_cluster(2, memory_limit="1 GiB") as cluster,
        Client(cluster) as client,
    ):
        answer = dask_gpurt.install(client, placement=False, config=config)
        assert answer.installed("shuffle"), str(answer)
        client.run(lambda: device_standin.library().name)
        yield client


def rechunk(client: Client, chunks: Any = (SIDE, THIN)) -> Any:
    blocks = [
        da.from_delayed(delayed(band)(number), (THIN, SIDE), np.float64, name=f"band-{number}-{chunks}")
        for number in range(BANDS)
    ]
    # Otherwise Dask joins bands before they are rechunked, which the stand-in cannot.
    with dask.config.set({"array.chunk-size": "1 MiB"}):
        return client.persist(da.concatenate(blocks).rechunk(chunks, method="p2p"))


def check(client: Client, found: Any) -> None:
    """Compare each chunk with NumPy's, where it lies: it has to be a device's."""
    wait(found, timeout=60)
    expected = da.from_array(source(), chunks=found.chunks)
    for mine, theirs in zip(found.to_delayed().ravel(), expected.to_delayed().ravel(), strict=True):
        np.testing.assert_array_equal(
            client.compute(delayed(device_standin.asnumpy)(mine)).result(60), theirs.compute()
        )


ROWS, PARTS = 80_000, 4


def table(number: int, columns: tuple[str, ...] = ("key", "x")) -> device_standin.Frame:
    rng = np.random.default_rng([number, len(columns[1])])
    key = rng.integers(0, 50_000, ROWS)
    return device_standin.Frame({columns[0]: key, columns[1]: rng.random(ROWS)}, index=np.arange(ROWS) + number * ROWS)


def tables(**options: Any) -> Any:
    return dd.from_map(table, range(PARTS), meta=table(0, **options).iloc[:0], **options)


def expected_tables(**options: Any) -> pd.DataFrame:
    return pd.concat([pd.DataFrame(table(number, **options)) for number in range(PARTS)])


def total(client: Client, what: str) -> float:
    return sum(float(each[what]) for each in client.run(figures).values())


def test_device_in_device_out_by_ucx() -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed")
    with workers() as client:
        check(client, rechunk(client))
        assert total(client, "runs") == 2, "it was not declined"
        shards = total(client, "bytes_sent_device") / SHARD_NBYTES
        assert shards == total(client, "bytes_sent") // SHARD_NBYTES > 0, "all but headers is sent from the device"
        assert total(client, "downs") == total(client, "ups") == 0
        assert total(client, "reserved") == 0
        assert all(each["synchronized"] and each["current"] for each in client.run(figures).values())


def test_by_dasks_comms_what_is_sent_goes_through_the_host() -> None:
    with workers(**{"shuffle.transport": "dask"}) as client:
        check(client, rechunk(client))
        assert total(client, "runs") == 2
        assert total(client, "bytes_sent_device") == 0
        assert total(client, "downs") == total(client, "ups") == total(client, "bytes_sent") // SHARD_NBYTES > 0
        assert total(client, "reserved") == 0


def test_frames_are_shuffled_and_merged_on_the_device() -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed")
    with workers() as client:
        shuffled = client.persist(tables().shuffle("key", npartitions=3, shuffle_method="p2p"))
        wait(shuffled, timeout=60)
        found = client.gather(client.compute(shuffled.to_delayed()))
        assert all(type(part) is device_standin.Frame for part in found)
        keys = [set(part["key"]) for part in found]
        assert not keys[0] & keys[1] | keys[1] & keys[2] | keys[0] & keys[2]
        for part in found:
            # In the order of the inputs, the same every time.
            assert part.index.is_monotonic_increasing
        whole = pd.DataFrame(pd.concat(found)).sort_index()
        pd.testing.assert_frame_equal(whole, expected_tables())
        assert total(client, "runs") == 2, "it was not declined"
        assert total(client, "bytes_sent_device") > 0
        assert total(client, "downs") == total(client, "ups") == 0
        assert total(client, "reserved") == 0
        other = {"columns": ("key", "other")}
        merged = tables().merge(tables(**other), on="key", shuffle_method="p2p", npartitions=3).compute()
        expected = expected_tables().merge(expected_tables(**other), on="key")
        order = ["key", "x", "other"]
        pd.testing.assert_frame_equal(
            pd.DataFrame(merged).sort_values(order, ignore_index=True), expected.sort_values(order, ignore_index=True)
        )


def test_small_bodies_of_frames_go_by_the_host_and_empty_partitions_are_there() -> None:
    with workers(**{"shuffle.transport": "dask"}) as client:
        shuffled = tables().shuffle("key", npartitions=60, shuffle_method="p2p")
        empty = tables().query("key < 3").shuffle("key", npartitions=9, shuffle_method="p2p")
        assert len(client.compute(empty.map_partitions(len)).result(60)) == 9
        pd.testing.assert_frame_equal(pd.DataFrame(shuffled.compute()).sort_index(), expected_tables())
        assert total(client, "bytes_sent_device") == 0
        assert total(client, "ups") == total(client, "downs") > 200
        assert total(client, "reserved") == 0


def test_frames_that_cannot_be_packed_go_to_stock() -> None:
    with workers() as client:
        frame = tables().assign(x=lambda frame: frame["x"].where(frame["x"] < 0.5))
        shuffled = frame.shuffle("key", npartitions=3, shuffle_method="p2p")
        expected = expected_tables()
        expected["x"] = expected["x"].where(expected["x"] < 0.5)
        pd.testing.assert_frame_equal(pd.DataFrame(shuffled.compute()).sort_index(), expected)
        assert total(client, "bytes_sent") == 0


def test_small_shards_and_a_device_that_is_full() -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed")
    limit_nbytes = 3 * 2**20
    with workers(**{"memory.device-limit": limit_nbytes}) as client:
        # Shards of 36 KiB: a band's for one peer, together, are large enough to stay on the device.
        small = rechunk(client, (SIDE, THIN // 8))
        check(client, small)
        for each in client.run(figures).values():
            assert each["bytes_sent_device"] > 0
            assert each["device_written_nbytes"] > 0
            # A reservation may be granted in spite of the limit when nothing can go.
            assert each["device_held_nbytes"] <= 2 * limit_nbytes
        # And shards that go alone.
        check(client, rechunk(client))
        assert total(client, "runs") == 4
        del small
        assert total(client, "reserved") == 0


@pytest.mark.parametrize("fault", ["the device is full", "UCX fails", "UCX does not know the device"])
def test_what_the_device_or_ucx_cannot_do_goes_by_the_host(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed")

    async def fail(*_: Any, **__: Any) -> None:
        raise TransportError(fault)

    def full(*_: Any) -> None:
        raise MemoryError(fault)

    with (
        local_cluster(2, processes=False) as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client, placement=False)
        library = device_standin.library()
        if fault == "the device is full":
            monkeypatch.setattr(carrier, "allocate", full)
        elif fault == "UCX fails":
            monkeypatch.setattr(UCXTransport, "send", fail)
        else:
            monkeypatch.setattr(library, "transports", frozenset({"cuda_copy"}))
        downs, ups = library.downs, library.ups
        check(client, rechunk(client))
        sent_nbytes = sum(worker.extensions["gpurt"].shuffle.sent_nbytes for worker in cluster.workers.values())
        shards_sent = sent_nbytes // SHARD_NBYTES
        assert shards_sent > 0
        # By UCX, memory of a device can be received into memory of the host.
        assert library.downs - downs == (0 if fault == "the device is full" else shards_sent)
        assert library.ups - ups == shards_sent
        for worker in cluster.workers.values():
            ledger = worker.extensions["gpurt"].memory.ledger
            assert ledger.reserved("host") == ledger.reserved("device") == 0


def test_a_shard_that_is_not_what_its_description_says_ends_the_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    def lie(header: Header) -> bytes:
        return encode(dataclasses.replace(header, extra=header.extra.replace(b" rows", b"0 rows")))

    with (
        local_cluster(2, processes=False) as cluster,
        Client(cluster) as client,
    ):
        dask_gpurt.install(client, placement=False, config={"shuffle.transport": "dask"})
        # What goes to peers is described otherwise than it is; the library is not to see it.
        monkeypatch.setattr(run, "encode", lie)
        monkeypatch.setattr(device_standin.Frames, "join", lambda *_: pytest.fail("it was joined"))
        shuffled = tables().shuffle("key", npartitions=3, shuffle_method="p2p")
        with pytest.raises(RuntimeError, match="failed during") as caught:
            client.compute(shuffled).result(60)
        # Of a later input, or of the barrier, which says what a worker has told it.
        assert "WireError(" in repr(caught.value.__cause__)
        assert re.search(r"0 rows\W+ for \d+ rows", str(caught.value.__cause__))
