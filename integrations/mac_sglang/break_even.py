"""From which hit rate on reuse pays: a figure for the start-up log, from a tuned file or estimated for the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from mac_kernels import HeadLayout
from mac_kernels.tuned import KernelKey, find_kernel

FULL_US, MISS_US, HIT_US, HIT_GROUP_US = 19.0, 8.0, 13.0, 0.125
"""One layer on an H100 (``benchmarks/results``): the part of full attention that does not depend on what it reads, what
a step of misses adds to it (nothing if the one before was one, too: its rest then begins ahead of the decision),
a step of hits at batch 1, and what each further kv group adds to that."""
HALF_US = 4.0
"""What a step in which half of the groups hit takes beyond the middle of those two (3.4 to 19 us, same place): one
group that misses makes it wait."""
_OF_PEAK = 0.91
"""Share of the memory's nominal bandwidth that attention reads at (same place)."""
SHORT = 32_768


def break_even(
    layout: HeadLayout,
    *,
    batch: int,
    context: int,
    token_bytes: int,
    bytes_per_us: float,
    measured: Sequence[tuple[float, float]] | None = None,
) -> float | None:
    """Hit rate at which a step takes as long as full attention, or ``None`` if it always takes longer.

    Between hit rates 0, .5 and 1, or those that were measured, a step's time is taken to be linear.

    Parameters
    ----------
    layout : HeadLayout
        As this rank sees it.
    batch, context : int, requests and tokens
    token_bytes : int
        Keys and values of one token and kv head.
    bytes_per_us : float
        Bandwidth of the GPU's memory.
    measured : sequence of (float, float), optional
        Hit rates, rising from 0 to 1, and us of a step, if they were measured on this GPU.
    """
    groups = batch * layout.num_kv_heads
    hit = HIT_US + HIT_GROUP_US * groups
    miss = FULL_US + groups * context * token_bytes / bytes_per_us + MISS_US
    points = measured or ((0.0, miss), (0.5, (miss + hit) / 2 + HALF_US), (1.0, hit))
    full = points[0][1] - MISS_US
    for (low, before), (high, after) in itertools.pairwise(points):
        if after < full:
            return low + (high - low) * (before - full) / (before - after)
    return None


def describe(device: torch.device, layout: HeadLayout, *, dtype: torch.dtype, page_size: int, context_len: int) -> str:
    """Words for the start-up line: the break-even hit rate of one request at two contexts, and where it comes from."""
    if device.type != "cuda":
        return "break-even hit rate unknown without a GPU"
    from triton.testing import get_dram_gbps

    bytes_per_us = _OF_PEAK * get_dram_gbps(device.index or 0) * 1e3
    key = KernelKey(
        gpu=torch.cuda.get_device_name(device),
        num_qo_heads=layout.num_qo_heads,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        page_size=page_size,
    )
    found = find_kernel(key)
    figures, tuned = [], False
    for context in sorted({min(SHORT, context_len), context_len}):
        measured = None
        if found is not None and found.file.coverage.missing(1, context) is None:
            measured, tuned = found.file.nearest(1, context).curve(layout.num_kv_heads), True
        rate = break_even(
            layout,
            batch=1,
            context=context,
            token_bytes=2 * layout.head_dim * dtype.itemsize,
            bytes_per_us=bytes_per_us,
            measured=measured,
        )
        figures.append(f"{'none' if rate is None else f'about {rate:.2f}'} at {context} tokens")
    source = f"from {found.path}" if found is not None and tuned else "estimated"
    return f"break-even hit rate {', '.join(figures)} (batch 1, {source}; larger batches need less)"
