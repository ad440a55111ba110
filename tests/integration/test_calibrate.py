"""Calibration of the influence scale on a tiny random model."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mac_autotune.calibrate import calibrate, calibrated
from mac_kernels import InputError, MacConfig, UnsupportedError

CONFIG = MacConfig(window=48, band=8, sinks=2, min_context=16, threshold=-math.inf, nominees=None)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 160), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain(model, tokens) -> torch.Tensor:
    return torch.tensor(calibrate(model, tokens, config=CONFIG))


def test_a_positive_number_for_every_head_with_geometric_mean_one(plain):
    assert plain.shape == (2, 6)
    assert bool((plain > 0).all())
    assert float(plain.log().mean()) == pytest.approx(0, abs=1e-3)


def test_a_head_whose_output_weighs_more_gets_a_larger_scale(model, tokens, plain):
    projection = model.model.layers[1].self_attn.o_proj.weight
    before = projection.detach().clone()
    with torch.no_grad():
        projection[:, 2 * 16 : 3 * 16] *= 4  # the last layer: nothing that is measured before it changes
    try:
        changed = torch.tensor(calibrate(model, tokens, config=CONFIG))
    finally:
        with torch.no_grad():
            projection.copy_(before)
    ratio = changed / plain
    assert ratio[1, 2] / ratio[1, 0] == pytest.approx(4, rel=1e-2)
    assert torch.allclose(ratio[0], ratio[0, :1].expand(6), rtol=1e-2)


def test_the_table_is_taken_by_the_config(plain):
    config = MacConfig(influence_scale=plain.tolist())
    assert MacConfig.from_json(config.to_json()) == config


def test_the_model_is_left_as_it_was(model, tokens):
    before = model(tokens).logits
    calibrate(model, tokens, config=CONFIG)
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)
    assert torch.equal(model(tokens).logits, before)


def test_passages_that_are_too_short_are_refused(model):
    with pytest.raises(InputError, match=r"at least 106 tokens .* got \[1, 100\]"):
        calibrate(model, torch.zeros(1, 100, dtype=torch.int64), config=CONFIG)


def test_a_model_that_ignores_its_attention_is_refused(model, tokens):
    projections = [layer.self_attn.o_proj for layer in model.model.layers]
    kept = [projection.weight.detach().clone() for projection in projections]
    with torch.no_grad():
        for projection in projections:
            projection.weight.zero_()
    try:
        with pytest.raises(InputError, match="changed nothing"):
            calibrate(model, tokens, config=CONFIG)
    finally:
        with torch.no_grad():
            for projection, weight in zip(projections, kept, strict=True):
                projection.weight.copy_(weight)


def test_an_unknown_output_projection_is_refused(model, tokens):
    attention = model.model.layers[0].self_attn
    kept = attention.o_proj
    attention.o_proj = torch.nn.Sequential(kept)
    try:
        with pytest.raises(UnsupportedError, match="o_proj"):
            calibrate(model, tokens, config=CONFIG)
    finally:
        attention.o_proj = kept


def test_answered_passages_raise_some_heads_and_lower_none(model, tokens, plain):
    seen: list[tuple[int, int]] = []
    raised = torch.tensor(
        calibrate(
            model,
            tokens,
            config=CONFIG,
            answered=[(tokens[0], 8)],
            progress=lambda done, total: seen.append((done, total)),
        )
    )
    ratio = (raised / plain).flatten()
    usual = torch.isclose(ratio, ratio.min(), rtol=1e-3)
    assert len(ratio) / 2 <= usual.sum() < len(ratio)  # those at or below the median keep their place
    assert float(raised.log().mean()) == pytest.approx(0, abs=1e-3)
    assert seen == [(done, 6) for done in range(1, 7)]  # three passages of two layers


def test_answered_passages_that_are_too_short_are_refused(model, tokens):
    with pytest.raises(InputError, match="the shortest of 100"):
        calibrate(model, tokens, config=CONFIG, answered=[(tokens[0, :100], 8)])


def test_a_calibrated_preset_has_a_looser_cap_and_its_own_bound(plain):
    found = calibrated("balanced", plain.tolist())
    assert (found.threshold, found.influence) == (0.3, 0.1)
    assert found.influence_scale == tuple(map(tuple, plain.tolist()))
    for preset in ("exact", "paper"):
        with pytest.raises(InputError, match="careful, balanced or fast"):
            calibrated(preset, plain.tolist())
