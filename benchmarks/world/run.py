"""One seed of the simulated world, from the beginning to the end.

Covers: :func:`simulate`: the cluster that follows from a seed, its jobs, its faults, and all that is checked.
Does not cover: many seeds; see :mod:`benchmarks.world.__main__`.
"""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.world.checks import Books, BrokenError, rest
from benchmarks.world.cluster import World
from benchmarks.world.disk import Disk
from benchmarks.world.faults import Fault, inject, plan
from benchmarks.world.jobs import Job
from benchmarks.world.machine import VirtualLoop, real_time, take_chance
from benchmarks.world.scale import scale

__all__ = ["Outcome", "simulate"]

#: Everything has to end so long after the last fault: more than it takes Dask to give up a connection, a few times.
PATIENCE_S = 400.0
#: And so long after its results were let go, nothing may be left.
REST_S = 120.0


#: Files need not survive.
SHARED = Path("/dev/shm")  # noqa: S108


@dataclass
class Outcome:
    """What came of a seed."""

    seed: int
    #: What was wrong; None: nothing.
    broken: str | None = None
    #: The kind of a :class:`~benchmarks.world.checks.BrokenError`; ``error``: one that the user gets; ``died``: the process has.
    kind: str | None = None
    #: What happened, with times; and a digest of all that went over the network, and when.
    story: list[str] = field(default_factory=list)
    digest: str = ""
    #: Kinds of faults; and counts of what was injected and done.
    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    virtual_s: float = 0.0
    real_s: float = 0.0


