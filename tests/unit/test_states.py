"""Attend and complete: states over ranges, their merge, and the correction."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mac_kernels import AttnState, HeadLayout, PagedKV, PageTable, correct, lse2_from_lse_e, merge_state
from mac_kernels import partial_attention as attend

LAYOUT = HeadLayout(num_qo_heads=6, num_kv_heads=2, head_dim=8)
SCALE = 0.31


def inputs(length: int = 11) -> tuple[torch.Tensor, PagedKV, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(1, 6, 8, generator=generator)
    k, v = torch.randn(2, length, 2, 8, generator=generator).unbind(0)
    table = PageTable(torch.tensor([0, length]), torch.arange(length), torch.tensor([1]), 1)
    return q, PagedKV(k[:, None], v[:, None], table, LAYOUT), k, v


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """torch's own attention in fp64 over keys first .. stop - 1, [Hq, D]."""
    k, v = (x[first:stop].double().repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q[0, :, None].double(), k, v, scale=SCALE)[:, 0]


@pytest.mark.parametrize(("first", "stop"), [(0, 11), (3, 4), (2, 9), (0, 99)])
def test_range_equals_torch_attention(first, stop):
    q, kv, k, v = inputs()
    state = attend(q, kv, torch.full((1, 6), first), torch.tensor([stop]), sm_scale=SCALE, return_kbar=True)
    torch.testing.assert_close(state.out[0].double(), dense(q, k, v, first, stop), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state.kbar[0].double(), dense(q, k, k, first, stop), atol=1e-5, rtol=1e-5)
    logits = torch.einsum("hd,nhd->hn", q[0].double(), k[first:stop].double().repeat_interleave(3, 1)) * SCALE
    torch.testing.assert_close(state.lse2[0].double(), logits.logsumexp(-1) / math.log(2), atol=1e-5, rtol=1e-5)


def test_every_head_has_its_own_start():
    q, kv, k, v = inputs()
    start = torch.tensor([[0, 5, 10, 11, 3, 20]])
    state = attend(q, kv, start, torch.tensor([11]), sm_scale=SCALE)
    for head, first in enumerate(start[0].tolist()):
        if first >= 11:
            assert float(state.lse2[0, head]) == -math.inf and bool((state.out[0, head] == 0).all())
        else:
            want = dense(q, k, v, first, 11)[head]
            torch.testing.assert_close(state.out[0, head].double(), want, atol=1e-5, rtol=1e-5)
    assert state.kbar is None


@pytest.mark.parametrize(("first", "stop"), [(4, 4), (7, 3), (11, 20), (0, 0)])
def test_empty_ranges_give_the_empty_state(first, stop):
    q, kv, *_ = inputs()
    state = attend(q, kv, torch.full((1, 6), first), torch.tensor([stop]), sm_scale=SCALE, return_kbar=True)
    assert bool(torch.isneginf(state.lse2).all())
    assert bool((state.out == 0).all()) and bool((state.kbar == 0).all())


def test_soft_cap_bends_the_logits():
    q, kv, k, v = inputs()
    state = attend(10 * q, kv, torch.zeros(1, 6).long(), torch.tensor([11]), sm_scale=SCALE, logits_soft_cap=2.0)
    logits = torch.einsum("hd,nhd->hn", 10 * q[0].double(), k.double().repeat_interleave(3, 1)) * SCALE
    weight = (2.0 * torch.tanh(logits / 2.0)).softmax(-1)
    want = torch.einsum("hn,nhd->hd", weight, v.double().repeat_interleave(3, 1))
    torch.testing.assert_close(state.out[0].double(), want, atol=1e-5, rtol=1e-5)


numbers = st.floats(-100, 100, allow_nan=False, width=32)
masses = st.one_of(st.just(-math.inf), st.floats(-300, 300, allow_nan=False, width=32))


@st.composite
def states(draw, count: int):
    def one() -> AttnState:
        lse2 = torch.tensor([[draw(masses)]])
        value = torch.tensor([[[draw(numbers), draw(numbers)]]])
        value = torch.where(torch.isfinite(lse2)[..., None], value, 0.0)
        return AttnState(value, lse2, -value)

    return [one() for _ in range(count)]


def assert_same(a: AttnState, b: AttnState) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-5)


EMPTY = AttnState(torch.zeros(1, 1, 2), torch.full((1, 1), -math.inf), torch.zeros(1, 1, 2))


@given(states(1))
def test_the_empty_state_is_the_identity(pair):
    for merged in (merge_state(pair[0], EMPTY), merge_state(EMPTY, pair[0])):
        assert torch.equal(merged.out, pair[0].out) and torch.equal(merged.kbar, pair[0].kbar)
        torch.testing.assert_close(merged.lse2, pair[0].lse2, atol=0, rtol=2**-22)


