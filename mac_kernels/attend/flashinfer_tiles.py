"""Cut what the kv groups must read into chunks, on the device, after it is known what every group reads.

FlashInfer cuts keys on the host, for full lengths. When nearly all groups turn out to be short, the one that is not
would run in a few thread blocks. Here every chunk becomes a row of an unsplit call: a query of its own, a place in the
page table, a range for each kv head. FlashInfer's own plan is not touched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MIN_CHUNK = 256
"""Tokens: less is not worth a thread block of its own."""
STEP = 64
"""Tokens: chunks are multiples, so that loads stay aligned."""


def most_tiles(batch_size: int, programs: int) -> int:
    """Rows that a call needs room for: all thread blocks that run at once for one kv head, and each request's last."""
    return programs + batch_size


@triton.jit
def chunks_of(length, chunk):
    """Chunks of every group."""
    return (length + chunk - 1) // chunk


@triton.jit
def chunk_size(length, tiles, programs, MIN_CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Tokens per chunk for groups of ``length`` [BLOCK_B, BLOCK_H]: a chunk number is a tile of all heads of a request.

    Short groups take one thread block each. The long ones share a wave of the GPU if that fills it well, otherwise
    four, whose last one may be ragged; and all chunks must find room in the list.
    """
    is_long = length > MIN_CHUNK
    num_long = tl.sum(tl.sum(is_long.to(tl.int32), 1), 0)
    per_group = programs // tl.maximum(num_long, 1)
    one_wave = num_long * per_group * 5 >= programs * 4
    budget = tl.where(one_wave, programs, 4 * programs)
    budget = tl.maximum(budget, num_long)
    # bounds of the answer that need no search: chunks are never fewer than tokens / chunk, nor one more per group
    tokens = tl.sum(tl.sum(tl.where(is_long, length, 0).to(tl.int64), 1), 0)
    longest = tl.max(length, 1)
    listed = tl.sum((longest > 0).to(tl.int32), 0)
    shared = tl.sum(longest.to(tl.int64), 0) // tl.maximum(tiles - listed, 1)
    enough = tl.minimum(tl.maximum(tokens // tl.maximum(budget - num_long, 1), shared), 1 << 30).to(tl.int32)
    most = chunks_of(tl.max(longest, 0), STEP)
    lowest = tl.maximum(MIN_CHUNK // STEP, tl.minimum((tokens // (budget * STEP)).to(tl.int32), most))
    highest = tl.maximum(tl.minimum(most, enough // STEP + 1), lowest)
    while lowest < highest:
        middle = (lowest + highest) // 2
        chunks = chunks_of(length, middle * STEP)
        blocks = tl.sum(tl.sum(tl.where(is_long, chunks, 0), 1), 0)
        slots = tl.sum(tl.max(chunks, 1), 0)
        fits = (blocks <= budget) & (slots <= tiles)
        lowest = tl.where(fits, lowest, middle + 1)
        highest = tl.where(fits, middle, highest)
    return lowest * STEP


@triton.jit
def copy_tile_query(
    q_ptr, stride_qh, row_ptr, NUM_QO_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """All heads of a request's query, 16 at a time."""
    offs_d = tl.arange(0, BLOCK_D)
    for first in range(0, NUM_QO_HEADS, 16):
        head = first + tl.arange(0, 16)
        mask = (head < NUM_QO_HEADS)[:, None] & (offs_d < HEAD_DIM)[None, :]
        query = tl.load(q_ptr + head[:, None] * stride_qh + offs_d[None, :], mask=mask, other=0.0)
        tl.store(row_ptr + head[:, None] * HEAD_DIM + offs_d[None, :], query, mask=mask)


@triton.jit
def tiles_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    group_ptr,
    parts_ptr,
    entries_begin_ptr,
    tile_q_ptr,
    tile_begin_ptr,
    tile_bounds_ptr,
    batch_size,
    tiles,
    num_programs,
    NUM_QO_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: ``(tiles,)``: each program finds the chunk size and writes its own row; the first one, who owns which.

    A request with nothing to read gets no row. Bounds are as in :class:`mac_kernels.attend.flashinfer.Ranges`.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile = tl.program_id(0)
    request = tl.arange(0, BLOCK_B)
    head = tl.arange(0, BLOCK_H)
    known = request < batch_size
    mask_h = head < NUM_KV_HEADS
    mask = known[:, None] & mask_h[None, :]
    group = request[:, None] * NUM_KV_HEADS + head[None, :]
    low = tl.load(group_ptr + group * 8, mask=mask, other=0)
    length = tl.maximum(tl.load(group_ptr + group * 8 + 1, mask=mask, other=0) - low, 0)
    chunk = chunk_size(length, tiles, num_programs, MIN_CHUNK, STEP)
    chunks = chunks_of(length, chunk)
    of_request = tl.max(chunks, 1)
    ends = tl.cumsum(of_request, 0)
    if tile == 0:
        first = (ends - of_request)[:, None] * NUM_KV_HEADS + head[None, :]
        tl.store(parts_ptr + group * 2, first, mask=mask)
        tl.store(parts_ptr + group * 2 + 1, chunks, mask=mask)

    bounds = tile_bounds_ptr + (tile * NUM_KV_HEADS + head) * 4
    if tile < tl.max(ends, 0):
        before = ends <= tile
        owner = tl.sum(before.to(tl.int32), 0)
        number = tile - tl.max(tl.where(before, ends, 0), 0)
        own = owner * NUM_KV_HEADS + head
        begin = tl.load(group_ptr + own * 8, mask=mask_h, other=0)
        stop = tl.load(group_ptr + own * 8 + 1, mask=mask_h, other=0)
        begin += number * chunk
        tl.store(bounds, begin, mask=mask_h)
        tl.store(bounds + 1, tl.where(begin < stop, tl.minimum(begin + chunk, stop), -1), mask=mask_h)
        tl.store(bounds + 2, own, mask=mask_h)
        tl.store(tile_begin_ptr + tile, tl.load(entries_begin_ptr + owner))
        copy_tile_query(
            q_ptr + owner.to(tl.int64) * stride_qb, stride_qh,
            tile_q_ptr + tile.to(tl.int64) * (NUM_QO_HEADS * HEAD_DIM), NUM_QO_HEADS, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    else:
        tl.store(bounds + 1, -1, mask=mask_h)
