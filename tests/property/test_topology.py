"""Links: what was put into them comes out again, whatever disturbs some of the transfers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dask_gpurt.topology import (
    LARGE_NBYTES,
    NEWS_FACTOR,
    PRIOR,
    TRANSFERS_MIN,
    WINDOW,
    Gauge,
    Link,
    News,
    Place,
    Rate,
    Topology,
)

rates = st.builds(Rate, latency_s=st.floats(1e-5, 2e-3), bandwidth=st.floats(1e6, 2e10))
transfers = st.lists(st.tuples(st.integers(1, 2**28), st.floats(1e-6, 100)), max_size=60)


def seen(rate: Rate, seed: int, count: int = 64, noise: float = 0.2, disturbed: float = 0.0) -> list[tuple[int, float]]:
    """Transfers over a link of this rate, every other one a small one; some of them far too slow."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        nbytes = chance.randrange(1, 2**14) if number % 2 else chance.randrange(2**22, 2**25)
        elapsed_s = rate.price(nbytes) * (1 + noise * chance.random())
        if chance.random() < disturbed:
            elapsed_s += chance.uniform(0.01, 3)
        found.append((nbytes, elapsed_s))
    return found


@given(rate=rates, prior=rates, seed=st.integers(0, 10**6), disturbed=st.sampled_from([0.0, 0.1, 0.3]))
def test_a_rate_is_recovered_from_noisy_and_disturbed_transfers(
    rate: Rate, prior: Rate, seed: int, disturbed: float
) -> None:
    link = Link(prior)
    for transfer in seen(rate, seed, disturbed=disturbed):
        link.observe(*transfer)
    for nbytes in (2**13, 2**22, 2**25):
        # What bytes take and what an exchange takes cannot be told apart where one of them is within the noise.
        assert 0.7 * rate.price(nbytes) < link.price(nbytes) < 1.8 * rate.price(nbytes), (link, nbytes)


@given(rate=rates, factor=st.sampled_from([0.05, 0.3, 3.0, 20.0]), seed=st.integers(0, 10**6))
def test_a_link_that_changes_is_followed_within_a_window(rate: Rate, factor: float, seed: int) -> None:
    link = Link()
    changed = Rate(rate.latency_s * factor, rate.bandwidth / factor)
    for transfer in seen(rate, seed) + seen(changed, seed + 1, count=2 * WINDOW):
        link.observe(*transfer)
    assert link.price(2**24) == pytest.approx(changed.price(2**24), rel=0.4)


@given(observed=transfers, sizes=st.tuples(st.integers(0, 2**30), st.integers(0, 2**30)))
def test_prices_are_finite_positive_and_grow_with_the_bytes(
    observed: list[tuple[int, float]], sizes: tuple[int, int]
) -> None:
    link = Link()
    for transfer in observed:
        link.observe(*transfer)
    small, large = sorted(sizes)
    assert 0 <= link.price(small) <= link.price(large) < float("inf")
    assert link.price(large) > link.price(small) or small == large
    assert link.transfers == sum(nbytes >= LARGE_NBYTES for nbytes, _ in observed)


@given(observed=transfers)
def test_the_same_transfers_make_the_same_link(observed: list[tuple[int, float]]) -> None:
    one, other = Link(), Link()
    for transfer in observed:
        one.observe(*transfer)
        other.observe(*transfer)
    assert one.rate == other.rate


@pytest.mark.parametrize(
    "nonsense", [(0, 1.0), (-1, 1.0), (100, 0.0), (100, -1.0), (100, float("inf")), (1, float("nan"))]
)
def test_what_says_nothing_is_not_learned_from(nonsense: tuple[int, float]) -> None:
    link = Link()
    link.observe(*nonsense)
    assert link.rate == PRIOR
    assert not link.observed


@given(
    bandwidth=st.sampled_from([1e7, 1e9]),
    # About as large as each other, as the messages of a shuffle are: one that ends counts whole for all that it ends beside.
    sizes=st.lists(st.integers(2 * 2**20, 3 * 2**20), min_size=30, max_size=60),
    at_a_time=st.integers(1, 4),
)
@settings(max_examples=50)
def test_transfers_side_by_side_tell_the_bandwidth_of_the_link_not_of_their_share(
    bandwidth: float, sizes: list[int], at_a_time: int
) -> None:
    # Without a latency, of which a transfer would be taken to have had its part.
    gauge, link, now_s = Gauge(), Link(Rate(0.0, PRIOR.bandwidth)), 0.0
    waiting = list(sizes)
    #: What was noted at the beginning, size, and bytes that are left, of each that is under way.
    going: list[tuple[tuple[int, float], int, list[float]]] = []
    while waiting or going:
        while waiting and len(going) < at_a_time:
            nbytes = waiting.pop()
            going.append((gauge.begin(now_s), nbytes, [float(nbytes)]))
        # All of them share the bandwidth, until the first is done.
        least_nbytes = min(left for _, _, (left,) in going)
        now_s += least_nbytes * len(going) / bandwidth
        for begun, nbytes, left in list(going):
            left[0] -= least_nbytes
            if left[0] <= 0:
                going.remove((begun, nbytes, left))
                link.observe(*gauge.end(begun, nbytes, now_s))
    # Of each of the others at most one that had begun before is counted, which is half as large again at most.
    assert bandwidth / 2 < link.rate.bandwidth < bandwidth * (1 + 1.5 * 3 / 4)


