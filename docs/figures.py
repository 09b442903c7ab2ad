"""The page of benchmarks, made from what lies in ``benchmarks/results``: no figure on it is typed by hand.

Covers: which of the lines of a result are shown as a table, and which as a plot; all others stand in the file that the page
names. A result that :data:`SUBJECTS` does not know is shown whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.plots import Bar, bars

__all__ = ["SUBJECTS", "circumstances", "page"]


@dataclass(frozen=True)
class Plot:
    """The ratios of one metric against one peer."""

    name: str
    title: str
    metric: str
    peer: str
    #: What the names of cases look like; a group, if there is one, is what the plot calls them.
    cases: str = ".*"


@dataclass(frozen=True)
class Subject:
    """How a result is shown."""

    title: str
    text: str
    #: What the cases in the table look like.
    table: str = ".*"
    plots: tuple[Plot, ...] = ()


SUBJECTS = {
    "demo": Subject(
        "The main job",
        "TPC-H queries and arrays larger than the memory of both workers; the same as `dask gpurt demo`.",
        plots=(Plot("demo", "Wall time, stock ÷ dask-gpurt", "wall_s", "stock"),),
    ),
    "tpch": Subject(
        "All queries of TPC-H",
        "Scale factor 1, from Parquet. Most of the time is reading.",
        plots=(Plot("tpch", "Wall time, stock ÷ dask-gpurt", "wall_s", "stock"),),
    ),
    "tpch-10": Subject(
        "All queries of TPC-H, ten times as large",
        "Scale factor 10, on two workers of 4 GiB; one run of each query.",
    ),
    "shuffle": Subject(
        "Shuffle of dataframes",
        "*memcpy* is one copy of the data by one core, *p2p-memory* stock's p2p without its files; what the cases are stands in"
        " [the shuffle](shuffle.md#where-the-time-goes).",
        plots=(Plot("shuffle", "Wall time, stock p2p ÷ dask-gpurt", "wall_s", "p2p"),),
    ),
    "merge": Subject("Merge", "Two frames of 500 MB."),
    "rechunk": Subject("Rechunk", "An array of 1 GB, from rows to columns."),
    "spill": Subject(
        "Memory",
        "What real jobs do is recorded, and replayed with a quarter (*bytes-25*) and half (*bytes-50*) of the memory that each needs. *lpmin* is the least"
        " that any store could move, *oracle* the same spiller when it knows the future, *lru* what stock's store is made of; see [memory](memory.md#figures).",
        table=r"(?!bytes-\d+-(?!worst)).*",
        plots=(
            Plot(
                "spill-25",
                "Bytes moved with a quarter of the memory, stock ÷ dask-gpurt",
                "moved_nbytes",
                "lru",
                r"bytes-25(?:-(?!worst)(.*))?",
            ),
        ),
    ),
    "placement": Subject(
        "Placement, simulated",
        "Dask's own scheduler on a virtual clock; the digits are the number of workers, what stands before them the kind of network: see [placement](placement.md#how-it-is-measured).",
        table=r"(geomean|worst).*-(8|32)",
        plots=(
            Plot(
                "placement-bytes",
                "Bytes between workers (tcp), stock ÷ dask-gpurt",
                "bytes",
                "default",
                r"(?!worst)(.*)-tcp-8",
            ),
            Plot(
                "placement-makespan",
                "Makespan (tcp), stock ÷ dask-gpurt",
                "makespan",
                "default",
                r"(?!worst)(.*)-tcp-8",
            ),
        ),
    ),
    "overhead": Subject("Where nothing is to be gained", "Trivial tasks, and jobs that fit in memory."),
    "scheduler_cost": Subject("The scheduler's processor time", "For each task; the digits are the number of workers."),
}

_HEAD = """\
# Benchmarks

