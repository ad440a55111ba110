"""Attend on the GPU: split-KV attention over device-side ranges, balanced over a fixed grid.

The tiles of all kv groups are laid end to end and cut into equal runs, one per program, so that one missing group in a
batch of hits is spread over the whole GPU. The last program that finishes a group completes it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from ..complete.triton import complete_group


@triton.jit
def attend_tiles(
    q,  # [M, BLOCK_D], M >= 16 rows of one kv group
    row_max,
    row_sum,
    acc,
    key_acc,
    head_start,  # [M] first position of every head
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
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the keys at positions ``[low, high)`` to a running softmax; logits and ``row_max`` are base 2."""
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < high
        page = tl.load(page_ptr + offs_n // PAGE_SIZE, mask=mask_n, other=0).to(tl.int64)
        slot = (offs_n % PAGE_SIZE).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + (page * stride_kp + slot * stride_kt)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + (page * stride_vp + slot * stride_vt)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFT_CAP:
            # tanh(x) = 1 - 2 / (exp2(2 x log2 e) + 1); the cap acts on natural logits, the scale already holds log2 e
            x = logits * (logit_scale / soft_cap)
            logits = (soft_cap * 1.4426950408889634) * (1.0 - 2.0 / (tl.exp2(2.0 * x) + 1.0))
        else:
            logits = logits * logit_scale
        visible = mask_n[None, :] & (offs_n[None, :] >= head_start[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(logits - safe[:, None])
        decay = tl.exp2(row_max - safe)
        row_sum = row_sum * decay + tl.sum(weight, 1)
        weight = weight.to(v.dtype)
        acc = acc * decay[:, None] + tl.dot(weight, v, input_precision=PRECISION)
        if KBAR:
            key_acc = key_acc * decay[:, None] + tl.dot(weight, k, input_precision=PRECISION)
        row_max = new_max
    return row_max, row_sum, acc, key_acc


@triton.jit
def rest_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    out_ptr,
    stride_ob,
    stride_oh,
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
    decision_int_ptr,
    decision_float_ptr,
    group_ptr,
    arrived_ptr,
    part_out_ptr,
    part_key_ptr,
    part_lse_ptr,
    always_out_ptr,
    always_lse_ptr,
    ring_q_ptr,
    ring_out_ptr,
    ring_key_ptr,
    ring_lse_ptr,
    ring_pos_ptr,
    ring_anchor_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    sketch_index_ptr,
    sketch_sign_ptr,
    cos_sin_ptr,
    logit_scale,
    soft_cap,
    num_groups,
    num_programs,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
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
    SPLITS: tl.constexpr,
    KBAR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend to the rest of every group and complete it. Grid: ``(num_programs,)``, fixed."""
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
    # tiles per group; a group without a rest keeps one empty tile, so that somebody completes it
    groups = tl.arange(0, BLOCK_GROUPS)
    known = groups < num_groups
    low_all = tl.load(group_ptr + groups * 8, mask=known, other=0)
    high_all = tl.load(group_ptr + groups * 8 + 1, mask=known, other=0)
    tiles = tl.where(known, tl.maximum((high_all - low_all + BLOCK_N - 1) // BLOCK_N, 1), 0)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    run = (program.to(tl.int64) * total // num_programs).to(tl.int32)
    run_end = ((program + 1).to(tl.int64) * total // num_programs).to(tl.int32)
    group = tl.sum((ends <= run).to(tl.int32), 0)

    head = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    part = 2 * program
    while run < run_end:
        end_tile = tl.sum(tl.where(groups == group, ends, 0), 0)
        begin_tile = end_tile - tl.sum(tl.where(groups == group, tiles, 0), 0)
        stop_tile = tl.minimum(end_tile, run_end)
        info = group_ptr + group * 8
        low = tl.load(info)
        high = tl.load(info + 1)
        position = tl.load(info + 2)
        ring = tl.load(info + 3)
        reuse = tl.load(info + 4) != 0
        anchor = tl.load(info + 5)
        request = group // NUM_KV_HEADS
        kv_head = group % NUM_KV_HEADS
        q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
        q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        start = tl.load(decision_int_ptr + group * (3 * GROUP) + head, mask=mask_h, other=2147483647)
        row_max, row_sum, acc, key_acc = attend_tiles(
            q,
            tl.full([BLOCK_M], float("-inf"), tl.float32),
            tl.zeros([BLOCK_M], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
            tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
            start,
            low + (run - begin_tile) * BLOCK_N,
            tl.minimum(low + (stop_tile - begin_tile) * BLOCK_N, high),
            k_ptr + kv_head.to(tl.int64) * stride_kh,
            v_ptr + kv_head.to(tl.int64) * stride_vh,
            indices_ptr + tl.load(indptr_ptr + request),
            stride_kp, stride_kt, stride_vp, stride_vt,
            logit_scale, soft_cap,
            HEAD_DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, KBAR, PRECISION, STAGES,
        )  # fmt: skip
        divisor = tl.where(row_sum > 0, row_sum, 1.0)
        lse = tl.where(row_sum > 0, tl.log2(divisor) + row_max, float("-inf"))
        base = part.to(tl.int64) * (GROUP * HEAD_DIM)
        tile = head[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(part_out_ptr + base + tile, acc / divisor[:, None], mask=mask)
        if KBAR:
            tl.store(part_key_ptr + base + tile, key_acc / divisor[:, None], mask=mask)
        tl.store(part_lse_ptr + part * GROUP + head, lse, mask=mask_h)

        first_program = (((begin_tile + 1).to(tl.int64) * num_programs - 1) // total).to(tl.int32)
        last_program = ((end_tile.to(tl.int64) * num_programs - 1) // total).to(tl.int32)
        tl.debug_barrier()  # every thread's part is stored before one of them announces it
        before = tl.atomic_add(arrived_ptr + group, 1, sem="acq_rel")
        if before == last_program - first_program:
            tl.store(arrived_ptr + group, 0)
            complete_group(
                group, begin_tile, total, first_program, last_program, num_programs,
                part_out_ptr, part_key_ptr, part_lse_ptr, always_out_ptr, always_lse_ptr,
                decision_int_ptr, decision_float_ptr,
                q_group, stride_qh,
                out_ptr + request.to(tl.int64) * stride_ob + kv_head * GROUP * stride_oh, stride_oh,
                ring_q_ptr, ring_out_ptr, ring_key_ptr, ring_lse_ptr, ring_pos_ptr, ring_anchor_ptr,
                ring_sketch_ptr, ring_scale_ptr, sketch_index_ptr, sketch_sign_ptr, cos_sin_ptr,
                kv_head, position, ring, reuse, anchor,
                WINDOW, NUM_QO_HEADS, NUM_KV_HEADS, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED,
                TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K, SPLITS, KBAR,
            )  # fmt: skip
        tl.debug_barrier()  # the slot of a later group is overwritten next
        run = stop_tile
        group += 1
        part = 2 * program + 1
