"""The description of a table that libcudf has packed, checked before libcudf reads it: pure, over bytes.

Covers: the layout of the description, and whether all that it says lies within the table's memory (:func:`check`).
Does not cover: what the memory holds, which is on the device: the offsets of strings, and the values.
See also: :mod:`dask_gpurt.shuffle.tables`.

Theory of operation
    libcudf makes a table of a description by adding offsets to the address of the memory, and checks neither that the
    description is as long as it says nor that the offsets stay within the memory. A wrong one makes the process read
    anywhere: on the host, where it dies, or on the device, where a kernel fails and leaves the device unusable. So what
    comes from a peer is checked here: each entry is there, no entry is left over, columns and rows are as many as were
    agreed on, all are of types that are packed at all, and their memory lies within the body, at whole multiples of the
    size of an element.

    *Layout.* A head, and an entry of 40 bytes a column, its children behind it. The head is an entry of an empty type, whose
    size is the number of columns, or, in newer versions, 16 bytes: version, columns, rows, nothing. The length tells which it
    is. A sender checks its own descriptions too: if there is another layout one day, it is found out where the shuffle can
    still be left to Dask.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from dask_gpurt.shuffle.wire import WireError

__all__ = ["ENTRY", "HEAD", "check"]

#: Type and scale, rows, nulls, offsets of data and of the null mask (-1: none), children, nothing.
ENTRY = struct.Struct("<iiiiqqii")
#: Version, columns, rows, nothing.
HEAD = struct.Struct("<iiii")

#: libcudf's numbers of types of fixed width, and the width: numbers, booleans, times and durations.
WIDTHS = dict(enumerate((1, 2, 4, 8, 1, 2, 4, 8, 4, 8, 1, 4, 8, 8, 8, 8, 4, 8, 8, 8, 8), start=1))
INT32, INT64, STRING = 3, 4, 23

#: Rows that a column of libcudf can have.
ROWS_MAX = 2**31 - 1
#: Bits of a null mask come in words of so many bytes.
MASK_NBYTES = 4


def check(description: bytes, *, columns: int, rows: int, nbytes: int) -> None:
    """Check the description of a table with so many columns and rows that lies in ``nbytes`` of memory.

    Raises
    ------
    WireError
        If it is none.
    """
    if not 0 < rows <= ROWS_MAX:
        raise WireError(f"a packed table of {rows} rows")
    if len(description) % ENTRY.size == HEAD.size:
        # What the version is libcudf checks.
        _, found, found_rows, _ = HEAD.unpack_from(description)
        place = HEAD.size
        if found_rows != rows:
            raise WireError(f"a packed table of {rows} rows was expected, got {found_rows}")
    elif description and len(description) % ENTRY.size == 0:
        _, _, found, *_ = ENTRY.unpack_from(description)
        place = ENTRY.size
    else:
        raise WireError(f"{len(description)} bytes do not describe a packed table")
    if found != columns:
        raise WireError(f"a packed table of {columns} columns was expected, got {found}")
    entries = ENTRY.iter_unpack(memoryview(description)[place:])
    for column in range(columns):
        try:
            _check_column(column, entries, rows, nbytes)
        except StopIteration:
            raise WireError(f"the description of a packed table ends in column {column} of {columns}") from None
    if next(entries, None) is not None:
        raise WireError(f"the description of a packed table goes on behind its {columns} columns")


def _check_column(column: int, entries: Iterator[tuple[int, ...]], rows: int, nbytes: int) -> None:
    kind, _, size, nulls, data, mask, children, _ = next(entries)
    if size != rows:
        raise WireError(f"column {column} of a packed table has {size} rows instead of {rows}")
    _check_mask(column, nulls, mask, rows, nbytes)
    if kind in WIDTHS and not children:
        _check_extent(column, data, rows, WIDTHS[kind], nbytes)
    elif kind == STRING and children == 1:
        # Characters may be none; how many there are only the device knows.
        if not -1 <= data <= nbytes:
            raise WireError(f"column {column} of a packed table begins at byte {data} of {nbytes}")
        kind, _, size, nulls, data, mask, children, _ = next(entries)
        if kind not in (INT32, INT64) or size != rows + 1 or nulls > 0 or mask != -1 or children:
            raise WireError(f"column {column} of a packed table has no offsets of {rows} strings")
        _check_extent(column, data, size, WIDTHS[kind], nbytes)
    else:
        raise WireError(f"column {column} of a packed table is of type {kind} with {children} children")


def _check_mask(column: int, nulls: int, mask: int, rows: int, nbytes: int) -> None:
    if mask == -1:
        if nulls > 0:
            raise WireError(f"column {column} of a packed table has {nulls} nulls and does not say where")
        return
    if not -1 <= nulls <= rows:
        raise WireError(f"column {column} of a packed table has {nulls} nulls in {rows} rows")
    _check_extent(column, mask, -(-rows // (8 * MASK_NBYTES)), MASK_NBYTES, nbytes)


def _check_extent(column: int, offset: int, count: int, width: int, nbytes: int) -> None:
    if offset < 0 or offset % width or offset + count * width > nbytes:
        raise WireError(
            f"column {column} of a packed table has {count} elements of {width} bytes at byte {offset} of {nbytes}"
        )
