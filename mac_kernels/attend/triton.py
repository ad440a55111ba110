"""Attend on the GPU: split-KV attention over device-side ranges, balanced over a fixed grid.

The tiles of all kv groups are laid end to end and cut into equal runs, one per program, so that one missing group in a
batch of hits is spread over the whole GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..counters import READ
from ..device import first_entry, scale_of, selection_of

_READ = tl.constexpr(READ)


@triton.jit
def attend_tiles(
    q,  # [BLOCK_M, BLOCK_D]: the heads of one kv group padded to the tensor cores' 16 rows, or prompt positions
    row_start,  # [BLOCK_M] first position that a row sees
    row_stop,  # [BLOCK_M] and the first that it does not
    low,
    high,
    jump_at,  # entries from here on ...
    jump,  # ... are this many positions further: sinks and band form one range
    k_ptr,
    v_ptr,
    page_ptr,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    logit_scale,
    soft_cap,
    k_scale,  # what keys and values are to be multiplied with, a number or a pointer to one
    v_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    KBAR: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    listed_ptr=None,  # positions of the entries before jump_at, if they are others than their numbers
):
    """State over the entries ``[low, high)``: ``(out, lse2, kbar)``; an empty range gives (0, -inf, 0).

    Products take the dtype of the queries; an 8-bit cache is converted to it in registers.
    """
    k_scale = scale_of(k_scale, SCALES_ON_DEVICE)
    logit_scale *= k_scale
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # added up at the end: in the loop that would be one barrier more
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    key_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        entry = first + tl.arange(0, BLOCK_N)
        mask_n = entry < high
        near = entry
        if listed_ptr is not None:
            near = tl.load(listed_ptr + entry, mask=mask_n & (entry < jump_at), other=0)
        position = tl.where(entry < jump_at, near, entry + jump)
        page = tl.load(page_ptr + position // PAGE_SIZE, mask=mask_n, other=0).to(tl.int64)
        slot = (position % PAGE_SIZE).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + (page * stride_kp + slot * stride_kt)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + (page * stride_vp + slot * stride_vt)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        k = k.to(q.dtype)
        v = v.to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFT_CAP:
            # tanh(x) = 1 - 2 / (exp2(2 x log2 e) + 1); the cap acts on natural logits, the scale already holds log2 e
            x = logits * (logit_scale / soft_cap)
            logits = (soft_cap * 1.4426950408889634) * (1.0 - 2.0 / (tl.exp2(2.0 * x) + 1.0))
        else:
            logits = logits * logit_scale
        visible = mask_n[None, :] & (position[None, :] >= row_start[:, None]) & (position[None, :] < row_stop[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(logits - safe[:, None])
        decay = tl.exp2(row_max - safe)
        sums = sums * decay[:, None] + weight
        weight = weight.to(v.dtype)
        acc = acc * decay[:, None] + tl.dot(weight, v, input_precision=PRECISION)
        if KBAR:
            key_acc = key_acc * decay[:, None] + tl.dot(weight, k, input_precision=PRECISION)
        row_max = new_max
    row_sum = tl.sum(sums, 1)
    divisor = tl.where(row_sum > 0, row_sum, 1.0)
    lse = tl.where(row_sum > 0, tl.log2(divisor) + row_max, float("-inf"))
    return acc / divisor[:, None] * scale_of(v_scale, SCALES_ON_DEVICE), lse, key_acc / divisor[:, None] * k_scale


@triton.jit
def run_begin(program, total, num_programs):
    """First tile of a program's run: ``total`` tiles are dealt out in order, the first programs get one more."""
    each = total // num_programs
    return program * each + tl.minimum(program, total % num_programs)


@triton.jit
def program_of(tile, total, num_programs):
    """The program whose run holds a tile."""
    each = total // num_programs
    extra = total % num_programs
    long_runs = extra * (each + 1)
    return tl.where(
        tile < long_runs, tile // (each + 1), extra + tl.maximum(tile - long_runs, 0) // tl.maximum(each, 1)
    )


@triton.jit
def tiles_of(low, high, BLOCK_N: tl.constexpr):
    """Tiles of a group's rest."""
    return tl.maximum(high - low + BLOCK_N - 1, 0) // BLOCK_N


