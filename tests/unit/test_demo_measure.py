"""What the meter's readings add up to; the cluster tests have the real ones."""

from __future__ import annotations

import asyncio
from typing import Any

from dask_gpurt import seams
from dask_gpurt.demo.measure import Meter, traffic
from dask_gpurt.shuffle.transport.ucx import UCXTransport


def test_both_directions_are_joined() -> None:
    sent = {
        "tcp://a:1": {("tcp://a:50", "tcp://b:1"): 10, ("tcp://a:1", "tcp://c:60"): 5},
        "tcp://b:1": {("tcp://b:1", "tcp://a:50"): 1000},
        "tcp://c:1": {("tcp://c:60", "tcp://a:1"): 7},
    }
    assert traffic(sent) == (1022, 0)


def test_scheduler_and_clients_are_left_out() -> None:
    assert traffic({"a": {("a:5", "scheduler"): 100, ("a", "client:77"): 10_000}}) == (0, 0)


def test_what_a_worker_sends_to_itself_is_kept_apart() -> None:
    assert traffic({"a": {("a:5", "a"): 100, ("a", "a:5"): 10}, "b": {}}) == (0, 110)


def test_the_seam_is_there() -> None:
    assert [problem for seam in seams.DEMO if (problem := seam.problem()) is not None] == []


class _Comm:
    local_address = "here"
    peer_address = "there"

    async def write(self, msg: Any) -> Any:
        return len(msg)


def test_removing_the_meter_puts_the_comms_back(monkeypatch: Any) -> Any:
    monkeypatch.setattr(seams, "comm_classes", lambda: (_Comm,))
    original = _Comm.write
    meter: Any = Meter()
    meter.setup(None)

    async def write_twice() -> Any:
        comm = _Comm()
        return await comm.write("abc"), await comm.write("de")

    assert asyncio.run(write_twice()) == (3, 2)
    assert meter.read().sent_nbytes == {("here", "there"): 5}
    meter.teardown(None)
    assert _Comm.write is original


def test_removing_the_meter_puts_the_transport_back(monkeypatch: Any) -> None:
    async def send(_self: Any, _peer: Any, _tag: Any, _buffers: Any) -> None:
        pass

    monkeypatch.setattr(seams, "comm_classes", lambda: ())
    monkeypatch.setattr(UCXTransport, "send", send)
    meter: Any = Meter()
    meter.setup(None)
    transport: Any = object()
    asyncio.run(UCXTransport.send(transport, b"", 1, [memoryview(b"abc"), memoryview(b"de")]))
    assert meter.read().ucx_nbytes == 5
    meter.teardown(None)
    assert UCXTransport.send is send
