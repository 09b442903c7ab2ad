"""The example notebooks: running one, and the page that it has on the site.

Covers: :func:`execute`, which runs a notebook in a kernel of its own; :func:`page`, which turns one into Markdown.
Does not cover: what the examples show; see ``examples/*.ipynb``.

The notebooks are kept without outputs, so that a change of one is a change of its text. What they show on the site was recorded by
``python -m docs.notebooks``, in ``docs/recorded``: of each cell, by its text. ``tests/unit/test_examples.py`` asks for a new recording
when a cell has changed since.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dask_gpurt.demo.machine import describe
from docs.figures import circumstances

__all__ = ["EXAMPLES", "code", "execute", "page", "recording"]

_FOLDER = Path(__file__).parent
EXAMPLES = sorted((_FOLDER.parent / "examples").glob("*.ipynb"))


def recording(example: Path) -> Path:
    """Return where is recorded what the cells of an example showed."""
    return _FOLDER / "recorded" / f"{example.stem}.json"


def code(notebook: Mapping[str, Any]) -> list[str]:
    """Return the text of each cell that has code."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def page(name: str, notebook: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """Return the page of a notebook, which begins with its title.

    Parameters
    ----------
    name
        Of the file, without its suffix.
    notebook
        What is in it.
    record
        When and on what it was run, what load that had before, and ``shown``: text of a cell -> what it showed, as Markdown.
    """
    first, *rest = notebook["cells"]
    busy = ", while it did other work" if record["load"] >= 1 else ""
    title, _, opening = "".join(first["source"]).partition("\n\n")
    parts = [
        title,
        f"<!-- Made by `python -m docs` from examples/{name}.ipynb and docs/recorded/{name}.json. -->",
        opening,
        f"This page is [a notebook](../examples/{name}.ipynb). What it shows came out on {circumstances(record)}{busy}.",
    ]
    for cell in rest:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            # A semicolon at the end says to a notebook that the value is not to be shown.
            parts.append(f"```python\n{source.removesuffix(';')}\n```")
            parts += filter(None, [record["shown"].get(source)])
    return "\n\n".join(parts) + "\n"


def execute(example: Path, environment: Mapping[str, str], then: str = "") -> Any:
    """Run a notebook with this interpreter, and return it with its outputs.

    Parameters
    ----------
    example
        The notebook.
    environment
        Variables that its kernel gets beside those of this process.
    then
        Code that is run after the last cell, in a cell of its own.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell raised something.
    """
    import nbclient
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    notebook = nbformat.read(example, as_version=4)
    if then:
        notebook.cells.append(nbformat.v4.new_code_cell(then))
    # With no folders to look for kernels in there is one: ipykernel of this interpreter.
    kernels = KernelSpecManager(kernel_dirs=[])
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in that folder: nobody else can open them.
        private = {"transport": "ipc", "connection_file": os.path.join(folder, "kernel.json")}
        manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=kernels, **private)
        own = {"IPYTHONDIR": folder, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        client = nbclient.NotebookClient(notebook, km=manager, timeout=300)
        client.execute(env={**os.environ, **own, **environment}, cwd=folder, cleanup_kc=True)
    return notebook


def _shown(outputs: list[Any]) -> Iterator[str]:
    """Yield what of the outputs of a cell is to be shown, as Markdown: what was printed, and then its value."""
    texts = ["".join(output["text"]) for output in outputs if output.get("name") == "stdout"]
    tables = []
    for data in (output["data"] for output in outputs if "data" in output):
        if data["text/plain"].startswith("dask-gpurt") and "text/html" in data:
            tables.append(data["text/html"])
        else:
            texts.append(data["text/plain"])
    if texts:
        yield "```text\n" + "".join(texts).rstrip() + "\n```"
    yield from tables


def _record() -> None:
    for example in EXAMPLES:
        about = {key: value for key, value in describe().items() if key != "command"}
        load, _, _ = os.getloadavg()
        cells = [cell for cell in execute(example, {}).cells if cell.cell_type == "code"]
        shown = {cell.source: "\n\n".join(_shown(cell.outputs)) for cell in cells}
        record = {**about, "load": round(load, 1), "shown": {source: text for source, text in shown.items() if text}}
        recording(example).parent.mkdir(exist_ok=True)
        recording(example).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _record()
