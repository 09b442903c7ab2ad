"""How Sphinx makes the site: ``make docs``.

The theme is the one that Dask's own is made of. Dask's own adds fonts and a tag manager that tell third parties who reads the pages.
"""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from typing import Any

import dask_gpurt

project = "dask-gpurt"
author = "the authors of dask-gpurt"
version = release = dask_gpurt.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "sphinx_book_theme"
html_title = "dask-gpurt"
# The field of the sidebar suffices.
html_theme_options = {"show_toc_level": 2, "navbar_persistent": []}
html_show_copyright = False

# Headings have the anchors that code hosts give them, so that one link does for both.
myst_heading_anchors = 4
# Whoever copies an example wants neither prompts nor answers.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
add_module_names = False
nitpicky = True

#: What the pages link to outside this folder, as a code host needs it, and the page that has it here.
_ELSEWHERE = {
    "../README.md": "index.md",
    "../CHANGELOG.md": "changelog.md",
    "../benchmarks/results/": "benchmarks.md",
    "../tests/emulated_cuda/README.md": "emulation.md",
}
#: Imported for types alone, so that they are no attributes of the module that names them.
_FOR_TYPES = {"Client": "distributed.Client"}


def setup(app: Any) -> None:
    """Be called by Sphinx."""
    app.connect("source-read", _links_within)
    app.connect("autodoc-process-docstring", _without_heading)
    app.connect("missing-reference", _without_a_page)


def _links_within(app: Any, name: str, source: list[str]) -> None:
    if name == "index":
        rest = sorted(page.stem for page in Path(app.srcdir).glob("*.md") if f"\n{page.stem}\n" not in source[0])
        source[0] = source[0].replace(
            "\nchangelog\n", "\n".join(["", *rest, "changelog", ""]).replace("\nindex\n", "\n")
        )
    source[0] = re.sub(r"\]\((\.\./[^)#]+)", lambda link: f"]({_ELSEWHERE.get(link[1], link[1])}", source[0])


def _without_heading(app: Any, what: str, *about: Any) -> None:  # noqa: ARG001
    """On the page that has the theories of operation, the name of the module is the heading."""
    *_, lines = about
    if what == "module" and "Theory of operation" in lines:
        place = lines.index("Theory of operation")
        del lines[place : place + 2]


def _without_a_page(app: Any, env: Any, node: Any, shown: Any) -> Any:  # noqa: ARG001  Sphinx passes all four
    """Accept a reference to what has no entry here (private, or of another library) if it exists; else Sphinx warns."""
    # Of a type with parameters Sphinx hands over the pieces.
    target = node.get("reftarget", "").partition("[")[0]
    module, cls = node.get("py:module"), node.get("py:class")
    for name in (_FOR_TYPES.get(target, target), f"{module}.{target}", f"{module}.{cls}.{target}"):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError):
            continue
        return shown
    return None
