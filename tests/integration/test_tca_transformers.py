"""Generation through ``model.generate`` under ``attn_implementation="tca"``."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from tca_budgets import CONFIG, budgets_for
from tiny_models import FAMILIES, VOCAB, distinct_tokens

import mac_transformers
from mac_kernels import ConfigError, HeadLayout, UnsupportedError
from mac_kernels.tca.candidates import NUM_SPARSE
from mac_transformers import TcaCache, tca_cache
from mac_transformers.compare import compare
from mac_transformers.policies import Tca
from mac_transformers.tca_state import unsupported_reasons

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSE = [[0, 5], [NUM_SPARSE, 2]]
DENSE = [[NUM_SPARSE] * 2] * 2
EVICT = dataclasses.replace(CONFIG, mode="evict")
ARGUMENTS = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> Any:
    return FAMILIES["llama"].build()


@pytest.fixture
def sparse_model(model: Any) -> Any:
    model.set_attn_implementation("tca")
    yield model
    model.set_attn_implementation("sdpa")


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, N] and their logits [B, N, vocab]."""
    result = model.generate(
        **inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **ARGUMENTS
    )
    return result.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(result.logits, dim=1)


def prompt(*lengths: int) -> dict[str, torch.Tensor]:
    """Random prompts, padded on the left."""
    width = max(lengths)
    tokens = torch.randint(2, VOCAB, (len(lengths), width), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(mask, tokens, 0), "attention_mask": mask.long()}


@pytest.mark.parametrize("mode", ["index", "evict"])
def test_dense_heads_generate_what_the_library_does(model: Any, mode: str) -> None:
    inputs = prompt(70, 41)
    expected, expected_logits = generate(model, inputs)
    model.set_attn_implementation("tca")
    cache = TcaCache(model.config, dataclasses.replace(CONFIG, mode=mode), budgets=budgets_for(model, DENSE))
    tokens, logits = generate(model, inputs, cache)
    model.set_attn_implementation("sdpa")
    assert tokens.equal(expected)
    assert torch.allclose(logits, expected_logits, rtol=1e-4, atol=1e-3 * float(expected_logits.std()))
    assert mac_transformers.fallback_counts() == {}


def test_generation_is_what_the_comparison_measures(model: Any) -> None:
    budgets = budgets_for(model, SPARSE)
    tokens = prompt(70)["input_ids"]
    free = torch.full((1, ARGUMENTS["max_new_tokens"]), -1)
    chosen = compare(model, tokens, free, {"tca": Tca(CONFIG, budgets)}).chosen
    model.set_attn_implementation("tca")
    got, logits = generate(model, prompt(70), TcaCache(model.config, CONFIG, budgets=budgets))
    model.set_attn_implementation("sdpa")
    assert got[0].equal(chosen[:, 1, 0])
    assert not got[0].equal(chosen[:, 0, 0]) or float(logits.std()) > 0


