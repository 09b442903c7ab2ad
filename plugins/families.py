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
   take (a broadcast) makes no meeting, as it has to go everywhere.
2. A meeting that gathers most of a collection (the barrier of a shuffle, the last step of a reduction) is no reason to
   put anything anywhere: those roots are not planned. One that gathers more than a fair share of a collection is
   cut into pieces. So are families as such: dealing *small* families in order of priority keeps few reductions open
   at a time, and memory low.
3. A meeting that also takes results that are in memory already draws its family to the worker that holds
   most of them. All other families are dealt in order of priority to the worker with the least so far for its
   threads, a few in a row where their meetings meet soon in turn, so that the next level of a reduction is local, too.
4. Roots that meet nobody in the graph at hand (a collection that is persisted) are dealt by **position**: the i-th of
   n blocks goes to the worker that holds the fraction i / n of the cluster's threads. Collections of the same shape,
   persisted at different times, lie alike, and a later ``x + y`` moves nothing. A square grid is walked so that the
   blocks (i, j) and (j, i) are neighbours on one worker: ``x + x.T`` moves nothing, either.

All functions are deterministic. Cost: linear in tasks and edges, but for sorting.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import accumulate
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


class Family:
    """Root tasks that belong on one worker.

    Attributes
    ----------
    keys
        The members, in order of priority.
    home
        The worker to which the family was dealt.
    """

    __slots__ = ("home", "keys")

    def __init__(self, keys: Sequence[Any], home: Hashable) -> None:
        self.keys = keys
        self.home = home

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
    joins: dict[Any, bool] = {}

    def is_join(node: Node) -> bool:
        inputs = node.dependencies
        if len(inputs) < 2:
            return False
        key = node.key
        known = joins.get(key)
        if known is None:
            narrow = sum(1 for dep in inputs if len(dep.dependents) <= wide)
            # One narrow input beside broadcasts is a chain; where all are wide (a product), they do meet here.
            known = joins[key] = narrow != 1 and key not in roots
        return known

    meets: dict[Any, Node] = {}
    ends: dict[Any, Node] = {}
    # A task runs after its inputs, so its priority is the larger number: in this order dependents come first.
    for node in sorted(nodes, key=_priority, reverse=True):
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
    max_family
        Members of a family at most.

    Returns
    -------
    The families, in order of priority. Roots of which a meeting gathers most of their collection are in none.
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
    totals = Counter(_collection(root.key) for root in roots)
    fair = max(1, -(-len(roots) // max(len(shares), 1)))
    position_of = {share.worker: position for position, share in enumerate(shares)}
    families: list[Family] = []
    undealt: list[tuple[list[Family], Node]] = []
    load = [0.0] * len(shares)
    for meeting in order:
        members = groups[meeting.key]
        counts = Counter(map(_collection, members))
        # By collection, and not for all roots together: a table of four partitions is shared by two workers, however
        # many other tables the graph reads.
        fair_of = {collection: -(-totals[collection] // max(len(shares), 1)) for collection in counts}
        if any(count > max(fair_of[name], totals[name] // 2) for name, count in counts.items()):
            continue
        size = min(sum(fair_of.values()), max_family)
        home = holder_of(meeting)
        position = position_of.get(home) if home is not None else None
        pieces = [
            Family(members[start : start + size], None if position is None else home)
            for start in range(0, len(members), size)
        ]
        families.extend(pieces)
        if position is None:
            undealt.extend(([piece], meeting) for piece in pieces)
        else:
            load[position] += len(members) / shares[position].nthreads
    _deal(_neighbourhoods(undealt, meets, min(fair, NEIGHBOURHOOD)), shares, load)
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
            families.append(Family(members, home))
            members = []
        home = worker
        members.extend(together)
    families.append(Family(members, home))
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


def _neighbourhoods(
    families: Sequence[tuple[list[Family], Node]], meets: Mapping[Any, Node], limit: int
) -> list[list[Family]]:
    """Put families together whose meetings meet in turn, as long as they have no more than ``limit`` members."""
    groups = list(families)
    for _ in range(LEVELS):
        wider: list[tuple[list[Family], Node]] = []
        # Meeting to the group there that is still open, and its members.
        open_groups: dict[Any, tuple[list[Family], int]] = {}
        for group, meeting in groups:
            size = sum(len(family.keys) for family in group)
            following = meets.get(meeting.key, meeting)
            known, held = open_groups.get(following.key, (group, 0))
            if held and held + size <= limit:
                known.extend(group)
                open_groups[following.key] = known, held + size
            else:
                wider.append((group, following))
                open_groups[following.key] = group, size
        if len(wider) == len(groups):
            break
        groups = wider
    return [group for group, _ in groups]


def _deal(groups: Sequence[Sequence[Family]], shares: Sequence[Share], load: Sequence[float]) -> None:
    """Give each group, in turn, to the worker with the least load for its threads, or as much of it as is fair."""
    members = sum(len(family.keys) for group in groups for family in group)
    nthreads = sum(share.nthreads for share in shares)
    assigned = sum(load[position] * share.nthreads for position, share in enumerate(shares))
    fair = (members + assigned) / nthreads
    heap = [(load[position], position) for position in range(len(shares))]
    heapq.heapify(heap)
    for group in groups:
        loaded, position = heapq.heappop(heap)
        for family in group:
            # The nearest to fair that whole families allow.
            if loaded + len(family.keys) / shares[position].nthreads / 2 > fair:
                loaded, position = heapq.heappushpop(heap, (loaded, position))
            family.home = shares[position].worker
            loaded += len(family.keys) / shares[position].nthreads
        heapq.heappush(heap, (loaded, position))


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
