"""Traces of a job that is known, recorded on real processes; jobs with little room."""

from __future__ import annotations

from typing import Any

import dask.array as da
import pytest
from distributed import Client, wait

from benchmarks.spilling.bound import least_nbytes
from benchmarks.spilling.clusters import Limited, beside_stock
from benchmarks.spilling.recorder import record_on_cluster
from benchmarks.spilling.replay import replay_lru, replay_ours
from benchmarks.spilling.trace import Delete, Graph, Known, Put, Seen, Serve, Start, Trace

BLOCKS = 8
BLOCK_NBYTES = 8 * 256 * 256


def job(client: Client) -> Any:
    x = da.random.default_rng(0).random((BLOCKS * 256, 256), chunks=(256, 256)).persist()
    wait(x)
    for number in range(2):
        (x + number).sum().compute()
    return x


def puts(trace: Trace) -> list[Put]:
    return [event for event in trace.events if isinstance(event, Put)]


def test_a_job_on_two_workers() -> None:
    ((name, found),) = record_on_cluster({"job": job})
    assert name == "job"
    assert len(found) == 2
    blocks = [put for trace in found for put in puts(trace) if put.nbytes == BLOCK_NBYTES]
    # Stock may send one to the other worker, where it is put once more.
    assert len({put.key for put in blocks}) == BLOCKS
    assert all(put.buffer_nbytes == BLOCK_NBYTES for put in blocks)
    for trace in found:
        check_order(trace)
        peak_nbytes = trace.peak_nbytes
        assert peak_nbytes >= BLOCK_NBYTES
        assert replay_ours(trace, peak_nbytes).nbytes == replay_lru(trace, 2 * peak_nbytes).nbytes == 0
        assert least_nbytes(trace, peak_nbytes) == 0
    # The blocks are read in two passes, with room for a quarter of them.
    reads = sum(
        put.key in event.inputs for put in blocks for trace in found for event in trace.events if type(event) is Start
    )
    assert reads >= 2 * BLOCKS
    moved = sum(replay_ours(trace, trace.peak_nbytes // 4).nbytes for trace in found)
    least = sum(least_nbytes(trace, trace.peak_nbytes // 4) for trace in found)
    assert moved >= least > 0


def check_order(trace: Trace) -> None:
    """What a worker does comes after the scheduler's knowledge of it, and after its own."""
    known: set[Any] = set()
    executing: set[Any] = set()
    there: set[Any] = set()
    done: set[Any] = set()
    for event in trace.events:
        match event:
            case Graph(tasks, wanted):
                known |= {key for key, _, _ in tasks}
                assert known.issuperset(wanted)
                assert all(len(priority) > 1 for _, priority, _ in tasks)
            case Seen(key, state):
                assert key in known
                if state == "executing":
                    executing.add(key)
            case Start(key, inputs):
                assert key in executing
                assert there.issuperset(inputs)
            case Put(key):
                assert key in known
                there.add(key)
            case Delete(key):
                assert key in done
                there.remove(key)
            case Serve(keys):
                assert there.issuperset(keys)
            case Known(key, state, worker):
                assert key in known
                assert (worker is not None) >= (state == "processing")
                if state == "memory":
                    done.add(key)
            case _:
                pass
    assert there <= done


@pytest.mark.slow
def test_a_job_with_little_room_ends_with_equal_answers_on_both_sides() -> None:
    ((name, ours, stock),) = beside_stock(["spilltest"], Limited(scale=1, part=0.25), pairs=1)
    assert name == "spilltest"
    for run in (*ours, *stock):
        assert run.wall_s > run.tick_s > 0
