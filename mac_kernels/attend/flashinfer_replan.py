"""Deal FlashInfer's tiles out anew on the device, after it is known what every kv group reads.

FlashInfer cuts the keys into tiles on the host, for full lengths. When nearly all groups turn out to be short, the one
that is not would run in a few thread blocks. The kernel below rewrites the tile lists where FlashInfer keeps them, in
private buffers whose layout is checked before use: ``PrefillPlanInfo`` in ``attention/scheduler.cuh``, read in
flashinfer-python 0.6.15.post1 and 0.7.0. With any other layout the host's plan stays, right but slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

VERSIONS = ((0, 6, 15), (0, 8))
"""From, and before: releases whose plan buffers are known."""
_TILE_ROWS = 16
_MIN_CHUNK = 256  # tokens: less is not worth a thread block of its own
_STEP = 64  # tokens: chunks are multiples, so that loads stay aligned
_BLOCK_TILES = 64  # entries of the lists that a program writes


class _PlanInfo(NamedTuple):
    padded_batch_size: int
    total_num_rows: int
    total_num_rows_offset: int
    cta_tile_q: int
    request_indices_offset: int
    qo_tile_indices_offset: int
    kv_tile_indices_offset: int
    merge_indptr_offset: int
    o_indptr_offset: int
    kv_chunk_size_ptr_offset: int
    v_offset: int
    s_offset: int
    block_valid_mask_offset: int
    enable_cuda_graph: int
    split_kv: int


@dataclass(frozen=True, slots=True)
class PlanBuffers:
    """FlashInfer's tile lists: int32 views of one plan, ``valid`` uint8.

    ``request``, ``qo_tile``, ``kv_tile``, ``valid`` [T]; ``o_indptr``, ``merge_indptr`` [B + 1]; ``chunk`` [1].
    """

    request: torch.Tensor
    qo_tile: torch.Tensor
    kv_tile: torch.Tensor
    valid: torch.Tensor
    o_indptr: torch.Tensor
    merge_indptr: torch.Tensor
    chunk: torch.Tensor

    @property
    def tiles(self) -> int:
        """Tiles ``T`` that the grid has room for, per kv head."""
        return self.request.numel()


def locate_plan_buffers(wrapper: Any, batch_size: int, version: tuple[int, ...]) -> PlanBuffers | None:
    """The tile lists of a planned decode wrapper; ``None`` if its version or its layout is not the known one."""
    if not VERSIONS[0] <= version < VERSIONS[1]:
        return None
    info = parse_plan_info(getattr(wrapper, "_plan_info", ()), batch_size)
    workspace = getattr(wrapper, "_int_workspace_buffer", None)
    if info is None or workspace is None:
        return None

    def ints(offset: int, count: int) -> torch.Tensor:
        view: torch.Tensor = workspace[offset : offset + 4 * count].view(torch.int32)
        return view

    tiles, rows = info.padded_batch_size, batch_size + 1
    return PlanBuffers(
        request=ints(info.request_indices_offset, tiles),
        qo_tile=ints(info.qo_tile_indices_offset, tiles),
        kv_tile=ints(info.kv_tile_indices_offset, tiles),
        valid=workspace[info.block_valid_mask_offset : info.block_valid_mask_offset + tiles],
        o_indptr=ints(info.o_indptr_offset, rows),
        merge_indptr=ints(info.merge_indptr_offset, rows),
        chunk=ints(info.kv_chunk_size_ptr_offset, 1),
    )


def parse_plan_info(values: Sequence[int], batch_size: int) -> _PlanInfo | None:
    """Name the numbers of a plan; ``None`` unless every buffer lies where the known planner puts it."""
    values = [int(value) for value in values]
    if len(values) != len(_PlanInfo._fields):
        return None
    info = _PlanInfo(*values)
    tiles, rows = 4 * info.padded_batch_size, 4 * (batch_size + 1)
    request = 0
    qo_tile = _aligned(request + tiles)
    kv_tile = _aligned(qo_tile + tiles)
    o_indptr = _aligned(kv_tile + tiles)
    chunk = o_indptr + rows
    total_num_rows = _aligned(chunk + 4)
    merge_indptr = _aligned(total_num_rows + 4)
    expected = info._replace(
        total_num_rows=batch_size,
        cta_tile_q=_TILE_ROWS,
        request_indices_offset=request,
        qo_tile_indices_offset=qo_tile,
        kv_tile_indices_offset=kv_tile,
        o_indptr_offset=o_indptr,
        kv_chunk_size_ptr_offset=chunk,
        total_num_rows_offset=total_num_rows,
        merge_indptr_offset=merge_indptr,
        block_valid_mask_offset=_aligned(merge_indptr + rows),
        v_offset=0,
        enable_cuda_graph=1,
        split_kv=1,
    )
    return info if info == expected and info.padded_batch_size >= batch_size else None


def _aligned(offset: int) -> int:
    return -(-offset // 16) * 16


def replan(
    buffers: PlanBuffers,
    group_bounds: torch.Tensor,
    *,
    batch_size: int,
    num_kv_heads: int,
    programs: int,
    pdl: bool = False,
) -> None:
    """Deal the tiles out for ``group_bounds`` [B * Hkv, ...] int32, whose rows begin with first token and end.

    ``programs``: thread blocks that the GPU runs at once; ``pdl``: launch early and wait on the device. No sync.
    """
    replan_kernel[(-(-buffers.tiles // _BLOCK_TILES),)](
        group_bounds, group_bounds.stride(0),
        buffers.request, buffers.qo_tile, buffers.kv_tile, buffers.valid,
        buffers.o_indptr, buffers.merge_indptr, buffers.chunk,
        batch_size, buffers.tiles, programs,
        NUM_KV_HEADS=num_kv_heads, MIN_CHUNK=_MIN_CHUNK, STEP=_STEP,
        BLOCK_B=triton.next_power_of_2(batch_size), BLOCK_H=triton.next_power_of_2(num_kv_heads),
        BLOCK_T=_BLOCK_TILES, PDL=pdl, num_warps=4, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip


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
def replan_kernel(
    bounds_ptr,
    stride_bounds,
    request_ptr,
    qo_tile_ptr,
    kv_tile_ptr,
    valid_ptr,
    o_indptr_ptr,
    merge_indptr_ptr,
    chunk_ptr,
    batch_size,
    tiles,
    programs,
    NUM_KV_HEADS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: ``(ceil(tiles / BLOCK_T),)``: each program finds the chunk size and writes its share of the lists.

    A request with nothing to read gets no tile; FlashInfer's merge then gives the empty state.
    """
    if PDL:
        gdc_wait()
    program = tl.program_id(0)
    request = tl.arange(0, BLOCK_B)
    head = tl.arange(0, BLOCK_H)
    known = request < batch_size
    mask = known[:, None] & (head < NUM_KV_HEADS)[None, :]
    at = bounds_ptr + (request[:, None] * NUM_KV_HEADS + head[None, :]) * stride_bounds
    length = tl.maximum(tl.load(at + 1, mask=mask, other=0) - tl.load(at, mask=mask, other=0), 0)
    chunk = chunk_size(length, tiles, programs, MIN_CHUNK, STEP)
    ends = tl.cumsum(tl.max(chunks_of(length, chunk), 1), 0)
    total = tl.max(ends, 0)
    if program == 0:
        tl.store(chunk_ptr, chunk)
        tl.store(o_indptr_ptr, 0)
        tl.store(merge_indptr_ptr, 0)
        tl.store(o_indptr_ptr + 1 + request, ends, mask=known)
        tl.store(merge_indptr_ptr + 1 + request, ends, mask=known)
    tile = program * BLOCK_T + tl.arange(0, BLOCK_T)
    before = ends[None, :] <= tile[:, None]
    owner = tl.sum(before.to(tl.int32), 1)
    begin = tl.max(tl.where(before, ends[None, :], 0), 1)
    used = tile < total
    inside = tile < tiles
    tl.store(request_ptr + tile, tl.where(used, owner, 0), mask=inside)
    tl.store(kv_tile_ptr + tile, tl.where(used, tile - begin, 0), mask=inside)
    tl.store(qo_tile_ptr + tile, 0, mask=inside)
    tl.store(valid_ptr + tile, used.to(tl.uint8), mask=inside)
