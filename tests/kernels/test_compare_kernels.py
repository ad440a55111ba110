"""A comparison whose policies run on the kernels is the one that the reference gives."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mac_kernels import MacConfig
from mac_transformers.batch import DecodeBatch
from mac_transformers.block import Seen
from mac_transformers.compare import compare
from mac_transformers.policies import Mac, Window

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs where TRITON_INTERPRET=1 (make test sets it)"
)
SMALL = {"window": 32, "band": 8, "sinks": 2, "min_context": 16, "threshold": 0.2}
PROMPT, STEPS = 44, 4


def test_kernels_and_reference_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, num_hidden_layers=2, head_dim=16, initializer_range=0.3, **shape)
    ).eval()
    tokens = torch.randint(0, 61, (1, PROMPT + STEPS + 1), generator=torch.Generator().manual_seed(1))
    scale = tuple(tuple(0.5 + 0.3 * ((6 * layer + head) % 5) for head in range(6)) for layer in range(2))
    policies = {
        "window:loose": Window(like="loose"),
        "loose": Mac(MacConfig(influence=None, **SMALL)),
        "scaled": Mac(MacConfig(influence_scale=scale, **SMALL)),
        "paper": Mac(MacConfig.preset("paper", **SMALL)),
    }
    seen: list[Seen] = []
    kernels = compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies, observe=seen.append)
    assert {one.policies[0] for one in seen} == {"loose", "scaled", "paper"}  # kernels take one config a call
    assert [one.step for one in seen[::3]] == list(range(STEPS))
    for one in seen:
        assert one.trace.hit.shape == (2, 1, 2)  # layers, texts, kv heads
        assert len(one.q) == len(one.k) == 2

    monkeypatch.setattr(DecodeBatch, "_on_kernels", lambda self, policy: False)
    reference = compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies)
    assert 0 < reference.group_hit[:, :, reference.index("scaled")].mean() < 1
    for name in ("group_hit", "head_hit", "chosen"):
        assert torch.equal(getattr(kernels, name), getattr(reference, name))
    for name in ("kl", "nll", "kv_read", "error"):
        torch.testing.assert_close(getattr(kernels, name), getattr(reference, name), atol=5e-5, rtol=1e-4)
