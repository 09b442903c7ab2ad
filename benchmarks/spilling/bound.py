"""The least that any store can move on a trace: LPmin, a fractional optimum that knows the future.

Theory of operation
-------------------
A value lives from its put to its deletion. While a task that reads it runs, it is in memory. Between two of these *reads*
lies a *gap*; the unknowns are, for each gap, the fraction of the value that stays in memory during it. What does not is
read at the end of the gap, and must have been written, once in its life: a copy stays good. After the last read nothing
is owed, unless a client still holds the value; then what does not stay in memory must have been written. A peer is
served from wherever the value lies; bytes that are read for it may stay in memory.

Values that lie in one buffer keep it whole as long as a fraction of any of them is kept there; what was read back lies in
memory of its own. So there are two fractions a gap, *in place* (never more than in the gap before) and *apart*.

After each event that brings bytes, those in memory must not exceed the capacity, or what running tasks hold where that is
more; a result may come while its task still holds the inputs. The sum of bytes in memory is an unknown of its own at each of these moments, tied to the one before it by what
changes between them: that keeps the matrix sparse, a few entries a gap instead of one for each moment that it lasts.

Half a value helps nobody: LPmin may lie below what can be reached, and never lies above.

Covers: :func:`least_nbytes`.
Does not cover: stores (:mod:`benchmarks.spilling.replay`).

Pure: no I/O, no clock, no dask.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from benchmarks.spilling.trace import Delete, End, Graph, Known, Put, Serve, Start, Trace

__all__ = ["least_nbytes"]

#: Coefficients near 1 are what solvers like.
UNIT_NBYTES = 2**20

_NEVER = 2**62


@dataclass(frozen=True, slots=True)
class _Read:
    """Moments from ``first`` to before ``last``, in which the value is in memory; none of them for a peer's read."""

    first: int
    last: int


@dataclass(slots=True, eq=False)
class _Value:
    """The life of a value, in moments: each is the state after an event that brings bytes."""

    nbytes: int
    #: Number of the buffer that it was put in, and its bytes.
    buffer: int
    buffer_nbytes: int
    born: int
    #: First moment at which nobody can ask for it.
    gone: int
    #: Whether it is owed to a client after its last read.
    owed: bool
    reads: list[_Read] = field(default_factory=list)

    def gaps(self) -> list[tuple[int, int, bool]]:
        """(first moment, first moment after it, whether a read follows), where the value is needed afterwards."""
        found = []
        at = self.born
        for read in self.reads:
            found.append((at, read.first, True))
            at = read.last
        if self.owed:
            found.append((at, self.gone, False))
        return found


