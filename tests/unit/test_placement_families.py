"""Families: who meets where, and who is dealt to whom."""

from __future__ import annotations

import itertools
from typing import Any

from placement_nodes import Node, Nodes

from dask_gpurt.plugins import families
from dask_gpurt.plugins.view import Share


class Graph(Nodes):
    def meetings(self, **kwargs: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
        meets, ends = families.meetings(self.nodes.values(), self.roots, **kwargs)
        return {k: n.key for k, n in meets.items()}, {k: n.key for k, n in ends.items()}

    def deal(self, shares: list[Share], holder_of: Any = lambda _: None, **kwargs: Any) -> list[families.Family]:
        meets, _ = families.meetings(self.nodes.values(), self.roots)
        roots = [node for key, node in self.roots.items() if key in meets]
        return families.by_meeting(roots, meets, shares, holder_of, **kwargs)


def tree(nleaves: int, fan_in: int) -> Graph:
    graph = Graph()
    level: list[Any] = []
    for start in range(0, nleaves, fan_in):
        leaves = [("leaf", i) for i in range(start, min(start + fan_in, nleaves))]
        for leaf in leaves:
            graph.add(leaf)
            graph.add(("chunk", leaf[1]), leaf)
        level.append(graph.add(("sum", start), *[("chunk", leaf[1]) for leaf in leaves]).key)
    graph.add("total", *level)
    return graph


WORKERS = [Share("a", 1), Share("b", 1), Share("c", 1)]


def test_leaves_of_a_tree_meet_at_the_first_reduction_through_their_chains() -> None:
    meets, ends = tree(8, 4).meetings()
    assert [meets["leaf", i] for i in range(8)] == [("sum", 0)] * 4 + [("sum", 4)] * 4
    assert meets["chunk", 0] == ("sum", 0)
    assert ("leaf", 0) not in ends


def test_a_root_without_a_meeting_has_the_end_of_its_chain() -> None:
    graph = Graph()
    graph.add("read")
    graph.add(("x", 0), "read")
    assert graph.meetings() == ({}, {"read": ("x", 0), ("x", 0): ("x", 0)})


def test_the_first_meeting_by_priority_counts() -> None:
    graph = Graph()
    for name in "xyz":
        graph.add(name)
    graph.add("x+y", "x", "y")
    graph.add("x+z", "x", "z")
    meets, _ = graph.meetings()
    assert meets == {"x": "x+y", "y": "x+y", "z": "x+z"}


def test_a_broadcast_is_no_meeting() -> None:
    graph = Graph()
    graph.add("mean")
    for i in range(20):
        graph.add(("x", i))
        graph.add(("centred", i), ("x", i), "mean")
    graph.add("a", ("centred", 0), ("centred", 1))
    meets, ends = graph.meetings(wide=16)
    assert meets["x", 0] == meets["x", 1] == "a"
    assert ends["x", 2] == ("centred", 2)


def filtered(graph: Graph, table: str, count: int) -> list[Any]:
    """Read the partitions of a table, and keep the rows that two of its columns let pass."""
    kept = []
    for i in range(count):
        graph.add((table, i))
        graph.add(("from-" + table, i), (table, i))
        graph.add(("until-" + table, i), (table, i))
        graph.add(("and-" + table, i), ("from-" + table, i), ("until-" + table, i))
        kept.append(graph.add(("rows-" + table, i), (table, i), ("and-" + table, i)).key)
    return kept


def test_a_block_does_not_meet_itself() -> None:
    graph = Graph()
    kept = filtered(graph, "lineitem", 4)
    graph.add("first", *kept[:2])
    meets, ends = graph.meetings()
    assert meets["lineitem", 0] == meets["lineitem", 1] == "first"
    assert ends["lineitem", 3] == ("rows-lineitem", 3)
    # Nor does what comes of a meeting.
    graph.add("low", "first")
    graph.add("high", "first")
    graph.add("range", "low", "high")
    graph.add("all", "range", *kept[2:])
    meets, _ = graph.meetings()
    assert meets["first"] == meets["lineitem", 2] == "all"


def test_inputs_that_are_all_wide_do_meet() -> None:
    graph = Graph()
    for i in range(3):
        graph.add(("x", i))
        graph.add(("y", i))
    for i, j in itertools.product(range(3), range(3)):
        graph.add(("xy", i, j), ("x", i), ("y", j))
    meets, _ = graph.meetings(wide=2)
    assert meets["x", 0] == meets["y", 0] == ("xy", 0, 0)


def test_families_are_small_and_neighbours_are_dealt_in_a_row() -> None:
    dealt = tree(24, 4).deal(WORKERS)
    assert [len(family.keys) for family in dealt] == [4] * 6
    assert [family.home for family in dealt] == ["a", "a", "b", "b", "c", "c"]


def test_neighbours_in_a_row_are_few() -> None:
    dealt = tree(240, 4).deal(WORKERS)
    runs = [len(list(run)) for _, run in itertools.groupby(dealt, key=lambda family: family.home)]
    assert max(runs) * 4 <= families.NEIGHBOURHOOD
    assert len(runs) > 3 * len(WORKERS)


def test_neighbours_are_parted_rather_than_dealt_unfairly() -> None:
    # Eight pairs of families for three workers: whole pairs would leave one worker with half as much again.
    graph = Graph()
    for pair in range(8):
        for half in range(2):
            leaves = [graph.add(("leaf", pair, half, i)).key for i in range(4)]
            graph.add(("sum", pair, half), *leaves)
        graph.add(("pair", pair), ("sum", pair, 0), ("sum", pair, 1))
    dealt = graph.deal(WORKERS)
    counts = [sum(len(f.keys) for f in dealt if f.home == share.worker) for share in WORKERS]
    assert sorted(counts) == [20, 20, 24]
    assert [family.home for family in dealt[:6]] == ["a", "a", "b", "b", "c", "c"]


def test_a_meeting_of_all_plans_nothing() -> None:
    assert tree(9, 9).deal(WORKERS) == []
    # The barrier of a shuffle, beside two other collections of which the graph reads more.
    graph = Graph()
    for name, count in (("few", 4), ("many", 12), ("more", 12)):
        moves = [graph.add(("move-" + name, i), graph.add((name, i)).key).key for i in range(count)]
        graph.add("barrier-" + name, *moves)
    assert graph.deal(WORKERS) == []


def test_small_inputs_of_all_blocks_do_not_keep_the_first_blocks_out_of_the_plan() -> None:
    graph = Graph()
    shared = [graph.add(("shared", i)).key for i in range(4)]
    for i in range(24):
        graph.add(("x", i), *shared)
    for i in range(6):
        graph.add(("sum", i), *[("x", 4 * i + k) for k in range(4)])
    roots = graph.nodes.keys() - {("sum", i) for i in range(6)}
    meets, _ = families.meetings(graph.nodes.values(), roots)
    dealt = families.by_meeting(
        [node for key, node in graph.nodes.items() if key in meets], meets, WORKERS, lambda _: None
    )
    assert sorted(key for family in dealt for key in family.keys) == [("x", i) for i in range(24)]
    assert {len(family.keys) for family in dealt} == {4}


def test_a_meeting_of_many_is_cut_into_fair_pieces() -> None:
    graph = Graph()
    for half in range(2):
        graph.add(("sum", half), *(graph.add(("leaf", half, i)).key for i in range(9)))
    dealt = graph.deal(WORKERS)
    assert [len(family.keys) for family in dealt] == [6, 3, 6, 3]
    counts = [sum(len(f.keys) for f in dealt if f.home == share.worker) for share in WORKERS]
    assert max(counts) <= 9
    assert all(len(family.keys) <= 2 for family in graph.deal(WORKERS, max_family=2))


def test_the_share_of_a_meeting_is_fair_to_each_collection() -> None:
    # Four parts of a table meet in pairs; forty of another in tens. The small table is shared, too.
    graph = Graph()
    for name, count, size in (("small", 4, 2), ("large", 40, 10)):
        for first in range(0, count, size):
            graph.add(("sum-" + name, first), *(graph.add((name, i)).key for i in range(first, first + size)))
    dealt = graph.deal([Share("a", 1), Share("b", 1)])
    for name in ("small", "large"):
        homes = [family.home for family in dealt for key in family.keys if key[0] == name]
        assert set(homes) == {"a", "b"}


#: Partitions of the tables of TPC-H query 10 at scale factor 1, the first two of which take nearly all of the time.
TABLES = {"lineitem": 3, "orders": 3, "customer": 2, "nation": 1}


def joined(tables: dict[str, int]) -> tuple[Graph, dict[Any, Node]]:
    """Read tables, and join each partition with something that is there already; all go into shuffles then."""
    graph = Graph()
    roots: dict[Any, Node] = {}
    for table, count in tables.items():
        kept = filtered(graph, table, count)
        roots |= {key: node for key, node in graph.roots.items() if key[0] == table}
        parts = [
            graph.add(("join-" + table, i), rows, graph.add(("held-" + table, i)).key) for i, rows in enumerate(kept)
        ]
        graph.add("barrier-" + table, *(part.key for part in parts))
    return graph, roots


def counted(tables: dict[str, int], shares: list[Share], **kwargs: Any) -> dict[str, list[int]]:
    graph, roots = joined(tables)
    meets, _ = families.meetings(graph.nodes.values(), roots)
    assert {meets[key].key for key in roots} == {("join-" + table, i) for table, i in roots}
    dealt = families.by_meeting(list(roots.values()), meets, shares, lambda _: None, **kwargs)
    home_of = homes(dealt)
    assert home_of.keys() == roots.keys()
    return {
        table: [sum(home == share.worker for key, home in home_of.items() if key[0] == table) for share in shares]
        for table in tables
    }


def test_filtered_tables_that_are_shuffled_are_left_to_dask() -> None:
    graph = Graph()
    for table in ("lineitem", "orders", "customer"):
        graph.add("barrier-" + table, *filtered(graph, table, TABLES[table]))
    assert graph.deal([Share("a", 1), Share("b", 1)]) == []


def test_each_table_is_spread_over_the_workers() -> None:
    counts = counted(TABLES, [Share("a", 1), Share("b", 1)])
    assert sorted(counts["lineitem"]) == sorted(counts["orders"]) == [1, 2]
    assert counts["customer"] == [1, 1]
    # Who has more of one has less of the other.
    assert [sum(worker) for worker in zip(counts["lineitem"], counts["orders"], strict=True)] == [3, 3]


def test_who_begins_with_a_table_is_who_has_the_fewest_seconds() -> None:
    seconds = {"lineitem": 10.0, "orders": 1.0, "customer": 1.0, "nation": 0.0}
    shares = [Share("a", 1), Share("b", 1)]
    counts = counted(TABLES, shares, duration_of=lambda node: seconds[node.key[0]])
    more, less = sorted(range(2), key=lambda worker: counts["lineitem"][worker], reverse=True)
    assert [counts["orders"][worker] for worker in (more, less)] == [1, 2]
    # With nothing known, each had four so far.
    assert [counts["nation"][worker] for worker in (more, less)] == [0, 1]


def test_small_tables_are_spread_over_a_large_cluster() -> None:
    shares = [Share(f"w{i}", 1) for i in range(100)]
    counts = counted({f"table{i}": 2 for i in range(50)}, shares)
    assert {sum(worker) for worker in zip(*counts.values(), strict=True)} == {1}


def test_delayed_calls_are_one_collection() -> None:
    graph = Graph()
    graph.add("sum-0", *(graph.add(f"load-{i}").key for i in range(30)))
    assert graph.deal(WORKERS) == []


def test_families_are_dealt_by_threads() -> None:
    dealt = tree(24, 4).deal([Share("a", 1), Share("b", 2)])
    homes = [family.home for family in dealt]
    assert homes.count("b") == 2 * homes.count("a")


def row(nblocks: int, *, pieces: bool = False) -> Graph:
    """Blocks in a row, each of which meets the next; in the order of Dask, which is that of the digits; with ``pieces``, of two collections."""
    graph = Graph()
    for i in sorted(range(nblocks), key=str):
        for name in "xy" if pieces else "x":
            graph.add((name, i))
            graph.add((name + "-first", i), (name, i))
            graph.add((name + "-last", i), (name, i))
    for i in sorted(range(nblocks - 1), key=str):
        steps = [
            graph.add((name + "-step", i), (name + "-last", i), (name + "-first", i + 1)).key
            for name in "xy"[: 1 + pieces]
        ]
        if pieces:
            graph.add(("both", i), *steps)
    return graph


def borders(home_of: dict[Any, Any], name: str) -> int:
    """Count the blocks of which the next is elsewhere."""
    count = sum(key[0] == name for key in home_of)
    return sum(home_of[name, i] != home_of[name, i + 1] for i in range(count - 1))


def test_blocks_in_a_row_that_meet_the_next_are_dealt_in_a_row() -> None:
    for pieces in (False, True):
        home_of = homes(row(24, pieces=pieces).deal(WORKERS))
        assert len(home_of) == 24 * (1 + pieces)
        assert sorted(map(list(home_of.values()).count, "abc")) == [8 * (1 + pieces)] * 3
        for name in "xy"[: 1 + pieces]:
            assert borders(home_of, name) <= 4
        if pieces:
            assert sum(home_of["x", i] != home_of["y", i] for i in range(24)) <= 2


def test_rows_are_of_neighbours_only() -> None:
    # Each meets the one that is twelve away: what is next to it by its index is no neighbour.
    graph = Graph()
    for i in range(24):
        graph.add(("x", i))
    for i in range(12):
        graph.add(("far", i), ("x", i), ("x", i + 12))
    home_of = homes(graph.deal(WORKERS))
    assert all(home_of["x", i] == home_of["x", i + 12] for i in range(12))
    assert [home_of["x", i] for i in range(6)] == ["a", "b", "c"] * 2


def test_a_grid_is_not_dealt_in_rows() -> None:
    graph = Graph()
    for i, j in itertools.product(range(6), range(6)):
        graph.add(("x", i, j))
    for i, j in itertools.product(range(6), range(5)):
        graph.add(("step", i, j), ("x", i, j), ("x", i, j + 1))
    for i, j in itertools.product(range(5), range(6)):
        graph.add(("down", i, j), ("x", i, j), ("x", i + 1, j))
    runs = [len(list(run)) for _, run in itertools.groupby(graph.deal(WORKERS), key=lambda family: family.home)]
    assert max(runs) == 1


def pairs(npairs: int, *, several_ways: bool) -> Graph:
    """Pairs of neighbours that meet; and with ``several_ways``, what is made of one alone, too."""
    graph = Graph()
    for i in range(npairs):
        near = [graph.add(("x", 2 * i + side)).key for side in range(2)]
        graph.add(("pair", i), *near)
        if several_ways:
            for key in near:
                graph.add(("edge", key[1]), key)
    return graph


def test_families_are_split_where_a_worker_has_too_many_whose_results_go_several_ways() -> None:
    # Nine blocks for two workers each, of which pairs make four or six for one.
    shares = [Share(name, 1) for name in "abcd"]
    for several_ways, counts in ((True, [4, 4, 5, 5]), (False, [4, 4, 4, 6])):
        dealt = pairs(9, several_ways=several_ways).deal(shares)
        home_of = homes(dealt)
        assert len(home_of) == sum(len(family.keys) for family in dealt) == 18
        assert sorted(map(list(home_of.values()).count, "abcd")) == counts
    # By threads, and where it is even anyway.
    dealt = pairs(9, several_ways=True).deal([Share("a", 2), Share("b", 1)])
    assert list(homes(dealt).values()).count("a") == 12
    assert {len(family.keys) for family in dealt} == {2}


def test_pairs_of_two_collections_are_not_split() -> None:
    graph = Graph()
    for i in range(4):
        for name in "xy":
            graph.add((name, i))
            graph.add((name + "-edge", i), (name, i))
        graph.add(("sum", i), ("x", i), ("y", i))
    shares = [Share(name, 1) for name in "abc"]
    assert {len(family.keys) for family in graph.deal(shares)} == {2}


def test_a_family_goes_where_its_meeting_has_data() -> None:
    dealt = tree(24, 4).deal(WORKERS, lambda meeting: "b" if meeting.key == ("sum", 0) else None)
    assert dealt[0].home == "b"
    # Its load is counted: b gets no more than its share of the others.
    assert sorted(str(family.home) for family in dealt) == ["a", "a", "b", "b", "c", "c"]


def test_a_holder_that_is_no_candidate_is_not_dealt_to() -> None:
    assert {f.home for f in tree(24, 4).deal(WORKERS, lambda _: "gone")} == {"a", "b", "c"}


def homes(dealt: list[families.Family]) -> dict[Any, Any]:
    return {key: family.home for family in dealt for key in family.keys}


def grid(name: str, *shape: int) -> list[tuple[Any, tuple[int, ...]]]:
    return [((name, *index), index) for index in itertools.product(*map(range, shape))]


def test_collections_of_the_same_shape_lie_alike() -> None:
    for shape in ((7,), (4, 6), (5, 5), (2, 3, 4)):
        x = homes(families.by_position(grid("x", *shape), WORKERS))
        y = homes(families.by_position(reversed(grid("y", *shape)), WORKERS))
        assert {key[1:]: home for key, home in x.items()} == {key[1:]: home for key, home in y.items()}


def test_a_square_grid_lies_like_its_transpose() -> None:
    x = homes(families.by_position(grid("x", 9, 9), WORKERS))
    assert all(x["x", i, j] == x["x", j, i] for i in range(9) for j in range(9))
    counts = [list(x.values()).count(share.worker) for share in WORKERS]
    assert sum(counts) == 81
    assert max(counts) - min(counts) <= 4


def test_half_a_grid_and_blocks_with_the_same_index_are_walked_in_order() -> None:
    half = [block for block in grid("x", 4, 4) if block[1][0] >= block[1][1]]
    assert homes(families.by_position(half, WORKERS)).keys() == {key for key, _ in half}
    twice = [("x", (0, 0)), ("y", (0, 0)), ("z", (1, 1)), ("w", (1, 1))]
    assert homes(families.by_position(twice, WORKERS)).keys() == {"x", "y", "z", "w"}


def test_positions_are_dealt_by_threads() -> None:
    dealt = homes(families.by_position(grid("x", 12), [Share("a", 1), Share("b", 3)]))
    assert list(dealt.values()).count("a") == 3


def test_no_blocks_no_families() -> None:
    assert families.by_position([], WORKERS) == []
    assert families.by_meeting([], {}, WORKERS, lambda _: None) == []


def test_keys_of_blocks() -> None:
    assert families.index_of(("x", 1)) == ("x", (1,))
    assert families.index_of(("x",)) is None
    assert families.index_of(("x", "a")) is None
    assert families.index_of((("x",), 1)) is None
    assert families.index_of("x") is None


def test_a_family_prints_its_members_and_home() -> None:
    assert repr(families.Family(["x"], "a")) == "Family(['x'], home='a')"
