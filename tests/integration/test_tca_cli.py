"""``mac-kernels tca calibrate`` on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCAB

from mac_autotune.calibrate_tca import calibrate
from mac_autotune.quality import texts
from mac_cli.app import main
from mac_cli.output import ExitCode
from mac_kernels.tca import TcaBudgets, TcaConfig

pytestmark = pytest.mark.usefixtures("one_thread")
ARGS = ["--texts", "code", "--passages", "2", "--tokens", "200", "--local-window", "32", "--block", "16"]


class Tiny:
    """Weights of a random model, with a tokenizer that takes bytes for tokens."""

    name = "tiny.gguf"

    @staticmethod
    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[byte % VOCAB for byte in text[:5000].encode()])

    @staticmethod
    def load() -> tuple[Any, Any]:
        return FAMILIES["llama"].build(), Tiny.tokenizer


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("mac_transformers.weights.find_weights", lambda model: Tiny())

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["tca", "calibrate", *args])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_the_file_holds_what_was_measured(run: Any, tmp_path: Path) -> None:
    code, out, _ = run(*ARGS, "--output", str(tmp_path), "--json")
    assert code == ExitCode.OK
    budgets = TcaBudgets.load(tmp_path / "tca,model=tiny.json")
    config = TcaConfig(block=16, local_window=32)
    passages = texts.passages(Tiny.tokenizer, "code", length=200, count=2, seed=3)
    expected = calibrate(Tiny.load()[0], list(passages), config=config)
    assert (budgets.config, budgets.measure, budgets.retained) == (config, "row", expected["row"])
    assert (budgets.run.texts, budgets.run.samples, budgets.run.tokens) == (("code",), 2, 200)
    assert str(tmp_path) not in json.dumps(budgets.to_json())
    said = json.loads(out)
    assert said["path"] == str(tmp_path / "tca,model=tiny.json")
    for measure, shares in said["far_share"].items():
        other = dataclasses.replace(budgets, retained=expected[measure])
        for target, share in shares.items():
            asked = dataclasses.replace(config, mass_target=float(target))
            assert share == pytest.approx(other.far_share(asked), abs=1e-4)
    assert torch.tensor(said["choices"]).shape == (2, 2)


def test_the_table_says_where_the_file_is(run: Any, tmp_path: Path) -> None:
    code, out, _ = run(*ARGS, "--output", str(tmp_path), "--measure", "norm", "--rule", "literal", "--sinks", "0")
    assert code == ExitCode.OK and "written:" in out
    budgets = TcaBudgets.load(tmp_path / "tca,model=tiny.json")
    assert (budgets.measure, budgets.config.rule, budgets.config.sinks) == ("norm", "literal", 0)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--measure", "mass"], "raw, norm, row"),
        (["--texts", "greedy"], "docs, code"),
        (["--block", "100"], "power of two"),
        (["--local-window", "4096"], "take longer ones or a smaller local window"),
        (["--device", "cuda"], "PyTorch sees no GPU"),
    ],
)
def test_wrong_input_ends_with_one_message(run: Any, args: list[str], words: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run(*ARGS, *args)
    assert code == ExitCode.INPUT and words in " ".join(err.split())
