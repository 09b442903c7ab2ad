"""dask-cuda's cluster, numba's device arrays and UCX on the emulated CUDA driver, with dask-gpurt on them.

See tests/emulated_cuda/README.md for what this shows, and what it does not.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cloudpickle
import numpy as np
import pytest
from cuda_emulation import emulated
from device_exchange import exchange_between_two
from distributed import Client, wait

import dask_gpurt
from benchmarks.spilling.clusters import has_spilled

pytest.importorskip("dask_cuda", reason="dask-cuda makes the cluster")
pytest.importorskip("numba_cuda", reason="numba-cuda makes the arrays")

# The servers cannot import this module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MIB = 2**20


def numba_cuda() -> Any:
    return importlib.import_module("numba.cuda")


def on_host(number: int) -> Any:
    return np.random.default_rng(number).integers(0, 100, MIB, "u1")


def make(number: int) -> Any:
    """Make a device array."""
    return numba_cuda().to_device(on_host(number))


def add(left: Any, right: Any) -> Any:
    """Add device arrays; there are no kernels here."""
    return numba_cuda().to_device(left.copy_to_host() + right.copy_to_host())


def read(value: Any) -> Any:
    """Copy to the host."""
    return value.copy_to_host()


def figures(dask_worker: Any) -> dict[str, Any]:
    memory = dask_worker.extensions["gpurt"].memory
    return {"limit": memory.ledger.limit("device"), "pid": os.getpid(), **memory.metrics()}


def total(client: Client, what: str) -> int:
    return sum(each[what] for each in client.run(figures).values())


@contextmanager
def workers(count: int, device_limit: object, **config: object) -> Iterator[Client]:
    with (
        importlib.import_module("dask_cuda").LocalCUDACluster(
            n_workers=count,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit="1 GiB",
            device_memory_limit=device_limit,
        ) as cluster,
        Client(cluster) as client,
    ):
        answer = dask_gpurt.install(client, config=config)
        assert answer.installed("memory"), str(answer)
        yield client


@emulated(devices=2, capacity=32 * MIB)
def test_a_job_of_twice_the_device_limit_with_a_worker_that_is_killed() -> None:
    count = 32
    with workers(2, "8 MiB") as client:
        arrays = client.map(make, range(count))
        wait(arrays, timeout=60)
        found = client.run(figures)
        assert len(found) == 2
        for each in found.values():
            assert each["limit"] == 8 * MIB, "dask-cuda's"
            assert each["device_held_nbytes"] <= 9 * MIB, "a result lies over the limit until something has gone down"
        # Whichever of the two has made more of them.
        assert total(client, "device_written_nbytes") >= (count - 2 * 9) * MIB
        assert any(client.run(has_spilled).values()), "as the benchmark of it asks"
        sums = client.map(add, arrays, arrays[::-1])
        wait(sums[: count // 4], timeout=60)
        # Not the one that the client's futures would show first.
        os.kill(max(each["pid"] for each in client.run(figures).values()), signal.SIGKILL)
        results = client.gather(client.map(read, sums))
        for number, result in enumerate(results):
            left, right = (np.random.default_rng(n).integers(0, 100, MIB, "u1") for n in (number, count - 1 - number))
            np.testing.assert_array_equal(result, left + right)
        assert total(client, "device_corrupt_blocks") == 0
        assert total(client, "device_read_nbytes") > 0


def greedy(nbytes: int) -> int:
    """Allocate more than the ledger knows of, as a task does for what it computes with."""
    return int(numba_cuda().to_device(np.ones(nbytes, "u1")).copy_to_host().sum())


@emulated(capacity=16 * MIB)
def test_a_task_that_finds_the_device_full_runs_again_when_there_is_room() -> None:
    with workers(1, None, **{"memory.device-limit": 15 * MIB}) as client:
        arrays = client.map(make, range(12))
        wait(arrays, timeout=60)
        assert total(client, "device_written_nbytes") == 0, "there is room for these"
        assert client.submit(greedy, 8 * MIB).result(timeout=60) == 8 * MIB
        assert total(client, "device_written_nbytes") >= 4 * MIB
        # More than there is: the task fails, and the worker goes on.
        with pytest.raises(Exception, match="CUDA_ERROR_OUT_OF_MEMORY"):
            client.submit(greedy, 17 * MIB).result(timeout=60)
        for number, result in enumerate(client.gather(client.map(read, arrays))):
            np.testing.assert_array_equal(result, on_host(number))
        assert len(set(client.run(os.getpid).values())) == 1
        dask_gpurt.uninstall(client)
        np.testing.assert_array_equal(client.submit(read, arrays[3]).result(timeout=60), on_host(3))


# By itself UCX takes 512 MiB of a device for fragments of what it stages.
@emulated(devices=2, capacity=64 * MIB, UCX_RNDV_FRAG_ALLOC_COUNT="host:8,cuda:2")
def test_device_arrays_go_from_one_process_to_another_by_ucx() -> None:
    pytest.importorskip("ucxx", reason="ucxx is not installed", exc_type=ImportError)
    with workers(2, None) as client:
        exchange_between_two(client, "numba", "cuda_copy")


def islands_of(dask_scheduler: Any) -> dict[str, Any]:
    near = dask_scheduler.plugins["gpurt"].placement.near
    return {str(ws.name): near(ws.address) for ws in dask_scheduler.workers.values()}


@emulated(devices=4, capacity=32 * MIB, nvlink=2)
def test_the_scheduler_knows_which_gpus_are_joined() -> None:
    with workers(4, None) as client:
        assert client.run_on_scheduler(islands_of) == {
            "0": "127.0.0.1 nvlink-0",
            "1": "127.0.0.1 nvlink-0",
            "2": "127.0.0.1 nvlink-2",
            "3": "127.0.0.1 nvlink-2",
        }
