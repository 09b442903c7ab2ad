"""Columns of pandas, taken apart into what lies in a body, and put together from it.

Covers: NumPy's columns, and those that pandas keeps in, or passes as, Arrow arrays of fixed width or of strings; known
categoricals.
Does not cover: the layout of a body, see :mod:`dask_gpurt.shuffle.schema`; columns of other types, which go by Arrow's
own format, see :mod:`dask_gpurt.shuffle.arrow`.

Theory of operation
    Both ends of a shuffle know the empty frame that says what is expected (*meta*). A column whose type is the expected
    one is taken apart into NumPy arrays, and what is sent need not name its type; a column of another type goes by
    Arrow, if it is not NumPy's. pandas' own protocol (``__arrow_array__``, ``__from_arrow__``) stands between pandas'
    arrays and Arrow's, so that what comes out is what pandas makes of it, with its type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dask_gpurt.shuffle.plan import gather_ranges
from dask_gpurt.shuffle.schema import LENGTHS, WORDS, Column, Form, is_plain
from dask_gpurt.shuffle.wire import WireError

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa

__all__ = ["Allocate", "Arrangement", "Source", "Text", "check_form", "fresh", "put_together", "take_apart"]

#: Lends so many bytes of memory with any content, for as long as somebody refers to the view.
Allocate = Callable[[int], memoryview]
#: How many bytes of strings an Arrow array with narrow offsets can have.
NARROW_NBYTES_MAX = 2**31 - 1
#: Rows that are looked at together where something temporary has eight bytes for each.
_PIECE = 2**13


def fresh(nbytes: int) -> memoryview:
    """Lend fresh memory."""
    return np.empty(nbytes, np.uint8).data


class Text(NamedTuple):
    """Strings as Arrow has them: string ``r`` is ``data[offsets[r]:offsets[r + 1]]``."""

    offsets: npt.NDArray[Any]
    data: npt.NDArray[np.uint8]
    array: pa.Array

    @classmethod
    def of(cls, array: pa.Array) -> Text:
        """View an array."""
        _, offsets, data = array.buffers()
        dtype = np.dtype(np.int64 if _is_wide(array.type) else np.int32)
        return cls(
            np.frombuffer(offsets, dtype, len(array) + 1, array.offset * dtype.itemsize),
            np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8),
            array,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the strings."""
        return int(self.offsets[-1] - self.offsets[0])


class Source(NamedTuple):
    """A column that was taken apart, without a copy where that can be.

    Parameters
    ----------
    form
        How it will lie in a body.
    elements
        One a row: what the form has.
    valid
        Whether each is valid, if there are nulls.
    text
        The strings, if there are any.
    """

    form: Form
    elements: npt.NDArray[Any]
    valid: npt.NDArray[np.bool_] | None = None
    text: Text | None = None

    def column(self, place: int) -> Column:
        """Describe it, at ``place``."""
        return Column(place, self.form, self.elements.dtype, self.valid is not None)


def take_apart(column: pd.Series[Any] | pd.Index, expected: Any) -> Source | None:
    """Take a column or an index apart, or return None if it has to go by Arrow. ``expected`` is the dtype in meta."""
    import pandas as pd
    import pyarrow as pa

    if isinstance(column, pd.RangeIndex):
        # Its own values, once made, would stay.
        return Source(Form.PLAIN, np.arange(column.start, column.stop, column.step, dtype=column.dtype))
    if is_plain(column.dtype):
        return Source(Form.PLAIN, column.to_numpy())
    if column.dtype != expected:
        return None
    if isinstance(column.dtype, pd.CategoricalDtype):
        # Without an order dtypes are equal whose categories stand in different places.
        known = column.dtype.categories is not None and column.dtype.categories.equals(expected.categories)
        return Source(Form.CODES, np.asarray(pd.Categorical(column).codes)) if known else None
    layout = _layout(_arrow_type(expected))
    if layout is None:
        return None
    array = pa.array(column.array)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if not isinstance(array, pa.Array) or _layout(array.type) != layout:
        # More strings than one array can have stay in several.
        return None
    form, dtype = layout
    bitmap, values, *_ = array.buffers()
    valid = _bits(bitmap, array.offset, len(array)) if array.null_count else None
    if form is Form.TEXT:
        return _take_text_apart(array, valid)
    if dtype == np.bool_:
        return Source(form, _bits(values, array.offset, len(array)), valid)
    return Source(form, np.frombuffer(values, dtype, len(array), array.offset * dtype.itemsize), valid)


def _take_text_apart(array: pa.Array, valid: npt.NDArray[np.bool_] | None) -> Source | None:
    text = Text.of(array)
    lengths = _lengths(text.offsets)
    if lengths is not None and valid is not None and lengths[~valid].any():
        # What lies behind a null is nobody's business, and is left out when rows are taken.
        text = Text.of(array.fill_null(""))
        lengths = _lengths(text.offsets)
    return None if lengths is None else Source(Form.TEXT, lengths, valid, text)


