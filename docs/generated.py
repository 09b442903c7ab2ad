"""Which pages and plots are generated, and what is to stand in them."""

from __future__ import annotations

import json
from pathlib import Path

from dask_gpurt.memory import spiller
from dask_gpurt.plugins import placement
from dask_gpurt.shuffle import run
from docs import commands, configuration, figures, notebooks, states

__all__ = ["DIAGRAMS", "FOLDER", "pages"]

FOLDER = Path(__file__).parent

#: Name of a diagram to its title, and to the module that has the table.
DIAGRAMS = {
    "states-of-a-block": ("The states of a block", spiller),
    "states-of-a-planned-task": ("The states of a planned task", placement),
    "phases-of-a-run": ("The phases of a run", run),
}


def pages() -> dict[Path, str]:
    """Return path to text of all that is generated."""
    package, results = FOLDER.parent / "dask_gpurt", FOLDER.parent / "benchmarks" / "results"
    defaults, schema = (package / name for name in ("gpurt.yaml", "gpurt-schema.yaml"))
    written = {FOLDER / "configuration.md": configuration.page(defaults.read_text("utf-8"), schema.read_text("utf-8"))}
    written[FOLDER / "commands.md"] = commands.page()
    page, plots = figures.page(results)
    written[FOLDER / "benchmarks.md"] = page
    for name, (title, module) in DIAGRAMS.items():
        written[FOLDER / "images" / f"{name}.svg"] = states.diagram(title, module.__doc__ or "")
    for example in notebooks.EXAMPLES:
        notebook, record = (json.loads(path.read_text("utf-8")) for path in (example, notebooks.recording(example)))
        written[FOLDER / f"{example.stem}.md"] = notebooks.page(example.stem, notebook, record)
    return written | {FOLDER / "images" / "benchmarks" / f"{name}.svg": svg for name, svg in plots.items()}
