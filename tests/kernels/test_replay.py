"""A comparison replayed as a CUDA graph is the one that runs launch by launch."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mac_kernels import MacConfig
from mac_transformers.batch import DecodeBatch
from mac_transformers.block import Seen
from mac_transformers.compare import compare
from mac_transformers.policies import Mac, Stored, Window

pytestmark = pytest.mark.gpu
SMALL = {"window": 32, "band": 8, "sinks": 2, "min_context": 16, "threshold": 0.2}
PROMPT, STEPS = 120, 40  # the ring turns over


def test_a_replayed_pass_gives_what_the_pass_gives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=61, num_hidden_layers=2, head_dim=16, initializer_range=0.3, **shape)
    model = LlamaForCausalLM(config).eval().cuda()
    tokens = torch.randint(0, 61, (2, PROMPT + STEPS + 1), generator=torch.Generator().manual_seed(1))
    tokens[:, PROMPT + 20 : PROMPT + 30] = -1  # every rule writes its own
    policies = {
        "loose": Mac(MacConfig(influence=None, **SMALL)),
        "window:loose": Window(like="loose"),
        "careful": Mac(MacConfig(**SMALL)),
        "bf16": Stored(torch.bfloat16),
    }
    seen: list[Seen] = []
    replayed = compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies, observe=seen.append)
    assert not any("without a CUDA graph" in record.message for record in caplog.records)
    assert [one.step for one in seen[::2]] == list(range(STEPS))
    monkeypatch.setattr(DecodeBatch, "can_be_recorded", False)
    launched = compare(model, tokens[:, :PROMPT], tokens[:, PROMPT:], policies)
    assert 0 < launched.group_hit[:, :, launched.index("loose")].mean() < 1
    for name in ("group_hit", "head_hit", "chosen"):
        assert torch.equal(getattr(replayed, name), getattr(launched, name))
    for name in ("kl", "nll", "kv_read", "error"):
        torch.testing.assert_close(
            getattr(replayed, name), getattr(launched, name), atol=5e-5, rtol=1e-4, equal_nan=True
        )
