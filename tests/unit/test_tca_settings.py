"""TCA: where a server's settings come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_tca_budgets import BUDGETS, CONFIG, KEY

from mac_kernels import ConfigError, resolve_config
from mac_kernels.tca.settings import resolve_tca


def write(path: Path, section: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "tca": section}))
    return path


def test_without_a_section_the_calibrated_config_is_used(tmp_path: Path) -> None:
    path = tmp_path / BUDGETS.file_name
    BUDGETS.save(path)
    found = resolve_tca(KEY, environ={}, user_dir=tmp_path)
    assert found.config == CONFIG and found.budgets == BUDGETS and found.budgets_path == path
    assert found.choices == BUDGETS.choices(CONFIG) and not found.changed and not found.files


def test_the_section_of_the_environment_wins_over_the_users_value_by_value(tmp_path: Path) -> None:
    user, named = tmp_path / "user", tmp_path / "env" / "server.json"
    BUDGETS.save(user / BUDGETS.file_name)
    weaker = write(user / "config.json", {"mass_target": 0.5, "refresh": 8})
    write(named, {"mass_target": 0.9})
    found = resolve_tca(KEY, environ={"MAC_KERNELS_CONFIG": str(named)}, user_dir=user)
    assert (found.config.mass_target, found.config.refresh) == (0.9, 8)
    assert found.changed == {"mass_target": named, "refresh": weaker}
    assert found.choices == BUDGETS.choices(found.config) != BUDGETS.choices(CONFIG)


def test_the_environment_may_name_the_budgets_themselves(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    BUDGETS.save(path)
    environ = {"MAC_KERNELS_CONFIG": str(path)}
    assert resolve_tca(KEY, environ=environ, user_dir=tmp_path / "none").budgets_path == path
    assert resolve_config(environ=environ, user_dir=tmp_path / "none").files == ()


def test_missing_budgets_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mac-kernels tca calibrate --model tiny"):
        resolve_tca(KEY, environ={}, user_dir=tmp_path)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"mass_targt": 1}, "did you mean 'mass_target'"),
        ([1], "'tca' must be an object"),
        ({"mass_target": 2}, "mass_target=2 must be in"),
        ({"local_window": 1024}, r"calibrated for 512; calibrate again"),
    ],
)
def test_a_wrong_section_is_refused(section: object, words: str, tmp_path: Path) -> None:
    BUDGETS.save(tmp_path / BUDGETS.file_name)
    write(tmp_path / "config.json", section)
    with pytest.raises(ConfigError, match=words):
        resolve_tca(KEY, environ={}, user_dir=tmp_path)
