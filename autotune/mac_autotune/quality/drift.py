"""What happens to reused states that are handed on for long: their error by age and by chain length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mac_transformers.batch import Seen

STRETCH = 1000
"""Decode steps over which the divergence is averaged."""
_EVERY = 16  # steps between two comparisons with exact attention
_AGES = (0, 64, 128, 256, 512, 1024, 1 << 30)
_HOPS = (1, 2, 4, 8, 16, 32, 1 << 30)


class Watch:
    """Looks on at a comparison; follows every stored state from hand to hand and samples errors of reused groups.

    The age of a reused group is the distance to its anchor (the last position at which its prefix was computed
    exactly), its hops are how often its oldest state was handed on since.
    """

    def __init__(self) -> None:
        self._hops: dict[tuple[int, tuple[str, ...]], torch.Tensor] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}

    def __call__(self, seen: Seen) -> None:
        """Follow one step; every now and then compare with exact attention."""
        trace, window = seen.trace, seen.rings.window
        count, kv_heads = trace.hit.shape
        key = (seen.layer, seen.policies)
        if key not in self._hops:
            self._hops[key] = torch.zeros(count, window, kv_heads, dtype=torch.int64, device=seen.q.device)
        hops = self._hops[key]
        matched = (trace.matched_pos % window).view(count, kv_heads, -1)
        group = torch.arange(kv_heads, device=hops.device)[:, None]
        handed = hops[torch.arange(count, device=hops.device)[:, None, None], matched, group].amax(-1) + 1
        hops[:, seen.position % window] = torch.where(trace.hit, handed, 0)
        if seen.step % _EVERY == 0:
            errors = self._errors(seen, hops[:, seen.position % window])
            for policy, row in zip(seen.policies, errors, strict=True):
                self._samples.setdefault(policy, []).append(row)

    def bins(self, policy: str) -> Iterator[tuple[str, NDArray[np.float64]]]:
        """Relative errors of a policy's reused groups by ``age A-B`` and ``hops A-B``; empty bins are left out."""
        samples = self._samples.get(policy)
        if not samples:
            return
        hit, age, hops, error = torch.cat(samples, dim=-1).double().cpu().numpy()
        for name, values, edges in (("age", age, _AGES), ("hops", hops, _HOPS)):
            for low, high in itertools.pairwise(edges):
                inside = (hit > 0) & (values >= low) & (values < high)
                if inside.any():
                    yield f"{name} {low}-{high - 1}" if high < 1 << 30 else f"{name} {low}-", error[inside]

    def _errors(self, seen: Seen, hops: torch.Tensor) -> torch.Tensor:
        """Per row: hit, age, hops and relative error of every group, [rows, 4, Hkv] fp32."""
        exact = functional.scaled_dot_product_attention(
            seen.q[:, :, None], seen.k, seen.v, scale=seen.sm_scale, enable_gqa=True
        )[:, :, 0]
        count, kv_heads = hops.shape
        exact, out = (x.float().reshape(count, kv_heads, -1) for x in (exact, seen.out))
        error = (out - exact).norm(dim=-1) / exact.norm(dim=-1)
        anchor = seen.rings.fields["anchor"][seen.layer, :, seen.position % seen.rings.window]
        return torch.stack((seen.trace.hit.float(), (seen.position - anchor).float(), hops.float(), error), dim=1)
