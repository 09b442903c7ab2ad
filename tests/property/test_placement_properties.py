"""What holds of families, choices and queues whatever comes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dask_gpurt.plugins import families, policy, stealing
from dask_gpurt.plugins.families import Family
from dask_gpurt.plugins.queues import Queues
from dask_gpurt.plugins.turns import Turns
from dask_gpurt.plugins.view import Backlog, Candidate, Share, Tail

SHARES = st.lists(st.integers(1, 4), min_size=1, max_size=6).map(
    lambda threads: [Share(f"w{i}", n) for i, n in enumerate(threads)]
)


class Node:
    def __init__(self, key: int) -> None:
        self.key = key
        self.priority = (key,)
        self.dependencies: set[Node] = set()
        self.dependents: set[Node] = set()


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    nodes = [Node(i) for i in range(draw(st.integers(1, 40)))]
    for node in nodes[1:]:
        for i in draw(st.sets(st.integers(0, node.key - 1), max_size=3)):
            node.dependencies.add(nodes[i])
            nodes[i].dependents.add(node)
    return nodes


@given(graphs(), SHARES)
def test_every_root_gets_one_home_or_an_end(nodes: list[Node], shares: list[Share]) -> None:
    roots = {node.key: node for node in nodes if not node.dependencies}
    meets, ends = families.meetings(nodes, roots)
    assert all((key in meets) != (key in ends) for key in roots)
    assert all(meets[key].priority > roots[key].priority for key in roots if key in meets)
    met = [root for key, root in roots.items() if key in meets]
    dealt = families.by_meeting(met, meets, shares, lambda _: None)
    planned = Counter(key for family in dealt for key in family.keys)
    assert set(planned.values()) <= {1}
    fair = max(1, -(-len(met) // len(shares)))
    gathered = Counter(meets[root.key].key for root in met)
    for root in met:
        # Left out are those that meet most of all roots, and no others.
        assert (root.key in planned) == (gathered[meets[root.key].key] <= max(fair, len(met) // 2))
    workers = {share.worker for share in shares}
    for family in dealt:
        assert family.home in workers
        assert 1 <= len(family.keys) <= fair
        assert len({meets[key].key for key in family.keys}) == 1


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 100)), min_size=1, max_size=6),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_no_collection_piles_up(collections: list[tuple[int, float]], nworkers: int, nthreads: int) -> None:
    roots: list[Node] = []
    meets: dict[Any, Any] = {}
    barriers: dict[Any, Any] = {}
    for number, (count, _) in enumerate(collections):
        barrier = Node(1_000_000 + number)
        for i in range(count):
            root, meeting = Node(1_000 * number + i), Node(10_000 + 1_000 * number + i)
            root.key = (f"table{number}", i)  # type: ignore[assignment]
            roots.append(root)
            meets[root.key] = meeting
            barriers[meeting.key] = barrier
    shares = [Share(f"w{i}", nthreads) for i in range(nworkers)]
    dealt = families.by_meeting(
        roots, meets | barriers, shares, lambda _: None, lambda root: collections[int(root.key[0][5:])][1]
    )
    homes = {key: family.home for family in dealt for key in family.keys}
    assert homes.keys() == {root.key for root in roots}
    for number, (count, _) in enumerate(collections):
        of_workers = Counter(home for key, home in homes.items() if key[0] == f"table{number}")
        assert max(of_workers.values()) <= -(-count // nworkers)


@given(st.sets(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1), SHARES)
def test_positions_are_dealt_in_proportion(indices: set[tuple[int, int]], shares: list[Share]) -> None:
    dealt = families.by_position([(index, index) for index in indices], shares)
    homes = {key: family.home for family in dealt for key in family.keys}
    assert homes.keys() == indices
    assert sum(len(family.keys) for family in dealt) == len(indices)
    threads = sum(share.nthreads for share in shares)
    counts = Counter(homes.values())
    for share in shares:
        # One at each border, and a pair of mirror images cannot be parted.
        assert abs(counts[share.worker] - len(indices) * share.nthreads / threads) <= 3


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 10**12), st.floats(0, 1e6)), min_size=1, max_size=8),
    st.floats(1, 1e12),
)
def test_no_candidate_beats_the_choice_in_both_bytes_and_wait(
    figures: list[tuple[int, int, float]], bandwidth: float
) -> None:
    candidates = [Candidate(worker, missing, wait_s, missing / bandwidth) for worker, missing, wait_s in figures]
    choice = policy.choose(candidates)
    chosen = [candidate for candidate in candidates if candidate.worker == choice.worker]
    assert any(
        not any(c.missing_nbytes < best.missing_nbytes and c.wait_s < best.wait_s for c in candidates)
        for best in chosen
    )


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 4), st.integers(1, 4), st.floats(0, 100))
def test_relief_never_makes_the_thief_the_busier_one(
    sizes: list[int], victim_threads: int, thief_threads: int, duration_s: float
) -> None:
    victim = Backlog(sum(sizes), victim_threads, duration_s)
    taken = stealing.relief(victim, Backlog(0, thief_threads, duration_s), [Tail(n, 0) for n in sizes], 1e9)
    moved = sum(sizes[:taken])
    before_last = sum(sizes[: taken - 1]) if taken else 0
    assert moved <= sum(sizes)
    if taken:
        assert moved * duration_s / thief_threads <= (victim.ntasks - before_last) * duration_s / victim_threads


@given(
    st.lists(st.builds(Tail, st.integers(1, 9), st.integers(0, 10**8)), max_size=30),
    st.integers(0, 50),
    st.integers(1, 4),
    st.integers(1, 4),
    st.floats(0, 10),
)
def test_sharing_out_leaves_the_victim_the_busier_one_and_takes_what_pays(
    tails: list[Tail], begun: int, victim_threads: int, thief_threads: int, duration_s: float
) -> None:
    victim = Backlog(begun + sum(tail.ntasks for tail in tails), victim_threads, duration_s)
    taken = stealing.shared_out(victim, Backlog(0, thief_threads, duration_s), tails, 1e9)
    assert taken == sorted(set(taken))
    moved = sum(tails[position].ntasks for position in taken)
    after = Backlog(victim.ntasks - moved, victim_threads, duration_s)
    if taken:
        assert Backlog(moved, thief_threads, duration_s).wait_s <= after.wait_s
    for position in taken:
        # At its best, before anything was taken.
        assert stealing.pays(victim.wait_s, tails[position].nbytes, 1e9, stealing.MESSAGES_S)
    if moved == 0 and tails:
        first = tails[0]
        left = Backlog(victim.ntasks - first.ntasks, victim_threads, duration_s)
        fits = Backlog(first.ntasks, thief_threads, duration_s).wait_s <= left.wait_s
        assert not (fits and stealing.pays(victim.wait_s, first.nbytes, 1e9, stealing.MESSAGES_S))


class QueuesMachine(RuleBasedStateMachine):
    """Queues against the plainest model of them: sort what waits each time."""

    workers = ("a", "b", "c")

    def __init__(self) -> None:
        super().__init__()
        self.queues = Queues()
        self.planned: dict[int, Family] = {}
        self.unplanned: set[int] = set()
        self.families: list[Family] = []
        self.next_key = 0

    @rule(worker=st.sampled_from(workers), size=st.integers(1, 4), priorities=st.data())
    def enter_a_family(self, worker: str, size: int, priorities: st.DataObject) -> None:
        keys = [priorities.draw(st.integers(0, 9)) * 1_000_000 + self.next_key + i for i in range(size)]
        self.next_key += size
        family = Family(keys, worker)
        self.families.append(family)
        for key in keys:
            first = not self.queues.waiting
            self.queues.enter(key, key, family)
            self.planned[key] = family
            if first:
                for other in self.unplanned:
                    self.queues.enter_unplanned(other, other)

    @rule(priority=st.integers(0, 9))
    def enter_unplanned(self, priority: int) -> None:
        key = priority * 1_000_000 + self.next_key
        self.next_key += 1
        self.unplanned.add(key)
        self.queues.enter_unplanned(key, key)

    @precondition(lambda self: self.planned)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.planned)))
        del self.planned[key]
        self.queues.leave(key)

    @precondition(lambda self: self.unplanned)
    @rule(data=st.data())
    def leave_unplanned(self, data: st.DataObject) -> None:
        self.unplanned.discard(data.draw(st.sampled_from(sorted(self.unplanned))))

    @precondition(lambda self: self.families)
    @rule(data=st.data(), worker=st.sampled_from(workers))
    def move(self, data: st.DataObject, worker: str) -> None:
        self.queues.move(data.draw(st.sampled_from(self.families)), worker, "relieved", lambda key: key)

    @rule(worker=st.sampled_from(workers))
    def next_is_the_least_of_own_and_unplanned(self, worker: str) -> None:
        if self.planned:
            own = {key for key, family in self.planned.items() if family.home == worker}
            expected = min(own | self.unplanned, default=None)
            assert self.queues.next_for(worker, self.unplanned.__contains__) == expected

    @invariant()
    def backlogs_agree(self) -> None:
        for worker in self.workers:
            waiting = {key for key, family in self.planned.items() if family.home == worker}
            assert self.queues.backlog(worker) == len(waiting)
            listed = [key for _, keys in self.queues.families_of(worker) for key in keys]
            assert sorted(listed) == sorted(waiting)


QueuesMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestQueues: Any = QueuesMachine.TestCase


class TurnsMachine(RuleBasedStateMachine):
    """Peers ask, copies are made or fail: each peer has one answer, and nobody waits for a key that is not being sent."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: Turns[int] = Turns()
        self.asked = 0
        self.serving: dict[str, int] = {}
        self.waiting: dict[str, list[int]] = {"x": [], "y": []}
        self.away: list[int] = []

    @rule(key=st.sampled_from("xy"))
    def ask(self, key: str) -> None:
        self.asked += 1
        answer = self.turns.enter(key, self.asked)
        assert (answer is True) == (key not in self.serving)
        if answer:
            self.serving[key] = self.asked
        elif answer is None:
            self.away.append(self.asked)
        else:
            self.waiting[key].append(self.asked)

    @precondition(lambda self: self.serving)
    @rule(data=st.data(), elapsed_s=st.one_of(st.none(), st.floats(0, 2)))
    def copy(self, data: st.DataObject, elapsed_s: float | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.serving)))
        del self.serving[key]
        following, away = self.turns.leave(key, elapsed_s)
        waiting = self.waiting[key]
        assert following == (waiting[0] if waiting else None)
        assert not away or elapsed_s is not None
        if following is not None:
            self.serving[key] = following
            self.waiting[key] = [peer for peer in waiting[1:] if peer not in away]
            assert len(self.waiting[key]) + len(away) + 1 == len(waiting)
            # There is one more holder: no more are sent there than stay.
            assert len(away) <= len(self.waiting[key]) + 1
        self.away += away

    @invariant()
    def keys_that_are_sent_are_those_known(self) -> None:
        assert len(self.turns) == len(self.serving)
        assert not any(peers for key, peers in self.waiting.items() if key not in self.serving)


TestTurns = TurnsMachine.TestCase
TestTurns.settings = settings(max_examples=50, stateful_step_count=40)
