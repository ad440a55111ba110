"""Match on the GPU, first launch: scan the ring through the sketch, beside the band and the sinks.

Band and sinks are attended whatever is decided, so they share a launch with the scan.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..attend.triton import attend_tiles
from ..device import (
    image_of,
    load_unrotated,
    position_of,
    quantize_image,
    ring_of,
    rotation_at,
    rows_to_search,
    sketch_terms,
)

_NEVER = tl.constexpr(2147483647)


@triton.jit
def load_rows(
    first,
    last,
    ring_row,
    kv_head,
    ring_pos_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    NUM_KV_HEADS: tl.constexpr,
    SKETCH_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Positions, sketches and their scales of the rows ``[first, last)``; position -1 beyond them."""
    row = first + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    inside = row < last
    at = (ring_row + row) * NUM_KV_HEADS + kv_head
    mask = inside[:, None] & (offs_k < SKETCH_DIM)[None, :]
    pos = tl.load(ring_pos_ptr + ring_row + row, mask=inside, other=-1)
    codes = tl.load(ring_sketch_ptr + at[:, None] * SKETCH_DIM + offs_k[None, :], mask=mask, other=0)
    return pos, codes, tl.load(ring_scale_ptr + at, mask=inside, other=0.0)


@triton.jit
def scan_sketch(
    q_group,
    stride_qh,
    cos_sin_ptr,
    position,
    ring,
    write,
    num_rows,
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
    """Keys of this split's share of the first ``num_rows`` rows; ``_NEVER`` if ineligible.

    A key is the squared sketch distance, its last bits replaced by the lag. The first split also writes the query and
    the sketch of the new row, if ``write``. Loads that do not depend on each other come first: the kernel is short, and
    each trip to memory is a good part of it.
    """
    rows_per_split: tl.constexpr = (WINDOW + SPLITS - 1) // SPLITS
    index, sign, known = sketch_terms(sketch_index_ptr, sketch_sign_ptr, TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K)
    ring_row = tl.maximum(ring, 0).to(tl.int64) * WINDOW
    begin = split * rows_per_split
    last = tl.minimum(tl.minimum(begin + rows_per_split, WINDOW), num_rows)
    at_once: tl.constexpr = rows_per_split <= BLOCK_R
    if at_once:
        pos, stored, stored_scale = load_rows(
            begin, last, ring_row, kv_head, ring_pos_ptr, ring_sketch_ptr, ring_scale_ptr,
            NUM_KV_HEADS, SKETCH_DIM, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    image = image_of(q_group, stride_qh, cos_sin_ptr, position, index, sign, known, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
    codes, scale = quantize_image(image)
    query = codes * scale
    for first in range(begin, last, BLOCK_R):
        if not at_once:
            pos, stored, stored_scale = load_rows(
                first, last, ring_row, kv_head, ring_pos_ptr, ring_sketch_ptr, ring_scale_ptr,
                NUM_KV_HEADS, SKETCH_DIM, BLOCK_K, BLOCK_R,
            )  # fmt: skip
        eligible = (pos > position - WINDOW) & (pos < position) & (pos + 1 - BAND > SINKS)
        gap = stored.to(tl.float32) * stored_scale[:, None] - query[None, :]
        bits = tl.sum(gap * gap, 1).to(tl.int32, bitcast=True)  # ordered like the distances, which are >= 0
        key = bits // BLOCK_W * BLOCK_W + (position - pos)
        row = first + tl.arange(0, BLOCK_R)
        tl.store(scan_ptr + row, tl.where(eligible, key, _NEVER), mask=row < last)
    if write & (split == 0):
        # the row at m - W is overwritten from here on; nothing matches it any more, its tag is still the old position
        at = ring_row + position % WINDOW
        offs_k = tl.arange(0, BLOCK_K)
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


@triton.jit
def scout_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    k_ptr,
    v_ptr,
    slots_ptr,
    generations_ptr,
    k_scale,
    v_scale,
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
    ring_pos_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    sketch_index_ptr,
    sketch_sign_ptr,
    cos_sin_ptr,
    bypass_ptr,
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
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BYPASS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: ``(B * Hkv * 2 * SPLITS,)``: half of a group's programs scan the ring, half attend to band and sinks."""
    pid = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = pid // (2 * SPLITS)
    split = pid % (2 * SPLITS)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    position, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    if split >= SPLITS:
        ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
        rows = tl.where(ring >= 0, rows_to_search(bypass_ptr, WINDOW, BYPASS), 0)
        scan_sketch(
            q_group, stride_qh, cos_sin_ptr, position, ring, owned & (position >= 0), rows, kv_head, split - SPLITS,
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
            page_ptr + first_page, stride_kp, stride_kt, stride_vp, stride_vt, logit_scale, soft_cap, k_scale, v_scale,
            HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, SCALES_ON_DEVICE, False, PRECISION, STAGES,
        )  # fmt: skip
        at = (group.to(tl.int64) * SPLITS + split) * GROUP
        tl.store(always_out_ptr + (at + head[:, None]) * HEAD_DIM + offs_d[None, :], out, mask=mask)
        tl.store(always_lse_ptr + at + head, lse, mask=head < GROUP)
