"""Rotations: inverse, transpose, magnitude, layouts, and both sources of the angles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mac_kernels import InputError, Rope

D = 12
POSITIONS = torch.tensor([0, 1, 7, 1000, 131_071])


def rope(*, rotary_dim: int = D, scaling: float = 1.0, interleaved: bool = False) -> Rope:
    inv_freq = 10000.0 ** -(torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    return Rope.from_inv_freq(inv_freq, attention_scaling=scaling, interleaved=interleaved)


KINDS = [
    rope(),
    rope(interleaved=True),
    rope(rotary_dim=4),
    rope(rotary_dim=6, interleaved=True, scaling=1.3),
    rope(scaling=0.7),
]
kinds = pytest.mark.parametrize("rope", KINDS, ids=["neox", "interleaved", "partial", "partial-scaled", "scaled"])


def queries(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(0))


@kinds
def test_unrotate_inverts_rotate(rope):
    x = queries(5, 3)
    torch.testing.assert_close(rope.unrotate(rope.rotate(x, POSITIONS), POSITIONS), x, atol=1e-5, rtol=1e-5)


@kinds
def test_pull_back_is_the_transpose(rope):
    x, y = queries(5, 3), queries(5, 3).flip(0)
    rotated = (rope.rotate(x, POSITIONS) * y).sum(-1)
    pulled = (x * rope.pull_back(y, POSITIONS)).sum(-1)
    torch.testing.assert_close(rotated, pulled, atol=1e-5, rtol=1e-5)


@kinds
def test_dims_beyond_rotary_dim_pass_through(rope):
    x = queries(5, 3)
    for turned in (rope.rotate(x, POSITIONS), rope.unrotate(x, POSITIONS), rope.pull_back(x, POSITIONS)):
        assert torch.equal(turned[..., rope.rotary_dim :], x[..., rope.rotary_dim :])
        assert not torch.equal(turned[1:, :, : rope.rotary_dim], x[1:, :, : rope.rotary_dim])


def test_rotation_of_a_plane_by_hand():
    # one plane at angle 90 degrees: (1, 0) -> (0, 1), whichever way the pairs are laid out
    quarter = torch.tensor([torch.pi / 2, 0.0])
    neox, gptj = Rope.from_inv_freq(quarter), Rope.from_inv_freq(quarter, interleaved=True)
    one = torch.tensor([1])
    torch.testing.assert_close(neox.rotate(torch.tensor([[[1.0, 5, 0, 6]]]), one), torch.tensor([[[0.0, 5, 1, 6]]]))
    torch.testing.assert_close(gptj.rotate(torch.tensor([[[1.0, 0, 5, 6]]]), one), torch.tensor([[[0.0, 1, 5, 6]]]))


def test_magnitude_scales_the_rotated_dims_only():
    x = queries(1, 1)
    turned = rope(rotary_dim=8, scaling=2.0).rotate(x, torch.tensor([9]))
    torch.testing.assert_close(turned[..., :8].norm(), 2 * x[..., :8].norm())
    torch.testing.assert_close(turned[..., 8:], x[..., 8:])


@kinds
def test_table_and_inverse_frequencies_agree(rope):
    table = torch.cat(rope.cos_sin(torch.arange(64)), dim=-1)
    from_table = Rope.from_cos_sin_cache(table, interleaved=rope.interleaved)
    positions = torch.tensor([0, 3, 63])
    x = queries(3, 2)
    assert from_table.rotary_dim == rope.rotary_dim
    assert torch.equal(from_table.rotate(x, positions), rope.rotate(x, positions))
    assert torch.equal(from_table.unrotate(x, positions), rope.unrotate(x, positions))


@kinds
@given(st.integers(1, 9000), st.integers(0, 3))
def test_kernel_table_holds_the_angles(rope, length, last):
    table = rope.cos_sin_cache(length, "cpu")
    assert table.shape[0] >= length and table.shape[1] == rope.rotary_dim
    position = torch.tensor([max(0, length - 1 - last)])
    torch.testing.assert_close(table[position], torch.cat(rope.cos_sin(position), -1), atol=0, rtol=0)


def test_sixteen_bit_queries_come_back_in_fp32():
    x = queries(5, 3).bfloat16()
    back = KINDS[0].unrotate(x, POSITIONS)
    assert back.dtype == torch.float32
    torch.testing.assert_close(back.norm(dim=-1), x.float().norm(dim=-1))


@given(st.integers(0, 100_000), st.integers(0, 100_000))
def test_rotations_compose_to_relative_positions(m, n):
    # the reason why matching happens before the rotation: a logit depends on the distance of the positions only
    rotation = rope()
    x, y = queries(1, 1).double(), queries(2, 1)[1:].double()
    angle = torch.tensor([float(m - n)], dtype=torch.float64)
    freq = 10000.0 ** -(torch.arange(0, D, 2).double() / D)
    cos, sin = (angle[:, None] * freq).cos(), (angle[:, None] * freq).sin()
    a, b = x[..., : D // 2], x[..., D // 2 :]
    relative = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    logit = (rotation.rotate(x, torch.tensor([m])) * rotation.rotate(y, torch.tensor([n]))).sum().double()
    torch.testing.assert_close(logit, (relative * y).sum(), atol=0.1, rtol=0)  # fp32 angles at 1e5 are good to .01


@pytest.mark.parametrize("rotary_dim", [0, 1, 7])
def test_rotary_dim_must_be_even(rotary_dim):
    with pytest.raises(InputError, match=f"rotary_dim={rotary_dim} must be even and >= 2; take it from the model"):
        Rope(lambda p: (p, p), rotary_dim)


def test_table_must_be_two_dimensional():
    with pytest.raises(InputError, match=r"cos_sin_cache must be \[max_position, rotary_dim\], got \[4\]"):
        Rope.from_cos_sin_cache(torch.zeros(4))
