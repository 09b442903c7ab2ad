"""What machines do to workers: a plan by a seed, and doing it from outside.

All of it is done by the kernel or by Dask to processes that do not know of it, so that stock Dask meets the very same.

====================  ==================================================================================================
``kill``              SIGKILL; the nanny starts another one
``kill-several``      the same to all that may be lost, at once
``stop``              SIGSTOP, and SIGCONT after 3 to 20 seconds
``disk-full``         no file can be made larger for 3 to 15 seconds (RLIMIT_FSIZE: writes fail with EFBIG)
``damage``            a byte in the middle of each of its files is another one
``restart``           ``Client.restart_workers``
``grow``              one worker more for 5 to 20 seconds, which is then retired
====================  ==================================================================================================

One worker, the *veteran*, is never lost: it shows what grows.

Covers: :class:`Fault`, :func:`plan`, :class:`Injector`.
Does not cover: what becomes of the jobs.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from distributed import Client, LocalCluster
from distributed.core import Status

__all__ = ["KINDS", "Fault", "Injector", "plan"]

#: Kind -> seconds that it lasts, from and to.
KINDS: dict[str, tuple[float, float]] = {
    "kill": (0, 0),
    "kill-several": (0, 0),
    "stop": (3, 20),
    "disk-full": (3, 15),
    "damage": (0, 0),
    "restart": (0, 0),
    "grow": (5, 20),
}

#: Smaller files hold no data: locks, logs.
_DAMAGED_NBYTES_MIN = 4096

#: A worker that was killed is there again after a few seconds on an idle machine.
RETURN_LIMIT_S = 120.0


@dataclass(frozen=True)
class Fault:
    """What happens next.

    Parameters
    ----------
    kind
        One of :data:`KINDS`.
    place
        In [0, 1): which of the workers it happens to.
    duration_s
        How long it lasts.
    """

    kind: str
    place: float
    duration_s: float


def plan(seed: int) -> Iterator[Fault]:
    """Yield faults without an end: each kind once, in random order, and again.

    Examples
    --------
    >>> from itertools import islice
    >>> sorted(fault.kind for fault in islice(plan(3), len(KINDS))) == sorted(KINDS)
    True
    """
    rng = np.random.default_rng([seed, 7])
    while True:
        for kind in rng.permutation(list(KINDS)):
            yield Fault(str(kind), float(rng.random()), float(rng.uniform(*KINDS[kind])))


@dataclass(frozen=True)
class _Process:
    """A worker: its name in the cluster, its address, its process, its folder."""

    name: Any
    address: str
    pid: int
    folder: str


class Injector:
    """Does it, one fault at a time.

    Parameters
    ----------
    cluster, client
        Of the workers.
    workers
        How many there are when nothing happens. The first is the veteran.
    """

    def __init__(self, cluster: LocalCluster, client: Client, workers: int) -> None:
        self._cluster = cluster
        self._client = client
        self._workers = workers
        self._veteran = min(self.workers(), key=lambda worker: int(worker.name)).name

    def workers(self) -> list[_Process]:
        """Return all workers that have started, the veteran among them."""
        found = self._client.run(_process, on_error="ignore")
        # A nanny that loses its worker while it waits for word of it begins no other.
        started = self._client.run(_has_started, nanny=True, on_error="ignore")
        return sorted(
            (worker for worker in found.values() if started.get(worker.address)), key=lambda worker: int(worker.name)
        )

    def inject(self, fault: Fault) -> str:
        """Let it happen, wait until it is over, and say to whom it happened."""
        all_workers = self.workers()
        mortal = [worker for worker in all_workers if worker.name != self._veteran]
        anyone = all_workers[int(fault.place * len(all_workers))]
        chosen = mortal[int(fault.place * len(mortal))] if mortal else anyone
        match fault.kind:
            case "kill":
                os.kill(chosen.pid, signal.SIGKILL)
            case "kill-several":
                for worker in mortal:
                    os.kill(worker.pid, signal.SIGKILL)
                return ", ".join(str(worker.name) for worker in mortal)
            case "stop":
                _lasting(
                    lambda: os.kill(anyone.pid, signal.SIGSTOP),
                    fault.duration_s,
                    lambda: os.kill(anyone.pid, signal.SIGCONT),
                )
                return str(anyone.name)
            case "disk-full":
                kept = resource.prlimit(anyone.pid, resource.RLIMIT_FSIZE)
                _lasting(
                    lambda: resource.prlimit(anyone.pid, resource.RLIMIT_FSIZE, (0, kept[1])),
                    fault.duration_s,
                    lambda: resource.prlimit(anyone.pid, resource.RLIMIT_FSIZE, kept),
                )
                return str(anyone.name)
            case "damage":
                return f"{anyone.name}, {damage(anyone.folder)} files"
            case "restart":
                self._client.restart_workers([chosen.address], timeout=RETURN_LIMIT_S, raise_for_error=False)
            case "grow":
                self._cluster.scale(self._workers + 1)
                time.sleep(fault.duration_s)
                added = max(self._cluster.worker_spec, key=int)
                # On a busy machine Dask's nanny may not see its worker end in time, and kills it.
                with contextlib.suppress(TimeoutError):
                    self._cluster.sync(self._cluster.scale_down, [added])
                return str(added)
        return str(chosen.name)

    def whole(self) -> list[_Process]:
        """Wait until there are as many workers as when nothing happens.

        Raises
        ------
        TimeoutError
            If they do not come back.
        """
        deadline = time.monotonic() + RETURN_LIMIT_S
        while len(found := self.workers()) != self._workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"after {RETURN_LIMIT_S:g} s there are {len(found)} workers, not {self._workers}")
            time.sleep(0.1)
        return found


def _process(dask_worker: Any) -> _Process:
    return _Process(dask_worker.name, dask_worker.address, os.getpid(), dask_worker.local_directory)


def _has_started(dask_worker: Any) -> bool:
    """Whether the nanny knows that its worker has."""
    return dask_worker.process is not None and dask_worker.process.status is Status.running


def _lasting(begin: Callable[[], object], duration_s: float, end: Callable[[], object]) -> None:
    begin()
    try:
        time.sleep(duration_s)
    finally:
        end()


def damage(folder: str) -> int:
    """Make a byte of each file in a folder another one; say of how many."""
    count = 0
    for where, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(where, name)
            try:
                with open(path, "r+b") as file:
                    nbytes = os.fstat(file.fileno()).st_size
                    if nbytes < _DAMAGED_NBYTES_MIN:
                        continue
                    file.seek(nbytes // 2)
                    byte = file.read(1)
                    if byte:
                        file.seek(nbytes // 2)
                        file.write(bytes([byte[0] ^ 0xFF]))
                        count += 1
            except FileNotFoundError:
                continue  # it was removed in this moment
    return count