class _Reader:
    """Reads a trace."""

    def __init__(self, trace: Trace) -> None:
        self.values: list[_Value] = []
        #: Bytes that running tasks hold, at each moment.
        self.held_nbytes: list[int] = []
        self._alive: dict[Hashable, _Value] = {}
        #: Identity of a buffer -> its number, for as long as a value lies in it.
        self._buffers: dict[Hashable, int] = {}
        self._identities: dict[int, Hashable] = {}
        self._holders: Counter[int] = Counter()
        self._numbers = itertools.count()
        self._wanted: set[Hashable] = set()
        self._running: dict[Hashable, list[_Value]] = {}
        #: The task that has just ended and what it held; its result is put next, if it has one.
        self._ended: tuple[Hashable, list[_Value]] = None, []
        #: Value -> how many running tasks hold it, and since when.
        self._readers: Counter[_Value] = Counter()
        self._since: dict[_Value, int] = {}
        for event in trace.events:
            match event:
                case Put():
                    self._put(event)
                case Delete(key):
                    self._delete(key)
                case Known(key, "released" | "forgotten"):
                    self._wanted.discard(key)
                    if key in self._alive:
                        self._alive[key].gone = min(self._alive[key].gone, self.now)
                case Graph(_, keys):
                    self._want(keys)
                case Start():
                    self._start(event)
                case End(key):
                    self._ended = key, self._running.get(key, [])
                    self._end(key)
                case Serve(keys):
                    for value in (self._alive[key] for key in keys if key in self._alive):
                        if not self._readers[value]:
                            value.reads.append(_Read(self.now, self.now))
                case _:
                    pass
        for key in list(self._running):
            self._end(key)
        for value in self.values:
            value.gone = min(value.gone, self.now)

    @property
    def now(self) -> int:
        """The next moment."""
        return len(self.held_nbytes)

    def _moment(self, leaving: Iterable[_Value] = ()) -> None:
        held = {*self._readers, *leaving}
        # Several of them may lie in one buffer: the larger of both ways to hold them is allowed.
        in_place = {value.buffer: value.buffer_nbytes for value in held}
        self.held_nbytes.append(max(sum(in_place.values()), sum(value.nbytes for value in held)))

    def _put(self, event: Put) -> None:
        self._delete(event.key)
        if event.buffer not in self._buffers:
            number = self._buffers[event.buffer] = next(self._numbers)
            self._identities[number] = event.buffer
        number = self._buffers[event.buffer]
        self._holders[number] += 1
        owed = event.key in self._wanted
        value = _Value(event.nbytes, number, event.buffer_nbytes, self.now, _NEVER, owed)
        self._alive[event.key] = value
        self.values.append(value)
        ended, held = self._ended
        self._moment([*held, value] if event.key == ended else [])

    def _delete(self, key: Hashable) -> None:
        value = self._alive.pop(key, None)
        if value is not None:
            value.gone = min(value.gone, self.now)
            self._holders[value.buffer] -= 1
            if not self._holders[value.buffer]:
                del self._buffers[self._identities.pop(value.buffer)]

    def _want(self, keys: Iterable[Hashable]) -> None:
        self._wanted.update(keys)
        for key in keys:
            if key in self._alive:
                self._alive[key].owed = True

    def _start(self, event: Start) -> None:
        held = [self._alive[key] for key in dict.fromkeys(event.inputs) if key in self._alive]
        self._running[event.key] = held
        for value in held:
            if not self._readers[value]:
                self._since[value] = self.now
            self._readers[value] += 1
        self._moment()

    def _end(self, key: Hashable) -> None:
        for value in self._running.pop(key, ()):
            self._readers[value] -= 1
            if not self._readers[value]:
                del self._readers[value]
                value.reads.append(_Read(self._since.pop(value), self.now))


class _Program:
    """A linear program: minimize a sum of unknowns between 0 and their highest, in rows that are 0 or at most 0."""

    def __init__(self) -> None:
        self.constant = 0.0
        self._costs: list[float] = []
        self._highest: list[float] = []
        self._rows: dict[bool, list[tuple[dict[int, float], float]]] = {True: [], False: []}

    def unknown(self, cost: float = 0.0, highest: float = 1.0) -> int:
        self._costs.append(cost)
        self._highest.append(highest)
        return len(self._costs) - 1

    def equal(self, terms: dict[int, float], to: float) -> None:
        self._rows[True].append((terms, to))

    def at_most(self, terms: dict[int, float], to: float) -> None:
        self._rows[False].append((terms, to))

    def minimum(self) -> float:
        from scipy.optimize import linprog

        if not self._costs:
            return self.constant
        (a_ub, b_ub), (a_eq, b_eq) = (self._matrix(self._rows[equal]) for equal in (False, True))
        bounds = [(0.0, highest) for highest in self._highest]
        found = linprog(self._costs, a_ub, b_ub, a_eq, b_eq, bounds=bounds, method="highs")
        assert found.status == 0, found.message
        return self.constant + float(found.fun)

    def _matrix(self, rows: list[tuple[dict[int, float], float]]) -> tuple[object, list[float]]:
        from scipy.sparse import csr_array

        entries = [
            (number, column, factor) for number, (terms, _) in enumerate(rows) for column, factor in terms.items()
        ]
        numbers, columns, factors = zip(*entries, strict=True) if entries else ((), (), ())
        return csr_array((factors, (numbers, columns)), shape=(len(rows), len(self._costs))), [to for _, to in rows]


