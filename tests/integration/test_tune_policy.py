"""The policy study end to end on a tiny random model: record, replay, resume, confirm, export or refuse, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_quality_suites import folder  # noqa: F401  # a fixture
from tiny_models import FAMILIES, VOCAB
from typer.testing import CliRunner

pytest.importorskip("optuna")

from mac_autotune.cli import tune_command
from mac_autotune.errors import ExportRefused
from mac_autotune.export import covered, provenance
from mac_autotune.replay import full_attention, replay
from mac_autotune.traces import Trace, load_trace, record, save_trace
from mac_kernels import ConfigError, InputError, MacConfig, tuned
from mac_transformers import MacCache
from mac_transformers.compare import compare
from mac_transformers.model_key import model_key
from mac_transformers.policies import Mac

CONFIG = MacConfig(window=32, band=8, sinks=2, min_context=40, threshold=0.1, influence=None, nominees=None)
PROMPT, STEPS = 96, 12


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].build()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    # few different ones, so that some queries come back and some do not
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(2, VOCAB, (24,), generator=generator)
    return kinds[torch.randint(24, (PROMPT + STEPS,), generator=generator)]


@pytest.fixture(scope="module")
def trace(model: Any, tokens: torch.Tensor) -> Trace:
    return record(model, tokens, prompt=PROMPT, max_layers=8)


def test_a_trace_is_what_full_attention_saw(model: Any, tokens: torch.Tensor, trace: Trace) -> None:
    assert trace.layers == [0, 1] and trace.steps == STEPS and trace.k.shape[2] == PROMPT + STEPS
    exact = full_attention(trace)
    seen = {}
    attention = model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    with torch.inference_mode():
        model(tokens[None])
    handle.remove()
    expected = seen["out"][0, -STEPS:].view(STEPS, 4, 16)
    assert torch.allclose(exact[:, 1], expected, rtol=1e-4, atol=1e-5)


def test_replay_decides_what_the_closed_loop_decides_while_inputs_are_equal(model: Any, tokens: torch.Tensor) -> None:
    """Layer 0 sees the same inputs in both; later layers see the errors of those before in the closed loop alone."""
    first = record(model, tokens[:-1], prompt=PROMPT, max_layers=1)  # the closed loop only predicts the last token
    found = replay(first, CONFIG, full_attention(first)).reads
    closed = compare(model, tokens[None, :PROMPT], tokens[None, PROMPT:], {"mac": Mac(CONFIG)})
    assert 0 < found.hit < 1
    assert found.hit == pytest.approx(float(closed.group_hit[:, 0, closed.index("mac")].mean()))


def test_replay_of_a_policy_that_never_reuses_is_exact(trace: Trace) -> None:
    found = replay(trace, dataclasses.replace(CONFIG, threshold=1.0), full_attention(trace))
    assert found.reads.hit == 0 and found.divergence < 1e-10
    loose = replay(trace, dataclasses.replace(CONFIG, threshold=-1.0), full_attention(trace))
    assert loose.reads.hit > 0.5 and loose.divergence > 1e-6
    assert CONFIG.band + CONFIG.sinks < loose.reads.tokens_on_hit <= CONFIG.window + CONFIG.band + CONFIG.sinks


def test_tables_of_a_policy_follow_the_layers_of_the_trace(trace: Trace) -> None:
    exact = full_attention(trace)
    bound = dataclasses.replace(CONFIG, threshold=-1.0, influence=0.8)

    def hit(first: float, second: float) -> float:
        return replay(trace, dataclasses.replace(bound, influence_scale=((first,), (second,))), exact).reads.hit

    none, both = hit(1.0, 1.0), hit(1e6, 1e6)
    assert none == replay(trace, bound, exact).reads.hit > both
    # with recorded inputs the layers do not know of each other
    assert hit(1e6, 1.0) + hit(1.0, 1e6) == pytest.approx(none + both)
    assert none > hit(1e6, 1.0) != hit(1.0, 1e6)


def test_a_trace_survives_the_disk_and_a_torn_one_is_an_error(trace: Trace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "t.pt")
    again = load_trace(tmp_path / "t.pt")
    assert torch.equal(again.q, trace.q) and again.layers == trace.layers
    (tmp_path / "t.pt").write_bytes((tmp_path / "t.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="delete it, it is recorded again"):
        load_trace(tmp_path / "t.pt")


def run(*args: Any) -> Any:
    return CliRunner().invoke(tune_command, [str(arg) for arg in args], catch_exceptions=True)


def test_a_cache_takes_the_policy_of_its_model_without_a_flag(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = model_key(model.config, "org/Tiny")
    score = tuned.Score(value=0.8, low=0.7, high=0.9, unit="of the preset", n=3)
    facts = provenance(gpu="g", study="s", trial=1, basis="estimated", command="c")
    file = tuned.PolicyFile(
        key=key,
        coverage=covered([1], [4096]),
        preset="careful",
        config=CONFIG,
        scores={"latency_ratio": score},
        provenance=facts,
    )
    path = tuned.save(file, tmp_path)
    assert MacCache(model.config).mac_config == MacConfig()
    monkeypatch.setenv("MAC_KERNELS_CONFIG", str(tmp_path))
    assert MacCache(model.config).mac_config == CONFIG
    assert MacCache(model.config, "fast").mac_config == MacConfig.preset("fast")
    other = FAMILIES["llama-mha"].build().config
    assert MacCache(other).mac_config == MacConfig()
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ConfigError, match="is not valid JSON"):
        MacCache(model.config)
    path.unlink()
    (tmp_path / "config.json").write_text('{"schema": 1}')
    assert MacCache(model.config).mac_config == MacConfig()


@pytest.mark.slow
def test_the_command_records_once_resumes_and_refuses_what_is_no_gain(
    folder: Path,  # noqa: F811  # the fixture of that name
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(tmp_path / "cache"))
    command = (
        "policy", "--model", folder, "--texts", "docs", "--prompt-tokens", 2560, "--tokens", 8, "--layers", 2,
        "--batches", 16, "--contexts", 32768, "--confirm-tokens", 64, "--needles", 0, "--top", 1,
        "--output", tmp_path / "out",
    )  # fmt: skip
    first = run(*command, "--trials", 3, "--no-export")
    assert first.exit_code == 0, first.output
    traces = list((tmp_path / "cache" / "traces").iterdir())
    assert len(traces) == 1
    before = traces[0].stat().st_mtime_ns
    second = run(*command, "--trials", 5)
    assert traces[0].stat().st_mtime_ns == before
    if second.exit_code:  # a random model's queries do not come back: whether something is gained is left to chance
        assert isinstance(second.exception, ExportRefused) and not (tmp_path / "out").exists()
    else:
        (path,) = (tmp_path / "out").iterdir()
        assert json.loads(path.read_text())["scores"]["latency_ratio"]["high"] < 1
    shown = json.loads(run("show", "--json").stdout)
    assert [row["finished"] for row in shown] == [5]
    listed = run("show", shown[0]["study"])
    assert "optuna-dashboard" in listed.stdout and "threshold=0.45" in listed.stdout
    reported = run("report", "tiny", "--output", tmp_path / "report")
    assert reported.exit_code == 0, reported.output
    page = (tmp_path / "report" / "index.html").read_text()
    assert "History" not in page and 'src="history.png"' in page and "confirmed" in page.lower()
    assert (tmp_path / "report" / "history.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(tmp_path))
    for command in (("policy",), ("kernel", "--hq", 32, "--hkv", 8, "--head-dim", 128)):
        seconds = []
        for trials in (64, 640):
            done = run(*command, "--dry-run", "--json", "--trials", trials)
            assert done.exit_code == 0, done.output
            seconds.append(json.loads(done.stdout)["estimate_s"])
        assert 30 < seconds[0] < seconds[1] / 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("policy", "--preset", "paper"), "has no quality limits to tune under"),
        (("policy", "--texts", "poems"), "must be some of docs, code"),
        (("kernel", "--hq", 32, "--hkv", 8, "--head-dim", 128, "--batches", "1,x"), "must be whole numbers"),
        (("kernel", "--hq", 32, "--hkv", 8, "--head-dim", 128, "--dtype", "int8"), "must be one of bfloat16"),
        (("kernel", "--hq", 32, "--hkv", 8, "--head-dim", 128, "--cache-gb", 0.1), "the smallest bucket needs 0.13"),
        (("show", "--storage", "/nowhere.journal"), "does not exist"),
        (("report", "nothing"), "is none or several of"),
    ],
)
def test_wrong_options_are_errors_with_the_next_step(
    options: tuple[Any, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(tmp_path))
    done = run(*options)
    assert done.exit_code and message in str(done.exception)
