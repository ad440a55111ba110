"""Complete with FlashInfer's merge, where its limits allow.

FlashInfer merges states of bf16 or fp16 outputs and rounds the result to that dtype. That is right for the final output
of a step, and it is what a composition by hand needs. It is not used for what goes into the ring: such a state is
merged again step after step, carries a mean key beside the output, and must be rounded once, not at every merge. The
backend therefore completes with :func:`mac_kernels.complete.triton.complete_kernel`, which reads FlashInfer's states,
merges them and the reused one in fp32, and writes output and row in one launch.
"""

from __future__ import annotations

import math

import torch

from ..types import AttnState
from .reference import merge_state as merge_state_fp32

MERGED_DTYPES = (torch.bfloat16, torch.float16)
_EMPTY_LSE2 = -3e4  # before 0.7.0, FlashInfer says -5e4 where nothing was attended to


def merge_state(a: AttnState, b: AttnState) -> AttnState:
    """Merge the states over two disjoint key sets; base 2, the outputs in the dtype of ``a.out``.

    Parameters
    ----------
    a, b : AttnState
        ``out`` [N, H, D] and ``lse2`` [N, H] fp32. bf16 and fp16 on a GPU are merged by ``flashinfer.merge_state``,
        anything else, and states with mean keys, by :func:`mac_kernels.merge_state` in fp32.

    Returns
    -------
    AttnState
        Two empty sides give the empty state.
    """
    if a.out.dtype not in MERGED_DTYPES or a.out.device.type != "cuda" or a.kbar is not None or b.kbar is not None:
        merged = merge_state_fp32(a, b)
        return merged._replace(out=merged.out.to(a.out.dtype))
    import flashinfer

    # two infinities would cancel to NaN in older versions; this one stays far below any real score
    low, high = (torch.clamp(state.lse2, min=2 * _EMPTY_LSE2) for state in (a, b))
    out, lse2 = flashinfer.merge_state(a.out, low, b.out, high)
    return AttnState(out, torch.threshold(lse2, _EMPTY_LSE2, -math.inf))
