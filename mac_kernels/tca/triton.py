"""Sparse decode on the GPU: split-KV attention to listed tokens and a dense window, balanced over a fixed grid."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..attend.triton import program_of, run_begin, tiles_of
from ..device import first_entry, position_of, scale_of


@triton.jit
def far_blocks(position, SINKS: tl.constexpr, KEEP_BLOCK: tl.constexpr, LOCAL: tl.constexpr):
    """Blocks in the far region of a query at ``position``."""
    return tl.maximum((position - SINKS) // KEEP_BLOCK - LOCAL // KEEP_BLOCK, 0)


@triton.jit
def kv_lengths(request, known, begin_ptr, length_ptr, PAGE_SIZE: tl.constexpr, ROW_STRIDE: tl.constexpr):
    """Tokens of several requests at once, 0 where not ``known``."""
    length = tl.load(length_ptr + request, mask=known, other=0).to(tl.int32)
    if ROW_STRIDE == 0:
        begin = tl.load(begin_ptr + request, mask=known, other=0)
        pages = (tl.load(begin_ptr + request + 1, mask=known, other=0) - begin).to(tl.int32)
        length = tl.where(pages > 0, (pages - 1) * PAGE_SIZE + length, 0)
    return length


@triton.jit
def far_set_of(group, known, sets_ptr, NUM_KV_HEADS: tl.constexpr):
    """Place of a kv group's far set among all, and whether it has one; without ``sets_ptr`` it is the group's own."""
    if sets_ptr is None:
        return group, known
    else:
        own = tl.load(sets_ptr + group // NUM_KV_HEADS, mask=known, other=-1)
        return tl.maximum(own, 0) * NUM_KV_HEADS + group % NUM_KV_HEADS, own >= 0


@triton.jit
def log2_weights(products, logit_scale, soft_cap, SOFT_CAP: tl.constexpr):
    """Logits in base 2; ``logit_scale`` holds log2 e, the cap acts on natural logits."""
    if SOFT_CAP:
        # tanh(x) = 1 - 2 / (exp2(2 x log2 e) + 1)
        x = products * (logit_scale / soft_cap)
        return (soft_cap * 1.4426950408889634) * (1.0 - 2.0 / (tl.exp2(2.0 * x) + 1.0))
    else:
        return products * logit_scale


@triton.jit
def wins_in_block(score_ptr, keep, KEEP_BLOCK: tl.constexpr):
    """Which of the scores [KEEP_BLOCK], none below 0, are among the ``keep`` largest, the earlier of equals first."""
    # bits of such numbers are ordered as they are: the smallest that wins is found bit by bit
    score = tl.load(score_ptr + tl.arange(0, KEEP_BLOCK)).to(tl.int32, bitcast=True)
    least = 0
    for turn in range(31):
        higher = least | (1 << (30 - turn))
        least = tl.where(tl.sum((score >= higher).to(tl.int32), 0) >= keep, higher, least)
    above = score > least
    ties = score == least
    left = keep - tl.sum(above.to(tl.int32), 0)
    return above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= left))


@triton.jit
def attend_kept(
    q,  # [BLOCK_M, BLOCK_D]: the heads of one kv group padded to the tensor cores' 16 rows
    low,
    high,
    count,  # entries below this are listed, the others are the window's positions
    window,
    ids_ptr,
    k_ptr,
    v_ptr,
    page_ptr,
    stride_kp,
    stride_kt,
    stride_vp,
    stride_vt,
    logit_scale,
    soft_cap,
    v_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """State ``(out, lse2)`` over the entries ``[low, high)``, at least one."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    for first in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        entry = first + tl.arange(0, BLOCK_N)
        mask_n = entry < high
        listed = tl.load(ids_ptr + entry, mask=mask_n & (entry < count), other=0)
        position = tl.where(entry < count, listed, entry - count + window)
        page = tl.load(page_ptr + position // PAGE_SIZE, mask=mask_n, other=0).to(tl.int64)
        slot = (position % PAGE_SIZE).to(tl.int64)
        mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + (page * stride_kp + slot * stride_kt)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + (page * stride_vp + slot * stride_vt)[:, None] + offs_d[None, :], mask=mask, other=0.0)
        products = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
        logits = log2_weights(products, logit_scale, soft_cap, SOFT_CAP)
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        weight = tl.exp2(logits - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.dot(weight.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
        row_max = new_max
    return acc / row_sum[:, None] * v_scale, tl.log2(row_sum) + row_max


@triton.jit
def kept_kernel(
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
    length_ptr,
    ids_ptr,
    count_ptr,
    far_end_ptr,
    sets_ptr,
    parts_ptr,
    part_out_ptr,
    part_lse_ptr,
    logit_scale,
    soft_cap,
    num_groups,
    num_programs,
    capacity,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attend every kv group to its far tokens, then to its window. Grid: ``(num_programs,)``, fixed.

    Runs and parts are those of :func:`mac_kernels.attend.triton.rest_kernel`, in units of fewer tokens than a tile:
    with few tiles per program, whole ones would leave some of them waiting for the others.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    groups = tl.arange(0, BLOCK_GROUPS)
    known = groups < num_groups
    length_all = kv_lengths(groups // NUM_KV_HEADS, known, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    set_all, has_far = far_set_of(groups, known, sets_ptr, NUM_KV_HEADS)
    count_all = tl.load(count_ptr + set_all, mask=has_far, other=0)
    window_all = tl.load(far_end_ptr + set_all, mask=has_far, other=0)
    entries_all = length_all - window_all + count_all
    units = tiles_of(0, entries_all, UNIT)
    ends = tl.cumsum(units, 0)
    total = tl.sum(units, 0)
    run = run_begin(program, total, num_programs)
    run_end = run_begin(program + 1, total, num_programs)
    if program == 0:
        begins = ends - units
        first = program_of(begins, total, num_programs)
        last = program_of(ends - 1, total, num_programs)
        tl.store(parts_ptr + groups * 2, first + groups, mask=known)
        tl.store(parts_ptr + groups * 2 + 1, tl.where(units > 0, last - first + 1, 0), mask=known)

    head = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    while run < run_end:
        group = tl.sum((ends <= run).to(tl.int32), 0)
        own = groups == group
        end = tl.sum(tl.where(own, ends, 0), 0)
        begin = end - tl.sum(tl.where(own, units, 0), 0)
        entries = tl.sum(tl.where(own, entries_all, 0), 0)
        stop = tl.minimum(end, run_end)
        far_set = tl.sum(tl.where(own, set_all, 0), 0).to(tl.int64)
        count = tl.sum(tl.where(own, count_all, 0), 0)
        window = tl.sum(tl.where(own, window_all, 0), 0)
        request = group // NUM_KV_HEADS
        kv_head = group % NUM_KV_HEADS
        q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
        q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        out, lse = attend_kept(
            q, (run - begin) * UNIT, tl.minimum((stop - begin) * UNIT, entries),
            count, window, ids_ptr + far_set * capacity,
            k_ptr + kv_head.to(tl.int64) * stride_kh, v_ptr + kv_head.to(tl.int64) * stride_vh,
            page_ptr + first_entry(request, begin_ptr, ROW_STRIDE),
            stride_kp, stride_kt, stride_vp, stride_vt, logit_scale * scale_of(k_scale, SCALES_ON_DEVICE), soft_cap,
            scale_of(v_scale, SCALES_ON_DEVICE),
            HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_N, PAGE_SIZE, SOFT_CAP, PRECISION, STAGES,
        )  # fmt: skip
        part = (program + group).to(tl.int64) * GROUP + head
        tl.store(part_out_ptr + part[:, None] * HEAD_DIM + offs_d[None, :], out, mask=mask)
        tl.store(part_lse_ptr + part, lse, mask=mask_h)
        run = stop


@triton.jit
def merge_kernel(
    out_ptr,
    lse_ptr,
    parts_ptr,
    part_out_ptr,
    part_lse_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of one query head. Grid: ``(B * Hq,)``."""
    pid = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group = pid // GROUP
    head = pid % GROUP
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    first_part = tl.load(parts_ptr + group * 2)
    num_parts = tl.load(parts_ptr + group * 2 + 1)
    top = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_parts, BLOCK_P):
        index = first + tl.arange(0, BLOCK_P)
        at = (first_part + index).to(tl.int64) * GROUP + head
        present = index < num_parts
        lse = tl.load(part_lse_ptr + at, mask=present, other=float("-inf"))
        mask = present[:, None] & mask_d[None, :]
        part = tl.load(part_out_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(tl.max(lse, 0), top)
        weight = tl.exp2(lse - new_top)
        decay = tl.exp2(top - new_top)
        total = total * decay + tl.sum(weight, 0)
        out = out * decay + tl.sum(part * weight[:, None], 0)
        top = new_top
    out = out / tl.where(total > 0, total, 1.0)  # a request without tokens has no part
    tl.store(out_ptr + pid.to(tl.int64) * HEAD_DIM + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + pid, tl.where(total > 0, tl.log2(tl.where(total > 0, total, 1.0)) + top, float("-inf")))


@triton.jit
def compact_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    k_ptr,
    k_scale,
    stride_kp,
    stride_kt,
    stride_kh,
    begin_ptr,
    page_ptr,
    length_ptr,
    ids_ptr,
    count_ptr,
    far_end_ptr,
    sets_ptr,
    keep_ptr,
    score_ptr,
    logit_scale,
    soft_cap,
    capacity,
    SINKS: tl.constexpr,
    KEEP_BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Move the best tokens of blocks that left the window to the far set. Grid: ``(B * Hkv,)``.

    Where the set has no room left the window goes on growing instead.
    """
    group = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    newest, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    far_set, has_far = far_set_of(group, group >= 0, sets_ptr, NUM_KV_HEADS)
    keep = tl.where(has_far, tl.load(keep_ptr + kv_head), 0)
    begin = tl.maximum(tl.load(far_end_ptr + far_set), SINKS)
    count = tl.maximum(tl.load(count_ptr + far_set), SINKS)
    end = SINKS + far_blocks(newest, SINKS, KEEP_BLOCK, LOCAL) * KEEP_BLOCK
    room = tl.where(keep > 0, (capacity - count) // tl.maximum(keep, 1), 0)
    end = tl.minimum(end, begin + room * KEEP_BLOCK)
    if begin < end:
        head = tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
        mask = (head < GROUP)[:, None] & mask_d[None, :]
        q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        logit_scale *= scale_of(k_scale, SCALES_ON_DEVICE)
        k_head = k_ptr + kv_head.to(tl.int64) * stride_kh
        scores = score_ptr + group * KEEP_BLOCK
        listed = ids_ptr + far_set.to(tl.int64) * capacity
        while begin < end:
            row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
            row_sum = tl.zeros([BLOCK_M], tl.float32)
            for turn in range(0, 2 * KEEP_BLOCK, BLOCK_C):  # the first half finds the sums that the second divides by
                token = turn % KEEP_BLOCK + tl.arange(0, BLOCK_C)
                position = begin + token
                page = tl.load(page_ptr + first_page + position // PAGE_SIZE).to(tl.int64)
                at = page * stride_kp + (position % PAGE_SIZE).to(tl.int64) * stride_kt
                k = tl.load(k_head + at[:, None] + offs_d[None, :], mask=mask_d[None, :], other=0.0)
                products = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
                logits = log2_weights(products, logit_scale, soft_cap, SOFT_CAP)
                if turn < KEEP_BLOCK:
                    new_max = tl.maximum(row_max, tl.max(logits, 1))
                    row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), 1)
                    row_max = new_max
                else:
                    share = tl.exp2(logits - row_max[:, None]) / row_sum[:, None]
                    share = tl.where((head < GROUP)[:, None], share, 0.0)
                    tl.store(scores + token, tl.sum(share, 0) / GROUP)
            tl.debug_barrier()  # scores are read by other threads than wrote them
            wins = wins_in_block(scores, keep, KEEP_BLOCK)
            place = tl.cumsum(wins.to(tl.int32), 0) - 1
            tl.store(listed + count + place, begin + tl.arange(0, KEEP_BLOCK), mask=wins)
            tl.debug_barrier()
            count += keep
            begin += KEEP_BLOCK
        tl.store(count_ptr + far_set, count)
        tl.store(far_end_ptr + far_set, begin)
