"""Complete, the specification: merge disjoint states, correct a reused one."""

from __future__ import annotations

import torch

from ..types import LOG2_E, AttnState

_GUARD_LOG2 = 1024.0  # keeps the corrected lse2 finite; far beyond what a close match moves it by


def merge_state(a: AttnState, b: AttnState) -> AttnState:
    """Merge the states over two disjoint key sets, in fp32 and base 2.

    An empty side is the identity; two empty sides give the empty state, never NaN. ``kbar`` is merged where both
    sides carry it, otherwise dropped.
    """
    top = torch.maximum(a.lse2, b.lse2)
    safe = torch.where(torch.isfinite(top), top, 0.0)
    mass_a, mass_b = torch.exp2(a.lse2 - safe), torch.exp2(b.lse2 - safe)
    total = mass_a + mass_b
    divisor = torch.where(total > 0, total, 1.0)
    weight_a, weight_b = (mass_a / divisor)[..., None], (mass_b / divisor)[..., None]
    kbar = None if a.kbar is None or b.kbar is None else weight_a * a.kbar + weight_b * b.kbar
    return AttnState(weight_a * a.out + weight_b * b.out, total.log2() + safe, kbar)


def lse2_from_lse_e(lse_e: torch.Tensor) -> torch.Tensor:
    """Convert a natural log-sum-exp to base 2."""
    return lse_e * LOG2_E


def correct(state: AttnState, q_pre: torch.Tensor, q_pre_matched: torch.Tensor, *, sm_scale: float) -> AttnState:
    """Move a reused state's ``lse2`` to the current query, to first order.

    The derivative of a log-sum-exp with respect to the query is the attention-weighted mean key, so
    ``lse2' = lse2 + sm_scale * log2(e) * (q_pre - q_pre_matched) . kbar`` with ``kbar`` in the pre-RoPE frame. ``out``
    is kept. A state without ``kbar`` is returned unchanged.
    """
    if state.kbar is None:
        return state
    step = ((q_pre - q_pre_matched) * state.kbar).sum(-1) * (sm_scale * LOG2_E)
    return state._replace(lse2=state.lse2 + step.clamp(-_GUARD_LOG2, _GUARD_LOG2))
