"""Replay and bound of the benchmark of spilling, on traces whose bytes can be counted by hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import pytest

from benchmarks.spilling import disk
from benchmarks.spilling.bound import least_nbytes
from benchmarks.spilling.clusters import Limited
from benchmarks.spilling.replay import Moved, replay_lru, replay_oracle, replay_ours
from benchmarks.spilling.trace import Delete, End, Graph, Known, Put, Seen, Serve, Start, Trace
from benchmarks.spilling.views import ReplayedScheduler, ReplayedWorker
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.horizon import IDLE, RECENT, Kind, Use
from dask_gpurt.memory.manager import WorkerHorizon

#: Blocks that are not too small to be moved.
MB = 2**20


def put(key: str, nbytes: int = MB, buffer: str | None = None, buffer_nbytes: int | None = None) -> Put:
    return Put(key, nbytes, buffer or key, buffer_nbytes or nbytes)


def run(key: str, *inputs: str) -> tuple[Start, End]:
    return Start(key, inputs), End(key)


#: Room for two of three blocks, which are read one after another, twice; a client holds them.
CYCLE = Trace(
    (
        Graph((), ("a", "b", "c")),
        *map(put, "abc"),
        *(event for number in range(2) for key in "abc" for event in run(f"read-{key}-{number}", key)),
    )
)


def test_stock_moves_every_block_of_a_cycle_every_time() -> None:
    # a goes when c comes; from then on, what is needed next has always just gone, and what goes is written again.
    assert replay_lru(CYCLE, 2 * MB) == Moved(written_nbytes=7 * MB, read_nbytes=6 * MB, waits=6)


def test_ours_moves_less_in_a_cycle() -> None:
    moved = replay_ours(CYCLE, 2 * MB)
    assert moved.nbytes < replay_lru(CYCLE, 2 * MB).nbytes
    # Each block is written once at most: its copy stays good.
    assert moved.written_nbytes <= 3 * MB
    assert moved.waits <= 4


def test_the_oracle_drops_what_nobody_will_ask_for() -> None:
    trace = Trace((put("a"), put("b"), put("c"), *run("read", "b"), Delete("a"), Delete("b"), Delete("c")))
    assert replay_oracle(trace, MB).written_nbytes == 0
    assert replay_lru(trace, MB).written_nbytes == 3 * MB
    assert least_nbytes(trace, MB) == 0


def test_nothing_moves_where_there_is_room() -> None:
    for replay in (replay_ours, replay_oracle, replay_lru):
        assert replay(CYCLE, 3 * MB).nbytes == 0
    assert least_nbytes(CYCLE, 3 * MB) == 0


def test_the_bound_of_a_cycle() -> None:
    # One of three does not fit at any time: a goes down when c comes, up for its read, when c can go, which comes up for
    # its own read, and so on: of each three reads that follow one another, one finds its block below in the second cycle.
    assert least_nbytes(CYCLE, 2 * MB) / MB == pytest.approx(4.0)


def test_a_peer_is_served_from_below() -> None:
    trace = Trace((Graph((), ("a", "b")), put("a"), put("b"), Serve(("a",)), Serve(("b",))))
    # Each is read as it lies; the one that is in memory goes to make room for the frames.
    assert replay_ours(trace, MB) == Moved(2 * MB, 2 * MB, waits=2)
    # Stock brings up what it sends, and writes the other, and writes it again when it goes.
    assert replay_lru(trace, MB) == Moved(3 * MB, 2 * MB, waits=2)
    assert least_nbytes(trace, MB) / MB == pytest.approx(2.0)


def test_what_a_client_holds_has_to_be_kept() -> None:
    events = (put("a"), put("b"))
    assert least_nbytes(Trace(events), MB) == 0
    assert least_nbytes(Trace((Graph((), ("a", "b")), *events)), MB) / MB == pytest.approx(1.0)
    # Until the client lets go of it: that is before b comes.
    held = Trace((Graph((), ("a", "b")), put("a"), Known("a", "released"), put("b")))
    assert least_nbytes(held, MB) == 0


def test_views_take_no_room_of_their_own() -> None:
    names = tuple(f"view-{n}" for n in range(4))
    views = [put(name, MB, "base", 4 * MB) for name in names]
    trace = Trace((Graph((), names), *views, *run("read", *names)))
    assert trace.peak_nbytes == 4 * MB
    assert replay_ours(trace, 4 * MB).nbytes == 0
    assert least_nbytes(trace, 4 * MB) == 0
    # Each of them can be written by itself; what it lay in is free when all have gone.
    more = (put("more", 4 * MB), *run("m", "more"))
    assert least_nbytes(Trace((*trace.events[:5], *more)), 4 * MB) / MB == pytest.approx(4.0)


def test_what_was_read_back_shares_nothing() -> None:
    names = ("view-0", "view-1")
    views = [put(name, 3 * MB, "base", 4 * MB) for name in names]
    # All goes for "big", and comes back as two values of 3 MB, of which 2 MB have no room when both are not in use.
    passes = (event for number in range(4) for event in run(f"b{number}", "big"))
    trace = Trace((Graph((), names), *views, put("big", 4 * MB), *passes, Delete("big"), *run("v", *names)))
    moved = replay_oracle(trace, 4 * MB)
    assert (moved.written_nbytes, moved.read_nbytes) == (6 * MB, 6 * MB)
    assert least_nbytes(trace, 4 * MB) / MB == pytest.approx(12.0)


def test_what_is_beyond_the_capacity_is_told() -> None:
    # A view that a task holds keeps the whole, with all that the others could do.
    trace = Trace((put("view", MB, "base", 4 * MB), Start("t", ("view",)), put("x"), put("y")))
    assert replay_ours(trace, 2 * MB).beyond_nbytes <= 2 * MB


def test_a_replayed_worker_is_seen_as_the_real_one() -> None:
    worker: Any = ReplayedWorker(nworkers=2)
    horizon = WorkerHorizon(worker)
    worker.see(Seen("x", "memory", None, None))
    # A worker appends a number of its own to the priorities.
    worker.see(Seen("now", "executing", (0, 1, 4, -1), ()))
    worker.see(Seen("first", "ready", (0, 1, 5, -2), ()))
    worker.see(Seen("later", "waiting", (0, 1, 10, -3), ("x", "y")))
    (use,) = horizon.uses(["x"])
    assert use == Use(Kind.NEXT, 1.0)
    worker.see(Seen("later", "executing", (0, 1, 10, -3), None))
    assert horizon.uses(["y"])[0].kind is Kind.RUNNING
    worker.see(Seen("later", "forgotten", None, None))
    assert horizon.uses(["x"]) == [IDLE]


def test_a_replayed_scheduler_tells_what_the_real_one_would() -> None:
    worker: Any = ReplayedWorker(nworkers=1)
    horizon = WorkerHorizon(worker)
    scheduler = ReplayedScheduler(horizon)
    worker.see(Seen("now", "executing", (0, 1, 0, -1), ()))
    scheduler.update_graph(Graph((("x", (0, 1, 0), ()), ("later", (0, 1, 7), ("x",))), ("later",)))
    scheduler.add_replica("x")
    scheduler.watch()
    for key, state in (("x", "memory"), ("later", "queued")):
        scheduler.transition(Known(key, state))
    assert horizon.uses(["x"]) == [IDLE]
    scheduler.tell()
    assert horizon.uses(["x"]) == [Use(Kind.NEXT, 7.0)]
    # Another worker got it: that one asks for x in a moment.
    scheduler.transition(Known("later", "processing", "another"))
    scheduler.tell()
    assert horizon.uses(["x"]) == [RECENT]
    # Here it is given to this one, which hears of that first.
    scheduler.transition(Known("later", "queued"))
    scheduler.tell()
    scheduler.transition(Known("later", "processing", ""))
    scheduler.tell()
    assert horizon.uses(["x"]) == [Use(Kind.NEXT, 7.0)]
    scheduler.see(Seen("later", "waiting", (0, 1, 7), ("x",)))
    scheduler.tell()
    assert horizon.uses(["x"]) == [RECENT]


def test_a_scaled_trace_moves_as_much_more() -> None:
    assert replay_lru(CYCLE.scaled(3), 6 * MB).nbytes == 3 * replay_lru(CYCLE, 2 * MB).nbytes
    assert CYCLE.scaled(3).peak_nbytes == 9 * MB


def test_the_mark_of_both_sides_is_the_room_that_a_job_has() -> None:
    limited = Limited(scale=32, part=0.25)
    assert limited.capacity_nbytes == 256 * MB  # of 2 GB on two workers
    limit = limited.spec.memory_limit_nbytes
    marks = [limited.config[f"distributed.worker.memory.{mark}"] for mark in ("target", "spill", "pause")]
    assert marks == sorted(marks)
    assert marks[0] == pytest.approx(256 * MB / limit)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where workers would have their files, which are small here."""
    monkeypatch.setattr(disk, "VALUE_NBYTES", 4 * MB)
    with dask.config.set({"temporary-directory": str(tmp_path)}):
        yield tmp_path
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("direct", "folder")
def test_files_are_measured_as_long_as_there_are_any() -> None:
    found = disk.file_store(12 * MB, pairs=2)
    assert found is not None
    for rates in found:
        assert len(rates.ours) == len(rates.raw) == 2
        assert min(*rates.ours, *rates.raw) > 0


@pytest.mark.usefixtures("folder")
def test_where_files_cannot_go_past_the_cache_there_is_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.open

    def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return honest(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    assert disk.file_store(12 * MB, pairs=2) is None


@pytest.mark.usefixtures("direct", "folder")
@pytest.mark.parametrize("fault", [errno.EINVAL, errno.EIO])
def test_files_of_ours_that_fail_are_not_taken_for_a_file_system_that_refuses(
    fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(SpillFolder, "write", fail)
    with pytest.raises(OSError, match=os.strerror(fault)):
        disk.file_store(12 * MB, pairs=2)
