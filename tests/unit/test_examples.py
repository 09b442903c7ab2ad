"""The example notebooks as they are kept: clean, and their pages made of what they say now. Their running is tested elsewhere."""

from __future__ import annotations

import json
import pathlib
import re

import nbformat
import pytest

from docs.notebooks import EXAMPLES, code, recording


def _stem(path: pathlib.Path) -> str:
    return path.stem


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} == {"larger-than-memory-array", "larger-than-memory-join"}


@pytest.mark.parametrize("example", EXAMPLES, ids=_stem)
def test_nothing_of_a_run_is_kept_in_it(example: pathlib.Path) -> None:
    notebook = json.loads(example.read_text())
    nbformat.validate(notebook)
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@pytest.mark.parametrize("path", [path for example in EXAMPLES for path in (example, recording(example))], ids=_stem)
def test_it_has_no_path_of_a_machine(path: pathlib.Path) -> None:
    assert not re.findall(r"/(?:home|root|tmp|usr|opt|mnt|var|work|Users)\b", path.read_text())


@pytest.mark.parametrize("example", EXAMPLES, ids=_stem)
def test_what_its_page_shows_is_of_its_cells(example: pathlib.Path) -> None:
    shown = json.loads(recording(example).read_text())["shown"]
    assert set(shown) <= set(code(json.loads(example.read_text()))), "run: python -m docs.notebooks; python -m docs"
