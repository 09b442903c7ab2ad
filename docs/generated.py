"""Which pages and plots are generated, and what is to stand in them."""

from __future__ import annotations

from pathlib import Path

from dask_gpurt.memory import spiller
from docs import configuration, figures, states

__all__ = ["FOLDER", "pages"]

FOLDER = Path(__file__).parent


def pages() -> dict[Path, str]:
    """Return path to text of all that is generated."""
    package, results = FOLDER.parent / "dask_gpurt", FOLDER.parent / "benchmarks" / "results"
    defaults, schema = (package / name for name in ("gpurt.yaml", "gpurt-schema.yaml"))
    written = {FOLDER / "configuration.md": configuration.page(defaults.read_text("utf-8"), schema.read_text("utf-8"))}
    page, plots = figures.page(results)
    written[FOLDER / "benchmarks.md"] = page
    drawing = states.diagram("The states of a block", spiller.__doc__ or "")
    written[FOLDER / "images" / "states-of-a-block.svg"] = drawing
    return written | {FOLDER / "images" / "benchmarks" / f"{name}.svg": svg for name, svg in plots.items()}
