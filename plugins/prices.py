"""What it costs to bring bytes to a worker: by what was measured within a host and between hosts.

Covers: :class:`Prices`; :class:`Neighbourhoods`. Pure: no I/O, no clock, no Dask.
Does not cover: measuring (:mod:`dask_gpurt.plugins.probing`, :mod:`dask_gpurt.plugins.serving`), and what is known of each
link (:mod:`dask_gpurt.topology`).

Theory of operation
-------------------
A decision must not look through thousands of links. So they are summed up in two classes, *near* and *far*: between workers of one
host, and of two; or of one rack, and of two, where racks are configured (:class:`Neighbourhoods`). The price of a class is that of its median link, of those that Dask's own transfers have measured; until there is
one, it is what the scheduler assumes. Sums are made anew when reports have come, and no more often than they are asked for.

Of the bytes that a worker misses, those that another worker of its host holds come from there; the others from far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from statistics import median

from dask_gpurt.topology import DASK, Topology

__all__ = ["Neighbourhoods", "Prices"]


class Neighbourhoods:
    """Tell which workers are near to each other: those for whose addresses this has the same answer.

    Parameters
    ----------
    host_of
        Address of a worker to its host.
    racks
        Patterns of hosts, as of file names, and labels. The first pattern that fits counts, and islands do not then.

    Examples
    --------
    >>> where = Neighbourhoods(lambda address: address.partition(":")[0], [("10.0.1.*", "rack-1"), ("10.*", "others")])
    >>> [where(address) for address in ("10.0.1.7:4000", "10.0.2.7:4000", "192.168.0.1:4000")]
    ['rack-1', 'others', '192.168.0.1']
    >>> where.settle("192.168.0.1:4000", "nvlink-2")
    >>> [where(address) for address in ("192.168.0.1:4000", "192.168.0.1:4001")]
    ['192.168.0.1 nvlink-2', '192.168.0.1']
    """

    def __init__(self, host_of: Callable[[str], str], racks: Iterable[tuple[str, str]] = ()) -> None:
        self._host_of = host_of
        self._racks = tuple(racks)
        #: Address of a worker to the island of its GPU; see :mod:`dask_gpurt.plugins.islands`.
        self._islands: dict[str, str] = {}

    def settle(self, address: str, island: str | None) -> None:
        """Take down where a worker's GPU is among those of its host; None: as near to one as to another."""
        if island is None:
            self._islands.pop(address, None)
        else:
            self._islands[address] = island

    def __call__(self, address: str) -> str:
        """Return what all workers near to the one at ``address`` have in common."""
        host = self._host_of(address)
        for pattern, label in self._racks:
            if fnmatchcase(host, pattern):
                return label
        island = self._islands.get(address)
        return host if island is None else f"{host} {island}"


class Prices:
    """Seconds that a byte takes.

    Parameters
    ----------
    topology
        What is known of the links.
    host_of
        Address of a worker to its host, or to whatever makes workers near to each other.

    Attributes
    ----------
    near_s, far_s
        Seconds for a byte between workers that are near to each other, and that are not.
    typical_s
        The same between any two workers.
    two
        Whether near and far are two things here.

    Examples
    --------
    >>> topology = Topology()
    >>> prices = Prices(topology, lambda address: address[0])
    >>> for address in ("a1", "a2", "b1"):
    ...     prices.add_worker(address)
    >>> topology.learn([("a1", "host", "a2", "host", "dask", 0.0, 4e9, 4), ("a1", "host", "b1", "host", "dask", 0.0, 1e9, 4)])
    >>> prices.refresh(bandwidth=1e8)
    >>> prices.move_s("a1", 10**9, {"a2": 10**9, "b1": 0})
    0.25
    >>> prices.move_s("a1", 10**9, {"a2": 0, "b1": 10**9})
    1.0
    """

    def __init__(self, topology: Topology, host_of: Callable[[str], str]) -> None:
        self._topology = topology
        self._host_of = host_of
        #: Worker to its host.
        self._hosts: dict[str, str] = {}
        #: Changes of the topology that have been summed up; None: the workers are other ones than then.
        self._seen: int | None = None
        #: Seconds a byte takes by links near and far; None: none was measured.
        self._known: tuple[float | None, float | None] = None, None
        #: Part of all pairs of workers that are on one host.
        self._part_near = 1.0
        self.two = False
        self.near_s = self.far_s = self.typical_s = 0.0

    def add_worker(self, address: str) -> None:
        """Take down a worker that has joined."""
        self._hosts[address] = self._host_of(address)
        self._seen = None

    def remove_worker(self, address: str) -> None:
        """Forget a worker that has left."""
        if self._hosts.pop(address, None) is not None:
            self._seen = None

    def refresh(self, bandwidth: float) -> None:
        """Sum up what is known by now; ``bandwidth`` (bytes per second) is assumed where nothing is."""
        if self._seen != self._topology.changes:
            self._seen = self._topology.changes
            self._sum_up()
        near_s, far_s = self._known
        assumed_s = 1 / bandwidth
        self.near_s = near_s or far_s or assumed_s
        self.far_s = far_s or assumed_s
        self.typical_s = self._part_near * self.near_s + (1 - self._part_near) * self.far_s
        self.two = 0 < self._part_near < 1

    @property
    def bandwidth(self) -> float:
        """Bytes per second between any two workers."""
        return 1 / self.typical_s

    def _sum_up(self) -> None:
        found: dict[bool, list[float]] = {True: [], False: []}
        hosts = self._hosts
        for source, target, rate in self._topology.rates(DASK):
            if source in hosts and target in hosts:
                found[hosts[source] == hosts[target]].append(1 / rate.bandwidth)
        self._known = _median(found[True]), _median(found[False])
        nworkers = len(hosts)
        pairs = sum(size * (size - 1) for size in Counter(hosts.values()).values())
        self._part_near = pairs / (nworkers * (nworkers - 1)) if nworkers > 1 else 1.0

    def move_s(self, worker: str, missing_nbytes: int, held: Mapping[str, int]) -> float:
        """Return the seconds in which a worker has what it misses of a task's inputs.

        Parameters
        ----------
        worker
            Its address.
        missing_nbytes
            What it misses.
        held
            Address of each worker that holds inputs to the bytes of them.
        """
        if not self.two:
            return missing_nbytes * self.typical_s
        hosts = self._hosts
        host = hosts[worker]
        near_nbytes = sum(nbytes for other, nbytes in held.items() if hosts[other] == host and other != worker)
        near_nbytes = min(near_nbytes, missing_nbytes)
        return near_nbytes * self.near_s + (missing_nbytes - near_nbytes) * self.far_s


def _median(votes: list[float]) -> float | None:
    return median(votes) if votes else None
