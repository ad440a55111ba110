"""Cut what the kv groups must read into chunks, on the device, after it is known what every group reads.

FlashInfer cuts keys on the host, for full lengths. When nearly all groups turn out to be short, the one that is not
would run in a few thread blocks. Here every chunk takes a place in an unsplit call: in some row the place of its kv
head, with a query of its own and a range of the whole page table. The kv heads of a row may belong to different
requests. FlashInfer's own plan is not touched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MIN_CHUNK = 256
"""Tokens: less is not worth a thread block of its own."""
STEP = 64
"""Tokens: chunks are multiples, so that loads stay aligned."""
_WAVES = tl.constexpr(2)


def most_tiles(batch_size: int, num_kv_heads: int, programs: int) -> int:
    """Rows that a call needs room for, when ``programs`` of its thread blocks run at once.

    For every kv head the last chunk of each request and one block per SM, so that a lone miss runs on all of them; with
    fewer than four kv heads two, so that misses of all heads fill two waves. More rows would be empty thread blocks,
    a wave of which takes half a microsecond.
    """
    return batch_size + (programs if num_kv_heads < 4 else programs // 2)


@triton.jit
def chunks_of(length, chunk):
    """Chunks of every group."""
    return (length + chunk - 1) // chunk


@triton.jit
def chunk_size(length, tiles, programs, MIN_CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Tokens per chunk for groups of ``length`` [BLOCK_B, BLOCK_H], when every kv head has ``tiles`` places.

    Short groups take one thread block each. The long ones share a wave of the GPU if that fills it well, otherwise
    two, whose last one may be ragged; and the chunks of every kv head must find room.
    """
    is_long = length > MIN_CHUNK
    num_long = tl.sum(tl.sum(is_long.to(tl.int32), 1), 0)
    per_group = programs // tl.maximum(num_long, 1)
    one_wave = num_long * per_group * 5 >= programs * 4
    budget = tl.where(one_wave, programs, _WAVES * programs)
    budget = tl.maximum(budget, num_long)
    # bounds of the answer that need no search: chunks are never fewer than tokens / chunk, nor one more per group
    of_head = tl.sum(length.to(tl.int64), 0)
    listed = tl.sum((length > 0).to(tl.int32), 0)
    shared = tl.max(of_head // tl.maximum(tiles - listed, 1), 0)
    tokens = tl.sum(tl.sum(tl.where(is_long, length, 0).to(tl.int64), 1), 0)
    enough = tl.minimum(tl.maximum(tokens // tl.maximum(budget - num_long, 1), shared), 1 << 30).to(tl.int32)
    most = chunks_of(tl.max(tl.max(length, 1), 0), STEP)
    lowest = tl.maximum(MIN_CHUNK // STEP, tl.minimum((tokens // (budget * STEP)).to(tl.int32), most))
    highest = tl.maximum(tl.minimum(most, enough // STEP + 1), lowest)
    while lowest < highest:
        middle = (lowest + highest) // 2
        chunks = chunks_of(length, middle * STEP)
        blocks = tl.sum(tl.sum(tl.where(is_long, chunks, 0), 1), 0)
        places = tl.max(tl.sum(chunks, 0), 0)
        fits = (blocks <= budget) & (places <= tiles)
        lowest = tl.where(fits, lowest, middle + 1)
        highest = tl.where(fits, middle, highest)
    return lowest * STEP


@triton.jit
def copy_queries(
    q_ptr,
    stride_qb,
    stride_qh,
    owner,
    taken,
    row_ptr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """For every kv head the query of its owner, ``HEADS_AT_ONCE`` of each group at a time."""
    offs_d = tl.arange(0, BLOCK_D)[None, None, :]
    of_owner = q_ptr + owner.to(tl.int64)[:, None, None] * stride_qb
    for first in range(0, GROUP, HEADS_AT_ONCE):
        head = first + tl.arange(0, HEADS_AT_ONCE)[None, :, None]
        mask = taken[:, None, None] & (head < GROUP) & (offs_d < HEAD_DIM)
        head += tl.arange(0, BLOCK_H)[:, None, None] * GROUP
        query = tl.load(of_owner + head * stride_qh + offs_d, mask=mask, other=0.0)
        tl.store(row_ptr + head * HEAD_DIM + offs_d, query, mask=mask)


@triton.jit
def tiles_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    group_ptr,
    decision_int_ptr,
    parts_ptr,
    entries_begin_ptr,
    tile_q_ptr,
    tile_bounds_ptr,
    tile_start_ptr,
    batch_size,
    tiles,
    num_programs,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: ``(tiles,)``: each program finds the chunk size and writes its own row; the first one, who owns which.

    The chunks of a kv head follow each other, request by request; one with nothing to read has none. Bounds are as in
    :class:`mac_kernels.attend.flashinfer.Ranges`; they and the first tokens count from the beginning of the page table.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    request = tl.arange(0, BLOCK_B)
    head = tl.arange(0, BLOCK_H)
    mask_h = head < NUM_KV_HEADS
    mask = (request < batch_size)[:, None] & mask_h[None, :]
    group = request[:, None] * NUM_KV_HEADS + head[None, :]
    low = tl.load(group_ptr + group * 8, mask=mask, other=0)
    length = tl.maximum(tl.load(group_ptr + group * 8 + 1, mask=mask, other=0) - low, 0)
    chunk = chunk_size(length, tiles, num_programs, MIN_CHUNK, STEP)
    chunks = chunks_of(length, chunk)
    ends = tl.cumsum(chunks, 0)
    if tile == 0:
        tl.store(parts_ptr + group * 2, (ends - chunks) * NUM_KV_HEADS + head[None, :], mask=mask)
        tl.store(parts_ptr + group * 2 + 1, chunks, mask=mask)

    place = tile * NUM_KV_HEADS + head
    before = ends <= tile
    owner = tl.sum(before.to(tl.int32), 0)
    taken = mask_h & (owner < batch_size)
    number = tile - tl.max(tl.where(before, ends, 0), 0)
    own = owner * NUM_KV_HEADS + head
    begin = tl.load(group_ptr + own * 8, mask=taken, other=0) + number * chunk
    stop = tl.load(group_ptr + own * 8 + 1, mask=taken, other=0)
    table = tl.load(entries_begin_ptr + owner, mask=taken, other=0) * PAGE_SIZE
    tl.store(tile_bounds_ptr + place * 4, table + begin, mask=taken)
    high = tl.where(taken, table + tl.minimum(begin + chunk, stop), -1)
    tl.store(tile_bounds_ptr + place * 4 + 1, high, mask=mask_h)
    offs_g = tl.arange(0, BLOCK_G)[None, :]
    mask_g = taken[:, None] & (offs_g < GROUP)
    start = tl.load(decision_int_ptr + own[:, None] * (3 * GROUP) + offs_g, mask=mask_g, other=0)
    tl.store(tile_start_ptr + place[:, None] * GROUP + offs_g, table[:, None] + start, mask=mask_g)
    row = tile_q_ptr + tile.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    copy_queries(
        q_ptr, stride_qb, stride_qh, owner, taken, row, GROUP, HEAD_DIM, BLOCK_D, BLOCK_H, HEADS_AT_ONCE
    )  # fmt: skip
