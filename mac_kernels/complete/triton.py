"""Complete on the GPU: merge the parts of one kv group, write its output and its ring row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def partner_of(offs_d, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The dimension that the rotation mixes into each one, and the sign of sin in the inverse rotation."""
    if INTERLEAVED:
        other = offs_d ^ 1
        sign = tl.where(offs_d % 2 == 0, 1.0, -1.0)
        angle = offs_d // 2
    else:
        half: tl.constexpr = ROTARY_DIM // 2
        other = tl.where(offs_d < half, offs_d + half, offs_d - half)
        sign = tl.where(offs_d < half, 1.0, -1.0)
        angle = offs_d % half
    rotated = offs_d < ROTARY_DIM
    return tl.where(rotated, other, offs_d), sign, tl.where(rotated, angle, 0), rotated


@triton.jit
def rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Per dimension: partner, cos, and signed sin of the transposed rotation (1 and 0 where nothing is rotated)."""
    other, sign, angle, rotated = partner_of(offs_d, ROTARY_DIM, INTERLEAVED)
    row = cos_sin_ptr + tl.maximum(position, 0).to(tl.int64) * ROTARY_DIM  # -1: a request without tokens
    cos = tl.load(row + angle, mask=rotated, other=1.0)
    sin = tl.load(row + ROTARY_DIM // 2 + angle, mask=rotated, other=0.0)
    return other, cos, sin * sign


@triton.jit
def load_unrotated(
    q_ptr,  # first head of the group
    stride_h,
    head,
    offs_d,
    mask,
    other,
    cos,
    sin,
):
    """Queries before RoPE, fp32: the inverse rotation is the transpose over the squared magnitude."""
    x = tl.load(q_ptr + head * stride_h + offs_d, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(q_ptr + head * stride_h + other, mask=mask, other=0.0).to(tl.float32)
    return (x * cos + y * sin) / (cos * cos + sin * sin)


@triton.jit
def quantize_image(image):
    """8-bit codes (as fp32) and scale, as the reference rounds them up to ties."""
    scale = tl.maximum(tl.max(tl.abs(image), 0), 1e-30) / 127.0
    codes = tl.floor(image / scale + 0.5)
    return tl.minimum(tl.maximum(codes, -127.0), 127.0), scale


@triton.jit
def sketch_image(
    q_ptr,
    stride_h,
    cos_sin_ptr,
    position,
    index_ptr,
    sign_ptr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TERMS: tl.constexpr,
    SKETCH_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Signed sums of the group's pre-RoPE queries, [BLOCK_K] fp32."""
    offs_t = tl.arange(0, BLOCK_T)[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask = (offs_t < TERMS) & (offs_k < SKETCH_DIM)
    index = tl.load(index_ptr + offs_t * SKETCH_DIM + offs_k, mask=mask, other=0)
    sign = tl.load(sign_ptr + offs_t * SKETCH_DIM + offs_k, mask=mask, other=0.0)
    dim = index % HEAD_DIM
    other, cos, sin = rotation_at(cos_sin_ptr, position, dim, ROTARY_DIM, INTERLEAVED)
    value = load_unrotated(q_ptr, stride_h, index // HEAD_DIM, dim, mask, other, cos, sin)
    return tl.sum(value * sign, 0)


@triton.jit
def merge_weights(lse_a, lse_b):
    """Weights of two disjoint states and the ``lse2`` of both; two empties give (0, 0, -inf)."""
    top = tl.maximum(lse_a, lse_b)
    safe = tl.where(top == float("-inf"), 0.0, top)
    mass_a = tl.exp2(lse_a - safe)
    mass_b = tl.exp2(lse_b - safe)
    total = mass_a + mass_b
    divisor = tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, tl.log2(divisor) + safe, float("-inf"))
    return mass_a / divisor, mass_b / divisor, lse


@triton.jit
def complete_group(
    group,
    begin_tile,
    total_tiles,
    first_program,
    last_program,
    num_programs,
    part_out_ptr,
    part_key_ptr,
    part_lse_ptr,
    always_out_ptr,
    always_lse_ptr,
    decision_int_ptr,
    decision_float_ptr,
    q_ptr,
    stride_qh,
    out_ptr,
    stride_oh,
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
    kv_head,
    position,
    ring,
    reuse,
    anchor,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
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
    SPLITS: tl.constexpr,
    KBAR: tl.constexpr,
):
    """Merge the parts of ``group``, then write ``out`` and the ring row of ``position``.

    The rest was computed by programs ``first_program .. last_program``; a program keeps its first group's part in slot
    ``2 p`` and any later one in slot ``2 p + 1``.
    """
    head = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    other, cos, sin = rotation_at(cos_sin_ptr, position, offs_d, ROTARY_DIM, INTERLEAVED)
    tile = head[:, None] * HEAD_DIM + offs_d[None, :]
    tile_other = head[:, None] * HEAD_DIM + other[None, :]

    # the reused state comes first; it is empty on a miss
    row = tl.load(decision_int_ptr + group * (3 * GROUP) + GROUP + head, mask=mask_h, other=0)
    lse = tl.load(decision_float_ptr + group * (3 * GROUP) + head, mask=mask_h & reuse, other=float("-inf"))
    qo_head = kv_head * GROUP + head
    stored = (ring.to(tl.int64) * WINDOW + row) * NUM_QO_HEADS + qo_head
    mask_reuse = mask & reuse
    out = tl.load(ring_out_ptr + stored[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_reuse, other=0.0).to(
        tl.float32
    )
    key = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if KBAR:
        key = tl.load(ring_key_ptr + stored[:, None] * HEAD_DIM + offs_d[None, :], mask=mask_reuse, other=0.0)
        key = key.to(tl.float32)

    for program in range(first_program, last_program + 1):
        # the group is the program's first one if the program's run of tiles begins inside it
        run_begin = (total_tiles.to(tl.int64) * program // num_programs).to(tl.int32)
        slot = tl.where(run_begin >= begin_tile, 2 * program, 2 * program + 1)
        part_lse = tl.load(part_lse_ptr + slot * GROUP + head, mask=mask_h, other=float("-inf"), cache_modifier=".cg")
        base = slot.to(tl.int64) * (GROUP * HEAD_DIM)
        part = tl.load(part_out_ptr + base + tile, mask=mask, other=0.0, cache_modifier=".cg")
        weight_a, weight_b, lse = merge_weights(lse, part_lse)
        out = out * weight_a[:, None] + part * weight_b[:, None]
        if KBAR:
            direct = tl.load(part_key_ptr + base + tile, mask=mask, other=0.0, cache_modifier=".cg")
            crossed = tl.load(part_key_ptr + base + tile_other, mask=mask, other=0.0, cache_modifier=".cg")
            pulled = direct * cos[None, :] + crossed * sin[None, :]
            key = key * weight_a[:, None] + pulled * weight_b[:, None]

    if ring >= 0:
        slot_row = position % WINDOW
        at_row = (ring.to(tl.int64) * WINDOW + slot_row) * NUM_QO_HEADS + kv_head * GROUP
        q_pre = load_unrotated(
            q_ptr, stride_qh, head[:, None], offs_d[None, :], mask, other[None, :], cos[None, :], sin[None, :]
        )
        tl.store(ring_q_ptr + at_row * HEAD_DIM + tile, q_pre.to(ring_q_ptr.dtype.element_ty), mask=mask)
        tl.store(ring_out_ptr + at_row * HEAD_DIM + tile, out.to(ring_out_ptr.dtype.element_ty), mask=mask)
        if KBAR:
            tl.store(ring_key_ptr + at_row * HEAD_DIM + tile, key.to(ring_key_ptr.dtype.element_ty), mask=mask)
        tl.store(ring_lse_ptr + at_row + head, lse, mask=mask_h)
        image = sketch_image(
            q_ptr, stride_qh, cos_sin_ptr, position, sketch_index_ptr, sketch_sign_ptr,
            HEAD_DIM, ROTARY_DIM, INTERLEAVED, TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        codes, scale = quantize_image(image)
        at_sketch = (ring.to(tl.int64) * WINDOW + slot_row) * NUM_KV_HEADS + kv_head
        offs_k = tl.arange(0, BLOCK_K)
        tl.store(ring_sketch_ptr + at_sketch * SKETCH_DIM + offs_k, codes.to(tl.int8), mask=offs_k < SKETCH_DIM)
        tl.store(ring_scale_ptr + at_sketch, scale)
        tl.store(ring_anchor_ptr + at_sketch, anchor)
        tl.store(ring_pos_ptr + ring.to(tl.int64) * WINDOW + slot_row, position)

    for split in tl.static_range(SPLITS):
        at = (group * SPLITS + split).to(tl.int64)
        part_lse = tl.load(always_lse_ptr + at * GROUP + head, mask=mask_h, other=float("-inf"))
        part = tl.load(always_out_ptr + at * (GROUP * HEAD_DIM) + tile, mask=mask, other=0.0)
        weight_a, weight_b, lse = merge_weights(lse, part_lse)
        out = out * weight_a[:, None] + part * weight_b[:, None]
    tl.store(out_ptr + head[:, None] * stride_oh + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