@given(states(2))
def test_merge_is_commutative(pair):
    assert_same(merge_state(pair[0], pair[1]), merge_state(pair[1], pair[0]))


@given(states(3))
def test_merge_is_associative(three):
    a, b, c = three
    assert_same(merge_state(merge_state(a, b), c), merge_state(a, merge_state(b, c)))


@given(states(2))
def test_merge_is_the_weighted_mean(pair):
    merged = merge_state(*pair)
    masses = [2.0 ** float(s.lse2) if abs(float(s.lse2)) < 1e9 else 0.0 for s in pair]
    if sum(masses) == 0:
        assert float(merged.lse2) == -math.inf and bool((merged.out == 0).all())
        return
    assert float(merged.lse2) == pytest.approx(math.log2(sum(masses)), abs=1e-4)
    for got, values in ((merged.out, [s.out for s in pair]), (merged.kbar, [s.kbar for s in pair])):
        want = sum(mass / sum(masses) * value.double() for mass, value in zip(masses, values, strict=True))
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("nats", [88.0, -88.0, 700.0, -700.0])
def test_masses_far_apart_do_not_overflow(nats):
    near = AttnState(torch.ones(1, 1, 2), torch.zeros(1, 1))
    far = AttnState(torch.full((1, 1, 2), 5.0), lse2_from_lse_e(torch.full((1, 1), nats)))
    merged = merge_state(near, far)
    heavier = far if nats > 0 else near
    torch.testing.assert_close(merged.out, heavier.out)
    torch.testing.assert_close(merged.lse2, heavier.lse2)
    assert merged.kbar is None


def test_two_empty_states_stay_empty():
    merged = merge_state(EMPTY, EMPTY)
    assert float(merged.lse2) == -math.inf
    assert bool((merged.out == 0).all()) and bool((merged.kbar == 0).all())


def test_base_conversion():
    torch.testing.assert_close(lse2_from_lse_e(torch.tensor([math.log(8.0)])), torch.tensor([3.0]))


@pytest.mark.parametrize("split", [0, 1, 6, 11])
def test_parts_merge_to_the_whole(split):
    q, kv, *_ = inputs()

    def part(first: int, stop: int) -> AttnState:
        return attend(q, kv, torch.full((1, 6), first), torch.tensor([stop]), sm_scale=SCALE, return_kbar=True)

    merged, whole = merge_state(part(0, split), part(split, 11)), part(0, 11)
    for got, want in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_correction_moves_lse2_along_the_mean_key_only():
    state = AttnState(torch.randn(2, 3, 4), torch.tensor([[0.0, 5.0, -math.inf]] * 2), torch.ones(2, 3, 4))
    before = torch.zeros(2, 3, 4)
    moved = correct(state, before + 0.5, before, sm_scale=0.25)
    torch.testing.assert_close(moved.lse2[:, :2], state.lse2[:, :2] + 0.25 * 2.0 / math.log(2))
    assert bool(torch.isneginf(moved.lse2[:, 2]).all())
    assert moved.out is state.out and moved.kbar is state.kbar


def test_correction_needs_a_mean_key_and_is_guarded():
    bare = AttnState(torch.zeros(1, 1, 2), torch.zeros(1, 1))
    assert correct(bare, torch.ones(1, 1, 2), torch.zeros(1, 1, 2), sm_scale=1.0) is bare
    wild = AttnState(torch.zeros(1, 1, 2), torch.zeros(1, 1), torch.full((1, 1, 2), 1e30))
    assert math.isfinite(float(correct(wild, torch.ones(1, 1, 2), torch.zeros(1, 1, 2), sm_scale=1.0).lse2))


def test_correction_is_the_derivative_of_lse2():
    """Central differences of lse2 over every coordinate of the query."""
    q, kv, *_ = inputs()
    everything = {"start": torch.zeros(1, 6).long(), "stop": torch.tensor([11]), "sm_scale": SCALE}

    def lse2(query: torch.Tensor) -> torch.Tensor:
        return attend(query, kv, **everything).lse2.double()

    state, step = attend(q, kv, **everything, return_kbar=True), 1e-2
    for d in range(8):
        shift = torch.zeros_like(q)
        shift[..., d] = step
        measured = (lse2(q + shift) - lse2(q - shift)) / 2
        predicted = correct(state, q + shift, q, sm_scale=SCALE).lse2.double() - state.lse2.double()
        torch.testing.assert_close(predicted, measured, atol=2e-6, rtol=2e-3)
