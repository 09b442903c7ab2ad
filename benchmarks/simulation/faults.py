"""What goes wrong in a cluster: workers join, die, pause and slow down at random times.

Covers: :class:`Faults`, :func:`unleash`.
Does not cover: messages that are lost or overtake each other: Dask's streams do not do that while they are open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.simulation.cluster import Cluster
    from benchmarks.simulation.worker import SimulatedWorker

__all__ = ["Faults", "unleash"]


@dataclass(frozen=True)
class Faults:
    """How many of each kind there are, and up to when they begin.

    No more workers should die than tasks are allowed to fail, or Dask rightly gives up one that was on each of them.
    """

    until_s: float
    joins: int = 2
    deaths: int = 2
    pauses: int = 2
    slowdowns: int = 2


def unleash(cluster: Cluster, faults: Faults) -> None:
    """Let ``faults`` happen to a cluster, at times and to workers that its seed decides."""
    clock, rng = cluster.clock, cluster.random

    def later(act: Callable[[], None], times: int) -> None:
        for _ in range(times):
            clock.at(rng.uniform(0, faults.until_s), act)

    def able(least: int) -> SimulatedWorker | None:
        """Choose a worker of those that are running, if ``least`` others are, too."""
        running = [worker for worker in cluster.workers.values() if not worker.paused]
        return rng.choice(running) if len(running) > least else None

    def join() -> None:
        cluster.add_worker(max(cluster.numbered) + 1, speed=rng.choice([0.3, 1.0, 1.0]))

    def die() -> None:
        if (worker := able(1)) is not None:
            cluster.remove_worker(worker)

    def pause() -> None:
        if (worker := able(1)) is not None:
            worker.pause()
            clock.after(rng.uniform(0, faults.until_s), worker.unpause)

    def slow_down() -> None:
        if (worker := able(0)) is not None:
            worker.set_speed(rng.uniform(0.02, 0.5))
            clock.after(rng.uniform(0, faults.until_s), lambda: worker.set_speed(1.0))

    later(join, faults.joins)
    later(die, faults.deaths)
    later(pause, faults.pauses)
    later(slow_down, faults.slowdowns)
