"""Whether what goes to a tier below is compressed, and by what.

Theory of operation
-------------------
A tier is a link with a price, like any other (:mod:`dask_gpurt.topology`): a :class:`Meter` learns it from the transfers. What
:mod:`dask_gpurt.compression` decides by it for messages between workers, it decides here for copies: those of a *kind* (the type
of the value, and of its elements) are sampled now and then, and compressed where that saves two fifths of the time,
processor time counted. A disk of 500 MB/s and more is not thought of, and costs nothing for that: a core compresses no faster than
it writes. Object stores and slow disks are slower.

Covers: :class:`Meter`, :class:`Packer`.
Does not cover: the codecs (:mod:`dask_gpurt.codecs`).

Thread-safe. The methods of :class:`Packer` block, as codecs do; they give up the GIL.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dask_gpurt import codecs
from dask_gpurt.codecs import CodecError, Packed
from dask_gpurt.compression import LinkCompression
from dask_gpurt.errors import CorruptDataError
from dask_gpurt.memory.store import Buffer, flat
from dask_gpurt.topology import PRIOR, Gauge, Link, Rate

__all__ = ["Meter", "Packer", "kind_of"]


def kind_of(name: Hashable, value: object, *, raw: bool) -> str:
    """Say what data compress alike.

    Examples
    --------
    >>> import numpy as np
    >>> kind_of("x", np.zeros(3), raw=False), kind_of("x", {}, raw=False)
    ('numpy.ndarray of float64', 'builtins.dict')
    """
    # The buffers of a name that has no value of its own are told apart by who puts them.
    kind = type(name) if raw else type(value)
    dtype = getattr(value, "dtype", None)
    return f"{kind.__module__}.{kind.__qualname__}" + (f" of {dtype}" if dtype is not None else "")


class Meter:
    """What is known about the way to a tier, learned by several threads at a time.

    Parameters
    ----------
    prior
        What is assumed until transfers were seen.
    """

    def __init__(self, prior: Rate = PRIOR) -> None:
        self.link = Link(prior)
        self._gauge = Gauge()
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Meter {self.link!r}>"

    @contextmanager
    def transfer(self, nbytes: int) -> Iterator[None]:
        """Learn from what happens within, if it ends well."""
        with self._lock:
            begun = self._gauge.begin(time.perf_counter())
        yield
        with self._lock:
            self.link.observe(*self._gauge.end(begun, nbytes, time.perf_counter()))


class Packer:
    """Compresses what goes to one tier, where that pays.

    Parameters
    ----------
    meter
        Knows the tier.
    lease
        Lends the memory that is decompressed into.
    """

    def __init__(self, meter: Meter, lease: Callable[[int], memoryview]) -> None:
        self._meter = meter
        self._lease = lease
        self._decide = LinkCompression(meter.link)
        self._lock = threading.Lock()
        self._possible = codecs.available()
        #: Bytes before and after compression, of what was compressed.
        self.raw_nbytes = 0
        self.packed_nbytes = 0

    def __repr__(self) -> str:
        return f"<Packer {self._decide!r}, {self.raw_nbytes} -> {self.packed_nbytes} bytes>"

    def pack(self, kind: str, frames: Sequence[Any]) -> tuple[Sequence[Any], list[Packed]]:
        """Return the frames to be written, and what is to be told of those that were compressed."""
        if not self._possible or not self._decide.slow:
            return frames, []
        frames = [flat(frame) for frame in frames]
        nbytes = sum(frame.nbytes for frame in frames if codecs.compressible(frame))
        if not nbytes:
            return frames, []
        with self._lock:
            sample = self._decide.wants_sample(kind, nbytes)
        if sample:
            figures, elapsed_s = codecs.sample(frames)
            with self._lock:
                self._decide.sampled(kind, figures, elapsed_s)
        with self._lock:
            codec = self._decide.codec(kind)
        if codec is None:
            return frames, []
        packed = codecs.compress(frames, codec)
        left_nbytes = nbytes - packed.raw_nbytes + packed.wire_nbytes
        with self._lock:
            self._decide.compressed(kind, codec, left_nbytes / nbytes, nbytes / packed.elapsed_s)
            self.raw_nbytes += packed.raw_nbytes
            self.packed_nbytes += packed.wire_nbytes
        return packed.buffers, packed.packed

    def wrote(self, nbytes: int) -> None:
        """Note that a copy of ``nbytes`` was written: its time is what samples may take a share of."""
        with self._lock:
            self._decide.carried(self._meter.link.price(nbytes))

    def unpack(self, frames: Sequence[Buffer], packed: Sequence[Packed]) -> list[Buffer]:
        """Return the frames as they were.

        Raises
        ------
        CorruptDataError
            If they are not what was written.
        """
        try:
            return codecs.decompress(frames, packed, self._lease)
        except CodecError as error:
            raise CorruptDataError(str(error)) from error
