"""The compiled kernels against plain Python, at the edges of what they may touch."""

from __future__ import annotations

import ctypes
import functools
import mmap

import numpy as np
import numpy.typing as npt
import pytest

from dask_gpurt.shuffle.kernels import Memory, compile_kernels

kernels = functools.cache(compile_kernels)
#: Of mmap.h; Python has no name for it.
PROT_NONE = 0
#: What lies around the output, and has to be there afterwards.
GUARD = 0xA5


def at_the_end_of_memory(content: bytes) -> npt.NDArray[np.uint8]:
    """Put it where the process ends if a byte is read that lies behind it."""
    size = -(-len(content) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.ctypes.data + size), mmap.PAGESIZE, PROT_NONE) == 0
    data: npt.NDArray[np.uint8] = memory[size - len(content) : size]
    data[:] = np.frombuffer(content, np.uint8) if content else []
    return data


@pytest.mark.parametrize("longest", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("positions", [1, 3, 40])
def test_strings_are_copied_and_nothing_beside_them(longest: int, positions: int) -> None:
    rng = np.random.default_rng(longest)
    strings = [rng.integers(0, 256, rng.integers(0, longest + 1), dtype=np.uint8).tobytes() for _ in range(300)]
    # The last position is none.
    where = rng.integers(0, positions + 1, len(strings)).astype(np.uint16)
    offsets = np.cumsum([0, *map(len, strings)]).astype(np.uint64)
    data = at_the_end_of_memory(b"".join(strings))
    expected = [
        b"".join(string for string, to in zip(strings, where, strict=True) if to == n) for n in range(positions)
    ]

    sizes = kernels().measure(offsets, where, positions)
    assert sizes.tolist() == [len(text) for text in expected]

    # Positions lie apart, and not in order.
    order = rng.permutation(positions)
    starts = np.empty(positions, np.uint64)
    begin = 7
    for n in order.tolist():
        starts[n] = begin
        begin += len(expected[n]) + int(rng.integers(0, 3))
    out = np.full(begin + 5, GUARD, np.uint8)
    wanted = out.copy()
    for n, text in enumerate(expected):
        wanted[int(starts[n]) : int(starts[n]) + len(text)] = np.frombuffer(text, np.uint8) if text else []
    ends = starts + sizes.astype(np.uint64)
    kernels().copy(
        offsets,
        *Memory.views(data.ctypes.data, int(offsets[-1])),
        where,
        positions,
        starts,
        ends,
        *Memory.views(out.ctypes.data, len(out)),
    )
    assert out.tobytes() == wanted.tobytes()
    assert starts.tolist() == ends.tolist()


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "c16"])
def test_values_are_scattered_whatever_they_mean(dtype: str) -> None:
    rng = np.random.default_rng(0)
    source = np.frombuffer(rng.bytes(100 * np.dtype(dtype).itemsize), dtype)
    where = rng.integers(0, 4, 100).astype(np.uint16)
    ranks = np.empty(100, np.uint32)
    sizes = kernels().rank(where, 3, ranks)
    out = np.zeros(int(sizes.sum()), dtype)
    kernels().scatter(source, where, 3, ranks, np.cumsum(sizes) - sizes, out)
    # Byte for byte: a number need not equal itself.
    assert out.tobytes() == b"".join(source[where == n].tobytes() for n in range(3))
