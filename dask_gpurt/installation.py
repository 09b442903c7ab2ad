"""What is installed where: plain data that travels from the servers to the client, and how it is shown.

Covers: :class:`PartStatus`, :class:`ServerStatus` (one scheduler or worker), :class:`Installation` (a cluster), in text and in
the HTML of notebooks, which has no colours of its own but those of bars, so that it is read in light and in dark ones.
Does not cover: finding it out; see :mod:`dask_gpurt.installer`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dask_gpurt.config import PARTS
from dask_gpurt.observe.reports import TierReport, total

__all__ = ["Installation", "PartStatus", "ServerStatus"]


#: Workers whose tiers are listed in a notebook.
LISTED_MAX = 50


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
    #: Address of a worker to what lies in its tiers, as it said last; workers that have not said yet are left out.
    tiers: Mapping[str, Mapping[str, TierReport]] = field(default_factory=dict)

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
        title = html.escape(self._title())
        return f"<div><strong>{title}</strong><table><tbody>{rows}</tbody></table>{self._tiers_html()}</div>"

    def _tiers_html(self) -> str:
        names = list(dict.fromkeys(tier for tiers in self.tiers.values() for tier in tiers))
        if not names:
            return ""
        told = sum(map(bool, self.tiers.values()))
        who = "all workers" if told >= len(self.workers) else f"{told} of {len(self.workers)} workers"
        heads = "".join(f"<th style='text-align:left'>{html.escape(name.upper())}</th>" for name in names)
        together = {name: total([tiers[name] for tiers in self.tiers.values() if name in tiers]) for name in names}
        shown = sorted(self.tiers.items())[:LISTED_MAX]
        more = len(self.tiers) - len(shown)
        rows = "".join(_tiers_row(address, names, tiers) for address, tiers in shown)
        return (
            f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{_tiers_row(who, names, together)}</tbody></table>"
            f"<details><summary>Tiers of each worker</summary><table><tbody>{rows}</tbody></table>"
            f"{f'<p>and {more} more</p>' if more else ''}</details>"
        )


def _tiers_row(title: str, names: Sequence[str], tiers: Mapping[str, TierReport]) -> str:
    cells = "".join(f"<td style='text-align:left'>{_tier_html(tiers.get(name))}</td>" for name in names)
    return f"<tr><th style='text-align:left'>{html.escape(title)}</th>{cells}</tr>"


def _tier_html(tier: TierReport | None) -> str:
    if tier is None:
        return "&#8211;"
    bar = ""
    if tier.limit_nbytes:
        percent = min(100, round(100 * tier.used_nbytes / tier.limit_nbytes))
        bar = (
            "<div style='width:120px;height:6px;border:1px solid rgba(128,128,128,.6)'>"
            f"<div style='width:{percent}%;height:6px;background:#2b8cbe'></div></div>"
        )
    return f"{html.escape(str(tier))}{bar}"
