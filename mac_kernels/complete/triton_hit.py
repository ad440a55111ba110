"""Decide and, where a group is reused, finish it at once: its rest is so short that a launch would cost more."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..attend.triton import attend_tiles
from ..device import position_of, rotation_at
from ..match.triton_decide import decide_group, known_before

_NEVER = tl.constexpr(2147483647)


@triton.jit
def merge_always(
    always_out_ptr,  # first part of the group, as the next one
    always_lse_ptr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Band and sinks, merged: ``(weighted sum, maximum, sum of weights)`` of the parts."""
    head = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(always_lse_ptr + split * GROUP + head, mask=mask_h, other=float("-inf")))
    safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        at = split * GROUP + head
        weight = tl.exp2(tl.load(always_lse_ptr + at, mask=mask_h, other=float("-inf")) - safe)
        part = tl.load(always_out_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        total += weight
        acc += part * weight[:, None]
    return acc, top, total


@triton.jit
def finish_hit(
    kv_head,
    position,
    ring,
    low,
    stop,
    anchor,
    always,  # as of merge_always(), this and the next two
    always_top,
    always_total,
    decision_int_ptr,  # of the group, as the next one
    decision_float_ptr,
    q_group,
    stride_qh,
    k_ptr,  # first token of page 0 of this head, as the next one
    v_ptr,
    page_ptr,  # first page of the request
    k_scale,
    v_scale,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    ring_out_ptr,
    ring_key_ptr,
    ring_lse_ptr,
    ring_pos_ptr,
    ring_anchor_ptr,
    cos_sin_ptr,
    out_ptr,  # first head of the group
    stride_oh,
    logit_scale,
    soft_cap,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KBAR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend to ``[low, stop)``, merge it into the matched rows, then write the new row and the output."""
    head = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    qo_head = kv_head * GROUP + head
    ring_row = ring.to(tl.int64) * WINDOW
    # read again what was just written: by now it is wanted by the rows of the tensor cores
    start = tl.load(decision_int_ptr + head, mask=mask_h, other=_NEVER)
    row = tl.load(decision_int_ptr + GROUP + head, mask=mask_h, other=0)
    old_lse = tl.load(decision_float_ptr + head, mask=mask_h, other=float("-inf"))
    stored = (ring_row + row) * NUM_QO_HEADS + qo_head
    stored = stored[:, None] * HEAD_DIM + offs_d[None, :]
    old_out = tl.load(ring_out_ptr + stored, mask=mask, other=0.0)
    if KBAR:
        old_key = tl.load(ring_key_ptr + stored, mask=mask, other=0.0)
    q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
    out, rest_lse, key = attend_tiles(
        q, start, tl.full([BLOCK_M], _NEVER, tl.int32), low, stop, _NEVER, 0,
        k_ptr, v_ptr, page_ptr, stride_kp, stride_kt, stride_vp, stride_vt, logit_scale, soft_cap, k_scale, v_scale,
        HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, SCALES_ON_DEVICE, KBAR, PRECISION, STAGES,
    )  # fmt: skip

    top = tl.maximum(old_lse, rest_lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    old_weight = tl.exp2(old_lse - top)
    rest_weight = tl.exp2(rest_lse - top)
    total = old_weight + rest_weight
    divisor = tl.where(total > 0, total, 1.0)
    old_weight /= divisor
    rest_weight /= divisor
    out = out * rest_weight[:, None] + old_out.to(tl.float32) * old_weight[:, None]
    lse = tl.where(total > 0, tl.log2(divisor) + top, float("-inf"))

    new_row = ring_row + position % WINDOW
    at = new_row * NUM_QO_HEADS + qo_head
    to = at[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(ring_out_ptr + to, out.to(ring_out_ptr.dtype.element_ty), mask=mask)
    tl.store(ring_lse_ptr + at, lse, mask=mask_h)
    if KBAR:
        # rotations are linear, so the rest is pulled back to the pre-RoPE frame as a whole
        other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
        crossed = tl.gather(key, tl.broadcast_to(other[None, :], key.shape), 1)
        pulled = key * cos[None, :] + crossed * sin[None, :]
        key = pulled * rest_weight[:, None] + old_key.to(tl.float32) * old_weight[:, None]
        tl.store(ring_key_ptr + to, key.to(ring_key_ptr.dtype.element_ty), mask=mask)
    tl.store(ring_anchor_ptr + new_row * NUM_KV_HEADS + kv_head, anchor)
    tl.store(ring_pos_ptr + new_row, position)

    top = tl.maximum(always_top, lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    always_weight = tl.exp2(always_top - top)
    own = tl.exp2(lse - top)
    total = always_total * always_weight + own
    divisor = tl.where(total > 0, total, 1.0)
    out = (always * always_weight[:, None] + out * own[:, None]) / divisor[:, None]
    tl.store(out_ptr + head[:, None] * stride_oh + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def decide_and_finish_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    k_ptr,
    v_ptr,
    slots_ptr,
    generations_ptr,
    k_scale,
    v_scale,
    out_ptr,
    stride_ob,
    stride_oh,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    begin_ptr,
    page_ptr,
    length_ptr,
    slot_table_ptr,
    ring_generation_ptr,
    num_slots,
    ring_q_ptr,
    ring_out_ptr,
    ring_key_ptr,
    ring_lse_ptr,
    ring_pos_ptr,
    ring_anchor_ptr,
    cos_sin_ptr,
    counters_ptr,
    scan_ptr,
    always_out_ptr,
    always_lse_ptr,
    decision_int_ptr,
    decision_float_ptr,
    group_ptr,
    bypass_ptr,
    cap_ptr,
    influence_ptr,
    logit_scale,
    soft_cap,
    max_age,
    min_context,
    BAND: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NOMINEES: tl.constexpr,
    BLOCK_NOMINEES: tl.constexpr,
    NOMINEES_AT_ONCE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    GROUP_SCOPE: tl.constexpr,
    CORRECTION: tl.constexpr,
    KBAR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BYPASS: tl.constexpr,
    PDL: tl.constexpr,
):
    """:func:`decide_group`, and :func:`finish_hit` where it is reused. Grid: ``(B * Hkv,)``.

    What precedes ``gdc_wait`` was written before the previous launch passed its own wait, so it may overlap with it.
    """
    group = tl.program_id(0)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    position, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    ring, num_rows, q_pre, cap, influence = known_before(
        request, kv_head, position, q_group, stride_qh, slots_ptr, generations_ptr, slot_table_ptr,
        ring_generation_ptr, num_slots, bypass_ptr, cap_ptr, influence_ptr, cos_sin_ptr,
        WINDOW, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED, BYPASS,
    )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ring_rows = tl.arange(0, BLOCK_W)
    key = tl.load(scan_ptr + group * WINDOW + ring_rows, mask=ring_rows < WINDOW, other=_NEVER)
    first_part = group.to(tl.int64) * (SPLITS * GROUP)
    always, always_top, always_total = merge_always(
        always_out_ptr + first_part * HEAD_DIM, always_lse_ptr + first_part,
        GROUP, BLOCK_M, HEAD_DIM, BLOCK_D, SPLITS,
    )  # fmt: skip
    reuse, low, stop, anchor = decide_group(
        group, kv_head, position, ring, num_rows, q_pre, cap, influence, key, ring_q_ptr, ring_key_ptr,
        ring_lse_ptr, ring_anchor_ptr, counters_ptr, always_lse_ptr + first_part, decision_int_ptr, decision_float_ptr,
        group_ptr, bypass_ptr, logit_scale, max_age, min_context, True, BAND, SINKS, WINDOW, BLOCK_W, NUM_QO_HEADS,
        NUM_KV_HEADS, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, NOMINEES, BLOCK_NOMINEES,
        NOMINEES_AT_ONCE, SPLITS, BLOCK_SPLITS, 1, GROUP_SCOPE, CORRECTION, BYPASS, False,
    )  # fmt: skip
    if reuse:
        tl.debug_barrier()
        finish_hit(
            kv_head, position, ring, low, stop, anchor, always, always_top, always_total,
            decision_int_ptr + group * (3 * GROUP), decision_float_ptr + group * (3 * GROUP), q_group, stride_qh,
            k_ptr + kv_head.to(tl.int64) * stride_kh, v_ptr + kv_head.to(tl.int64) * stride_vh, page_ptr + first_page,
            k_scale, v_scale, stride_kp, stride_kt, stride_vp, stride_vt,
            ring_out_ptr, ring_key_ptr, ring_lse_ptr, ring_pos_ptr, ring_anchor_ptr, cos_sin_ptr,
            out_ptr + request.to(tl.int64) * stride_ob + kv_head * GROUP * stride_oh, stride_oh,
            logit_scale, soft_cap, WINDOW, NUM_QO_HEADS, NUM_KV_HEADS, GROUP, BLOCK_M, HEAD_DIM, BLOCK_D,
            ROTARY_DIM, INTERLEAVED, KBAR, SOFT_CAP, SCALES_ON_DEVICE, PAGE_SIZE, PRECISION, BLOCK_N, STAGES,
        )  # fmt: skip
