"""Calibrated budgets of a model: what was measured, its JSON form, and where it is found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import read_config
from ..errors import ConfigError
from ..files import write_whole
from ..places import Place, config_places
from ..tuned import ModelKey, kind_of
from ..tuned.schema import plain
from .calibrate import MEASURES, Measure, choose
from .candidates import NUM_SPARSE, far_count, mean_keep
from .config import TcaConfig, far_blocks, far_end

SCHEMA_VERSION = 1
RetainedMass = tuple[tuple[tuple[float, ...], ...], ...]
"""By layer, kv head and sparse candidate."""
_CALIBRATED_FOR = ("block", "local_window", "sinks", "rule", "alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRun:
    """How the budgets were measured.

    ``texts`` by name, ``samples`` passages of ``tokens`` tokens each; ``versions`` of packages by name; ``command``
    measures it again.
    """

    texts: tuple[str, ...]
    samples: int
    tokens: int
    versions: Mapping[str, str]
    date: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TcaBudgets:
    """Retained mass of every kv head of a model under every sparse candidate.

    Parameters
    ----------
    key : ModelKey
        The model.
    config : TcaConfig
        What was calibrated for; ``mass_target`` and ``mode`` may be others later.
    measure : {"raw", "norm", "row"}
        What the masses are (:data:`mac_kernels.tca.calibrate.MEASURES`).
    retained : table of float
        By layer, kv head and candidate, the smallest first; averages over the passages.
    run : CalibrationRun
        Where it comes from.

    Raises
    ------
    ConfigError
        If the table is not one of finite numbers by layer, kv head and candidate.
    """

    key: ModelKey
    config: TcaConfig
    measure: Measure
    retained: RetainedMass
    run: CalibrationRun

    def __post_init__(self) -> None:
        shape = (self.key.num_layers, self.key.num_kv_heads, NUM_SPARSE)
        rows = [head for layer in self.retained for head in layer]
        good = len(self.retained) == shape[0] and all(len(layer) == shape[1] for layer in self.retained)
        if not good or any(len(row) != NUM_SPARSE or not all(map(_is_finite, row)) for row in rows):
            raise ConfigError(f"retained must hold finite numbers of shape {list(shape)}: layer, kv head, candidate")
        if self.measure not in MEASURES:
            raise ConfigError(f"measure={self.measure!r} must be one of {', '.join(MEASURES)}")

    @property
    def file_name(self) -> str:
        """Name of the file for this model."""
        return f"tca,model={plain(self.key.short_name) or 'unnamed'}.json"

    def choices(self, config: TcaConfig) -> tuple[tuple[int, ...], ...]:
        """Candidate of every layer and kv head at ``config.mass_target``.

        Raises
        ------
        ConfigError
            If the config has another block, window or rule than was calibrated for.
        """
        for name in _CALIBRATED_FOR:
            asked, have = getattr(config, name), getattr(self.config, name)
            if asked != have and not (name == "alpha" and config.rule == "ours"):
                raise ConfigError(
                    f"tca.{name}={asked!r}, but the budgets of {self.key.short_name} were calibrated for {have!r}; "
                    f"calibrate again: mac-kernels tca calibrate --model {self.key.name or 'MODEL'}"
                )
        return tuple(tuple(choose(head, config.mass_target) for head in layer) for layer in self.retained)

    def far_share(self, config: TcaConfig) -> float:
        """Share of the far region that the heads keep on average at ``config.mass_target``."""
        chosen = [candidate for layer in self.choices(config) for candidate in layer]
        return sum(mean_keep(candidate, config.block) for candidate in chosen) / (len(chosen) * config.block)

    def share_read(self, config: TcaConfig, context: int) -> float:
        """Share of a context, in tokens, that a decode step reads at ``config.mass_target``: mean over all heads."""
        blocks = far_blocks(context - 1, config)
        window = context - far_end(blocks, config)
        chosen = [candidate for layer in self.choices(config) for candidate in layer]
        kept = [context if one == NUM_SPARSE else far_count(one, blocks, config) + window for one in chosen]
        return sum(kept) / (len(kept) * context)

    def to_json(self) -> str:
        """Return the JSON form."""
        config = {name: getattr(self.config, name) for name in (*_CALIBRATED_FOR, "mass_target")}
        body = {"key": dataclasses.asdict(self.key), "tca": config, "measure": self.measure}
        head = json.dumps(
            {"schema": SCHEMA_VERSION, "kind": "tca", **body, "run": dataclasses.asdict(self.run)}, indent=1
        )
        layers = ",\n".join("  " + json.dumps(layer) for layer in self.retained)  # a line a layer
        return f'{head[:-2]},\n "retained": [\n{layers}\n ]\n}}\n'

    @staticmethod
    def from_json(text: str, *, source: str) -> TcaBudgets:
        """Parse the JSON form.

        Raises
        ------
        ConfigError
            If it is no such file, of another schema, or has unknown, missing or wrong values; the message names it.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise _wrong(source, f"is not valid JSON ({error})") from None
        if not isinstance(data, dict) or data.get("kind") != "tca" or data.get("schema") != SCHEMA_VERSION:
            raise _wrong(source, f'is no file of TCA budgets of schema {SCHEMA_VERSION} ("kind": "tca")')
        body = {name: value for name, value in data.items() if name not in ("kind", "schema")}
        body["config"] = TcaConfig.from_dict(_object(body.pop("tca", None), source, "tca"), source=f"{source}: tca")
        try:
            body["key"] = ModelKey(**_object(body.get("key"), source, "key"))
            run = _object(body.get("run"), source, "run")
            body["run"] = CalibrationRun(**{**run, "texts": tuple(run.get("texts", ()))})
            body["retained"] = tuple(tuple(tuple(head) for head in layer) for layer in body.get("retained", ()))
            return TcaBudgets(**body)
        except (TypeError, ConfigError) as error:
            raise _wrong(source, f"has wrong, missing or unknown values ({error})") from None

    @staticmethod
    def load(path: str | Path) -> TcaBudgets:
        """Read a file.

        Raises
        ------
        ConfigError
            If it cannot be read or is wrong.
        """
        return TcaBudgets.from_json(read_config(path), source=str(path))

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.to_json())


