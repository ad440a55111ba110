"""Select on the GPU in four launches: score the tokens, score the blocks, rank the blocks, list the winners.

How many tokens a head keeps is known beforehand; which ones is decided on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import position_of, scale_of
from .triton import far_blocks, log2_weights, wins_in_block


@triton.jit(do_not_specialize=["width"])
def score_kernel(
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
    count_ptr,
    logits_ptr,
    part_max_ptr,
    part_sum_ptr,
    logit_scale,
    soft_cap,
    width,
    NUM_QO_HEADS: tl.constexpr,
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
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Base-2 logits of the last query over a split of the context, maximum and sum. Grid: ``(SPLITS, B * Hkv)``."""
    split = tl.program_id(0)
    group = tl.program_id(1)
    if tl.load(count_ptr + group) > 0:
        request = group // NUM_KV_HEADS
        kv_head = group % NUM_KV_HEADS
        newest, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
        head = tl.arange(0, BLOCK_M)
        mask_h = head < GROUP
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD_DIM
        q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
        mask = mask_h[:, None] & mask_d[None, :]
        q = tl.load(q_group + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        logit_scale *= scale_of(k_scale, SCALES_ON_DEVICE)
        k_head = k_ptr + kv_head.to(tl.int64) * stride_kh
        row = (request * NUM_QO_HEADS + kv_head * GROUP + head).to(tl.int64)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        tiles = (newest + BLOCK_N) // BLOCK_N
        begin = split * tiles // SPLITS * BLOCK_N
        end = tl.minimum((split + 1) * tiles // SPLITS * BLOCK_N, newest + 1)
        for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
            position = first + tl.arange(0, BLOCK_N)
            mask_n = position < end
            page = tl.load(page_ptr + first_page + position // PAGE_SIZE, mask=mask_n, other=0).to(tl.int64)
            at = page * stride_kp + (position % PAGE_SIZE).to(tl.int64) * stride_kt
            k = tl.load(k_head + at[:, None] + offs_d[None, :], mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            products = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
            logits = log2_weights(products, logit_scale, soft_cap, SOFT_CAP)
            to = logits_ptr + row[:, None] * width + position[None, :]
            tl.store(to, logits, mask=mask_h[:, None] & mask_n[None, :])
            logits = tl.where(mask_n[None, :], logits, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), 1)
            row_max = new_max
        tl.store(part_max_ptr + row * SPLITS + split, row_max, mask=mask_h)
        tl.store(part_sum_ptr + row * SPLITS + split, row_sum, mask=mask_h)


@triton.jit(do_not_specialize=["width", "most_blocks"])
def block_kernel(
    begin_ptr,
    length_ptr,
    count_ptr,
    logits_ptr,
    part_max_ptr,
    part_sum_ptr,
    token_score_ptr,
    block_score_ptr,
    alpha,
    width,
    most_blocks,
    SINKS: tl.constexpr,
    KEEP_BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    LITERAL: tl.constexpr,
):
    """Importance of one block's tokens and the score that ranks the block. Grid: ``(most_blocks, B * Hkv)``."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    newest, _ = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    if (tl.load(count_ptr + group) > 0) & (block < far_blocks(newest, SINKS, KEEP_BLOCK, LOCAL)):
        head = tl.arange(0, BLOCK_G)
        mask_h = head < GROUP
        row = (request * NUM_QO_HEADS + kv_head * GROUP + head).to(tl.int64)
        part = row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
        part_max = tl.load(part_max_ptr + part, mask=mask_h[:, None], other=0.0)
        part_sum = tl.load(part_sum_ptr + part, mask=mask_h[:, None], other=1.0)
        top = tl.max(part_max, 1)
        total = tl.sum(part_sum * tl.exp2(part_max - top[:, None]), 1)
        token = tl.arange(0, KEEP_BLOCK)
        at = row[:, None] * width + (SINKS + block * KEEP_BLOCK + token)[None, :]
        logits = tl.load(logits_ptr + at, mask=mask_h[:, None], other=float("-inf"))
        score = tl.sum(tl.exp2(logits - top[:, None]) / total[:, None], 0) / GROUP
        mass = tl.sum(score, 0)
        bound = tl.maximum(mass, 1e-30)
        even = 1.0 - tl.sum(score * score, 0) / (bound * bound)
        ranked = (1.0 - alpha) * mass + alpha * even if LITERAL else mass * even
        at_block = group.to(tl.int64) * most_blocks + block
        tl.store(token_score_ptr + at_block * KEEP_BLOCK + token, score)
        tl.store(block_score_ptr + at_block, ranked)


@triton.jit(do_not_specialize=["num_groups", "most_blocks"])
def rank_kernel(
    begin_ptr,
    length_ptr,
    count_ptr,
    ends_ptr,
    block_score_ptr,
    keep_ptr,
    num_groups,
    most_blocks,
    SINKS: tl.constexpr,
    KEEP_BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Tokens that each of ``BLOCK_R`` blocks keeps. Grid: ``(cdiv(most_blocks, BLOCK_R), B * Hkv)``.

    ``ends_ptr`` [LEVELS, B * Hkv]: ranks below entry ``q`` keep at least ``KEEP_BLOCK >> q`` tokens.
    """
    group = tl.program_id(1)
    newest, _ = position_of(group // NUM_KV_HEADS, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    blocks = far_blocks(newest, SINKS, KEEP_BLOCK, LOCAL)
    block = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.load(count_ptr + group) > 0:
        scores = block_score_ptr + group.to(tl.int64) * most_blocks
        score = tl.load(scores + block, mask=block < blocks, other=0.0)
        rank = tl.zeros([BLOCK_R], tl.int32)
        for first in range(0, blocks, BLOCK_C):
            rival = first + tl.arange(0, BLOCK_C)
            theirs = tl.load(scores + rival, mask=rival < blocks, other=float("-inf"))
            ahead = (theirs[None, :] > score[:, None]) | (
                (theirs[None, :] == score[:, None]) & (rival[None, :] < block[:, None])
            )
            rank += tl.sum(ahead.to(tl.int32), 1)
        halvings = tl.zeros([BLOCK_R], tl.int32)
        for level in tl.static_range(LEVELS):
            halvings += (rank >= tl.load(ends_ptr + level * num_groups + group)).to(tl.int32)
        keep = tl.full([BLOCK_R], KEEP_BLOCK, tl.int32) >> halvings
        tl.store(keep_ptr + group.to(tl.int64) * most_blocks + block, keep, mask=block < blocks)


@triton.jit(do_not_specialize=["most_blocks", "capacity"])
def list_kernel(
    begin_ptr,
    length_ptr,
    count_ptr,
    token_score_ptr,
    keep_ptr,
    ids_ptr,
    prefix_ptr,
    most_blocks,
    capacity,
    SINKS: tl.constexpr,
    BLOCK_SINKS: tl.constexpr,
    KEEP_BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """List one block's winners behind those of the blocks before it. Grid: ``(max(most_blocks, 1), B * Hkv)``."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    newest, _ = position_of(group // NUM_KV_HEADS, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    listed = ids_ptr + group.to(tl.int64) * capacity
    if block == 0:
        sink = tl.arange(0, BLOCK_SINKS)
        tl.store(listed + sink, sink, mask=sink < SINKS)
    if (tl.load(count_ptr + group) > 0) & (block < far_blocks(newest, SINKS, KEEP_BLOCK, LOCAL)):
        keeps = keep_ptr + group.to(tl.int64) * most_blocks
        before = tl.zeros([BLOCK_C], tl.int32)
        for first in range(0, block, BLOCK_C):
            other = first + tl.arange(0, BLOCK_C)
            before += tl.load(keeps + other, mask=other < block, other=0)
        keep = tl.load(keeps + block)
        place = SINKS + tl.sum(before, 0)
        scores = token_score_ptr + (group.to(tl.int64) * most_blocks + block) * KEEP_BLOCK
        wins = wins_in_block(scores, keep, KEEP_BLOCK)
        token = SINKS + block * KEEP_BLOCK + tl.arange(0, KEEP_BLOCK)
        tl.store(listed + place + tl.cumsum(wins.to(tl.int32), 0) - 1, token, mask=wins)
        tl.store(prefix_ptr + group.to(tl.int64) * (most_blocks + 1) + block + 1, place + keep)


@triton.jit(do_not_specialize=["num_tokens", "capacity"])
def dropped_kernel(
    score_ptr,
    ids_ptr,
    count_ptr,
    far_end_ptr,
    part_ptr,
    num_tokens,
    capacity,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Importance of one part of a far region, without that of one part of what is listed. Grid: ``(SPLITS, B * Hkv)``.

    ``score_ptr`` [B * Hkv, num_tokens] begins after the sinks.
    """
    split = tl.program_id(0)
    group = tl.program_id(1)
    count = tl.load(count_ptr + group)
    tokens = tl.where(count > 0, tl.minimum(tl.load(far_end_ptr + group) - SINKS, num_tokens), 0)
    listed = tl.where(count > 0, count - SINKS, 0)
    scores = score_ptr + group.to(tl.int64) * num_tokens
    ids = ids_ptr + group.to(tl.int64) * capacity + SINKS
    left_out = tl.zeros([BLOCK_E], tl.float32)
    for first in range(split * BLOCK_E, tokens, SPLITS * BLOCK_E):
        token = first + tl.arange(0, BLOCK_E)
        left_out += tl.load(scores + token, mask=token < tokens, other=0.0)
    for first in range(split * BLOCK_E, listed, SPLITS * BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        token = tl.load(ids + entry, mask=entry < listed, other=0) - SINKS
        left_out -= tl.load(scores + token, mask=(entry < listed) & (token < num_tokens), other=0.0)
    tl.store(part_ptr + group * SPLITS + split, tl.sum(left_out, 0))