def test_links_are_bounded_and_those_asked_for_last_are_kept() -> None:
    topology = Topology(limit=10)
    kept = topology.link(Place("a"), Place("0"), "ucx")
    for number in range(100):
        topology.link(Place("a"), Place(str(number)), "ucx")
        assert topology.link(Place("a"), Place("0"), "ucx") is kept
    assert len(topology) == 10


@given(rate=rates)
def test_what_is_reported_is_the_price_elsewhere(rate: Rate) -> None:
    here, there = Topology(), Topology()
    a, b = Place("a"), Place("b", "device")
    link = here.link(a, b, "ucx")
    for transfer in seen(rate, 0):
        link.observe(*transfer)
    here.link(b, a, "ucx")
    there.learn(here.report())
    assert len(there) == 1, "what nobody has measured is no news"
    assert there.price(a, b, ["comm", "ucx"], 10**7) == here.price(a, b, ["comm", "ucx"], 10**7)
    # What was measured on the spot is not given up for a report.
    there.link(a, b, "ucx").observe(10**7, 1.0)
    mine = there.price(a, b, ["ucx"], 10**7)
    there.learn(here.report())
    assert there.price(a, b, ["ucx"], 10**7) == mine
    assert there.report()[0][-1] == link.transfers + 1


def test_the_best_known_path_is_the_price() -> None:
    topology = Topology()
    a, b = Place("a"), Place("b")
    assert topology.price(a, b, ["ucx", "comm"], 10**6) == PRIOR.price(10**6)
    for _ in range(3):
        topology.link(a, b, "ucx").observe(10**7, 0.002)
        topology.link(a, b, "comm").observe(10**7, 0.2)
    assert topology.price(a, b, ["ucx", "comm"], 10**7) < 0.005
    assert topology.price(a, b, ["comm"], 10**7) > 0.1
    topology.forget("b")
    assert len(topology) == 0


def test_a_report_that_is_no_rate_is_passed_over() -> None:
    topology = Topology()
    nan, inf = float("nan"), float("inf")
    for latency_s, bandwidth in ((nan, 1.0), (-1.0, 1.0), (inf, 1.0), (0.0, nan), (0.0, 0.0), (0.0, -1.0), (0.0, inf)):
        topology.learn([("a", "host", "b", "host", "ucx", latency_s, bandwidth, 1)])
    assert len(topology) == 0


def test_prices_are_of_hosts_whose_bandwidth_was_measured_and_of_the_better_path() -> None:
    topology = Topology()
    a, b = Place("a"), Place("b")
    for _ in range(TRANSFERS_MIN - 1):
        topology.link(b, a, "comm").observe(10**7, 0.1)
    for _ in range(TRANSFERS_MIN):
        topology.link(a, b, "ucx").observe(10**7, 0.1)
        topology.link(a, b, "comm").observe(10**7, 0.01)
        topology.link(b, a, "ucx").observe(1000, 0.001)
        topology.link(Place("a", "device"), Place("c", "device"), "ucx").observe(10**7, 0.1)
    topology.link(a, Place("d"), "ucx")
    prices = topology.prices(10**7)
    assert list(prices) == [("a", "b")]
    assert prices["a", "b"] == topology.price(a, b, ["ucx", "comm"], 10**7)


steps_st = st.lists(st.tuples(st.integers(0, 9), st.integers(2**20, 2**24), st.floats(1e-3, 10)), max_size=80)


@given(steps=steps_st, limit=st.integers(1, 4))
def test_news_are_few_and_in_the_end_the_scheduler_knows_all(steps: list[tuple[int, int, float]], limit: int) -> None:
    here, there = Topology(), Topology()
    news = News(here)
    links = [here.link(Place("a"), Place(str(number)), "ucx") for number in range(10)]
    for number, nbytes, elapsed_s in steps:
        for _ in range(TRANSFERS_MIN):
            links[number].observe(nbytes, elapsed_s)
        told = news.take(limit)
        assert len(told) <= limit
        there.learn(told)
    for _ in range(10 // limit + 1):
        there.learn(news.take(limit))
    assert not news.take(limit)
    mine, theirs = here.prices(), there.prices()
    assert mine.keys() == theirs.keys()
    for pair, price_s in mine.items():
        assert 1 / NEWS_FACTOR <= price_s / theirs[pair] <= NEWS_FACTOR


def test_a_link_that_changes_all_the_time_keeps_no_other_from_being_told() -> None:
    topology = Topology()
    news = News(topology)
    restless, calm = (topology.link(Place("a"), Place(name), "ucx") for name in ("restless", "calm"))
    told = []
    for step in range(4):
        for _ in range(WINDOW):
            restless.observe(10**7, 0.01 * 2**step)
            calm.observe(10**7, 0.01)
        told += [report[2] for report in news.take(1)]
    assert told == ["restless", "calm", "restless", "restless"]
    topology.forget("restless")
    assert not news.take(1)
