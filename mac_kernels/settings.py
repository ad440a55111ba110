"""Where a setting comes from: one list of precedence, and the source of every value.

From strongest to weakest: explicit argument, ``MAC_KERNELS_CONFIG`` (a file, or a folder with ``config.json``), the
user's ``config.json``, preset. Layers are merged value by value; a preset named by a layer replaces every value below.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .config import PRESETS, MacConfig, parse_config, read_config
from .errors import ConfigError

SourceKind = Literal["argument", "environment", "file", "preset"]
CONFIG_FILE_NAME = "config.json"
DEFAULT_PRESET = "careful"
ENV_PREFIX = "MAC_KERNELS_"


@dataclass(frozen=True, slots=True)
class EnvironmentVariable:
    """One environment variable: its default and what it does, in words."""

    default: str
    effect: str


ENVIRONMENT: dict[str, EnvironmentVariable] = {
    "MAC_KERNELS_CONFIG": EnvironmentVariable("unset", "JSON config file, or a folder that holds `config.json`"),
    "MAC_KERNELS_CACHE": EnvironmentVariable("the user's cache folder", "where `demo` keeps downloaded model weights"),
}
"""Every variable that any part of the project reads; others with the prefix are warned about."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value comes from: ``kind``, and ``where`` in words (a path, a preset name, an option)."""

    kind: SourceKind
    where: str


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A config, the source of every field by name, and the files that were read (strongest first)."""

    config: MacConfig
    sources: Mapping[str, Source]
    files: tuple[Path, ...]

    @property
    def name(self) -> str:
        """The preset that has exactly these values, else ``"custom"``."""
        return next((name for name, preset in PRESETS.items() if preset == self.config), "custom")


@dataclass(frozen=True, slots=True)
class _Layer:
    kind: SourceKind
    where: str
    preset: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def resolve_config(
    preset: str | None = None,
    *,
    file: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    user_dir: Path | None = None,
) -> ResolvedConfig:
    """Merge arguments, environment, user file and preset into one config.

    Parameters
    ----------
    preset : str, optional
        A name of :data:`mac_kernels.PRESETS`; replaces everything that files say.
    file : str or Path, optional
        A JSON config to use; not together with ``preset`` (the file may name one itself).
    changes : mapping, optional
        Fields of :class:`mac_kernels.MacConfig`; they win over everything.
    environ : mapping, optional
        Default: ``os.environ``.
    user_dir : Path, optional
        The folder of the user's ``config.json``, which may be absent. Default: :func:`user_config_dir`.

    Raises
    ------
    ConfigError
        If a named file is missing or wrong, a key is unknown or a value out of range; the message names the source.

    Warns
    -----
    UserWarning
        For every ``MAC_KERNELS_*`` variable that nothing reads.
    """
    environ = os.environ if environ is None else environ
    user_dir = user_config_dir() if user_dir is None else user_dir
    for message in unknown_variables(environ):
        warnings.warn(message, stacklevel=2)
    if preset is not None and file is not None:
        raise ConfigError(f"preset {preset!r} and file {file} are both given; give one (a file may name its preset)")
    files = _files(file, environ, user_dir)
    layers = [
        _Layer("preset", "", DEFAULT_PRESET),
        *(_Layer(kind, str(path), *parse_config(read_config(path), source=str(path))) for kind, path in files),
        _Layer("argument", "", preset),
        _Layer("argument", "given explicitly", None, changes or {}),
    ]
    return _merge(layers, tuple(path for _, path in reversed(files)))


def user_config_dir() -> Path:
    """Return the folder of the user's ``config.json`` on this system."""
    from platformdirs import user_config_path

    return user_config_path("mac-kernels", appauthor=False)


def cache_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder for downloads: ``MAC_KERNELS_CACHE``, or the user's cache folder on this system."""
    named = (os.environ if environ is None else environ).get("MAC_KERNELS_CACHE")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("mac-kernels", appauthor=False)


def unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return one message for every ``MAC_KERNELS_*`` name that nothing reads, with the nearest known name."""
    messages = []
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in ENVIRONMENT:
            close = difflib.get_close_matches(name, ENVIRONMENT, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known names: {', '.join(ENVIRONMENT)}"
            messages.append(f"environment variable {name} is not read by anything; {hint}")
    return tuple(messages)


def _files(file: str | Path | None, environ: Mapping[str, str], user_dir: Path) -> list[tuple[SourceKind, Path]]:
    # weakest first
    found: list[tuple[SourceKind, Path]] = []
    if (user_dir / CONFIG_FILE_NAME).is_file():
        found.append(("file", user_dir / CONFIG_FILE_NAME))
    if named := environ.get("MAC_KERNELS_CONFIG"):
        path = Path(named).expanduser()
        if not path.exists():
            raise ConfigError(f"MAC_KERNELS_CONFIG={named} does not exist; name a JSON config file or its folder")
        if path.is_dir() and not (path / CONFIG_FILE_NAME).is_file():
            raise ConfigError(f"MAC_KERNELS_CONFIG={named} is a folder without {CONFIG_FILE_NAME}; put one there")
        found.append(("environment", path / CONFIG_FILE_NAME if path.is_dir() else path))
    if file is not None:
        found.append(("argument", Path(file).expanduser()))
    return found


def _merge(layers: list[_Layer], files: tuple[Path, ...]) -> ResolvedConfig:
    config = MacConfig()
    sources: dict[str, Source] = {}
    for layer in layers:
        if layer.preset is not None:
            config = MacConfig.preset(layer.preset)
            origin = Source(layer.kind, f"preset {layer.preset}" + (f" in {layer.where}" if layer.where else ""))
            sources = {field.name: origin for field in dataclasses.fields(config)}
        # built layer by layer, so that an error names the one that is wrong
        config = MacConfig.from_dict({**config.to_dict(), **layer.fields}, source=layer.where)
        sources.update(dict.fromkeys(layer.fields, Source(layer.kind, layer.where)))
    return ResolvedConfig(config, sources, files)