class _Life:
    """A seed's cluster and what happens to it."""

    def __init__(self, seed: int, jobs: Sequence[Job], loop: VirtualLoop, folder: Path, *, stock: bool) -> None:
        drawn = random.Random(f"life-{seed}")
        scale(drawn)
        self.loop = loop
        memory_nbytes = drawn.choice([60_000, 100_000, 200_000, 2**24])
        self.world = World(
            loop,
            seed,
            folder,
            workers=drawn.choice([2, 3, 3, 4]),
            memory_nbytes=memory_nbytes,
            gpurt={
                "shuffle.transport": "dask",
                "shuffle.send-limit": drawn.choice([2_000, 50_000, 2**20]),
                # Drawn apart, so that the seed is what it was in all else.
                "shuffle.keep-sent": random.Random(f"keep-{seed}").choice([None, 5_000, 2**24, 2**24]),
                # Stock's like of it is left out of stock: where it is reached, whoever reads a spilled value gets an error.
                "memory.disk-limit": drawn.choice([None, None, 150_000]),
                "memory.encryption": drawn.random() < 0.1,
            },
            stock=stock,
            validate=drawn.random() < 0.2,
        )
        self.disk = Disk(loop, random.Random(f"disk-{seed}"))
        self.jobs = drawn.sample(list(jobs), drawn.choice([1, 1, 2]))
        self.faults: list[Fault] = plan(seed, self.world.names)
        self.books = Books(self.world)
        self.mistake: BaseException | None = None
        self._futures: list[list[Any]] = []

    def step(self) -> None:
        """Check, between two moments."""
        self.books()

    async def live(self) -> None:
        """Live."""
        with self.disk.taken():
            try:
                await self._live()
            finally:
                self.loop.stepped = None

    async def _live(self) -> None:
        world = self.world
        await world.begin()
        world.tell(f"{len(world.names)} workers of {world.memory_nbytes} bytes, {world.gpurt}")
        self.loop.stepped = self.step
        faults = [asyncio.create_task(inject(world, self.disk, fault)) for fault in self.faults]
        nurses = [asyncio.create_task(world.nurse(name)) for name in world.names]
        ends_s = max((fault.at_s + fault.lasting_s for fault in self.faults), default=0.0)
        work = world.on("client", self._work())
        await self._within(work, ends_s + PATIENCE_S, nurses)
        await asyncio.gather(*faults)
        # What was there before the last faults has to be there after them, or there again.
        await self._within(world.on("client", self._judge("again")), PATIENCE_S, nurses)
        self._futures.clear()
        # Nobody else does it here, and what was raised on the way refers to them.
        gc.collect()
        await self._come_to_rest()
        for nurse in nurses:
            nurse.cancel()

    async def _within(self, work: asyncio.Task[None], limit_s: float, nurses: list[asyncio.Task[None]]) -> None:
        done, _ = await asyncio.wait({work, *nurses}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise BrokenError(f"jobs have not ended {limit_s:.0f} s after they began:\n{self._state()}", "hang")
        for each in done:
            each.result()

    async def _work(self) -> None:
        client = self.world.client
        for job in self.jobs:
            self.world.tell(f"{job.name} begins")
            self._futures.append(client.get(job.graph, job.keys, sync=False))
        await self._judge("first")

    async def _judge(self, when: str) -> None:
        for job, futures in zip(self.jobs, self._futures, strict=True):
            results = await self.world.client.gather(futures)
            try:
                job.judge(results)
            except AssertionError as error:
                raise BrokenError(f"{job.name}, gathered {when}, is wrong: {error}", "wrong") from error
            self.world.tell(f"{job.name} is right ({when})")

    async def _come_to_rest(self) -> None:
        world = self.world
        waited_s = 0.0
        while True:
            await asyncio.sleep(1.0)
            waited_s += 1.0
            left = ["the scheduler knows tasks"] if world.scheduler.tasks else rest(world)
            away = [name for name in world.names if name not in world.workers]
            if not left and not away:
                break
            if waited_s > REST_S:
                raise BrokenError(f"left behind after {REST_S:.0f} s: {left + away}\n{self._state()}", "left")
        world.scheduler.validate_state()
        for worker in world.workers.values():
            worker.state.validate_state()

    def _state(self) -> str:
        scheduler = self.world.scheduler
        lines = [f"{ts.state} {ts.key!r} {ts.processing_on or ts.who_has}" for ts in scheduler.tasks.values()]
        for name, worker in self.world.workers.items():
            lines.append(f"{name} {worker.status} {self.world.hosts[name]} {worker.extensions.get('gpurt')}")
            lines += [f"{name} {ts.state} {ts.key!r}" for ts in worker.state.tasks.values()]
            parts = worker.extensions.get("gpurt")
            if parts is not None and parts.shuffle is not None:
                lines += [f"{name} {state}" for state in parts.shuffle.states()]
                lines.append(f"{name} {parts.memory}")
        return "\n".join(lines)


def simulate(
    seed: int,
    jobs: Sequence[Job],
    tell: Callable[[VirtualLoop | None], None],
    take: Callable[[VirtualLoop], None],
    *,
    stock: bool = False,
) -> Outcome:
    """Run one seed, on Dask with dask-gpurt or on stock Dask. Afterwards this process is of no more use."""
    began = real_time()
    outcome = Outcome(seed)
    drawn = random.Random(f"chance-{seed}")
    random.seed(drawn.random())
    np.random.seed(drawn.getrandbits(32))  # noqa: NPY002  Dask draws from it
    loop = VirtualLoop()
    folder = Path(tempfile.mkdtemp(prefix="gpurt-world-", dir=SHARED if SHARED.is_dir() else None))
    take(loop)
    tell(loop)
    take_chance(drawn)
    asyncio.set_event_loop(loop)
    life = _Life(seed, jobs, loop, folder, stock=stock)
    try:
        loop.run_until_complete(life.live())
    except Exception as error:  # noqa: BLE001  whatever it is, it is what the seed has found
        causes = []
        cause: BaseException | None = error
        while cause is not None:
            causes.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        outcome.kind = error.kind if isinstance(error, BrokenError) else "error"
        outcome.broken = "\nbecause of ".join(causes)
        if life.world.scheduler is not None:
            erred = [ts for ts in life.world.scheduler.tasks.values() if ts.state == "erred"]
            life.world.story += [
                str(line) for ts in erred[:1] for line in life.world.scheduler.story(ts.exception_blame)
            ]
    finally:
        tell(None)
        shutil.rmtree(folder, ignore_errors=True)
    outcome.story = life.world.story
    outcome.digest = life.world.network.digest.hexdigest()[:16]
    outcome.faults = [fault.kind for fault in life.faults]
    outcome.counts = {
        **life.disk.counts,
        "messages": life.world.network.delivered,
        "looks": life.books.looks,
        "deaths": life.world.deaths,
        "jobs": len(life.jobs),
        "repairs": life.world.repairs,
    }
    outcome.virtual_s = loop.now
    outcome.real_s = real_time() - began
    return outcome
