"""The page of the command line: what ``--help`` says of ``dask gpurt`` and of each of its subcommands.

Covers: :func:`page`. Does not cover: what the subcommands do; see :mod:`dask_gpurt.cli`.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from dask_gpurt.cli import gpurt

__all__ = ["page"]

_HEAD = """\
# Command line

<!-- Made by `python -m docs` from dask_gpurt/cli.py. -->

`dask gpurt` is a subcommand of Dask's own command line. Exit statuses: 0, all is well; 1, something that was asked for does not work, or an answer
was wrong; 2, the command was not understood. What takes longer says on a terminal what it does; colours are for terminals, and not for those who
have set `NO_COLOR`. `--json` is for machines.
"""


def page() -> str:
    """Return the page."""
    return "\n".join([_HEAD, *_sections(gpurt, "dask gpurt", None)])


def _sections(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """Yield what is said of a command, and of those below it."""
    # As wide as a page, whatever the terminal is.
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=88, max_content_width=88, **gpurt.context_settings
    )
    heading = f"## {context.command_path}\n\n" if parent else ""
    yield f"{heading}```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _sections(found, below, context)
