"""Prompt states on the GPU: exact attention of the last prompt queries over ``[F, E(t))``, written into the ring."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import load_unrotated, position_of, quantize_image, ring_of, rotation_at, scale_of, sketch_image


@triton.jit
def fold_tiles(
    q,  # [BLOCK_M, BLOCK_D]: prompt positions of one query head
    row_max,  # of the logits before they are scaled, so that scaling and subtracting are one operation
    row_sum,
    acc,
    key_acc,
    row_stop,  # [BLOCK_M] first position that a row does not see
    low,
    high,
    k_ptr,
    v_ptr,
    page_ptr,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    logit_scale,
    soft_cap,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    KBAR: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Fold the tokens ``[low, high)`` into a running state; without ``MASKED`` every row sees whole tiles of them."""
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        position = first + tl.arange(0, BLOCK_N)
        mask_d = (offs_d < HEAD_DIM)[None, :]
        if MASKED:
            inside = position < high
            page = tl.load(page_ptr + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & mask_d
        else:
            page = tl.load(page_ptr + position // PAGE_SIZE).to(tl.int64)
            mask = mask_d
        slot = (position % PAGE_SIZE).to(tl.int64)
        at_k = k_ptr + (page * stride_kp + slot * stride_kt)[:, None] + offs_d[None, :]
        at_v = v_ptr + (page * stride_vp + slot * stride_vt)[:, None] + offs_d[None, :]
        if MASKED or HEAD_DIM < BLOCK_D:
            k = tl.load(at_k, mask=mask, other=0.0)
            v = tl.load(at_v, mask=mask, other=0.0)
        else:
            k = tl.load(at_k)
            v = tl.load(at_v)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scale = logit_scale
        if SOFT_CAP:
            # tanh(x) = 1 - 2 / (exp2(2 x log2 e) + 1); the cap acts on natural logits, the scale already holds log2 e
            x = logits * (logit_scale / soft_cap)
            logits = 1.0 - 2.0 / (tl.exp2(2.0 * x) + 1.0)
            scale = soft_cap * 1.4426950408889634
        if MASKED:
            logits = tl.where(inside[None, :] & (position[None, :] < row_stop[:, None]), logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max) * scale
        weight = tl.exp2(logits * scale - safe[:, None])
        decay = tl.exp2(row_max * scale - safe)
        row_sum = row_sum * decay + tl.sum(weight, 1)
        weight = weight.to(v.dtype)
        acc = tl.dot(weight, v, acc * decay[:, None], input_precision=PRECISION)
        if KBAR:
            key_acc = tl.dot(weight, k, key_acc * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return row_max, row_sum, acc, key_acc


@triton.jit
def fill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    stride_qn,
    stride_qh,
    qo_indptr_ptr,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    begin_ptr,
    page_ptr,
    length_ptr,
    slots_ptr,
    generations_ptr,
    slot_table_ptr,
    ring_generation_ptr,
    num_slots,
    ring_out_ptr,
    ring_key_ptr,
    ring_lse_ptr,
    scratch_ptr,
    cos_sin_ptr,
    logit_scale,
    soft_cap,
    k_scale,
    v_scale,
    BAND: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KBAR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State of ``BLOCK_M`` prompt positions for one query head. Grid: ``(B, cdiv(W, BLOCK_M), Hq)``."""
    request = tl.program_id(0)
    qo_head = tl.program_id(2)
    kv_head = qo_head // GROUP
    newest, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
    q_end = tl.load(qo_indptr_ptr + request + 1)
    count = tl.minimum(q_end - tl.load(qo_indptr_ptr + request), WINDOW)
    first = tl.program_id(1) * BLOCK_M
    if owned & (first < count):
        # blocks are counted from the newest query, so that the longest come first
        age = first + tl.arange(0, BLOCK_M)
        mask_m = age < count
        position = newest - age
        stop = tl.where(mask_m, tl.maximum(position + 1 - BAND, SINKS), SINKS)
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        mask = mask_m[:, None] & mask_d[None, :]
        q_row = q_ptr + (q_end - 1 - age).to(tl.int64) * stride_qn + qo_head * stride_qh
        q = tl.load(q_row[:, None] + offs_d[None, :], mask=mask, other=0.0)
        key_scale = scale_of(k_scale, SCALES_ON_DEVICE)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        key_mean = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        # every row sees all of the whole tiles before the first row's stop: only the last few tiles need a mask
        seen = tl.min(tl.where(mask_m, stop, 2147483647), 0)
        whole = SINKS + (seen - SINKS) // BLOCK_N * BLOCK_N
        k_head = k_ptr + kv_head.to(tl.int64) * stride_kh
        v_head = v_ptr + kv_head.to(tl.int64) * stride_vh
        row_max, row_sum, out, key_mean = fold_tiles(
            q, row_max, row_sum, out, key_mean, stop, SINKS, whole, k_head, v_head, page_ptr + first_page,
            stride_kp, stride_kt, stride_vp, stride_vt, logit_scale * key_scale, soft_cap,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, KBAR, False, PRECISION, STAGES,
        )  # fmt: skip
        row_max, row_sum, out, key_mean = fold_tiles(
            q, row_max, row_sum, out, key_mean, stop, whole, tl.max(stop, 0), k_head, v_head, page_ptr + first_page,
            stride_kp, stride_kt, stride_vp, stride_vt, logit_scale * key_scale, soft_cap,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, KBAR, True, PRECISION, 1,
        )  # fmt: skip
        divisor = tl.where(row_sum > 0, row_sum, 1.0)
        top_scale = soft_cap * 1.4426950408889634 if SOFT_CAP else logit_scale * key_scale
        lse = tl.where(row_sum > 0, tl.log2(divisor) + row_max * top_scale, float("-inf"))
        out = out / divisor[:, None] * scale_of(v_scale, SCALES_ON_DEVICE)
        key_mean = key_mean / divisor[:, None] * key_scale
        at_row = ring.to(tl.int64) * WINDOW + tl.where(mask_m, position, 0) % WINDOW
        at_head = at_row * NUM_QO_HEADS + qo_head
        to = at_head[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(ring_out_ptr + to, out.to(ring_out_ptr.dtype.element_ty), mask=mask)
        tl.store(ring_lse_ptr + at_head, lse, mask=mask_m)
        if KBAR:
            # the rotation mixes dimensions that lie in other threads, so the mean key goes through memory once
            at = ((request * NUM_QO_HEADS + qo_head).to(tl.int64) * WINDOW + age) * HEAD_DIM
            tl.store(scratch_ptr + at[:, None] + offs_d[None, :], key_mean, mask=mask)
            tl.debug_barrier()
            other, cos, sin = rotation_at(cos_sin_ptr, position[:, None], offs_d[None, :], ROTARY_DIM, INTERLEAVED)
            direct = tl.load(scratch_ptr + at[:, None] + offs_d[None, :], mask=mask, other=0.0)
            crossed = tl.load(scratch_ptr + at[:, None] + other, mask=mask, other=0.0)
            key = direct * cos + crossed * sin
            tl.store(ring_key_ptr + to, key.to(ring_key_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tag_kernel(
    q_ptr,
    stride_qn,
    stride_qh,
    qo_indptr_ptr,
    begin_ptr,
    length_ptr,
    slots_ptr,
    generations_ptr,
    slot_table_ptr,
    ring_generation_ptr,
    num_slots,
    ring_q_ptr,
    ring_pos_ptr,
    ring_anchor_ptr,
    ring_seen_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    sketch_index_ptr,
    sketch_sign_ptr,
    cos_sin_ptr,
    WINDOW: tl.constexpr,
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
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
):
    """Query, sketch and tags of one prompt position and kv head. Grid: ``(B, W, Hkv)``; after :func:`fill_kernel`."""
    request = tl.program_id(0)
    age = tl.program_id(1)
    kv_head = tl.program_id(2)
    newest, _ = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
    q_end = tl.load(qo_indptr_ptr + request + 1)
    if owned & (age < q_end - tl.load(qo_indptr_ptr + request)):
        position = newest - age
        q_row = q_ptr + (q_end - 1 - age).to(tl.int64) * stride_qn + kv_head * GROUP * stride_qh
        head = tl.arange(0, BLOCK_G)
        offs_d = tl.arange(0, BLOCK_D)
        mask = (head < GROUP)[:, None] & (offs_d < HEAD_DIM)[None, :]
        other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
        q_pre = load_unrotated(
            q_row, stride_qh, head[:, None], offs_d[None, :], mask, other[None, :], cos[None, :], sin[None, :]
        )
        row = ring.to(tl.int64) * WINDOW + position % WINDOW
        at = (row * NUM_KV_HEADS + kv_head) * GROUP + head
        to = ring_q_ptr + at[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(to, q_pre.to(ring_q_ptr.dtype.element_ty), mask=mask)
        if ring_seen_ptr is not None:
            tl.store(ring_seen_ptr + at, -1, mask=head < GROUP)
        image = sketch_image(
            q_row, stride_qh, cos_sin_ptr, position, sketch_index_ptr, sketch_sign_ptr,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        codes, scale = quantize_image(image)
        offs_k = tl.arange(0, BLOCK_K)
        at = row * NUM_KV_HEADS + kv_head
        tl.store(ring_sketch_ptr + at * SKETCH_DIM + offs_k, codes.to(tl.int8), mask=offs_k < SKETCH_DIM)
        tl.store(ring_scale_ptr + at, scale)
        tl.store(ring_anchor_ptr + at, position)
        tl.store(ring_pos_ptr + row, position)
