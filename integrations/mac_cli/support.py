"""``mac-kernels support``: which backend can do what, generated from the library's own checks."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from .output import JsonOption, out, print_json

MarkdownOption = Annotated[bool, typer.Option("--markdown", help="Print the table as it stands in the README.")]


def support(markdown: MarkdownOption = False, as_json: JsonOption = False) -> None:
    """Show the support table: features by backend, with the reason for every no.

    Example: mac-kernels support --markdown
    """
    from mac_kernels.support import support_table

    table = support_table()
    if as_json:
        rows = {
            label: {backend: {"supported": not reasons, "reasons": list(reasons)} for backend, reasons in cells.items()}
            for label, cells in table.items()
        }
        print_json(rows)
    elif markdown:
        print("\n".join(markdown_lines(table)))
    else:
        grid = Table("feature", *_backends(table))
        for label, cells in table.items():
            grid.add_row(label, *map(_cell, cells.values()))
        out().print(grid)


def markdown_lines(table: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    """Return the lines of the table in Markdown."""
    backends = _backends(table)
    return [
        f"| feature | {' | '.join(backends)} |",
        f"|---|{'---|' * len(backends)}",
        *(f"| {label} | {' | '.join(map(_cell, cells.values()))} |" for label, cells in table.items()),
    ]


def _backends(table: dict[str, dict[str, tuple[str, ...]]]) -> list[str]:
    return list(next(iter(table.values())))


def _cell(reasons: tuple[str, ...]) -> str:
    return f"no: {'; '.join(reasons)}" if reasons else "yes"
