"""Small inputs do not wait for the event loop, and are no more than one ahead of it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from dask_gpurt.shuffle.account import Account
from dask_gpurt.shuffle.dataframe import FrameRun
from dask_gpurt.shuffle.run import HANDED_NBYTES


class GatedRun(FrameRun):
    """Dispatches when it is let."""

    gate: asyncio.Event
    dispatched: list[str]
    error: Exception | None = None

    async def _dispatch(self, messages: Any, own: Any) -> None:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.dispatched.append(messages)


class Flushed:
    """Stands for the outbox."""

    def __init__(self, run: Any) -> None:
        self.run = run
        self.saw: list[str] = []

    async def flush(self) -> None:
        self.saw = list(self.run.dispatched)


@contextlib.contextmanager
def a_loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def a_run() -> Iterator[tuple[GatedRun, Callable[[], None]]]:
    """A run, and what opens its gate."""
    with a_loop() as loop:
        run = object.__new__(GatedRun)
        gate = asyncio.Event()
        vars(run).update(
            gate=gate,
            dispatched=[],
            closed=False,
            _exception=None,
            _ahead={},
            _kept=None,
            _repairing=set(),
            account=Account(0.0),
            _outbox=Flushed(run),
            _loop=SimpleNamespace(asyncio_loop=loop),
        )

        def open_gate() -> None:
            loop.call_soon_threadsafe(gate.set)

        yield run, open_gate
        open_gate()
        for ahead in run._ahead.values():
            ahead.exception(30)


def hand_over(run: GatedRun, name: Any, nbytes: int = 1) -> None:
    run._hand_over(name, [], nbytes)


def test_a_small_input_does_not_wait_and_the_next_one_waits_for_it() -> None:
    with a_run() as (run, open_gate), ThreadPoolExecutor(1) as thread:
        thread.submit(hand_over, run, "first").result(30)
        assert run.dispatched == []
        second = thread.submit(hand_over, run, "second")
        assert not second.done()
        open_gate()
        second.result(30)
        assert run.dispatched[:1] == ["first"]


def test_each_thread_has_one_ahead() -> None:
    with a_run() as (run, open_gate), ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(hand_over, run, "one").result(30)
        other.submit(hand_over, run, "other").result(30)
        assert len(run._ahead) == 2
        open_gate()


def test_a_large_input_waits() -> None:
    with a_run() as (run, open_gate), ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(hand_over, run, "large", HANDED_NBYTES + 1)
        assert not run._ahead
        open_gate()
        waiting.result(30)
        assert run.dispatched == ["large"]


def test_the_end_of_the_inputs_waits_for_what_is_ahead() -> None:
    with a_run() as (run, open_gate), ThreadPoolExecutor(1) as thread:
        thread.submit(hand_over, run, "last").result(30)
        done = run._call(run.inputs_done)
        assert not done.done()
        open_gate()
        done.result(30)
        assert run._outbox.saw == ["last"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["next input", "end of inputs"])
def test_what_goes_wrong_ahead_is_heard_of(by: str) -> None:
    with a_run() as (run, open_gate), ThreadPoolExecutor(1) as thread:
        run.error = OSError("no room")
        thread.submit(hand_over, run, "first").result(30)
        heard = thread.submit(hand_over, run, "second") if by == "next input" else run._call(run.inputs_done)
        open_gate()
        with pytest.raises(OSError, match="no room"):
            heard.result(30)
