"""The sketch: a small 8-bit image of a kv group's queries that nominates rows for the exact distance."""

from __future__ import annotations

import torch

from ..types import HeadLayout


def sketch_projection(layout: HeadLayout, sketch_dim: int, *, seed: int = 0) -> torch.Tensor:
    """Return the fixed projection [G * D, sketch_dim] fp32 with orthogonal columns (rows, if ``sketch_dim`` is larger).

    The same seed gives the same matrix on every device and tensor-parallel rank.
    """
    rows = layout.group_size * layout.head_dim
    generator = torch.Generator().manual_seed(seed)
    size = max(rows, sketch_dim)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return basis[:rows, :sketch_dim].float().contiguous()


def quantize(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit codes of the images [..., K] and their scale [...] fp32 (largest magnitude maps to 127)."""
    scale = image.abs().amax(-1).clamp(min=1e-30) / 127
    return (image / scale[..., None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`quantize` up to rounding, fp32."""
    return codes.float() * scale[..., None]
