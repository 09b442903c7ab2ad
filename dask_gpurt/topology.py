"""What moving bytes costs on this cluster: places, the links between them, and prices learned from transfers.

Covers: :class:`Link`, which learns latency and bandwidth of one way between two places; :class:`Gauge`, which says what
a transfer among others tells about its link; :class:`Topology`, all the links that a worker or the scheduler knows;
:class:`News`, what of that is worth telling.
Does not cover: measuring. Whoever moves bytes looks at its clock, and says what it saw. Pure: no I/O, no clock, no Dask.
See also: :mod:`dask_gpurt.shuffle.paths`, :mod:`dask_gpurt.compression` and :mod:`dask_gpurt.shuffle.assignment`, which
decide by these prices; :mod:`dask_gpurt.shuffle.links`, which carries them to the scheduler.

Theory of operation
    A *place* is a worker and a tier. A *link* is one way from a place to another; two places may be joined by several,
    told apart by their *path* (UCX, Dask's comms). The *price* of a transfer is latency + nbytes / bandwidth, in seconds.

    *Learning.* A link keeps its last :data:`WINDOW` transfers of :data:`LARGE_NBYTES` and more, which tell its bandwidth,
    and as many smaller ones, which tell its latency. Each transfer of the one kind votes for a time per byte, the latency
    taken off; each of the other for a latency, the time of its bytes taken off. The lower quartile of the votes counts.
    Delays only ever add up (a garbage collection, a busy event loop, a stolen core), so that the quicker transfers
    are nearer to what the link does by itself, and three of four may be disturbed in any way. It is not the minimum,
    which one wrong reading would spoil. What has left the window is forgotten: a link that became
    slower is noticed within a window, one that became quicker within a quarter of it.

    *Before anything was seen* a link has its prior. A latency that no small transfer has told stays the prior's, and so
    does a bandwidth without large transfers; but never is more than half of a large transfer put down to latency.

    *Transfers side by side* share a link, and each by itself sees a part of it only. So a transfer is put down with all
    the bytes that were finished on its link between its beginning and its end, its own among them (:class:`Gauge`). That
    counts too much of those that had begun before, and nothing of those that end later, which makes up for it while a
    link stays busy. Load that others put on the same wire is part of the price, as the next transfer will meet it too.

    *Reports.* A link is measured by one worker, which may send :meth:`Topology.report` to others (some ten numbers a
    link, for a heartbeat). There the newest report counts, but for links that were measured on the spot. :class:`News`
    keeps that small: a link is told anew once its price has changed by :data:`NEWS_FACTOR`, and so many links at a time,
    whoever was told longest ago first. A report that is lost on the way is made up for by the next change.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "DASK",
    "LARGE_NBYTES",
    "LINKS_MAX",
    "MESSAGE_NBYTES",
    "NEWS_FACTOR",
    "PRIOR",
    "TRANSFERS_MIN",
    "WINDOW",
    "Gauge",
    "Link",
    "News",
    "Place",
    "Rate",
    "Report",
    "Topology",
]

#: Transfers that a link remembers, of either kind. Enough for a quartile, and 128 MiB of a shuffle's messages.
WINDOW = 16
#: From this size on a transfer tells about bandwidth: at 1 GB/s it takes about as long as an exchange of nothing.
LARGE_NBYTES = 2**18
#: Links that are remembered; those that were asked for longest ago go first. 64 workers have 4,032 pairs.
LINKS_MAX = 8192
#: A link is news when its price has changed by this factor: less is within what one link does from one moment to the next.
NEWS_FACTOR = 1.25
#: Large transfers before the price of a link is believed by those who plan: the first ones meet a process that just began.
TRANSFERS_MIN = 4
#: Path of the transfers that Dask makes itself: inputs of tasks.
DASK = "dask"
#: By the price of so many bytes links are compared, where nothing else is known: a message of a shuffle.
MESSAGE_NBYTES = 2**23


class Place(NamedTuple):
    """Where bytes can be: a worker and a tier."""

    worker: str
    tier: str = "host"


@dataclass(frozen=True)
class Rate:
    """What a transfer takes.

    Parameters
    ----------
    latency_s
        Seconds that it takes without bytes.
    bandwidth
        Bytes per second, for the rest.

    Examples
    --------
    >>> Rate(latency_s=0.5, bandwidth=100.0).price(50)
    1.0
    """

    latency_s: float
    bandwidth: float

    def price(self, nbytes: int) -> float:
        """Seconds that ``nbytes`` take."""
        return self.latency_s + nbytes / self.bandwidth


#: What is assumed of a link before anything went over it: an exchange by Dask takes about a millisecond, and the
#: network in most machine rooms carries 10 Gbit/s.
PRIOR = Rate(latency_s=0.001, bandwidth=1.2e9)

#: Worker and tier of either end, path, latency in seconds, bytes per second, large transfers that it is made of.
Report = tuple[str, str, str, str, str, float, float, int]


class Link:
    """One way from a place to another, and what is known about it.

    Parameters
    ----------
    prior
        What is assumed until transfers were seen.
    transfers
        Large transfers that the prior is made of, if it was reported.

    Examples
    --------
    >>> link = Link(Rate(latency_s=0.001, bandwidth=1e9))
    >>> link.observe(3_000_000, 0.101)
    >>> f"{link.rate.bandwidth:.2g}"
    '3e+07'
    """

    def __init__(self, prior: Rate = PRIOR, transfers: int = 0) -> None:
        #: What is known now.
        self.rate = prior
        #: Large transfers ever seen.
        self.transfers = transfers
        #: Whether anything was observed here, and not reported by others.
        self.observed = False
        self._small: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._large: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def __repr__(self) -> str:
        rate = self.rate
        return f"<Link {rate.bandwidth / 1e6:.0f} MB/s, {rate.latency_s * 1e3:.2f} ms, {self.transfers} transfers>"

    def price(self, nbytes: int) -> float:
        """Seconds that a transfer of ``nbytes`` takes."""
        return self.rate.price(nbytes)

    def observe(self, nbytes: int, elapsed_s: float) -> None:
        """Learn from a transfer. One without bytes or without a time says nothing."""
        if nbytes <= 0 or not 0 < elapsed_s < float("inf"):
            return
        self.observed = True
        large = nbytes >= LARGE_NBYTES
        (self._large if large else self._small).append((nbytes, elapsed_s))
        self.transfers += large
        latency_s, byte_s = self.rate.latency_s, 1 / self.rate.bandwidth
        if self._large:
            byte_s = _quartile([max(took_s - latency_s, took_s / 2) / size for size, took_s in self._large])
        if self._small:
            latency_s = _quartile([max(took_s - size * byte_s, 0.0) for size, took_s in self._small])
        self.rate = Rate(latency_s, 1 / byte_s)


def _quartile(votes: Sequence[float]) -> float:
    """The lower quartile; with fewer than five votes the least."""
    return sorted(votes)[(len(votes) - 1) // 4]


class Gauge:
    """What a transfer says about its link, where several go over it side by side.

    Examples
    --------
    Two transfers of 10 bytes share a link from second 0 to 2: it carries 10 bytes a second.

    >>> gauge = Gauge()
    >>> one, other = gauge.begin(0.0), gauge.begin(0.0)
    >>> gauge.end(one, 10, 2.0), gauge.end(other, 10, 2.0)
    ((10, 2.0), (20, 2.0))
    """

    def __init__(self) -> None:
        self._carried_nbytes = 0

    def begin(self, now_s: float) -> tuple[int, float]:
        """Note that a transfer begins. What is returned is for :meth:`end`; one that fails need not be ended."""
        return self._carried_nbytes, now_s

    def end(self, begun: tuple[int, float], nbytes: int, now_s: float) -> tuple[int, float]:
        """Note that a transfer of ``nbytes`` has ended; returns the bytes and seconds to be observed."""
        before_nbytes, since_s = begun
        self._carried_nbytes += nbytes
        return self._carried_nbytes - before_nbytes, now_s - since_s


class Topology:
    """The links that are known.

    Parameters
    ----------
    limit
        How many links are remembered.
    """

    def __init__(self, limit: int = LINKS_MAX) -> None:
        self._limit = limit
        #: Ends and path of a link; what was asked for last stands last.
        self._links: dict[tuple[Place, Place, str], Link] = {}
        #: How often reports have been taken over.
        self.changes = 0

    def __len__(self) -> int:
        return len(self._links)

    def link(self, source: Place, target: Place, path: str, prior: Rate = PRIOR) -> Link:
        """Return a link; one that was not known begins with ``prior``."""
        key = (source, target, path)
        link = self._links.pop(key, None) or Link(prior)
        self._links[key] = link
        while len(self._links) > self._limit:
            del self._links[next(iter(self._links))]
        return link

    def price(self, source: Place, target: Place, paths: Iterable[str], nbytes: int) -> float:
        """Seconds to have ``nbytes`` of ``source`` at ``target``, by the best of ``paths`` that is known.

        Examples
        --------
        >>> topology = Topology()
        >>> a, b = Place("a"), Place("b")
        >>> topology.link(a, b, "ucx").observe(10**7, 0.01)
        >>> topology.price(a, b, ["ucx", "comm"], 10**7) < topology.price(b, a, ["ucx", "comm"], 10**7)
        False
        >>> topology.price(a, a, ["ucx"], 10**7)
        0.0
        """
        if source == target:
            return 0.0
        known = [link for path in paths if (link := self._links.get((source, target, path))) is not None]
        return min((link.price(nbytes) for link in known), default=PRIOR.price(nbytes))

    def prices(self, nbytes: int = MESSAGE_NBYTES) -> dict[tuple[str, str], float]:
        """Seconds that ``nbytes`` take from the host of one worker to that of another, where :data:`TRANSFERS_MIN` were seen.

        Examples
        --------
        >>> topology = Topology()
        >>> for _ in range(TRANSFERS_MIN):
        ...     topology.link(Place("a"), Place("b"), "ucx").observe(10**7, 0.01)
        >>> list(topology.prices())
        [('a', 'b')]
        """
        found: dict[tuple[str, str], float] = {}
        for (source, target, _), link in self._links.items():
            if link.transfers >= TRANSFERS_MIN and source.tier == target.tier == "host":
                pair, price_s = (source.worker, target.worker), link.price(nbytes)
                found[pair] = min(price_s, found.get(pair, price_s))
        return found

    def rates(self, path: str) -> Iterator[tuple[str, str, Rate]]:
        """Go through what is known of a path between the hosts of two workers: their addresses, and what it takes."""
        for (source, target, of), link in self._links.items():
            if of == path and source.tier == target.tier == "host":
                yield source.worker, target.worker, link.rate

    def forget(self, worker: str) -> None:
        """Forget the links from and to a worker."""
        for key in [key for key in self._links if worker in (key[0].worker, key[1].worker)]:
            del self._links[key]

    def report(self) -> list[Report]:
        """Say what was measured here, in plain numbers and words."""
        return [
            (*source, *target, path, link.rate.latency_s, link.rate.bandwidth, link.transfers)
            for (source, target, path), link in self._links.items()
            if link.observed
        ]

    def learn(self, reports: Iterable[Report]) -> None:
        """Take over what others have measured. What cannot be the rate of a link is passed over."""
        for worker, tier, to_worker, to_tier, path, latency_s, bandwidth, transfers in reports:
            self.changes += 1
            if not (0 <= latency_s < math.inf and 0 < bandwidth < math.inf):
                continue
            source, target = Place(worker, tier), Place(to_worker, to_tier)
            if not self.link(source, target, path).observed:
                self._links[source, target, path] = Link(Rate(latency_s, bandwidth), transfers)


class News:
    """What has not been told yet of the links that were measured here.

    Parameters
    ----------
    topology
        Their topology.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        #: What was told of a link by its ends and path; what was told last stands last.
        self._told: dict[tuple[str, ...], float] = {}

    def take(self, limit: int) -> list[Report]:
        """Return at most ``limit`` reports, which count as told from now on.

        Examples
        --------
        >>> topology = Topology()
        >>> news = News(topology)
        >>> for _ in range(TRANSFERS_MIN):
        ...     topology.link(Place("a"), Place("b"), "ucx").observe(10**7, 0.01)
        >>> len(news.take(10)), len(news.take(10))
        (1, 0)
        """
        reports = {report[:5]: report for report in self._topology.report() if report[7] >= TRANSFERS_MIN}
        for gone in self._told.keys() - reports.keys():
            del self._told[gone]
        changed = [key for key, report in reports.items() if self._is_news(key, report)]
        order = {key: place for place, key in enumerate(self._told)}
        taken = sorted(changed, key=lambda key: order.get(key, -1))[:limit]
        for key in taken:
            self._told.pop(key, None)
            self._told[key] = _price_s(reports[key])
        return [reports[key] for key in taken]

    def _is_news(self, key: tuple[str, ...], report: Report) -> bool:
        told_s, price_s = self._told.get(key), _price_s(report)
        return told_s is None or max(told_s, price_s) > NEWS_FACTOR * min(told_s, price_s)


def _price_s(report: Report) -> float:
    return Rate(report[5], report[6]).price(MESSAGE_NBYTES)
