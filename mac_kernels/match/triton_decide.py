"""Match on the GPU, second launch: exact distances of the nominated rows, then the decision of every kv group."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..device import load_unrotated, position_of, ring_of, rotation_at, rows_to_search
from .accept import HANDOVER
from .triton_nominate import INFINITE_KEY, key_pos, nearest_of, nominate

# Reason codes of mac_kernels.types.Reason
_HIT = tl.constexpr(0)
_NO_RING = tl.constexpr(1)
_SHORT_CONTEXT = tl.constexpr(2)
_BYPASSED = tl.constexpr(3)
_NO_ROW = tl.constexpr(4)
_DISTANCE = tl.constexpr(5)
_AGE = tl.constexpr(6)
_INFLUENCE = tl.constexpr(7)
_NUM_REASONS = tl.constexpr(8)
_NEVER = tl.constexpr(2147483647)
_HANDOVER = tl.constexpr(HANDOVER)


@triton.jit
def weight_bound_of(parts, lse):
    """The weight [G] that each reused state would get beside band and sinks [SPLITS, G] if there were no rest."""
    top = tl.maximum(tl.max(parts, 0), lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    own = tl.exp2(lse - top)
    total = tl.sum(tl.exp2(parts - top[None, :]), 0) + own
    return own / tl.where(total > 0, total, 1.0)


@triton.jit
def reason_of(pos, distance, weight_bound, age, position, ring, paused, cap, influence, max_age, min_context):
    """Why each head is computed exactly, or ``_HIT``: the acceptance rule of :mod:`mac_kernels.match.accept`."""
    reason = tl.where(pos < 0, _NO_ROW, _HIT)
    reason = tl.where((reason == _HIT) & (distance >= cap), _DISTANCE, reason)
    reason = tl.where((reason == _HIT) & (age > max_age), _AGE, reason)
    # written so that a NaN on either side refuses the reuse
    light = weight_bound * distance < influence
    reason = tl.where((reason == _HIT) & (light == 0), _INFLUENCE, reason)
    reason = tl.where(paused, _BYPASSED, reason)
    reason = tl.where(position < min_context, _SHORT_CONTEXT, reason)
    reason = tl.where(ring < 0, _NO_RING, reason)
    return reason


@triton.jit
def count_group(counters_ptr, bypass_ptr, reason, read, kv_len, BYPASS: tl.constexpr):
    """Add one group to the counters of the layer and, while it is on trial, to those of its bypass."""
    tl.atomic_add(counters_ptr + reason, 1, sem="relaxed")
    tl.atomic_add(counters_ptr + _NUM_REASONS, read.to(tl.int64), sem="relaxed")
    tl.atomic_add(counters_ptr + _NUM_REASONS + 1, kv_len.to(tl.int64), sem="relaxed")
    if BYPASS:
        tl.atomic_add(bypass_ptr, (reason == _HIT).to(tl.int32), sem="relaxed")
        tl.atomic_add(bypass_ptr + 1, ((reason == _HIT) | (reason >= _DISTANCE)).to(tl.int32), sem="relaxed")


@triton.jit
def note_heads(ints, floats, mask, start, pos, lse, distance, weight_bound, WINDOW: tl.constexpr, GROUP: tl.constexpr):
    """What the next launches and the trace read of every head: where its rest begins, its row, and why."""
    tl.store(ints, start, mask=mask)
    tl.store(ints + GROUP, tl.where(pos >= 0, pos % WINDOW, 0), mask=mask)
    tl.store(ints + 2 * GROUP, pos, mask=mask)
    tl.store(floats, lse, mask=mask)
    tl.store(floats + GROUP, distance, mask=mask)
    tl.store(floats + 2 * GROUP, weight_bound, mask=mask)


@triton.jit
def decide_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    slots_ptr,
    generations_ptr,
    begin_ptr,
    length_ptr,
    slot_table_ptr,
    ring_generation_ptr,
    num_slots,
    ring_q_ptr,
    ring_key_ptr,
    ring_lse_ptr,
    ring_anchor_ptr,
    cos_sin_ptr,
    counters_ptr,
    scan_ptr,
    always_lse_ptr,
    decision_int_ptr,
    decision_float_ptr,
    group_ptr,
    bypass_ptr,
    cap_ptr,
    influence_ptr,
    logit_scale,
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NOMINEES: tl.constexpr,
    BLOCK_NOMINEES: tl.constexpr,
    NOMINEES_AT_ONCE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    ALWAYS_GROUP: tl.constexpr,
    ALWAYS_SPLIT: tl.constexpr,
    GROUP_SCOPE: tl.constexpr,
    CORRECTION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SCAN_IS_OLDER: tl.constexpr,
    BYPASS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Exact distances of the nominated rows, acceptance, and where the rest of a group begins. Grid: ``(B * Hkv,)``.

    What precedes ``gdc_wait`` was written before the previous launch passed its own wait, so it may overlap with it.
    With ``SCAN_IS_OLDER`` that holds for the scan, too: the previous launch only attends to sinks and band.
    """
    wait_late: tl.constexpr = PDL and SCAN_IS_OLDER
    group = tl.program_id(0)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    position, _ = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
    ring = tl.where(owned, ring, -1)
    num_rows = rows_to_search(bypass_ptr, WINDOW, BYPASS)
    head = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask_q = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
    q_pre = load_unrotated(
        q_group, stride_qh, head[:, None], offs_d[None, :], mask_q, other[None, :], cos[None, :], sin[None, :]
    )
    cap = tl.load(cap_ptr + kv_head * GROUP + head, mask=mask_h, other=0.0)
    influence = tl.load(influence_ptr + kv_head * GROUP + head, mask=mask_h, other=0.0)
    if PDL and not wait_late:
        gdc_wait()
        gdc_launch_dependents()
    ring_rows = tl.arange(0, BLOCK_W)
    key = tl.load(scan_ptr + group * WINDOW + ring_rows, mask=ring_rows < WINDOW, other=_NEVER)
    kv_len = position + 1
    stop = tl.maximum(kv_len - BAND, SINKS)
    ring_row = tl.maximum(ring, 0).to(tl.int64) * WINDOW

    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    always = always_lse_ptr + group.to(tl.int64) * (ALWAYS_GROUP * GROUP)
    always += split * (ALWAYS_SPLIT * GROUP) + head[None, :]
    known = (split < SPLITS) & mask_h[None, :]
    if not wait_late:
        always_lse = tl.load(always, mask=known, other=float("-inf"))
    lse = tl.full([BLOCK_G], float("-inf"), tl.float32)
    distance = tl.full([BLOCK_G], float("inf"), tl.float32)
    pos = tl.full([BLOCK_G], -1, tl.int32)
    anchor = tl.full([BLOCK_G], -1, tl.int32)
    if (ring >= 0) & (position >= 0) & (num_rows > 0):
        nominated = nominate(key, position, BLOCK_W, NOMINEES, BLOCK_NOMINEES)
        best = nearest_of(
            nominated, q_pre, ring_q_ptr, ring_row, kv_head,
            WINDOW, NUM_QO_HEADS, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, BLOCK_NOMINEES, NOMINEES_AT_ONCE, GROUP_SCOPE,
        )  # fmt: skip
        found = mask_h & (best < tl.full([BLOCK_G], INFINITE_KEY, tl.int64))
        pos = tl.where(found, key_pos(best), -1)
        row = ring_row + tl.where(found, pos % WINDOW, 0)
        at = row * NUM_QO_HEADS + kv_head * GROUP + head
        element = at[:, None] * HEAD_DIM + offs_d[None, :]
        mask = found[:, None] & (offs_d < HEAD_DIM)[None, :]
        stored = tl.load(ring_q_ptr + element, mask=mask, other=0.0)
        lse = tl.load(ring_lse_ptr + at, mask=found, other=float("-inf"))
        anchor = tl.load(ring_anchor_ptr + row * NUM_KV_HEADS + kv_head, mask=found, other=-1)
        gap = tl.where(found[:, None], q_pre - stored.to(tl.float32), 0.0)
        if CORRECTION:
            mean_key = tl.load(ring_key_ptr + element, mask=mask, other=0.0)
            step = tl.sum(gap * mean_key.to(tl.float32), 1) * logit_scale
            lse += tl.minimum(tl.maximum(step, -1024.0), 1024.0)
        distance = tl.where(found, tl.sqrt(tl.sum(gap * gap, 1)), float("inf"))

    if wait_late:
        gdc_wait()
        gdc_launch_dependents()
        always_lse = tl.load(always, mask=known, other=float("-inf"))
    weight_bound = weight_bound_of(always_lse, lse)
    reason = reason_of(
        pos, distance, weight_bound, position - anchor, position, ring, num_rows == 0, cap, influence, max_age,
        min_context,
    )  # fmt: skip
    head_hit = tl.sum(tl.where(mask_h & (reason == _HIT), 1 << head, 0), 0)
    worst = tl.min(tl.where(mask_h & (reason != _HIT), reason, _NUM_REASONS), 0)
    reuse = worst == _NUM_REASONS
    group_reason = tl.where(reuse, _HIT, worst)

    start = tl.where(reuse, tl.maximum(pos + 1 - BAND, SINKS), SINKS)
    low = tl.minimum(tl.min(tl.where(mask_h, start, _NEVER), 0), stop)
    new_anchor = tl.where(reuse, tl.min(tl.where(mask_h, anchor, _NEVER), 0) - _HANDOVER, position)

    heads = group * (3 * GROUP) + head
    note_heads(
        decision_int_ptr + heads, decision_float_ptr + heads, mask_h, start, pos, lse, distance, weight_bound,
        WINDOW, GROUP,
    )  # fmt: skip
    info = group_ptr + group * 8
    tl.store(info, low)
    tl.store(info + 1, tl.minimum(stop, kv_len))
    tl.store(info + 2, position)
    tl.store(info + 3, tl.where(kv_len > 0, ring, -1))
    tl.store(info + 4, reuse.to(tl.int32))
    tl.store(info + 5, new_anchor)
    tl.store(info + 6, group_reason)
    tl.store(info + 7, head_hit)

    read = tl.minimum(tl.maximum(stop - low, 0) + tl.maximum(kv_len - stop, 0) + SINKS, kv_len)
    count_group(counters_ptr, bypass_ptr, group_reason, read, kv_len, BYPASS)
