"""What is installed where: plain data that travels from the servers to the client, and how it is shown.

Covers: :class:`PartStatus`, :class:`ServerStatus` (one scheduler or worker), :class:`Installation` (a cluster).
Does not cover: finding it out; see :mod:`dask_gpurt.installer`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field

from dask_gpurt.config import PARTS

__all__ = ["Installation", "PartStatus", "ServerStatus"]


@dataclass(frozen=True)
class PartStatus:
    """Whether one part runs on one server."""

    #: Whether dask-gpurt's part is in place; where it is not, stock Dask does the work.
    installed: bool
    #: Why the part was left stock, or a remark on how it runs; empty if there is nothing to say.
    remark: str = ""

    def __str__(self) -> str:
        state = "installed" if self.installed else "stock"
        return f"{state} ({self.remark})" if self.remark else state

    def to_message(self) -> dict[str, object]:
        """Turn into what a Dask message can carry without pickle."""
        return {"installed": self.installed, "remark": self.remark}


#: Part to its status, on one server. A part that has no business there has no entry.
ServerStatus = Mapping[str, PartStatus]


@dataclass(frozen=True)
class Installation:
    """The answer of :func:`dask_gpurt.install`, :func:`~dask_gpurt.uninstall` and :func:`~dask_gpurt.status`.

    Examples
    --------
    >>> ready = {"memory": PartStatus(True), "shuffle": PartStatus(True)}
    >>> print(Installation("0.1.0", {"placement": PartStatus(True)}, {"tcp://10.0.0.1:1": ready}))
    dask-gpurt 0.1.0 on 1 worker
      memory     installed on all workers
      shuffle    installed on all workers, stock on the scheduler (not installed)
      placement  installed on the scheduler
    """

    version: str
    scheduler: ServerStatus = field(default_factory=dict)
    #: Address of a worker to its parts.
    workers: Mapping[str, ServerStatus] = field(default_factory=dict)

    def installed(self, part: str) -> bool:
        """Whether ``part`` does its work on the whole cluster."""
        statuses = [status.get(part) for status in self.workers.values()] if part != "placement" else []
        if part != "memory":
            statuses.append(self.scheduler.get(part))
        return bool(statuses) and all(status is not None and status.installed for status in statuses)

    def _workers_line(self, part: str) -> str:
        stock: dict[str, list[str]] = {}
        remarks: set[str] = set()
        for address, parts in sorted(self.workers.items()):
            status = parts.get(part, PartStatus(False, "not installed"))
            if not status.installed:
                stock.setdefault(status.remark or "not installed", []).append(address)
            elif status.remark:
                remarks.add(status.remark)
        remark = f" ({'; '.join(sorted(remarks))})" if remarks else ""
        if not self.workers:
            return "waits for workers"
        if not stock:
            return f"installed on all workers{remark}"
        reasons = "; ".join(
            f"{reason}: {'all workers' if len(where) == len(self.workers) else ', '.join(where[:4])}"
            + (f" and {len(where) - 4} more" if 4 < len(where) < len(self.workers) else "")
            for reason, where in sorted(stock.items())
        )
        missing = sum(map(len, stock.values()))
        return f"installed on {len(self.workers) - missing} of {len(self.workers)} workers{remark}, stock on {missing} ({reasons})"

    def rows(self) -> list[tuple[str, str]]:
        """One line for each part: its name and, in words, where it is."""
        rows = []
        for part in PARTS:
            scheduler = self.scheduler.get(part, PartStatus(False, "not installed"))
            remark = f" ({scheduler.remark})" if scheduler.remark else ""
            on_scheduler = f"{'installed' if scheduler.installed else 'stock'} on the scheduler{remark}"
            if part == "placement":
                rows.append((part, on_scheduler))
            elif part == "memory" or scheduler.installed:
                rows.append((part, self._workers_line(part)))
            else:
                rows.append((part, f"{self._workers_line(part)}, {on_scheduler}"))
        return rows

    def _title(self) -> str:
        count = len(self.workers)
        return f"dask-gpurt {self.version} on {count} worker{'' if count == 1 else 's'}"

    def __str__(self) -> str:
        width = max(map(len, PARTS)) + 2
        return "\n".join([self._title(), *(f"  {part:<{width}}{text}" for part, text in self.rows())])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'&#10003;' if self.installed(part) else '&#8211;'}</td>"
            f"<th style='text-align:left'>{html.escape(part)}</th>"
            f"<td style='text-align:left'>{html.escape(text)}</td></tr>"
            for part, text in self.rows()
        )
        return f"<div><strong>{html.escape(self._title())}</strong><table><tbody>{rows}</tbody></table></div>"
