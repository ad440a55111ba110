"""The precedence of settings, and that every value knows where it comes from."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from mac_kernels import PRESETS, ConfigError, MacConfig
from mac_kernels.settings import ENVIRONMENT, Source, resolve_config, unknown_variables


def write(path: Path, *, preset: str | None = None, **fields: Any) -> Path:
    document = {"schema": 1, "mac": fields} | ({"preset": preset} if preset else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def user_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "user"
    folder.mkdir()
    return folder


def test_nothing_given_is_the_preset_careful(user_dir: Path) -> None:
    resolved = resolve_config(environ={}, user_dir=user_dir)
    assert resolved.config == MacConfig() == PRESETS["careful"]
    assert set(resolved.sources.values()) == {Source("preset", "preset careful")}
    assert set(resolved.sources) == {field.name for field in dataclasses.fields(MacConfig)}
    assert resolved.files == ()


def test_every_stronger_layer_wins_over_every_weaker_one(user_dir: Path, tmp_path: Path) -> None:
    """All sixteen combinations of the four layers above the preset."""
    for given in itertools.product([False, True], repeat=4):
        by_argument, by_file_argument, by_environment, by_user = given
        (user_dir / "config.json").unlink(missing_ok=True)
        if by_user:
            write(user_dir / "config.json", window=100)
        environ = {"MAC_KERNELS_CONFIG": str(write(tmp_path / "env.json", window=200))} if by_environment else {}
        file = write(tmp_path / "named.json", window=300) if by_file_argument else None
        changes = {"window": 400} if by_argument else {}
        resolved = resolve_config(file=file, changes=changes, environ=environ, user_dir=user_dir)
        expected = (
            (400, Source("argument", "given explicitly"))
            if by_argument
            else (300, Source("argument", str(file)))
            if by_file_argument
            else (200, Source("environment", environ.get("MAC_KERNELS_CONFIG", "")))
            if by_environment
            else (100, Source("file", str(user_dir / "config.json")))
            if by_user
            else (512, Source("preset", "preset careful"))
        )
        assert (resolved.config.window, resolved.sources["window"]) == expected
        assert resolved.sources["band"] == Source("preset", "preset careful")
        assert len(resolved.files) == sum(given[1:])


def test_files_are_merged_value_by_value(user_dir: Path, tmp_path: Path) -> None:
    write(user_dir / "config.json", window=100, band=64)
    environ = {"MAC_KERNELS_CONFIG": str(write(tmp_path / "env.json", band=32))}
    resolved = resolve_config(environ=environ, user_dir=user_dir)
    assert (resolved.config.window, resolved.config.band) == (100, 32)
    assert (resolved.sources["window"].kind, resolved.sources["band"].kind) == ("file", "environment")


def test_a_preset_replaces_everything_below_it(user_dir: Path, tmp_path: Path) -> None:
    write(user_dir / "config.json", window=100)
    resolved = resolve_config("fast", environ={}, user_dir=user_dir)
    assert resolved.config == PRESETS["fast"]
    assert resolved.sources["window"] == Source("argument", "preset fast")

    path = write(tmp_path / "env.json", preset="balanced", band=128)
    resolved = resolve_config(environ={"MAC_KERNELS_CONFIG": str(path)}, user_dir=user_dir)
    assert resolved.config == dataclasses.replace(PRESETS["balanced"], band=128)
    assert resolved.sources["window"] == Source("environment", f"preset balanced in {path}")
    assert resolved.sources["band"] == Source("environment", str(path))


def test_the_environment_may_name_a_folder(user_dir: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "folder" / "config.json", window=77)
    resolved = resolve_config(environ={"MAC_KERNELS_CONFIG": str(path.parent)}, user_dir=user_dir)
    assert resolved.config.window == 77
    assert resolved.sources["window"] == Source("environment", str(path))


def test_an_empty_variable_is_an_unset_one(user_dir: Path) -> None:
    assert resolve_config(environ={"MAC_KERNELS_CONFIG": ""}, user_dir=user_dir).files == ()


def test_a_written_config_comes_back(user_dir: Path, tmp_path: Path) -> None:
    config = MacConfig(window=64, threshold=float("-inf"), influence=None, max_age=None)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert resolve_config(file=path, environ={}, user_dir=user_dir).config == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"schema": 2}', "schema 2 is not 1"),
        ('{"schema": 1, "macs": {}}', "unknown key 'macs'; known keys: schema, preset, mac"),
        ('{"schema": 1, "mac": []}', "'mac' must be an object"),
        ('{"schema": 1, "preset": "fats"}', "unknown preset 'fats'; choose one of careful"),
        ('{"schema": 1, "preset": ["fast"]}', "unknown preset \\['fast'\\]"),
        ('{"schema": 1, "mac": {"windw": 3}}', "unknown key 'windw' \\(did you mean 'window'\\?\\)"),
        ('{"schema": 1, "mac": {"window": 0}}', "window=0 must be >= 2 rows"),
        ('{"schema": 1, "mac": {"window": "8"}}', "window='8' must be an integer"),
        ('{"schema": 1, "mac": {"threshold": NaN}}', "NaN is not JSON"),
        ('{"schema": 1, "mac": {"band": 4000}}', "min_context=2048 must be > band \\+ sinks = 4004"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(user_dir: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "wrong.json"
    path.write_text(content)
    for arguments in ({"file": path, "environ": {}}, {"environ": {"MAC_KERNELS_CONFIG": str(path)}}):
        with pytest.raises(ConfigError, match=message) as caught:
            resolve_config(**arguments, user_dir=user_dir)
        assert str(path) in str(caught.value)


def test_a_wrong_user_file_is_not_passed_over(user_dir: Path) -> None:
    (user_dir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        resolve_config(environ={}, user_dir=user_dir)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"file": "/nowhere/config.json"}, "/nowhere/config.json: cannot be read"),
        ({"environ": {"MAC_KERNELS_CONFIG": "/nowhere"}}, "MAC_KERNELS_CONFIG=/nowhere does not exist"),
        ({"preset": "fast", "file": "x.json"}, "are both given; give one"),
        ({"preset": "fats"}, "unknown preset 'fats' \\(did you mean 'fast'\\?\\)"),
        ({"changes": {"windw": 3}}, "given explicitly: unknown key 'windw' \\(did you mean 'window'\\?\\)"),
        ({"changes": {"threshold": float("nan")}}, "threshold=nan must be a number, not NaN"),
    ],
)
def test_wrong_arguments_are_refused(user_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_config(**{"environ": {}, "user_dir": user_dir} | arguments)


def test_a_folder_without_a_config_is_refused(user_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder without config\.json"):
        resolve_config(environ={"MAC_KERNELS_CONFIG": str(tmp_path)}, user_dir=user_dir)


def test_unknown_variables_warn_with_the_nearest_name(user_dir: Path) -> None:
    assert unknown_variables({"MAC_KERNELS_CONFG": "x", "MAC_OTHER": "y", **dict.fromkeys(ENVIRONMENT, "z")}) == (
        "environment variable MAC_KERNELS_CONFG is not read by anything; did you mean MAC_KERNELS_CONFIG?",
    )
    with pytest.warns(UserWarning, match="did you mean MAC_KERNELS_CACHE"):
        resolve_config(environ={"MAC_KERNELS_CACH": "x"}, user_dir=user_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_config(environ={"MAC_KERNELS_CACHE": "x"}, user_dir=user_dir)
