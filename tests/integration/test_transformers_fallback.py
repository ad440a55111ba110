"""What MAC does not cover runs exactly, says so once and is counted."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES, Family, distinct_tokens, padded_prompts, small_config

from mac_kernels import UnsupportedError
from mac_transformers import ExactFallbackWarning, MacCache, fallback_counts, mac_attention_forward
from mac_transformers.rope import ModelRope

pytestmark = pytest.mark.usefixtures("one_thread")


def logits_of_continuation(model: Any, cache: Any, **kwargs: Any) -> torch.Tensor:
    """Logits of a prompt of 30 tokens and of 3 single ones after it, [33, vocab]."""
    ids, parts = distinct_tokens(1, 33), []
    with torch.no_grad():
        for part in (ids[:, :30], *ids[:, 30:].split(1, dim=1)):
            parts.append(model(part, past_key_values=cache, **kwargs).logits[0])
    return torch.cat(parts)


def assert_exact_with_one_warning(model: Any, cache: Any, reference_cache: Any, reason: str, text: str) -> None:
    expected = logits_of_continuation(model, reference_cache)
    model.set_attn_implementation("mac")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = logits_of_continuation(model, cache)
    messages = [str(w.message) for w in caught if issubclass(w.category, ExactFallbackWarning)]
    assert len(messages) == 1
    assert re.search(rf"\(({reason})\)", messages[0])
    assert text in messages[0]
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_ordinary_cache_is_exact_and_the_warning_names_the_fix(kind: str) -> None:
    model = FAMILIES["llama"].build()

    def cache() -> Any:
        if kind == "dynamic":
            return transformers.DynamicCache(config=model.config)
        return transformers.StaticCache(config=model.config, max_cache_len=40)

    assert_exact_with_one_warning(model, cache(), cache(), "no MacCache", "past_key_values=mac_transformers.MacCache(")
    assert fallback_counts() == {"no MacCache": 2 * 4}


def test_generate_without_a_cache_is_exact_too() -> None:
    model, inputs = FAMILIES["llama"].build(), padded_prompts()
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**inputs, **arguments)
    model.set_attn_implementation("mac")
    with pytest.warns(ExactFallbackWarning, match="no MacCache"):
        assert model.generate(**inputs, **arguments).equal(expected)


@pytest.mark.parametrize(
    ("name", "reason", "layers"),
    [("mistral-sliding", "sliding window", 2), ("gemma3", "sliding window", 1), ("gpt-oss", "attention sinks", 2)],
)
def test_layers_out_of_reach_say_so_once_and_are_counted(name: str, reason: str, layers: int) -> None:
    model = FAMILIES[name].build()
    reference = transformers.DynamicCache(config=model.config)
    assert_exact_with_one_warning(model, MacCache(model.config, small_config()), reference, reason, "layers")
    assert fallback_counts() == {reason: 4 * layers}


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (Family("GPT2Config", {"n_embd": 64, "n_head": 4, "n_layer": 2}), "rotation"),
        (
            Family(
                "DeepseekV3Config",
                {
                    "num_key_value_heads": 4,
                    "kv_lora_rank": 16,
                    "q_lora_rank": 16,
                    "qk_rope_head_dim": 8,
                    "qk_nope_head_dim": 16,
                    "v_head_dim": 16,
                    "head_dim": 8,
                    "first_k_dense_replace": 2,
                },
            ),
            "head dims|no MacCache",  # by what the library version caches
        ),
    ],
    ids=["no-rope", "mla"],
)
def test_models_out_of_reach_run_exactly(family: Family, reason: str) -> None:
    model = family.build()
    reference = transformers.DynamicCache(config=model.config)
    assert_exact_with_one_warning(model, MacCache(model.config, small_config()), reference, reason, "")
    assert list(fallback_counts().values()) == [8]


def test_a_mask_that_is_not_causal_is_exact_and_later_steps_recover() -> None:
    model = FAMILIES["llama"].build()
    ids = distinct_tokens(1, 40)
    # a prompt whose first ten tokens see each other, as images and prefixes do
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask[:10, :10] = True
    hole = torch.ones(1, 1, 1, 31, dtype=torch.bool)
    hole[..., 5] = False

    def run(cache: Any) -> torch.Tensor:
        with torch.no_grad():
            first = model(ids[:, :30], attention_mask=mask[None, None], past_key_values=cache).logits
            second = model(ids[:, 30:31], attention_mask=hole, past_key_values=cache).logits
            rest = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(31, 40)]
        return torch.cat((first, second, *rest), dim=1)

    expected = run(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("mac")
    cache = MacCache(model.config, small_config(window=30))
    with pytest.warns(ExactFallbackWarning, match="attention mask"):
        got = run(cache)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert fallback_counts() == {"attention mask": 4}
    assert sorted(p for p in cache.rings.fields["pos"][0, 0].tolist() if p >= 0) == list(range(31, 40))


@pytest.mark.parametrize("positions", [list(range(15)) * 2, list(range(0, 60, 2))], ids=["packed", "spread"])
def test_a_prompt_of_odd_positions_fills_no_ring(positions: list[int]) -> None:
    model = FAMILIES["llama"].build()
    model.set_attn_implementation("mac")
    cache = MacCache(model.config, small_config())
    with torch.no_grad(), pytest.warns(ExactFallbackWarning, match="position ids"):
        model(distinct_tokens(1, 30), position_ids=torch.tensor([positions]), past_key_values=cache)
    assert cache.rings is None


def test_another_attention_implementation_is_noticed() -> None:
    model = FAMILIES["llama"].build()
    with pytest.warns(ExactFallbackWarning, match=r'set_attn_implementation\("mac"\)'):
        logits_of_continuation(model, MacCache(model.config, small_config()))
    assert fallback_counts() == {"attention implementation": 2 * 4}


def test_a_dtype_that_the_kernels_do_not_have_runs_exactly() -> None:
    model = FAMILIES["llama"].build(dtype=torch.float64)
    reference = transformers.DynamicCache(config=model.config)
    assert_exact_with_one_warning(model, MacCache(model.config, small_config()), reference, "dtype", "torch.float64")


def test_gradients_flow_through_exact_attention() -> None:
    model = FAMILIES["llama"].build()
    ids = distinct_tokens(1, 30)

    def gradient(cache: Any) -> torch.Tensor:
        model.zero_grad()
        model(ids[:, :20], past_key_values=cache)
        model(ids[:, 20:21], past_key_values=cache).logits.sum().backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.clone()

    expected = gradient(transformers.DynamicCache(config=model.config))
    model.set_attn_implementation("mac")
    with pytest.warns(ExactFallbackWarning, match=r"gradients.*torch\.no_grad"):
        assert torch.allclose(gradient(MacCache(model.config, small_config())), expected, rtol=1e-4, atol=1e-5)


def test_attention_dropout_runs_exactly() -> None:
    model = FAMILIES["llama"].build(attention_dropout=0.5).train()
    model.set_attn_implementation("mac")
    with pytest.warns(ExactFallbackWarning, match=r"dropout.*model\.eval"):
        logits_of_continuation(model, MacCache(model.config, small_config()))


def test_keys_of_another_layer_are_attended_exactly() -> None:
    model = FAMILIES["llama"].build()
    model.set_attn_implementation("mac")
    cache = MacCache(model.config, small_config())
    logits_of_continuation(model, cache)
    attention = model.model.layers[1].self_attn
    query = torch.randn(1, 4, 1, 16)
    keys, values = cache.update(torch.randn(1, 2, 1, 16), torch.randn(1, 2, 1, 16), 0)
    with pytest.warns(ExactFallbackWarning, match="other keys"):
        out, _ = mac_attention_forward(attention, query, keys, values, None, scaling=0.25)
    k, v = (x.repeat_interleave(2, dim=1) for x in (keys, values))
    expected = torch.softmax(query @ k.transpose(2, 3) * 0.25, dim=-1) @ v
    assert torch.allclose(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_rotary_positions_of_several_dimensions_are_refused() -> None:
    config = transformers.Qwen2VLTextConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )
    layer = transformers.AutoModel.from_config(config).layers[0].self_attn
    with pytest.raises(UnsupportedError, match="several dimensions"):
        ModelRope(layer, torch.float32)
