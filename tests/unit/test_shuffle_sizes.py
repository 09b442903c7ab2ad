"""What a few inputs say about the sizes of outputs."""

from __future__ import annotations

import numpy as np
import pytest

from dask_gpurt.shuffle.sizes import ROWS_MAX, Sample, expected_sizes, joint_sizes, sample_of


def take(values: np.ndarray, nbytes: int = 1000) -> Sample:
    sample = sample_of("to", values, nbytes)
    assert sample is not None
    return sample


def test_a_sample_travels_as_plain_data() -> None:
    sample = take(np.array([3, 1, 3], dtype=np.uint8), 30)
    message = sample.to_message()
    assert all(isinstance(value, str | int | bytes) for value in message.values())
    back = Sample.from_message(message)
    assert (back.column, back.nbytes, back.rows.tolist()) == ("to", 30, [0, 1, 0, 2])


@pytest.mark.parametrize(
    "values",
    [np.array([]), np.array([], int), np.array([-1, 2]), np.array([2**21]), np.array([0.5]), np.array(["a"], object)],
    ids=str,
)
def test_what_cannot_be_counted_gives_no_sample(values: np.ndarray) -> None:
    assert sample_of("to", values, 1000) is None


def test_of_many_rows_some_are_looked_at() -> None:
    sample = take(np.arange(5 * ROWS_MAX) % 8)
    assert ROWS_MAX // 2 < sample.rows.sum() <= 2 * ROWS_MAX
    # The step is no divisor of the rows' period.
    assert sample.rows.max() - sample.rows.min() <= 1


def test_a_key_that_is_everywhere_is_expected_everywhere() -> None:
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        values = rng.integers(0, 16, 100_000)
        values[::2] = 5
        samples.append(take(values))
    sizes = expected_sizes(samples, np.arange(16), 20)
    assert sizes.sum() == pytest.approx(20_000)
    assert sizes[5] / sizes.sum() == pytest.approx(0.53, abs=0.02)
    others = np.delete(sizes, 5)
    assert others.max() / others.min() < 1.1


def test_one_sample_of_many_inputs_says_little() -> None:
    sizes = expected_sizes([take(np.zeros(100, int))], np.arange(10), 100)
    assert sizes[0] / sizes.sum() == pytest.approx(0.01 + 0.099)


def test_sorted_inputs_are_expected_to_fill_all_outputs() -> None:
    sizes = expected_sizes([take(np.full(100, 0)), take(np.full(100, 8))], np.arange(16), 16)
    assert sizes.max() / sizes.sum() < 2.5 / 16


def test_if_all_inputs_were_measured_nothing_is_guessed() -> None:
    sizes = expected_sizes([take(np.full(100, 0)), take(np.full(100, 3))], np.arange(4), 2)
    assert sizes.tolist() == [1000, 0, 0, 1000]


def test_outputs_that_are_not_wanted_do_not_count() -> None:
    sample = take(np.array([0, 0, 0, 1, 7]))
    assert expected_sizes([sample, sample], np.array([1, 7, 9]), 2).tolist() == [400, 400, 0]
    assert expected_sizes([sample], np.array([5]), 3).tolist() == [0]


def test_what_both_sides_bring_counts() -> None:
    one, other = np.array([8.0, 1, 1]), np.array([1.0, 1, 8])
    found = joint_sizes([(one, 4), (other, 9)], 3)
    assert found is not None
    assert found.tolist() == [9, 2, 9]


def test_a_side_of_which_nothing_is_known_is_even_and_has_inputs_of_the_same_size() -> None:
    found = joint_sizes([(np.array([8.0, 1, 1]), 2), (None, 6), (None, 1)], 3)
    assert found is not None
    assert found.sum() == pytest.approx(10 / 2 * 9)
    assert np.ptp(found - [8, 1, 1]) == pytest.approx(0)


@pytest.mark.parametrize("sides", [[], [(None, 3)], [(None, 3), (np.zeros(2), 3)], [(np.ones(3), 4)]], ids=str)
def test_nothing_follows_from_nothing_nor_from_other_outputs(sides: list[tuple[np.ndarray | None, int]]) -> None:
    assert joint_sizes(sides, 2) is None
