"""Every private name of dask and distributed that dask-gpurt relies on.

Covers: the names, a check for each, and the accessors through which the rest of the package reaches them. No other
module may touch a private name of Dask (``tests/unit/test_seams.py`` reads the sources and says so).
Does not cover: what is done with them; see the part that uses them.

A seam is checked on the server where it is used, when the part is installed. A part with a broken seam is left stock
there, with a warning that names the seam; the other parts are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["DEMO", "MEMORY", "PLACEMENT", "SEAMS", "SHUFFLE", "SUPPORTED", "Seam", "broken"]

#: Dask and distributed versions that the seams were tried with: lowest (included), highest (excluded).
SUPPORTED = ("2026.7.1", "2026.9")

Side = Literal["scheduler", "worker"]


@dataclass(frozen=True)
class Seam:
    """A name that has to exist.

    Parameters
    ----------
    side
        Where the name is used.
    path
        ``module:Dotted.name`` for what can be imported, ``.dotted.name`` for an attribute of the running scheduler or
        worker.
    parameters
        Names of the parameters that a callable has to take, in order, without ``self``; None: not checked.
    """

    side: Side
    path: str
    parameters: tuple[str, ...] | None = None

    def problem(self, server: object | None = None) -> str | None:
        """Say what is wrong, or None. Attributes of a server are skipped where no server is given."""
        module, _, dotted = self.path.rpartition(":") if ":" in self.path else ("", "", self.path[1:])
        if module:
            try:
                found: Any = importlib.import_module(module)
            except ImportError as error:
                return f"{self.path}: {error}"
        elif server is None:
            return None
        else:
            found = server
        for name in dotted.split("."):
            if not hasattr(found, name):
                # Slots and annotations declare instance attributes that the class itself does not have.
                if name in getattr(found, "__annotations__", {}):
                    return None
                return f"{self.path}: there is no {name!r}"
            found = getattr(found, name)
        if self.parameters is None:
            return None
        present = tuple(name for name in inspect.signature(found).parameters if name != "self")
        if present != self.parameters:
            return f"{self.path}: takes {present}, expected {self.parameters}"
        return None


#: Names the placement uses.
PLACEMENT: tuple[Seam, ...] = ()

#: Names the shuffle uses.
SHUFFLE: tuple[Seam, ...] = ()

#: Names the tiered store uses.
MEMORY: tuple[Seam, ...] = ()

#: Part to its seams.
SEAMS: dict[str, tuple[Seam, ...]] = {"memory": MEMORY, "shuffle": SHUFFLE, "placement": PLACEMENT}


def broken(part: str, side: Side, server: object | None = None) -> list[str]:
    """Say what is wrong with the seams of ``part`` on ``side``; an empty list means that it can be installed."""
    return [problem for seam in _of(part, side) if (problem := seam.problem(server)) is not None]


def _of(part: str, side: Side) -> Iterator[Seam]:
    return (seam for seam in SEAMS[part] if seam.side == side)


# --- DEMO: what the demonstration and the benchmarks measure with ---------------------------------------------------

#: Names the meter uses. Not a part that is installed: a broken one fails the demo's own tests, and nothing else.
DEMO: tuple[Seam, ...] = (Seam("worker", "distributed.comm.tcp:TCP.write", ("msg", "serializers", "on_error")),)


def comm_classes() -> tuple[Any, ...]:
    """Classes of comms whose ``write`` returns the bytes that it sent: TCP, of which TLS derives, and UCX if present."""
    classes = [importlib.import_module("distributed.comm.tcp").TCP]
    if importlib.util.find_spec("distributed_ucxx") is not None:
        classes.append(importlib.import_module("distributed_ucxx").UCXX)
    return tuple(classes)
