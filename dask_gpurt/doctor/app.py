"""The doctor from start to end: look, judge, measure, show.

Covers: :func:`run`, what ``dask gpurt doctor`` does once its options are read.
Does not cover: the options (:mod:`dask_gpurt.cli`).
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from dask.utils import format_bytes
from distributed import Client

import dask_gpurt
from dask_gpurt.config import Settings
from dask_gpurt.doctor import checks, cluster, links
from dask_gpurt.doctor.checks import LEVELS, Finding, Level
from dask_gpurt.doctor.facts import Facts, Measure, Missing, plain
from dask_gpurt.doctor.gather import gather
from dask_gpurt.errors import ConfigError
from dask_gpurt.terminal import Say, progress

__all__ = ["HERE", "Report", "consult", "judge", "run", "show"]

#: The machine on which the command runs, where it does not ask a cluster.
HERE = "this machine"

COLOURS: Mapping[Level, str] = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "red"}


@dataclass(frozen=True)
class Report:
    """All that was found."""

    #: Address of the scheduler; None: nobody was asked but this machine.
    scheduler: str | None
    facts: Mapping[str, Facts | Missing]
    findings: Sequence[Finding]
    measures: Sequence[Measure]

    @property
    def broken(self) -> bool:
        """Whether something that was asked for does not work."""
        return any(finding.level == "broken" for finding in self.findings)


def run(scheduler: str | None, *, measure: bool, as_json: bool, connect_s: float) -> bool:
    """Examine, and print what was found; return whether nothing is broken.

    Raises
    ------
    click.ClickException
        If the scheduler cannot be reached.
    """
    with progress() as say:
        if scheduler is None:
            report = consult(None, measure=measure, say=say)
        else:
            say(f"Connecting to {scheduler}")
            try:
                client = Client(scheduler, timeout=connect_s, set_as_default=False)
            except OSError as error:
                raise click.ClickException(f"there is no scheduler at {scheduler}: {error}") from error
            with client:
                report = consult(client, measure=measure, say=say)
    # Whoever has set NO_COLOR, to whatever, wants none; click itself leaves colours out where there is no terminal.
    colour = False if os.environ.get("NO_COLOR") else None
    click.echo(json.dumps(_to_plain(report), indent=2) if as_json else show(report), color=colour)
    return not report.broken


def consult(client: Client | None, *, measure: bool, say: Say = lambda text: None) -> Report:  # noqa: ARG005
    """Look at the cluster of ``client``, or at this machine, and judge."""
    findings = []
    try:
        settings = Settings.load()
    except ConfigError as error:
        findings.append(Finding("broken", "configuration", str(error), f"correct {error.key}"))
        settings = Settings()
    facts: dict[str, Facts | Missing]
    measures: list[Measure] = []
    if client is None:
        say("Looking at this machine")
        here = gather("machine", settings)
        facts = {HERE: here}
        if measure:
            say("Measuring memory and disk")
            measures += links.memory_and_disk(HERE, here.folder)
            if not isinstance(here.cuda, Missing):
                say("Measuring devices")
                measures += links.to_devices(HERE, here.cuda.devices)
    else:
        settings = cluster.installed_settings(client) or settings
        facts = cluster.examine(client, settings, say)
        findings += checks.of_cluster(facts)
        if measure:
            measures += cluster.measure(client, facts, say)
    findings += judge(facts, settings, measures)
    return Report(None if client is None else client.scheduler.address, facts, findings, measures)  # type: ignore[union-attr]


def judge(facts: Mapping[str, Facts | Missing], settings: Settings, measures: Sequence[Measure]) -> list[Finding]:
    """Judge what was found on each server."""
    found = [finding for name, each in facts.items() for finding in checks.of_server(name, each, settings)]
    return checks.merged(found, list(facts)) + checks.of_measures(measures)


def _to_plain(report: Report) -> dict[str, Any]:
    return {
        "dask-gpurt": dask_gpurt.__version__,
        "time": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "broken": report.broken,
        **plain(report),
    }


def show(report: Report) -> str:
    """Put a report into words."""
    whom = HERE if report.scheduler is None else f"the cluster at {report.scheduler}"
    lines = [click.style(f"dask-gpurt {dask_gpurt.__version__}: {whom}", bold=True)]
    for topic in dict.fromkeys(finding.topic for finding in report.findings):
        lines += ["", click.style(topic, bold=True)]
        for finding in (finding for finding in report.findings if finding.topic == topic):
            whose = click.style(f"  [{_whose(finding.servers, report.facts)}]", dim=True) if finding.servers else ""
            level = click.style(f"{finding.level:<9}", fg=COLOURS[finding.level])
            lines.append(f"  {level}{finding.text}{whose}")
            if finding.remedy:
                lines.append(f"           → {click.style(finding.remedy, bold=True)}")
    if report.measures:
        lines += ["", click.style("measured", bold=True), *_table(report.measures)]
    counts: dict[Level, int] = {level: sum(finding.level == level for finding in report.findings) for level in LEVELS}
    lines += ["", _verdict(counts)]
    return "\n".join(lines)


def _whose(servers: Sequence[str], among: Collection[str]) -> str:
    workers = [name for name in among if name != cluster.SCHEDULER]
    if set(servers) == set(workers):
        return "all workers"
    named = ", ".join(servers[:2])
    return named if len(servers) <= 2 else f"{len(servers)} of {len(among)}: {named}, …"


def _table(measures: Sequence[Measure]) -> Iterator[str]:
    rows = []
    for measure in measures:
        if isinstance(measure.rate, Missing):
            continue
        source, target = measure.source, measure.target
        between = source.worker != target.worker
        ends = [_place(end.tier) for end in (source, target)]
        if between:
            ends = [end.worker if end.tier == "host" else f"{end.worker} {end.tier}" for end in (source, target)]
        latency = f"  {measure.rate.latency_s * 1e3:.2f} ms" if between else ""
        where = "" if between or source.worker == HERE else source.worker
        rate = f"{format_bytes(int(measure.rate.bandwidth))}/s"
        rows.append((where, f"{ends[0]} → {ends[1]}", measure.path, f"{rate:>12}{latency}"))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True) if width]
        yield ("  " + "  ".join(cells)).rstrip()


def _place(tier: str) -> str:
    return {"host": "memory"}.get(tier, tier)


def _verdict(counts: Mapping[Level, int]) -> str:
    said = [
        f"{count} {level if count == 1 or level == 'broken' else level + 's'}"
        for level, count in counts.items()
        if count and level != "ok"
    ]
    worst: Level = next((level for level in reversed(LEVELS) if counts[level]), "ok")
    text = "All is well" if worst == "ok" else ", ".join(reversed(said))
    return click.style(
        f"{text}." if counts["broken"] else f"Nothing is broken: {text}." if said else f"{text}.", fg=COLOURS[worst]
    )
