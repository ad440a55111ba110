"""TCA: column sums and retained mass against the whole attention matrix."""

from __future__ import annotations

import pytest
import torch

from mac_kernels import InputError
from mac_kernels.tca import TcaConfig
from mac_kernels.tca.calibrate import MEASURES, choose, column_sums, retained
from mac_kernels.tca.candidates import NUM_SPARSE
from mac_kernels.tca.config import far_blocks, far_end
from mac_kernels.tca.select import pick

CONFIG = TcaConfig(block=8, local_window=16, sinks=3)


def attention(length: int, *, cap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [4, L, D], keys [2, L, D] and the causal attention matrix [4, L, L] in double precision."""
    torch.manual_seed(length)
    q, k = torch.randn(4, length, 16), torch.randn(2, length, 16)
    logits = (q.double() @ k.double().repeat_interleave(2, 0).transpose(1, 2)) * 0.5
    if cap:
        logits = cap * torch.tanh(logits / cap)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return q, k, logits.masked_fill(hidden, -torch.inf).softmax(-1)


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("length", [1, 16, 19, 27, 28, 83])
def test_column_sums_are_those_of_the_attention_matrix(length: int, cap: float) -> None:
    q, k, matrix = attention(length, cap=cap)
    found = column_sums(q, k, config=CONFIG, sm_scale=0.5, logits_soft_cap=cap)
    group = matrix.view(2, 2, length, length).mean(1).float()
    far = torch.zeros(2, length)
    for i in range(length):
        end = far_end(far_blocks(i, CONFIG), CONFIG)
        far[:, :end] += group[:, i, :end]
    torch.testing.assert_close(found.last, group[:, -1])
    torch.testing.assert_close(found.mean, group.sum(1) / torch.arange(length, 0, -1))
    torch.testing.assert_close(found.far, far)
    assert found.far_queries == sum(far_blocks(i, CONFIG) > 0 for i in range(length))


def test_a_measure_is_what_it_says() -> None:
    length = 101
    q, k, matrix = attention(length)
    sums = column_sums(q, k, config=CONFIG, sm_scale=0.5)
    group = matrix.view(2, 2, length, length).mean(1)
    end = far_end(far_blocks(length - 1, CONFIG), CONFIG)
    got = retained(sums, CONFIG)
    assert set(got) == set(MEASURES)
    for head in range(2):
        for candidate in (0, 5, 13):
            _, ids = pick(sums.last[head, 3:end], candidate, CONFIG)
            kept = torch.zeros(length, dtype=torch.bool)
            kept[:3] = kept[3 + ids] = True
            means = group[head].sum(0) / torch.arange(length, 0, -1)
            raw = float(means[kept].sum())
            assert float(got["raw"][head, candidate]) == pytest.approx(raw, abs=1e-5)
            assert float(got["norm"][head, candidate]) == pytest.approx(raw / float(means[:end].sum()), abs=1e-5)
            rows = []
            for i in range(length):
                begin = far_end(far_blocks(i, CONFIG), CONFIG)
                if begin:
                    read = kept.clone()
                    read[begin:] = True
                    rows.append(float(group[head, i, read].sum()))
            assert float(got["row"][head, candidate]) == pytest.approx(sum(rows) / len(rows), abs=1e-5)


def test_uniform_attention_has_a_raw_mass_above_one() -> None:
    """Why raw is no probability: the sum of 1 / (L - k + 1) * sum over j of 1 / j tends to pi^2 / 6."""
    length = 400
    sums = column_sums(torch.zeros(1, length, 4), torch.zeros(1, length, 4), config=CONFIG, sm_scale=1.0)
    assert 1.6 < float(sums.mean.sum()) < 1.645


def test_the_smallest_budget_that_reaches_the_target_is_chosen() -> None:
    masses = [0.1 * place for place in range(1, NUM_SPARSE + 1)]
    assert choose(masses, 0.05) == 0
    assert choose(masses, 0.35) == 3
    assert choose([0.8] * NUM_SPARSE, 0.9) == NUM_SPARSE
    assert choose([0.5, 0.95, 0.4, *[0.99] * 11], 0.9) == 1


def test_a_text_without_a_far_region_is_refused() -> None:
    q, k, _ = attention(27)
    with pytest.raises(InputError, match="take at least 28"):
        retained(column_sums(q, k, config=CONFIG, sm_scale=0.5), CONFIG)
    q, k, _ = attention(28)
    assert retained(column_sums(q, k, config=CONFIG, sm_scale=0.5), CONFIG)["norm"].shape == (2, NUM_SPARSE)