def _lengths(offsets: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """Subtract each offset from the next: the narrowest integers that do, or None if there are none.

    Piece by piece, so that what is in between stays in the cache: fresh memory costs more than all the rest of it.
    """
    count = len(offsets) - 1
    lengths = np.empty(count, LENGTHS[0])
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        piece = offsets[start + 1 : stop + 1] - offsets[start:stop]
        longest = int(piece.max())
        if longest > np.iinfo(lengths.dtype).max:
            wider = next((dtype for dtype in LENGTHS if longest <= np.iinfo(dtype).max), None)
            if wider is None:
                return None
            lengths = lengths.astype(wider)
        lengths[start:stop] = piece
    return lengths


def check_form(form: Form, dtype: np.dtype[Any], expected: Any) -> None:
    """Check that a column of the dtype ``expected`` can be put together from such values.

    Raises
    ------
    WireError
        If it cannot.
    """
    import pandas as pd

    if form is Form.PLAIN:
        return
    if form is Form.CODES:
        fits = isinstance(expected, pd.CategoricalDtype) and expected.categories is not None
    else:
        layout = _layout(_arrow_type(expected))
        fits = layout is not None and layout[0] is form and (form is Form.TEXT or layout[1] == dtype)
    if not fits:
        raise WireError(f"a column of {expected} was expected, and not one of {form.name} {dtype}")


def put_together(
    form: Form,
    expected: Any,
    elements: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None,
    *,
    text: Sequence[tuple[int, npt.NDArray[np.uint8]]] = (),
    allocate: Allocate = fresh,
) -> pd.api.extensions.ExtensionArray:
    """Make a column of dtype ``expected``.

    Parameters
    ----------
    form, elements, valid
        As in :class:`Source`. ``elements`` become part of the column, except for those of TEXT.
    text
        Number of rows and bytes of the strings of each segment, in order.
    allocate
        Where the memory of strings comes from.

    Raises
    ------
    WireError
        If there are codes that no category has, or too many bytes.
    """
    import pandas as pd
    import pyarrow as pa

    if form is Form.CODES:
        try:
            return pd.Categorical.from_codes(elements, dtype=expected)
        except ValueError as error:
            raise WireError(f"these are no codes of {len(expected.categories)} categories") from error
    kind = _arrow_type(expected)
    array: pa.Array | pa.ChunkedArray
    if form is Form.TEXT:
        chunks = list(_strings(kind, elements, valid, text, allocate))
        array = chunks[0] if len(chunks) == 1 else pa.chunked_array(chunks, kind)
    else:
        data = _packed(elements) if elements.dtype == np.bool_ else pa.py_buffer(elements.data)
        array = pa.Array.from_buffers(kind, len(elements), [_bitmap(valid), data])
    made: pd.api.extensions.ExtensionArray = expected.__from_arrow__(array)
    return made


def _strings(
    kind: pa.DataType,
    lengths: npt.NDArray[Any],
    valid: npt.NDArray[np.bool_] | None,
    segments: Sequence[tuple[int, npt.NDArray[np.uint8]]],
    allocate: Allocate,
) -> Iterator[pa.Array]:
    """Make as few arrays as can be, in the order of the segments."""
    import pyarrow as pa

    offset_dtype = np.dtype(np.int64 if _is_wide(kind) else np.int32)
    first = 0
    for group in _groups(segments, None if _is_wide(kind) else NARROW_NBYTES_MAX):
        rows = sum(count for count, _ in group)
        nbytes = sum(part.nbytes for _, part in group)
        own = slice(first, first + rows)
        offsets = np.frombuffer(allocate((rows + 1) * offset_dtype.itemsize), offset_dtype)
        _sum_up(lengths[own], offsets)
        data = allocate(nbytes)
        if nbytes:
            np.concatenate([part for _, part in group], out=np.frombuffer(data, np.uint8))
        bitmap = None if valid is None else _bitmap(valid[own])
        yield pa.Array.from_buffers(kind, rows, [bitmap, pa.py_buffer(offsets.data), pa.py_buffer(data)])
        first += rows


def _sum_up(lengths: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> None:
    """Make offsets of lengths. Piece by piece: NumPy would make a copy of all lengths that is as wide as the offsets."""
    offsets[0] = 0
    for start in range(0, len(lengths), _PIECE):
        out = offsets[start + 1 : start + 1 + _PIECE]
        np.cumsum(lengths[start : start + _PIECE], out=out, dtype=out.dtype)
        out += offsets[start]


def _groups(
    segments: Sequence[tuple[int, npt.NDArray[np.uint8]]], limit_nbytes: int | None
) -> list[list[tuple[int, npt.NDArray[np.uint8]]]]:
    """Cut a sequence of segments into as few as can be with so many bytes each at most."""
    if limit_nbytes is None:
        return [list(segments)]
    groups: list[list[tuple[int, npt.NDArray[np.uint8]]]] = [[]]
    taken = 0
    for segment in segments:
        nbytes = segment[1].nbytes
        if nbytes > limit_nbytes:
            raise WireError(f"{nbytes} bytes of strings are too many for one array")
        if taken + nbytes > limit_nbytes:
            groups.append([])
            taken = 0
        groups[-1].append(segment)
        taken += nbytes
    return groups


def _arrow_type(dtype: Any) -> pa.DataType | None:
    """Type of the Arrow arrays of which pandas makes such columns."""
    import pandas as pd
    import pyarrow as pa

    if isinstance(dtype, pd.ArrowDtype):
        return dtype.pyarrow_dtype
    if isinstance(dtype, pd.StringDtype):
        return pa.large_string() if dtype.storage == "pyarrow" else None
    if isinstance(dtype, pd.DatetimeTZDtype):
        # The values are those of UTC; the zone is the dtype's.
        return pa.timestamp(dtype.unit)
    if isinstance(dtype, pd.BooleanDtype):
        return pa.bool_()
    # pandas has no public name for all of its nullable numbers.
    numbers = pd.api.types.is_extension_array_dtype(dtype) and isinstance(
        pd.array([], dtype=dtype), (pd.arrays.IntegerArray, pd.arrays.FloatingArray)
    )
    return pa.from_numpy_dtype(dtype.numpy_dtype) if numbers else None


def _layout(kind: pa.DataType | None) -> tuple[Form, np.dtype[Any]] | None:
    """Form and values of Arrow arrays of a type, if they are taken apart."""
    import pyarrow as pa

    if kind is None:
        return None
    if pa.types.is_boolean(kind):
        return Form.FIXED, np.dtype(np.bool_)
    if _is_wide(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind):
        return Form.TEXT, LENGTHS[-1]
    if pa.types.is_primitive(kind) or pa.types.is_decimal(kind):
        word = WORDS.get(kind.bit_width // 8)
        return None if word is None else (Form.FIXED, word)
    return None


def _is_wide(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_large_string(kind) or pa.types.is_large_binary(kind))


def _bits(buffer: pa.Buffer, offset: int, size: int) -> npt.NDArray[np.bool_]:
    """Make a byte of each bit of a bitmap."""
    first, skipped = divmod(offset, 8)
    packed = np.frombuffer(buffer, np.uint8, -(-(skipped + size) // 8), first)
    return np.unpackbits(packed, count=skipped + size, bitorder="little")[skipped:].view(np.bool_)


def _packed(flags: npt.NDArray[np.bool_]) -> pa.Buffer:
    import pyarrow as pa

    # As bytes: what came over the wire may have other values than 0 and 1.
    return pa.py_buffer(np.packbits(flags.view(np.uint8), bitorder="little").data)


def _bitmap(valid: npt.NDArray[np.bool_] | None) -> pa.Buffer | None:
    return None if valid is None else _packed(valid)


@dataclass(frozen=True)
class Arrangement:
    """How consecutive segments of rows are put into order.

    Parameters
    ----------
    sizes
        Rows of each segment.
    order
        Number of the segment that comes first, and so on.
    """

    sizes: npt.NDArray[np.int64]
    order: npt.NDArray[np.intp]

    @cached_property
    def in_order(self) -> bool:
        """Whether they are in order as they are."""
        return bool((np.diff(self.order) > 0).all())

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each segment."""
        starts: npt.NDArray[np.int64] = np.cumsum(self.sizes) - self.sizes
        return starts

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row numbers in order."""
        return gather_ranges(self.starts[self.order], self.sizes[self.order])

    @property
    def row_count(self) -> int:
        """Rows of all segments."""
        return int(self.sizes.sum())

    def fill(self, out: npt.NDArray[Any], pieces: Sequence[npt.NDArray[Any]]) -> None:
        """Concatenate ``pieces``, which hold one value a row, and put the rows into order."""
        if self.in_order:
            np.concatenate(pieces, out=out)
        else:
            np.take(np.concatenate(pieces), self.rows, out=out, mode="clip")

    def texts(
        self, lengths: Sequence[npt.NDArray[Any]], texts: Sequence[npt.NDArray[np.uint8]], counts: Sequence[int]
    ) -> list[tuple[int, npt.NDArray[np.uint8]]]:
        """View the strings of each segment, in order, with its number of rows.

        Parameters
        ----------
        lengths, texts
            Of each piece: how long its strings are, and their bytes.
        counts
            Segments of each piece.
        """
        found: list[tuple[int, npt.NDArray[np.uint8]]] = []
        for piece, text, count in zip(lengths, texts, counts, strict=True):
            sizes = self.sizes[len(found) : len(found) + count]
            if count == 1:
                found.append((len(piece), text))
                continue
            running = np.concatenate([[0], np.cumsum(piece, dtype=np.int64)])
            edges = running[np.concatenate([[0], np.cumsum(sizes)])].tolist()
            found += [
                (size, text[start:stop])
                for size, start, stop in zip(sizes.tolist(), edges[:-1], edges[1:], strict=True)
            ]
        return found if self.in_order else [found[number] for number in self.order.tolist()]