@triton.jit
def rest_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    k_ptr,
    v_ptr,
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
    decision_int_ptr,
    group_ptr,
    parts_ptr,
    part_out_ptr,
    part_key_ptr,
    part_lse_ptr,
    ids_ptr,
    count_ptr,
    far_end_ptr,
    selected_ptr,
    dropped_ptr,
    spared_ptr,
    counters_ptr,
    refresh,
    limit,
    capacity,
    logit_scale,
    soft_cap,
    num_groups,
    num_programs,
    SINKS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KBAR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend to the rest ``[start, E)`` of every group. Grid: ``(num_programs,)``, fixed.

    A group's state arrives in parts, one per program that shares it. Parts are numbered in the order of the tiles:
    program ``p`` writes its part of group ``g`` to slot ``p + g``, which no other pair has, and whoever holds the
    group's first tile notes the first slot and their number.

    With an index (``ids_ptr`` is given) the rest of a missed group may be listed tokens and a dense window. The list's
    entries are then counted down from the window, so that the others keep their numbers.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    groups = tl.arange(0, BLOCK_GROUPS)
    known = groups < num_groups
    low_all = tl.load(group_ptr + groups * 8, mask=known, other=0)
    high_all = tl.load(group_ptr + groups * 8 + 1, mask=known, other=0)
    if ids_ptr is not None:
        selected_all, listed_all, window_all, _place_all = selection_of(
            groups, known, group_ptr, count_ptr, far_end_ptr, selected_ptr, dropped_ptr, refresh, limit,
            NUM_KV_HEADS, SINKS,
        )  # fmt: skip
        if program == 0:
            spared = window_all - listed_all - low_all
            tl.store(spared_ptr + groups, tl.where(selected_all >= 0, spared, -1), mask=known)
            tl.atomic_add(counters_ptr + _READ, -tl.sum(spared.to(tl.int64), 0), sem="relaxed")
        low_all = window_all - listed_all
    tiles = tiles_of(low_all, high_all, BLOCK_N)
    ends = tl.cumsum(tiles, 0)
    total = tl.sum(tiles, 0)
    run = run_begin(program, total, num_programs)
    run_end = run_begin(program + 1, total, num_programs)
    if program == 0:
        begins = ends - tiles
        first = program_of(begins, total, num_programs)
        last = program_of(ends - 1, total, num_programs)
        tl.store(parts_ptr + groups * 2, first + groups, mask=known)
        tl.store(parts_ptr + groups * 2 + 1, tl.where(tiles > 0, last - first + 1, 0), mask=known)

    head = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    while run < run_end:
        group = tl.sum((ends <= run).to(tl.int32), 0)
        end_tile = tl.min(tl.where(groups == group, ends, 2147483647), 0)
        stop_tile = tl.minimum(end_tile, run_end)
        low = tl.load(group_ptr + group * 8)
        high = tl.load(group_ptr + group * 8 + 1)
        window = 2147483647
        listed_ptr = ids_ptr
        if ids_ptr is not None:
            _selected, listed, window, place = selection_of(
                group, group >= 0, group_ptr, count_ptr, far_end_ptr, selected_ptr, dropped_ptr, refresh, limit,
                NUM_KV_HEADS, SINKS,
            )  # fmt: skip
            low = window - listed
            listed_ptr = ids_ptr + place.to(tl.int64) * capacity + (SINKS - low)
        begin_tile = end_tile - tiles_of(low, high, BLOCK_N)
        request = group // NUM_KV_HEADS
        kv_head = group % NUM_KV_HEADS
        q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
        q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        start = tl.load(decision_int_ptr + group * (3 * GROUP) + head, mask=mask_h, other=2147483647)
        stop = tl.full([BLOCK_M], 2147483647, tl.int32)
        first = low + (run - begin_tile) * BLOCK_N
        last = tl.minimum(low + (stop_tile - begin_tile) * BLOCK_N, high)
        k_head = k_ptr + kv_head.to(tl.int64) * stride_kh
        v_head = v_ptr + kv_head.to(tl.int64) * stride_vh
        pages = page_ptr + first_entry(request, begin_ptr, ROW_STRIDE)
        if stop_tile - run == 1:  # the rest of a hit: a pipeline of one tile would only walk through its empty stages
            out, lse, key = attend_tiles(
                q, start, stop, first, last, window, 0, k_head, v_head, pages,
                stride_kp, stride_kt, stride_vp, stride_vt, logit_scale, soft_cap, k_scale, v_scale,
                HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, SCALES_ON_DEVICE, KBAR, PRECISION, 1,
                listed_ptr,
            )  # fmt: skip
        else:
            out, lse, key = attend_tiles(
                q, start, stop, first, last, window, 0, k_head, v_head, pages,
                stride_kp, stride_kt, stride_vp, stride_vt, logit_scale, soft_cap, k_scale, v_scale,
                HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, SCALES_ON_DEVICE, KBAR, PRECISION, STAGES,
                listed_ptr,
            )  # fmt: skip
        part = program + group
        base = part.to(tl.int64) * (GROUP * HEAD_DIM)
        tile = head[:, None] * HEAD_DIM + offs_d[None, :]
        tl.store(part_out_ptr + base + tile, out, mask=mask)
        if KBAR:
            tl.store(part_key_ptr + base + tile, key, mask=mask)
        tl.store(part_lse_ptr + part * GROUP + head, lse, mask=mask_h)
        run = stop_tile
