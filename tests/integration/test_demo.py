"""The demo from end to end on a tiny random model, and what it says to wrong input."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from mac_cli.app import main
from mac_cli.output import ExitCode
from mac_kernels import InputError
from mac_transformers.outdir import OutputFolder

PROMPT, TOKENS = 150, 24
CONFIG = ["window=48", "band=16", "sinks=2", "min_context=32", "threshold=0.3", "influence=null"]
SMALL = [
    "--prompt-tokens",
    str(PROMPT),
    "--tokens",
    str(TOKENS),
    *(part for pair in CONFIG for part in ("--set", pair)),
]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama of 512 positions whose tokens are bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("MAC_KERNELS_CONFIG", raising=False)
    monkeypatch.setattr("mac_kernels.settings.user_config_dir", lambda: tmp_path / "no-user-config")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["demo", *args])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_demo_measures_and_writes_what_it_prints(command, tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = command("--model", str(tiny_model), *SMALL, "--output", "results", "--json")
    assert code == ExitCode.OK, err
    printed = json.loads(out)
    assert printed.pop("files") == ["results/report.json", "results/report.png"]
    report = json.loads((tmp_path / "results" / "report.json").read_text())
    assert printed == report
    assert sorted(os.listdir(tmp_path / "results")) == ["report.json", "report.png"]
    assert (tmp_path / "results" / "report.png").read_bytes().startswith(b"\x89PNG\r\n")

    rows = {row["policy"]: row for row in report["rows"]}
    assert list(rows) == ["full", "custom", "sink + window"]
    full, mac, window = rows.values()
    assert (full["kl_mean_nats"], full["top1_agreement"], full["perplexity_ratio"]) == (0.0, 1.0, 1.0)
    assert full["kv_read_share"] == 1.0 and full["tokens_per_second"] > 0
    assert 0 < mac["group_hit_rate"] <= mac["head_hit_rate"] <= 1, "the test must see reuse"
    assert mac["kv_read_share"] < 1 and mac["kl_mean_nats"] > 0 and mac["tokens_per_second"] > 0
    assert window["kl_mean_nats"] > 0 and window["head_hit_rate"] is None
    assert report["text"] == {
        "name": "pydoc_data.topics of the standard library", "prompt_tokens": PROMPT, "decoded_tokens": TOKENS
    }  # fmt: skip
    assert report["config"]["window"] == 48 and report["config"]["label"] == "custom"
    assert [len(row) for row in report["figure"]["group_hit_by_layer"]] == [TOKENS, TOKENS]


def test_without_reuse_the_row_equals_full_attention(command, tiny_model: Path) -> None:
    strict = [part.replace("threshold=0.3", "threshold=1.0") for part in SMALL]
    code, out, _ = command("--model", str(tiny_model), *strict, "--json")
    assert code == ExitCode.OK
    row = json.loads(out)["rows"][1]
    assert row["group_hit_rate"] == 0.0 and row["kv_read_share"] == 1.0
    assert row["kl_mean_nats"] < 1e-6 and row["top1_agreement"] == 1.0


def test_a_text_below_min_context_is_said_to_be_too_short_for_reuse(command, tiny_model: Path) -> None:
    code, out, _ = command("--model", str(tiny_model), *SMALL[:4])
    assert code == ExitCode.OK
    assert "nothing could be reused: the text ends before min_context=2048" in out
    assert "head hit rate" in out and "sink + window" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "missing.txt"], "text missing.txt cannot be read"),
        (["--text", "empty.txt"], "text empty.txt is empty"),
        (["--text", "binary.txt"], "text binary.txt cannot be read"),
        (["--text", "short.txt", *SMALL], "text short.txt has 11 tokens, but prompt_tokens=150 + tokens=24 + 1 = 175"),
        (["--tokens", "0"], "tokens=0 must be >= 1"),
        (["--prompt-tokens", "1"], "prompt_tokens=1 must be >= 2"),
        (["--prompt-tokens", "500", "--tokens", "12"], "= 513 is more than the model's 512 positions; ask for fewer"),
        (["--output", "short.txt/results"], "output folder short.txt/results cannot be written"),
        (["--preset", "fats"], "unknown preset 'fats' (did you mean 'fast'?)"),
        (["--config", "short.txt"], "short.txt: not valid JSON"),
        (["--set", "band=0"], "band=0 must be >= 1 token"),
        (["--model", "missing.gguf"], "model 'missing.gguf' does not exist"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_wrong_input_ends_with_one_message_and_no_file(
    command, tiny_model: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "short.txt").write_text("too little.")
    code, out, err = command("--model", str(tiny_model), *args)
    assert code == ExitCode.INPUT
    assert out == ""
    assert f"error: {message}" in err.replace("\n", "") or message in err
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("report.*"))


def test_missing_weights_have_their_own_exit_code(command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = command("--model", "no-such/model-anywhere")
    assert code == ExitCode.MISSING
    assert "no weights of no-such/model-anywhere were found" in err


def test_a_missing_extra_is_named_with_its_command(command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mac_cli.demo.find_spec", lambda name: None if name == "gguf" else object())
    code, _, err = command()
    assert code == ExitCode.MISSING
    assert "demo needs gguf; install them with: pip install 'mac-kernels[demo]'" in err


def test_nothing_is_written_when_the_picture_cannot_be_drawn(
    command, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(report: dict[str, Any]) -> bytes:
        raise RuntimeError("no font")

    monkeypatch.setattr("mac_transformers.demo_figure.draw", broken)
    with pytest.raises(RuntimeError, match="no font"):
        main(["demo", "--model", str(tiny_model), *SMALL])
    assert not list((tmp_path / "mac-demo").iterdir())


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder(tmp_path)
    folder.write("report.json", b"old")

    def interrupted(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder.write("report.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("report.json", b"old")]


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        OutputFolder(tmp_path / "taken")


def test_the_readme_example_for_transformers_runs(tiny_model: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    (example,) = [block for block in blocks if "import mac_transformers" in block]
    names: dict[str, Any] = {}
    exec(example.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model)), names)
    assert names["output"].shape[1] == names["inputs"]["input_ids"].shape[1] + 8
    assert names["cache"].rings is not None, "MAC was not used"
