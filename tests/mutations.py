"""Valid messages made wrong: what fuzzers of parsers draw from, and the bounds within which a parser has to stay."""

from __future__ import annotations

import contextlib
import resource
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

__all__ = ["NUMBERS", "bounded", "explore", "mutated"]

#: What lengths and counts are changed to.
NUMBERS = sorted({n for bits in (0, 7, 8, 15, 16, 31, 32, 47, 62, 63, 64) for n in (2**bits - 1, 2**bits, 2**bits + 1)})

#: No example may take longer; it is some milliseconds, and the machine may have other things to do.
EXAMPLE_S = 20.0
#: Nor may all of them together hold more than this beyond what was held before.
ROOM_NBYTES = 512 * 2**20


@st.composite
def mutated(draw: st.DrawFn, corpus: Sequence[bytes], *, most: int = 4) -> bytes:
    """Draw a message of ``corpus``, with up to ``most`` changes: bits, lengths, pieces cut, doubled, or of another one."""
    message = bytearray(draw(st.sampled_from(corpus)))
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, len(message)))
        match draw(st.sampled_from(["bit", "number", "cut", "end", "double", "insert", "splice"])):
            case "bit" if at < len(message):
                message[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                layout = struct.Struct(draw(st.sampled_from(["<B", "<H", "<I", "<Q", ">I"])))
                at -= at % layout.size
                if at + layout.size <= len(message):
                    number = draw(st.sampled_from([*NUMBERS, len(message), len(message) + 1]))
                    layout.pack_into(message, at, number % 2 ** (8 * layout.size))
            case "cut":
                del message[at : at + draw(st.integers(1, 64))]
            case "end":
                del message[at:]
            case "double":
                message[at:at] = message[at : at + draw(st.integers(1, 64))]
            case "insert":
                message[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "splice":
                message[at:] = draw(st.sampled_from(corpus))[at:]
    return bytes(message)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Let the process have little more memory than it has: what wants more gets a MemoryError, which is nobody's answer."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_NBYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def explore(
    strategy: st.SearchStrategy[Any], check: Callable[[Any], None], *, seconds: float, examples: int, last: Path
) -> None:
    """Try ``check`` on examples of ``strategy``: so many, and more of them for so many seconds.

    Before each of those more, it is written to the file ``last``, for what would end the process.
    """
    until_s = 0.0

    @settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(strategy)
    def examine(example: Any) -> None:
        if until_s:
            last.write_text(repr(example))
        began_s = time.perf_counter()
        check(example)
        assert time.perf_counter() - began_s < EXAMPLE_S

    with bounded():
        examine()
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            examine()
