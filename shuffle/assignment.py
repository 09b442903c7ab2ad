"""Which worker makes which output partition: a pure decision over arrays.

Covers: how much each worker should get (:func:`targets`), of which links are a part (:func:`link_prices`), and who gets
what (:func:`assign`).
Does not cover: where sizes come from (:mod:`dask_gpurt.shuffle.sizes`), and what the scheduler knows of workers and of
consumers (:mod:`dask_gpurt.shuffle.assigner`).

Theory of operation
    Stock deals outputs by *ranges*: the first n-th to one worker, the next to another. That keeps neighbours together, and is
    right where outputs are alike. It is given up only where that makes the fullest worker less full by
    :data:`TOLERANCE`; fullness is the expected bytes of a worker's outputs over those that it should get.

    The alternative is dealt in two steps. *Large* outputs, of which a worker could take few, go one by one, the largest
    first, to the worker that they leave the least full (LPT, which keeps the fullest worker within 4/3 of the best that
    there is). The *small* ones fill the workers up to one level, in stock's order, so that neighbours stay together here
    too. That level is at most the mean, and each worker is over it by at most one small output, so where workers are
    alike the whole stays within 4/3 of the best.

    An output whose consumer has its other inputs on some worker had better be there. That is tried first, and taken as far as
    the balance allows: ties are decided for it, and up to :data:`TOLERANCE` is paid for it.

    *Links.* Inputs are taken to be where the threads are. So a part ``inputs[s] * shares[w]`` of the bytes goes from s to w,
    all links at a time, and the shuffle is over when the last of them has carried its part, or the last worker has done its
    work. A worker to which most of the others' links are slow gets less, in proportion, if by that account it makes the
    shuffle quicker by :data:`GAIN_MIN`. It does where a worker *receives* slowly. It does not where its link is slow both
    ways: what it holds has to leave by that link anyway, and outputs that went elsewhere would make that more. One slow
    link among many does not count: mostly it is an error of measurement. What nobody has measured is as the (geometric)
    mean of what was.

    All is deterministic: same arguments, same answer. Stock gives the first range to another worker each time, for the sake of
    many small shuffles. What is dealt here begins with the first worker each time: the same shuffle again, as in a loop, gives
    each worker the same again, and so what its memory pool has kept from the last time fits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["GAIN_MIN", "TOLERANCE", "WORK_NBYTES_S", "Host", "assign", "fullness", "link_prices", "ranges", "targets"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

#: How much fuller the fullest worker may be than it need be. A sample of some ten thousand rows, or memory that is
#: measured twice a second, is wrong by some percent; neighbours are not torn apart for that.
TOLERANCE = 0.15

#: Links are looked at where a shuffle takes this times as long without. As measured, two that are alike may differ by as
#: much.
GAIN_MIN = 1.5

#: A worker whose links are said to be slower than the best by more than this gets as much as if they were not, which is an
#: output where there are ten a worker: who gets nothing is not measured, and what was wrong about it stays so.
SLOWEST = 10

#: About what a thread splits, receives and joins in a second. A quicker link makes nothing quicker.
WORK_NBYTES_S = 1e9

#: From this part of a worker's mean share on, an output is large.
LARGE = 0.25

#: A worker without any room gets this part of its share all the same: what it holds may go down the tiers.
ROOM_MIN = 0.25


@dataclass(frozen=True)
class Host:
    """A worker that may take outputs.

    Parameters
    ----------
    threads
        What it works with.
    room_nbytes
        What it can take before it has to spill; None where that is not known.
    """

    threads: int
    room_nbytes: float | None = None


def link_prices(workers: Sequence[str], prices: Mapping[tuple[str, str], float]) -> Floats | None:
    """Return what a byte costs from each of ``workers`` (row) to each (column), in seconds; None if nothing is known.

    Parameters
    ----------
    workers
        Their names.
    prices
        Seconds a byte, by names of sender and receiver.

    Examples
    --------
    >>> link_prices(["a", "b", "c"], {("a", "b"): 4.0, ("b", "a"): 1.0}).tolist()
    [[0.0, 4.0, 2.0], [1.0, 0.0, 2.0], [2.0, 2.0, 0.0]]
    """
    number = {worker: i for i, worker in enumerate(workers)}
    known = {pair: price_s for pair, price_s in prices.items() if pair[0] in number and pair[1] in number}
    if not known:
        return None
    found = np.full((len(workers), len(workers)), np.exp(np.mean(np.log(list(known.values())))))
    for (source, target), price_s in known.items():
        found[number[source], number[target]] = price_s
    # What stays takes no link.
    np.fill_diagonal(found, 0.0)
    return found


def targets(hosts: Sequence[Host], total_nbytes: float | None, prices: Floats | None = None) -> Floats:
    """Say how much of a shuffle each worker should get, as parts of 1.

    By threads, and by the ``prices`` of links (see :func:`link_prices`) where they differ enough; where all of it fits into
    the workers' room, nobody gets more than its room, within :data:`ROOM_MIN`. Where it does not fit, somebody has to spill,
    and it may be everybody alike.

    Examples
    --------
    >>> targets([Host(1, 300), Host(1, 2000)], 1000).tolist()
    [0.3, 0.7]
    >>> targets([Host(1, 300), Host(1, 600)], 1000).tolist()
    [0.5, 0.5]
    """
    even = _by_links(np.array([host.threads for host in hosts], dtype=np.float64), prices)
    if not total_nbytes:
        return even
    room = np.array([np.inf if host.room_nbytes is None else host.room_nbytes for host in hosts]) / total_nbytes
    caps = np.maximum(room, even * ROOM_MIN)
    if room.sum() < 1 or (even <= caps).all():
        return even
    # Whoever is at its cap stays there, and the others share the rest; that may bring one more to its cap.
    found = even.copy()
    while (over := found > caps).any():
        capped = over | (found == caps)
        found[capped] = caps[capped]
        found[~capped] = (1 - found[capped].sum()) * even[~capped] / even[~capped].sum()
    return found


def _by_links(threads: Floats, prices: Floats | None) -> Floats:
    even: Floats = threads / threads.sum()
    if prices is None or len(threads) == 1:
        return even
    # Of the senders to each worker in the order of their prices for a byte of its outputs; itself, for nothing, comes first.
    by_price = np.sort(even[:, None] * prices, axis=0)[1:]
    work_s = 1 / (WORK_NBYTES_S * threads)
    slowest_s = np.maximum(by_price[-1], work_s)
    typical_s = np.maximum(by_price[(len(by_price) - 1) // 2], work_s)
    typical_s = np.minimum(typical_s, SLOWEST * typical_s.min())
    best: Floats = 1 / typical_s / (1 / typical_s).sum()
    return best if (even * slowest_s).max() > GAIN_MIN * (best * slowest_s).max() else even


def ranges(outputs: int, workers: int) -> Ints:
    """Deal outputs by stock's ranges.

    Examples
    --------
    >>> ranges(5, 2).tolist()
    [0, 0, 0, 1, 1]
    """
    found: Ints = np.arange(outputs, dtype=np.intp) * workers // max(outputs, 1)
    return found


def fullness(owners: Ints, sizes: Floats, shares: Floats) -> float:
    """Say how full the fullest worker is: 1 where each has what it should get."""
    total = float(sizes.sum())
    if not total:
        return 0.0
    return float((np.bincount(owners, sizes, minlength=len(shares)) / shares).max()) / total


def assign(stock: Ints, sizes: Floats, shares: Floats, preferred: Ints | None = None) -> Ints:
    """Choose the worker of each output.

    Parameters
    ----------
    stock
        The worker that stock chooses for each output.
    sizes
        Expected size of each output, in any unit.
    shares
        Of each worker, what it should get, as parts of 1; see :func:`targets`.
    preferred
        The worker on which each output is wanted; -1 for anywhere.

    Returns
    -------
    ndarray
        The worker of each output. The fullest is at most ``1 + TOLERANCE`` times as full as with any of the ways that were
        tried, of which stock's is one; without ``preferred``, it is at most as full as with stock's.

    Examples
    --------
    >>> assign(ranges(4, 2), np.array([6.0, 1, 1, 4]), np.array([0.5, 0.5])).tolist()
    [0, 1, 1, 1]
    """
    # The ranges in their order, whoever has the first.
    _, first, by_range = np.unique(stock, return_index=True, return_inverse=True)
    home = np.argsort(np.argsort(first))[by_range]
    ways: list[Ints] = []
    if preferred is not None and (preferred >= 0).any():
        ways = [np.where(preferred < 0, stock, preferred), _deal(home, sizes, shares, preferred)]
    ways.append(stock)
    if len(sizes) > len(shares):
        # With fewer, stock gives nobody two.
        ways.append(_deal(home, sizes, shares, None))
    full = [fullness(way, sizes, shares) for way in ways]
    limit = min(full) * (1 + TOLERANCE)
    return next(way for way, its in zip(ways, full, strict=True) if its <= limit)


def _deal(home: Ints, sizes: Floats, shares: Floats, preferred: Ints | None) -> Ints:
    """Deal what is wanted somewhere, then large outputs, then small ones, beginning with the first worker."""
    total = float(sizes.sum())
    owners = np.full(len(sizes), -1, dtype=np.intp)
    loads = np.zeros(len(shares))
    largest_first = np.argsort(-sizes, kind="stable")
    if preferred is not None:
        caps = shares * total * (1 + TOLERANCE)
        for worker in np.unique(preferred[preferred >= 0]).tolist():
            wanted = largest_first[preferred[largest_first] == worker]
            # In this order, as many as there is room for.
            taken = wanted[np.cumsum(sizes[wanted]) <= caps[worker]]
            owners[taken] = worker
            loads[worker] = sizes[taken].sum()
    large = sizes > LARGE * total / len(shares)
    for output in largest_first[(large & (owners < 0))[largest_first]].tolist():
        full = (loads + sizes[output]) / shares
        # As full as the least full, or nearly, so that only rounding is between them: its range's worker, where it is one.
        best = np.flatnonzero(full <= full.min() * (1 + 1e-9))
        worker = int(home[output]) if home[output] in best else int(best[0])
        owners[output] = worker
        loads[worker] += sizes[output]
    small = np.flatnonzero(owners < 0)
    small = small[np.argsort(home[small], kind="stable")]
    room = np.cumsum(np.maximum(_level(loads, shares, float(sizes[small].sum())) * shares - loads, 0))
    # Where its middle falls, so that a worker is over the level by half an output at each end.
    middles = np.cumsum(sizes[small]) - sizes[small] / 2
    roomy = int(np.argmax(room))
    owners[small] = np.minimum(np.searchsorted(room, middles, side="right"), roomy)
    return owners


def _level(loads: Floats, shares: Floats, more: float) -> float:
    """Say up to which load per share the workers are filled by ``more``."""
    full = np.sort(loads / shares)
    by_fullness = np.argsort(loads / shares, kind="stable")
    # With the k least full workers filled up to one level: what they hold and get, over what they should get.
    levels = (np.cumsum(loads[by_fullness]) + more) / np.cumsum(shares[by_fullness])
    # The first for which the next worker is above that level already.
    enough = np.append(full[1:], np.inf) >= levels
    return float(levels[np.argmax(enough)])
