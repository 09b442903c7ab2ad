"""Writes the pages and plots that follow from other files: ``python -m docs``.

They are committed, so that they can be read on a code host, too; ``tests/unit/test_docs.py`` fails where one is out of date.
``python -m docs.notebooks`` runs the examples anew, for what they show on their pages, and wants a machine that does nothing else.
"""

from __future__ import annotations

from docs.generated import FOLDER, pages

__all__: list[str] = []


def _main() -> None:
    wanted = pages()
    for path, text in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for left in set((FOLDER / "images" / "benchmarks").glob("*.svg")) - set(wanted):
        left.unlink()


if __name__ == "__main__":
    _main()
