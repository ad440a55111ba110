"""The tidy table of quality results: one metric a row, replaced by key, written in one go.

A command line measures hundreds of rows and is longer than any of them, so the file names it (``kl-1f3a9c2e``) and
``<table>.commands.json`` beside it tells what the name stands for; rows in memory have the command itself.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mac_kernels import InputError
from mac_kernels.files import write_whole

KEY = ("model", "suite", "task", "text", "config", "context", "tokens", "metric")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured number.

    ``context`` and ``tokens``: prompt length and decoded tokens (per text, or per trial for needles); ``group_hit``,
    ``head_hit``, ``kv_read`` shares in [0, 1]; ``value`` with its 95 % interval over ``n`` observations.
    """

    model: str
    suite: str
    task: str
    text: str
    config: str
    context: int
    tokens: int
    group_hit: float
    head_hit: float
    kv_read: float
    metric: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    commit: str
    date: str
    command: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same measurement."""
        return tuple(str(getattr(self, name)) for name in KEY)


_KINDS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("context", "tokens", "n"), int),
    **dict.fromkeys(("group_hit", "head_hit", "kv_read", "value", "ci_low", "ci_high"), float),
}
COLUMNS = tuple(field.name for field in fields(Row))


def read(path: Path) -> list[Row]:
    """Read a table; a missing file is an empty one.

    Raises
    ------
    InputError
        If the columns are not those of :class:`Row`.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise InputError(
                f"{path} has columns {reader.fieldnames}, expected {list(COLUMNS)}; choose another --output"
            )
        commands = _read_commands(path)
        lines = ({**line, "command": commands.get(line["command"], line["command"])} for line in reader)
        return [Row(**{name: _KINDS.get(name, str)(value) for name, value in line.items()}) for line in lines]


def upsert(path: Path, rows: Iterable[Row]) -> None:
    """Replace the rows of equal key, add the others, sort, and swap the file in whole."""
    before = {row.key: row for row in read(path)}
    table = before | {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for _, row in sorted(table.items()):
        writer.writerow({name: _plain(value) for name, value in asdict(row).items()} | {"command": _name(row)})
    # first, and with those of the old table: whatever fails, no row is left without its command
    _write_commands(path, (*before.values(), *table.values()))
    write_whole(path, text.getvalue())


def commands_path(path: Path) -> Path:
    """The file that tells the commands of a table."""
    return path.with_suffix(".commands.json")


def _read_commands(path: Path) -> dict[str, str]:
    commands = commands_path(path)
    if not commands.exists():
        return {}
    try:
        return dict(json.loads(commands.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{commands} cannot be read ({error}); restore it or choose another --output") from None


def _write_commands(path: Path, rows: Iterable[Row]) -> None:
    commands = {_name(row): row.command for row in rows}
    write_whole(commands_path(path), json.dumps(commands, indent=1, sort_keys=True) + "\n")


def _name(row: Row) -> str:
    """What stands for a row's command in the file."""
    return f"{row.suite}-{hashlib.sha256(row.command.encode()).hexdigest()[:8]}"


def _plain(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
