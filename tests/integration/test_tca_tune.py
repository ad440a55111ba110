"""``mac-kernels tca tune`` on a tiny model, and the replay of TCA on traces that it counts with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_tca_cli import Tiny
from tiny_models import FAMILIES, VOCAB

pytest.importorskip("optuna")

from mac_autotune import tca_objective
from mac_autotune.quality.metrics import Estimate
from mac_autotune.replay import full_attention
from mac_autotune.replay_tca import replay_selected
from mac_autotune.tca_objective import TcaObjective, windows
from mac_autotune.traces import Trace, record
from mac_autotune.tune_tca import Tried, next_round
from mac_cli.app import main
from mac_cli.output import ExitCode
from mac_kernels import InputError
from mac_kernels.tca import TcaBudgets, TcaConfig, importance, select_far
from mac_kernels.tca.candidates import NUM_SPARSE
from mac_kernels.testing.scenario import PagedStore

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TcaConfig(block=8, local_window=16, sinks=2)
PROMPT, STEPS = 96, 12
ARGS = ["--texts", "code", "--steps", "8", "--layers", "2", "--trials", "4", "--top", "2", "--confirm-tokens", "16"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    tokens = torch.randint(2, VOCAB, (PROMPT + STEPS,), generator=torch.Generator().manual_seed(0))
    return record(FAMILIES["llama"].build(), tokens, prompt=PROMPT, max_layers=2)


def test_dense_heads_bring_no_error(trace: Trace) -> None:
    heads = trace.layout.num_kv_heads
    assert float(replay_selected(trace, CONFIG, [[NUM_SPARSE] * heads] * 2, full_attention(trace)).max()) < 1e-10


def test_the_error_is_that_of_attention_to_what_was_selected(trace: Trace) -> None:
    heads, group = trace.layout.num_kv_heads, trace.layout.group_size
    choices = [[3] * heads, [NUM_SPARSE] * heads]
    errors = replay_selected(trace, CONFIG, choices, exact := full_attention(trace))
    store = PagedStore(1, PROMPT, trace.layout, page_size=4, generator=torch.Generator())
    store.write(0, 0, *(part[0, :, :PROMPT].transpose(0, 1) for part in (trace.k, trace.v)))
    first = trace.q.shape[1] - STEPS
    s = importance(trace.q[:1, first - 1], store.kv(store.table([PROMPT])), sm_scale=trace.sm_scale)
    far = select_far(s, [PROMPT], choices[0], config=CONFIG).far
    rows = []
    for head in range(heads):
        window = torch.arange(int(far.far_end[0, head]), PROMPT + 1)
        kept = torch.cat((far.ids[0, head, : int(far.count[0, head])].long(), window))
        for q in trace.q[0, first, head * group : (head + 1) * group]:
            weight = (trace.k[0, head, kept] @ q * trace.sm_scale).softmax(0)
            rows.append(weight @ trace.v[0, head, kept])
    brought = trace.out_proj[0].float() @ (torch.stack(rows) - exact[0, 0]).flatten()
    assert float(errors[0, 0]) == pytest.approx(float((brought.norm() / trace.residual[0, 0]).square()), rel=1e-3)
    assert float(errors[0, 0]) > 1e-8 and float(errors[:, 1].max()) < 1e-10


def test_prompts_without_a_far_region_are_refused(trace: Trace) -> None:
    with pytest.raises(InputError, match="nothing far"):
        TcaObjective(CONFIG, [(trace, full_attention(trace))], lambda config: None, context=8192)  # never asked


def test_windows_are_whole_blocks_up_to_the_published_one() -> None:
    assert windows(8192) == (256, 512, 1024) and windows(131072) == (4096,)


def test_rounds_close_in_on_the_limit() -> None:
    """Confirmed are the ends, then what lies between the last that broke the limit and the first that kept it."""
    front: Any = [SimpleNamespace(number=10 + place) for place in range(9)]

    def tried(*places: int) -> list[Tried]:
        return [Tried(10 + at, CONFIG, at / 10, Estimate(1 / (1 + at), 0, 1, 1)) for at in places]

    def asked(limit: float, *places: int) -> list[int]:
        return [trial.number - 10 for trial in next_round(front, tried(*places), limit, 3)]

    assert asked(0.2) == [0, 4, 8]
    assert asked(0.2, 0, 4, 8) == [1, 2, 3]  # 4 keeps 1 / 5
    assert asked(0.15, 0, 4, 8) == [5, 6, 7]
    assert asked(0.15, 0, 4, 5, 6, 7, 8) == []  # 6 is the first to keep it, 5 is known not to
    assert asked(0.2, 0, 1, 2, 3, 4, 8) == [] and asked(0.0, 0, 4, 8) == []


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setattr("mac_transformers.weights.find_weights", lambda model: Tiny())
    monkeypatch.setattr(tca_objective, "BLOCKS", (8, 16))
    monkeypatch.setattr("mac_cli.tca_tune._BLOCK", 16)
    monkeypatch.setenv("MAC_KERNELS_CACHE", str(tmp_path / "cache"))

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["tca", "tune", *ARGS, "--storage", str(tmp_path / "s.journal"), "--output", str(tmp_path), *args])
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_the_file_serves_what_was_chosen(tune: Any, tmp_path: Path) -> None:
    code, out, err = tune("--kl", "10", "--json")
    assert code == ExitCode.OK, err
    found = json.loads(out)
    chosen = next(row for row in found["confirmed"] if row["chosen"])
    budgets = TcaBudgets.load(Path(found["path"]))
    fields = {name: chosen[name] for name in ("block", "local_window", "mass_target")}
    assert budgets.config == dataclasses.replace(TcaConfig(), **fields)
    assert chosen["kv_read"] == pytest.approx(budgets.share_read(budgets.config, 512), abs=1e-4)
    assert chosen["kv_read"] == min(row["kv_read"] for row in found["confirmed"])
    assert "calibrat" not in out
    again, out, _ = tune("--kl", "10")  # no new trial, the same winner
    assert again == ExitCode.OK and str(chosen["mass_target"]) in out


def test_without_a_trial_under_the_limit_nothing_is_written(tune: Any, tmp_path: Path) -> None:
    code, _, err = tune("--kl", "0")
    assert code != ExitCode.OK and "no trial keeps a KL of 0" in err
    assert not list(tmp_path.glob("tca,*.json"))
