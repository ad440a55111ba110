"""What the kernels share: a request's position and ring, its query before RoPE, the sketch of it, scales."""

from __future__ import annotations

import triton
import triton.language as tl

from . import bypass

TRIAL_GROUPS = tl.constexpr(bypass.TRIAL_GROUPS)
PAUSE_STEPS = tl.constexpr(bypass.PAUSE_STEPS)


@triton.jit
def first_entry(request, begin_ptr, ROW_STRIDE: tl.constexpr):
    """Where a request's pages begin, 64 bit: ``begin_ptr`` holds running counts, or rows of ``ROW_STRIDE`` entries."""
    begin = tl.load(begin_ptr + request).to(tl.int64)
    if ROW_STRIDE > 0:
        begin *= ROW_STRIDE
    return begin


@triton.jit
def position_of(request, begin_ptr, length_ptr, PAGE_SIZE: tl.constexpr, ROW_STRIDE: tl.constexpr):
    """Position of a request's newest token, -1 if it has none, and where its pages begin.

    ``length_ptr`` holds the tokens of the last page, or with rows those of the request.
    """
    first = first_entry(request, begin_ptr, ROW_STRIDE)
    length = tl.load(length_ptr + request).to(tl.int32)
    if ROW_STRIDE == 0:
        pages = (first_entry(request + 1, begin_ptr, ROW_STRIDE) - first).to(tl.int32)
        length = tl.where(pages > 0, (pages - 1) * PAGE_SIZE + length, 0)
    return length - 1, first


@triton.jit
def scale_of(scale, ON_DEVICE: tl.constexpr):
    """A scale that is given as a number, or as a pointer to one."""
    if ON_DEVICE:
        return tl.load(scale)
    else:
        return scale


@triton.jit
def ring_of(request, slots_ptr, generations_ptr, slot_table_ptr, ring_generation_ptr, num_slots):
    """The slot's ring, -1 if it has none, and whether it belongs to this generation of the request."""
    slot = tl.load(slots_ptr + request)
    ring = tl.load(slot_table_ptr + slot, mask=(slot >= 0) & (slot < num_slots), other=-1)
    generation = tl.load(ring_generation_ptr + ring, mask=ring >= 0, other=-1)
    return ring, (ring >= 0) & (generation == tl.load(generations_ptr + request))


@triton.jit
def selection_of(
    group,
    known,
    group_ptr,
    count_ptr,
    far_end_ptr,
    selected_ptr,
    dropped_ptr,
    refresh,
    limit,
    NUM_KV_HEADS: tl.constexpr,
    SINKS: tl.constexpr,
):
    """What a missed group reads of its rest, by the rule of :meth:`mac_kernels.tca.MissIndex.usable`.

    Returned are ``(selected, listed, window, place)``: the position of the query that selected (-1: the group reads
    everything), the number of listed tokens, where the dense part begins, and the group's place in the index.
    """
    position = tl.load(group_ptr + group * 8 + 2, mask=known, other=0)
    ring = tl.load(group_ptr + group * 8 + 3, mask=known, other=-1)
    reason = tl.load(group_ptr + group * 8 + 6, mask=known, other=0)
    place = tl.maximum(ring, 0) * NUM_KV_HEADS + group % NUM_KV_HEADS
    missed = (ring >= 0) & (reason > 2)  # neither a hit nor without a ring nor a short context
    selected = tl.load(selected_ptr + place, mask=missed, other=-1)
    count = tl.load(count_ptr + place, mask=missed, other=0)
    dropped = tl.load(dropped_ptr + place, mask=missed, other=0.0)
    young = (selected >= 0) & (selected <= position) & (position - selected <= refresh)
    usable = young & (count > 0) & (dropped <= limit)
    window = tl.load(far_end_ptr + place, mask=usable, other=0)
    low = tl.load(group_ptr + group * 8, mask=known, other=0)
    return (
        tl.where(usable, selected, -1), tl.where(usable, count - SINKS, 0), tl.where(usable, window, low), place
    )  # fmt: skip


@triton.jit
def rows_to_search(bypass_ptr, WINDOW: tl.constexpr, BYPASS: tl.constexpr):
    """Rows of the ring that this step looks at: all, or none while the layer's matching is bypassed."""
    if BYPASS:
        return tl.where(tl.load(bypass_ptr + 2) > 0, 0, WINDOW)
    else:
        return WINDOW


@triton.jit
def end_of_step(bypass_ptr, break_even):
    """Judge a layer's hits when all groups of a step are counted: :meth:`mac_kernels.bypass.Bypass.update`."""
    hits = tl.load(bypass_ptr)
    judged = tl.load(bypass_ptr + 1)
    pause = tl.load(bypass_ptr + 2)
    enough = judged >= TRIAL_GROUPS
    poor = enough & (hits.to(tl.float32) < judged.to(tl.float32) * break_even)
    fade = tl.where(enough, 2, 1)
    tl.store(bypass_ptr, tl.where(poor, 0, hits // fade))
    tl.store(bypass_ptr + 1, tl.where(poor, 0, judged // fade))
    tl.store(bypass_ptr + 2, tl.where(poor, PAUSE_STEPS, tl.maximum(pause - 1, 0)))


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
def sketch_terms(
    index_ptr,
    sign_ptr,
    TERMS: tl.constexpr,
    SKETCH_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which query entries a sketch adds up, their signs, and which of [BLOCK_T, BLOCK_K] there are."""
    offs_t = tl.arange(0, BLOCK_T)[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask = (offs_t < TERMS) & (offs_k < SKETCH_DIM)
    index = tl.load(index_ptr + offs_t * SKETCH_DIM + offs_k, mask=mask, other=0)
    sign = tl.load(sign_ptr + offs_t * SKETCH_DIM + offs_k, mask=mask, other=0.0)
    return index, sign, mask


@triton.jit
def image_of(
    q_ptr,
    stride_h,
    cos_sin_ptr,
    position,
    index,
    sign,
    mask,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Signed sums of the group's pre-RoPE queries, [BLOCK_K] fp32."""
    dim = index % HEAD_DIM
    other, cos, sin = rotation_at(cos_sin_ptr, position, dim, ROTARY_DIM, INTERLEAVED)
    value = load_unrotated(q_ptr, stride_h, index // HEAD_DIM, dim, mask, other, cos, sin)
    return tl.sum(value * sign, 0)


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
    """:func:`image_of` where nothing is to be loaded beside it."""
    index, sign, mask = sketch_terms(index_ptr, sign_ptr, TERMS, SKETCH_DIM, BLOCK_T, BLOCK_K)
    return image_of(q_ptr, stride_h, cos_sin_ptr, position, index, sign, mask, HEAD_DIM, ROTARY_DIM, INTERLEAVED)
