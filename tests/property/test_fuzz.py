"""Every parser of what comes from outside, fed with what is nearly right: an error of ours, or what could have been sent.

Never another error, more memory than there is reason for, or no end. ``make fuzz`` takes more time for it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash
from hypothesis import strategies as st
from mutations import NUMBERS, bounded, explore, mutated

from dask_gpurt import codecs
from dask_gpurt.codecs import Packed
from dask_gpurt.errors import CorruptDataError, GpurtError
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.disk import SpillFolder
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.secret import Secret
from dask_gpurt.shuffle import bricks, frames, packed
from dask_gpurt.shuffle.arrow import decode_table, encode_table
from dask_gpurt.shuffle.plan import PartitionPlan
from dask_gpurt.shuffle.schema import Schema
from dask_gpurt.shuffle.shelf import Parcel
from dask_gpurt.shuffle.transport.address import Address, Manifest, TransportError
from dask_gpurt.shuffle.transport.handshake import Handshake, Met, Say, StrangerError
from dask_gpurt.shuffle.wire import Header, Kind, WireError, check_sizes, decode, encode, pack_list

PARTITION = "_partitions"
ROWS = 40
#: Bytes of a body that is not packed.
LARGE = frames.LARGE_NBYTES


def frame(rows: int = ROWS) -> dict[str, pd.DataFrame]:
    """Frames whose columns lie in each of the forms, and one in Arrow's."""
    rng = np.random.default_rng(1)
    words = rng.choice(["", "a", "longer", "ü"], rows)
    to = rng.integers(0, 3, rows)
    return {
        "plain": pd.DataFrame({"x": rng.random(rows), "n": rng.integers(0, 9, rows).astype("i2"), PARTITION: to}),
        "text": pd.DataFrame({"s": pd.Series(words, dtype="str"), PARTITION: to}),
        "nulls": pd.DataFrame(
            {
                "i": pd.array([None, 3, 4, 5] * (rows // 4), dtype="Int64"),
                "s": pd.array([None, "b"] * (rows // 2)),
                PARTITION: to,
            }
        ),
        "codes": pd.DataFrame({"c": pd.Categorical(words, categories=["", "a", "longer", "ü"]), PARTITION: to}),
        "objects": pd.DataFrame(
            {"o": [[1], None, [2, 3], []] * (rows // 4), "u": pd.Categorical(words), PARTITION: to},
        ),
        "levels": pd.DataFrame(
            {"x": rng.random(rows), PARTITION: to}, index=pd.MultiIndex.from_arrays([words, rng.integers(0, 5, rows)])
        ),
    }


@functools.cache
def messages(name: str, rows: int) -> tuple[pd.DataFrame, tuple[tuple[Header, bytes], ...]]:
    data = frame(rows)[name]
    meta = data.iloc[:0].drop(columns=[PARTITION])
    shards = frames.split(data, 5, PARTITION, PartitionPlan.build({0: "a", 1: "a", 2: "b"}), meta)
    return meta, tuple((header, bytes(body)) for _, header, body in shards)


@st.composite
def changed_headers(draw: st.DrawFn, header: Header, body: bytes, extras: st.SearchStrategy[bytes]) -> Header:
    """Change some of the fields of a header, which goes on to say how large its body is."""
    segments = header.segments.copy()
    if segments.size:
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, segments.size - 1))
            segments.flat[at] = draw(st.sampled_from(NUMBERS)) % 2**63
    if draw(st.integers(0, 9)) == 0:
        segments = segments[: draw(st.integers(0, len(segments)))]
    if draw(st.integers(0, 9)) == 0:
        segments = np.concatenate([segments, segments])
    extra = draw(extras) if draw(st.booleans()) else header.extra
    return Header(header.kind, header.input_id, segments, len(body), extra)


# Frames

FRAMES = sorted(frame())
CODES = [
    "<f8",
    "<i8",
    "<f2",
    "<M8[ns]",
    "<M8[25s]",
    "<u4",
    "|b1",
    "a<u8",
    "a<u8?",
    "a|V16",
    "ci1",
    "c<i4",
    "t|u1",
    "t|u1?",
    "t<u4",
    "O",
]
TOKENS = st.deferred(
    lambda: (
        mutated([messages(name, ROWS)[1][0][0].extra for name in FRAMES])
        # Right by themselves, and perhaps of another frame.
        | st.builds(
            lambda codes, index, name, rest: json.dumps(
                [
                    [*enumerate(codes), *[[-1, code] for code in index]],
                    name,
                    [len(codes) + n for n in range(rest)],
                    rest > 0 or not index,
                ]
            ).encode(),
            st.lists(st.sampled_from(CODES), max_size=3),
            st.lists(st.sampled_from(CODES), max_size=1),
            st.none() | st.just("name"),
            st.integers(0, 2),
        )
    )
)


@st.composite
def frame_messages(draw: st.DrawFn) -> tuple[pd.DataFrame, bytes, bytes]:
    name = draw(st.sampled_from(FRAMES))
    # Some bodies are large enough to go into the store as they are.
    meta, found = messages(name, draw(st.sampled_from([ROWS, ROWS, ROWS, 80_000])) if name == "plain" else ROWS)
    header, body = draw(st.sampled_from(found))
    if draw(st.booleans()):
        body = draw(mutated([body])) if len(body) < LARGE else body[: draw(st.sampled_from([0, -8, None]))]
    if draw(st.booleans()):
        return meta, encode(draw(changed_headers(header, body, TOKENS))), body
    return (
        meta,
        draw(mutated([encode(Header(header.kind, header.input_id, header.segments, len(body), header.extra))])),
        body,
    )


def check_frame(message: tuple[pd.DataFrame, bytes, bytes]) -> None:
    meta, head, body = message
    try:
        header = decode(head, body)
        frames.check_parcel(header, {0, 1, 2}.__contains__)
        parcel = Parcel(header, body, len(body))
        done = frames.ready(parcel)
        stored = dict([done]) if done is not None else frames.pack([parcel])
        outputs = {partition: frames.join(buffers, meta) for partition, buffers in stored.items()}
    except GpurtError:
        return
    assert outputs.keys() == set(header.segments[:, 0].tolist())
    assert sum(map(len, outputs.values())) == sum(header.segments[:, 1].tolist())
    for output in outputs.values():
        assert list(output.columns) == list(meta.columns)


def check_token(token: bytes) -> None:
    try:
        schema = Schema.parse(token)
    except WireError:
        return
    # What is accepted can be said.
    assert Schema.parse(schema.token) == schema


# Arrow


@functools.cache
def streams() -> tuple[bytes, ...]:
    tables = [
        pa.table({"0": [1, None, 3], "1": ["a", "bb", None]}),
        pa.table({"0": pa.array([[1], None, [2, 3]]), "1": pa.array(["x", "y", "x"]).dictionary_encode()}),
        pa.Table.from_pandas(frame()["objects"].iloc[:3], preserve_index=True),
        pa.table({"0": pa.nulls(3), "1": pa.array([{"a": 1}, None, {"a": 2}]), "2": pa.array([b"", b"b", b"\xff"])}),
    ]
    return tuple(bytes(encode_table(table)) for table in tables)


def check_stream(stream: bytes) -> None:
    try:
        table = decode_table(stream, 3)
    except WireError:
        return
    assert table.num_rows == 3
    assert len(table.to_pylist()) == 3
    assert table.nbytes <= len(stream)


# Arrays

WORKERS: dict[tuple[int, ...], str] = dict.fromkeys(itertools.product(range(2), range(2)), "a")
DTYPES: list[Any] = ["<f8", "|b1", "<M8[ms]", "|S3", "<U2", [("a", "<i4"), ("b", "<f8", (2,))]]


@functools.cache
def brick_messages(number: int) -> tuple[tuple[Header, bytes], ...]:
    chunk = np.zeros((6, 5), dtype=DTYPES[number])
    axes = [[[(0, 0, slice(0, 2)), (1, 0, slice(2, 6))]], [[(0, 0, slice(0, 3)), (1, 0, slice(3, 5))]]]
    return tuple((header, bytes(body)) for _, header, body in bricks.split(chunk, (0, 0), axes, WORKERS))


ELEMENTS = st.deferred(lambda: mutated([brick_messages(number)[0][0].extra for number in range(len(DTYPES))]))


@st.composite
def array_messages(draw: st.DrawFn) -> tuple[bytes, bytes]:
    header, body = draw(st.sampled_from(brick_messages(draw(st.integers(0, len(DTYPES) - 1)))))
    if draw(st.booleans()):
        body = draw(mutated([body]))
    if draw(st.booleans()):
        return encode(draw(changed_headers(header, body, ELEMENTS))), body
    return draw(mutated([encode(Header(header.kind, header.input_id, header.segments, len(body), header.extra))])), body


def check_array(message: tuple[bytes, bytes]) -> None:
    head, body = message
    try:
        header = decode(head, body)
        bricks.check_parcel(header, WORKERS.__contains__)
        outputs = [bricks.unpack(buffers) for buffers in bricks.pack([Parcel(header, body, len(body))]).values()]
    except GpurtError:
        return
    assert sum(output.nbytes for output in outputs) == len(body)


def check_dtype(token: bytes) -> None:
    try:
        dtype = bricks.dtype_of(token)
    except WireError:
        return
    assert dtype.itemsize > 0
    assert not dtype.hasobject


# Tables on a device


@functools.cache
def descriptions() -> tuple[bytes, ...]:
    fixed = packed.ENTRY.pack(4, 0, 10, 0, 0, -1, 0, 0)
    text = packed.ENTRY.pack(23, 0, 10, 2, 200, 128, 1, 0) + packed.ENTRY.pack(3, 0, 11, 0, 256, -1, 0, 0)
    old, new = packed.ENTRY.pack(0, 0, 2, 0, 0, 0, 0, 0), packed.HEAD.pack(1, 2, 10, 0)
    return old + fixed + text, new + fixed + text


def check_description(description: bytes) -> None:
    try:
        packed.check(description, columns=2, rows=10, nbytes=512)
    except WireError:
        return
    # Each extent lies within.
    place = packed.HEAD.size if len(description) % packed.ENTRY.size else packed.ENTRY.size
    for *_, data, mask, _, _ in packed.ENTRY.iter_unpack(description[place:]):
        assert -1 <= data <= 512
        assert -1 <= mask < 512


# Compressed buffers

TOLD = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([*NUMBERS, -1, -(2**63)])
    | st.sampled_from(["lz4", "zstd", "gzip", ""])
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=12,
)


def check_announcement(said: tuple[Any, Any]) -> None:
    sizes, libraries = said
    try:
        check_sizes(sizes, libraries, 3)
    except WireError:
        return
    assert len(sizes) == 3
    assert all(nbytes >= 0 for nbytes in sizes)
    assert sum(sizes) <= 2**42
    assert libraries is None or all(isinstance(name, str) for name in libraries)


def check_told(told: Any) -> None:
    try:
        found = pack_list(told, 3)
    except WireError:
        return
    assert len({each.number for each in found}) == len(found) <= 3
    assert sum(each.nbytes for each in found) <= 3 * codecs.RAW_NBYTES_MAX


@functools.cache
def compressed() -> tuple[tuple[str, bytes], ...]:
    data = np.random.default_rng(0).integers(0, 9, 50_000, dtype=np.uint8).tobytes()
    return tuple((name, bytes(codecs.compress([data], name).buffers[0])) for name in codecs.CODECS)


@st.composite
def compressed_buffers(draw: st.DrawFn) -> tuple[bytes, Packed]:
    name, data = draw(st.sampled_from(compressed()))
    data = draw(mutated([data]))
    # Small enough to be there, and not what it says.
    nbytes = draw(st.sampled_from([codecs.MIN_NBYTES, 50_000, 50_001, 2**20]))
    return data, Packed(0, name, nbytes, xxhash.xxh3_64_intdigest(data))


def check_compressed(message: tuple[bytes, Packed]) -> None:
    data, told = message
    lent: list[int] = []

    def lend(nbytes: int) -> memoryview:
        lent.append(nbytes)
        return memoryview(bytearray(nbytes))

    try:
        (found,) = codecs.decompress([data], [told], lend)
    except GpurtError:
        found = None
    assert lent == [told.nbytes], "no more memory than was told"
    assert found is None or memoryview(found).nbytes == told.nbytes


# The transport

SECRET = Secret(bytes(32))
A, B = Address(1, b"address of a"), Address(2, b"address of b")


@functools.cache
def greetings() -> tuple[Handshake, Handshake, tuple[bytes, ...]]:
    """A peer that has been greeted, and the messages of it, none of which it has heard."""
    a, b = Handshake(SECRET, A), Handshake(SECRET, B)
    hello = a.greet(B, 0.0)
    answer = b.hear(hello, 0.0)
    assert isinstance(answer, Say)
    met = a.hear(answer.message, 0.0)
    assert isinstance(met, Met)
    return a, b, (hello, answer.message, met.message)


def check_greeting(message: bytes) -> None:
    *peers, valid = greetings()
    if message in valid:
        return
    for peer in peers:
        before = repr(peer)
        with pytest.raises(StrangerError):
            peer.hear(message, 0.0)
        assert repr(peer) == before


def check_address(encoded: bytes) -> None:
    try:
        found = Address.decode(encoded, SECRET)
    except TransportError:
        return
    assert found in {A, B}


def check_manifest(encoded: bytes) -> None:
    if len(encoded) == len(Manifest.of([]).encode()):
        assert Manifest.decode(encoded).encode() == encoded


# Tiers below


@st.composite
def kept_files(draw: st.DrawFn) -> tuple[tuple[bytes, ...], list[tuple[int, int, int]]]:
    """Frames, and what somebody writes over parts of the file: how far into it, where from, and how much."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 100, 5000]), min_size=1, max_size=4))
    changes = st.tuples(st.integers(0, 20_000), st.integers(0, 255), st.integers(0, 300))
    return tuple(bytes([7 * i % 256]) * size for i, size in enumerate(sizes)), draw(st.lists(changes, max_size=3))


def written_over(content: bytes, changes: list[tuple[int, int, int]]) -> bytes:
    changed = bytearray(content)
    for at, byte, nbytes in changes:
        begin = min(at, len(changed))
        changed[begin : begin + nbytes] = bytes([byte]) * (nbytes if byte % 2 else nbytes // 2)
    return bytes(changed)


def check_file(folder: SpillFolder, example: tuple[tuple[bytes, ...], list[tuple[int, int, int]]]) -> None:
    kept, changes = example
    copy = folder.write(kept)
    path = Path(copy.path)
    path.write_bytes(written_over(path.read_bytes(), changes))
    try:
        assert [bytes(found) for found in copy.read()] == list(kept)
    except CorruptDataError:
        pass
    finally:
        copy.remove()


def check_object(folder: ObjectFolder, example: tuple[tuple[bytes, ...], list[tuple[int, int, int]]]) -> None:
    kept, changes = example
    copy = folder.write(kept)
    content = written_over(folder._fs.cat_file(copy.path), changes)
    same = content == b"".join(kept)
    folder._fs.pipe_file(copy.path, content)
    try:
        assert [bytes(found) for found in copy.read()] == list(kept)
        assert same
    except CorruptDataError:
        assert not same
    finally:
        copy.remove()


def check_header(message: tuple[bytes, bytes]) -> None:
    head, body = message
    try:
        header = decode(head, body)
    except WireError:
        return
    assert encode(header) == head
    assert header.body_nbytes == len(body)


HEADERS = [
    encode(Header(Kind.FRAME, (3,), np.array([[0, 5], [1, 6]]), 8, b"[]")),
    encode(Header(Kind.BRICK, (1, 2, 3), np.arange(18).reshape(2, 9), 8, b"'<f8'")),
    encode(Header(Kind.TABLE, (), np.zeros((0, 0), np.int64), 0)),
]

#: Name to what is drawn, and what has to hold.
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "header": (st.tuples(mutated(HEADERS) | st.binary(max_size=80), st.sampled_from([b"", bytes(8)])), check_header),
    "frame": (frame_messages(), check_frame),
    "schema": (
        TOKENS
        | st.binary(max_size=60)
        | st.recursive(st.none() | st.floats() | st.integers() | st.text(max_size=3), st.lists).map(
            lambda value: json.dumps(value).encode()
        ),
        check_token,
    ),
    "stream": (st.deferred(lambda: mutated(streams())), check_stream),
    "array": (array_messages(), check_array),
    "dtype": (
        ELEMENTS
        | st.binary(max_size=60)
        | st.text(st.sampled_from("()[],'-+<>fiUVSO0123456789 ab"), max_size=40).map(str.encode),
        check_dtype,
    ),
    "table": (st.deferred(lambda: mutated(descriptions())), check_description),
    "told": (
        TOLD
        | st.lists(
            st.tuples(
                st.integers(-1, 3), st.sampled_from(["lz4", "zstd", "x"]), st.sampled_from(NUMBERS), st.integers()
            ),
            max_size=4,
        ),
        check_told,
    ),
    "announcement": (
        st.tuples(TOLD | st.lists(st.sampled_from([*NUMBERS, -1]), min_size=3, max_size=3), TOLD),
        check_announcement,
    ),
    "compressed": (compressed_buffers(), check_compressed),
    "greeting": (st.deferred(lambda: mutated(greetings()[2])) | st.binary(max_size=80), check_greeting),
    "address": (mutated([A.encode(SECRET), B.encode(SECRET)]) | st.binary(max_size=80), check_address),
    "manifest": (st.binary(max_size=20), check_manifest),
}


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long each target is tried in addition."""
    return 60 * float(request.config.getoption("--fuzz-minutes")) / (len(TARGETS) + 2)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_answers_with_an_error_of_ours_or_what_could_have_been_sent(
    name: str, seconds: float, tmp_path: Path
) -> None:
    strategy, check = TARGETS[name]
    explore(strategy, check, seconds=seconds, examples=150, last=Path(os.environ.get("FUZZ_LAST", tmp_path / "last")))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["file", "object"])
def test_what_was_changed_below_is_never_returned(kind: str, seconds: float, tmp_path: Path) -> None:
    pool = BlockPool(0)
    if kind == "file":
        folder = SpillFolder(str(tmp_path / "spill"), pool)
        check = functools.partial(check_file, folder)
    else:
        store = ObjectFolder(f"memory://fuzz-{os.getpid()}", pool)
        store._fs.mkdirs(store._base, exist_ok=True)
        check = functools.partial(check_object, store)
    explore(
        kept_files(), check, seconds=seconds, examples=60, last=Path(os.environ.get("FUZZ_LAST", tmp_path / "last"))
    )
    (folder if kind == "file" else store).close()


def test_the_bound_of_memory_is_one() -> None:
    with bounded(), pytest.raises(MemoryError):
        np.ones(2**30, np.uint8)
    assert len(np.ones(2**30, np.uint8)) == 2**30
