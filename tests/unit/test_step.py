"""The step as a whole: ranges, the order of the correction's error over two hops, counters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, MacConfig, Reason, Rope, StepTrace
from mac_kernels.counters import DecodeCounters
from mac_kernels.match.accept import HANDOVER
from mac_kernels.testing.conformance import Case, Session
from mac_kernels.types import covered_end


@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 60), st.integers(0, 60))
def test_ranges_partition_the_positions(sinks, band, p, lag):
    m = p + lag
    ends = covered_end(torch.tensor([p, m]), band=band, sinks=sinks).tolist()
    pieces = [range(min(sinks, m + 1)), range(sinks, ends[0]), range(ends[0], ends[1]), range(ends[1], m + 1)]
    if m + 1 < sinks:  # the band is empty then: the sinks hold everything
        assert not len(pieces[3])
    assert [t for piece in pieces for t in piece] == list(range(m + 1))
    assert ends[0] <= ends[1], "the rest never runs backwards"
    assert sinks <= ends[0] and (ends[0] == sinks or ends[0] == p + 1 - band)


def reference(kv_layout: str) -> BatchMacDecodeWithPagedKVCacheWrapper:
    return BatchMacDecodeWithPagedKVCacheWrapper(kv_layout, backend="reference")


def two_hops(size: float, *, correction: bool, still: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The lse2 [Hq] of a row two hops of ``size`` from its anchor, and that of the keys in the phase of each hop."""
    config = MacConfig(
        window=8,
        band=2,
        sinks=1,
        min_context=4,
        threshold=0.0,
        influence=None,
        max_age=None,
        nominees=None,
        correction=correction,
    )
    case = Case(head_dim=8, kv_heads=1)
    frequency = torch.zeros(4) if still else torch.tensor([0.9, 0.3, 0.1, 0.03])
    session = Session(
        reference, case, config, batch=1, capacity=16, rope=lambda device: Rope.from_inv_freq(frequency), seed=4
    )
    start, first, second = session.draw(3, 2, 8)
    first, second = (size * x / x.norm(dim=-1, keepdim=True) for x in (first, second))
    anchor = 10
    prompt = 20 * session.draw(anchor + 1, 2, 8)  # far from everything
    prompt[anchor] = start
    session.prefill([anchor + 1], [prompt])
    for hop, query in enumerate((start + first, start + first + second)):
        result = session.step(query[None])
        assert result.reasons == {Reason.HIT} and result.matched == {anchor + hop}
    m = anchor + 2
    ring = int(session.rings.slot_table[session.slots[0]])
    lse2 = session.rings.fields["lse2"][session.layer, ring, m % config.window].double()

    rotation = session.truth[0].rotation
    keys = [session.k[0, j, 0].double() for j in range(m)]
    phase = [anchor if j < anchor - 1 else j + 2 for j in range(m)]  # the step in which key j was read
    frozen = torch.stack([rotation(phase[j]).T @ keys[j] for j in range(1, m - 1)])
    query = session.truth[0].q_pre(result.q[0], m)
    return lse2, (query @ frozen.T / math.sqrt(8)).logsumexp(-1) / math.log(2)


@given(st.none() | st.integers(1, 150), st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_a_state_that_goes_in_circles_ages_with_every_hand(max_age, period):
    """Every token repeats the one a period ago: ages add up tokens and hands, and anchors may fall below zero."""
    config = MacConfig(
        window=8, band=2, sinks=1, min_context=4, threshold=0.0, influence=None, max_age=max_age, break_even=None
    )
    session = Session(reference, Case(head_dim=8, kv_heads=1), config, batch=1, capacity=60, seed=5)
    circle, prompt = 20 * session.draw(period, 2, 8), 12
    session.prefill([prompt], [circle[torch.arange(prompt) % period]])
    ring = int(session.rings.slot_table[session.slots[0]])
    anchors = list(range(prompt))
    for m in range(prompt, 55):
        result = session.step(circle[None, m % period])
        matched = result.trace.matched_pos[0].tolist()  # rounding chooses among rows that are equally near
        assert all((m - p) % period == 0 for p in matched)
        oldest = min(anchors[p] for p in matched)
        hit = max_age is None or m - oldest <= max_age
        assert result.reasons == {Reason.HIT if hit else Reason.AGE}
        anchors.append(oldest - HANDOVER if hit else m)
        assert int(session.rings.fields["anchor"][session.layer, ring, m % config.window, 0]) == anchors[m]
    assert max_age is not None or min(anchors) < 0


@pytest.mark.parametrize("still", [True, False], ids=["phase fixed", "phase turning"])
def test_correction_leaves_an_error_of_second_order_over_two_hops(still):
    """Halving both hops quarters what is left with the correction, and only halves it without."""
    left = {
        correction: [(lambda pair: (pair[0] - pair[1]).abs())(two_hops(size, correction=correction, still=still))
                     for size in (0.4, 0.2)]
        for correction in (True, False)
    }  # fmt: skip
    with_it, without = (left[c][0] / left[c][1] for c in (True, False))
    assert bool((with_it > 3.3).all()) and bool((with_it < 4.8).all()), with_it
    assert bool((without > 1.5).all()) and bool((without < 2.5).all()), without
    assert bool((left[True][1] < 0.3 * left[False][1]).all())


def test_zero_hops_are_exact():
    got, want = two_hops(0.0, correction=True, still=True)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)


def trace(reasons: list[list[int]], read: list[list[int]], lengths: list[int]) -> StepTrace:
    nothing = torch.zeros(0)
    return StepTrace(
        reason=torch.tensor(reasons),
        head_hit=nothing,
        matched_pos=nothing,
        distance=nothing,
        weight_bound=nothing,
        start=nothing,
        stop=nothing,
        kv_read=torch.tensor(read),
        kv_len=torch.tensor(lengths),
        sparse=nothing,
    )


def test_counters_add_and_drain():
    counters = DecodeCounters(2, "cpu")
    assert math.isnan(counters.drain().hit_rate)
    counters.add(1, trace([[Reason.HIT, Reason.AGE], [Reason.HIT, Reason.NO_RING]], [[3, 9], [4, 10]], [9, 10]))
    counters.add(1, trace([[Reason.INFLUENCE, Reason.DISTANCE]], [[5, 5]], [5]))
    counters.add(0, trace([[Reason.NO_ROW, Reason.SHORT_CONTEXT]], [[2, 2]], [2]))
    values = counters.drain()
    assert values.groups == {
        "HIT": [0, 2],
        "NO_RING": [0, 1],
        "SHORT_CONTEXT": [1, 0],
        "BYPASSED": [0, 0],
        "NO_ROW": [1, 0],
        "DISTANCE": [0, 1],
        "AGE": [0, 1],
        "INFLUENCE": [0, 1],
    }
    assert values.kv_tokens_read == [4, 36]
    assert values.kv_tokens_skipped == [0, 2 * 9 + 2 * 10 + 2 * 5 - 36]
    assert values.hit_rate == 2 / 8
    assert counters.drain().kv_tokens_read == [0, 0]
