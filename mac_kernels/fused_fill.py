"""Launches of the prompt fill: states, then queries, sketch and tags, so that a row is tagged when it is complete."""

from __future__ import annotations

import torch
import triton

from .attend.triton_fill import fill_kernel, tag_kernel
from .config import MacConfig
from .fused import kv_arguments, ring_arguments, taken_by
from .paged import PagedKV
from .ring import RingPool
from .rope import Rope
from .types import LOG2_E


def fused_fill(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv: PagedKV,
    rings: RingPool,
    *,
    layer: int,
    slots: torch.Tensor,
    generations: torch.Tensor,
    config: MacConfig,
    rope: Rope,
    sm_scale: float,
    logits_soft_cap: float,
    max_kv_len: int,
) -> None:
    """As :func:`mac_kernels.fill_rings`, without a host sync; allocates fp32 scratch of one ring's keys a request."""
    layout, dim, batch = kv.layout, kv.layout.head_dim, kv.table.batch_size
    scratch_rows = batch * layout.num_qo_heads * config.window if rings.correction else 0
    wide = q.dtype == torch.float32  # fp32 tiles of the usual size would not fit into shared memory
    block_m, block_n = (16, 32) if wide else (64, 64)
    values = {
        **kv_arguments(kv, q.dtype),
        **ring_arguments(rings, layer),
        "stride_qn": q.stride(0),
        "stride_qh": q.stride(1),
        "qo_indptr_ptr": qo_indptr.to(q.device),
        "k_scale": kv.k_scale,
        "v_scale": kv.v_scale,
        "slots_ptr": slots,
        "generations_ptr": generations,
        "scratch_ptr": torch.empty(scratch_rows * dim, dtype=torch.float32, device=q.device),
        "cos_sin_ptr": rope.cos_sin_cache(max_kv_len, q.device),
        "logit_scale": sm_scale * LOG2_E,
        "soft_cap": logits_soft_cap,
        "BAND": config.band,
        "SINKS": config.sinks,
        "ROTARY_DIM": rope.rotary_dim,
        "INTERLEAVED": rope.interleaved,
        "SOFT_CAP": logits_soft_cap > 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "STAGES": 2 if wide else 3,
    }
    fill_kernel[(batch, triton.cdiv(config.window, block_m), layout.num_qo_heads)](
        q, kv.k_cache, kv.v_cache, num_warps=4 if dim <= 128 else 8, **taken_by(fill_kernel, values)
    )
    tag_kernel[(batch, config.window, layout.num_kv_heads)](q, num_warps=1, **taken_by(tag_kernel, values))
