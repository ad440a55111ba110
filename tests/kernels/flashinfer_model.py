"""A model of FlashInfer's unsplit decode call in plain torch, for machines without a GPU.

It reads what the kernel reads on the device: begins, bounds and starts, and leaves alone what the kernel leaves alone.
"""

from __future__ import annotations

from typing import Any

import torch

from mac_kernels.attend.flashinfer import Ranges, Scores
from mac_kernels.types import LOG2_E, HeadLayout


class ModelAttention:
    """Stands in for :class:`mac_kernels.attend.flashinfer.RangeAttention`."""

    def __init__(
        self,
        begin: torch.Tensor,
        layout: HeadLayout,
        *,
        indices: torch.Tensor,
        page_size: int,
        kv_layout: str,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        assert indices.dtype == begin.dtype == torch.int32 and indices.dim() == 1
        assert bool((begin.diff() > 0).all()), "FlashInfer plans for the lengths that this implies"
        self._layout, self._indices, self._page, self._kv_layout = layout, indices, page_size, kv_layout
        self.begin = begin
        begin[-1] = indices.numel()

    def run(
        self,
        q: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        ranges: Ranges,
        scores: Scores,
        *,
        out: torch.Tensor,
        lse2: torch.Tensor,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
        pdl: bool = False,
    ) -> None:
        """Every row and kv head by itself."""
        rows, heads, group = self.begin.numel() - 1, self._layout.num_kv_heads, self._layout.group_size
        assert q.shape == out.shape and len(q) == rows and lse2.shape == q.shape[:2]
        assert ranges.bounds.shape == (rows * heads, 4) and ranges.bounds.is_contiguous()
        for number, (low, high, owner, _) in enumerate(ranges.bounds.tolist()):
            if high < 0:
                continue
            row, head = divmod(number, heads)
            starts = ranges.starts.flatten()[owner * ranges.starts_pitch :][:group]
            own = slice(head * group, head * group + group)
            position = torch.arange(low, max(low, high))
            if not len(position):
                out[row, own], lse2[row, own] = 0, -torch.inf
                continue
            k, v = (cache.float() for cache in self._tokens(keys_values, row, head, position))
            score = q[row, own].float() * k_scale @ k.T * scores.sm_scale
            if (cap := scores.logits_soft_cap) > 0:
                score = cap * torch.tanh(score / cap)
            score = torch.where(position >= starts[:, None], score * LOG2_E, -torch.inf)
            top = score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
            weight = torch.exp2(score - top)
            total = weight.sum(-1)
            out[row, own] = (weight @ v / total.clamp(min=1e-30)[:, None] * v_scale).to(out.dtype)
            lse2[row, own] = total.log2() + top[:, 0]

    def _tokens(
        self, keys_values: tuple[torch.Tensor, torch.Tensor], row: int, head: int, position: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        page = self._indices[int(self.begin[row]) + position // self._page].long()
        slot = position % self._page
        return tuple(
            cache[page, slot, head] if self._kv_layout == "NHD" else cache[page, head, slot] for cache in keys_values
        )
