"""Where a setting comes from: one list of precedence, and the source of every value.

From strongest to weakest: explicit argument, ``MAC_KERNELS_CONFIG`` (a file, or a folder), the user's folder, the
tuned policies of the package, preset. In a folder, ``config.json`` wins over the policy that was tuned for the model.
Layers are merged value by value; a preset named by a layer replaces every value below.
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
from .places import CONFIG_VARIABLE, config_places, user_config_dir
from .tuned import Found, ModelKey, PolicyFile, find_policy, from_json, kind_of

SourceKind = Literal["argument", "environment", "file", "bundled", "preset"]
CONFIG_FILE_NAME = "config.json"
DEFAULT_PRESET = "careful"
ENV_PREFIX = "MAC_KERNELS_"


@dataclass(frozen=True, slots=True)
class EnvironmentVariable:
    """One environment variable: its default and what it does, in words."""

    default: str
    effect: str


ENVIRONMENT: dict[str, EnvironmentVariable] = {
    CONFIG_VARIABLE: EnvironmentVariable("unset", "JSON config or tuned file, or a folder that holds such files"),
    "MAC_KERNELS_CACHE": EnvironmentVariable("the user's cache folder", "downloaded model weights, traces, studies"),
}
"""Every variable that any part of the project reads; others with the prefix are warned about."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a value comes from: ``kind``, and ``where`` in words (a path, a preset name, an option)."""

    kind: SourceKind
    where: str


@dataclass(frozen=True, slots=True)
class ResolvedConfig:
    """A config, the source of every field by name, and the files that were read (strongest first).

    ``why``: sentences about the tuned policy of the model; empty if no model was given.
    """

    config: MacConfig
    sources: Mapping[str, Source]
    files: tuple[Path, ...]
    why: tuple[str, ...] = ()

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
    model: ModelKey | None = None,
) -> ResolvedConfig:
    """Merge arguments, environment, user file, tuned policy and preset into one config.

    Parameters
    ----------
    preset : str, optional
        A name of :data:`mac_kernels.PRESETS`; replaces everything that files say.
    file : str or Path, optional
        A JSON config or tuned policy to use; not together with ``preset`` (the file may name one itself).
    changes : mapping, optional
        Fields of :class:`mac_kernels.MacConfig`; they win over everything.
    environ : mapping, optional
        Default: ``os.environ``.
    user_dir : Path, optional
        The user's folder, which may be absent. Default: :func:`user_config_dir`.
    model : ModelKey, optional
        The model to look up a tuned policy for. Default: none is looked up.

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
    policy, why = _policy(model, environ, user_dir)
    files = _files(file, environ, user_dir)
    if policy is not None:
        # just below the plain config of the same place
        rank = _RANK[_KIND[policy.kind]]
        files.insert(sum(_RANK[kind] < rank for kind, _ in files), (_KIND[policy.kind], policy.path))
    layers = [
        _Layer("preset", "", DEFAULT_PRESET),
        *(_file_layer(kind, path) for kind, path in files),
        _Layer("argument", "", preset),
        _Layer("argument", "given explicitly", None, changes or {}),
    ]
    return dataclasses.replace(_merge(layers, tuple(path for _, path in reversed(files))), why=why)


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


_RANK: dict[SourceKind, int] = {"preset": 0, "bundled": 1, "file": 2, "environment": 3, "argument": 4}
_KIND: dict[str, SourceKind] = {"environment": "environment", "user": "file", "bundled": "bundled"}


def _policy(
    model: ModelKey | None, environ: Mapping[str, str], user_dir: Path
) -> tuple[Found[PolicyFile] | None, tuple[str, ...]]:
    """The tuned policy of a model, and a sentence about it."""
    if model is None:
        return None, ()
    found = find_policy(model, environ=environ, user_dir=user_dir)
    name = model.short_name or "this model"
    if found is None:
        return None, (f"no tuned policy for {name}; to tune: mac-kernels tune policy --model {model.name or 'MODEL'}",)
    tuned_for = found.file.key
    how = "" if model.same_name(tuned_for) else f", which has its shape (tuned for {tuned_for.short_name})"
    return found, (f"policy of {name}: {found.path}{how}",)


def _files(file: str | Path | None, environ: Mapping[str, str], user_dir: Path) -> list[tuple[SourceKind, Path]]:
    """Plain configs, weakest first; tuned files are found by what they are for."""
    found: list[tuple[SourceKind, Path]] = []
    if (user_dir / CONFIG_FILE_NAME).is_file():
        found.append(("file", user_dir / CONFIG_FILE_NAME))
    for place in config_places(environ, user_dir):
        if place.kind == "environment":
            path = place.path / CONFIG_FILE_NAME if place.path.is_dir() else place.path
            if path.is_file() and kind_of(read_config(path)) is None:
                found.append(("environment", path))
    if file is not None:
        found.append(("argument", Path(file).expanduser()))
    return found


def _file_layer(kind: SourceKind, path: Path) -> _Layer:
    """What a file says: a plain config, or a tuned policy with all its values."""
    text = read_config(path)
    if kind_of(text) is None:
        return _Layer(kind, str(path), *parse_config(text, source=str(path)))
    file = from_json(text, source=str(path))
    if not isinstance(file, PolicyFile):
        raise ConfigError(f"{path}: holds launch parameters, no config; put it where MAC_KERNELS_CONFIG points")
    return _Layer(kind, str(path), None, file.config.to_dict())


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
