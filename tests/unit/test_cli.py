"""The command: what it prints, what it returns, and what it says when the input is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mac_cli.app import main
from mac_cli.output import ExitCode
from mac_cli.support import markdown_lines
from mac_kernels import MacConfig
from mac_kernels.support import BACKENDS, FEATURES, support_table


class Result(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("MAC_KERNELS_CONFIG", raising=False)
    monkeypatch.setattr("mac_kernels.settings.user_config_dir", lambda: tmp_path / "no-user-config")

    def run(*args: str) -> Result:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run


VERBS = ["doctor", "support", "ab", "demo", "config show", "eval kl", "eval needle", "eval sketch", "tca calibrate"]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_has_one_example(command, verb: str) -> None:
    result = command(*verb.split(), "--help")
    assert result.code == ExitCode.OK
    assert result.out.count(f"Example: mac-kernels {verb or 'doctor'}") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_speaks_json(command, verb: str) -> None:
    assert "--json" in command(*verb.split(), "--help").out


def test_help_documents_the_exit_codes(command) -> None:
    text = " ".join(command("--help").out.split())
    for code in ExitCode:
        assert f"{code.value}: {code.meaning}".replace("`", "") in text


def test_doctor_proves_the_reference_backend(command) -> None:
    report = command("doctor", "--json").json()
    assert report["packages"]["mac-kernels"]
    assert set(report["packages"]) > {"torch", "triton", "sglang", "flashinfer-python"}
    (reference,) = [row for row in report["backends"] if (row["backend"], row["device"]) == ("reference", "cpu")]
    assert reference["works"] and reference["max_abs_error"] < 1e-5
    assert report["problems"] == []


def test_doctor_sees_a_backend_that_computes_wrongly(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mac_cli.probe._exact_step_error", lambda *_: 0.5)
    result = command("doctor", "--json")
    assert result.code == ExitCode.CHECK_FAILED
    assert "off plain attention by 5.0e-01" in result.json()["backends"][-1]["problem"]


def test_doctor_sees_a_backend_that_breaks(command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr("mac_cli.probe._exact_step_error", broken)
    result = command("doctor")
    assert result.code == ExitCode.CHECK_FAILED
    assert "RuntimeError: no kernel image is available" in result.out


def test_doctor_reports_a_bad_environment(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAC_KERNELS_CONFIG", "/nowhere")
    monkeypatch.setenv("MAC_KERNELS_CONFG", "x")
    result = command("doctor", "--json")
    assert result.code == ExitCode.CHECK_FAILED
    assert [problem.split(";")[0] for problem in result.json()["problems"]] == [
        "environment variable MAC_KERNELS_CONFG is not read by anything",
        "MAC_KERNELS_CONFIG=/nowhere does not exist",
    ]


def test_config_show_names_every_source(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"schema": 1, "mac": {"band": 128}}')
    monkeypatch.setenv("MAC_KERNELS_CONFIG", str(path))
    shown = command("config", "show", "--set", "threshold=inf", "--set", "window=64", "--json").json()
    assert shown["values"]["threshold"] == {"value": "inf", "source": "argument", "where": "given explicitly"}
    assert shown["values"]["window"]["value"] == 64
    assert shown["values"]["band"] == {"value": 128, "source": "environment", "where": str(path)}
    assert shown["values"]["sinks"] == {"value": 4, "source": "preset", "where": "preset careful"}
    assert set(shown["values"]) == set(MacConfig().to_dict())
    assert shown["files"] == [str(path)]


def test_config_show_as_a_table_has_every_field(command) -> None:
    misses = '{"refresh": 64, "local_window": 1024, "mass_target": 0.98}'
    nested = command("config", "show", "--set", f"tca={misses}").out
    assert '"local_window": 1024' in nested and '"refresh": 64' in nested
    text = command("config", "show", "--preset", "balanced").out
    assert all(name in text for name in MacConfig().to_dict())
    assert "preset balanced" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "fats"], "unknown preset 'fats' (did you mean 'fast'?)"),
        (["--config", "/nowhere.json"], "/nowhere.json: cannot be read"),
        (["--config", "x.json", "--preset", "fast"], "are both given; give one"),
        (["--set", "window"], "expected KEY=VALUE, e.g. --set window=1024"),
        (["--set", "windw=3"], "unknown key 'windw' (did you mean 'window'?)"),
        (["--set", "window=3", "--set", "window=4"], "window is already set to 3; give every key once"),
        (["--set", "window=many"], "window='many' must be an integer"),
        (["--set", "threshold=NaN"], "threshold=nan must be a number, not NaN"),
        (["--set", "match_scope=row"], "match_scope='row' must be 'head' or 'group'"),
    ],
)
def test_wrong_config_input_ends_with_one_message(command, args: list[str], message: str) -> None:
    result = command("config", "show", *args)
    assert result.code == ExitCode.INPUT
    assert result.out == ""
    assert result.err.startswith("error: ") and message in result.err
    assert "Traceback" not in result.err


def test_an_unknown_option_is_an_input_error(command) -> None:
    assert command("doctor", "--jsn").code == ExitCode.INPUT


def test_support_table_covers_every_feature_and_backend(command) -> None:
    rows = command("support", "--json").json()
    assert list(rows) == [feature.label for feature in FEATURES]
    assert all(list(cells) == list(BACKENDS) for cells in rows.values())
    assert len(command("support", "--markdown").out.splitlines()) == len(FEATURES) + 2


def test_a_no_in_the_support_table_says_why() -> None:
    assert markdown_lines({"head_dim 80": {"fast": ("head_dim=80 is not 64 or 128",), "reference": ()}}) == [
        "| feature | fast | reference |",
        "|---|---|---|",
        "| head_dim 80 | no: head_dim=80 is not 64 or 128 | yes |",
    ]


def test_the_table_has_both_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert {bool(reasons) for cells in support_table().values() for reasons in cells.values()} == {False, True}


def test_the_reference_supports_everything_in_the_table() -> None:
    assert {cells["reference"] for cells in support_table().values()} == {()}


def test_there_is_no_colour_when_piped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mac_cli.app import main; main(['config', 'show'])"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert "\x1b" not in done.stdout + done.stderr
    assert "window" in done.stdout
