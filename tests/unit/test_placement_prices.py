"""What moves cost, and which links are measured at first."""

from __future__ import annotations

import pytest

from dask_gpurt.plugins.prices import Neighbourhoods, Prices
from dask_gpurt.plugins.probing import PAIRS_MAX, Pairs
from dask_gpurt.topology import DASK, Report, Topology

GB = 10**9


def report(source: str, target: str, bandwidth: float, path: str = DASK, tier: str = "host") -> Report:
    return (source, tier, target, tier, path, 0.002, bandwidth, 4)


def prices_of(topology: Topology, *workers: str) -> Prices:
    prices = Prices(topology, lambda address: address[0])
    for address in workers:
        prices.add_worker(address)
    prices.refresh(bandwidth=1e8)
    return prices


def test_without_measurements_the_scheduler_s_bandwidth_counts() -> None:
    prices = prices_of(Topology(), "a1", "a2", "b1")
    assert prices.move_s("a1", GB, {"a2": GB}) == prices.move_s("a1", GB, {"b1": GB}) == 10.0
    prices.refresh(bandwidth=1e9)
    assert prices.move_s("a1", GB, {"a2": GB}) == 1.0


def test_what_is_near_costs_less() -> None:
    topology = Topology()
    topology.learn([report("a1", "a2", 10e9), report("a1", "b1", 1e9)])
    prices = prices_of(topology, "a1", "a2", "b1")
    assert prices.two
    assert prices.move_s("a1", 3 * GB, {"a1": 5 * GB, "a2": GB, "b1": 2 * GB}) == pytest.approx(2.1)
    # No more than what is missing comes from near.
    assert prices.move_s("a1", GB, {"a2": 2 * GB}) == pytest.approx(0.1)
    # Two of the six pairs are near.
    assert prices.typical_s * GB == pytest.approx((2 * 0.1 + 4 * 1.0) / 6)


def test_one_odd_link_changes_nothing() -> None:
    topology = Topology()
    topology.learn([report("a1", "a2", 10e9), report("a2", "a1", 10e9), report("a1", "a3", 1e3)])
    prices = prices_of(topology, "a1", "a2", "a3")
    assert prices.bandwidth == pytest.approx(10e9)
    assert not prices.two


def test_other_paths_and_workers_that_are_gone_do_not_count() -> None:
    topology = Topology()
    topology.learn(
        [report("a1", "a2", 10e9, path="ucx"), report("a1", "x1", 10e9), report("a1", "a2", 5e9, tier="device")]
    )
    assert prices_of(topology, "a1", "a2").bandwidth == pytest.approx(1e8)
    topology.learn([report("a1", "a2", 2e9)])
    prices = prices_of(topology, "a1", "a2")
    assert prices.bandwidth == pytest.approx(2e9)
    prices.remove_worker("a2")
    prices.refresh(bandwidth=1e8)
    assert prices.bandwidth == pytest.approx(1e8)


def test_hosts_of_one_rack_are_near_to_each_other() -> None:
    where = Neighbourhoods(lambda address: address[0], [("[ab]", "rack-1"), ("[cd]", "rack-2")])
    topology = Topology()
    prices = Prices(topology, where)
    for address in ("a1", "b1", "c1", "d1"):
        prices.add_worker(address)
    topology.learn([report("a1", "b1", 4e9), report("c1", "d1", 4e9), report("a1", "c1", 1e9)])
    prices.refresh(bandwidth=1e8)
    assert prices.two
    assert prices.move_s("b1", 10**9, {"a1": 10**9, "c1": 0}) == pytest.approx(0.25)
    assert prices.move_s("b1", 10**9, {"a1": 0, "c1": 10**9}) == pytest.approx(1.0)
    pairs = Pairs(where)
    assert [pairs.joined(address) for address in ("a1", "b1", "c1")] == [[], [("b1", "a1")], [("c1", "a1")]]


def test_gpus_of_one_island_are_nearer_to_each_other_than_to_others_of_their_host() -> None:
    where = Neighbourhoods(lambda address: address[0], [("r", "rack-1")])
    topology = Topology()
    prices = Prices(topology, where)
    for address, island in (
        ("a1", "nvlink-0"),
        ("a2", "nvlink-0"),
        ("a3", "nvlink-2"),
        ("r1", "nvlink-0"),
        ("r2", None),
    ):
        where.settle(address, island)
        prices.add_worker(address)
    topology.learn([report("a1", "a2", 4e9), report("a1", "a3", 1e9)])
    prices.refresh(bandwidth=1e8)
    assert prices.move_s("a2", 10**9, {"a1": 10**9, "a3": 0}) == pytest.approx(0.25)
    assert prices.move_s("a2", 10**9, {"a1": 0, "a3": 10**9}) == pytest.approx(1.0)
    # Whoever names racks has said what is near.
    assert where("r1") == where("r2") == "rack-1"
    pairs = Pairs(where)
    assert [pairs.joined(address) for address in ("a1", "a2", "a3")] == [[], [("a2", "a1")], [("a3", "a1")]]
    # An island is forgotten with its worker, whoever hears of that first.
    where.settle("a1", None)
    pairs.left("a1")
    assert where("a1") == "a"
    assert pairs.joined("a4") == [("a4", "a3")]


def test_a_few_pairs_are_measured_of_either_kind() -> None:
    pairs = Pairs(lambda address: address.split(".")[0])
    found = [pair for host in range(100) for seat in range(8) for pair in pairs.joined(f"{host}.{seat}")]
    near = [pair for pair in found if pair[0].split(".")[0] == pair[1].split(".")[0]]
    assert len(near) == PAIRS_MAX
    assert len(found) == 2 * PAIRS_MAX
    assert pairs.joined("0.0") == []


def test_who_has_left_is_not_measured() -> None:
    pairs = Pairs(lambda address: address[0])
    assert pairs.joined("a1") == []
    pairs.left("a1")
    assert pairs.joined("b1") == []
    assert pairs.joined("c1") == [("c1", "b1")]