class _Model:
    """Makes the program of a trace."""

    def __init__(self, story: _Reader, capacity_nbytes: int) -> None:
        self.program = _Program()
        #: Moment -> unknown -> bytes that it brings then, or takes away; and the same for what is known.
        self._changes: defaultdict[int, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
        self._known: defaultdict[int, float] = defaultdict(float)
        buffers: defaultdict[int, list[_Value]] = defaultdict(list)
        for value in story.values:
            if value.nbytes:
                buffers[value.buffer].append(value)
        for values in buffers.values():
            if len(values) == 1 and values[0].nbytes == values[0].buffer_nbytes:
                self._alone(values[0])
            else:
                self._sharing(values)
        before: int | None = None
        for moment, held_nbytes in enumerate(story.held_nbytes):
            changes, known = self._changes[moment], self._known[moment]
            used = self.program.unknown(highest=max(capacity_nbytes, held_nbytes) / UNIT_NBYTES)
            terms = {used: 1.0} | {unknown: -factor for unknown, factor in changes.items() if factor}
            if before is not None:
                terms[before] = -1.0
            self.program.equal(terms, known)
            before = used

    def _during(self, unknown: int, nbytes: float, first: int, last: int) -> None:
        self._changes[first][unknown] += nbytes
        self._changes[last][unknown] -= nbytes

    def _owe(self, value: _Value, kept: list[tuple[dict[int, float], bool]]) -> None:
        """Let what is not kept in memory in a gap be written, and be read if a read follows."""
        if not kept:
            return
        nbytes = value.nbytes / UNIT_NBYTES
        written = self.program.unknown(nbytes)
        for terms, read in kept:
            # written >= 1 - kept
            self.program.at_most({written: -1.0} | dict.fromkeys(terms, -1.0), -1.0)
            if read:
                away = self.program.unknown(nbytes)
                self.program.at_most({away: -1.0} | dict.fromkeys(terms, -1.0), -1.0)

    def _alone(self, value: _Value) -> None:
        nbytes = value.nbytes / UNIT_NBYTES
        kept = []
        for first, last, read in value.gaps():
            if first < last:
                unknown = self.program.unknown()
                self._during(unknown, nbytes, first, last)
                kept.append(({unknown: 1.0}, read))
        for held in value.reads:
            self._known[held.first] += nbytes
            self._known[held.last] -= nbytes
        self._owe(value, kept)

    def _sharing(self, values: list[_Value]) -> None:
        """Model values of one buffer. In each of their stretches, gaps and reads, a fraction of each is in place."""
        program = self.program
        stretches: list[tuple[int, int, int]] = []
        for value in values:
            nbytes = value.nbytes / UNIT_NBYTES
            kept = []
            before: int | None = None
            reads = iter(value.reads)
            for first, last, read in value.gaps():
                if first < last:
                    in_place, apart = program.unknown(), program.unknown()
                    self._follow(before, in_place)
                    before = in_place
                    program.at_most({in_place: 1.0, apart: 1.0}, 1.0)
                    self._during(apart, nbytes, first, last)
                    stretches.append((first, last, in_place))
                    kept.append(({in_place: 1.0, apart: 1.0}, read))
                if read:
                    held = next(reads)
                    if held.first < held.last:
                        in_place = program.unknown()
                        self._follow(before, in_place)
                        before = in_place
                        stretches.append((held.first, held.last, in_place))
                        # The rest of it lies apart.
                        self._during(in_place, -nbytes, held.first, held.last)
                        self._known[held.first] += nbytes
                        self._known[held.last] -= nbytes
            self._owe(value, kept)
        buffer_nbytes = values[0].buffer_nbytes / UNIT_NBYTES
        bounds = sorted({moment for first, last, _ in stretches for moment in (first, last)})
        for first, last in itertools.pairwise(bounds):
            inside = [in_place for begin, end, in_place in stretches if begin <= first and last <= end]
            if inside:
                whole = program.unknown()
                self._during(whole, buffer_nbytes, first, last)
                for in_place in inside:
                    program.at_most({in_place: 1.0, whole: -1.0}, 0.0)

    def _follow(self, before: int | None, in_place: int) -> None:
        if before is not None:
            self.program.at_most({in_place: 1.0, before: -1.0}, 0.0)


def least_nbytes(trace: Trace, capacity_nbytes: int) -> float:
    """Return the bytes that any store moves at least, down and up, with so much memory.

    Examples
    --------
    Two values of 6 bytes, and room for 10; the first is asked for again:

    >>> trace = Trace((Put("x", 6, 1, 6), Put("y", 6, 2, 6), Start("sum", ("x", "y")), End("sum")))
    >>> round(least_nbytes(trace, 10), 6)  # 2 bytes go down, and up again
    4.0
    """
    return _Model(_Reader(trace), capacity_nbytes).program.minimum() * UNIT_NBYTES
