"""Tiny random models of the families that the transformers integration is tested on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers

from mac_kernels import MacConfig

VOCAB = 499
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # the usual 0.02 makes attention almost uniform, which would hide most mistakes
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_HYBRID = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 12}
LONG_FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model family: its config, the library's own attention to compare with, and the layers that MAC decodes."""

    config: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    reference: str = "sdpa"
    mac_layers: tuple[int, ...] = (0, 1)
    exact: frozenset[str] = frozenset()

    def build(self, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        """A random model in eval mode with the reference attention."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**{**_SIZES, **self.changes, **changes})
        return transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=self.reference, dtype=dtype
        ).eval()


FAMILIES = {
    "llama": Family("LlamaConfig"),
    "llama-mha": Family("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": Family("MistralConfig", {"sliding_window": None}),
    "mistral-sliding": Family(
        "MistralConfig", {"sliding_window": 12}, mac_layers=(), exact=frozenset({"sliding window"})
    ),
    "qwen2": Family("Qwen2Config"),
    "qwen2-hybrid": Family(
        "Qwen2Config",
        {"use_sliding_window": True, **_HYBRID},
        mac_layers=(1,),
        exact=frozenset({"sliding window"}),
    ),
    "qwen3": Family("Qwen3Config"),
    "phi3": Family("Phi3Config", {"sliding_window": None}),
    "phi3-longrope": Family(
        "Phi3Config",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **LONG_FACTORS},
        },
    ),
    "phi3-partial": Family(
        "Phi3Config",
        {
            "sliding_window": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gemma2": Family(
        "Gemma2Config",
        {**_HYBRID, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 64},
        reference="eager",
        mac_layers=(1,),
        exact=frozenset({"sliding window"}),
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**_HYBRID, "query_pre_attn_scalar": 64},
        mac_layers=(1,),
        exact=frozenset({"sliding window"}),
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        {**_HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1},
        reference="eager",
        mac_layers=(),
        exact=frozenset({"attention sinks"}),
    ),
    "glm-interleaved-partial": Family("GlmConfig"),
    "cohere-interleaved": Family("CohereConfig"),
    "smollm3-nope": Family("SmolLM3Config", {"no_rope_layers": [1, 0]}),
}


def small_config(preset: str = "exact", **changes: Any) -> MacConfig:
    """A preset at a scale where short prompts already reuse and the ring wraps.

    Queries of random weights lie far apart, so about half of the groups hit at a threshold of -0.6 without a bound.
    """
    loose = {} if preset == "exact" else {"threshold": -0.6, "influence": None}
    sizes = {"window": 16, "band": 8, "sinks": 2, "min_context": 16}
    return MacConfig.preset(preset, **{**sizes, **loose, **changes})


def distinct_tokens(rows: int, count: int, *, seed: int = 0) -> torch.Tensor:
    """Random tokens, none twice in a row: the first layer's query of a token is the same wherever it stands, so three
    equal tokens would leave the choice between two ring rows to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([2 + torch.randperm(VOCAB - 2, generator=generator)[:count] for _ in range(rows)])


def padded_prompts(lengths: tuple[int, ...] = (40, 27), seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts padded on the left to one length."""
    width = max(lengths)
    ids = distinct_tokens(len(lengths), width, seed=seed)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}
