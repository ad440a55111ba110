"""Serving options come from the config files' section ``serving``, value by value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mac_kernels import ConfigError, MacConfig
from mac_sglang.options import ServingOptions, read_options


def write(folder: Path, name: str, serving: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"schema": 1, "preset": "fast", "serving": serving}))
    return path


def test_defaults_without_files() -> None:
    assert read_options(()) == ServingOptions()


def test_stronger_file_wins_value_by_value(tmp_path: Path) -> None:
    strong = write(tmp_path, "strong.json", {"ring_memory_gb": 2})
    weak = write(tmp_path, "weak.json", {"ring_memory_gb": 1, "audit_rate": 0.5})
    assert read_options((strong, weak)) == ServingOptions(ring_memory_gb=2, audit_rate=0.5)


def test_section_does_not_disturb_the_policy(tmp_path: Path) -> None:
    assert MacConfig.load(write(tmp_path, "c.json", {"audit_rate": 0.1})) == MacConfig.preset("fast")


@pytest.mark.parametrize(
    ("serving", "message"),
    [
        ({"ring_memory": 1}, "unknown serving option 'ring_memory'"),
        ({"ring_memory_gb": 0}, "ring_memory_gb=0 must be a number > 0"),
        ({"snapshot_memory_gb": -1}, "snapshot_memory_gb=-1 must be"),
        ({"audit_rate": 2}, "audit_rate=2 must be"),
        ({"audit_rate": True}, "audit_rate=True must be"),
        ([1], "'serving' must be an object"),
    ],
)
def test_wrong_section_names_the_file_and_the_option(tmp_path: Path, serving: object, message: str) -> None:
    path = write(tmp_path, "wrong.json", serving)
    with pytest.raises(ConfigError, match=r"wrong\.json") as error:
        read_options((path,))
    assert message in str(error.value)
