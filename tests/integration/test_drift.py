"""Following stored states from hand to hand, against a plain recursion over what was matched."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mac_autotune.quality.drift import Watch
from mac_kernels import MacConfig
from mac_transformers.block import Seen
from mac_transformers.compare import compare
from mac_transformers.policies import Mac


@pytest.fixture(scope="module")
def seen() -> tuple[Watch, list[Seen]]:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, num_hidden_layers=1, head_dim=8, initializer_range=0.3, **shape)
    )
    config = MacConfig(
        window=16, band=4, sinks=1, min_context=8, threshold=0.3, influence=None, nominees=None, max_age=120
    )
    watch, passes = Watch(), []

    def observe(one: Seen) -> None:
        passes.append(one)
        watch(one)

    tokens = torch.randint(0, 32, (2, 120), generator=torch.Generator().manual_seed(1))
    compare(model.eval(), tokens[:, :40], tokens[:, 40:], {"rule": Mac(config)}, observe=observe)
    return watch, passes


def test_hops_are_those_of_the_oldest_hand(seen):
    watch, passes = seen
    for row in range(2):
        for group in range(2):
            hops: dict[int, int] = {}
            for one in passes:
                matched = one.trace.matched_pos[0, row].view(2, -1)[group].tolist()
                hit = bool(one.trace.hit[0, row, group])
                hops[one.position] = 1 + max(hops.get(position, 0) for position in matched) if hit else 0
            last = passes[-1].position
            (stored,) = watch._hops.values()
            for position in range(last - 15, last + 1):
                assert int(stored[0, row, position % 16, group]) == hops[position]
            assert max(hops.values()) > 2


def test_errors_are_those_of_the_sampled_steps(seen):
    watch, passes = seen
    sampled = [one for one in passes if one.step % 16 == 0]
    errors = []
    for one in sampled:
        k, v = (x.repeat_interleave(2, dim=1) for x in (one.k[0], one.v[0]))
        weight = torch.softmax(torch.einsum("bhd,bhld->bhl", one.q[0], k) * one.sm_scale, -1)
        exact = torch.einsum("bhl,bhld->bhd", weight, v).reshape(2, 2, -1)
        out = one.out[0].reshape(2, 2, -1)
        relative = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
        errors += relative[one.trace.hit[0]].tolist()
    found = [value for task, values in watch.bins("rule") if task.startswith("age") for value in values]
    assert sorted(found) == pytest.approx(sorted(errors), rel=1e-3, abs=1e-6)
    assert len(found) > 5


def test_an_unknown_policy_has_no_bins(seen):
    assert list(seen[0].bins("another")) == []
