"""``doctor --sglang`` names the step that fails."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from mac_cli.app import app
from mac_cli.output import ExitCode
from mac_sglang import doctor, status
from mac_sglang.compat import SGLangChanged


@pytest.fixture(autouse=True)
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_STEPS", {})


@pytest.mark.skipif(find_spec("sglang") is not None, reason="SGLang is installed")
def test_missing_sglang_is_the_first_step_and_says_what_to_install() -> None:
    result = CliRunner().invoke(app, ["doctor", "--sglang", "--json"])
    steps = json.loads(result.stdout)["sglang"]
    assert [step["works"] for step in steps] == [False]
    assert 'pip install "mac-kernels[sglang]"' in steps[0]["problem"]
    assert result.exit_code == ExitCode.CHECK_FAILED


def test_plugin_that_the_environment_leaves_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = SimpleNamespace(name="mac", value="mac_sglang.plugin:register")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [ours])
    monkeypatch.setenv("SGLANG_PLUGINS", "another, mac")
    doctor._found()
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    with pytest.raises(SGLangChanged, match="SGLANG_PLUGINS=another leaves mac out; add it"):
        doctor._found()


def test_without_the_option_sglang_is_not_looked_at() -> None:
    assert json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["sglang"] == []


def test_steps_are_recorded_in_order_with_their_problems() -> None:
    def fail() -> None:
        raise ImportError("cannot import name 'X'")

    assert status.attempt("first", lambda: None)
    assert not status.attempt("second", fail)
    assert [(step.name, step.done) for step in status.steps()] == [("first", True), ("second", False)]
    assert status.problems() == ("second: ImportError: cannot import name 'X'",)
    assert status.summary() == "first: done; second: FAILED, ImportError: cannot import name 'X'"
