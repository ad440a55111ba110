"""The quality commands end to end on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from mac_autotune.quality import csv as table
from mac_autotune.quality import needle
from mac_autotune.quality.cli import eval_command
from mac_kernels import InputError

RULES = "tau=.2,context=100,W=64,S=16,F=2 window:tau=.2,context=100,W=64,S=16,F=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers that reads bytes."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def run(*args: str | Path) -> str:
    result = CliRunner().invoke(eval_command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_kl_writes_one_table_and_skips_what_is_there(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "results" / "tiny.csv"
    command = (
        "kl",
        "--model",
        folder,
        "--configs",
        RULES,
        "--prompt-tokens",
        "200",
        "--tokens",
        "12",
        "--output",
        path,
    )
    printed = json.loads(run(*command, "--texts", "docs,greedy", "--json"))
    rows = table.read(path)
    assert len(rows) == len(printed) == 2 * 2 * 5
    assert {row.text for row in rows} == {"docs", "greedy"}
    assert {row.model for row in rows} == {"tiny"}
    by_metric = {row.metric: row for row in rows if row.text == "docs" and row.config.startswith("tau")}
    assert by_metric["kl"].n == by_metric["kl"].tokens == 12
    assert by_metric["kl"].value > 0
    assert 0 < by_metric["kl"].group_hit <= 1
    assert str(folder) not in by_metric["kl"].command

    before = path.read_bytes()
    assert json.loads(run(*command, "--texts", "docs", "--json")) == []
    assert path.read_bytes() == before
    assert {row["text"] for row in json.loads(run(*command, "--texts", "docs,code", "--json"))} == {"code"}
    assert len(table.read(path)) == 3 * 2 * 5


def test_kl_is_told_relative_to_a_curve(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    small = "context=100,W=64,S=16,F=2"
    loose, strict, other = f"tau=-9,{small}", f"tau=.9,{small}", f"tau=.2,{small}"
    command = ("kl", "--model", folder, "--prompt-tokens", "200", "--tokens", "12", "--texts", "docs", "--output", path)
    run(*command, "--configs", f"{loose} {strict} {other}", "--against", f"{loose} {strict}")
    ratios = {row.config: row for row in table.read(path) if row.metric == "kl_ratio"}
    assert set(ratios) == {other}
    assert 0 < ratios[other].ci_low <= ratios[other].value <= ratios[other].ci_high
    with pytest.raises(InputError, match="--against names 'fast', which is not among --configs"):
        run(*command, "--configs", other, "--against", "fast")


def test_needle_scores_only_trials_that_full_attention_finds(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, answers = tmp_path / "tiny.csv", tmp_path / "answers.jsonl"
    found = {"hidden": 0}

    def recall(trial: needle.Trial, answer: str) -> float:
        found["hidden"] += 1
        return float(found["hidden"] % 2)  # every second answer, so every second trial is drawn in vain

    monkeypatch.setattr(needle.Trial, "recall", recall)
    run(
        "needle", "--model", folder, "--configs", RULES, "--prompt-tokens", "1024", "--trials", "2", "--rows", "4",
        "--tasks", "single", "--modes", "decoded", "--output", path, "--answers", answers,
    )  # fmt: skip
    rows = {(row.config, row.metric): row for row in table.read(path)}
    full, rule = rows["full", "found"], [row for (config, _), row in rows.items() if config.startswith("tau")]
    assert (full.n, full.value) == (3, pytest.approx(2 / 3, rel=1e-5))  # until two were found
    assert {row.metric: row.n for row in rule} == {"recall": 2, "found": 3, "lost": 3, "won": 3}
    # of three recalls a trial (full, rule, window) every second is 1: the rule loses two trials and wins the other
    assert {row.metric: row.value for row in rule} == pytest.approx(
        {"recall": 0, "found": 1 / 3, "lost": 2 / 3, "won": 1 / 3}, rel=1e-5
    )
    assert all(0 < row.kv_read < 1 for (config, _), row in rows.items() if config != "full")
    given = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(one["trial"], one["config"]) for one in given] == [
        (trial, config) for trial in range(3) for config in ("full", *RULES.split())
    ]
    assert all(one["apart"] is None for one in given if one["config"] == "full")
    assert all((one["apart"] is None) == (one["margin"] is None) for one in given)


def test_needle_leaves_the_rules_out_where_full_attention_fails(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    run(
        "needle", "--model", folder, "--configs", RULES, "--prompt-tokens", "1024", "--trials", "1", "--rows", "3",
        "--tasks", "single", "--modes", "asked", "--output", path,
    )  # fmt: skip
    before = path.read_bytes()
    run(
        "needle", "--model", folder, "--configs", RULES, "--prompt-tokens", "1024", "--trials", "1", "--rows", "3",
        "--tasks", "single", "--modes", "asked", "--output", path,
    )  # fmt: skip
    assert path.read_bytes() == before  # drawn in vain, and not again
    found = [(row.config.split(":")[0][:3], row.metric, row.value, row.n) for row in table.read(path)]
    assert found == [
        ("ful", "found", 0.0, 4),
        *((rule, metric, 0.0, 1) for rule in ("tau", "win") for metric in ("found", "lost", "won")),
    ]


def test_sketch_writes_recall_of_every_kind(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "sketch.json"
    run(
        "sketch", "--model", folder, "--texts", "docs", "--prompt-tokens", "100", "--window", "64", "--tokens", "8",
        "--nominees", "4,63", "--output", path,
    )  # fmt: skip
    found = json.loads(path.read_text())["docs"]
    everything = [one for one in found if one["count"] == 63]
    assert len(found) == 2 * len(everything) > 40
    assert all(one["recall"] == 1 and one["group_hit_loss"] == 0 for one in everything)
    assert any(one["recall"] < 1 for one in found)


def test_plot_draws_the_frontier(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    run(
        "kl", "--model", folder, "--configs", RULES, "--prompt-tokens", "200", "--tokens", "4", "--texts", "docs",
        "--output", path,
    )  # fmt: skip
    run("plot", path)
    assert (tmp_path / "tiny.png").stat().st_size > 10_000


def test_freerun_tells_where_a_rule_leaves_full_attention(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    exact, blind = "exact,context=100,W=64,S=16,F=2", "window:1"
    run(
        "freerun", "--model", folder, "--configs", f"{exact} {blind}", "--prompt-tokens", "200", "--tokens", "40",
        "--passages", "2", "--output", path,
    )  # fmt: skip
    found = {(row.config, row.metric): row for row in table.read(path)}
    assert found["full", "agreement"].value == found[exact, "agreement"].value == 41
    assert found[blind, "agreement"].value < 41
    assert found["full", "repetition"].value == found[exact, "repetition"].value
    assert all(row.n == 2 for row in found.values())


def test_drift_bins_errors_by_age_and_hops(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.csv"
    rules = "tau=-9,context=100,W=64,S=16,F=2,age=none tau=-9,context=100,W=64,S=16,F=2,age=20"
    run(
        "drift", "--model", folder, "--configs", rules, "--prompt-tokens", "200", "--tokens", "150", "--output", path,
    )  # fmt: skip
    free, young = ({row.task: row for row in table.read(path) if row.config == rule} for rule in rules.split())
    assert {"steps 0-150", "age 64-127", "hops 2-3"} <= set(free)
    assert set(young).isdisjoint({"age 64-127", "age 128-255"})
    assert sum(row.n for task, row in free.items() if task.startswith("age")) == sum(
        row.n for task, row in free.items() if task.startswith("hops")
    )
    assert all(0 < row.value < 10 for task, row in free.items() if row.metric == "rel_l2")


def test_calibrate_writes_a_config_that_rules_take(folder: Path, tmp_path: Path) -> None:
    scale, path = tmp_path / "scale.json", tmp_path / "tiny.csv"
    run("calibrate", scale, "--model", folder, "--texts", "docs", "--prompt-tokens", "1400", "--trials", "1")
    run(
        "kl", "--model", folder, "--configs", "tau=.2,beta=.3,scale=on,context=100,W=64,S=16,F=2", "--scale", scale,
        "--prompt-tokens", "200", "--tokens", "4", "--texts", "docs", "--output", path,
    )  # fmt: skip
    assert {row.config for row in table.read(path)} == {"tau=.2,beta=.3,scale=on,context=100,W=64,S=16,F=2"}
