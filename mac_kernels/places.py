"""Where configuration lies: the folder that the environment names, the user's, the package's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .errors import ConfigError

CONFIG_VARIABLE = "MAC_KERNELS_CONFIG"
PlaceKind = Literal["environment", "user", "bundled"]


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of config files, or a single one, and what names it."""

    kind: PlaceKind
    path: Path


def config_places(environ: Mapping[str, str] | None = None, user_dir: Path | None = None) -> tuple[Place, ...]:
    """Return the places of configuration, strongest first: ``MAC_KERNELS_CONFIG``, the user's folder, the package.

    Raises
    ------
    ConfigError
        If ``MAC_KERNELS_CONFIG`` names something that does not exist, or a folder without a JSON file.
    """
    places = [
        Place("user", user_config_dir() if user_dir is None else user_dir),
        Place("bundled", Path(__file__).parent / "tuned" / "bundled"),
    ]
    if named := (os.environ if environ is None else environ).get(CONFIG_VARIABLE):
        path = Path(named).expanduser()
        if not path.exists():
            raise ConfigError(f"{CONFIG_VARIABLE}={named} does not exist; name a JSON config file or its folder")
        if path.is_dir() and not any(path.glob("*.json")):
            raise ConfigError(f"{CONFIG_VARIABLE}={named} is a folder without config.json or tuned files; put one")
        places.insert(0, Place("environment", path))
    return tuple(places)


def user_config_dir() -> Path:
    """Return the folder of the user's configuration on this system."""
    from platformdirs import user_config_path

    return user_config_path("mac-kernels", appauthor=False)
