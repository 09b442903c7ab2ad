"""Families: which root tasks belong on one worker, and which worker that is.

Covers: where results meet (:func:`meetings`), families by meeting (:func:`by_meeting`) and by position
(:func:`by_position`), and dealing families to workers.
Does not cover: when a root task starts, or what becomes of a plan whose worker is gone; see
:mod:`dask_gpurt.plugins.placement`. Tasks that are not roots follow their data; see :mod:`dask_gpurt.plugins.policy`.

Theory of operation
-------------------
A *root* is a task whose inputs do not say where it should run: it has none, or all workers will need them. Where the
roots go decides where everything after them goes, since later tasks stay with their inputs.

1. Roots that **meet** form a family: the first task, in order of priority, that takes results of several others
   and is reached from a root through tasks with one input each, is the meeting of that root. The siblings under a
   first reduction meet there, and so do the blocks of two collections that are added. An input that very many tasks
   take (a broadcast) makes no meeting, as it has to go everywhere; and neither does a task that takes several results of
   one and the same block (a filter by two of its columns): that is a link of the block's chain.
2. A meeting that gathers most of a collection (the barrier of a shuffle, the last step of a reduction) is no reason to
   put anything anywhere: those roots are not planned. One that gathers more than a fair share of a collection is
   cut into pieces. So are families as such: dealing *small* families in order of priority keeps few reductions open
   at a time, and memory low.
3. A meeting that also takes results that are in memory already draws its family to the worker that holds
   most of them. All other families are dealt in order of priority to the worker with the least so far for its
   threads, a few in a row where their meetings meet soon in turn, so that the next level of a reduction is local, too, or
   where blocks lie in a row and each meets the next (differences along an axis).
   Each collection is dealt by itself: blocks of one collection cost much the same, and those of two may differ a
   hundredfold, so three blocks of a large table on one worker are not made up for by three of a small one on the other.
   Only who begins with a collection is decided over all of them, by the seconds that the roots dealt so far will take.
   Where there are few families for each worker, some workers have more than others then. Families of these are split, if the results
   of their members go several ways, so that parts of them travel anyway (the neighbours in a stencil, unlike the leaves of a tree).
4. Roots that meet nobody in the graph at hand (a collection that is persisted) are dealt by **position**: the i-th of
   n blocks goes to the worker that holds the fraction i / n of the cluster's threads. Collections of the same shape,
   persisted at different times, lie alike, and a later ``x + y`` moves nothing. A square grid is walked so that the
   blocks (i, j) and (j, i) are neighbours on one worker: ``x + x.T`` moves nothing, either.

All functions are deterministic. Cost: linear in tasks and edges, but for sorting.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import accumulate
from math import ceil, inf
from typing import Any

from dask_gpurt.plugins.view import Node, Share

__all__ = ["MAX_FAMILY", "WIDE", "Family", "by_meeting", "by_position", "index_of", "meetings"]

#: Members of a family at most: what one worker opens at once for one reduction.
MAX_FAMILY = 32
#: An input with more dependents than this is a broadcast: it says nothing about who belongs together.
WIDE = 16
#: Members of neighbouring families that are dealt to one worker in a row, and how far up their neighbourhood is sought.
#: More would save some transfers high up in a reduction, and keep more of its partial results in memory.
NEIGHBOURHOOD = 16
LEVELS = 4
#: Members of a piece of a collection that is dealt by position: the unit in which the balancer moves such work.
PIECE = 4
#: How many times what is fair a worker may get of a collection until families are split.
UNEVEN = 1.1


class Family:
    """Root tasks that belong on one worker.

    Attributes
    ----------
    keys
        The members, in order of priority.
    home
        The worker to which the family was dealt.
    kind
        Why they belong together, and to that worker; one of :data:`dask_gpurt.explanation.KINDS`.
    at
        Key of the task in which their results meet; None if there is none.
    waits
        Whether members wait until their worker has a free slot, as roots do, or are sent as soon as they are ready.
    early
        Whether some members are sent though their worker has no free slot: others wait for their results.
    moved
        Why the family was last given to another worker, and from which; None if it is where it was dealt.
    """

    __slots__ = ("at", "early", "home", "keys", "kind", "moved", "waits")

    def __init__(
        self,
        keys: list[Any],
        home: Hashable,
        kind: str = "meeting",
        at: Any = None,
        *,
        waits: bool = True,
        early: bool = False,
    ) -> None:
        self.keys = keys
        self.home = home
        self.kind = kind
        self.at = at
        self.waits = waits
        self.early = early
        self.moved: tuple[str, Any] | None = None

    def __repr__(self) -> str:
        return f"Family({list(self.keys)!r}, home={self.home!r})"


def meetings(
    nodes: Iterable[Node], roots: Mapping[Any, Node] | set[Any], *, wide: int = WIDE
) -> tuple[dict[Any, Node], dict[Any, Node]]:
    """Find where the result of each of ``nodes`` first meets others, and where its chain ends if it meets none.

    Parameters
    ----------
    nodes
        Roots, and all tasks that lead on from them and have dependents.
    roots
        Keys of the roots. A root is never a meeting, whatever inputs it has.
    wide
        Dependents from which on an input counts as a broadcast.

    Returns
    -------
    Key to the meeting, and key to the last task of the chain for those that have no meeting. Of a task that is a meeting
    itself, the meeting is the next one on the way.
    """
    # Key of each link of a chain to the key of the chain's first task; what is in no chain is its own origin.
    origins: dict[Any, Any] = {}
    origin_of = origins.get
    joins: dict[Any, bool] = {}

    def is_join(node: Node) -> bool:
        inputs = node.dependencies
        if len(inputs) < 2:
            return False
        key = node.key
        known = joins.get(key)
        if known is None:
            known = joins[key] = key not in roots and comes_of_several(key, inputs)
        return known

    def comes_of_several(key: Any, inputs: Iterable[Node]) -> bool:
        # One narrow input beside broadcasts is a chain; where all are wide (a product), they do meet here.
        for most in (wide, inf):
            origin = None
            for dep in inputs:
                if len(dep.dependents) <= most:
                    dep_origin = origin_of(dep.key, dep.key)
                    if origin is None:
                        origin = dep_origin
                    elif dep_origin != origin:
                        return True
            if origin is not None:
                origins[key] = origin
                break
        return False

    # A task runs after its inputs, so its priority is the larger number: in this order inputs come first.
    ordered = sorted(nodes, key=_priority)
    for node in ordered:
        inputs = node.dependencies
        if len(inputs) == 1:
            key = node.key
            if key not in roots:
                (dep,) = inputs
                origins[key] = origin_of(dep.key, dep.key)
        elif inputs:
            is_join(node)
    meets: dict[Any, Node] = {}
    ends: dict[Any, Node] = {}
    for node in reversed(ordered):
        key = node.key
        meeting: Node | None = None
        end: Node | None = None
        for dependent in node.dependents:
            met = dependent if is_join(dependent) else meets.get(dependent.key)
            if met is not None:
                if meeting is None or met.priority < meeting.priority:
                    meeting = met
            elif meeting is None:
                last = ends.get(dependent.key)
                if last is not None and (end is None or last.priority < end.priority):
                    end = last
        if meeting is not None:
            meets[key] = meeting
        else:
            ends[key] = node if end is None else end
    return meets, ends


def by_meeting(
    roots: Sequence[Node],
    meets: Mapping[Any, Node],
    shares: Sequence[Share],
    holder_of: Callable[[Node], Hashable | None],
    duration_of: Callable[[Node], float] = lambda _: 0.0,
    *,
    max_family: int = MAX_FAMILY,
) -> list[Family]:
    """Form the families of ``roots`` that meet, and deal them.

    Parameters
    ----------
    roots
        The roots that have a meeting, in order of priority.
    meets
        Key of a root to its meeting.
    shares
        The workers.
    holder_of
        The worker that holds most of what a meeting takes and that is in memory already; None if there is none.
    duration_of
        Expected duration of a root, in seconds; 0 if it is not known. One root of each collection is asked for.
    max_family
        Members of a family at most.

    Returns
    -------
    The families, in order of priority but for parts that were split off. Roots of which a meeting gathers most of their collection are in none.
    """
    groups: dict[Any, list[Any]] = {}
    order: list[Node] = []
    for root in roots:
        meeting = meets[root.key]
        members = groups.get(meeting.key)
        if members is None:
            groups[meeting.key] = [root.key]
            order.append(meeting)
        else:
            members.append(root.key)
    totals = Counter(map(_collection, (root.key for root in roots)))
    # By collection, and not for all roots together: a table of four partitions is shared by two workers, however many
    # other tables the graph reads.
    fair_of = {collection: -(-total // max(len(shares), 1)) for collection, total in totals.items()}
    costs = _costs(roots, duration_of)
    dealer = _Dealer(shares)
    families: list[Family] = []
    undealt: list[_Group] = []
    for meeting in order:
        members = groups[meeting.key]
        counts = _count(members)
        gathered = {name for name, count in counts.items() if count > max(fair_of[name], totals[name] // 2)}
        if gathered:
            # What they share with others (a few inputs that every block takes) says nothing against the others.
            members = [key for key in members if _collection(key) not in gathered]
            if not members:
                continue
            counts = _count(members)
        size = min(sum(map(fair_of.__getitem__, counts)), max_family)
        home = holder_of(meeting)
        if home is not None and not dealer.place(home, counts, costs):
            home = None
        kind = "meeting" if home is None else "holder"
        for start in range(0, len(members), size):
            whole = len(members) <= size
            family = Family(members if whole else members[start : start + size], home, kind, meeting.key)
            families.append(family)
            if home is None:
                undealt.append(_Group(family, meeting, counts if whole else _count(family.keys), costs))
    fair = max(1, -(-len(roots) // max(len(shares), 1)))
    by_collection: defaultdict[Any, list[_Group]] = defaultdict(list)
    groups_of_neighbours = _neighbourhoods(undealt, meets, fair_of, min(fair, NEIGHBOURHOOD))
    # As many members that each worker gets as many rows.
    for group in _rows(groups_of_neighbours, roots, fair_of, ceil(fair / ceil(fair / NEIGHBOURHOOD))):
        # A group of several collections is dealt as a part of the largest of them; of equals, the last by name, so that
        # all such groups agree.
        counts = group.counts
        most = next(iter(counts)) if len(counts) == 1 else max(counts, key=lambda name: (totals[name], str(name)))
        by_collection[most].append(group)
    for collection, parts in by_collection.items():
        dealer.deal(collection, parts)
        over = dealer.uneven(collection, parts)
        if over:
            families += dealer.level(collection, over, {root.key for root in roots if len(root.dependents) > 1})
    return families


def by_position(ends: Iterable[tuple[Any, tuple[int, ...]]], shares: Sequence[Share]) -> list[Family]:
    """Deal the roots of one collection by the position of their blocks.

    Parameters
    ----------
    ends
        Key of each root, and the index of the block that it becomes.
    shares
        The workers, in an order that does not change between calls.

    Returns
    -------
    Families of neighbours, each with a home.
    """
    blocks = sorted(ends, key=lambda block: block[1])
    if not blocks:
        return []
    walk = _mirrored(blocks) if _is_square(blocks) else [[key] for key, _ in blocks]
    total_threads = sum(share.nthreads for share in shares)
    # Worker w takes the positions up to bounds[w], as a fraction of all.
    bounds = [upto / total_threads for upto in accumulate(share.nthreads for share in shares)]
    families: list[Family] = []
    members: list[Any] = []
    home: Hashable = None
    position = 0
    for together in walk:
        fraction = (position + 0.5) / len(blocks)
        worker = shares[min(bisect_right(bounds, fraction), len(shares) - 1)].worker
        position += len(together)
        if members and (worker != home or len(members) >= PIECE):
            families.append(Family(members, home, "position"))
            members = []
        home = worker
        members.extend(together)
    families.append(Family(members, home, "position"))
    return families


def index_of(key: object) -> tuple[str, tuple[int, ...]] | None:
    """Split the key of a block into its collection and its index; None if it is not the key of a block.

    Examples
    --------
    >>> index_of(("x", 2, 3))
    ('x', (2, 3))
    >>> index_of("inc-1")
    """
    if type(key) is not tuple or len(key) < 2 or type(key[0]) is not str:
        return None
    index = key[1:]
    if not all(type(i) is int for i in index):
        return None
    return key[0], index


def _collection(key: Any) -> Any:
    """Tell what a root is a part of: a collection by its name, or delayed calls by their function."""
    if type(key) is tuple and key:
        return key[0]
    return key.rpartition("-")[0] if type(key) is str else None


def _priority(node: Node) -> Any:
    return node.priority


def _count(keys: Iterable[Any]) -> dict[Any, int]:
    """Count roots by collection."""
    counts: dict[Any, int] = {}
    for key in keys:
        collection = _collection(key)
        counts[collection] = counts.get(collection, 0) + 1
    return counts


def _cost(counts: Mapping[Any, int], costs: Mapping[Any, float]) -> float:
    return sum(count * costs[collection] for collection, count in counts.items())


def _costs(roots: Sequence[Node], duration_of: Callable[[Node], float]) -> dict[Any, float]:
    """Tell what a root of each collection costs: its duration, or that of a typical root where it is not known."""
    costs: dict[Any, float] = {}
    for root in roots:
        collection = _collection(root.key)
        if collection not in costs:
            costs[collection] = duration_of(root)
    known = [cost for cost in costs.values() if cost > 0]
    typical = sum(known) / len(known) if known else 1.0
    return {collection: cost if cost > 0 else typical for collection, cost in costs.items()}


class _Group:
    """Families that are dealt to one worker in a row.

    Attributes
    ----------
    parts
        The families, each with its cost.
    meeting
        Where they meet.
    counts
        Members by collection.
    size
        Members.
    """

    __slots__ = ("counts", "meeting", "parts", "size")

    def __init__(self, family: Family, meeting: Node, counts: dict[Any, int], costs: Mapping[Any, float]) -> None:
        self.parts = [(family, _cost(counts, costs))]
        self.meeting = meeting
        self.counts = counts
        self.size = len(family.keys)

    def absorb(self, other: _Group, fair_of: Mapping[Any, int], limit: int) -> bool:
        """Take over another group; False if there are too many members then, in all or of one collection."""
        if self.size + other.size > limit:
            return False
        counts = self.counts
        if any(counts.get(name, 0) + count > fair_of[name] for name, count in other.counts.items()):
            return False
        for name, count in other.counts.items():
            counts[name] = counts.get(name, 0) + count
        self.parts += other.parts
        self.size += other.size
        return True


def _neighbourhoods(
    groups: list[_Group], meets: Mapping[Any, Node], fair_of: Mapping[Any, int], limit: int
) -> list[_Group]:
    """Put groups together whose meetings meet in turn.

    A group has no more than ``limit`` members then, and no more than a fair share of any collection.
    """
    for _ in range(LEVELS):
        wider: list[_Group] = []
        # Meeting to the group there that is still open.
        open_groups: dict[Any, _Group] = {}
        for group in groups:
            following = meets.get(group.meeting.key, group.meeting)
            known = open_groups.get(following.key)
            if known is None or not known.absorb(group, fair_of, limit):
                wider.append(group)
                open_groups[following.key] = group
                group.meeting = following
        if len(wider) == len(groups):
            break
        groups = wider
    return groups


def _rows(groups: list[_Group], roots: Sequence[Node], fair_of: Mapping[Any, int], limit: int) -> list[_Group]:
    """Put groups of neighbours together where blocks lie in a row, and each meets the next.

    A group has no more than ``limit`` members then, and no more than a fair share of any collection.
    """
    # Number of axes to the first index and the number of each group with a block of so many.
    places: defaultdict[int, list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for number, group in enumerate(groups):
        if 2 * group.size <= limit:
            indices = [at[1] for family, _ in group.parts for key in family.keys if (at := index_of(key)) is not None]
            if indices:
                first = min(indices)
                places[len(first)].append((first, number))
    # Blocks of a grid have neighbours in all directions: rows of it would be as far apart as they were.
    rows = [
        row
        for row in places.values()
        if sum(len(set(axis)) > 1 for axis in zip(*(at for at, _ in row), strict=True)) == 1
    ]
    if not rows:
        return groups
    nodes = {root.key: root for root in roots}
    gone: set[int] = set()
    for row in rows:
        # Where results meet others, to the group that was the last to reach there.
        reached: dict[Any, int] = {}
        for _, number in sorted(row):
            ways = _ways(nodes[key] for family, _ in groups[number].parts for key in family.keys)
            to = number
            for neighbour in sorted({reached[way] for way in ways if way in reached}, reverse=True):
                if groups[neighbour].absorb(groups[number], fair_of, limit):
                    to = neighbour
                    gone.add(number)
                    break
            reached.update(dict.fromkeys(ways, to))
    return [group for number, group in enumerate(groups) if number not in gone]


def _ways(roots: Iterable[Node]) -> set[Any]:
    """Return the keys of the tasks in which results of ``roots`` first meet others, on each way that they go."""
    met: set[Any] = set()
    todo = list(roots)
    while todo:
        for dependent in todo.pop().dependents:
            if len(dependent.dependencies) > 1:
                met.add(dependent.key)
            else:
                todo.append(dependent)
    return met


class _Dealer:
    """Deal collections, one after the other.

    Parameters
    ----------
    shares
        The workers.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        self._shares = shares
        self._positions = {share.worker: position for position, share in enumerate(shares)}
        #: Cost of all that was dealt to a worker, for each of its threads.
        self._loads = [0.0] * len(shares)
        #: The loads as a heap, with positions; an entry that has become too small is corrected when it is met.
        self._by_load = [(0.0, position) for position in range(len(shares))]
        #: Collection to position to the members that are there: for a reason of their own, and once it is dealt, all.
        self._placed: defaultdict[Any, Counter[int]] = defaultdict(Counter)

    def place(self, worker: Hashable, counts: Mapping[Any, int], costs: Mapping[Any, float]) -> bool:
        """Count members that ``worker`` gets whatever its load; False if there is no such worker."""
        position = self._positions.get(worker)
        if position is None:
            return False
        for collection, count in counts.items():
            self._placed[collection][position] += count
        self._loads[position] += _cost(counts, costs) / self._shares[position].nthreads
        return True

    def deal(self, collection: Any, groups: Sequence[_Group]) -> None:
        """Give each group, in turn, to the worker with the least of the collection, or as much of it as is fair.

        Of workers with as much of the collection, the one with the least of all collections comes first.
        """
        shares, loads = self._shares, self._loads
        placed = self._placed.get(collection) or Counter()
        members = sum(group.size for group in groups) + placed.total()
        fair = members / sum(share.nthreads for share in shares)
        # No more workers than can get something, so that many small collections on a large cluster take no longer.
        nparts = sum(len(group.parts) for group in groups)
        positions = self._least_loaded(min(len(shares), nparts + len(placed)))
        heap = [(placed[position] / shares[position].nthreads, rank) for rank, position in enumerate(positions)]
        heapq.heapify(heap)
        for group in groups:
            dealt, rank = heapq.heappop(heap)
            nthreads = shares[positions[rank]].nthreads
            for family, cost in group.parts:
                # The nearest to fair that whole families allow.
                if dealt + len(family.keys) / nthreads / 2 > fair:
                    dealt, rank = heapq.heappushpop(heap, (dealt, rank))
                    nthreads = shares[positions[rank]].nthreads
                position = positions[rank]
                family.home = shares[position].worker
                dealt += len(family.keys) / nthreads
                loads[position] += cost / nthreads
            heapq.heappush(heap, (dealt, rank))
        for position in positions:
            heapq.heappush(self._by_load, (loads[position], position))

    def uneven(self, collection: Any, groups: Sequence[_Group]) -> dict[int, list[Family]]:
        """Count what was dealt of a collection; return the positions that have got much more than is fair, with their families."""
        counts = self._placed[collection]
        dealt: defaultdict[int, list[Family]] = defaultdict(list)
        for group in groups:
            for family, _ in group.parts:
                position = self._positions[family.home]
                counts[position] += len(family.keys)
                if len(group.counts) == 1:
                    dealt[position].append(family)
        each = self._each(counts)
        return {
            at: parts for at, parts in dealt.items() if counts[at] > UNEVEN * ceil(each * self._shares[at].nthreads)
        }

    def level(self, collection: Any, over: Mapping[int, list[Family]], may_leave: set[Any]) -> list[Family]:
        """Split families of workers that have got too much of a collection; return the parts, each with a home that has less."""
        counts = self._placed[collection]
        each = self._each(counts)
        fair = [ceil(each * share.nthreads) for share in self._shares]
        under = [(counts[position], position) for position, most in enumerate(fair) if counts[position] < most]
        heapq.heapify(under)
        parts: list[Family] = []
        for position, dealt in over.items():
            for family in reversed(dealt):
                keys = family.keys
                while under and counts[position] > fair[position] and len(keys) > 1 and keys[-1] in may_leave:
                    _, to = heapq.heappop(under)
                    parts.append(Family([keys.pop()], self._shares[to].worker, family.kind, family.at))
                    counts[position] -= 1
                    counts[to] += 1
                    if counts[to] < fair[to]:
                        heapq.heappush(under, (counts[to], to))
        return parts

    def _each(self, counts: Counter[int]) -> float:
        """Return the fair share of a thread."""
        return counts.total() / sum(share.nthreads for share in self._shares)

    def _least_loaded(self, number: int) -> list[int]:
        """Take the positions of the least loaded workers from the heap, least first."""
        heap, loads = self._by_load, self._loads
        positions: list[int] = []
        while len(positions) < number:
            load, position = heapq.heappop(heap)
            if load < loads[position]:
                heapq.heappush(heap, (loads[position], position))
            else:
                positions.append(position)
        return positions


def _is_square(blocks: Sequence[tuple[Any, tuple[int, ...]]]) -> bool:
    first = blocks[0][1]
    if len(first) != 2 or first != (0, 0):
        return False
    side, across = blocks[-1][1]
    return 0 < side == across and (side + 1) ** 2 == len(blocks) == len({index for _, index in blocks})


def _mirrored(blocks: Sequence[tuple[Any, tuple[int, ...]]]) -> list[list[Any]]:
    """Walk a square grid so that a block comes with its mirror image."""
    keys = {index: key for key, index in blocks}
    side = blocks[-1][1][0] + 1
    walk = []
    for i in range(side):
        walk.append([keys[i, i]])
        walk.extend([keys[i, j], keys[j, i]] for j in range(i + 1, side))
    return walk
