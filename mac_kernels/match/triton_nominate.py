"""Match on the GPU, second launch, first half: nominate rows by their sketches, elect each head's nearest one.

Loops are not unrolled where latency allows it: every program runs once through its code, and fetching instructions
costs more than the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

_NEVER = tl.constexpr(2147483647)
INFINITE_KEY = tl.constexpr(0x7F800000 << 32)  # of an infinite distance; NaN lies above


@triton.jit
def nearest_key(distance, pos):
    """Sortable key: smaller distance first, then the newer position. Distances are >= 0, so their bits are ordered."""
    bits = distance.to(tl.int32, bitcast=True).to(tl.int64)
    return (bits << 32) | (-tl.maximum(pos, 0) + _NEVER).to(tl.int64)


@triton.jit
def key_pos(key):
    """The position of a key."""
    return -((key & _NEVER).to(tl.int32)) + _NEVER


@triton.jit
def two_smallest(first, second, other_first, other_second):
    """The two smallest of two pairs, each in order."""
    return (
        tl.minimum(first, other_first),
        tl.minimum(tl.maximum(first, other_first), tl.minimum(second, other_second)),
    )


@triton.jit
def nominate(
    key,  # of each row, [BLOCK_W]
    position,
    BLOCK_W: tl.constexpr,
    NOMINEES: tl.constexpr,
    BLOCK_NOMINEES: tl.constexpr,
):
    """Positions of the nearest rows by sketch, [BLOCK_NOMINEES] int32, -1 where there are fewer.

    Two at a time: a reduction costs its barriers, not its comparisons.
    """
    slot = tl.arange(0, BLOCK_NOMINEES)
    nominated = tl.full([BLOCK_NOMINEES], -1, tl.int32)
    for k in range(0, NOMINEES, 2):
        first, second = tl.reduce((key, tl.full([BLOCK_W], _NEVER, tl.int32)), 0, two_smallest)
        best = tl.where(slot == k, first, second)
        wanted = ((slot == k) | (slot == k + 1)) & (slot < NOMINEES) & (best != _NEVER)
        nominated = tl.where(wanted, position - best % BLOCK_W, nominated)
        key = tl.where((key == first) | (key == second), _NEVER, key)
    return nominated


@triton.jit
def nearest_of(
    nominated,
    q_pre,
    ring_q_ptr,
    ring_row,
    kv_head,
    WINDOW: tl.constexpr,
    NUM_QO_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_NOMINEES: tl.constexpr,
    NOMINEES_AT_ONCE: tl.constexpr,
    GROUP_SCOPE: tl.constexpr,
):
    """Key of every head's nearest nominated row by exact distance, [BLOCK_G]; one for all with ``GROUP_SCOPE``."""
    head = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)
    mask_h = head < GROUP
    mask = mask_h[:, None] & (offs_d < HEAD_DIM)[None, :]
    slot = tl.arange(0, BLOCK_NOMINEES)
    infinite = tl.full([BLOCK_G], INFINITE_KEY, tl.int64)
    best = infinite
    for first in range(0, BLOCK_NOMINEES, NOMINEES_AT_ONCE):
        pick = slot[None, :] == (first + tl.arange(0, NOMINEES_AT_ONCE))[:, None]
        pos = tl.sum(tl.where(pick, nominated[None, :], 0), 1)
        valid = pos >= 0
        at = (ring_row + tl.where(valid, pos % WINDOW, 0)) * NUM_QO_HEADS + kv_head * GROUP
        stored = tl.load(
            ring_q_ptr + (at[:, None, None] + head[None, :, None]) * HEAD_DIM + offs_d[None, None, :],
            mask=valid[:, None, None] & mask[None, :, :],
            other=0.0,
        )
        gap = stored.to(tl.float32) - q_pre[None, :, :]
        distance = tl.sqrt(tl.sum(gap * gap, 2))  # [NOMINEES_AT_ONCE, BLOCK_G]
        distance = tl.where(mask_h[None, :], distance, 0.0)
        if GROUP_SCOPE:
            distance = tl.broadcast_to(tl.max(distance, 1)[:, None], distance.shape)
        key = nearest_key(distance, tl.broadcast_to(pos[:, None], distance.shape))
        best = tl.minimum(best, tl.min(tl.where(valid[:, None], key, infinite[None, :]), 0))
    return best
