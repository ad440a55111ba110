"""The parts of the quality harness that need no model."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mac_autotune.quality import csv as table
from mac_autotune.quality.bootstrap import interval
from mac_autotune.quality.csv import Row
from mac_autotune.quality.metrics import divergence, equal_read_ratio, reuse
from mac_autotune.quality.needle import GENERATED, MODES, TASKS, answers, continuations, make_trial
from mac_autotune.quality.rounding import rounding_pool
from mac_autotune.quality.rules import parse_rule, parse_rules
from mac_autotune.quality.sketches import FittedSketch, SketchedMatch, SketchKind, default_kinds
from mac_autotune.quality.texts import passages
from mac_kernels import AttnState, ConfigError, HeadLayout, InputError, MacConfig, RingPool, find_match
from mac_transformers.compare import Comparison
from mac_transformers.policies import Mac, Stored, Window


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, without special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


def row(**changes: object) -> Row:
    names = {"model": "m", "suite": "kl", "task": "t", "text": "docs", "config": "tau=.45,beta=.1", "metric": "kl"}
    numbers = {"context": 10, "tokens": 5, "n": 5, "group_hit": 0.5, "head_hit": 0.75, "kv_read": 0.25}
    result = {"value": 0.001234567891, "ci_low": 0.001, "ci_high": 0.002}
    origin = {"commit": "abc", "date": "2026-01-01", "command": "mac-kernels eval kl --configs 'a, b'"}
    return Row(**{**names, **numbers, **result, **origin, **changes})


class TestBootstrap:
    def test_interval_covers_the_mean_as_often_as_it_says(self) -> None:
        rng = np.random.default_rng(0)
        covered = 0
        for trial in range(200):
            low, high = interval(rng.normal(size=60), lambda x: float(x.mean()), resamples=300, seed=trial)
            covered += low <= 0 <= high
        assert 0.88 <= covered / 200 <= 0.99

    def test_blocks_widen_the_interval_of_dependent_values(self) -> None:
        values = np.repeat(np.random.default_rng(0).normal(size=40), 25)
        single, blocks = (interval(values, lambda x: float(x.mean()), block=b) for b in (1, 50))
        assert blocks[1] - blocks[0] > 3 * (single[1] - single[0])

    def test_same_seed_same_interval(self) -> None:
        values = np.arange(30.0)
        assert interval(values, np.mean, block=4) == interval(values, np.mean, block=4)

    def test_nothing_gives_nan(self) -> None:
        assert np.isnan(interval(np.array([]), lambda x: float(x.mean()))).all()


class TestTable:
    def test_rows_come_back_as_written(self, tmp_path: Path) -> None:
        path = tmp_path / "folder" / "model.csv"
        table.upsert(path, [row(), row(metric="top1", value=float("nan"))])
        first, second = table.read(path)
        assert first == row(value=0.00123457)
        assert np.isnan(second.value)

    def test_equal_keys_are_replaced_and_others_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "model.csv"
        table.upsert(path, [row(), row(text="code", value=3.0)])
        table.upsert(path, [row(value=2.0, commit="def"), row(context=11, value=4.0)])
        assert [(r.text, r.context, r.value, r.commit) for r in table.read(path)] == [
            ("code", 10, 3.0, "abc"), ("docs", 10, 2.0, "def"), ("docs", 11, 4.0, "abc"),
        ]  # fmt: skip

    def test_a_failed_write_leaves_the_old_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "model.csv"
        table.upsert(path, [row()])
        before = path.read_bytes()
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            table.upsert(path, [row(value=9.0)])
        assert path.read_bytes() == before
        assert table.read(path) == [row(value=0.00123457)]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["model.commands.json", "model.csv"]

    def test_a_command_is_kept_once_and_comes_back(self, tmp_path: Path) -> None:
        path, other = tmp_path / "model.csv", "mac-kernels eval kl --configs c"
        table.upsert(path, [row(), row(text="code"), row(text="greedy", command=other)])
        assert "mac-kernels" not in path.read_text()
        assert sorted(json.loads(table.commands_path(path).read_text()).values()) == sorted([row().command, other])
        assert [r.command for r in table.read(path)] == [row().command, row().command, other]
        table.upsert(path, [row(text="greedy")])
        table.upsert(path, [])
        assert list(json.loads(table.commands_path(path).read_text()).values()) == [row().command]

    def test_a_row_that_names_no_known_command_keeps_what_it_says(self, tmp_path: Path) -> None:
        path = tmp_path / "model.csv"
        table.upsert(path, [row()])
        table.commands_path(path).unlink()
        assert table.read(path)[0].command.startswith("kl-")

    def test_commands_that_cannot_be_read_are_named(self, tmp_path: Path) -> None:
        path = tmp_path / "model.csv"
        table.upsert(path, [row()])
        table.commands_path(path).write_text("{")
        with pytest.raises(InputError, match=r"model\.commands\.json cannot be read.*restore it"):
            table.read(path)

    def test_another_table_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "other.csv"
        path.write_text("a,b\n1,2\n")
        with pytest.raises(InputError, match="choose another --output"):
            table.upsert(path, [row()])


class TestNeedle:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("task", TASKS)
    def test_prompt_has_the_asked_length_and_holds_what_is_asked(
        self, tokenizer: PreTrainedTokenizerFast, task: str, mode: str
    ) -> None:
        trial = make_trial(tokenizer, task, length=3000, mode=mode, seed=3)
        prompt = tokenizer.decode(trial.prompt)
        forced = tokenizer.decode([token for token in trial.forced if token >= 0])
        assert len(trial.prompt) == 3000
        assert all(expected in prompt for expected in trial.expected)
        question = TASKS[task](random.Random(f"{task}-3")).question
        assert (question in prompt) == (mode == "asked")
        assert (question in forced) == (mode != "asked")
        assert trial.forced.count(-1) == (GENERATED if mode == "generated" else 0)
        assert set(trial.forced[:GENERATED]) == {-1} or mode != "generated"

    def test_seeds_give_other_trials_and_the_same_seed_the_same(self, tokenizer: PreTrainedTokenizerFast) -> None:
        one, again, other = (
            make_trial(tokenizer, "multi_key", length=2000, mode="asked", seed=seed) for seed in (1, 1, 2)
        )
        assert torch.equal(one.prompt, again.prompt)
        assert one.expected == again.expected != other.expected

    def test_every_mode_asks_the_same_of_the_same_seed(self, tokenizer: PreTrainedTokenizerFast) -> None:
        trials = [make_trial(tokenizer, "single", length=2000, mode=mode, seed=1) for mode in MODES]
        assert len({trial.expected for trial in trials}) == 1

    def test_recall_counts_the_expected_strings(self, tokenizer: PreTrainedTokenizerFast) -> None:
        trial = make_trial(tokenizer, "multi_value", length=2000, mode="asked", seed=0)
        first, second = trial.expected
        assert trial.recall(f"{first}, {second}") == 1
        assert trial.recall(f"it is {second}.") == 0.5
        assert trial.recall(first[:-1]) == 0

    def test_answers_begin_after_the_forced_tokens(self, tokenizer: PreTrainedTokenizerFast) -> None:
        trials = [make_trial(tokenizer, "single", length=2000, mode="decoded", seed=seed) for seed in range(4)]
        fed = continuations(trials, answer_tokens=5)
        assert fed.shape == (4, max(len(trial.forced) for trial in trials) + 5)
        chosen = torch.zeros(fed.shape[1], 2, 4, dtype=torch.int64)
        for place, trial in enumerate(trials):
            assert fed[place, : len(trial.forced)].tolist() == list(trial.forced)
            assert (fed[place, len(trial.forced) :] == -1).all()
            chosen[len(trial.forced) : len(trial.forced) + 5, 1, place] = torch.tensor(tokenizer("12345").input_ids)
        assert answers(tokenizer, trials, chosen, answer_tokens=5)[1] == ["12345"] * 4

    def test_bad_input_is_named(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(InputError, match="unknown task 'x'; choose one of single"):
            make_trial(tokenizer, "x", length=2000, mode="asked", seed=0)
        with pytest.raises(InputError, match="take at least 1024"):
            make_trial(tokenizer, "single", length=128, mode="asked", seed=0)


@pytest.mark.parametrize("name", ["docs", "code"])
def test_passages_do_not_overlap_and_repeat(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    found = passages(tokenizer, name, length=500, count=3)
    assert found.shape == (3, 500)
    assert len({tuple(one.tolist()) for one in found}) == 3
    assert torch.equal(found, passages(tokenizer, name, length=500, count=3))
    with pytest.raises(InputError, match="ask for fewer or shorter"):
        passages(tokenizer, name, length=10**7)


class TestRules:
    def test_a_rule_without_preset_bounds_only_what_it_names(self) -> None:
        assert parse_rule("tau=.6") == Mac(MacConfig(threshold=0.6, influence=None))
        policy = parse_rule("tau=.6,beta=.15,scope=group,k=none")
        assert policy == Mac(MacConfig(threshold=0.6, influence=0.15, match_scope="group", nominees=None))

    def test_presets_and_controls(self) -> None:
        assert parse_rule("careful") == Mac(MacConfig())
        assert parse_rule("window:careful") == Window(like="careful")
        assert parse_rule("window:512") == Window(tokens=512)
        assert parse_rule("full:fp8") == Stored(torch.float8_e4m3fn)
        with pytest.raises(ConfigError, match="'full:int4' must name a dtype of the KV cache: bf16, fp8"):
            parse_rule("full:int4")
        newest = parse_rule("newest,tau=.3")
        assert isinstance(newest, Mac)
        assert (newest.config.threshold, newest.config.nominees) == (0.3, None)
        assert newest.find is not find_match

    def test_rules_with_the_same_rounding_share_a_step(self) -> None:
        one, two, other = (parse_rule(rule) for rule in ("tau=.5,rows=int8", "tau=.6,beta=.1,rows=int8", "rows=fp8"))
        assert isinstance(one, Mac) and isinstance(two, Mac) and isinstance(other, Mac)
        assert one.shares_step_with(two)
        assert not one.shares_step_with(other)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ("carefull", "unknown rule 'carefull'"),
            ("fast,tau", "no key=value pair"),
            ("fast,tua=.4", "unknown key 'tua'"),
            ("fast,tau=high", "threshold='high' must be a number"),
            ("fast,sketch=random-head-40,k=8", "is no kind"),
            ("fast,rows=int3", "cannot keep"),
        ],
    )
    def test_bad_rules_are_named(self, rule: str, message: str) -> None:
        with pytest.raises((ConfigError, InputError), match=message):
            parse_rule(rule)

    def test_a_window_needs_its_partner(self) -> None:
        assert list(parse_rules("careful  window:careful")) == ["careful", "window:careful"]
        with pytest.raises(ConfigError, match="needs the rule 'fast'"):
            parse_rules("careful window:fast")


def test_rounded_rows_are_near_but_not_equal() -> None:
    layout = HeadLayout(2, 1, 8)
    pool = rounding_pool({"q_pre": "int8", "out": "fp8"})
    assert pool is rounding_pool({"out": "fp8", "q_pre": "int8"})
    rings = pool(num_rings=1, num_layers=1, layout=layout, window=4, dtype=torch.float32, sketch_dim=0)
    values = torch.randn(3, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1, dtype=torch.int64)
    state = AttnState(values[1], torch.zeros(1, 2), values[2])
    rings.write(0, zero, zero, q_pre=values[0], state=state, anchor=zero[:, None])
    stored = [rings.fields[name][0, 0, 0] for name in ("q_pre", "out", "kbar")]
    errors = [((a - b[0]).abs().amax(-1) / b[0].abs().amax(-1)).max() for a, b in zip(stored, values, strict=True)]
    assert 0 < errors[0] <= 0.5 / 127 + 1e-6
    assert 0 < errors[1] <= 2**-4
    assert errors[2] == 0


class TestSketches:
    layout = HeadLayout(6, 2, 16)

    def test_every_default_kind_fits_the_budget_and_has_its_own_name(self) -> None:
        for layout in (self.layout, HeadLayout(9, 3, 64), HeadLayout(32, 4, 128)):
            kinds = default_kinds(layout)
            assert len({kind.name for kind in kinds}) == len(kinds)
            assert max(kind.nbytes(layout) for kind in kinds) <= 132  # the library's own has 128 codes and a scale

    @pytest.mark.parametrize("kind", default_kinds(layout), ids=lambda kind: kind.name)
    def test_a_repeated_query_is_elected_first(self, kind: SketchKind) -> None:
        queries = torch.randn(40, 6, 16, generator=torch.Generator().manual_seed(0))
        sketch = FittedSketch(kind, self.layout, queries)
        images = sketch.image(queries)
        distance = (images - images[17]).square().sum(-1)[None]
        assert sketch.elect(distance, 3)[0, 17].all()

    def test_full_dimension_keeps_distances(self) -> None:
        kind = SketchKind("random", True, 16, 8)
        queries = torch.randn(40, 6, 16, generator=torch.Generator().manual_seed(0))
        image = FittedSketch(kind, self.layout, queries).image(queries)
        exact = (queries - queries[3]).square().sum(-1).view(40, 2, 3)
        torch.testing.assert_close((image - image[3]).square().sum(-1), exact, atol=0.3, rtol=0.05)

    def test_with_every_row_nominated_it_is_the_exact_match(self) -> None:
        config = MacConfig(window=16, band=2, sinks=0, min_context=4, nominees=None)
        rings = RingPool(num_rings=1, num_layers=1, layout=self.layout, window=16, dtype=torch.float32, sketch_dim=0)
        rings.acquire(0)
        queries = torch.randn(12, 6, 16, generator=torch.Generator().manual_seed(0))
        position, zero = torch.arange(8, 20), torch.zeros(12, dtype=torch.int64)
        state = AttnState(queries, torch.zeros(12, 6), queries)
        rings.write(0, zero, position, q_pre=queries, state=state, anchor=position[:, None].expand(-1, 2))
        rows, now = rings.rows(0, zero[:1]), torch.tensor([20])
        find = SketchedMatch(SketchKind("random", True, 8, 4, True), 16)
        for one, other in zip(
            find(queries[:1], rows, now, config=config), find_match(queries[:1], rows, now, config=config), strict=True
        ):
            torch.testing.assert_close(one, other)


def test_metrics_of_a_known_comparison() -> None:
    zeros = torch.zeros(100, 2, 2)
    kl = zeros.clone()
    kl[:, 1, 0] = torch.linspace(0, 0.99, 100)
    nll = zeros.clone()
    nll[:, 1] = 0.1
    hits = torch.zeros(100, 3, 2, 2)
    hits[:, :, 1, 0] = 0.5
    result = Comparison(("full", "x"), kl, zeros == 0, nll, torch.zeros(101, 2, 2), zeros, hits, hits, 1 - hits, hits)
    found = divergence(result, "x", slice(0, 1))
    assert found["kl"].value == pytest.approx(0.495)
    assert found["kl"].low < 0.495 < found["kl"].high
    assert found["kl_p99"].value == pytest.approx(np.quantile(kl[:, 1, 0].numpy(), 0.99))
    assert found["ppl_ratio"].value == pytest.approx(np.exp(0.1))
    assert found["top1"].value == 1
    assert found["kl"].n == 100
    assert divergence(result, "x", slice(1, 2))["kl"].value == 0
    shares = reuse(result, "x", slice(0, 1))
    assert (shares.group_hit, shares.kv_read) == (0.5, 0.5)


def test_kl_is_compared_where_both_read_as_much() -> None:
    names = ("full", "low", "high", "between", "beyond")
    read = torch.tensor([1.0, 0.2, 0.4, 0.3, 0.5]).expand(120, 3, 5)[..., None]  # steps, layers, policies, texts
    kl = torch.tensor([0.0, 0.04, 0.01, 0.01, 0.001]).expand(120, 5)[..., None]
    zeros = torch.zeros(120, 5, 1)
    result = Comparison(names, kl, zeros == 0, zeros, torch.zeros(121, 5, 1), zeros, read, read, read, read)
    found = equal_read_ratio(result, "between", ["high", "low"], slice(0, 1))
    assert found is not None  # halfway between the points, their KL is the geometric mean, .02
    assert [found.value, found.low, found.high] == pytest.approx([0.5] * 3, rel=1e-4)
    assert equal_read_ratio(result, "beyond", ["high", "low"], slice(0, 1)) is None
    assert equal_read_ratio(result, "between", ["high"], slice(0, 1)) is None


def test_beyond_the_end_of_a_curve_a_resample_is_compared_with_the_end() -> None:
    rng = torch.Generator().manual_seed(0)
    read = torch.tensor([1.0, 0.2, 0.2001, 0.20005]).expand(120, 1, 4)[..., None].clone()
    read[:, :, 3] += 0.02 * torch.randn(120, 1, 1, generator=rng)  # some resamples read less or more than both
    read[:, :, 3] += 0.20005 - read[:, :, 3].mean()
    kl = torch.tensor([0.0, 0.04, 0.02, 0.01]).expand(120, 4)[..., None]
    zeros = torch.zeros(120, 4, 1)
    names = ("full", "less", "more", "other")
    result = Comparison(names, kl, zeros == 0, zeros, torch.zeros(121, 4, 1), zeros, read, read, read, read)
    found = equal_read_ratio(result, "other", ["less", "more"], slice(0, 1))
    assert found is not None
    assert [found.low, found.high] == pytest.approx([0.25, 0.5], rel=1e-3)
