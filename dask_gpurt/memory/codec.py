"""How values become frames, and how much memory they take.

Covers: :func:`encode` and :func:`decode`, with distributed's own serialization, so that everything that stock Dask can
spill or send can go down a tier, and a copy below can be sent to a peer as it lies; :func:`footprint`.
Does not cover: compression.

The header of a value stays in memory, pickled: it is small, and deserialization writes into it.

A value comes back as stock brings it back: arrays lie in the buffers they were read into, without another copy, and
are writable if they were writable before.
"""

from __future__ import annotations

import pickle
from collections.abc import Hashable
from typing import Any

import numpy as np
from distributed.protocol.serialize import Serialized, deserialize, serialize
from distributed.sizeof import safe_sizeof

__all__ = ["decode", "encode", "footprint", "serialized"]

_SERIALIZERS = ("dask", "pickle")
#: For what lies on a device: the frames stay there, where its library has told distributed how.
_DEVICE_SERIALIZERS = ("cuda", *_SERIALIZERS)

#: Objects at least as large are told apart by identity when the same one is put under two names. Below that, the
#: same None, number or word under many names would tie these together for nothing.
_IDENTITY_NBYTES = 4096


def encode(value: object, *, on_device: bool = False) -> tuple[bytes, list[Any]]:
    """Turn ``value`` into a header and frames, which refer to the memory of the value where that is possible.

    Parameters
    ----------
    value
        What is to be stored or sent.
    on_device
        Whether frames may be arrays on a device.

    Raises
    ------
    TypeError
        If the value cannot be serialized.
    """
    serializers = _DEVICE_SERIALIZERS if on_device else _SERIALIZERS
    header, frames = serialize(value, serializers=serializers, on_error="raise")
    return pickle.dumps(header), frames


def decode(header: bytes, frames: list[Any]) -> object:
    """Turn back what :func:`encode` made. The value keeps the frames.

    Examples
    --------
    >>> decode(*encode({"x": [1, 2]}))
    {'x': [1, 2]}
    """
    return deserialize(pickle.loads(header), frames)  # noqa: S301 - made by ourselves, and never left this process


def serialized(header: bytes, frames: list[Any]) -> Any:
    """Wrap what :func:`encode` made for a comm to send it as it is."""
    return Serialized(pickle.loads(header), frames)  # noqa: S301 - as above


def footprint(value: object, nbytes: int | None = None) -> tuple[Hashable, int, int]:
    """Say in which buffer ``value`` lies (None: one of its own), the bytes of that buffer, and those of the value.

    Views of arrays are followed to the memory that they keep alive: an array, a mapping, or a network message that
    several arrays were cut from. ``nbytes`` are those of the value, where they are known: to count a frame takes longer
    than all else that is done to hold it.

    Examples
    --------
    >>> base = np.zeros(1000)
    >>> footprint(base[:10])[1:], footprint(base)[0] == footprint(base[:10])[0]
    ((8000, 80), True)
    """
    nbytes = max(0, int(safe_sizeof(value) if nbytes is None else nbytes))
    if hasattr(type(value), "__cuda_array_interface__") and (base := getattr(value, "base", None)) is not None:
        # CuPy's views name the array that they are of.
        return id(base), int(base.nbytes), nbytes
    if not isinstance(value, np.ndarray) or value.dtype.hasobject or isinstance(value, np.memmap):
        return (id(value) if nbytes >= _IDENTITY_NBYTES else None), nbytes, nbytes
    root: Any = value
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
        if isinstance(root, memoryview):
            root = root.obj
    if isinstance(root, np.ndarray):
        return id(root), root.nbytes, nbytes
    try:
        return id(root), memoryview(root).nbytes, nbytes
    except TypeError:
        # Memory of somebody else, whose size is not told.
        return id(root), nbytes, nbytes
