"""Descriptions of packed tables: true ones are taken, and of the others none that points anywhere else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.shuffle.packed import ENTRY, HEAD, INT32, INT64, STRING, WIDTHS, check
from dask_gpurt.shuffle.wire import WireError

ALIGNMENT = 64


@dataclass(frozen=True)
class Entry:
    """What libcudf says of a column."""

    kind: int
    size: int
    nulls: int
    data: int
    mask: int
    children: int

    def pack(self) -> bytes:
        return ENTRY.pack(self.kind, 0, self.size, self.nulls, self.data, self.mask, self.children, 0)


@dataclass(frozen=True)
class Table:
    """A packed table, as libcudf lays it out."""

    columns: int
    rows: int
    nbytes: int
    entries: tuple[Entry, ...]
    newer: bool

    def pack(self) -> bytes:
        head = HEAD.pack(1, self.columns, self.rows, 0) if self.newer else Entry(0, self.columns, 0, -1, -1, 0).pack()
        return head + b"".join(entry.pack() for entry in self.entries)

    def check(self, description: bytes | None = None) -> None:
        check(
            self.pack() if description is None else description,
            columns=self.columns,
            rows=self.rows,
            nbytes=self.nbytes,
        )


@st.composite
def tables(draw: st.DrawFn) -> Table:
    rows = draw(st.integers(1, 10_000))
    end = 0
    entries = []

    def place(nbytes: int) -> int:
        nonlocal end
        begin = end
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return begin

    kinds = draw(st.lists(st.sampled_from([*WIDTHS, STRING]), min_size=1, max_size=6))
    for kind in kinds:
        nulls = draw(st.integers(0, rows))
        mask = place(-(-rows // 8)) if nulls else -1
        if kind == STRING:
            characters = draw(st.integers(0, 1000))
            offsets = draw(st.sampled_from([INT32, INT64]))
            data = place(characters) if characters else -1
            entries.append(Entry(STRING, rows, nulls, data, mask, 1))
            entries.append(Entry(offsets, rows + 1, 0, place((rows + 1) * WIDTHS[offsets]), -1, 0))
        else:
            entries.append(Entry(kind, rows, nulls, place(rows * WIDTHS[kind]), mask, 0))
    return Table(len(kinds), rows, end, tuple(entries), draw(st.booleans()))


@given(tables())
def test_what_libcudf_packs_is_taken(table: Table) -> None:
    table.check()


numbers = st.sampled_from([-(2**31), -2, -1, 0, 1, 2, 3, 24, 25, 10**6, 2**31 - 1])
offsets = st.sampled_from([-(2**63), -2, -1, 1, 2**40, 2**63 - 1])


def lies_within(table: Table) -> bool:
    """Whether all that the entries of a table point to is there; a check that is written another way."""
    left = list(table.entries)
    used: list[tuple[int, int]] = []
    for _ in range(table.columns):
        if not left or (entry := left.pop(0)).size != table.rows:
            return False
        if entry.mask != -1:
            used.append((entry.mask, (table.rows + 31) // 32 * 4))
        elif entry.nulls > 0:
            return False
        if entry.kind == STRING and entry.children == 1 and left:
            used.append((max(entry.data, 0), 0))
            entry = left.pop(0)
            if entry.size != table.rows + 1 or entry.kind not in (INT32, INT64) or entry.mask != -1:
                return False
        if entry.kind not in WIDTHS or entry.children:
            return False
        used.append((entry.data, entry.size * WIDTHS[entry.kind]))
    return not left and all(0 <= begin <= begin + nbytes <= table.nbytes for begin, nbytes in used)


@given(tables(), st.data())
def test_of_what_was_tampered_with_nothing_is_taken_that_points_out_of_the_memory(
    table: Table, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(table.entries) - 1))
    field = data.draw(st.sampled_from(["kind", "size", "nulls", "data", "mask", "children"]))
    value = data.draw(offsets if field in ("data", "mask") else numbers)
    entries = list(table.entries)
    entries[place] = replace(entries[place], **{field: value})
    tampered = replace(table, entries=tuple(entries))
    try:
        tampered.check()
    except WireError:
        return
    assert lies_within(tampered)


@given(tables(), st.integers(0, 2**16), st.data())
def test_less_memory_other_counts_and_other_lengths_are_refused(table: Table, more: int, data: st.DataObject) -> None:
    highest = max(entry.data + entry.size * WIDTHS[entry.kind] for entry in table.entries if entry.kind in WIDTHS)
    for wrong in (
        replace(table, nbytes=data.draw(st.integers(0, highest - 1))),
        replace(table, rows=table.rows + 1, newer=False),
        replace(table, columns=table.columns + 1),
        replace(table, entries=table.entries[:-1]),
        replace(table, entries=(*table.entries, table.entries[-1])),
    ):
        with pytest.raises(WireError):
            wrong.check()
    description = table.pack()
    with pytest.raises(WireError):
        table.check(description[: data.draw(st.integers(0, len(description) - 1))])
    with pytest.raises(WireError):
        table.check(description + bytes(more % 200 + 1))


@given(st.binary(max_size=400), st.integers(-5, 2**40), st.integers(0, 2**40), st.integers(0, 5))
def test_any_bytes_are_a_table_or_an_error_of_ours(description: bytes, rows: int, nbytes: int, columns: int) -> None:
    try:
        check(description, columns=columns, rows=rows, nbytes=nbytes)
    except WireError:
        return
    assert rows > 0
    assert len(description) >= columns * ENTRY.size


#: A column of bytes with nulls, and one of strings: 100 rows.
BYTES = Entry(1, 100, 3, 64, 0, 0)
STRINGS = Entry(STRING, 100, 0, 192, -1, 1)
OFFSETS = Entry(INT32, 101, 0, 256, -1, 0)
SIMPLE = Table(2, 100, 704, (BYTES, STRINGS, OFFSETS), newer=True)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((replace(BYTES, data=-1), STRINGS, OFFSETS), "100 elements of 1 bytes at byte -1"),
        ((replace(BYTES, data=605), STRINGS, OFFSETS), "100 elements of 1 bytes at byte 605"),
        ((replace(BYTES, mask=-2), STRINGS, OFFSETS), "4 elements of 4 bytes at byte -2"),
        ((replace(BYTES, mask=692), STRINGS, OFFSETS), "4 elements of 4 bytes at byte 692"),
        ((replace(BYTES, mask=-1), STRINGS, OFFSETS), "3 nulls and does not say where"),
        ((replace(BYTES, nulls=101), STRINGS, OFFSETS), "101 nulls in 100 rows"),
        ((replace(BYTES, size=99), STRINGS, OFFSETS), "99 rows instead of 100"),
        ((replace(BYTES, kind=24), STRINGS, OFFSETS), "of type 24"),
        ((replace(BYTES, children=1), STRINGS, OFFSETS), "of type 1 with 1 children"),
        ((BYTES, replace(STRINGS, data=-2), OFFSETS), "begins at byte -2"),
        ((BYTES, replace(STRINGS, data=705), OFFSETS), "begins at byte 705"),
        ((BYTES, replace(STRINGS, children=2), OFFSETS), "of type 23 with 2 children"),
        ((BYTES, STRINGS, replace(OFFSETS, size=100)), "no offsets of 100 strings"),
        ((BYTES, STRINGS, replace(OFFSETS, size=102)), "no offsets of 100 strings"),
        ((BYTES, STRINGS, replace(OFFSETS, kind=9)), "no offsets of 100 strings"),
        ((BYTES, STRINGS, replace(OFFSETS, mask=0)), "no offsets of 100 strings"),
        ((BYTES, STRINGS, replace(OFFSETS, nulls=1)), "no offsets of 100 strings"),
        ((BYTES, STRINGS, replace(OFFSETS, children=1)), "no offsets of 100 strings"),
        ((BYTES, STRINGS, replace(OFFSETS, data=304)), "101 elements of 4 bytes at byte 304"),
        ((BYTES, STRINGS, replace(OFFSETS, data=258)), "101 elements of 4 bytes at byte 258"),
        ((BYTES, STRINGS), "ends in column 1 of 2"),
        ((BYTES, STRINGS, OFFSETS, BYTES), "goes on behind its 2 columns"),
    ],
)
def test_each_wrong_number_is_named(entries: tuple[Entry, ...], message: str) -> None:
    SIMPLE.check()
    with pytest.raises(WireError, match=message):
        replace(SIMPLE, entries=entries).check()


@pytest.mark.parametrize("newer", [False, True])
def test_the_head_is_what_was_agreed_on(newer: bool) -> None:
    description = replace(SIMPLE, newer=newer).pack()
    check(description, columns=2, rows=100, nbytes=704)
    with pytest.raises(WireError, match="of 1 columns was expected, got 2"):
        check(description, columns=1, rows=100, nbytes=704)
    for rows in (0, -1, 2**31):
        with pytest.raises(WireError, match=f"a packed table of {rows} rows"):
            check(description, columns=2, rows=rows, nbytes=2**50)
    with pytest.raises(WireError, match="of 99 rows was expected, got 100" if newer else "100 rows instead of 99"):
        check(description, columns=2, rows=99, nbytes=704)
