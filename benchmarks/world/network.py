"""The network of the simulated world: connections as TCP gives them, under addresses ``sim://host:port``.

Theory of operation
-------------------
A connection is two directions. In each, messages keep their order, and come after a latency and the time that their bytes take; what the
network loses within a connection is sent again by TCP, so that loss is delay, or the end of the connection. Different connections
overtake each other. While two hosts are parted, nothing passes between them; it comes when they meet again, unless the connection
ends before: after :data:`TCP_TIMEOUT_S`, or because it was cut. What is under way when a connection is cut is lost, and its sender does
not know. So calls that are tried again are delivered twice. To connect to a host that does not listen fails at once, to one that is parted or
stopped when the patience of who connects ends.

Messages are serialized and copied as Dask's TCP does it: what arrives shares no memory with what was sent.

Covers: :class:`Network`, the backend ``sim`` of Dask's comms.
Does not cover: bits that change on the way (TCP finds them), back-pressure of a full socket; UCX, which has tests of its own.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

from distributed.comm.core import BaseListener, Comm, CommClosedError, Connector
from distributed.comm.registry import Backend, backends
from distributed.comm.utils import from_frames, to_frames
from distributed.utils import ensure_memoryview

from benchmarks.world.machine import HOST, Host, VirtualLoop

__all__ = ["TCP_TIMEOUT_S", "Network"]

#: After how long without an answer a connection ends.
TCP_TIMEOUT_S = 30.0
_END = object()


class _Way:
    """One direction of a connection."""

    def __init__(self, network: Network, source: Host, target: Host) -> None:
        self._network = network
        self.source = source
        self.target = target
        #: Messages under way with the times of their arrival, and what has arrived.
        self.flying: deque[tuple[float, Any]] = deque()
        self.arrived: deque[Any] = deque()
        self.reader: asyncio.Future[None] | None = None
        self.lost = False
        self._free_at = 0.0

    def send(self, message: Any, nbytes: int) -> None:
        if self.lost:
            return
        network = self._network
        self._free_at = max(self._free_at, network.loop.now) + nbytes / network.bandwidth
        self.flying.append((self._free_at + network.latency_s(), message))
        if len(self.flying) == 1:
            self._await_arrival()

    def _await_arrival(self) -> None:
        when = max(self.flying[0][0], self._network.loop.now)
        self._network.loop.call_at(when, self.arrive, context=contextvars.Context())

    def arrive(self) -> None:
        """Let the next message arrive, if it can."""
        loop = self._network.loop
        if self.lost or not self.flying or self.flying[0][0] > loop.now + 1e-9:
            return
        if self._network.parted(self.source, self.target):
            return  # looked at again when they meet
        when, message = self.flying.popleft()
        del when
        self._network.delivered += 1
        self._network.digest.update(f"{loop.now:.9f} {self.source.name} {self.target.name}".encode())
        self.put(message)
        if self.flying:
            self._await_arrival()

    def put(self, message: Any) -> None:
        self.arrived.append(message)
        if self.reader is not None and not self.reader.done():
            self.reader.set_result(None)

    def cut(self) -> None:
        """Lose what is under way, and tell the reader."""
        self.lost = True
        self.flying.clear()
        self.put(_END)


class _SimComm(Comm):
    """One end of a connection."""

    def __init__(
        self,
        local: str,
        peer: str,
        reading: _Way,
        writing: _Way,
        *,
        connection: _Connection,
        deserialize: bool,
    ) -> None:
        #: Pools of connections are sets: their order is to follow from this, and not from where in memory it lies.
        self._number = next(connection.network.comms)
        super().__init__(deserialize=deserialize)
        self._local_addr = f"sim://{local}"
        self._peer_addr = f"sim://{peer}"
        self._reading = reading
        self._writing = writing
        self._connection = connection
        self._closed = False

    def __hash__(self) -> int:
        return self._number

    @property
    def local_address(self) -> str:
        return self._local_addr

    @property
    def peer_address(self) -> str:
        return self._peer_addr

    @property
    def same_host(self) -> bool:
        return False

    async def read(self, deserializers: Any = None) -> Any:
        way = self._reading
        while not way.arrived:
            if self._closed:
                raise CommClosedError(f"{self} is closed")
            way.reader = asyncio.get_running_loop().create_future()
            try:
                await way.reader
            except BaseException:
                # As with TCP: nobody knows what of the message was read.
                self.abort()
                raise
            finally:
                way.reader = None
        if self._closed:
            raise CommClosedError(f"{self} is closed")
        frames = way.arrived.popleft()
        if frames is _END:
            way.arrived.append(_END)
            self._closed = True
            raise CommClosedError(f"in {self}: the connection has ended")
        return await from_frames(frames, deserialize=self.deserialize, deserializers=deserializers, allow_offload=False)

    async def write(self, msg: Any, serializers: Any = None, on_error: str = "message") -> int:
        if self._closed or self._ended:
            raise CommClosedError(f"{self} is closed")
        frames = await to_frames(
            msg,
            allow_offload=False,
            serializers=serializers,
            on_error=on_error,
            context={"sender": self.local_info, "recipient": self.remote_info, **self.handshake_options},
        )
        if self._closed or self._ended:
            raise CommClosedError(f"{self} is closed")
        copies = [memoryview(bytearray(ensure_memoryview(frame))) for frame in frames]
        nbytes = sum(frame.nbytes for frame in copies)
        self._writing.send(copies, nbytes)
        return nbytes

    @property
    def _ended(self) -> bool:
        return bool(self._reading.arrived) and self._reading.arrived[-1] is _END

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self._closed:
            self._closed = True
            # What was written before arrives.
            self._writing.send(_END, 0)
            self._reading.put(_END)
            self._connection.leave()

    def closed(self) -> bool:
        return self._closed or self._ended


class _Connection:
    def __init__(self, network: Network, source: Host, target: Host) -> None:
        self.network = network
        self.hosts = (source, target)
        self.ways = (_Way(network, source, target), _Way(network, target, source))
        self._ends = 2
        network.connections[self] = None

    def leave(self) -> None:
        self._ends -= 1
        if not self._ends:
            self.network.connections.pop(self, None)

    def cut(self) -> None:
        """End it at once, for both."""
        self.network.connections.pop(self, None)
        for way in self.ways:
            way.cut()


class Network:
    """All connections of the world.

    Parameters
    ----------
    loop
        The world's.
    random
        Draws latencies.
    latency_s, bandwidth
        In the mean, and bytes per second.
    """

    def __init__(self, loop: VirtualLoop, random: Any, latency_s: float = 0.0005, bandwidth: float = 1e9) -> None:
        self.loop = loop
        self.random = random
        self.mean_s = latency_s
        self.bandwidth = bandwidth
        self.listeners: dict[str, _SimListener] = {}
        self.connections: dict[_Connection, None] = {}
        self._parted: set[frozenset[str]] = set()
        self._silent: set[str] = set()
        self._ports = iter(range(40_000, 10**9))
        #: Numbers of ends of connections.
        self.comms = itertools.count()
        #: Part of messages that TCP has to send again, and for how long that holds them up.
        self.loss = 0.0
        self.resend_s = 0.2
        self.delivered = 0
        #: Of all that was delivered, from whom to whom, and when.
        self.digest = hashlib.sha256()
        backends["sim"] = _SimBackend(self)

    def latency_s(self) -> float:
        """Draw how long a message takes."""
        latency_s: float = self.random.expovariate(1 / self.mean_s)
        while self.loss and self.random.random() < self.loss:
            latency_s += self.resend_s
        return latency_s

    def parted(self, one: Host, other: Host) -> bool:
        """Whether nothing passes between two hosts."""
        return frozenset((one.name, other.name)) in self._parted

    def part(self, one: str, other: str) -> None:
        """Let nothing pass between two hosts; connections end when they have waited for too long."""
        pair = frozenset((one, other))
        self._parted.add(pair)

        def give_up() -> None:
            if pair in self._parted:
                for connection in self.between(pair):
                    connection.cut()

        self.loop.call_later(TCP_TIMEOUT_S, give_up, context=contextvars.Context())

    def join(self, one: str, other: str) -> None:
        """Let messages pass again between two hosts."""
        pair = frozenset((one, other))
        self._parted.discard(pair)
        for connection in self.between(pair):
            for way in connection.ways:
                way.arrive()

    def between(self, pair: frozenset[str]) -> list[_Connection]:
        """Return the connections of a pair of hosts."""
        return [each for each in self.connections if {host.name for host in each.hosts} == pair]

    def of(self, host: Host) -> list[_Connection]:
        """Return the connections of a host."""
        return [each for each in self.connections if host in each.hosts]

    def leave(self, host: Host, *, silently: bool) -> None:
        """Let a host that was killed leave: its system ends its connections, or, if it leaves silently, nobody does."""
        for address in [address for address, listener in self.listeners.items() if listener.host is host]:
            del self.listeners[address]
        if silently:
            self._silent.add(host.name)
        for connection in self.of(host):
            after_s = TCP_TIMEOUT_S if silently else self.latency_s()
            self.loop.call_later(after_s, connection.cut, context=contextvars.Context())

    def returned(self, name: str) -> None:
        """Let a host be there again: it knows nothing of the connections of the one before it."""
        self._silent.discard(name)
        for connection in [
            each for each in self.connections if any(h.name == name and not h.alive for h in each.hosts)
        ]:
            connection.cut()

    def silent(self, address: str) -> bool:
        """Whether nobody says that nobody listens at an address."""
        return address.partition(":")[0] in self._silent

    def port(self) -> int:
        """Return a port that nobody has."""
        return next(self._ports)


class _SimListener(BaseListener):
    prefix = "sim"

    def __init__(self, network: Network, address: str, handle: Callable[[Any], Any], deserialize: bool) -> None:
        super().__init__()
        self.network = network
        host, _, port = address.partition(":")
        self.address = f"{host}:{int(port or 0) or network.port()}"
        self._handle = handle
        self.deserialize = deserialize
        self.host = _own_host()
        self._context: contextvars.Context | None = None

    async def start(self) -> None:
        if self.address in self.network.listeners:
            raise OSError(f"{self.address} is in use")
        self._context = contextvars.copy_context()
        self.network.listeners[self.address] = self

    def stop(self) -> None:
        self.network.listeners.pop(self.address, None)

    @property
    def listen_address(self) -> str:
        return f"sim://{self.address}"

    @property
    def contact_address(self) -> str:
        return f"sim://{self.address}"

    def accept(self, comm: Any) -> None:
        assert self._context is not None
        self.network.loop.call_soon(self._begin, comm, context=self._context.copy())

    def _begin(self, comm: Any) -> None:
        # The loop keeps no reference to a task.
        task = asyncio.ensure_future(self._serve(comm))
        _kept.add(task)
        task.add_done_callback(_kept.discard)

    async def _serve(self, comm: Any) -> None:
        try:
            await self.on_connection(comm)
        except CommClosedError:
            return
        await self._handle(comm)


_kept: set[asyncio.Task[None]] = set()


class _SimConnector(Connector):
    def __init__(self, network: Network) -> None:
        self._network = network

    async def connect(self, address: str, deserialize: bool = True, **connection_args: Any) -> Any:
        del connection_args
        network, source = self._network, _own_host()
        await asyncio.sleep(network.latency_s() + network.latency_s())
        while network.silent(address):
            await asyncio.sleep(0.2)
        listener = network.listeners.get(address)
        if listener is None:
            raise OSError(f"nobody listens at {address}")
        while network.parted(source, listener.host) or listener.host.stopped is not None:
            await asyncio.sleep(0.2)
        if network.listeners.get(address) is not listener:
            raise OSError(f"nobody listens at {address}")
        connection = _Connection(network, source, listener.host)
        there, back = connection.ways
        local = f"{source.name}:{network.port()}"
        listener.accept(
            _SimComm(listener.address, local, there, back, connection=connection, deserialize=listener.deserialize)
        )
        return _SimComm(local, address, back, there, connection=connection, deserialize=deserialize)


class _SimBackend(Backend):
    def __init__(self, network: Network) -> None:
        self._network = network

    def get_connector(self) -> Any:
        return _SimConnector(self._network)

    def get_listener(self, loc: str, handle_comm: Any, deserialize: bool, **connection_args: Any) -> Any:
        del connection_args
        return _SimListener(self._network, loc, handle_comm, deserialize)

    def get_address_host(self, loc: str) -> str:
        return loc.partition(":")[0]

    def get_address_host_port(self, loc: str) -> tuple[str, int]:
        host, _, port = loc.partition(":")
        return host, int(port)

    def resolve_address(self, loc: str) -> str:
        return loc

    def get_local_address_for(self, loc: str) -> str:
        del loc
        return _own_host().name


def _own_host() -> Host:
    host = HOST.get()
    assert host is not None, "who connects or listens belongs to a host"
    return host
