"""What goes wrong in the simulated world, and when: a plan that follows from the seed.

Covers: :class:`Fault`, :func:`plan`, :func:`inject`.
Does not cover: how hosts, network and disks behave then; see there. The scheduler and the client do not die: their death ends
a job with Dask, too.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from benchmarks.world.cluster import World
from benchmarks.world.disk import Disk, DiskFaults

__all__ = ["KINDS", "Fault", "inject", "plan"]

#: Kinds of faults, and how often they are chosen.
KINDS = {
    "kill": 5,
    "vanish": 1,
    "stop": 3,
    "part": 3,
    "cut": 4,
    "loss": 2,
    "slow": 2,
    "full": 2,
    "error": 4,
    "flip": 4,
    "drag": 1,
}

#: When the first faults come, in the mean, after the work has begun. Jobs take a tenth of a second.
SOON_S = 0.06


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes
    ----------
    at_s, lasting_s
        When after the beginning of the work, and for how long.
    kind
        One of :data:`KINDS`.
    who, other
        Whom it befalls, and, of what is between two, with whom.
    degree
        How bad it is, between 0 and 1.
    """

    at_s: float
    lasting_s: float
    kind: str
    who: str
    other: str
    degree: float

    def __str__(self) -> str:
        between = f" and {self.other}" if self.kind in ("part", "cut") else ""
        return f"{self.kind} {self.who}{between} for {self.lasting_s:.3f} s, degree {self.degree:.2f}"


def plan(seed: int, names: list[str]) -> list[Fault]:
    """Draw what goes wrong."""
    drawn = random.Random(f"faults-{seed}")
    faults = []
    for _ in range(drawn.choice([0, 1, 1, 2, 2, 3, 4, 6])):
        kind = drawn.choices(list(KINDS), list(KINDS.values()))[0]
        who = drawn.choice(names)
        other = drawn.choice([name for name in [*names, "scheduler"] if name != who])
        lasting_s = drawn.choice([0.02, 0.2, 2.0, 40.0]) * drawn.uniform(0.5, 1.5)
        faults.append(Fault(drawn.expovariate(1 / SOON_S), lasting_s, kind, who, other, drawn.random()))
    return sorted(faults, key=lambda fault: fault.at_s)


async def inject(world: World, disk: Disk, fault: Fault) -> None:
    """Let it happen, and end."""
    await asyncio.sleep(fault.at_s)
    world.tell(str(fault))
    network, host = world.network, world.hosts[fault.who]
    disk_faults = disk.faults.setdefault(fault.who, DiskFaults())
    match fault.kind:
        case "kill":
            world.kill(fault.who)
        case "vanish":
            world.kill(fault.who, silently=True)
        case "stop":
            host.stop()
        case "part":
            network.part(fault.who, fault.other)
        case "cut":
            for connection in network.between(frozenset((fault.who, fault.other))):
                connection.cut()
        case "loss":
            network.loss = 0.3 * fault.degree
        case "slow":
            host.slowness = 1 + 200 * fault.degree
        case "full":
            disk_faults.full = True
        case "error":
            disk_faults.errors = fault.degree
        case "flip":
            disk_faults.flips = fault.degree
        case "drag":
            disk_faults.slowness = 1 + 200 * fault.degree
    await asyncio.sleep(fault.lasting_s)
    match fault.kind:
        case "stop":
            host.go_on()
        case "part":
            network.join(fault.who, fault.other)
        case "loss":
            network.loss = 0.0
        case "slow":
            host.slowness = 1.0
        case "full":
            disk_faults.full = False
        case "error":
            disk_faults.errors = 0.0
        case "flip":
            disk_faults.flips = 0.0
        case "drag":
            disk_faults.slowness = 1.0
