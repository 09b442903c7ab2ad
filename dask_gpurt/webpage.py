"""HTML files that open without a network.

Covers: :func:`page`, a document with Bokeh's scripts inlined; :func:`write`, which replaces a file as a whole.
Does not cover: what is in them; see :mod:`dask_gpurt.demo.report` and :mod:`dask_gpurt.observe.document`.
"""

from __future__ import annotations

import html
import os
import tempfile
from pathlib import Path

__all__ = ["page", "write"]


def page(title: str, style: str, script: str, body: str) -> str:
    """Return a document with what ``bokeh.embed.components`` has made: ``script``, and divisions in the ``body``."""
    from bokeh.resources import INLINE

    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{html.escape(title)}</title>
<style>{style}</style>
{INLINE.render()}
{script}
</head>
<body>
{body}
</body>
</html>
"""


def write(path: Path, text: str) -> None:
    """Write a file; one that is there stays whole until the new one is."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
