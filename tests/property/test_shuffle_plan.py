"""The plan against a slow one that is evidently right."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.shuffle.plan import PartitionPlan, gather_ranges

WORKERS = st.dictionaries(st.integers(0, 400), st.sampled_from("abc"), max_size=40)


@given(WORKERS, st.lists(st.integers(-3, 410), max_size=60), st.sampled_from(["i8", "u2", "f8", "i4"]))
def test_rows_lie_by_peer_then_partition_then_as_they_were(
    worker_for: dict[int, str], values: list[int], dtype: str
) -> None:
    ids = np.array([v for v in values if v >= 0 or dtype != "u2"], dtype=dtype)
    plan = PartitionPlan.build(worker_for)
    split = plan.split(ids)
    wanted = [row for row, value in enumerate(ids.tolist()) if value in worker_for]
    expected = sorted(wanted, key=lambda row: (worker_for[int(ids[row])], ids[row], row))
    assert split.rows.tolist() == expected
    for position, partition in enumerate(plan.partitions.tolist()):
        rows = split.rows[split.bounds[position] : split.bounds[position + 1]]
        assert rows.tolist() == [row for row, value in enumerate(ids.tolist()) if value == partition]
    covered = [position for peer in plan.peers for position in range(peer.start, peer.stop)]
    assert covered == list(range(len(worker_for)))
    assert len({peer.address for peer in plan.peers}) == len(plan.peers)
    assert all(
        worker_for[int(plan.partitions[p])] == peer.address for peer in plan.peers for p in range(peer.start, peer.stop)
    )


@pytest.mark.parametrize("count", [1, 255, 256, 257, 65535, 65536, 70000])
def test_every_width_of_position(count: int) -> None:
    plan = PartitionPlan.build(dict.fromkeys(range(count), "a"))
    values = np.array([count - 1, 0, count, -1, count - 1])
    split = plan.split(values)
    assert split.rows.tolist() == ([1, 0, 4] if count > 1 else [0, 1, 4])


def test_what_is_no_partition_is_left_out() -> None:
    plan = PartitionPlan.build({0: "a", 1: "a"})
    assert plan.split(np.array([np.nan, 1.0, 0.5, np.inf, 0.0])).rows.tolist() == [4, 1]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 10))))
def test_ranges_are_gathered(ranges: list[tuple[int, int]]) -> None:
    starts = np.array([start for start, _ in ranges], dtype=np.int64)
    lengths = np.array([length for _, length in ranges], dtype=np.int64)
    expected = [i for start, length in ranges for i in range(start, start + length)]
    assert gather_ranges(starts, lengths).tolist() == expected
