"""Launches of the prompt fill: states, then queries, sketch and tags, so that a row is tagged when it is complete."""

from __future__ import annotations

import torch
import triton

from .attend.triton_fill import fill_kernel, tag_kernel
from .config import MacConfig
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
    layout, table = kv.layout, kv.table
    dim, group, batch = layout.head_dim, layout.group_size, table.batch_size
    field = {name: tensor[layer] for name, tensor in rings.fields.items()}
    key = field["kbar"] if rings.correction else field["out"]
    qo_indptr = qo_indptr.to(q.device)
    sketch = rings.sketch
    assert sketch is not None  # check_fits() refused pools without one
    terms, sketch_dim = sketch.index.shape
    scratch_rows = batch * layout.num_qo_heads * config.window if rings.correction else 0
    scratch = torch.empty(scratch_rows * dim, dtype=torch.float32, device=q.device)
    owner = (slots, generations, rings.slot_table, rings.ring_generation, rings.num_slots)
    token_axis, head_axis = (1, 2) if kv.kv_layout == "NHD" else (2, 1)
    strides = tuple(cache.stride(axis) for cache in (kv.k_cache, kv.v_cache) for axis in (0, token_axis, head_axis))
    cos_sin = rope.cos_sin_cache(max_kv_len, q.device)
    shared = {
        "WINDOW": config.window,
        "GROUP": group,
        "HEAD_DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "ROTARY_DIM": rope.rotary_dim,
        "INTERLEAVED": rope.interleaved,
        "PAGE_SIZE": table.page_size,
    }
    wide = kv.k_cache.dtype == torch.float32  # fp32 tiles of the usual size would not fit into shared memory
    block_m, block_n = (16, 32) if wide else (64, 64)
    fill_kernel[(batch, triton.cdiv(config.window, block_m), layout.num_qo_heads)](
        q, q.stride(0), q.stride(1), qo_indptr, kv.k_cache, kv.v_cache, *strides,
        table.indptr, table.indices, table.last_page_len, *owner,
        field["out"], key, field["lse2"], scratch, cos_sin, sm_scale * LOG2_E, logits_soft_cap,
        BAND=config.band, SINKS=config.sinks, NUM_QO_HEADS=layout.num_qo_heads, BLOCK_M=block_m, BLOCK_N=block_n,
        KBAR=rings.correction, SOFT_CAP=logits_soft_cap > 0, PRECISION="ieee" if wide else "tf32",
        STAGES=2 if wide else 3, num_warps=4 if dim <= 128 else 8, **shared,
    )  # fmt: skip
    tag_kernel[(batch, config.window, layout.num_kv_heads)](
        q, q.stride(0), q.stride(1), qo_indptr, table.indptr, table.last_page_len, *owner,
        field["q_pre"], field["pos"], field["anchor"], field["sketch"], field["sketch_scale"],
        sketch.index, sketch.sign, cos_sin,
        NUM_KV_HEADS=layout.num_kv_heads, BLOCK_G=triton.next_power_of_2(group), TERMS=terms, SKETCH_DIM=sketch_dim,
        BLOCK_T=triton.next_power_of_2(terms), BLOCK_K=triton.next_power_of_2(sketch_dim), num_warps=1, **shared,
    )  # fmt: skip
