"""Rows of a comparison that decode with TCA."""

from __future__ import annotations

import torch
from torch.nn import functional

from mac_kernels import HeadLayout, PagedKV
from mac_kernels.tca import FarSet, compact, select_prompt
from mac_kernels.tca.candidates import decode_keep, far_capacity
from mac_kernels.tca.reference import kept_mask, prefill_mask
from mac_kernels.tca.select import empty_far_set

from .policies import Tca

_QUERIES = 512  # that share a mask, which bounds its size


class TcaRows:
    """Consecutive rows under one :class:`Tca` policy: which far tokens each of them keeps, layer by layer.

    ``rows`` among those of the comparison; ``share`` [layers, rows], what was read of the KV cache in the last step.
    """

    def __init__(
        self, policy: Tca, rows: slice, *, layout: HeadLayout, num_layers: int, length: int, device: torch.device
    ) -> None:
        self.policy, self.rows = policy, rows
        self._choices = policy.choices(num_layers, layout.num_kv_heads)
        count, config = rows.stop - rows.start, policy.config
        self._far = [
            empty_far_set(
                count, layout.num_kv_heads, far_capacity(choice, length, config), config=config, device=device
            )
            for choice in self._choices
        ]
        self._keep = [
            torch.tensor([decode_keep(one, config.block) for one in choice], device=device) for choice in self._choices
        ]
        self.share = torch.ones(num_layers, count, device=device)
        self._steps = [0] * num_layers  # decoded since the selection

    def fill(self, q: torch.Tensor, kv: PagedKV, text: int, *, layer: int, sm_scale: float) -> torch.Tensor | None:
        """Select from the prompt of one text; returns its sparse attention [L, Hq, D] if the policy prefills so.

        ``q`` [L, Hq, D] and ``kv`` are those of this text alone.
        """
        config, length = self.policy.config, len(q)
        selection = select_prompt(q[-1:], kv, [length], self._choices[layer], config=config, sm_scale=sm_scale)
        found = selection.far
        self._keep_far(layer, slice(text, text + 1), found)
        if self.policy.prefill == "dense":
            return None
        kept = FarSet(found.ids[0], found.count[0], found.far_end[0])
        group, parts = kv.layout.group_size, []
        k, v = (cache[0, :, :length].repeat_interleave(group, dim=0) for cache in (kv.k_cache, kv.v_cache))
        # what sparse_prefill computes, on masks that torch attends with fast
        for low in range(0, length, _QUERIES):
            some = torch.arange(low, min(low + _QUERIES, length), device=q.device)
            mask = prefill_mask(some, kept, selection.prefix[0], length, config).repeat_interleave(group, dim=1)
            part = functional.scaled_dot_product_attention(
                q[some].transpose(0, 1)[None], k[None], v[None], attn_mask=mask.transpose(0, 1)[None], scale=sm_scale
            )
            parts.append(part[0].transpose(0, 1))
        return torch.cat(parts)

    def step(self, q: torch.Tensor, out: torch.Tensor, kv: PagedKV, *, layer: int, sm_scale: float) -> None:
        """One layer's step of the rows: ``q`` and ``out`` [rows, Hq, D], the latter written."""
        far, config, kv_len = self._far[layer], self.policy.config, kv.table.kv_len()
        anew = self._steps[layer] == config.refresh
        if anew:
            found = select_prompt(q, kv, kv_len.tolist(), self._choices[layer], config=config, sm_scale=sm_scale)
            self._keep_far(layer, slice(None), found.far)
        else:
            compact(q, kv, far, self._keep[layer], config=config, sm_scale=sm_scale)
        self._steps[layer] = 0 if anew else self._steps[layer] + 1
        length = int(kv_len[0])  # the rows of a comparison are equally long
        mask = kept_mask(far, kv_len, length)[:, :, None]  # [rows, Hkv, 1, L]
        # what sparse_decode computes, without a copy of all keys and values: a row is a page
        k, v = (cache[:, :, :length] for cache in (kv.k_cache, kv.v_cache))
        heads = q.view(len(q), k.shape[1], -1, q.shape[-1])
        attended = functional.scaled_dot_product_attention(heads, k, v, attn_mask=mask, scale=sm_scale)
        out.copy_(attended.reshape(q.shape))
        self.share[layer] = mask.float().mean((1, 2, 3)) + 0.5 * anew  # all keys are half of the cache

    def _keep_far(self, layer: int, rows: slice, found: FarSet) -> None:
        """Write what was selected for some rows."""
        far = self._far[layer]
        width = min(found.ids.shape[-1], far.ids.shape[-1])
        far.ids[rows, :, :width] = found.ids[:, :, :width]
        far.count[rows], far.far_end[rows] = found.count, found.far_end