def find_budgets(
    key: ModelKey, *, environ: Mapping[str, str] | None = None, user_dir: Path | None = None
) -> TcaBudgets:
    """The budgets of a model, see :func:`locate_budgets`."""
    return locate_budgets(key, environ=environ, user_dir=user_dir)[0]


def locate_budgets(
    key: ModelKey, *, environ: Mapping[str, str] | None = None, user_dir: Path | None = None
) -> tuple[TcaBudgets, Path]:
    """The budgets of a model and their file: what ``MAC_KERNELS_CONFIG`` names, the user's folder, the package's own.

    The variable names a folder or the file itself. In a folder a file of the model's name and shape wins over one of
    its shape alone.

    Raises
    ------
    ConfigError
        If no place has any, or a file is broken; the message says how to calibrate.
    """
    for place in config_places(environ, user_dir):
        files = [(TcaBudgets.load(path), path) for path in _paths(place)]
        fitting = [found for found in files if found[0].key.same_shape(key)]
        if fitting:
            return next((found for found in fitting if found[0].key.same_name(key)), fitting[0])
    name = key.short_name or "this model"
    raise ConfigError(
        f"no TCA budgets for {name}; calibrate it once: mac-kernels tca calibrate --model {key.name or 'MODEL'}"
    )


def _paths(place: Place) -> list[Path]:
    if place.path.is_file():
        return [place.path] if kind_of(read_config(place.path)) == "tca" else []
    return sorted(place.path.glob("tca,*.json"))


def _object(value: Any, source: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(source, f"{where}: expected an object, got {type(value).__name__}")
    return value


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(source: str, what: str) -> ConfigError:
    return ConfigError(f"{source}: {what}; write it again with `mac-kernels tca calibrate`, or delete it")
