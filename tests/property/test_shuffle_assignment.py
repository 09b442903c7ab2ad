"""Which worker makes which output: everybody live, nothing torn apart for nothing, and close to the best there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.shuffle.assignment import TOLERANCE, Host, assign, fullness, ranges, targets

sizes_st = st.lists(st.integers(0, 10**12), min_size=1, max_size=60)
workers_st = st.integers(1, 7)


def even(workers: int) -> np.ndarray:
    return np.full(workers, 1 / workers)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 10**9))
def test_even_outputs_stay_where_stock_has_them(outputs: int, workers: int, nbytes: int) -> None:
    stock = ranges(outputs, workers)
    assert (assign(stock, np.full(outputs, float(nbytes)), even(workers)) == stock).all()


@given(st.integers(1, 300), st.integers(1, 40))
def test_ranges_are_those_of_stock(outputs: int, workers: int) -> None:
    from distributed.shuffle._shuffle import _get_worker_for_range_sharding

    names = [str(worker) for worker in range(workers)]
    expected = [_get_worker_for_range_sharding(outputs, output, names) for output in range(outputs)]
    assert [names[worker] for worker in ranges(outputs, workers)] == expected


@given(sizes_st, st.lists(st.integers(1, 16), min_size=1, max_size=7), st.data())
def test_each_output_has_a_worker_and_balance_is_never_worse_than_with_ranges(
    sizes: list[int], threads: list[int], data: st.DataObject
) -> None:
    workers = len(threads)
    shares = targets([Host(count) for count in threads], None)
    of = np.array(sizes, dtype=float)
    stock = ranges(len(of), workers)
    found = assign(stock, of, shares)
    assert found.shape == of.shape
    assert found.min() >= 0
    assert found.max() < workers
    assert fullness(found, of, shares) <= fullness(stock, of, shares)
    assert (found == assign(stock, of, shares)).all()
    wanted = np.array(data.draw(st.lists(st.integers(-1, workers - 1), min_size=len(of), max_size=len(of))))
    found = assign(stock, of, shares, wanted)
    assert found.min() >= 0
    assert found.max() < workers
    assert fullness(found, of, shares) <= fullness(stock, of, shares) * (1 + TOLERANCE) * (1 + 1e-9)


@given(st.lists(st.integers(1, 100), min_size=4, max_size=9), st.integers(2, 3))
def test_equal_workers_are_within_four_thirds_of_the_best_that_there_is(sizes: list[int], workers: int) -> None:
    of = np.array(sizes, dtype=float)
    found = np.bincount(assign(ranges(len(of), workers), of, even(workers)), of, minlength=workers).max()
    best = min(
        np.bincount(way, of, minlength=workers).max() for way in itertools.product(range(workers), repeat=len(of))
    )
    assert found <= 4 / 3 * best * (1 + TOLERANCE) * (1 + 1e-9)


@given(sizes_st, workers_st)
def test_equal_workers_get_the_mean_and_the_largest_at_most(sizes: list[int], workers: int) -> None:
    of = np.array(sizes, dtype=float)
    found = np.bincount(assign(ranges(len(of), workers), of, even(workers)), of, minlength=workers).max()
    assert found <= (of.sum() / workers + of.max()) * (1 + TOLERANCE) * (1 + 1e-9)


@pytest.mark.parametrize("hot", range(16))
def test_a_hot_output_gets_a_worker_of_its_own_and_neighbours_stay_together(hot: int) -> None:
    sizes = np.full(16, 1.0)
    sizes[hot] = 15.0
    found = assign(ranges(16, 2), sizes, even(2))
    loads = np.bincount(found, sizes)
    assert loads.tolist() in ([15.0, 15.0], [15.0, 15.0][::-1])
    rest = np.delete(found, hot)
    assert np.count_nonzero(np.diff(rest)) == 0


def test_outputs_that_differ_a_little_are_not_torn_apart() -> None:
    stock = ranges(64, 4)
    sizes = 100 + np.arange(64, dtype=np.float64) % 7
    assert (assign(stock, sizes, even(4)) == stock).all()


def test_neighbours_stay_together_where_ranges_do_not_do() -> None:
    sizes = np.repeat([1.0, 5.0], 32)
    found = assign(ranges(64, 2), sizes, even(2))
    assert np.count_nonzero(np.diff(found)) == 1
    assert fullness(found, sizes, even(2)) < 1.05


def test_outputs_go_where_they_are_wanted_as_far_as_there_is_room() -> None:
    stock = ranges(8, 2)
    sizes = np.ones(8)
    crossed = 1 - stock
    assert (assign(stock, sizes, even(2), crossed) == crossed).all()
    # All at one worker would be out of balance.
    found = assign(stock, sizes, even(2), np.zeros(8, dtype=np.intp))
    assert fullness(found, sizes, even(2)) <= 1 + TOLERANCE
    nowhere = np.full(8, -1)
    assert (assign(stock, sizes, even(2), nowhere) == stock).all()


def test_a_worker_with_more_threads_gets_more() -> None:
    shares = targets([Host(1), Host(3)], None)
    found = assign(ranges(16, 2), np.ones(16), shares)
    assert np.bincount(found).tolist() == [4, 12]


@given(
    st.lists(st.builds(Host, st.integers(1, 64), st.none() | st.floats(0, 1e12)), min_size=1, max_size=9),
    st.none() | st.floats(1, 1e12),
)
def test_targets_are_a_whole_and_within_room_where_there_is_enough(hosts: list[Host], total: float | None) -> None:
    shares = targets(hosts, total)
    assert shares.min() > 0
    assert shares.sum() == pytest.approx(1)
    rooms = [np.inf if host.room_nbytes is None else host.room_nbytes for host in hosts]
    by_threads = targets([Host(host.threads) for host in hosts], None)
    if total is None or sum(rooms) < total:
        assert (shares == by_threads).all()
    else:
        for share, room, plain in zip(shares, rooms, by_threads, strict=True):
            assert share * total <= max(room, plain * total / 4) * (1 + 1e-6)


def test_a_worker_with_little_room_gets_less() -> None:
    shares = targets([Host(2, 100), Host(2, 4000), Host(2, 4000)], 3000)
    assert shares[0] == pytest.approx(1 / 12)
    assert shares[1] == shares[2]
    found = assign(ranges(60, 3), np.full(60, 50.0), shares)
    counts = np.bincount(found)
    assert counts[0] <= 6
    assert abs(counts[1] - counts[2]) <= 1
