"""Complete on the GPU: merge the parts of every head, write the output and the ring row."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..device import end_of_step, rotation_at, selection_of


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
    ring_seen_ptr,
    count_ptr,
    far_end_ptr,
    selected_ptr,
    dropped_ptr,
    refresh,
    limit,
    cos_sin_ptr,
    bypass_ptr,
    break_even,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    ALWAYS_GROUP: tl.constexpr,
    ALWAYS_SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PART_STRIDE: tl.constexpr,
    PARTS_ARE_OLDER: tl.constexpr,
    KBAR: tl.constexpr,
    BYPASS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of one query head, then write its output and its share of the ring row.

    A program takes ``CHUNK_D`` of a head's dims. Grid: ``(B * Hq * BLOCK_D // CHUNK_D,)``. What precedes ``gdc_wait``
    was written before the previous launch passed its own wait, so it may overlap with it. With ``PARTS_ARE_OLDER`` that
    holds for the numbers of the parts, too.
    """
    pid = tl.program_id(0)
    chunk = pid % (BLOCK_D // CHUNK_D)
    group = pid // (BLOCK_D // CHUNK_D) // GROUP
    head = pid // (BLOCK_D // CHUNK_D) % GROUP
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    qo_head = kv_head * GROUP + head
    position = tl.load(group_ptr + group * 8 + 2)
    ring = tl.load(group_ptr + group * 8 + 3)
    reuse = tl.load(group_ptr + group * 8 + 4) != 0
    anchor = tl.load(group_ptr + group * 8 + 5)
    offs_d = chunk * CHUNK_D + tl.arange(0, CHUNK_D)
    mask_d = offs_d < HEAD_DIM
    split = tl.arange(0, BLOCK_SPLITS)
    at_always = (group.to(tl.int64) * ALWAYS_GROUP + split * ALWAYS_SPLIT) * GROUP + head
    always_lse = tl.load(always_lse_ptr + at_always, mask=split < SPLITS, other=float("-inf"))
    always = tl.load(
        always_out_ptr + at_always[:, None] * HEAD_DIM + offs_d[None, :],
        mask=(split < SPLITS)[:, None] & mask_d[None, :],
        other=0.0,
    )
    # the reused state comes first; it is empty on a miss
    row = tl.load(decision_int_ptr + group * (3 * GROUP) + GROUP + head)
    lse = tl.load(decision_float_ptr + group * (3 * GROUP) + head, mask=reuse, other=float("-inf"))
    other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
    stored = ((ring.to(tl.int64) * WINDOW + row) * NUM_QO_HEADS + qo_head) * HEAD_DIM
    out = tl.load(ring_out_ptr + stored + offs_d, mask=mask_d & reuse, other=0.0).to(tl.float32)
    key = tl.zeros([CHUNK_D], tl.float32)
    if KBAR:
        key = tl.load(ring_key_ptr + stored + offs_d, mask=mask_d & reuse, other=0.0).to(tl.float32)
    if ring_seen_ptr is not None:
        seen, _listed, _window, _place = selection_of(
            group, group >= 0, group_ptr, count_ptr, far_end_ptr, selected_ptr, dropped_ptr, refresh, limit,
            NUM_KV_HEADS, SINKS,
        )  # fmt: skip
        inherited = tl.load(ring_seen_ptr + stored // HEAD_DIM, mask=reuse, other=-1)
        seen = tl.where(reuse, inherited, seen)
    if PARTS_ARE_OLDER:
        first_part = tl.load(parts_ptr + group * 2)
        num_parts = tl.load(parts_ptr + group * 2 + 1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    if not PARTS_ARE_OLDER:
        first_part = tl.load(parts_ptr + group * 2)
        num_parts = tl.load(parts_ptr + group * 2 + 1)
    for first in range(0, num_parts, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P)
        at = (first_part + index * PART_STRIDE).to(tl.int64) * GROUP + head
        present = index < num_parts
        part_lse = tl.load(part_lse_ptr + at, mask=present, other=float("-inf"))
        mask = present[:, None] & mask_d[None, :]
        part = tl.load(part_out_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        if KBAR:
            direct = tl.load(part_key_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
            crossed = tl.load(part_key_ptr + at[:, None] * HEAD_DIM + other[None, :], mask=mask, other=0.0)
        top = tl.maximum(tl.max(part_lse, 0), lse)
        top = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(part_lse - top)
        own = tl.exp2(lse - top)
        total = tl.sum(weight, 0) + own
        divisor = tl.where(total > 0, total, 1.0)
        out = (out * own + tl.sum(part * weight[:, None], 0)) / divisor
        if KBAR:
            # rotations are linear, so every part is pulled back to the pre-RoPE frame before it is merged
            pulled = direct * cos[None, :] + crossed * sin[None, :]
            key = (key * own + tl.sum(pulled * weight[:, None], 0)) / divisor
        lse = tl.where(total > 0, tl.log2(divisor) + top, float("-inf"))

    if ring >= 0:
        slot_row = ring.to(tl.int64) * WINDOW + position % WINDOW
        at = slot_row * NUM_QO_HEADS + qo_head
        tl.store(ring_out_ptr + at * HEAD_DIM + offs_d, out.to(ring_out_ptr.dtype.element_ty), mask=mask_d)
        if KBAR:
            tl.store(ring_key_ptr + at * HEAD_DIM + offs_d, key.to(ring_key_ptr.dtype.element_ty), mask=mask_d)
        tl.store(ring_lse_ptr + at, lse)  # every program of the head the same
        if ring_seen_ptr is not None:
            tl.store(ring_seen_ptr + at, seen)
        if head == 0:
            tl.store(ring_anchor_ptr + slot_row * NUM_KV_HEADS + kv_head, anchor)
            tl.store(ring_pos_ptr + slot_row, position)

    top = tl.maximum(tl.max(always_lse, 0), lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(always_lse - top)
    own = tl.exp2(lse - top)
    total = tl.sum(weight, 0) + own
    out = (out * own + tl.sum(always * weight[:, None], 0)) / tl.where(total > 0, total, 1.0)
    at = request.to(tl.int64) * stride_ob + qo_head * stride_oh + offs_d
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    if BYPASS and pid == 0:
        end_of_step(bypass_ptr, break_even)