<!-- Made by `python -m docs` from benchmarks/results/*.json. -->

Each figure is a ratio, peer ÷ dask-gpurt, of medians of runs that took turns on one machine, and above 1 dask-gpurt is better; answers were
compared. In brackets the quartiles over the pairs of runs, then what dask-gpurt and the peer took. In plots a line spans the quartiles.
Every result can be made again by the line above it.
"""

_METRICS = {
    "wall_s": "wall time",
    "moved_nbytes": "bytes moved",
    "written_nbytes": "bytes written",
    "peak_nbytes": "peak memory",
    "peak_rss_nbytes": "peak memory",
    "peak": "peak memory",
    "between-nodes": "bytes between nodes",
    "longest_tick_s": "longest tick of the event loop",
    "longest_working_tick_s": "the same, collections of garbage left out",
    "gb_per_s": "rate",
    "us_per_task": "time of a task",
}
_PEERS = {"default": "stock", "lru": "stock's store", "idle": "a process with nothing to do"}


_NO_GPU = (
    "All of it was measured without a GPU; of GPUs there are no figures yet ([what is there](architecture.md#gpus)).\n"
)


def page(results: Path) -> tuple[str, dict[str, str]]:
    """Return the page and its plots (name to SVG)."""
    by_name = {path.relative_to(results).with_suffix("").as_posix(): path for path in sorted(results.rglob("*.json"))}
    order = [name for name in SUBJECTS if name in by_name] + sorted(set(by_name) - set(SUBJECTS))
    gpu = any(name.startswith("gpu/") for name in by_name)
    parts, plots = [_HEAD if gpu else _HEAD + _NO_GPU], dict[str, str]()
    for name in order:
        result = json.loads(by_name[name].read_text("utf-8"))
        subject = SUBJECTS.get(name) or Subject(name, "")
        parts += [f"## {subject.title}\n", f"{subject.text}\n" if subject.text else "", _made(name, result)]
        for plot in subject.plots:
            plots[plot.name] = _plot(plot, result["lines"])
            parts.append(f"![{plot.title}](images/benchmarks/{plot.name}.svg)\n")
        parts.append(_table([line for line in result["lines"] if re.fullmatch(subject.table, line["case"])]))
    return "\n".join(part for part in parts if part), plots


def _made(name: str, result: Mapping[str, Any]) -> str:
    command = re.sub(r"--json \S+", f"--json benchmarks/results/{name}.json", result["command"])
    return f"    {command}\n\n{circumstances(result)}. [All figures](../benchmarks/results/{name}.json)\n"


def circumstances(result: Mapping[str, Any]) -> str:
    """Say when and on what something was measured; see :func:`dask_gpurt.demo.machine.describe`."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"{result['time'][:10]}, {machine['cores']} cores of {machine['processor']}, {machine['memory_nbytes'] / 2**30:.0f} GiB; "
        f"Python {versions['python']}, Dask {versions['dask']}"
    )


def _plot(plot: Plot, lines: Sequence[Mapping[str, Any]]) -> str:
    chosen = []
    for line in lines:
        match = re.fullmatch(plot.cases, line["case"])
        if match and (line["metric"], line["peer_name"]) == (plot.metric, plot.peer) and line["ratio"] is not None:
            name = line["case"] if not match.re.groups else match[1] or "geomean"
            chosen.append(Bar(_in_words(name), line["ratio"], tuple(line["quartiles"])))
    return bars(plot.title, chosen)


def _in_words(case: str) -> str:
    return re.sub(
        r"^geomean(-aside)?-?", lambda of: f"geometric mean{', kept aside' if of[1] else ''}, ", case
    ).removesuffix(", ")


def _table(lines: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys((line["metric"], line["peer_name"]) for line in lines))
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for line in lines:
        rows.setdefault(line["case"], {})[line["metric"], line["peer_name"]] = _cell(line)
    heads = [f"{_metric(metric)}, against {_PEERS.get(peer, peer)}" for metric, peer in columns]
    if 2 * len(lines) < len(rows) * len(columns):
        # Most of a wide table would be empty.
        named = dict(zip(columns, heads, strict=True))
        heads = ["of", "ratio"]
        body = [[case, named[column], cell] for case, cells in rows.items() for column, cell in cells.items()]
    else:
        body = [[case, *(cells.get(column, "") for column in columns)] for case, cells in rows.items()]
    if len(heads) < 3:
        body = [[cell.replace("<br>", ", ") for cell in row] for row in body]
    table = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return "\n".join([*table, *(f"| {_in_words(case)} | " + " | ".join(cells) + " |" for case, *cells in body)]) + "\n"


def _metric(metric: str) -> str:
    return _METRICS.get(metric, metric.replace("_", " "))


def _cell(line: Mapping[str, Any]) -> str:
    ours, peer = (_quantity(line["metric"], line[who]) for who in ("ours", "peer"))
    sizes = f"{ours}, {peer}" if ours and peer else ""
    if line["ratio"] is None:
        return f"no ratio, {sizes}" if sizes else ""
    if line["ratio"] > 1000:
        return f"**> 1000**<br>{sizes}"
    low, high = map(_ratio, line["quartiles"])
    spread = f" ({low} to {high})" if low != high else ""
    return f"**{_ratio(line['ratio'])}**{spread}" + (f"<br>{sizes}" if sizes else "")


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _quantity(metric: str, value: float | None) -> str:
    if value is None:
        return ""
    if metric.endswith("_nbytes") or metric in {"bytes", "between-nodes", "peak", "spilled"}:
        for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("kiB", 2**10)):
            if value >= size:
                return f"{_digits(value / size)} {unit}"
        return f"{value:.0f} B"
    unit = {"gb_per_s": " GB/s", "us_per_task": " µs"}.get(
        metric, " s" if metric.endswith("_s") or metric == "makespan" else ""
    )
    return f"{value:.0f}" if not unit else f"{_digits(value)}{unit}"


def _digits(value: float) -> str:
    """Write three digits, and never an exponent.

    Examples
    --------
    >>> _digits(0.0995), _digits(62.64), _digits(1020.3)
    ('0.0995', '62.6', '1020')
    """
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"
