"""Match on the GPU: scan the ring through the sketch beside the band, then decide per kv group.

Band and sinks are attended whatever is decided, so they share a launch with the scan. The next launch takes the exact
distances of the nominated rows and applies the acceptance rule. Loops are not unrolled where latency allows it: every
program runs once through its code, and fetching instructions costs more than the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..attend.triton import attend_tiles
from ..device import load_unrotated, position_of, quantize_image, ring_of, rotation_at, sketch_image

# Reason codes of mac_kernels.types.Reason
_HIT = tl.constexpr(0)
_NO_RING = tl.constexpr(1)
_SHORT_CONTEXT = tl.constexpr(2)
_NO_ROW = tl.constexpr(3)
_DISTANCE = tl.constexpr(4)
_AGE = tl.constexpr(5)
_INFLUENCE = tl.constexpr(6)
_NUM_REASONS = tl.constexpr(7)
_NEVER = tl.constexpr(2147483647)
_INFINITE_KEY = tl.constexpr(0x7F800000 << 32)  # of an infinite distance; NaN lies above


@triton.jit
def nearest_key(distance, pos):
    """Sortable key: smaller distance first, then the newer position. Distances are >= 0, so their bits are ordered."""
    bits = distance.to(tl.int32, bitcast=True).to(tl.int64)
    return (bits << 32) | (-tl.maximum(pos, 0) + _NEVER).to(tl.int64)


@triton.jit
def key_pos(key):
    """The position of a key."""
    return -((key & _NEVER).to(tl.int32)) + _NEVER


@triton.jit
def scan_sketch(
    q_group,
    stride_qh,
    cos_sin_ptr,
    position,
    ring,
    write,
    kv_head,
    split,
    ring_q_ptr,
    ring_pos_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    sketch_index_ptr,
    sketch_sign_ptr,
    scan_ptr,
    BAND: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TERMS: tl.constexpr,
    SKETCH_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Keys of this split's rows: squared sketch distance, its last bits replaced by the lag; ``_NEVER`` if ineligible.

    The first split also writes the query and the sketch of the new row, if ``write``.
    """
    image = sketch_image(
        q_group, stride_qh, cos_sin_ptr, position, sketch_index_ptr, sketch_sign_ptr,
        HEAD_DIM, ROTARY_DIM, INTERLEAVED, TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K,
    )  # fmt: skip
    codes, scale = quantize_image(image)
    query = codes * scale
    offs_k = tl.arange(0, BLOCK_K)
    if write & (split == 0):
        # the row at m - W is overwritten from here on; nothing matches it any more, its tag is still the old position
        at = ring.to(tl.int64) * WINDOW + position % WINDOW
        head = tl.arange(0, BLOCK_G)
        offs_d = tl.arange(0, BLOCK_D)
        mask = (head < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
        other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
        q_pre = load_unrotated(
            q_group, stride_qh, head[:, None], offs_d[None, :], mask, other[None, :], cos[None, :], sin[None, :]
        )
        at_head = at * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + head
        to = ring_q_ptr + at_head[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(to, q_pre.to(ring_q_ptr.dtype.element_ty), mask=mask)
        at = at * NUM_KV_HEADS + kv_head
        tl.store(ring_sketch_ptr + at * SKETCH_DIM + offs_k, codes.to(tl.int8), mask=offs_k < SKETCH_DIM)
        tl.store(ring_scale_ptr + at, scale)
    rows_per_split: tl.constexpr = (WINDOW + SPLITS - 1) // SPLITS
    ring_row = ring.to(tl.int64) * WINDOW
    for first in range(split * rows_per_split, tl.minimum((split + 1) * rows_per_split, WINDOW), BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = (row < WINDOW) & (row < (split + 1) * rows_per_split)
        pos = tl.load(ring_pos_ptr + ring_row + row, mask=inside, other=-1)
        eligible = (pos > position - WINDOW) & (pos < position) & (pos + 1 - BAND > SINKS)
        at = (ring_row + row) * NUM_KV_HEADS + kv_head
        mask = inside[:, None] & (offs_k < SKETCH_DIM)[None, :]
        stored = tl.load(ring_sketch_ptr + at[:, None] * SKETCH_DIM + offs_k[None, :], mask=mask, other=0)
        stored_scale = tl.load(ring_scale_ptr + at, mask=inside, other=0.0)
        gap = stored.to(tl.float32) * stored_scale[:, None] - query[None, :]
        bits = tl.sum(gap * gap, 1).to(tl.int32, bitcast=True)  # ordered like the distances, which are >= 0
        key = bits // BLOCK_W * BLOCK_W + (position - pos)
        tl.store(scan_ptr + row, tl.where(eligible, key, _NEVER), mask=inside)


@triton.jit
def nominate(
    scan_ptr,
    position,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NOMINEES: tl.constexpr,
    BLOCK_NOMINEES: tl.constexpr,
):
    """Positions of the nearest rows by sketch, [BLOCK_NOMINEES] int32, -1 where there are fewer."""
    row = tl.arange(0, BLOCK_W)
    key = tl.load(scan_ptr + row, mask=row < WINDOW, other=_NEVER)
    slot = tl.arange(0, BLOCK_NOMINEES)
    nominated = tl.full([BLOCK_NOMINEES], -1, tl.int32)
    for k in range(NOMINEES):
        best = tl.min(key, 0)
        nominated = tl.where(slot == k, tl.where(best == _NEVER, -1, position - best % BLOCK_W), nominated)
        key = tl.where(key == best, _NEVER, key)
    return nominated


@triton.jit
def scout_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    k_ptr,
    v_ptr,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    indptr_ptr,
    indices_ptr,
    last_page_len_ptr,
    slots_ptr,
    generations_ptr,
    slot_table_ptr,
    ring_generation_ptr,
    num_slots,
    ring_q_ptr,
    ring_pos_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    sketch_index_ptr,
    sketch_sign_ptr,
    cos_sin_ptr,
    scan_ptr,
    always_out_ptr,
    always_lse_ptr,
    logit_scale,
    soft_cap,
    BAND: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TERMS: tl.constexpr,
    SKETCH_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: ``(B * Hkv * 2 * SPLITS,)``: half of a group's programs scan the ring, half attend to the band and sinks."""
    pid = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = pid // (2 * SPLITS)
    split = pid % (2 * SPLITS)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    position, first_page = position_of(request, indptr_ptr, last_page_len_ptr, PAGE_SIZE)
    q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    if split >= SPLITS:
        ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
        if ring >= 0:
            scan_sketch(
                q_group, stride_qh, cos_sin_ptr, position, ring, owned & (position >= 0), kv_head, split - SPLITS,
                ring_q_ptr, ring_pos_ptr, ring_sketch_ptr, ring_scale_ptr, sketch_index_ptr, sketch_sign_ptr,
                scan_ptr + group * WINDOW,
                BAND, SINKS, WINDOW, BLOCK_W, NUM_KV_HEADS, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED,
                TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K, BLOCK_R, SPLITS,
            )  # fmt: skip
    else:
        head = tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        mask = (head < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
        q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        # one range of entries: the sinks, then the band
        stop = tl.maximum(position + 1 - BAND, SINKS)
        entries = tl.minimum(SINKS, position + 1) + tl.maximum(position + 1 - stop, 0)
        per_split: tl.constexpr = (BAND + SINKS + SPLITS - 1) // SPLITS
        out, lse, _ = attend_tiles(
            q, tl.zeros([BLOCK_M], tl.int32), tl.full([BLOCK_M], _NEVER, tl.int32),
            split * per_split, tl.minimum((split + 1) * per_split, entries), SINKS, stop - SINKS,
            k_ptr + kv_head.to(tl.int64) * stride_kh, v_ptr + kv_head.to(tl.int64) * stride_vh,
            indices_ptr + first_page, stride_kp, stride_kt, stride_vp, stride_vt, logit_scale, soft_cap,
            HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, False, PRECISION, STAGES,
        )  # fmt: skip
        at = (group.to(tl.int64) * SPLITS + split) * GROUP
        tl.store(always_out_ptr + (at + head[:, None]) * HEAD_DIM + offs_d[None, :], out, mask=mask)
        tl.store(always_lse_ptr + at + head, lse, mask=head < GROUP)


@triton.jit
def decide_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    indptr_ptr,
    last_page_len_ptr,
    slots_ptr,
    generations_ptr,
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
    logit_scale,
    cap,
    influence,
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
    GROUP_SCOPE: tl.constexpr,
    CORRECTION: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Exact distances of the nominated rows, acceptance, and where the rest of a group begins. Grid: ``(B * Hkv,)``.

    What precedes ``gdc_wait`` was written before the previous launch passed its own wait, so it may overlap with it.
    """
    group = tl.program_id(0)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    position, _ = position_of(request, indptr_ptr, last_page_len_ptr, PAGE_SIZE)
    kv_len = position + 1
    stop = tl.maximum(kv_len - BAND, SINKS)
    ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
    ring = tl.where(owned, ring, -1)
    searched = owned & (position >= 0)
    q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    scan = scan_ptr + group * WINDOW
    head = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask_d = offs_d < HEAD_DIM
    mask = mask_h[:, None] & mask_d[None, :]
    qo_head = kv_head * GROUP + head
    ring_row = tl.maximum(ring, 0).to(tl.int64) * WINDOW

    lse = tl.full([BLOCK_G], float("-inf"), tl.float32)
    distance = tl.full([BLOCK_G], float("inf"), tl.float32)
    pos = tl.full([BLOCK_G], -1, tl.int32)
    anchor = tl.full([BLOCK_G], -1, tl.int32)
    other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
    q_pre = load_unrotated(
        q_group, stride_qh, head[:, None], offs_d[None, :], mask, other[None, :], cos[None, :], sin[None, :]
    )
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if searched:
        infinite = tl.full([BLOCK_G], _INFINITE_KEY, tl.int64)
        best = infinite
        nominated = nominate(scan, position, WINDOW, BLOCK_W, NOMINEES, BLOCK_NOMINEES)
        slot = tl.arange(0, BLOCK_NOMINEES)
        for first in range(0, BLOCK_NOMINEES, NOMINEES_AT_ONCE):
            index = first + tl.arange(0, NOMINEES_AT_ONCE)
            pick = slot[None, :] == index[:, None]
            rows_pos = tl.sum(tl.where(pick, nominated[None, :], 0), 1)
            valid = rows_pos >= 0
            at = (ring_row + tl.where(valid, rows_pos % WINDOW, 0)) * NUM_QO_HEADS
            stored = tl.load(
                ring_q_ptr + (at[:, None, None] + qo_head[None, :, None]) * HEAD_DIM + offs_d[None, None, :],
                mask=valid[:, None, None] & mask[None, :, :],
                other=0.0,
            )
            gap = stored.to(tl.float32) - q_pre[None, :, :]
            exact = tl.sqrt(tl.sum(gap * gap, 2))  # [NOMINEES_AT_ONCE, BLOCK_G]
            exact = tl.where(mask_h[None, :], exact, 0.0)
            if GROUP_SCOPE:
                exact = tl.broadcast_to(tl.max(exact, 1)[:, None], exact.shape)
            key = nearest_key(exact, tl.broadcast_to(rows_pos[:, None], exact.shape))
            key = tl.where(valid[:, None], key, infinite[None, :])
            best = tl.minimum(best, tl.min(key, 0))
        found = mask_h & (best < infinite)
        pos = tl.where(found, key_pos(best), -1)
        at = (ring_row + tl.where(found, pos % WINDOW, 0)) * NUM_QO_HEADS + qo_head
        mask_found = mask & found[:, None]
        stored = tl.load(ring_q_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_found, other=0.0)
        lse = tl.load(ring_lse_ptr + at, mask=found, other=float("-inf"))
        row = tl.where(found, pos % WINDOW, 0)
        anchor = tl.load(ring_anchor_ptr + (ring_row + row) * NUM_KV_HEADS + kv_head, mask=found, other=-1)
        gap = tl.where(found[:, None], q_pre - stored.to(tl.float32), 0.0)
        if CORRECTION:
            key = tl.load(ring_key_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_found, other=0.0)
            step = tl.sum(gap * key.to(tl.float32), 1) * logit_scale
            lse += tl.minimum(tl.maximum(step, -1024.0), 1024.0)
        distance = tl.where(found, tl.sqrt(tl.sum(gap * gap, 1)), float("inf"))

    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    parts = tl.load(
        always_lse_ptr + (group.to(tl.int64) * SPLITS + split) * GROUP + head[None, :],
        mask=(split < SPLITS) & mask_h[None, :],
        other=float("-inf"),
    )
    # the weight that the reused state would get if there were no rest
    top = tl.maximum(tl.max(parts, 0), lse)
    top = tl.where(top == float("-inf"), 0.0, top)
    own = tl.exp2(lse - top)
    total = tl.sum(tl.exp2(parts - top[None, :]), 0) + own
    weight_bound = own / tl.where(total > 0, total, 1.0)

    reason = tl.where(pos < 0, _NO_ROW, _HIT)
    reason = tl.where((reason == _HIT) & (distance >= cap), _DISTANCE, reason)
    reason = tl.where((reason == _HIT) & (position - anchor > max_age), _AGE, reason)
    # written so that a NaN on either side refuses the reuse
    light = weight_bound * distance < influence
    reason = tl.where((reason == _HIT) & (light == 0), _INFLUENCE, reason)
    reason = tl.where(position < min_context, _SHORT_CONTEXT, reason)
    reason = tl.where(ring < 0, _NO_RING, reason)
    head_hit = tl.sum(tl.where(mask_h & (reason == _HIT), 1 << head, 0), 0)
    worst = tl.min(tl.where(mask_h & (reason != _HIT), reason, _NUM_REASONS), 0)
    reuse = worst == _NUM_REASONS
    group_reason = tl.where(reuse, _HIT, worst)

    matched_end = tl.maximum(pos + 1 - BAND, SINKS)
    start = tl.where(reuse, matched_end, SINKS)
    low = tl.minimum(tl.min(tl.where(mask_h, start, _NEVER), 0), stop)
    new_anchor = tl.where(reuse, tl.min(tl.where(mask_h, anchor, _NEVER), 0), position)

    ints = decision_int_ptr + group * (3 * GROUP)
    tl.store(ints + head, start, mask=mask_h)
    tl.store(ints + GROUP + head, tl.where(pos >= 0, pos % WINDOW, 0), mask=mask_h)
    tl.store(ints + 2 * GROUP + head, pos, mask=mask_h)
    floats = decision_float_ptr + group * (3 * GROUP)
    tl.store(floats + head, lse, mask=mask_h)
    tl.store(floats + GROUP + head, distance, mask=mask_h)
    tl.store(floats + 2 * GROUP + head, weight_bound, mask=mask_h)
    info = group_ptr + group * 8
    tl.store(info, low)
    tl.store(info + 1, tl.minimum(stop, kv_len))
    tl.store(info + 2, position)
    tl.store(info + 3, tl.where(kv_len > 0, ring, -1))
    tl.store(info + 4, reuse.to(tl.int32))
    tl.store(info + 5, new_anchor)
    tl.store(info + 6, group_reason)
    tl.store(info + 7, head_hit)

    fresh = tl.maximum(stop - low, 0) + tl.maximum(kv_len - stop, 0) + SINKS
    tl.atomic_add(counters_ptr + group_reason, 1, sem="relaxed")
    tl.atomic_add(counters_ptr + _NUM_REASONS, tl.minimum(fresh, kv_len).to(tl.int64), sem="relaxed")
    tl.atomic_add(counters_ptr + _NUM_REASONS + 1, kv_len.to(tl.int64), sem="relaxed")
