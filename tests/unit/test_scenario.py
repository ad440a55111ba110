"""The scenario builder plants what it says, also under the presets that benchmarks use."""

from __future__ import annotations

import pytest
import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, HeadLayout, InputError, MacConfig, Reason, Rope
from mac_kernels.match.accept import distance_cap
from mac_kernels.testing.scenario import PagedStore, Scenario, plant_step

LAYOUT = HeadLayout(num_qo_heads=8, num_kv_heads=2, head_dim=32)
ROPE = Rope.from_inv_freq(10000.0 ** -(torch.arange(0, 32, 2).float() / 32))
SMALL = MacConfig(window=64, band=16, sinks=4, min_context=32)


def decide(step: Scenario):
    wrapper = BatchMacDecodeWithPagedKVCacheWrapper(step.kv.kv_layout, backend="reference")
    table = step.kv.table
    wrapper.plan(
        table.indptr,
        table.indices,
        table.last_page_len,
        layout=step.kv.layout,
        page_size=table.page_size,
        rope=step.rope,
        config=step.config,
    )
    cache = (step.kv.k_cache, step.kv.v_cache)
    out, trace = wrapper.run_return_trace(
        step.q, cache, rings=step.rings, layer=0, slots=step.slots, generations=step.generations
    )
    assert bool(out.isfinite().all())
    return trace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", ["exact", "synthetic"])
@pytest.mark.parametrize("changes", [{}, {"influence": None}, {"match_scope": "group"}, {"nominees": None}])
def test_hits_and_misses_are_as_planted(changes, rows, dtype):
    config = MacConfig.from_dict({**SMALL.to_dict(), **changes})
    step = plant_step(config, LAYOUT, kv_lens=[90, 120, 200, 97], hit=0.5, rope=ROPE, rows=rows, dtype=dtype, seed=1)
    trace = decide(step)
    assert 0 < int(step.hit.sum()) < step.hit.numel()
    assert torch.equal(trace.hit, step.hit), trace.reason
    assert torch.equal(trace.matched_pos, step.matched_pos)
    torch.testing.assert_close(trace.distance, step.distance, rtol=5e-3, atol=5e-3)
    cap = distance_cap(config, 32)
    assert bool((trace.distance[trace.head_hit] < cap).all())
    assert float((trace.distance / cap).min()) >= 0.59 and float((trace.distance / cap).max()) <= 1.31


def test_second_nearest_row_is_at_the_ratio():
    config = MacConfig.from_dict({**SMALL.to_dict(), "influence": None})
    step = plant_step(config, LAYOUT, kv_lens=[300] * 3, hit=1.0, rope=ROPE, second_ratio=1.09)
    rows = step.rings.rows(0, step.slots)
    query = ROPE.unrotate(step.q, step.kv.table.kv_len() - 1)
    distance = (rows.q_pre - query[:, None]).norm(dim=-1).masked_fill((rows.pos < 0)[..., None], torch.inf)
    nearest, second = distance.sort(1).values[:, :2].unbind(1)
    ratio = second / nearest
    assert float(ratio.min()) >= 1.089 and float(ratio.median()) <= 1.15


def test_hit_rate_is_scattered_over_requests_and_groups():
    step = plant_step(
        SMALL, HeadLayout(16, 8, 32), kv_lens=[100] * 32, hit=0.9, rope=ROPE, rows="synthetic", page_size=1
    )
    assert 0.82 < float(step.hit.float().mean()) < 0.97
    assert 1 < int((~step.hit).any(1).sum()) < 32


def test_lags_stay_in_range():
    step = plant_step(SMALL, LAYOUT, kv_lens=[150] * 8, hit=1.0, rope=ROPE, rows="synthetic", lag=(5, 9))
    lag = step.kv.table.kv_len()[:, None] - 1 - step.matched_pos
    assert int(lag.min()) >= 5 and int(lag.max()) <= 9 and len(lag.unique()) > 1
    exact = plant_step(SMALL, LAYOUT, kv_lens=[150] * 2, hit=1.0, rope=ROPE, rows="synthetic", lag=(64, 64))
    assert (149 - exact.matched_pos).unique().tolist() == [63], "cut at window - 1"


def test_influence_can_be_what_fails():
    step = plant_step(SMALL, LAYOUT, kv_lens=[150] * 4, hit=1.0, rope=ROPE, influence_fraction=2.0)
    reasons = decide(step).reason
    assert set(reasons.flatten().tolist()) == {Reason.INFLUENCE}


def test_chosen_groups_and_seeds():
    hits = torch.tensor([[True, False], [False, True]])
    first, again, other = (
        plant_step(SMALL, LAYOUT, kv_lens=[99, 120], hit=hits, rope=ROPE, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(decide(first).hit, hits)
    assert torch.equal(first.q, again.q) and torch.equal(first.kv.k_cache.nan_to_num(), again.kv.k_cache.nan_to_num())
    assert not torch.equal(first.q, other.q)


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_all_or_nothing(rate):
    assert bool((decide(plant_step(SMALL, LAYOUT, kv_lens=[99], hit=rate, rope=ROPE)).hit == bool(rate)).all())


def test_impossible_scenarios_are_refused():
    with pytest.raises(InputError, match="kv_lens has 83; planting needs >= 84 tokens"):
        plant_step(SMALL, LAYOUT, kv_lens=[100, 83], hit=1.0, rope=ROPE)
    no_sinks = MacConfig.from_dict({**SMALL.to_dict(), "sinks": 0})
    with pytest.raises(InputError, match=r"sinks=0 must be >= 1 .* or set influence=None"):
        plant_step(no_sinks, LAYOUT, kv_lens=[100], hit=1.0, rope=ROPE)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_everything_that_was_not_written_is_nan(kv_layout):
    store = PagedStore(2, 10, LAYOUT, page_size=4, kv_layout=kv_layout, generator=torch.Generator())
    store.write(0, 0, torch.ones(5, 2, 32), torch.ones(5, 2, 32))
    assert int(store.k_cache.isfinite().sum()) == int(store.v_cache.isfinite().sum()) == 5 * 2 * 32
    table = store.table([5, 0])
    assert table.kv_len().tolist() == [5, 0]
    beyond = table.indices[int(table.indptr[-1]) :].long()
    assert len(beyond) and bool(store.k_cache[beyond].isnan().all())
