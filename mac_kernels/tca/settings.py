"""The settings of TCA for a model: its calibrated budgets, changed by the section ``tca`` of config files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import read_config
from ..errors import ConfigError
from ..settings import resolve_config
from ..tuned import ModelKey
from .budgets import TcaBudgets, locate_budgets
from .config import TcaConfig


@dataclass(frozen=True, slots=True)
class ResolvedTca:
    """A config, the budgets that it is for, and where both come from.

    ``choices`` candidate of every layer and kv head; ``budgets_path`` file of the budgets; ``changed`` field of the
    config by the file that sets it, the others are those of the calibration; ``files`` all config files that were read,
    strongest first.
    """

    config: TcaConfig
    budgets: TcaBudgets
    choices: tuple[tuple[int, ...], ...]
    budgets_path: Path
    changed: Mapping[str, Path]
    files: tuple[Path, ...]


def resolve_tca(
    key: ModelKey, *, environ: Mapping[str, str] | None = None, user_dir: Path | None = None
) -> ResolvedTca:
    """Find the budgets of a model and merge what config files say of TCA, in the order of :mod:`mac_kernels.settings`.

    Parameters
    ----------
    key : ModelKey
        The model.
    environ : mapping, optional
        Default: ``os.environ``.
    user_dir : Path, optional
        The user's folder. Default: :func:`mac_kernels.places.user_config_dir`.

    Raises
    ------
    ConfigError
        If there are no budgets (the message says how to calibrate), a file is wrong, or a value does not fit what was
        calibrated for.
    """
    budgets, path = locate_budgets(key, environ=environ, user_dir=user_dir)
    files = resolve_config(environ=environ, user_dir=user_dir).files
    config, changed = budgets.config, dict[str, Path]()
    for file in reversed(files):
        section = json.loads(read_config(file)).get("tca", {})
        if not isinstance(section, dict):
            raise ConfigError(f"{file}: 'tca' must be an object of TcaConfig fields, got {type(section).__name__}")
        config = TcaConfig.from_dict({**config.to_dict(), **section}, source=f"{file}: tca")
        changed.update(dict.fromkeys(section, file))
    return ResolvedTca(config, budgets, budgets.choices(config), path, changed, files)
