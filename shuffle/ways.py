"""The ways to a worker's peers: which one a message takes, what it took, and whether it is compressed for it.

Covers: :class:`Way`, a path to a peer with all that is known about it, and :class:`Ways`, all of them; running codecs in
threads.
Does not cover: the decisions themselves (:mod:`dask_gpurt.shuffle.paths`, :mod:`dask_gpurt.compression`); the
sending (:mod:`dask_gpurt.shuffle.carrier`). Used on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from ipaddress import ip_address

from distributed.comm.addressing import get_address_host

from dask_gpurt import codecs
from dask_gpurt.codecs import Compressed
from dask_gpurt.compression import LinkCompression
from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.paths import COMM, UCX, PathChooser
from dask_gpurt.topology import Gauge, Link, Place, Topology

__all__ = ["Way", "Ways", "on_loopback"]


def on_loopback(address: str) -> bool:
    """Whether a worker is reached by the loopback address, and by its own host only.

    Examples
    --------
    >>> on_loopback("tcp://127.0.0.1:1234"), on_loopback("tcp://10.0.0.1:1234"), on_loopback("tcp://a-name:1234")
    (True, False, False)
    """
    try:
        return ip_address(get_address_host(address)).is_loopback
    except ValueError:
        # It has a name, or none.
        return False


class Way:
    """A path to a peer.

    Parameters
    ----------
    link
        What is known about it.
    compresses
        Whether messages may be compressed on it.
    """

    def __init__(self, link: Link, *, compresses: bool) -> None:
        self.link = link
        #: For transfers that are timed by this side.
        self.gauge = Gauge()
        self.compression = LinkCompression(link) if compresses else None

    def carried(self, nbytes: int, seen: tuple[int, float]) -> None:
        """Note a message of ``nbytes``, beside which so many bytes were seen to go in so many seconds."""
        self.link.observe(*seen)
        if self.compression is not None:
            self.compression.carried(self.link.price(nbytes))


class Ways:
    """All ways from this worker.

    Parameters
    ----------
    topology
        Where links are kept.
    source
        This worker.
    compresses
        The paths on which messages may be compressed.
    """

    def __init__(self, topology: Topology, source: Place, compresses: Sequence[str]) -> None:
        self._topology = topology
        self._source = source
        self._compresses = compresses if codecs.available() else ()
        self._ways: dict[str, dict[str, Way]] = {}
        self._choosers: dict[str, PathChooser] = {}
        #: Bytes before and after compression, of what was compressed; seconds that went into it, and into samples.
        self.raw_nbytes = 0
        self.wire_nbytes = 0
        self.compress_s = 0.0
        self.sample_s = 0.0

    def _to(self, address: str) -> dict[str, Way]:
        if address not in self._ways:
            links = {path: self._topology.link(self._source, Place(address), path) for path in (UCX, COMM)}
            compresses = () if self._shares_memory(address) else self._compresses
            self._ways[address] = {path: Way(link, compresses=path in compresses) for path, link in links.items()}
            self._choosers[address] = PathChooser(links)
        return self._ways[address]

    def _shares_memory(self, address: str) -> bool:
        # What makes such a link slow is a lack of processor time, of which compression would take more.
        return bool(get_address_host(address) == get_address_host(self._source.worker))

    def way(self, address: str, path: str) -> Way:
        """Return a way to a peer."""
        return self._to(address)[path]

    def choose(self, address: str, nbytes: int) -> str:
        """Return the path for the next message to a peer with whom both are there."""
        self._to(address)
        return self._choosers[address].choose(nbytes)

    def forget(self, address: str) -> None:
        """Forget a peer."""
        self._ways.pop(address, None)
        self._choosers.pop(address, None)
        self._topology.forget(address)

    async def pack(self, way: Way, kind: str, buffers: Sequence[Buffer], executor: Executor) -> Compressed:
        """Compress a message of a kind of data, if that pays on its way. The work is done by a thread of ``executor``."""
        compression = way.compression
        nbytes = sum(memoryview(buffer).nbytes for buffer in buffers if codecs.compressible(buffer))
        if compression is None or not nbytes or not compression.slow:
            return codecs.plain(buffers)
        loop = asyncio.get_running_loop()
        if compression.wants_sample(kind, nbytes):
            figures, elapsed_s = await loop.run_in_executor(executor, codecs.sample, buffers)
            compression.sampled(kind, figures, elapsed_s)
            self.sample_s += elapsed_s
        codec = compression.codec(kind)
        if codec is None:
            return codecs.plain(buffers)
        message = await loop.run_in_executor(executor, codecs.compress, buffers, codec)
        left_nbytes = nbytes - message.raw_nbytes + message.wire_nbytes
        compression.compressed(kind, codec, left_nbytes / nbytes, nbytes / message.elapsed_s)
        self.raw_nbytes += message.raw_nbytes
        self.wire_nbytes += message.wire_nbytes
        self.compress_s += message.elapsed_s
        return message
