"""What lies where in a body of rows: the layout of columns, and its description on the wire.

Covers: :class:`Schema`, by which a body is laid out, described and read; all checks of what a peer has sent.
Does not cover: how columns of pandas become such parts, and are made of them; see :mod:`dask_gpurt.shuffle.columns`.
See also: :mod:`dask_gpurt.shuffle.wire`, the header that carries the description.

Theory of operation
    A column lies in a body in one of four *forms*:

    ======  ================================  ==========================
    form    values, one a row                 after the values of all
    ======  ================================  ==========================
    PLAIN   NumPy's                           nothing
    FIXED   Arrow's, of a type of one width   nothing
    CODES   places among known categories     nothing
    TEXT    how long each string is           the bytes of the strings
    ======  ================================  ==========================

    Columns of the forms FIXED and TEXT that have nulls have a byte a row, too, which says whether it is valid. All that
    is one a row is a *part*: the parts come first, the widest first, so that each begins at a multiple of its width.
    Then come the bytes of the strings, column by column, then the *rest* of the columns, of all other types, as an Arrow
    IPC stream.

    Strings go with their lengths rather than with offsets: lengths can be scattered and concatenated like any number,
    one byte is mostly enough for each, and whatever a peer puts there, they are right if their sum is.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.wire import WireError

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["INDEX", "LENGTHS", "WORDS", "Column", "Content", "Form", "Part", "Schema", "is_plain"]

#: Place of the index among the columns.
INDEX = -1
#: By width in bytes: what stands for Arrow's values of that width.
WORDS: dict[int, np.dtype[Any]] = {nbytes: np.dtype(f"u{nbytes}") for nbytes in (1, 2, 4, 8)} | {16: np.dtype("V16")}
#: Types of the lengths of strings.
LENGTHS = tuple(np.dtype(f"u{nbytes}") for nbytes in (1, 2, 4))
_CODES = tuple(np.dtype(f"i{nbytes}") for nbytes in (1, 2, 4, 8))
_VALID = np.dtype(np.bool_)
#: How NumPy names a type whose elements are of one width. What else it can parse is much, and not all of it harmless.
_TYPE = re.compile(r"[<>|=][biufcmMV]\d{1,2}(\[(s|ms|us|ns)\])?", re.ASCII)
#: Units of the dates and durations of pandas.
_TIMES = {("s", 1), ("ms", 1), ("us", 1), ("ns", 1)}
#: What pandas has columns of, and no index.
_NO_INDEX = np.dtype("f2")
#: Where the Arrow stream begins: a multiple of this, as Arrow likes its buffers.
_ALIGNMENT = 64
#: Rows of an Arrow stream that a byte of it stands for at most. A bit a row is the least that there is, but for columns
#: that have no value at all.
_STREAM_ROWS_MAX = 1024


class Form(enum.Enum):
    """How a column lies in a body; the letter begins its code in a token."""

    PLAIN = ""
    FIXED = "a"
    CODES = "c"
    TEXT = "t"

    def allows(self, dtype: np.dtype[Any]) -> bool:
        """Whether the values of such a column may be of this type."""
        if self is Form.PLAIN:
            return is_plain(dtype)
        if self is Form.FIXED:
            return dtype == _VALID or WORDS.get(dtype.itemsize) == dtype
        return dtype in (_CODES if self is Form.CODES else LENGTHS)


def is_plain(dtype: object) -> bool:
    """Whether values of this type are bytes without references, of which pandas makes columns.

    Examples
    --------
    >>> is_plain(np.dtype("M8[ms]")), is_plain(np.dtype("M8[25s]")), is_plain(np.dtype(object))
    (True, False, False)
    """
    if not isinstance(dtype, np.dtype) or dtype.kind not in "biufcmM":
        return False
    return dtype.kind not in "mM" or np.datetime_data(dtype) in _TIMES


class Column(NamedTuple):
    """A column that is not among the rest.

    Parameters
    ----------
    place
        In the output frame; ``INDEX``: the index.
    form
        How it lies.
    dtype
        Of the values.
    nulls
        Whether there is a byte a row that says what is valid.
    """

    place: int
    form: Form
    dtype: np.dtype[Any]
    nulls: bool = False

    @property
    def code(self) -> str:
        """Describe all but the place."""
        return self.form.value + self.dtype.str + "?" * self.nulls

    @classmethod
    def of(cls, place: int, code: str) -> Column:
        """Undo :attr:`code`.

        Raises
        ------
        ValueError, TypeError
            If it is none.
        """
        form = next((form for form in Form if form.value and code.startswith(form.value)), Form.PLAIN)
        name = code.removeprefix(form.value).removesuffix("?")
        if _TYPE.fullmatch(name) is None:
            raise ValueError(f"no type has such a name: {name[:40]}")
        column = cls(place, form, np.dtype(name), code.endswith("?"))
        known = form.allows(column.dtype) and not (place == INDEX and column.dtype.newbyteorder("=") == _NO_INDEX)
        if not known or (column.nulls and form not in {Form.FIXED, Form.TEXT}):
            raise ValueError(f"no column lies like that: {code}")
        return column


class Part(NamedTuple):
    """What lies in a body with one element a row: the values of a column, by its number, or which of them are valid."""

    column: int
    dtype: np.dtype[Any]
    validity: bool


@dataclass(frozen=True)
class Content:
    """Views of a body.

    Parameters
    ----------
    parts
        In the order of :attr:`Schema.parts`.
    texts
        The bytes of each column of strings.
    stream
        An Arrow IPC stream, if there is one.
    """

    parts: tuple[npt.NDArray[Any], ...]
    texts: tuple[npt.NDArray[np.uint8], ...]
    stream: memoryview | None


@dataclass(frozen=True)
class Schema:
    """What the columns of a body are.

    Parameters
    ----------
    columns
        Those that are not among the rest, by place, the index last.
    index_name
        Name of an index that is among them.
    rest
        Places of the columns in the Arrow stream, in their order. A stream without columns may hold an index.
    stream
        Whether there is a stream.
    """

    columns: tuple[Column, ...]
    index_name: str | None
    rest: tuple[int, ...]
    stream: bool

    @cached_property
    def token(self) -> bytes:
        """Encode it."""
        columns = [[column.place, column.code] for column in self.columns]
        return json.dumps([columns, self.index_name, list(self.rest), self.stream], separators=(",", ":")).encode()

    @staticmethod
    @lru_cache(maxsize=1000)
    def parse(token: bytes) -> Schema:
        """Decode a token.

        Raises
        ------
        WireError
            If it is none.
        """
        try:
            columns, index_name, rest, stream = json.loads(token)
            schema = Schema(
                tuple(Column.of(int(place), str(code)) for place, code in columns),
                None if index_name is None else str(index_name),
                tuple(int(place) for place in rest),
                bool(stream),
            )
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise WireError(f"this does not describe columns: {token[:100]!r}") from error
        places = [column.place for column in schema.columns]
        own = places[: len(places) - schema.has_index]
        every = sorted((*own, *schema.rest))
        if (
            every != list(range(len(every)))
            or own != sorted(own)
            or not (schema.stream or schema.has_index)
            or (schema.rest and not schema.stream)
        ):
            raise WireError(f"these are not the columns of a frame: {token[:100]!r}")
        return schema

    @cached_property
    def family(self) -> Schema:
        """The same for all schemas whose bodies hold columns of the same types, whatever their lengths and nulls."""
        columns = (
            Column(column.place, column.form, LENGTHS[-1] if column.form is Form.TEXT else column.dtype)
            for column in self.columns
        )
        return replace(self, columns=tuple(columns))

    @property
    def has_index(self) -> bool:
        """Whether the index is one of the columns."""
        return bool(self.columns) and self.columns[-1].place == INDEX

    @property
    def width(self) -> int:
        """Columns of the frame."""
        return len(self.columns) - self.has_index + len(self.rest)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What there is of each row, in the order in which it lies."""
        parts = [Part(number, column.dtype, validity=False) for number, column in enumerate(self.columns)]
        parts += [Part(number, _VALID, validity=True) for number, column in enumerate(self.columns) if column.nulls]
        return tuple(sorted(parts, key=lambda part: -part.dtype.itemsize))

    @cached_property
    def texts(self) -> tuple[int, ...]:
        """Number of each part that holds lengths, in the order in which the strings lie."""
        return tuple(
            number
            for number, part in enumerate(self.parts)
            if self.columns[part.column].form is Form.TEXT and not part.validity
        )

    @cached_property
    def part_of(self) -> dict[tuple[int, bool], int]:
        """Column, and whether it is about validity, to the number of the part."""
        return {(part.column, part.validity): number for number, part in enumerate(self.parts)}

    @cached_property
    def text_of(self) -> dict[int, int]:
        """Column of strings to its number among those of the body."""
        return {self.parts[part].column: number for number, part in enumerate(self.texts)}

    @cached_property
    def row_nbytes(self) -> int:
        """Bytes of the parts of a row."""
        return sum(part.dtype.itemsize for part in self.parts)

    def text_starts(self, rows: int, texts_nbytes: Sequence[int]) -> list[int]:
        """Where the bytes of each column of strings begin in a body, and where those of the last one end."""
        return list(accumulate(texts_nbytes, initial=rows * self.row_nbytes))

    def stream_start(self, end: int) -> int:
        """Where the stream begins if all else ends at ``end``, and the body ends if there is none."""
        return -(-end // _ALIGNMENT) * _ALIGNMENT if self.stream else end

    def check_size(self, nbytes: int, rows: int) -> None:
        """Check what can be checked before a body is there.

        Raises
        ------
        WireError
            If a body of ``nbytes`` cannot have so many rows.
        """
        end = self.stream_start(rows * self.row_nbytes)
        if nbytes < end or (nbytes != end and not self.stream and not self.texts):
            raise WireError(f"{rows} rows take {end} bytes and the body has {nbytes}")
        if not self.row_nbytes and rows > _STREAM_ROWS_MAX * nbytes:
            raise WireError(f"a stream of {nbytes} bytes has no {rows} rows")

    def view_parts(self, view: memoryview, rows: int) -> list[npt.NDArray[Any]]:
        """View the parts of a body that is large enough for them."""
        parts, offset = [], 0
        for part in self.parts:
            # Of no bytes nothing can be cast.
            parts.append(np.frombuffer(view, part.dtype, rows, offset) if rows else np.empty(0, part.dtype))
            offset += rows * part.dtype.itemsize
        return parts

    def read(self, body: Buffer, rows: int) -> Content:
        """View a body.

        Raises
        ------
        WireError
            If the body is too small, or has something behind its columns that is no stream.
        """
        view = memoryview(body)
        self.check_size(view.nbytes, rows)
        parts = self.view_parts(view, rows)
        # Lengths have at most four bytes, and there are no more of them than the body has bytes: no sum overflows.
        starts = self.text_starts(rows, [int(parts[number].sum(dtype=np.uint64)) for number in self.texts])
        end = self.stream_start(starts[-1])
        if view.nbytes < end or (view.nbytes != end and not self.stream):
            raise WireError(f"{rows} rows and their strings take {end} bytes and the body has {view.nbytes}")
        texts = tuple(
            np.frombuffer(view, np.uint8, stop - start, start) if stop > start else np.empty(0, np.uint8)
            for start, stop in pairwise(starts)
        )
        return Content(tuple(parts), texts, view[end:] if self.stream else None)
