"""``mac-kernels config show``: every value with its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mac_kernels.errors import ConfigError
from mac_kernels.settings import ResolvedConfig, resolve_config
from mac_kernels.tuned import KernelFile, inventory

from .output import JsonOption, out, print_json

config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)

PresetOption = Annotated[
    str | None, typer.Option("--preset", help="careful, balanced, fast, exact or paper; not together with --config.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A JSON config file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One field of the config; may be repeated.")
]


ModelOption = Annotated[
    str | None, typer.Option("--model", help="Also look up the tuned policy of a model: folder, .gguf file or hub id.")
]


@config_app.callback()
def _config() -> None:
    # one command alone would be folded into its parent
    pass


@config_app.command("show", epilog="Example: mac-kernels config show --preset fast --set window=1024")
def show(
    preset: PresetOption = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    model: ModelOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every value of the effective config and where it comes from, and the tuned files."""
    key = None
    if model is not None:
        from mac_transformers.model_key import read_model_key

        key = read_model_key(model)
    resolved = resolve_config(preset, file=config, changes=parse_changes(changes or []), model=key)
    if as_json:
        print_json(_document(resolved))
        return
    table = Table("field", "value", "source", "where")
    for name, value in _values(resolved).items():
        source = resolved.sources[name]
        table.add_row(name, _brief(value), source.kind, source.where)
    out().print(table)
    files = ", ".join(map(str, resolved.files)) or "none"
    out().print(f"config files read: {files}", soft_wrap=True, highlight=False)
    for line in (*resolved.why, *_tuned_lines()):
        out().print(line, soft_wrap=True, highlight=False)


def _tuned_lines() -> list[str]:
    """One line per tuned file, strongest place first, and which are hidden."""
    lines = []
    for found, hidden_by in inventory():
        file = found.file
        what = "launch parameters" if isinstance(file, KernelFile) else f"policy of {file.key.short_name}"
        state = f"hidden by {hidden_by}" if hidden_by else "in use where it applies"
        lines.append(f"tuned {what}: {found.path} ({found.kind}): {state}")
    return lines or ["tuned files: none; `mac-kernels tune kernel` and `tune policy` write them"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    short = len(text) <= 60 or isinstance(value, dict)
    return text if short else f"table of {len(value)} layers x {len(value[0])} heads"


def parse_changes(changes: list[str]) -> dict[str, Any]:
    """Parse ``key=value`` pairs; values are JSON, or plain words.

    Raises
    ------
    ConfigError
        If a pair has no ``=``, or a key comes twice.
    """
    parsed: dict[str, Any] = {}
    for pair in changes:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {pair}: expected KEY=VALUE, e.g. --set window=1024")
        if key in parsed:
            raise ConfigError(f"--set {pair}: {key} is already set to {parsed[key]!r}; give every key once")
        parsed[key] = _parse_value(key, value)
    return parsed


def _parse_value(key: str, value: str) -> Any:
    if key == "threshold" and value in ("inf", "-inf"):
        return float(value)
    try:
        return json.loads(value)
    except ValueError:
        return value


def _values(resolved: ResolvedConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(resolved.config.to_json())["mac"]
    return values


def _document(resolved: ResolvedConfig) -> dict[str, Any]:
    sources = resolved.sources
    return {
        "values": {
            name: {"value": value, "source": sources[name].kind, "where": sources[name].where}
            for name, value in _values(resolved).items()
        },
        "files": [str(path) for path in resolved.files],
        "why": list(resolved.why),
        "tuned": [
            {"path": str(found.path), "place": found.kind, "hidden_by": str(hidden_by) if hidden_by else None}
            for found, hidden_by in inventory()
        ],
    }
