"""Prompt states on the GPU: exact attention of the last prompt queries over ``[F, E(t))``, written into the ring."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import load_unrotated, position_of, quantize_image, ring_of, rotation_at, sketch_image
from .triton import attend_tiles


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
        out, lse, key_mean = attend_tiles(
            q, tl.zeros([BLOCK_M], tl.int32), stop, SINKS, tl.max(stop, 0), 2147483647, 0,
            k_ptr + kv_head.to(tl.int64) * stride_kh, v_ptr + kv_head.to(tl.int64) * stride_vh,
            page_ptr + first_page, stride_kp, stride_kt, stride_vp, stride_vt, logit_scale, soft_cap, k_scale, v_scale,
            HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, SCALES_ON_DEVICE, KBAR, PRECISION, STAGES,
        )  # fmt: skip
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
