"""What happens to reused states that are handed on for long: their error by age and by chain length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mac_transformers.block import Seen

STRETCH = 1000
"""Decode steps over which the divergence is averaged."""
_EVERY = 16  # steps between two comparisons with exact attention
_AGES = (0, 64, 128, 256, 512, 1024, 1 << 30)
_HOPS = (1, 2, 4, 8, 16, 32, 1 << 30)


class Watch:
    """Looks on at a comparison; follows every stored state from hand to hand and samples errors of reused groups.

    The age of a reused group is what the acceptance rule compares with ``max_age``: the distance to its anchor, the
    last position at which its prefix was computed exactly, less ``HANDOVER`` for every time that it was handed on. Its
    hops are how often its oldest state was.
    """

    def __init__(self) -> None:
        self._hops: dict[tuple[str, ...], torch.Tensor] = {}
        self._samples: dict[str, list[torch.Tensor]] = {}

    def __call__(self, seen: Seen) -> None:
        """Follow one step through all layers; every now and then compare with exact attention."""
        trace, window, device = seen.trace, seen.rings.window, seen.trace.reason.device
        layers, rows, kv_heads = trace.hit.shape
        if seen.policies not in self._hops:
            self._hops[seen.policies] = torch.zeros(layers, rows, window, kv_heads, dtype=torch.int64, device=device)
        hops = self._hops[seen.policies]
        matched = (trace.matched_pos % window).view(layers, rows, kv_heads, -1)
        layer, row, group = torch.meshgrid(
            *(torch.arange(count, device=device) for count in (layers, rows, kv_heads)), indexing="ij"
        )
        handed = hops[layer[..., None], row[..., None], matched, group[..., None]].amax(-1) + 1
        hops[:, :, seen.position % window] = torch.where(trace.hit, handed, 0)
        if seen.step % _EVERY == 0:
            errors = self._errors(seen, hops[:, :, seen.position % window])
            for policy, sample in zip(seen.policies, errors, strict=True):
                self._samples.setdefault(policy, []).append(sample)

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
        """Per row: hit, age, hops and relative error of every layer's groups, [rows, 4, layers * Hkv] fp32."""
        _, rows, kv_heads = hops.shape
        relative = []
        for q, out, k, v in zip(seen.q, seen.out, seen.k, seen.v, strict=True):
            groups = q.view(rows, kv_heads, -1, q.shape[-1])
            exact = functional.scaled_dot_product_attention(groups, k, v, scale=seen.sm_scale).float().flatten(2)
            relative.append((out.float().view(exact.shape) - exact).norm(dim=-1) / exact.norm(dim=-1))
        age = seen.position - seen.rings.fields["anchor"][:, :, seen.position % seen.rings.window]
        found = (seen.trace.hit.float(), age.float(), hops.float(), torch.stack(relative))
        return torch.stack(found, dim=1).permute(2, 1, 0, 3).flatten(2)
