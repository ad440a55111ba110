"""Generation through ``model.generate`` under ``attn_implementation="mac"``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, Family, distinct_tokens, padded_prompts, small_config

import mac_transformers
from mac_kernels import MacConfig
from mac_transformers import MacCache

pytestmark = pytest.mark.usefixtures("one_thread")
NEW_TOKENS = 16


def generate(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, N] and their logits [B, N, vocab]."""
    result = model.generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
        **kwargs,
    )
    return result.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(result.logits, dim=1)


@pytest.mark.filterwarnings("ignore::mac_transformers.ExactFallbackWarning")
def test_under_the_exact_preset_greedy_tokens_equal_the_librarys_own_attention(family: Family) -> None:
    model, inputs = family.build(), padded_prompts()
    expected, expected_logits = generate(model, inputs)
    model.set_attn_implementation("mac")
    cache = MacCache(model.config, small_config("exact"))
    tokens, logits = generate(model, inputs, past_key_values=cache)
    assert tokens.equal(expected)
    assert torch.allclose(logits, expected_logits, rtol=1e-4, atol=1e-3 * float(expected_logits.std()))
    assert tuple(cache.layer_info) == family.mac_layers
    assert set(mac_transformers.fallback_counts()) == family.exact
    if family.mac_layers:
        groups = cache.rings.counters.drain().groups
        per_layer = 2 * cache.layout.num_kv_heads * (NEW_TOKENS - 1)
        assert groups["DISTANCE"] == [per_layer] * len(family.mac_layers)


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "eos_token_id": 1}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["beams", "prompt-lookup", "several-returned"],
)
def test_other_ways_of_generating_equal_the_librarys_own(arguments: dict[str, Any]) -> None:
    model = FAMILIES["llama"].build()
    phrase = distinct_tokens(1, 12)
    inputs = {"input_ids": phrase.repeat(1, 3), "attention_mask": torch.ones(1, 36, dtype=torch.int64)}
    arguments = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **arguments}
    expected = model.generate(**inputs, **arguments)
    model.set_attn_implementation("mac")
    cache = MacCache(model.config, small_config("exact"))
    assert model.generate(**inputs, past_key_values=cache, **arguments).equal(expected)
    assert cache.rings.counters.drain().kv_tokens_read[0] > 0


def test_a_conversation_continues_on_the_same_cache() -> None:
    model = FAMILIES["llama"].build()
    arguments = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    turns = [distinct_tokens(1, 30), distinct_tokens(1, 9, seed=1), distinct_tokens(1, 1, seed=2)]

    def talk(cache: Any) -> torch.Tensor:
        text = torch.empty(1, 0, dtype=torch.int64)
        for turn in turns:
            text = model.generate(torch.cat((text, turn), dim=1), past_key_values=cache, **arguments)
        return text

    expected = talk(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("mac")
    assert talk(MacCache(model.config, small_config("exact"))).equal(expected)
    assert mac_transformers.fallback_counts() == {}


def test_the_implementation_can_be_named_when_a_model_is_made() -> None:
    config = FAMILIES["llama"].build().config
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="mac").eval()
    cache = MacCache(model.config)
    generate(model, padded_prompts(), past_key_values=cache)
    assert cache.mac_config == MacConfig.preset("careful")
    assert cache.rings.counters.drain().groups["SHORT_CONTEXT"][0] > 0


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "phi3-longrope", "glm-interleaved-partial", "smollm3-nope", "gemma2"]
)
@pytest.mark.filterwarnings("ignore::mac_transformers.ExactFallbackWarning")
def test_a_reusing_preset_hits_and_stays_near_full_attention(name: str) -> None:
    model, inputs = FAMILIES[name].build(), padded_prompts((60, 47))
    expected_tokens, expected = generate(model, inputs)
    model.set_attn_implementation("mac")
    errors = {}
    # the wide band leaves little mass to the reused state, the narrow one a lot
    for band in (8, 32):
        cache = MacCache(model.config, small_config("fast", band=band, min_context=40, threshold=-1.0))
        tokens, logits = generate(model, inputs, past_key_values=cache)
        counted = cache.rings.counters.drain()
        assert counted.hit_rate > 0.5
        assert sum(counted.kv_tokens_skipped) > 0
        errors[band] = float((logits[:, 1] - expected[:, 1]).norm() / expected[:, 1].norm())
        assert tokens[:, 0].equal(expected_tokens[:, 0]), "the prompt is read exactly"
    assert 0 < errors[32] < errors[8]


def test_a_bf16_model_keeps_bf16_rows_and_stays_within_its_rounding() -> None:
    model, inputs = FAMILIES["llama"].build(dtype=torch.bfloat16), padded_prompts()
    oracle = FAMILIES["llama"].build()
    oracle.load_state_dict(model.state_dict())
    oracle.float()
    follow = distinct_tokens(2, 8, seed=4)

    def logits(model: Any, cache: Any) -> torch.Tensor:
        with torch.no_grad():
            model(inputs["input_ids"], past_key_values=cache)
            return torch.cat([model(t, past_key_values=cache).logits.float() for t in follow.split(1, dim=1)], dim=1)

    exact = logits(oracle, transformers.DynamicCache(config=model.config))
    plain = logits(model, transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("mac")
    cache = MacCache(model.config, small_config("exact"))
    ours = logits(model, cache)
    assert cache.rings.fields["q_pre"].dtype == torch.bfloat16
    assert float((ours - exact).norm()) < 2 * float((plain - exact).norm())
