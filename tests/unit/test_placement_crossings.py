"""Crossings: products are made where they are summed, near others that take the same blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from placement_nodes import Nodes

from dask_gpurt.plugins import crossings, families
from dask_gpurt.plugins.view import Share


class Graph(Nodes):
    def deal(
        self, shares: list[Share]
    ) -> tuple[list[families.Family], list[families.Family], dict[Any, Any], dict[Any, Any]]:
        roots = self.roots
        others = [node for node in self.nodes.values() if node.dependencies]
        meets, _ = families.meetings(self.nodes.values(), roots)
        crossing, crossed, homes = crossings.by_crossing(others, roots, meets, shares)
        return crossing, crossed, homes, {key: family.home for family in crossing + crossed for key in family.keys}


WORKERS = [Share(name, 1) for name in "abcd"]
SIDE = 8


def product(fan_in: int = 4) -> Graph:
    """Multiply two squares of blocks; the products of a block are summed a few at a time."""
    graph = Graph()
    for i in range(SIDE):
        for k in range(SIDE):
            graph.add(("x", i, k))
            graph.add(("y", i, k))
    for i in range(SIDE):
        for j in range(SIDE):
            for k in range(SIDE):
                graph.add(("dot", i, j, k), ("x", i, k), ("y", k, j))
            parts = []
            for start in range(0, SIDE, fan_in):
                dots = [("dot", i, j, k) for k in range(start, start + fan_in)]
                parts.append(graph.add(("partial", i, j, start), *dots).key)
            graph.add(("z", i, j), *parts)
    return graph


def test_products_are_made_where_they_are_summed() -> None:
    crossing, _, homes, home_of = product().deal(WORKERS)
    assert not any(family.waits for family in crossing)
    for i in range(SIDE):
        for j in range(SIDE):
            assert {home_of["dot", i, j, k] for k in range(SIDE)} == {homes["z", i, j]}
    assert set(Counter(homes.values()).values()) == {SIDE * SIDE // 4}


def test_a_worker_has_a_square_of_blocks() -> None:
    _, _, homes, _ = product().deal(WORKERS)
    blocks = defaultdict(list)
    for (_, i, j), home in homes.items():
        blocks[home].append((i, j))
    for of_worker in blocks.values():
        assert len({i for i, _ in of_worker}) == len({j for _, j in of_worker}) == SIDE // 2


def test_workers_with_more_threads_have_more() -> None:
    _, _, homes, _ = product().deal([Share("a", 3), Share("b", 1)])
    assert Counter(homes.values()) == {"a": 48, "b": 16}


def test_roots_go_where_they_are_taken_and_are_shared_fairly() -> None:
    _, crossed, _, home_of = product().deal(WORKERS)
    assert all(family.waits and len(family.keys) <= families.PIECE for family in crossed)
    roots = [(name, i, k) for name in "xy" for i in range(SIDE) for k in range(SIDE)]
    assert max(Counter(home_of[root] for root in roots).values()) <= len(roots) / 4
    dots_of = {
        (name, i, k): [("dot", i, j, k) if name == "x" else ("dot", j, k, i) for j in range(SIDE)]
        for name, i, k in roots
    }
    there = [root for root in roots if home_of[root] in {home_of[dot] for dot in dots_of[root]}]
    assert len(there) >= 0.95 * len(roots)


def test_a_stencil_has_no_crossings() -> None:
    graph = Graph()
    for step in range(3):
        for i in range(20):
            near = [("step", step - 1, (i + d) % 20) for d in range(-3, 4)] if step else []
            graph.add(("step", step, i), *near)
    assert graph.deal(WORKERS) == ([], [], {}, {})


def test_a_few_products_are_left_alone() -> None:
    graph = Graph()
    for i in range(2):
        graph.add(("x", i))
    for i in range(8):
        graph.add(("dot", i), ("x", 0), ("x", 1))
    graph.add("sum", *[("dot", i) for i in range(8)])
    assert graph.deal(WORKERS) == ([], [], {}, {})


def front(side: int, links: int = 0) -> Graph:
    """Make blocks of products of the blocks before; ``links``: tasks between a block and what takes it."""
    graph = Graph()
    for i in range(side):
        for j in range(i + 1):
            dots = [graph.add(("dot", i, j, k), ("block", i, k), ("block", j, k)).key for k in range(j)]
            key: Any = ("block", i, j) if not links else ("solved", i, j)
            graph.add(key, *dots)
            for link in range(links):
                key = graph.add(("block", i, j) if link + 1 == links else ("link", i, j, link), key).key
    return graph


def test_a_front_is_planned_to_its_end() -> None:
    side = 12
    graph = front(side)
    crossing, _, homes, home_of = graph.deal(WORKERS)
    assert all(home_of[key] == homes[family.at] for family in crossing for key in family.keys)
    # What is taken by fewer than three others goes where its inputs are.
    takers = {key: len(node.dependents) for key, node in graph.nodes.items() if key[0] == "block"}
    for i in range(side):
        for j in range(i):
            for k in range(j):
                few = min(takers["block", i, k], takers["block", j, k]) < crossings.FEW
                assert (("dot", i, j, k) in home_of) != few


def test_a_front_is_seen_through_what_is_made_of_blocks() -> None:
    def rows(graph: Graph) -> int:
        _, _, homes, _ = graph.deal(WORKERS)
        return len({home for key, home in homes.items() if key[1] == 11})

    # In turns, a row is shared by two of four workers; a piece of the curve ends somewhere in it.
    assert rows(front(12, links=2)) == rows(front(12)) == 2
    near, far = (
        {key[1:]: home for key, home in front(12, links).deal(WORKERS)[2].items() if key[0] != "dot"}
        for links in (0, 2)
    )
    assert len(near.keys() & far.keys()) > 30
    assert all(near[index] == far[index] for index in near.keys() & far.keys())


def test_a_front_has_all_workers_in_any_part() -> None:
    graph, side = front(12), 12
    _, _, homes, _ = graph.deal(WORKERS)
    blocks = {key[1:]: home for key, home in homes.items() if key[0] == "block"}
    low = {home for (i, _), home in blocks.items() if i < side / 2}
    high = {home for (i, _), home in blocks.items() if i >= side / 2}
    assert low == high == set("abcd")
    # A row of blocks is shared by few workers.
    assert all(len({home for (i, _), home in blocks.items() if i == row}) <= 2 for row in range(side))
