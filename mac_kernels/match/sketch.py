"""The sketch: an 8-bit image of a kv group's queries that nominates rows for the exact distance.

Every element is a signed sum of one coordinate of each query head (a sparse Johnson-Lindenstrauss projection), so the
kernels compute it with a few gathers instead of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..types import HeadLayout

MAX_SKETCH_DIM = 128


@dataclass(frozen=True, slots=True)
class Sketch:
    """The fixed projection of a pool: ``image[k] = sum_t sign[t, k] * x[index[t, k]]``.

    ``index`` [T, K] int32 into the concatenated queries ``x`` [G * D] of a kv group; ``sign`` [T, K] fp32, +1 or -1.
    """

    index: torch.Tensor
    sign: torch.Tensor
    group_size: int

    def of(self, q_pre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B, Hkv, K] int8 and scale [B, Hkv] fp32 of the queries [B, Hq, D] of every kv group."""
        batch, num_heads, dim = q_pre.shape
        grouped = q_pre.float().reshape(batch, num_heads // self.group_size, self.group_size * dim)
        return quantize((grouped[:, :, self.index.long()] * self.sign).sum(-2))


def default_sketch_dim(layout: HeadLayout) -> int:
    """Largest sketch of at most 128 elements: whole images of a head, or a whole fraction of one."""
    dim = layout.head_dim
    if dim <= MAX_SKETCH_DIM:
        return dim * (MAX_SKETCH_DIM // dim)
    terms = -(-dim // MAX_SKETCH_DIM)
    while dim % terms:
        terms += 1
    return dim // terms


def make_sketch(layout: HeadLayout, sketch_dim: int, *, device: torch.device | str = "cpu", seed: int = 0) -> Sketch:
    """Draw the projection; the same seed gives the same one on every device and tensor-parallel rank.

    Every coordinate of every head enters every image of the group exactly once, so distances are kept in the mean.

    Raises
    ------
    ConfigError
        If ``sketch_dim`` is neither a multiple nor a divisor of the head dim.
    """
    dim, group = layout.head_dim, layout.group_size
    if sketch_dim < 1 or (sketch_dim % dim and dim % sketch_dim):
        raise ConfigError(
            f"sketch_dim={sketch_dim} must be a multiple or a divisor of head_dim={dim}; "
            f"use {default_sketch_dim(layout)} (the default) or 0 for no sketch"
        )
    images, terms = max(1, sketch_dim // dim), max(1, dim // sketch_dim)
    generator = torch.Generator().manual_seed(seed)
    index = torch.empty(group, terms, sketch_dim, dtype=torch.int32)
    for head in range(group):
        drawn = [torch.randperm(dim, generator=generator) + head * dim for _ in range(images)]
        # one permutation fills all terms of a narrow sketch, several lie side by side in a wide one
        index[head] = torch.cat(drawn).view(terms, sketch_dim)
    index = index.view(group * terms, sketch_dim)
    sign = torch.randint(0, 2, index.shape, generator=generator).float() * 2 - 1
    return Sketch(index.to(device), sign.to(device), group)


def quantize(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of the images [..., K] and their scale [...] fp32 (the largest magnitude maps to 127)."""
    scale = image.abs().amax(-1).clamp(min=1e-30) / 127
    return (image / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`quantize` up to rounding, fp32."""
    return codes.float() * scale[..., None]
