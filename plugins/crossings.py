"""Crossings: tasks that each take several results which many others take, too, as the products of two blocked matrices do.

Each result of a crossing is taken once.

Covers: :func:`by_crossing`, which groups crossings by where their results meet, and deals the groups, and the roots that they take.
Does not cover: roots that meet in another way; see :mod:`dask_gpurt.plugins.families`.

Theory of operation
-------------------
Where inputs are taken by one or two tasks, these tasks go where the inputs are. Where each input is taken by many, it has to travel
whatever is done, and two things count: that the results of crossings which meet (the products that are summed into one block) are made
on one worker, as each of them is as large as an input; and that a worker has crossings with few different inputs between them.
Both are answered by the index of the block in which they meet: the blocks are walked along a Z-shaped curve, which is cut
into a piece for each worker. Pieces of that curve are close to squares, and a square of blocks has the fewest rows and columns. If all
inputs are of one collection (``x @ x.T``), a block and its mirror image take the same inputs, and have one place on the curve. Where
crossings take what is made of other crossings (a factorization), the work goes over the blocks as a front, and pieces would be
idle before and after; there, rows and columns are dealt in turns to a grid of workers. Towards its end, what a front makes is taken by
fewer and fewer. These takers are crossings, too, as they are partial results of the same blocks, but for the very last ones.

A root that crossings take is dealt to a worker that has most of these crossings, as far as that is fair.

The answer is a plan, with the guard of all plans: a task leaves it if its worker would miss too much.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from dask_gpurt.plugins.families import MAX_FAMILY, PIECE, Family, index_of
from dask_gpurt.plugins.view import Node, Share

__all__ = ["SHARED", "by_crossing"]

#: Tasks from which on an input has to travel whatever is done.
SHARED = 5
#: The same where others of the kind take what is shared by as many as that.
FEW = 3
#: Crossings for each worker at least: fewer make no pieces of a curve.
ENOUGH = 4
#: Groups for each worker's thread at least, so that all have as many crossings.
GROUPS = 4
#: How far up it is sought where crossings meet, and how far down what they are made of.
LEVELS = 4

#: Key of a block in which crossings meet to its task, and the crossings.
_Groups = dict[Any, tuple[Node, list[Node]]]
#: The same, and the worker.
_Dealt = tuple[Node, list[Node], Hashable]


def by_crossing(
    nodes: Sequence[Node], roots: Mapping[Any, Node], meets: Mapping[Any, Node], shares: Sequence[Share]
) -> tuple[list[Family], list[Family], dict[Any, Hashable]]:
    """Form the families of crossings, and of the roots that they take.

    Parameters
    ----------
    nodes
        Tasks that are no roots.
    roots
        The roots.
    meets
        Key of a task to where its result meets others.
    shares
        The workers, in an order that does not change between calls.

    Returns
    -------
    Families of crossings; families of roots; and, by its key, the worker of each block in which crossings meet. All are empty
    where there are few crossings.
    """
    crossing = _crossings(nodes)
    if len(crossing) < ENOUGH * len(shares):
        return [], [], {}
    fair = len(crossing) // sum(share.nthreads for share in shares)
    groups = _groups(crossing, meets, min(fair // GROUPS, MAX_FAMILY))
    if _is_front(crossing):
        dealt = _in_turns(groups, shares)
    else:
        folded = len({_collection(dep.key) for node in crossing for dep in node.dependencies}) == 1
        dealt = _in_pieces(groups, shares, len(crossing), folded)
    families: list[Family] = []
    homes: dict[Any, Hashable] = {}
    home_of: dict[Any, Hashable] = {}
    for target, members, home in dealt:
        homes[target.key] = home
        keys = [node.key for node in members]
        home_of.update(dict.fromkeys(keys, home))
        families.append(Family(keys, home, "crossing", target.key, waits=False))
    return families, _with_their_crossings(crossing, roots, home_of, shares), homes


def _is_front(crossing: Sequence[Node]) -> bool:
    """Whether crossings take what has been made of crossings: then work goes over the blocks as a front."""
    keys = {node.key for node in crossing}
    made = {dep.key: dep for node in crossing for dep in node.dependencies}
    seen = set(made)
    for _ in range(LEVELS):
        made = {origin.key: origin for node in made.values() for origin in node.dependencies if origin.key not in seen}
        if not keys.isdisjoint(made):
            return True
        seen.update(made)
    return False


def _collection(key: Any) -> Any:
    block = index_of(key)
    return key if block is None else block[0]


def _in_pieces(groups: _Groups, shares: Sequence[Share], ncrossings: int, folded: bool) -> Iterator[_Dealt]:
    """Deal groups by pieces of the curve."""
    total_threads = sum(share.nthreads for share in shares)
    bounds = [upto / total_threads for upto in accumulate(share.nthreads for share in shares)]
    position = 0
    for target, members in sorted(groups.values(), key=lambda group: _along_the_curve(group[0], folded)):
        fraction = (position + len(members) / 2) / ncrossings
        position += len(members)
        yield target, members, shares[min(bisect_right(bounds, fraction), len(shares) - 1)].worker


def _in_turns(groups: _Groups, shares: Sequence[Share]) -> Iterator[_Dealt]:
    """Deal groups so that each row and each column of blocks is shared by few workers, and all workers have some of any part."""
    threads = [share.worker for share in shares for _ in range(share.nthreads)]
    height = next(side for side in range(math.isqrt(len(threads)), 0, -1) if len(threads) % side == 0)
    width = len(threads) // height
    for number, (target, members) in enumerate(groups.values()):
        block = index_of(target.key)
        row, column = (block[1][0], block[1][-1]) if block is not None else (number // width, number)
        yield target, members, threads[row % height * width + column % width]


def _crossings(nodes: Sequence[Node]) -> list[Node]:
    kinds = {_collection(node.key) for node in nodes if _is_crossing(node)}
    return [node for node in nodes if _is_crossing(node, FEW) and _collection(node.key) in kinds] if kinds else []


def _is_crossing(node: Node, shared: int = SHARED) -> bool:
    # What is wanted by several itself is no partial result: a step of a stencil has shared inputs, too.
    inputs = node.dependencies
    if len(inputs) < 2 or len(node.dependents) != 1:
        return False
    return all(len(dep.dependents) >= shared for dep in inputs)


def _groups(crossing: Sequence[Node], meets: Mapping[Any, Node], most: int) -> _Groups:
    """Group crossings by where they meet first, and by what is above that as far as a group has no more than ``most``."""
    groups: _Groups = {}
    for node in crossing:
        target = meets.get(node.key)
        _add(groups, node if target is None or _is_crossing(target) else target, [node])
    for _ in range(LEVELS):
        above: dict[Any, Node] = {}
        sizes: Counter[Any] = Counter()
        for key, (target, members) in groups.items():
            following = meets.get(key)
            # What is shared in turn has to travel from there on, and crossings are not grouped by other crossings.
            if following is not None and len(target.dependents) < SHARED and not _is_crossing(following):
                above[key] = following
                key = following.key  # noqa: PLW2901
            sizes[key] += len(members)
        wider: _Groups = {}
        for key, (target, members) in groups.items():
            following = above.get(key)
            _add(wider, target if following is None or sizes[following.key] > most else following, members)
        if wider.keys() == groups.keys():
            break
        groups = wider
    return groups


def _add(groups: _Groups, target: Node, members: list[Node]) -> None:
    groups.setdefault(target.key, (target, []))[1].extend(members)


def _along_the_curve(target: Node, folded: bool) -> tuple[int, Any]:
    """Return the position of a block on the curve; blocks without an index come in the order of their priority."""
    block = index_of(target.key)
    if block is None:
        return 0, target.priority
    # The bits of the coordinates, in turns.
    _, index = block
    if folded and index[0] < index[-1]:
        index = index[::-1]
    position = 0
    for bit in range(max(index).bit_length()):
        for axis, coordinate in enumerate(reversed(index)):
            position |= (coordinate >> bit & 1) << (bit * len(index) + axis)
    return position, target.priority


def _with_their_crossings(
    crossing: Sequence[Node], roots: Mapping[Any, Node], home_of: Mapping[Any, Hashable], shares: Sequence[Share]
) -> list[Family]:
    """Deal the roots that crossings take to workers of theirs."""
    takers: dict[Any, Counter[Hashable]] = {}
    for node in crossing:
        for dep in node.dependencies:
            if dep.key in roots:
                takers.setdefault(dep.key, Counter())[home_of[node.key]] += 1
    threads = {share.worker: share.nthreads for share in shares}
    fair = len(takers) / sum(threads.values())
    dealt: Counter[Hashable] = Counter()
    families: list[Family] = []
    open_families: dict[Hashable, Family] = {}
    for key in sorted(takers, key=lambda key: roots[key].priority):
        wanting = takers[key]
        able = [worker for worker in wanting if dealt[worker] < fair * threads[worker]]
        if able:
            home = max(able, key=lambda worker: (wanting[worker], -dealt[worker] / threads[worker]))
        else:
            home = min(threads, key=lambda worker: dealt[worker] / threads[worker])
        dealt[home] += 1
        family = open_families.get(home)
        if family is None or len(family.keys) >= PIECE:
            family = open_families[home] = Family([], home, "crossed", early=True)
            families.append(family)
        family.keys.append(key)
    return families
