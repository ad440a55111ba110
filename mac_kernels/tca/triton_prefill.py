"""Sparse prefill on the GPU: gather what is read into one contiguous run per kv head, then attend to it in tiles.

A query tile reads a prefix of the far tokens and its own dense window. Both lie in one compact buffer, so that tensor
descriptors load them whatever the pages look like: the copy is read hundreds of times and costs less than one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..device import position_of, scale_of
from .triton import far_blocks, kv_lengths, log2_weights


@triton.jit(do_not_specialize=["capacity", "far_rows", "rows"])
def gather_kernel(
    k_ptr,
    v_ptr,
    stride_kp,
    stride_kt,
    stride_kh,
    stride_vp,
    stride_vt,
    stride_vh,
    begin_ptr,
    page_ptr,
    length_ptr,
    qo_indptr_ptr,
    ids_ptr,
    count_ptr,
    compact_k_ptr,
    compact_v_ptr,
    capacity,
    far_rows,
    rows,
    SINKS: tl.constexpr,
    KEEP_BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Copy ``BLOCK_R`` rows of one kv head: far tokens, then positions. Grid: ``(rows // BLOCK_R, B * Hkv)``.

    Rows that a tile may touch beside what it sees are zero, all others beyond the far tokens and the request, and
    positions that no query's window holds, stay unwritten.
    """
    first = tl.program_id(0) * BLOCK_R
    group = tl.program_id(1)
    request = group // NUM_KV_HEADS
    kv_head = group % NUM_KV_HEADS
    newest, first_page = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    count = tl.load(count_ptr + group)
    queries = tl.load(qo_indptr_ptr + request + 1) - tl.load(qo_indptr_ptr + request)
    blocks = tl.where(count > 0, far_blocks(newest + 1 - queries, SINKS, KEEP_BLOCK, LOCAL), 0)
    window = tl.where(blocks > 0, SINKS + blocks * KEEP_BLOCK, 0)
    is_far = first < far_rows  # far_rows is a multiple of BLOCK_R
    stop = tl.where(is_far, count, newest + 1)
    begin = tl.where(is_far, 0, window)
    at = first - tl.where(is_far, 0, far_rows)
    if (queries > 0) & (at + BLOCK_R > begin) & (at < stop + BLOCK_R):
        entry = at + tl.arange(0, BLOCK_R)
        offs_d = tl.arange(0, BLOCK_D)
        inside = entry < stop
        listed = tl.load(ids_ptr + group.to(tl.int64) * capacity + entry, mask=inside & is_far, other=0)
        position = tl.where(is_far, listed, entry)
        page = tl.load(page_ptr + first_page + position // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        slot = (position % PAGE_SIZE).to(tl.int64)
        mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
        from_k = k_ptr + kv_head.to(tl.int64) * stride_kh + (page * stride_kp + slot * stride_kt)[:, None]
        from_v = v_ptr + kv_head.to(tl.int64) * stride_vh + (page * stride_vp + slot * stride_vt)[:, None]
        to = (group.to(tl.int64) * rows + first + tl.arange(0, BLOCK_R))[:, None] * BLOCK_D + offs_d[None, :]
        k = tl.load(from_k + offs_d[None, :], mask=mask, other=0.0)
        v = tl.load(from_v + offs_d[None, :], mask=mask, other=0.0)
        tl.store(compact_k_ptr + to, k.to(compact_k_ptr.dtype.element_ty))
        tl.store(compact_v_ptr + to, v.to(compact_v_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["num_requests", "num_tiles"])
def deal_kernel(
    qo_indptr_ptr,
    begin_ptr,
    length_ptr,
    tile_ptr,
    num_requests,
    num_tiles,
    SINKS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Note the request of every tile, -1 beyond the last, and its first position. Grid: ``(cdiv(tiles, BLOCK_T),)``.

    Tiles lie on the grid of the blocks, which begins at the sinks, so that all queries of one see the same far tokens.
    A request's longest tiles come first.
    """
    shift: tl.constexpr = (BLOCK_M - SINKS % BLOCK_M) % BLOCK_M
    requests = tl.arange(0, BLOCK_B)
    known = requests < num_requests
    begin = tl.load(qo_indptr_ptr + requests, mask=known, other=0)
    queries = tl.load(qo_indptr_ptr + requests + 1, mask=known, other=0) - begin
    length = kv_lengths(requests, known, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    last = (length - 1 + shift) // BLOCK_M
    tiles = tl.where(queries > 0, last - (length - queries + shift) // BLOCK_M + 1, 0)
    ends = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    request = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    own = requests[None, :] == request[:, None]
    index = tl.sum(tl.where(own, (last + ends - tiles)[None, :] - tile[:, None], 0), 1)
    to = tile_ptr + tile.to(tl.int64) * 2
    tl.store(to, tl.where(request < num_requests, request, -1), mask=tile < num_tiles)
    tl.store(to + 1, index * BLOCK_M - shift, mask=tile < num_tiles)


@triton.jit
def fold_rows(
    q,  # [BLOCK_M, BLOCK_D]
    row_max,  # of the logits in base 2, as row_sum and acc [BLOCK_M, BLOCK_D] are of their weights
    row_sum,
    acc,
    k,  # [BLOCK_N, BLOCK_D]
    v,
    last,  # [BLOCK_M] the last of the keys that a row sees
    logit_scale,
    soft_cap,
    BLOCK_N: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold a tile of keys and values into a running state; without ``MASKED`` every row sees all of them."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scale = logit_scale
    if SOFT_CAP:
        logits = log2_weights(logits, logit_scale, soft_cap, SOFT_CAP)
        scale = 1.0
    if MASKED:
        logits = tl.where(tl.arange(0, BLOCK_N)[None, :] <= last[:, None], logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale)
    weight = tl.exp2(logits * scale - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weight, 1)
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return new_max, row_sum, acc


@triton.jit(do_not_specialize=["num_prefixes", "far_rows", "rows"])
def prefill_kernel(
    q_ptr,
    stride_qn,
    stride_qh,
    k_desc,
    v_desc,
    qo_indptr_ptr,
    begin_ptr,
    length_ptr,
    tile_ptr,
    count_ptr,
    prefix_ptr,
    out_ptr,
    lse_ptr,
    num_prefixes,
    far_rows,
    rows,
    logit_scale,
    soft_cap,
    k_scale,
    v_scale,
    SINKS: tl.constexpr,
    KEEP_BLOCK: tl.constexpr,
    LOCAL: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    SCALES_ON_DEVICE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Attend with one tile of queries of one head. Grid: ``(tiles * Hq,)``, the heads of a tile side by side.

    One loop runs over the tiles that all queries see in full, of the far tokens and then of the window; another one,
    which masks, over what is left of both.
    """
    pid = tl.program_id(0)
    head = pid % NUM_QO_HEADS
    request = tl.load(tile_ptr + pid // NUM_QO_HEADS * 2)
    first = tl.load(tile_ptr + pid // NUM_QO_HEADS * 2 + 1)
    given = request >= 0
    request = tl.maximum(request, 0)
    newest, _ = position_of(request, begin_ptr, length_ptr, PAGE_SIZE, ROW_STRIDE)
    position = first + tl.arange(0, BLOCK_M)
    index = tl.load(qo_indptr_ptr + request + 1) - 1 - newest + position  # among the queries of all requests
    mask_m = given & (position <= newest) & (index >= tl.load(qo_indptr_ptr + request))
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    q_rows = q_ptr + index.to(tl.int64)[:, None] * stride_qn + head * stride_qh
    q = tl.load(q_rows + offs_d[None, :], mask=mask, other=0.0)

    group = request * (NUM_QO_HEADS // GROUP) + head // GROUP
    blocks = tl.where(tl.load(count_ptr + group) > 0, far_blocks(first, SINKS, KEEP_BLOCK, LOCAL), 0)
    far = tl.load(prefix_ptr + group.to(tl.int64) * num_prefixes + blocks)
    window = tl.where(blocks > 0, SINKS + blocks * KEEP_BLOCK, 0)
    far_whole = far // BLOCK_N
    window_whole = tl.maximum(first + 1 - window, 0) // BLOCK_N  # a tile may begin before the first token
    whole = tl.where(given, far_whole + window_whole, 0)
    far_rest = tl.cdiv(far, BLOCK_N) - far_whole
    window_rest = tl.cdiv(tl.minimum(first + BLOCK_M, newest + 1) - window, BLOCK_N) - window_whole
    rest = tl.where(given, far_rest + window_rest, 0)
    seen = tl.maximum(position, 0) - window
    from_far = group * rows
    from_window = from_far + far_rows + window
    logit_scale *= scale_of(k_scale, SCALES_ON_DEVICE)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in tl.range(0, whole, num_stages=STAGES):
        row = tl.where(tile < far_whole, from_far, from_window - far_whole * BLOCK_N) + tile * BLOCK_N
        row_max, row_sum, acc = fold_rows(
            q, row_max, row_sum, acc, k_desc.load([row, 0]), v_desc.load([row, 0]), seen, logit_scale, soft_cap,
            BLOCK_N, SOFT_CAP, PRECISION, False,
        )  # fmt: skip
    for tile in tl.range(0, rest, num_stages=1):
        is_far = tile < far_rest
        start = tl.where(is_far, far_whole, window_whole + tile - far_rest) * BLOCK_N
        row = tl.where(is_far, from_far, from_window) + start
        last = tl.where(is_far, far - 1, seen) - start
        row_max, row_sum, acc = fold_rows(
            q, row_max, row_sum, acc, k_desc.load([row, 0]), v_desc.load([row, 0]), last, logit_scale, soft_cap,
            BLOCK_N, SOFT_CAP, PRECISION, True,
        )  # fmt: skip

    out = acc * (scale_of(v_scale, SCALES_ON_DEVICE) / row_sum)[:, None]
    at = index.to(tl.int64) * NUM_QO_HEADS + head
    to = out_ptr + at[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(to, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + at, tl.log2(row_sum) + row_max, mask=mask_m)
