"""Links between workers: a fluid model.

Theory of operation
-------------------
A worker has one port for each class of links: to the workers of its node, and to those of other nodes. On a fabric without nodes
both are the same port. A transfer flows at the bandwidth of its class, divided by the larger of the transfers
that leave its sender's port and those that arrive at its receiver's. That is not max-min fair, as what others leave is not
taken up, but it is close, and its rates can change with the transfers at two ports alone.

Covers: :class:`Fabric`, :data:`FABRICS`, :class:`Network`.
Does not cover: latency and what is asked of whom; see :mod:`benchmarks.simulation.worker`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.simulation.clock import Clock, Flow, Fluid

__all__ = ["FABRICS", "Fabric", "Network", "Transfer"]


@dataclass(frozen=True)
class Fabric:
    """What joins the workers.

    Parameters
    ----------
    inside
        Bytes per second of a port to workers of the same node.
    between
        The same to workers of other nodes; None: all workers are reached by one port.
    node_size
        Workers of a node.
    """

    inside: float
    between: float | None
    node_size: int = 8

    def node_of(self, number: int) -> int:
        """Return the node of the worker of that number."""
        return number // self.node_size

    def seat(self, number: int) -> tuple[int, int]:
        """Return the host of the worker of that number, and which of its workers it is; without nodes each has its own."""
        return (number, 0) if self.between is None else divmod(number, self.node_size)

    def link(self, source: int, target: int) -> tuple[str, float]:
        """Return the class of links from one worker to another, and its bandwidth."""
        if self.between is None or self.node_of(source) == self.node_of(target):
            return "inside", self.inside
        return "between", self.between


#: NVLink and InfiniBand of the data sheet; what is reached of them; and TCP.
FABRICS = {
    "dgx": Fabric(450e9, 50e9),
    "eff": Fabric(50e9, 10e9),
    "tcp": Fabric(3e9, None),
}


class Transfer:
    """Bytes on their way."""

    __slots__ = ("arriving", "bandwidth", "flow", "leaving", "nbytes", "source", "target")

    def __init__(self, source: int, target: int, nbytes: int, bandwidth: float, flow: Flow) -> None:
        self.source = source
        self.target = target
        self.nbytes = nbytes
        self.bandwidth = bandwidth
        self.flow = flow
        #: All transfers at the sender's port, and at the receiver's; dicts, as they keep their order.
        self.leaving: dict[Transfer, None] = {}
        self.arriving: dict[Transfer, None] = {}


class Network:
    """All transfers of a cluster.

    Attributes
    ----------
    moved_nbytes, between_nbytes
        Bytes of all transfers that have ended, and of those between nodes.
    """

    def __init__(self, clock: Clock, fabric: Fabric) -> None:
        self._fabric = fabric
        self._fluid = Fluid(clock)
        self._leaving: defaultdict[Any, dict[Transfer, None]] = defaultdict(dict)
        self._arriving: defaultdict[Any, dict[Transfer, None]] = defaultdict(dict)
        self.moved_nbytes = 0
        self.between_nbytes = 0

    def begin(self, source: int, target: int, nbytes: int, done: Callable[[], Any]) -> Transfer:
        """Move bytes from one worker to another; ``done`` is called when they are there."""
        link, bandwidth = self._fabric.link(source, target)

        def arrived() -> None:
            self._end(transfer)
            self.moved_nbytes += nbytes
            if self._fabric.node_of(source) != self._fabric.node_of(target):
                self.between_nbytes += nbytes
            done()

        transfer = Transfer(source, target, nbytes, bandwidth, self._fluid.begin(float(nbytes), arrived))
        transfer.leaving = self._leaving[source, link]
        transfer.arriving = self._arriving[target, link]
        transfer.leaving[transfer] = transfer.arriving[transfer] = None
        self._share(transfer)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Let a transfer end where it is: one of its workers is gone. ``done`` is not called."""
        self._fluid.set_rate(transfer.flow, 0.0)
        self._end(transfer)

    def _end(self, transfer: Transfer) -> None:
        del transfer.leaving[transfer], transfer.arriving[transfer]
        self._share(transfer)

    def _share(self, changed: Transfer) -> None:
        for transfer in {**changed.leaving, **changed.arriving}:
            sharers = max(len(transfer.leaving), len(transfer.arriving))
            self._fluid.set_rate(transfer.flow, transfer.bandwidth / sharers)
