"""What is to be done when an allocation on a device fails.

Theory of operation
-------------------
The allocator calls back, in the thread that wanted memory, and tries again for as long as it is told to. What it does not
say is whether an allocation succeeded after that. So a failure is taken for a *repeated* one when the same thread asks
for the same number of bytes and nothing was allocated in between; then what was moved away was not enough, because it
lay in pieces, or somebody else took it, and twice as much is asked for as the last time. A small allocation asks for a
part of the limit at once (:data:`STEP_FRACTION`): the next small ones find room without any call.

Trying again makes sense if memory was freed since the failure, no matter for whom; otherwise, and after
:data:`TRIES_MAX` failures in a row, the allocation is refused.

Threads that fail while memory is being freed for others wait together, and the next *round* is for all of them at once.

Covers: how much is asked for, when to give up, who shares a round, what is said at the end.
Does not cover: threads, the callback; see :mod:`dask_gpurt.memory.rmm`.

Pure: no I/O, no clock, no dask, no threads. Different threads may call :meth:`Rescue.failed` and :meth:`Rescue.verdict` at
a time; the other methods are serialized by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

__all__ = ["Failure", "Figures", "Rescue", "in_words", "story"]

#: Failures of one allocation after which it is refused, even if there is something left to be moved. The last one asks for
#: 128 times its bytes.
TRIES_MAX = 8

#: Part of the limit that is asked for at least.
STEP_FRACTION = 1 / 64

#: Threads whose last failure is known. Forgetting one only lets the next request begin small.
THREADS_MAX = 256

Token = TypeVar("Token")


class Failure(NamedTuple):
    """An allocation that failed."""

    asked_nbytes: int
    #: How many allocations had succeeded by then.
    allocations: int
    #: How many bytes had been freed by then.
    freed_nbytes: int
    #: The how-manieth failure of it this is.
    tries: int
    #: How many bytes are to be moved away.
    wish_nbytes: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What is known about the memory of a device."""

    #: Bytes that the allocator has given out; None: it does not say.
    allocated_nbytes: int | None
    free_nbytes: int
    total_nbytes: int


class Rescue(Generic[Token]):
    """Books of failed allocations.

    Parameters
    ----------
    limit_nbytes
        What the tier may hold.

    Examples
    --------
    >>> rescue = Rescue(6400)
    >>> first = rescue.failed(thread=1, asked_nbytes=1000, allocations=7, freed_nbytes=0)
    >>> rescue.verdict(thread=1, failure=first, freed_nbytes=1000)
    True
    >>> rescue.failed(thread=1, asked_nbytes=1000, allocations=7, freed_nbytes=1000).wish_nbytes
    2000
    >>> rescue.failed(thread=1, asked_nbytes=10, allocations=8, freed_nbytes=1000).wish_nbytes
    100
    """

    def __init__(self, limit_nbytes: int) -> None:
        self._step_nbytes = int(limit_nbytes * STEP_FRACTION)
        self._last: dict[int, Failure] = {}
        self._waiting: list[tuple[int, Token]] = []
        self._under_way = False

    def failed(self, thread: int, asked_nbytes: int, allocations: int, freed_nbytes: int) -> Failure:
        """Take note of a failure in ``thread``, and say how much is to be moved away for it."""
        last = self._last.get(thread)
        again = last is not None and last.asked_nbytes == asked_nbytes and last.allocations == allocations
        tries = last.tries + 1 if last is not None and again else 1
        wish_nbytes = max(asked_nbytes, self._step_nbytes) << (tries - 1)
        failure = Failure(asked_nbytes, allocations, freed_nbytes, tries, wish_nbytes)
        if len(self._last) >= THREADS_MAX:
            self._last.clear()
        self._last[thread] = failure
        return failure

    def hopeless(self, failure: Failure, total_nbytes: int) -> bool:
        """Whether nothing that is moved away can help."""
        return failure.asked_nbytes > total_nbytes or failure.tries > TRIES_MAX

    def verdict(self, thread: int, failure: Failure, freed_nbytes: int) -> bool:
        """Say whether to try again, ``freed_nbytes`` being what was freed until now in all."""
        if freed_nbytes > failure.freed_nbytes:
            return True
        self.give_up(thread)
        return False

    def give_up(self, thread: int) -> None:
        """Forget the failure of ``thread``; the next one is another."""
        self._last.pop(thread, None)

    # Rounds

    def wish(self, nbytes: int, token: Token) -> bool:
        """Wait for the next round; say whether it has to be begun."""
        self._waiting.append((nbytes, token))
        if self._under_way:
            return False
        self._under_way = True
        return True

    def round(self) -> tuple[int, list[Token]] | None:
        """Begin a round for all who wait: the bytes that they ask for, and who they are. None: nobody does; that was it."""
        if not self._waiting:
            self._under_way = False
            return None
        waiting, self._waiting = self._waiting, []
        return sum(nbytes for nbytes, _ in waiting), [token for _, token in waiting]


def story(who: str, failure: Failure, figures: Figures, *, held_nbytes: int, limit_nbytes: int | None) -> str:
    """Say who asked for how much, and where the memory is.

    Examples
    --------
    >>> failure = Failure(2**31, 0, 0, 3, 2**33)
    >>> print(story("task 'x'", failure, Figures(3 * 2**30, 2**29, 2**32), held_nbytes=2**30, limit_nbytes=2**31))
    out of device memory: task 'x' asked for 2.00 GiB. Of 4.00 GiB, 512.00 MiB are free; the allocator has given out 3.00 GiB. \
dask-gpurt holds 1.00 GiB (limit: 2.00 GiB), of which nothing more could be moved away after 3 tries.
    """
    given_out = (
        ""
        if figures.allocated_nbytes is None
        else f"; the allocator has given out {in_words(figures.allocated_nbytes)}"
    )
    limit = "" if limit_nbytes is None else f" (limit: {in_words(limit_nbytes)})"
    tries = "1 try" if failure.tries == 1 else f"{failure.tries} tries"
    return (
        f"out of device memory: {who} asked for {in_words(failure.asked_nbytes)}. Of {in_words(figures.total_nbytes)}, "
        f"{in_words(figures.free_nbytes)} are free{given_out}. dask-gpurt holds {in_words(held_nbytes)}{limit}, of which nothing "
        f"more could be moved away after {tries}."
    )


def in_words(nbytes: int) -> str:
    """Write a number of bytes as people read it.

    Examples
    --------
    >>> in_words(3 * 2**29), in_words(2**20), in_words(512)
    ('1.50 GiB', '1.00 MiB', '0.50 KiB')
    """
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if nbytes >= 2**power:
            return f"{nbytes / 2**power:.2f} {unit}"
    return f"{nbytes / 2**10:.2f} KiB"
