"""Where a task goes whose inputs are in memory, and whether a planned worker is worth what it misses.

Covers: :func:`holdings`, :func:`best_holders`, :func:`with_room`, :func:`alike`, :func:`choose`, :func:`accepts`.
Does not cover: roots; see :mod:`dask_gpurt.plugins.families`. Restrictions, actors: those decisions stay Dask's.

Theory of operation
-------------------
*Stay put*: a task runs where most of its input bytes lie, unless it would start sooner elsewhere by more than
twice what moving costs. The factor is there because a move is paid by others, too (both links are busy, and
the next task finds its inputs apart), and because a queue is a guess while bytes are facts.

*Stay together*: results that are inputs of the same later task have to meet, so a worker on which the task's siblings
were placed counts as holding a result's worth of bytes more than others.

*Shared inputs*: what a worker fetches serves all tasks there that take it. So of an input that more tasks wait for than
there are workers, a task counts its part alone: it stays with a block of its own, and not with the table that every block is joined with.

*Room*: among several workers that hold inputs, one that is short of memory is passed over. What it would gain on the network it
would lose on its disk.

*Roots to come*: where it is all the same, the worker is taken for which the fewest planned tasks wait: what it is given now delays
them. In a scan or a tree of small results, it is those roots that the others wait for in the end.

Only workers that hold an input are looked at, and of inputs with many replicas only if there is nothing else to go by:
a broadcast that is everywhere says nothing, and walking all its holders is what makes a scheduler slow.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from dask_gpurt.plugins.view import Candidate, Choice

__all__ = [
    "ALIKE",
    "CANDIDATES",
    "GUARD",
    "MANY",
    "ROOM",
    "STAY_PUT",
    "UNKNOWN_S",
    "accepts",
    "alike",
    "best_holders",
    "choose",
    "holdings",
    "prices_s",
    "result_nbytes",
    "share_nbytes",
    "starts_sooner",
    "with_room",
]

#: How much later a task may start where its inputs lie, in units of what moving them costs.
STAY_PUT = 2.0
#: A planned worker is refused if the bytes it misses, a share of them for each consumer there, exceed so many times
#: what it saves.
GUARD = 2.0
#: Workers that are compared at most.
CANDIDATES = 4
#: An input with more replicas than this is counted only for workers that are candidates for another reason.
MANY = 8
#: Part of what has to be fetched anyway by which holders may differ and still count as holding as much.
ALIKE = 0.1
#: Part of a worker's memory that is in use when it is short of it: where Dask begins to spill.
ROOM = 0.7
#: What it costs to move anything, whatever its size. When tasks become ready one after the other, the first worker's queue is full
#: while those of the others, whose tasks come next, are empty. Dask's stealing, which sees them all later, reckons with twice that.
MOVE_LATENCY_S = 0.05
#: What a task of unknown duration adds to a wait. Little: moving inputs for a wait that nobody has seen yet is what
#: takes apart the first tasks of each kind, and with them all that follows. Long tasks soon become known.
UNKNOWN_S = 0.001
#: A move that takes no longer is not worth a thought: a tenth of the shortest task.
NOTHING_S = UNKNOWN_S / 10
#: How much later a planned task may start than where its inputs are, each: a plan is not left for next to nothing.
SLACK_S = 0.01


class Holder(Protocol):
    """A worker that holds data."""

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""

    @property
    def memory_limit(self) -> int:
        """Bytes that it may hold; 0: no limit."""


W = TypeVar("W", bound=Holder)


class Held(Protocol):
    """An input in memory."""

    @property
    def who_has(self) -> Collection[Any] | None:
        """Workers that hold it."""

    @property
    def waiters(self) -> Collection[Any] | None:
        """Tasks that take it and have not ended."""

    def get_nbytes(self) -> int:
        """Return its size, or a guess."""


def share_nbytes(dep: Held, nworkers: int) -> int:
    """Count what it costs one task that ``dep`` is fetched, if its tasks are spread over all workers.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> share_nbytes(SimpleNamespace(waiters=range(32), get_nbytes=lambda: 1000), nworkers=8)
    250
    """
    nbytes = dep.get_nbytes()
    waiters = dep.waiters
    return nbytes * nworkers // len(waiters) if waiters and len(waiters) > nworkers else nbytes


def holdings(inputs: Iterable[Held], nworkers: int, *, many: int = MANY) -> tuple[dict[Any, int], int]:
    """Count the bytes of ``inputs`` by the worker that holds them, of each input as :func:`share_nbytes` does.

    Returns
    -------
    Worker to bytes, for the workers worth looking at, and the bytes of all inputs.
    """
    held: dict[Any, int] = {}
    total = 0
    everywhere: list[tuple[int, Collection[Any]]] = []
    for dep in inputs:
        nbytes = share_nbytes(dep, nworkers)
        total += nbytes
        holders = dep.who_has or ()
        if len(holders) > many:
            everywhere.append((nbytes, holders))
            continue
        for worker in holders:
            held[worker] = held.get(worker, 0) + nbytes
    if everywhere:
        if not held:
            _, holders = max(everywhere, key=lambda dep: dep[0])
            held = dict.fromkeys(islice(holders, many), 0)
        for nbytes, holders in everywhere:
            for worker in held:
                if worker in holders:
                    held[worker] += nbytes
    return held, total


def choose(candidates: Sequence[Candidate]) -> Choice:
    """Choose among workers.

    Parameters
    ----------
    candidates
        At least one worker.

    Examples
    --------
    >>> here, there = Candidate("here", 0, 1.0, 0.0), Candidate("there", 100, 0.0, 0.1)
    >>> choose([here, there])
    Choice(worker='there', reason='earlier-elsewhere')
    >>> choose([here, there._replace(move_s=1.0)])
    Choice(worker='here', reason='most-bytes')
    """
    fewest = min(candidate.missing_nbytes for candidate in candidates)

    def cost_s(candidate: Candidate) -> tuple[float, int]:
        return _price_s(candidate, fewest), candidate.missing_nbytes

    best = min(candidates, key=cost_s)
    return Choice(best.worker, "most-bytes" if best.missing_nbytes == fewest else "earlier-elsewhere")


def alike(candidates: Sequence[Candidate]) -> bool:
    """Say whether it is all the same to the task itself where it runs: everywhere as much is missing, and next to nothing.

    Examples
    --------
    >>> here, there = Candidate("here", 1000, 0.0, 1e-6), Candidate("there", 1000, 0.0, 1e-6)
    >>> alike([here, there]), alike([here, there._replace(missing_nbytes=0)]), alike([here, there._replace(move_s=0.01)])
    (True, False, False)
    """
    missing = candidates[0].missing_nbytes
    return all(c.missing_nbytes == missing and c.move_s <= NOTHING_S for c in candidates)


def prices_s(candidates: Sequence[Candidate]) -> list[float]:
    """Tell what :func:`choose` compares: when each worker would start the task, and what fetching costs there.

    Examples
    --------
    >>> [round(price, 2) for price in prices_s([Candidate("here", 0, 1.0, 0.0), Candidate("there", 1000, 0.0, 0.25)])]
    [1.0, 0.6]
    """
    fewest = min(candidate.missing_nbytes for candidate in candidates)
    return [_price_s(candidate, fewest) for candidate in candidates]


def _price_s(candidate: Candidate, fewest_nbytes: int) -> float:
    missing = candidate.missing_nbytes
    # Where all have to fetch as much, as in a shuffle, none of them is left.
    left = min(1.0, (missing - fewest_nbytes) / fewest_nbytes) if fewest_nbytes else float(missing > 0)
    return candidate.wait_s + STAY_PUT * (candidate.move_s + MOVE_LATENCY_S * left)


def accepts(missing_nbytes: int, consumers: int, best_missing_nbytes: int, output_nbytes: int) -> bool:
    """Say whether a planned worker is worth the bytes it misses.

    What one worker fetches serves all tasks that were planned there. The plan saves moving their results.

    Parameters
    ----------
    missing_nbytes
        Bytes of the task's inputs that the planned worker misses.
    consumers
        Tasks planned there that take these inputs, this one included.
    best_missing_nbytes
        The same bytes for the worker that misses the fewest.
    output_nbytes
        Expected size of the task's result; 0 if it is not known.

    Examples
    --------
    >>> accepts(8_000_000, consumers=100, best_missing_nbytes=0, output_nbytes=1_000_000)
    True
    >>> accepts(8_000_000, consumers=2, best_missing_nbytes=0, output_nbytes=1_000_000)
    False
    """
    return missing_nbytes <= GUARD * max(best_missing_nbytes, output_nbytes) * max(consumers, 1)


def starts_sooner(missing_s: float, consumers: int, there_s: float) -> bool:
    """Say whether a planned task starts sooner at its worker, which has to fetch inputs, than where these are.

    Parameters
    ----------
    missing_s
        What it takes to fetch them.
    consumers
        Tasks planned there that take them, this one included.
    there_s
        How long the task would wait where they are, and what it takes to fetch its result from there.

    Examples
    --------
    >>> starts_sooner(missing_s=0.4, consumers=3, there_s=0.1)
    False
    >>> starts_sooner(missing_s=0.004, consumers=3, there_s=0.1)
    True
    """
    return STAY_PUT * missing_s / consumers <= there_s + SLACK_S


def result_nbytes(inputs_nbytes: int, ninputs: int) -> int:
    """Guess the size of a result before one of its kind has been seen: half of a typical input.

    Examples
    --------
    >>> result_nbytes(300, 3)
    50
    """
    return inputs_nbytes // (2 * max(ninputs, 1))


def with_room(workers: list[W]) -> list[W]:
    """List those of ``workers`` that are not short of memory, or all if all of them are."""
    roomy = [worker for worker in workers if not worker.memory_limit or worker.nbytes < ROOM * worker.memory_limit]
    return roomy or workers


def best_holders(
    held: dict[Any, int], running: Collection[Any], limit: int = CANDIDATES, total_nbytes: int = 0
) -> list[Any]:
    """List the running workers that hold the most, most first, ``limit`` at most.

    Parameters
    ----------
    held
        Worker to bytes of the inputs that it holds.
    running
        The running workers.
    limit
        Workers at most.
    total_nbytes
        Bytes of all inputs.
    """
    able = [worker for worker in held if worker in running]
    if len(able) > limit > 1:
        # Of those that would fetch about as much, as in a shuffle all would, the ones with the least to do.
        most = max(map(held.__getitem__, able))
        enough = most - ALIKE * max(0, total_nbytes - most)

        def rank(worker: Any) -> tuple[float, int]:
            nbytes = min(held[worker], enough)
            return -nbytes, len(worker.processing)

        able.sort(key=rank)
    elif len(able) > 1:
        able.sort(key=held.__getitem__, reverse=True)
    return able[:limit]
