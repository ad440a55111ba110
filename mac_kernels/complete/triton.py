"""Complete on the GPU: merge the parts of every head, write the output and the ring row."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..device import end_of_step, rotation_at


@triton.jit
def merge_parts(parts, parts_lse, out, lse):
    """Merge states [PARTS, HEADS, D], [PARTS, HEADS] into one: its output and the weights of the parts and of itself.

    Returns ``(out, lse2, weights, own_weight)``; empty states give (0, -inf, 0, 0).
    """
    top = tl.maximum(tl.max(parts_lse, 0), lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(parts_lse - top[None, :])
    own = tl.exp2(lse - top)
    total = tl.sum(weight, 0) + own
    divisor = tl.where(total > 0, total, 1.0)
    weight /= divisor[None, :]
    own /= divisor
    merged = out * own[:, None] + tl.sum(parts * weight[:, :, None], 0)
    return merged, tl.where(total > 0, tl.log2(divisor) + top, float("-inf")), weight, own


@triton.jit
def complete_kernel(
    out_ptr,
    stride_ob,
    stride_oh,
    decision_int_ptr,
    decision_float_ptr,
    group_ptr,
    parts_ptr,
    part_out_ptr,
    part_key_ptr,
    part_lse_ptr,
    always_out_ptr,
    always_lse_ptr,
    ring_out_ptr,
    ring_key_ptr,
    ring_lse_ptr,
    ring_pos_ptr,
    ring_anchor_ptr,
    cos_sin_ptr,
    bypass_ptr,
    break_even,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    ALWAYS_GROUP: tl.constexpr,
    ALWAYS_SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    KBAR: tl.constexpr,
    BYPASS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of ``BLOCK_HEADS`` query heads, then write their output and their share of the ring row.

    Grid: ``(B * Hkv * ceil(G / BLOCK_HEADS),)``. What precedes ``gdc_wait`` was written before the previous launch
    passed its own wait, so it may overlap with it.
    """
    pid = tl.program_id(0)
    shares: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    group = pid // shares
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    head = (pid % shares) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    qo_head = kv_head * GROUP + head
    mask_h = head < GROUP
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask = mask_h[:, None] & mask_d[None, :]
    split = tl.arange(0, BLOCK_SPLITS)
    at_always = (group.to(tl.int64) * ALWAYS_GROUP + split[:, None] * ALWAYS_SPLIT) * GROUP + head[None, :]
    known = (split < SPLITS)[:, None] & mask_h[None, :]
    always_lse = tl.load(always_lse_ptr + at_always, mask=known, other=float("-inf"))
    always = tl.load(
        always_out_ptr + at_always[:, :, None] * HEAD_DIM + offs_d[None, None, :],
        mask=known[:, :, None] & mask_d[None, None, :],
        other=0.0,
    )
    position = tl.load(group_ptr + group * 8 + 2)
    ring = tl.load(group_ptr + group * 8 + 3)
    reuse = tl.load(group_ptr + group * 8 + 4) != 0
    anchor = tl.load(group_ptr + group * 8 + 5)
    # the reused state comes first; it is empty on a miss
    row = tl.load(decision_int_ptr + group * (3 * GROUP) + GROUP + head, mask=mask_h, other=0)
    lse = tl.load(decision_float_ptr + group * (3 * GROUP) + head, mask=mask_h & reuse, other=float("-inf"))
    other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
    stored = ((ring.to(tl.int64) * WINDOW + row) * NUM_QO_HEADS + qo_head)[:, None] * HEAD_DIM + offs_d[None, :]
    out = tl.load(ring_out_ptr + stored, mask=mask & reuse, other=0.0).to(tl.float32)
    if KBAR:
        key = tl.load(ring_key_ptr + stored, mask=mask & reuse, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first_part = tl.load(parts_ptr + group * 2)
    num_parts = tl.load(parts_ptr + group * 2 + 1)
    if BYPASS and pid == 0:
        end_of_step(bypass_ptr, break_even)
    for first in range(0, num_parts, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P)
        at = (first_part + index * PART_STRIDE)[:, None].to(tl.int64) * GROUP + head[None, :]
        present = (index < num_parts)[:, None] & mask_h[None, :]
        whole = present[:, :, None] & mask_d[None, None, :]
        part_lse = tl.load(part_lse_ptr + at, mask=present, other=float("-inf"))
        element = at[:, :, None] * HEAD_DIM
        part = tl.load(part_out_ptr + element + offs_d[None, None, :], mask=whole, other=0.0)
        if KBAR:
            direct = tl.load(part_key_ptr + element + offs_d[None, None, :], mask=whole, other=0.0)
            crossed = tl.load(part_key_ptr + element + other[None, None, :], mask=whole, other=0.0)
        out, lse, weight, own = merge_parts(part, part_lse, out, lse)
        if KBAR:
            # rotations are linear, so every part is pulled back to the pre-RoPE frame before it is merged
            pulled = direct * cos[None, None, :] + crossed * sin[None, None, :]
            key = key * own[:, None] + tl.sum(pulled * weight[:, :, None], 0)

    if ring >= 0:
        new_row = ring.to(tl.int64) * WINDOW + position % WINDOW
        at = new_row * NUM_QO_HEADS + qo_head
        element = at[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(ring_out_ptr + element, out.to(ring_out_ptr.dtype.element_ty), mask=mask)
        if KBAR:
            tl.store(ring_key_ptr + element, key.to(ring_key_ptr.dtype.element_ty), mask=mask)
        tl.store(ring_lse_ptr + at, lse, mask=mask_h)
        if pid % shares == 0:
            tl.store(ring_anchor_ptr + new_row * NUM_KV_HEADS + kv_head, anchor)
            tl.store(ring_pos_ptr + new_row, position)

    out, _, _, _ = merge_parts(always, always_lse, out, lse)
    to = out_ptr + request.to(tl.int64) * stride_ob + qo_head[:, None] * stride_oh + offs_d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask)
