"""The rows of a frame, gathered by output partition, right into the bodies that are sent or kept.

Covers: making bodies and filling them, with the compiled kernels or without.
Does not cover: which rows go into which body, see :mod:`dask_gpurt.shuffle.frames`; the layout, see
:mod:`dask_gpurt.shuffle.schema`.

Theory of operation
    To scatter a column reads it in order, and writes each output partition in order, which is faster than to gather one
    output partition after the other. The kernels write into all bodies at once. Without them NumPy scatters into one
    array, and pyarrow gathers strings into one array, from which they are copied to the bodies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dask_gpurt.shuffle.arrow import stream_nbytes, write_stream
from dask_gpurt.shuffle.columns import Allocate, Source, Text
from dask_gpurt.shuffle.kernels import SCATTERED, Kernels, Memory
from dask_gpurt.shuffle.plan import RowOrder
from dask_gpurt.shuffle.schema import Schema

if TYPE_CHECKING:
    import numpy.typing as npt
    import pyarrow as pa

__all__ = ["Cut", "gather"]


class Cut(NamedTuple):
    """What goes into one body: the rows of the positions from ``start`` to ``stop``, for the peer at ``address``."""

    address: str
    segments: npt.NDArray[np.int64]
    start: int
    stop: int


def gather(  # noqa: PLR0917
    schema: Schema,
    sources: Sequence[Source],
    table: pa.Table | None,
    order: RowOrder,
    cuts: Sequence[Cut],
    allocate: Allocate,
) -> list[memoryview]:
    """Make a body of each cut. ``sources`` are those of ``schema.columns``, ``table`` the rest."""
    import pyarrow as pa

    columns: list[npt.NDArray[Any]] = []
    for part in schema.parts:
        source = sources[part.column]
        values = source.valid if part.validity else source.elements
        assert values is not None
        columns.append(values)
    strings = [_strings(sources[schema.parts[number].column].text, order) for number in schema.texts]
    bodies = []
    for cut in cuts:
        rest = None if table is None else table.take(pa.array(order.rows_of(cut.start, cut.stop)))
        rows = int(order.bounds[cut.stop] - order.bounds[cut.start])
        texts_nbytes = [int(text.bounds[cut.stop] - text.bounds[cut.start]) for text in strings]
        bodies.append(_Body.make(schema, rows, texts_nbytes, rest, allocate))
    scatter = None if order.kernels is None else _Scatter(order, order.kernels, cuts, bodies)
    place = _Placement(schema, order, cuts, bodies)
    offset = 0
    for number, column in enumerate(columns):
        if scatter is not None and column.dtype.itemsize in SCATTERED:
            scatter.part(column, offset)
        else:
            place.part(number, column)
        offset += column.dtype.itemsize
    for number, text in enumerate(strings):
        (place if scatter is None else scatter).strings(number, text)
    return [body.memory for body in bodies]


class _Body(NamedTuple):
    """A body whose parts and strings are yet to be filled: where its strings begin, and the last ones end."""

    memory: memoryview
    rows: int
    text_starts: list[int]

    @classmethod
    def make(
        cls, schema: Schema, rows: int, texts_nbytes: Sequence[int], rest: pa.Table | None, allocate: Allocate
    ) -> _Body:
        """Make it, with ``rest`` in it."""
        starts = schema.text_starts(rows, texts_nbytes)
        end = schema.stream_start(starts[-1])
        memory = allocate(end + (0 if rest is None else stream_nbytes(rest)))
        if rest is not None:
            write_stream(rest, memory[end:])
        return cls(memory, rows, starts)


class _Strings(NamedTuple):
    """A column of strings, and how many bytes of them come before each position, and in all.

    Parameters
    ----------
    bounds
        Those bytes.
    offsets, data
        The strings: in their order for the kernels, else ordered by position.
    """

    bounds: npt.NDArray[np.int64]
    offsets: npt.NDArray[Any]
    data: npt.NDArray[np.uint8]


def _strings(text: Text | None, order: RowOrder) -> _Strings:
    import pyarrow as pa

    assert text is not None
    if order.kernels is None:
        taken = Text.of(text.array.take(pa.array(order.rows)))
        return _Strings(taken.offsets[order.bounds].astype(np.int64), taken.offsets, taken.data)
    offsets = text.offsets.astype(np.int64, copy=False).view(np.uint64)
    bounds = np.zeros(order.count + 1, np.int64)
    np.cumsum(order.kernels.measure(offsets, order.positions, order.count), out=bounds[1:])
    return _Strings(bounds, offsets, text.data)


class _Placement:
    """Fills bodies without kernels."""

    def __init__(self, schema: Schema, order: RowOrder, cuts: Sequence[Cut], bodies: Sequence[_Body]) -> None:
        self._order = order
        self._cuts = cuts
        self._schema = schema
        self._bodies = bodies
        self._scratch: dict[np.dtype[Any], npt.NDArray[Any]] = {}

    @cached_property
    def _views(self) -> list[list[npt.NDArray[Any]]]:
        # Not made where the kernels do all of it.
        return [self._schema.view_parts(body.memory, body.rows) for body in self._bodies]

    def part(self, number: int, column: npt.NDArray[Any]) -> None:
        """Fill a part."""
        # NumPy can scatter into one array only.
        ordered = self._scratch.get(column.dtype)
        if ordered is None:
            ordered = self._scratch[column.dtype] = np.empty(len(column), column.dtype)
        bounds = self._order.bounds
        ordered[self._order.places] = column
        for cut, views in zip(self._cuts, self._views, strict=True):
            views[number][...] = ordered[bounds[cut.start] : bounds[cut.stop]]

    def strings(self, number: int, text: _Strings) -> None:
        """Fill in the strings of a column."""
        for cut, body in zip(self._cuts, self._bodies, strict=True):
            start, stop = body.text_starts[number : number + 2]
            body.memory[start:stop] = text.data[text.bounds[cut.start] : text.bounds[cut.stop]].data


class _Scatter:
    """Scatters columns into all bodies at once."""

    def __init__(self, order: RowOrder, kernels: Kernels, cuts: Sequence[Cut], bodies: Sequence[_Body]) -> None:
        self._order = order
        self._kernels = kernels
        self._bodies = bodies
        self._addresses = np.array([_address_of(body.memory) for body in bodies], np.int64)
        self._origin = int(self._addresses.min())
        self._nbytes = -self._origin + max(
            address + body.memory.nbytes for address, body in zip(self._addresses.tolist(), bodies, strict=True)
        )
        # Of each position: which body it goes to, the rows of that body, and those before it there. A position that
        # has no rows is in none, and nothing is written to where it points.
        self._body = np.zeros(order.count, np.intp)
        for number, cut in enumerate(cuts):
            self._body[cut.start : cut.stop] = number
        self._first = np.array([cut.start for cut in cuts], np.intp)[self._body]
        self._rows = np.array([body.rows for body in bodies], np.int64)[self._body]
        self._before = order.bounds[:-1] - order.bounds[self._first]

    def part(self, column: npt.NDArray[Any], offset: int) -> None:
        """Fill a part that is ``offset`` bytes into each row."""
        word = SCATTERED[column.dtype.itemsize]
        starts = (self._addresses - self._origin)[self._body] + self._rows * offset + self._before * word.itemsize
        bases, left = np.divmod(starts, word.itemsize)
        assert not left.any(), "bodies begin at multiples of a word"
        # One array over all bodies, and over what lies between them: only by ``bases`` is it known what is ours.
        out = np.asarray(Memory(self._origin, word, self._nbytes // word.itemsize))
        order = self._order
        source = np.ascontiguousarray(column).view(word)
        self._kernels.scatter(source, order.positions, order.count, order.ranks, bases, out)

    def strings(self, number: int, text: _Strings) -> None:
        """Fill in the strings of a column."""
        order = self._order
        starts = self._addresses - self._origin + [body.text_starts[number] for body in self._bodies]
        begins = starts[self._body] + text.bounds[:-1] - text.bounds[self._first]
        ends = begins + np.diff(text.bounds)
        self._kernels.copy(
            text.offsets,
            *Memory.views(text.data.ctypes.data, text.data.nbytes),
            order.positions,
            order.count,
            begins.astype(np.uint64),
            ends.astype(np.uint64),
            *Memory.views(self._origin, self._nbytes),
        )


def _address_of(memory: memoryview) -> int:
    return np.frombuffer(memory, np.uint8).ctypes.data
