"""Who sent how much to whom, by which path.

Covers: :class:`Matrix`. Does not cover: where the rows come from (:mod:`dask_gpurt.observe.journal`); how it is drawn
(:mod:`dask_gpurt.observe.flow`).

Pure: no I/O, no clock, no Dask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dask_gpurt.observe.reports import PATHS, natural

__all__ = ["Matrix", "Rows"]

#: Address of a sender to (address of the receiver, path) to bytes.
Rows = Mapping[str, Mapping[tuple[str, str], int]]


@dataclass(frozen=True)
class Matrix:
    """Bytes from worker to worker."""

    #: Of the workers, in the order of rows (senders) and columns (receivers).
    names: Sequence[str] = ()
    #: Path to its bytes.
    nbytes: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Mapping[str, str], rows: Rows, before: Rows | None = None) -> Matrix:
        """Put together what workers tell.

        Parameters
        ----------
        names
            Address to name, of the workers that are shown. What went to others is left out.
        rows
            What each has sent so far.
        before
            What of this had been sent already; None: everything counts.

        Examples
        --------
        >>> rows = {"tcp://a": {("tcp://b", "ucx"): 5, ("tcp://gone", "ucx"): 7}}
        >>> Matrix.of({"tcp://a": "a", "tcp://b": "b"}, rows).total.tolist()
        [[0.0, 5.0], [0.0, 0.0]]
        """
        addresses = sorted(names, key=lambda address: natural(names[address]))
        places = {address: place for place, address in enumerate(addresses)}
        nbytes = {path: np.zeros((len(places), len(places))) for path in PATHS}
        for sender, row in rows.items():
            known = {} if before is None else before.get(sender, {})
            for (receiver, path), count in row.items():
                if sender in places and receiver in places and path in nbytes:
                    # A count that fell is that of another process at this address.
                    base = known.get((receiver, path), 0)
                    nbytes[path][places[sender], places[receiver]] = count - base if count >= base else count
        return cls([names[address] for address in addresses], nbytes)

    @property
    def total(self) -> NDArray[np.float64]:
        """Bytes by all paths."""
        count = len(self.names)
        return sum(self.nbytes.values(), start=np.zeros((count, count)))
