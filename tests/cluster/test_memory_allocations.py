"""Workers on a device that is too small, with a stand-in for it: allocations of tasks that fail, and what becomes of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import cloudpickle
import pytest
import rmm_standin
from clusters import local_cluster
from distributed import Client, wait

import dask_gpurt

# The servers cannot import this module; the stand-in they can, by the path that they have from here.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Of each array, and of the device, which holds ten of them.
NBYTES, CAPACITY = 2**20, 10 * 2**20 + 1000


@pytest.fixture
def client() -> Iterator[Client]:
    with local_cluster(1, 2, memory_limit="1 GiB") as cluster, Client(cluster) as client:
        client.run(rmm_standin.plant, CAPACITY)
        # What tasks need is not in the books, so that the limit alone does not keep them from failing.
        answer = dask_gpurt.install(client, placement=False, config={"memory.device-limit": CAPACITY})
        assert answer.installed("memory"), str(answer)
        yield client


def make(number: int) -> rmm_standin.Array:
    return rmm_standin.Array(number, NBYTES)


def work(array: rmm_standin.Array, scratch: int) -> int:
    """Need ``scratch`` arrays while running."""
    held = [rmm_standin.Array(0, NBYTES) for _ in range(scratch)]
    return array.number + len(held)


def figures(dask_worker: Any = None) -> dict[str, int]:
    found: dict[str, int] = dask_worker.extensions["gpurt"].memory.metrics()
    return found


def test_tasks_that_need_more_than_is_free_run_and_the_data_is_right(client: Client) -> None:
    arrays = client.map(make, range(10))
    wait(arrays)
    results = client.map(work, arrays, scratch=4)
    assert client.gather(results) == [number + 4 for number in range(10)]
    (found,) = client.run(figures).values()
    assert found["device_allocation_failures"] > 0
    assert found["device_allocation_refusals"] == 0
    assert found["device_written_nbytes"] > 0
    numbers = client.map(lambda array: array.number, arrays)
    assert client.gather(numbers) == list(range(10))


def test_one_that_needs_too_much_fails_with_the_story_and_the_worker_goes_on(client: Client) -> None:
    arrays = client.map(make, range(4))
    (address,) = client.run(lambda: None)
    with pytest.raises(MemoryError) as caught:
        client.submit(work, arrays[0], scratch=12, key="greedy", retries=0).result(timeout=30)
    for part in ("task 'greedy' on worker " + address, "asked for 1.00 MiB", "dask-gpurt holds"):
        assert part in str(caught.value)
    assert client.gather(client.map(work, arrays, scratch=3)) == [3, 4, 5, 6]
    assert list(client.run(lambda: None)) == [address]


def test_the_allocator_is_as_it_was_when_dask_gpurt_is_gone(client: Client) -> None:
    def upstream() -> str:
        return type(sys.modules["rmm"].mr.get_current_device_resource().upstream_mr).__name__

    assert set(client.run(upstream).values()) == {"Resource"}
    arrays = client.map(make, range(4))
    wait(arrays)
    dask_gpurt.uninstall(client)
    assert set(client.run(upstream).values()) == {"Device"}
    assert client.gather(client.map(lambda array: array.number, arrays)) == list(range(4))


async def look_again(dask_worker: Any = None) -> None:
    await dask_worker.extensions["gpurt"].memory._decay()


def test_an_allocator_that_was_put_in_the_place_of_ours_is_found(client: Client) -> None:
    def another() -> None:
        mr = sys.modules["rmm"].mr
        mr.set_current_device_resource(rmm_standin.Resource(mr.device))

    # As a library does that sets up a pool of its own.
    client.run(another)
    assert client.submit(lambda: make(5).number).result(timeout=30) == 5
    client.run(look_again)
    arrays = client.map(make, range(10))
    wait(arrays)
    assert client.submit(work, arrays[7], scratch=5).result(timeout=30) == 12
    (found,) = client.run(figures).values()
    assert found["device_allocation_failures"] > 0
