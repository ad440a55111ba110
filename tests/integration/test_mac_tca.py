"""Generation with MAC whose misses read selected tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tca_budgets import CONFIG, budgets_for
from test_tca_transformers import ARGUMENTS, DENSE, SPARSE, generate, prompt
from tiny_models import FAMILIES

from mac_kernels import ConfigError, MacConfig
from mac_transformers import MacCache, fallback_counts
from mac_transformers.compare import compare
from mac_transformers.policies import Mac

pytestmark = pytest.mark.usefixtures("one_thread")
TCA = dataclasses.replace(CONFIG, refresh=6, mass_target=0.05)  # a low target trusts nearly every selection
MAC = MacConfig(window=8, band=8, sinks=2, min_context=16, threshold=-0.6, influence=None, max_age=40, tca=TCA)


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].build()


def decoded(model: Any, inputs: dict[str, torch.Tensor], cache: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.set_attn_implementation("mac")
    found = generate(model, inputs, cache)
    model.set_attn_implementation("sdpa")
    assert fallback_counts() == {}
    return found


def test_generation_is_what_the_comparison_measures(model: Any) -> None:
    budgets, free = budgets_for(model, SPARSE), torch.full((1, ARGUMENTS["max_new_tokens"]), -1)
    policies = {"both": Mac(MAC, budgets=budgets), "mac": Mac(dataclasses.replace(MAC, tca=None))}
    found = compare(model, prompt(70)["input_ids"], free, policies)
    cache = MacCache(model.config, MAC, budgets=budgets, record=True)
    tokens, _ = decoded(model, prompt(70), cache)
    assert tokens[0].equal(found.chosen[:, 1, 0])
    assert not torch.equal(found.kl[:, 1], found.kl[:, 2])
    assert cache.rings is not None
    counted = cache.rings.counters.drain()
    read = sum(counted.kv_tokens_read) / (sum(counted.kv_tokens_read) + sum(counted.kv_tokens_skipped))
    lengths = torch.arange(71, 71 + len(found.kl)).float()
    compared = float((found.kv_read[:, :, 1, 0].mean(1) * lengths).sum() / lengths.sum())
    prompts = 70 / 2 / float(lengths.sum())  # the comparison does not count what the prompt read to select
    assert read == pytest.approx(compared + prompts, rel=0.01)


def test_dense_heads_and_any_padding_decode_as_mac_does(model: Any) -> None:
    inputs, plain = prompt(70, 41), dataclasses.replace(MAC, tca=None)
    expected, want = decoded(model, inputs, MacCache(model.config, plain))
    tokens, got = decoded(model, inputs, MacCache(model.config, MAC, budgets=budgets_for(model, DENSE)))
    assert tokens.equal(expected)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    sparse = budgets_for(model, SPARSE)
    together, want = decoded(model, inputs, MacCache(model.config, MAC, budgets=sparse))
    alone = {name: values[1:, 29:] for name, values in inputs.items()}
    one, got = decoded(model, alone, MacCache(model.config, MAC, budgets=sparse))
    assert one[0].equal(together[1])
    torch.testing.assert_close(got[0], want[1], rtol=1e-3, atol=1e-3)


def test_removed_tokens_take_their_selection_along(model: Any) -> None:
    cache = MacCache(model.config, MAC, budgets=budgets_for(model, SPARSE))
    decoded(model, prompt(70, 41), cache)
    index = cache.rings.index
    newest = index.selected[0, :, 0].clone()
    assert newest.tolist() == [69 + 28, 40 + 28]  # 29 decoded steps, every seventh selects
    cache.crop(-1)
    assert index.selected[0, :, 0].equal(newest)
    cache.crop(-2)
    assert index.selected.eq(-1).all()


def test_rows_take_their_selection_along(model: Any) -> None:
    cache = MacCache(model.config, MAC, budgets=budgets_for(model, SPARSE))
    decoded(model, prompt(70, 41), cache)
    before = [tensor.clone() for tensor in cache.rings.index.tensors]
    assert not before[3][:, 0].equal(before[3][:, 1])
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(now.equal(own.flip(1)) for own, now in zip(before, cache.rings.index.tensors, strict=True))
    cache.batch_repeat_interleave(2)
    assert all(
        now.equal(own.flip(1).repeat_interleave(2, 1))
        for own, now in zip(before, cache.rings.index.tensors, strict=True)
    )


def test_without_budgets_it_says_what_to_do(model: Any) -> None:
    with pytest.raises(ConfigError, match="tca calibrate"):
        MacCache(model.config, MAC)
    with pytest.raises(ConfigError, match="calibrated for 8"):
        other = dataclasses.replace(MAC, tca=dataclasses.replace(TCA, block=16))
        MacCache(model.config, other, budgets=budgets_for(model, SPARSE))
