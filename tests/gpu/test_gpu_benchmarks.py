"""The benchmark that moves data from a real GPU to the host and back."""

from __future__ import annotations

import pytest

from benchmarks.spilling.device import ARRAY_NBYTES, down_and_up

pytestmark = pytest.mark.gpu


def test_arrays_go_down_and_come_back() -> None:
    pytest.importorskip("cupy")
    for rates in down_and_up(4 * ARRAY_NBYTES, pairs=2):
        assert len(rates.ours) == len(rates.raw) == 2
        assert min(*rates.ours, *rates.raw) > 0
