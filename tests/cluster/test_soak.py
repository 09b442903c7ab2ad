"""A short soak, and that it would object."""

from __future__ import annotations

from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from benchmarks.soak import rounds
from benchmarks.soak.__main__ import main, soak
from benchmarks.soak.growth import ALLOWANCES, complaints
from benchmarks.soak.jobs import MismatchError, _check_array, _check_frame
from benchmarks.soak.rounds import SMALL


# Rounds have limits of their own.
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:Increasing number of chunks")
def test_random_jobs_with_a_quarter_of_the_memory_they_need() -> None:
    samples, written_nbytes = soak(SMALL, minutes=0.1, seed=4)
    assert written_nbytes > 0
    assert complaints(samples) == []
    assert set(samples[0]) == {"worker 0", "worker 1", "client"}


@pytest.mark.parametrize("figure", sorted(ALLOWANCES))
def test_what_grows_is_found(figure: str) -> None:
    steps = [{"worker 0": {figure: 100.0 + ALLOWANCES[figure] * number / 4}} for number in range(30)]
    assert figure in complaints(steps)[0]
    once = [{"worker 0": {figure: 100.0 + ALLOWANCES[figure] * (number > 8)}} for number in range(30)]
    assert complaints(once) == []


def test_a_wrong_number_is_found() -> None:
    values = np.arange(12).reshape(3, 4)
    wrong = values.copy()
    wrong[0, -1] += 1
    # One of these questions asks for it.
    with pytest.raises(MismatchError):
        ask_all(_check_array, da.from_array(values), wrong)
    frame = pd.DataFrame({"key": [1, 2], "group": [1, 2], "value": [3, 4], "text": ["a", "b"]})
    ask_all(_check_frame, dd.from_pandas(frame[::-1], npartitions=1, sort=False), frame)
    with pytest.raises(MismatchError):
        ask_all(_check_frame, dd.from_pandas(frame, npartitions=1), frame.assign(value=[3, 5]))


def ask_all(check: Any, collection: Any, expected: Any) -> None:
    for seed in range(20):
        check(np.random.default_rng(seed), collection, expected)


def test_the_command_fails_when_a_round_goes_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def wrong(rng: Any, size: int) -> None:
        raise MismatchError("7 of 9 numbers of an array differ")

    monkeypatch.setattr(rounds, "array_program", wrong)
    assert main(["--minutes", "0", "--seed", "5"]) == 1
    assert "round 0 of seed 5: 7 of 9 numbers" in capsys.readouterr().err
