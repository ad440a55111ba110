"""Policies side by side on a tiny random model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from mac_kernels import AttnState, HeadLayout, InputError, MacConfig, RingPool, UnsupportedError, find_match
from mac_transformers.batch import DecodeBatch
from mac_transformers.compare import Comparison, compare
from mac_transformers.policies import Mac, Stored, Window, find_newest

VOCAB, PROMPT, STEPS = 61, 56, 14
SMALL = {"window": 32, "band": 8, "sinks": 2, "min_context": 16}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (3, PROMPT + STEPS + 1), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def result(model: PreTrainedModel, tokens: torch.Tensor) -> Comparison:
    policies = {
        "window:fast": Window(like="fast"),
        "exact": Mac(MacConfig.preset("exact", **SMALL)),
        "fast": Mac(MacConfig.preset("fast", threshold=0.2, influence=0.3, **SMALL)),
        "careful": Mac(MacConfig(threshold=0.2, **SMALL)),
        "newest": Mac(MacConfig(threshold=0.2, influence=None, nominees=None, **SMALL), find=find_newest),
        "paper": Mac(MacConfig.preset("paper", threshold=0.2, **SMALL)),
        "all": Window(tokens=1000),
        "w8": Window(tokens=8, sinks=2),
        "bf16": Stored(torch.bfloat16),
        "fp8": Stored(torch.float8_e4m3fn),
    }
    return compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies)


def test_full_rows_equal_the_unmodified_model(model: PreTrainedModel, tokens: torch.Tensor, result: Comparison) -> None:
    with torch.no_grad():
        logp = model(tokens).logits.log_softmax(-1)
    nll = -logp[:, PROMPT:-1].gather(2, tokens[:, PROMPT + 1 :, None])[..., 0]
    torch.testing.assert_close(result.nll[:, 0], nll.T, atol=1e-4, rtol=1e-4)
    assert torch.equal(result.chosen[:, 0], logp[:, PROMPT - 1 : -1].argmax(-1).T)
    first, second = logp[:, PROMPT:-1].topk(2, dim=-1).values.unbind(-1)
    torch.testing.assert_close(result.margin[:, 0], (first - second).T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["full", "exact", "all"])
def test_policies_that_read_everything_have_no_divergence(result: Comparison, name: str) -> None:
    index = result.index(name)
    assert result.kl[:, index].max() < 1e-5
    assert result.top1[:, index].all()
    assert (result.kv_read[:, :, index] == 1).all()


def test_a_rounded_cache_costs_more_with_fewer_bits(result: Comparison) -> None:
    bf16, fp8 = result.index("bf16"), result.index("fp8")
    assert 1e-8 < result.kl[:, bf16].mean() < result.kl[:, fp8].mean() / 8  # three bits less of every number
    assert (result.kv_read[:, :, [bf16, fp8]] == 1).all()
    assert (result.group_hit[:, :, [bf16, fp8]] == 0).all()


def test_what_a_dtype_cannot_hold_becomes_its_largest() -> None:
    back = Stored(torch.float8_e4m3fn).round(torch.tensor([1000.0, -1000.0, 1.0, 1.01]))
    assert back.tolist() == [448.0, -448.0, 1.0, 1.0]


def test_a_window_reads_in_each_step_what_its_partner_read_in_the_one_before(result: Comparison) -> None:
    window, partner = (result.kv_read[:, :, result.index(name)].mean(1) for name in ("window:fast", "fast"))
    assert (window[0] == 1).all()  # nothing to follow yet
    length = torch.arange(PROMPT + 2, PROMPT + STEPS + 1)[: len(window) - 1, None]
    # whole tokens, and never more than there are
    assert ((window[1:] - partner[:-1]).abs() <= 1 / length + 1e-6).all()


def test_policies_that_reuse_diverge_a_little_and_read_less(result: Comparison) -> None:
    fast, careful = result.index("fast"), result.index("careful")
    assert 0 < result.group_hit[:, :, careful].mean() < result.group_hit[:, :, fast].mean() < 1
    assert result.kl[:, fast].max() > 1e-6
    assert result.kv_read[:, :, fast].mean() < result.kv_read[:, :, careful].mean() < 1
    assert result.error[:, :, careful].mean() < result.error[:, :, fast].mean()


def test_rules_that_share_a_call_give_what_they_give_alone(
    model: PreTrainedModel, tokens: torch.Tensor, result: Comparison
) -> None:
    alone = compare(
        model, tokens[1:2, :PROMPT], tokens[1:2, PROMPT:], {"careful": Mac(MacConfig(threshold=0.2, **SMALL))}
    )
    index = result.index("careful")
    torch.testing.assert_close(alone.kl[:, 1, 0], result.kl[:, index, 1], atol=1e-6, rtol=1e-3)
    assert torch.equal(alone.group_hit[:, :, 1, 0], result.group_hit[:, :, index, 1])


def test_a_window_that_follows_a_policy_reads_as_much(result: Comparison) -> None:
    window, fast = (result.kv_read[:, :, result.index(name)].mean() for name in ("window:fast", "fast"))
    assert abs(window - fast) < 0.05
    assert (
        result.kv_read[:, :, result.index("w8")] * torch.arange(PROMPT + 1, PROMPT + STEPS + 1)[:, None, None]
    ).allclose(torch.tensor(10.0))


def test_newest_takes_the_newest_row_within_the_cap() -> None:
    layout = HeadLayout(2, 1, 8)
    config = MacConfig(influence=None, nominees=None, **SMALL)
    rings = RingPool(num_rings=1, num_layers=1, layout=layout, window=32, dtype=torch.float32, sketch_dim=0)
    rings.acquire(0)
    away = torch.tensor([[0.5, 0.1], [0.2, 0.3], [9.0, 9.0]])  # of the rows at positions 20, 21, 22
    q_pre = torch.zeros(3, 2, 8)
    q_pre[:, :, 0] = away
    state = AttnState(torch.zeros(3, 2, 8), torch.zeros(3, 2), torch.zeros(3, 2, 8))
    zero, position = torch.zeros(3, dtype=torch.int64), torch.arange(20, 23)
    rings.write(0, zero, position, q_pre=q_pre, state=state, anchor=position[:, None])
    rows, now = rings.rows(0, zero[:1]), torch.tensor([23])
    assert find_match(torch.zeros(1, 2, 8), rows, now, config=config).pos.tolist() == [[21, 20]]
    newest = find_newest(torch.zeros(1, 2, 8), rows, now, config=config)
    assert newest.pos.tolist() == [[21, 21]]
    torch.testing.assert_close(newest.distance, away[1:2])
    nothing = find_newest(torch.full((1, 2, 8), 50.0), rows, now, config=config)
    assert nothing.pos.tolist() == [[22, 22]]  # too far: the nearest, which then misses


def test_free_rows_follow_their_own_choice(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    prompts = tokens[:1, :PROMPT]
    free = compare(model, prompts, torch.full((1, STEPS + 1), -1), {})
    written = prompts
    for _ in range(STEPS + 1):
        with torch.no_grad():
            written = torch.cat((written, model(written).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(free.chosen[:, 0, 0], written[0, PROMPT:])
    assert free.nll.isnan().all()


def test_time_limit_ends_with_the_steps_that_were_done(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    short = compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], {}, seconds=0.0)
    assert short.kl.shape == (1, 1, 3)
    assert short.kv_read.shape == (1, 2, 1, 3)
    assert short.chosen.shape == (2, 1, 3)


def test_a_pass_that_no_graph_can_hold_runs_as_it_is(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    result: Comparison,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(DecodeBatch, "can_be_recorded", True)  # as on a GPU; here nothing can be recorded
    careful = {"careful": Mac(MacConfig(threshold=0.2, **SMALL))}
    alone = compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], careful)
    torch.testing.assert_close(alone.kl[:, 1], result.kl[:, result.index("careful")], atol=1e-6, rtol=1e-3)
    assert sum("without a CUDA graph" in record.message for record in caplog.records) == 1


def test_the_attention_implementation_is_put_back(model: PreTrainedModel, result: Comparison) -> None:
    assert model.config._attn_implementation == "sdpa"


def test_bad_input_is_named(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    with pytest.raises(InputError, match="one row per prompt"):
        compare(model, tokens[:1, :8], tokens[:, 8:], {})
    with pytest.raises(InputError, match="'fast', which is no Mac or Tca policy"):
        compare(model, tokens[:, :8], tokens[:, 8:], {"w": Window(like="fast")})
    with pytest.raises(InputError, match="taken by full attention"):
        compare(model, tokens[:, :8], tokens[:, 8:], {"full": Window(tokens=4)})
    with pytest.raises(InputError, match="exactly one of"):
        Window()


def test_sliding_window_layers_are_refused() -> None:
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="layer 0 uses sliding_window"):
        compare(MistralForCausalLM(config).eval(), tokens[:, :8], tokens[:, 8:], {})
