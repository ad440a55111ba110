"""What every verb shares: exit codes, the ``--json`` switch, consoles."""

from __future__ import annotations

import enum
import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console


class ExitCode(enum.IntEnum):
    """Exit codes of the command; ``meaning`` is what README and ``--help`` print."""

    OK = 0
    BUG = 1
    INPUT = 2
    MISSING = 3
    CHECK_FAILED = 4
    INTERRUPTED = 130

    @property
    def meaning(self) -> str:
        """What the code tells the caller."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.BUG: "unexpected error; the traceback is printed",
    ExitCode.INPUT: "wrong option, file or value; nothing was written",
    ExitCode.MISSING: "something is missing here: an extra, model weights, a backend that can run this",
    ExitCode.CHECK_FAILED: "the check ran and its answer is no (`doctor`, `eval`, `tune`)",
    ExitCode.INTERRUPTED: "interrupted with Ctrl-C",
}

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


_WIDTH_WHEN_PIPED = 120


def out() -> Console:
    """Console for results; plain text of a fixed width, without colour, when it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH_WHEN_PIPED)


def err() -> Console:
    """Console for progress, warnings and errors."""
    return Console(stderr=True)


def print_json(document: Any) -> None:
    """Write one JSON document to standard output."""
    print(json.dumps(document, indent=2))