def test_both_modes_and_any_padding_write_the_same(sparse_model: Any) -> None:
    budgets = budgets_for(sparse_model, SPARSE)
    together, expected = generate(sparse_model, prompt(70, 41), TcaCache(sparse_model.config, CONFIG, budgets=budgets))
    evicted, logits = generate(sparse_model, prompt(70, 41), TcaCache(sparse_model.config, EVICT, budgets=budgets))
    assert evicted.equal(together)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    alone = {name: values[1:, 29:] for name, values in prompt(70, 41).items()}
    one, logits = generate(sparse_model, alone, TcaCache(sparse_model.config, CONFIG, budgets=budgets))
    assert one[0].equal(together[1])
    torch.testing.assert_close(logits[0], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("refresh", [1, 5])
def test_the_comparison_selects_anew_when_generation_does(model: Any, refresh: int) -> None:
    budgets, config = budgets_for(model, SPARSE), dataclasses.replace(CONFIG, refresh=refresh)
    free = torch.full((1, ARGUMENTS["max_new_tokens"]), -1)
    policies = {"tca": Tca(config, budgets), "stale": Tca(CONFIG, budgets)}
    found = compare(model, prompt(70)["input_ids"], free, policies)
    model.set_attn_implementation("tca")
    got, _ = generate(model, prompt(70), TcaCache(model.config, config, budgets=budgets))
    model.set_attn_implementation("sdpa")
    assert got[0].equal(found.chosen[:, 1, 0])
    # a token is selected by after so many decoded ones, and then all keys are read
    anew = torch.arange(len(found.kl)) % (refresh + 1) == refresh
    more = (found.kv_read[:, :, 1] - found.kv_read[:, :, 2]).mean((1, 2))
    assert bool((more[anew] > 0.4).all()) and bool((more[~anew].abs() < 0.1).all())
    assert not torch.equal(found.kl[:, 1], found.kl[:, 2])


def test_eviction_frees_what_is_not_read(sparse_model: Any) -> None:
    inputs, held = prompt(120), {}
    for config in (CONFIG, EVICT):
        cache = TcaCache(sparse_model.config, config, budgets=budgets_for(sparse_model, [[0, 0]] * 2))
        generate(sparse_model, inputs, cache)
        assert cache.get_seq_length() == 120 + ARGUMENTS["max_new_tokens"] - 1
        held[config.mode] = cache.kv_bytes
    per_token = 2 * 2 * 2 * 16 * 4
    assert held["index"] == 149 * per_token
    # sinks, one or two tokens of each of 16 far blocks, the window, and what the last page has room for
    assert 34 * per_token < held["evict"] < 80 * per_token


@pytest.mark.parametrize("config", [CONFIG, EVICT], ids=["index", "evict"])
def test_a_conversation_goes_on_with_the_same_cache(sparse_model: Any, config: Any) -> None:
    cache = TcaCache(sparse_model.config, config, budgets=budgets_for(sparse_model, DENSE))
    whole = transformers.DynamicCache(config=sparse_model.config)

    def talk(text: torch.Tensor, turn: torch.Tensor, past: Any) -> torch.Tensor:
        text = torch.cat((text, turn), 1)
        # without a mask, tokens that the model wrote would be taken for padding
        return sparse_model.generate(text, attention_mask=torch.ones_like(text), past_key_values=past, **ARGUMENTS)

    text = plain = torch.empty(1, 0, dtype=torch.int64)
    for seed, count in enumerate((50, 9, 1)):
        turn = distinct_tokens(1, count, seed=seed)
        text = talk(text, turn, cache)
        sparse_model.set_attn_implementation("sdpa")
        plain = talk(plain, turn, whole)
        sparse_model.set_attn_implementation("tca")
    assert mac_transformers.fallback_counts() == {}
    assert text.equal(plain)


@pytest.mark.parametrize("arguments", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_rows_and_lengths_that_change_are_followed(sparse_model: Any, arguments: dict[str, Any]) -> None:
    phrase = distinct_tokens(1, 12)
    inputs = {"input_ids": phrase.repeat(1, 5), "attention_mask": torch.ones(1, 60, dtype=torch.int64)}
    cache = TcaCache(sparse_model.config, CONFIG, budgets=budgets_for(sparse_model, DENSE))
    got = sparse_model.generate(**inputs, past_key_values=cache, **{**ARGUMENTS, **arguments})
    sparse_model.set_attn_implementation("sdpa")
    assert got.equal(sparse_model.generate(**inputs, **{**ARGUMENTS, **arguments}))


@pytest.mark.filterwarnings("ignore::mac_transformers.ExactFallbackWarning")
def test_after_eviction_rows_cannot_be_moved_nor_read_exactly(sparse_model: Any) -> None:
    cache = TcaCache(sparse_model.config, EVICT, budgets=budgets_for(sparse_model, SPARSE))
    generate(sparse_model, prompt(70), cache)
    with pytest.raises(UnsupportedError, match="rows are repeated"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(UnsupportedError, match="tokens are removed"):
        cache.crop(-1)
    token, later = torch.ones(1, 1, dtype=torch.int64), torch.full((1, 1), 500)
    hole = torch.ones(1, 1, 1, 100, dtype=torch.bool)
    hole[..., 50] = False
    with pytest.raises(UnsupportedError, match="pad on the left"), torch.no_grad():
        sparse_model(token, past_key_values=cache, attention_mask=hole, position_ids=later)


def test_shapes_that_no_kernel_covers() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    wide = HeadLayout(8, 2, 512)
    config = dataclasses.replace(CONFIG, block=16)
    assert unsupported_reasons(HeadLayout(8, 2, 256), config, torch.bfloat16, gpu) == ()
    assert unsupported_reasons(wide, config, torch.float32, cpu) == ()
    assert unsupported_reasons(wide, CONFIG, torch.float64, gpu) == (
        "torch.float64 (float32, bfloat16, float16)",
        "head_dim=512 (at most 256)",
        "block=8 (at least 16)",
    )


@pytest.mark.parametrize("config", [CONFIG, EVICT], ids=["index", "evict"])
def test_a_shape_that_no_kernel_covers_is_exact_said_once_and_counted(
    sparse_model: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_gpu(layout: Any, config: Any, dtype: torch.dtype, device: torch.device) -> tuple[str, ...]:
        return unsupported_reasons(layout, config, dtype, torch.device("cuda"))

    monkeypatch.setattr(tca_cache, "unsupported_reasons", on_a_gpu)
    cache = TcaCache(sparse_model.config, config, budgets=budgets_for(sparse_model, SPARSE))
    with pytest.warns(mac_transformers.ExactFallbackWarning) as said:
        tokens, logits = generate(sparse_model, prompt(70, 41), cache)
    assert [str(one.message) for one in said] == [
        "exact attention instead of TCA (shape): block=8 (at least 16): no kernel of TCA covers this layer"
    ]
    assert mac_transformers.fallback_counts() == {"shape": 2 * ARGUMENTS["max_new_tokens"]}
    sparse_model.set_attn_implementation("sdpa")
    expected, expected_logits = generate(sparse_model, prompt(70, 41))
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_without_its_cache_or_budgets_tca_says_what_to_do(sparse_model: Any) -> None:
    with pytest.warns(mac_transformers.ExactFallbackWarning, match=r"instead of TCA \(no TcaCache\)"):
        sparse_model(distinct_tokens(1, 9))
    with pytest.raises(ConfigError, match="tca calibrate"):
        TcaCache(sparse_model.config)
