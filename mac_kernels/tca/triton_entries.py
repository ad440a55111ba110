"""Name the rows that every kv head reads, for attention that takes a page table of single tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import position_of
from .triton import far_set_of


@triton.jit(do_not_specialize=["capacity"])
def entries_kernel(
    begin_ptr,
    page_ptr,
    length_ptr,
    ids_ptr,
    count_ptr,
    far_end_ptr,
    sets_ptr,
    first_ptr,
    entry_ptr,
    capacity,
    page_units,
    token_units,
    head_units,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """List one kv group's far tokens, then its window, from ``first_ptr`` on. Grid: ``(cdiv(most, BLOCK_E), B * Hkv)``.

    A row's number is its distance from the first one in units that divide all strides of the cache.
    """
    group = tl.program_id(1)
    newest, first_page = position_of(group // NUM_KV_HEADS, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    far_set, has_far = far_set_of(group, group >= 0, sets_ptr, NUM_KV_HEADS)
    count = tl.load(count_ptr + far_set, mask=has_far, other=0)
    window = tl.load(far_end_ptr + far_set, mask=has_far, other=0)
    entry = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = entry < count + newest + 1 - window
    listed = tl.load(ids_ptr + far_set.to(tl.int64) * capacity + entry, mask=entry < count, other=0)
    position = tl.where(entry < count, listed, entry - count + window)
    page = tl.load(page_ptr + first_page + position // PAGE_SIZE, mask=inside, other=0).to(tl.int32)
    row = page * page_units + position % PAGE_SIZE * token_units + group % NUM_KV_HEADS * head_units
    tl.store(entry_ptr + tl.load(first_ptr + group).to(tl.int64) + entry, row, mask=inside)
