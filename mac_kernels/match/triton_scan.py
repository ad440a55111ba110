"""Match for the FlashInfer backend, first launch: scan the ring, and list the tokens that are attended in any case."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..device import position_of, ring_of, rows_to_search
from .triton import scan_sketch


@triton.jit
def list_always(
    request,
    position,
    first_page,
    batch_size,
    page_ptr,
    entry_ptr,
    bounds_ptr,
    begin_ptr,
    page_units,
    BAND: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Token slots of a request's sinks and band, in one list of its own, and what each of ``SPLITS`` rows reads of it.

    A slot counts token strides of the cache, of which a page has ``page_units``. Row ``split * B + request``.
    """
    most: tl.constexpr = BAND + SINKS
    share: tl.constexpr = (most + SPLITS - 1) // SPLITS
    stop = tl.maximum(position + 1 - BAND, SINKS)
    count = tl.minimum(SINKS, position + 1) + tl.maximum(position + 1 - stop, 0)
    entry = tl.arange(0, BLOCK_E)
    at = tl.where(entry < SINKS, entry, entry + stop - SINKS)
    page = tl.load(page_ptr + first_page + at // PAGE_SIZE, mask=entry < count, other=0)
    slot = tl.where(entry < count, page * page_units + at % PAGE_SIZE, 0)
    tl.store(entry_ptr + request * most + entry, slot, mask=entry < most)
    head = tl.arange(0, BLOCK_H)
    for split in range(SPLITS):
        low = tl.minimum(split * share, count)
        bounds = bounds_ptr + ((split * batch_size + request) * NUM_KV_HEADS + head) * 4
        tl.store(bounds, low, mask=head < NUM_KV_HEADS)
        tl.store(bounds + 1, tl.minimum(low + share, count), mask=head < NUM_KV_HEADS)
    tl.store(begin_ptr + request, first_page.to(tl.int32))


@triton.jit
def copy_query(
    q_group,
    stride_qh,
    request,
    kv_head,
    batch_size,
    rows_ptr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A group's query for the row of every split."""
    head = tl.arange(0, BLOCK_G)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < GROUP) & (offs_d < HEAD_DIM)
    query = tl.load(q_group + head * stride_qh + offs_d, mask=mask, other=0.0)
    for split in range(SPLITS):
        group = (split * batch_size + request).to(tl.int64) * NUM_KV_HEADS + kv_head
        tl.store(rows_ptr + (group * GROUP + head) * HEAD_DIM + offs_d, query, mask=mask)


@triton.jit
def scan_kernel(
    q_ptr,
    stride_qb,
    stride_qh,
    slots_ptr,
    generations_ptr,
    begin_ptr,
    page_ptr,
    length_ptr,
    slot_table_ptr,
    ring_generation_ptr,
    num_slots,
    ring_q_ptr,
    ring_pos_ptr,
    ring_sketch_ptr,
    ring_scale_ptr,
    sketch_index_ptr,
    sketch_sign_ptr,
    cos_sin_ptr,
    scan_ptr,
    bypass_ptr,
    batch_size,
    entry_ptr,
    always_q_ptr,
    always_bounds_ptr,
    entries_begin_ptr,
    page_units,
    BAND: tl.constexpr,
    SINKS: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
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
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCAN_SPLITS: tl.constexpr,
    APART: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BYPASS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scan the ring of every kv group, prepare the rows of sinks and band, store the query and its sketch.

    Grid: ``(B * Hkv * SCAN_SPLITS,)``, the first program of a group does all three; with ``APART`` the last two have
    programs of their own behind those that scan, ``(B * Hkv * (SCAN_SPLITS + 2),)``: quicker, where SMs are idle.
    """
    pid = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    programs: tl.constexpr = SCAN_SPLITS + 2 if APART else SCAN_SPLITS
    group = pid // programs
    split = pid % programs
    lists = split == (SCAN_SPLITS if APART else 0)
    stores = split == (SCAN_SPLITS + 1 if APART else 0)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    position, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    q_group = q_ptr + request.to(tl.int64) * stride_qb + kv_head * GROUP * stride_qh
    if lists:
        if kv_head == 0:
            list_always(
                request, position, first_page, batch_size, page_ptr, entry_ptr, always_bounds_ptr, entries_begin_ptr,
                page_units, BAND, SINKS, SPLITS, BLOCK_E, NUM_KV_HEADS, BLOCK_H, PAGE_SIZE,
            )  # fmt: skip
        copy_query(
            q_group, stride_qh, request, kv_head, batch_size, always_q_ptr,
            NUM_KV_HEADS, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, SPLITS,
        )  # fmt: skip
    if not (APART and lists):
        ring, owned = ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots)
        rows = tl.where(ring >= 0, rows_to_search(bypass_ptr, WINDOW, BYPASS), 0)
        if APART:
            rows = tl.where(stores, 0, rows)
            split = tl.where(stores, 0, split)
        scan_sketch(
            q_group, stride_qh, cos_sin_ptr, position, ring, stores & owned & (position >= 0), rows, kv_head, split,
            ring_q_ptr, ring_pos_ptr, ring_sketch_ptr, ring_scale_ptr, sketch_index_ptr, sketch_sign_ptr,
            scan_ptr + group * WINDOW,
            BAND, SINKS, WINDOW, BLOCK_W, NUM_KV_HEADS, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED,
            TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K, BLOCK_R, SCAN_SPLITS,
        )  # fmt: skip
