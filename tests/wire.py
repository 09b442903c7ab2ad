"""Two hosts on one machine, and a cable between them that is slow, loses packets, or is cut.

Each host is a network namespace with one interface (TUN) beside its own loopback. What one sends is read by a process that passes
it on to the other: later, not at all, no faster than so many bytes in a second. That needs no module of the kernel but TUN (tc's netem
is not everywhere), and which packets are lost follows from a seed. Nothing of this can be reached from outside of the two.

Covers: :class:`Wire`; :func:`unavailable` says why there can be none. As a program, it is the cable.
Does not cover: what runs on the hosts.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import heapq
import itertools
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

__all__ = ["FAR", "NEAR", "Wire", "unavailable"]

#: Addresses of the hosts, which only they know.
NEAR, FAR = "10.77.0.1", "10.77.0.2"

_TUNSETIFF = 0x400454CA
_IFF_TUN_WITHOUT_HEADER = 0x1001
#: Of jumbo frames: what a cable in Python takes is packets.
_MTU = 9000
#: Bytes that wait to be passed on, of each direction; more are lost, as in a switch.
_QUEUE_NBYTES = 2**20


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@functools.cache
def unavailable() -> str:
    """Ask the system whether it lets this process make namespaces and interfaces; say why not, or nothing."""
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"there is no program {program}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    unshared = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, text=True)
    return unshared.stderr.strip() if unshared.returncode else ""


class Wire:
    """Two namespaces, :attr:`near` and :attr:`far`, and the cable, until the end of the block."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self.name = f"gp{os.getpid()}-{next(self._numbers)}"
        self.near, self.far = f"{self.name}-near", f"{self.name}-far"
        self._ended = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            ends = []
            for namespace, address, suffix in ((self.near, NEAR, "a"), (self.far, FAR, "b")):
                interface = self.name[-14:] + suffix
                end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                stack.callback(os.close, end)
                fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", interface.encode(), _IFF_TUN_WITHOUT_HEADER))
                _ip("netns", "add", namespace)
                stack.callback(_ip, "netns", "delete", namespace)
                _ip("link", "set", interface, "netns", namespace)
                _ip("-n", namespace, "link", "set", "lo", "up")
                _ip("-n", namespace, "address", "add", f"{address}/30", "dev", interface)
                _ip("-n", namespace, "link", "set", interface, "mtu", str(_MTU), "up")
                ends.append(end)
            self._cable = subprocess.Popen(
                [sys.executable, __file__, *map(str, ends)],
                pass_fds=ends,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.callback(self._end_cable)
            self.set()
            self._ended = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.close()

    def _end_cable(self) -> None:
        self._cable.communicate()

    def carry(self, nbytes: int) -> None:
        """Wait until so many bytes more have come to the cable."""
        self._tell({"carry_nbytes": nbytes}, patience_s=60)

    def set(
        self, *, delay_s: float = 0.0, loss: float = 0.0, rate_nbytes: float | None = None, cut: bool = False
    ) -> None:
        """Make the cable so; without arguments, a good one.

        Parameters
        ----------
        delay_s
            Of each packet, one way.
        loss
            The part of the packets that is lost.
        rate_nbytes
            Bytes in a second, each way; None: as many as there are.
        cut
            Nothing gets through.
        """
        self._tell({"delay_s": delay_s, "loss": 1.0 if cut else loss, "rate_nbytes": rate_nbytes}, patience_s=10)

    def _tell(self, message: dict[str, float | None], patience_s: float) -> None:
        assert self._cable.stdin is not None
        assert self._cable.stdout is not None
        self._cable.stdin.write(json.dumps(message) + "\n")
        self._cable.stdin.flush()
        ready, _, _ = select.select([self._cable.stdout], [], [], patience_s)
        assert ready, f"the cable has not done {message} in {patience_s} s"
        assert self._cable.stdout.readline() == "done\n"


class _Direction:
    """What goes from one end to the other."""

    def __init__(self, source: int, target: int, seed: int) -> None:
        self.source = source
        self.target = target
        self._rng = random.Random(seed)
        #: When the last packet has left, if there is a rate.
        self._free_s = 0.0
        self._waiting_nbytes = 0
        #: What has come, lost or not.
        self.taken_nbytes = 0
        self._number = itertools.count()
        #: (when it arrives, which it is, the packet).
        self._under_way: list[tuple[float, int, bytes]] = []

    @property
    def due_s(self) -> float:
        return self._under_way[0][0] if self._under_way else float("inf")

    def take(self, now_s: float, delay_s: float, loss: float, rate_nbytes: float | None) -> None:
        for packet in _packets(self.source):
            self.taken_nbytes += len(packet)
            if self._rng.random() < loss or self._waiting_nbytes + len(packet) > _QUEUE_NBYTES:
                continue
            self._free_s = max(now_s, self._free_s) + (len(packet) / rate_nbytes if rate_nbytes else 0.0)
            heapq.heappush(self._under_way, (self._free_s + delay_s, next(self._number), packet))
            self._waiting_nbytes += len(packet)

    def give(self, now_s: float) -> None:
        while self.due_s <= now_s:
            packet = heapq.heappop(self._under_way)[2]
            self._waiting_nbytes -= len(packet)
            # An interface that takes no more loses it, as one does whose host is gone.
            with contextlib.suppress(OSError):
                os.write(self.target, packet)


def _packets(end: int) -> Iterator[bytes]:
    with contextlib.suppress(BlockingIOError):
        for _ in range(100):
            yield os.read(end, 65536)


def _pass_on(near: int, far: int) -> None:
    """Be the cable until the standard input ends."""
    directions = {near: _Direction(near, far, 1), far: _Direction(far, near, 2)}
    control = sys.stdin.fileno()
    settings: dict[str, float | None] = {}
    poll = select.poll()
    for descriptor in (*directions, control):
        poll.register(descriptor, select.POLLIN)
    heard = b""
    # What has come when somebody who waits for it is to be told.
    wanted_nbytes: float | None = None
    while True:
        due_s = min(direction.due_s for direction in directions.values())
        wait_ms = None if due_s == float("inf") else max(0.0, due_s - time.monotonic()) * 1000
        ready = {descriptor for descriptor, _ in poll.poll(wait_ms)}
        if control in ready:
            found = os.read(control, 4096)
            if not found:
                return
            *lines, heard = (heard + found).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "carry_nbytes" in said:
                    wanted_nbytes = said["carry_nbytes"] + _taken(directions.values())
                else:
                    settings = said
                    os.write(sys.stdout.fileno(), b"done\n")
        now_s = time.monotonic()
        for end, direction in directions.items():
            if end in ready:
                direction.take(now_s, **settings)  # type: ignore[arg-type]
            direction.give(now_s)
        if wanted_nbytes is not None and _taken(directions.values()) >= wanted_nbytes:
            wanted_nbytes = None
            os.write(sys.stdout.fileno(), b"done\n")


def _taken(directions: Iterable[_Direction]) -> int:
    return sum(direction.taken_nbytes for direction in directions)


if __name__ == "__main__":
    _pass_on(*map(int, sys.argv[1:]))
