"""Attend, the specification: attention over a range of positions per query head, as a mergeable state."""

from __future__ import annotations

import torch

from ..paged import PagedKV
from ..types import LOG2_E, AttnState


def partial_attention(
    q: torch.Tensor,
    kv: PagedKV,
    start: torch.Tensor,
    stop: torch.Tensor,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    return_kbar: bool = False,
    keep: torch.Tensor | None = None,
) -> AttnState:
    """Attend to positions ``[start, stop)`` of every request.

    Parameters
    ----------
    q : torch.Tensor, [B, Hq, D]
        Queries after RoPE, any floating dtype.
    kv : PagedKV
        Keys and values.
    start : torch.Tensor, [B, Hq] int64
        First position of every head; nothing before the smallest start of a request is read.
    stop : torch.Tensor, [B] int64
        End of the range, exclusive; cut at ``kv_len``.
    sm_scale : float
        Scale of the logits, usually ``1 / sqrt(D)``.
    logits_soft_cap : float, default 0.0
        ``cap * tanh(logit / cap)``; 0 turns it off.
    return_kbar : bool, default False
        Also return the attention-weighted mean key.
    keep : torch.Tensor, optional, [B, Hkv, L] bool
        Positions that every kv group may read at all, ``L`` being at least the longest request. Default: all.

    Returns
    -------
    AttnState
        fp32; an empty range gives ``lse2 = -inf`` and ``out = 0``.
    """
    stop = torch.minimum(stop, kv.table.kv_len())
    first = torch.minimum(start.amin(1), stop).clamp(min=0)
    count = max(int((stop - first).max()), 0)
    k, v = kv.gather(first, count)  # [B, N, Hkv, D]
    position = first[:, None] + torch.arange(count, device=q.device)
    mask = (position[:, None] >= start[:, :, None]) & (position < stop[:, None])[:, None]  # [B, Hq, N]
    if keep is not None:
        place = position.clamp(max=keep.shape[2] - 1)[:, None].expand(-1, keep.shape[1], -1)
        mask = mask & keep.gather(2, place).repeat_interleave(kv.layout.group_size, dim=1)
    return masked_attention(q, k, v, mask, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, return_kbar=return_kbar)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    return_kbar: bool = False,
) -> AttnState:
    """Attention of ``q`` [B, Hq, D] over ``k``, ``v`` [B, N, Hkv, D] where ``mask`` [B, Hq, N] is true, in fp32."""
    batch, num_heads, dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = q.float().view(batch, num_kv_heads, num_heads // num_kv_heads, dim)
    logits = torch.einsum("bhgd,bnhd->bhgn", grouped, k.float()).reshape(mask.shape) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    logits = torch.where(mask, logits * LOG2_E, -torch.inf)
    lse2 = logits_logsumexp2(logits)
    weight = torch.exp2(logits - torch.where(torch.isfinite(lse2), lse2, 0.0)[..., None])
    weight = weight.view(*grouped.shape[:3], k.shape[1])

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bhgn,bnhd->bhgd", weight, x.float()).reshape(batch, num_heads, dim)

    return AttnState(mean(v), lse2, mean(k) if return_kbar else None)


def shared_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    return_kbar: bool = False,
) -> AttnState:
    """Attention of many queries [N, Hq, D] over the keys of one request [1, L, Hkv, D] where ``mask`` [N, Hq, L]."""
    count, heads = q.shape[:2]
    kv_heads = k.shape[2]

    # the queries become heads of one request, so that they share its keys instead of copying them
    def by_group(x: torch.Tensor) -> torch.Tensor:
        return x.view(count, kv_heads, -1, *x.shape[2:]).transpose(0, 1).reshape(1, count * heads, *x.shape[2:])

    def by_query(x: torch.Tensor) -> torch.Tensor:
        grouped = x.view(kv_heads, count, heads // kv_heads, *x.shape[2:])
        return grouped.transpose(0, 1).reshape(count, heads, *x.shape[2:])

    state = masked_attention(
        by_group(q),
        k,
        v,
        by_group(mask),
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        return_kbar=return_kbar,
    )
    return AttnState(by_query(state.out), by_query(state.lse2), None if state.kbar is None else by_query(state.kbar))


def logits_logsumexp2(logits2: torch.Tensor) -> torch.Tensor:
    """Base-2 log-sum-exp over the last dim of base-2 logits; ``-inf`` over nothing."""
    if logits2.shape[-1] == 0:
        return torch.full(logits2.shape[:-1], -torch.inf, device=logits2.device)
    top = logits2.amax(-1)
    safe = torch.where(torch.isfinite(top), top, 0.0)
    return torch.exp2(logits2 - safe[..., None]).sum(-1).log2() + safe
