"""What carries the messages: UCX, Dask's comms, and the one after the other has failed."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import dask
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from distributed import Client, LocalCluster
from distributed.security import Security

import dask_gpurt
from dask_gpurt.shuffle import carrier as carrier_module
from dask_gpurt.shuffle.carrier import Carrier
from dask_gpurt.shuffle.transport.ucx import TransportError, UCXTransport

pytest.importorskip("ucxx", reason="ucxx is not installed")

ROWS = 60_000


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {"key": rng.integers(0, 1000, ROWS), "value": rng.random(ROWS), "s": rng.choice(["a", "bc"], ROWS)}
    )


@asynccontextmanager
async def workers(transport: str = "auto", **options: Any) -> AsyncIterator[tuple[LocalCluster, Client, Any]]:
    async with (
        local_cluster(2, 2, processes=False, asynchronous=True, **options) as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        with dask.config.set({"gpurt.shuffle.transport": transport}):
            installation: Any = await dask_gpurt.install(client, placement=False)  # type: ignore[misc]
        yield cluster, client, installation


async def shuffle(client: Client) -> None:
    data = frame()
    source = dd.from_pandas(data, npartitions=4, sort=False)
    found = await client.compute(source.shuffle("key", npartitions=3, shuffle_method="p2p"))
    pd.testing.assert_frame_equal(found.sort_index(), await client.compute(source))


def carriers(cluster: Any) -> list[Carrier]:
    return [worker.extensions["gpurt"].shuffle.carrier for worker in cluster.workers.values()]


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def test_by_ucx() -> None:
    async def main() -> None:
        async with workers() as (cluster, client, installation):
            assert "(by UCX)" in str(installation)
            # The first run may end before UCX is there.
            while not all(carrier.ucx_nbytes for carrier in carriers(cluster)):
                await shuffle(client)

    run(main())


def secrets_of(cluster: Any) -> list[bytes]:
    """What tells secrets apart, and does not tell them."""
    plugins = [worker.plugins["gpurt"] for worker in cluster.workers.values()]
    return [plugin.secret.sign("test") for plugin in plugins]


def test_workers_of_an_installation_know_its_secret_and_no_log_does(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with workers() as (cluster, client, installation):
            first, again = secrets_of(cluster)
            assert first == again
            keys = {worker.plugins["gpurt"].secret._key for worker in cluster.workers.values()}
            shown = [caplog.text, repr(installation), repr(carriers(cluster)), repr(cluster.scheduler)]
            shown += [repr(vars(worker.plugins["gpurt"])) for worker in cluster.workers.values()]
            shown.append(repr(await client.run_on_scheduler(lambda dask_scheduler: dask_scheduler.identity())))
            shown.append(repr(await client.get_events("gpurt")))
            assert not [key for key in keys for text in shown if key.hex() in text or repr(key) in text]
            # Another installation has another one, and so has a worker of which the scheduler knows nothing.
            await dask_gpurt.install(client, placement=False)  # type: ignore[misc]
            second, again = secrets_of(cluster)
            assert second == again != first

    with caplog.at_level("DEBUG"):
        run(main())


def test_a_worker_without_a_secret_does_not_start_ucx() -> None:
    async def main() -> None:
        async with workers() as (cluster, _, _):
            worker = next(iter(cluster.workers.values()))
            carrier = Carrier(worker, worker.extensions["gpurt"].shuffle, ucx=True)
            assert carrier.path() == "by Dask's comms: the scheduler has given no secret"
            assert await carrier.address() is None

    run(main())


@pytest.mark.parametrize("lie", [b"", b"x" * 300, "text", 7, ["list"]])
def test_a_peer_whose_address_is_none_is_served_by_dasks_comms(caplog: pytest.LogCaptureFixture, lie: object) -> None:
    async def main() -> None:
        async with workers() as (cluster, client, _):
            for carrier, worker in zip(carriers(cluster), cluster.workers.values(), strict=True):
                assert await carrier.address() is not None

                async def address(asker: str, peer: bytes) -> object:
                    return lie

                worker.handlers["gpurt_shuffle_address"] = address
            await shuffle(client)
            assert "UCX is not used to" in caplog.text
            assert all(carrier.ucx_nbytes == 0 for carrier in carriers(cluster))

    run(main())


def test_who_asks_with_an_address_that_is_none_is_told_none(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with workers() as (cluster, _, _):
            carrier, other = carriers(cluster)
            own = await other.address()
            assert own is not None
            assert await carrier.address("tcp://127.0.0.1:1", own) is not None
            assert await carrier.address("tcp://127.0.0.1:1", own[:-1] + b"x") is None
            assert "UCX is not used with tcp://127.0.0.1:1" in caplog.text
            assert carrier._askers == {"tcp://127.0.0.1:1": {own}}

    run(main())


def test_a_worker_that_has_left_is_forgotten_by_those_to_whom_it_has_sent() -> None:
    async def main() -> None:
        async with workers() as (cluster, client, _):
            while not all(carrier.ucx_nbytes for carrier in carriers(cluster)):
                await shuffle(client)
            left, stays = carriers(cluster)
            engine: Any = stays._transport._engine  # type: ignore[union-attr]
            incarnation = left._transport._engine.address.incarnation  # type: ignore[union-attr]
            assert engine._handshake.proven(incarnation)
            # As if it had only received from it.
            address = left._worker.address
            assert stays._peers.pop(address) == left._transport.address  # type: ignore[union-attr]
            await client.retire_workers([address])
            while engine._handshake.proven(incarnation) or engine._endpoints:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert address not in stays._askers

    run(main())


def test_by_dasks_comms_with_credits(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(carrier_module, "EAGER_NBYTES", 1000)
        async with workers("dask") as (cluster, client, installation):
            assert "(by Dask's comms: so it is configured)" in str(installation)
            await shuffle(client)
            assert all(carrier.credit_wait_s > 0 and not carrier.ucx_nbytes for carrier in carriers(cluster))
            for worker in cluster.workers.values():
                assert worker.extensions["gpurt"].memory.ledger.reserved("host") == 0

    run(main())


def test_what_is_encrypted_stays_encrypted(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography", reason="makes the certificates")

    async def main() -> None:
        security = Security.temporary()
        async with workers(security=security, protocol="tls") as (cluster, client, installation):
            assert "encrypted" in str(installation)
            opened: list[object] = []
            monkeypatch.setattr(UCXTransport, "open", lambda *args, **_: opened.append(args))
            await shuffle(client)
            for carrier in carriers(cluster):
                # Nor does it when a peer asks for it.
                assert await carrier.address() is None
                assert carrier.ucx_nbytes == 0
            assert not opened

    run(main())


@pytest.mark.parametrize("side", ["send", "receive"])
def test_dasks_comms_carry_on_when_ucx_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    async def main() -> None:
        async with workers() as (cluster, client, _):
            for carrier in carriers(cluster):
                assert await carrier.address() is not None

            async def fail(*_: Any, **__: Any) -> None:
                raise TransportError("on purpose")

            monkeypatch.setattr(UCXTransport, side, fail)
            await shuffle(client)
            assert "is given up, Dask's comms carry on: on purpose" in caplog.text
            assert all(carrier.ucx_nbytes == 0 for carrier in carriers(cluster))
            for worker in cluster.workers.values():
                assert worker.extensions["gpurt"].memory.ledger.reserved("host") == 0

    run(main())


def test_without_ucx(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        async with workers() as (_, client, installation):
            assert "(by Dask's comms: ucxx is not installed)" in str(installation)
            monkeypatch.undo()
            await shuffle(client)

    run(main())


def test_workers_outlive_what_their_scheduler_says_after_an_uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker does not know closes it, and what was sent before an uninstall may come after it."""

    async def main() -> None:
        async with workers() as (cluster, client, _):
            await shuffle(client)
            scheduler: Any = cluster.scheduler
            leaving, staying = scheduler.workers
            late: list[dict[str, Any]] = []
            stream = scheduler.stream_comms[staying]
            monkeypatch.setattr(stream, "send", lambda *messages: late.extend(messages))
            await scheduler.remove_worker(leaving, stimulus_id="test")
            monkeypatch.undo()
            assert "remove-worker" in [message["op"] for message in late]
            await dask_gpurt.uninstall(client)  # type: ignore[misc]
            stream.send(*late)
            # It comes after them.
            assert await client.submit(lambda: "here", workers=[staying], pure=False) == "here"

    run(main())


def test_nothing_is_left_behind() -> None:
    async def main() -> None:
        async with workers() as (cluster, client, _):
            await shuffle(client)
            before = carriers(cluster)
            # They hear of the end of a run when its results are there already, and it keeps what it needs until then.
            while any(worker.extensions["gpurt"].shuffle.states() for worker in cluster.workers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            await dask_gpurt.uninstall(client)  # type: ignore[misc]
            for worker in cluster.workers.values():
                assert not [name for name in worker.handlers if name.startswith("gpurt")]
                assert not [name for name in worker.stream_handlers if name.startswith("gpurt")]
            assert all("closed" in repr(carrier) for carrier in before if "UCXTransport" in repr(carrier))
            await shuffle(client)

    run(main())
