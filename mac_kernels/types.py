"""Shared types and the letters used everywhere.

``B`` requests, ``Hq``/``Hkv`` query and key/value heads, ``G = Hq // Hkv``, ``D`` head dim, ``L`` context length,
``W`` ring rows (window), ``S`` band, ``F`` sinks, ``P`` page size. Every log-sum-exp is base 2 and called ``lse2``.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .errors import InputError

KVLayout = Literal["NHD", "HND"]
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class HeadLayout:
    """Head counts and head dim of one attention layer, as one tensor-parallel rank sees them.

    Parameters
    ----------
    num_qo_heads : int
        Query heads ``Hq``, a multiple of ``num_kv_heads``.
    num_kv_heads : int
        Key/value heads ``Hkv``, at least 1.
    head_dim : int
        ``D``, at least 2 and even (rotary embeddings pair the dimensions).

    Raises
    ------
    InputError
        If a count is not positive, not divisible, or ``head_dim`` is odd.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_qo_heads < 1:
            raise InputError(
                f"head counts must be >= 1, got num_qo_heads={self.num_qo_heads}, "
                f"num_kv_heads={self.num_kv_heads}; take them from the model config"
            )
        if self.num_qo_heads % self.num_kv_heads:
            raise InputError(
                f"num_qo_heads={self.num_qo_heads} must be a multiple of num_kv_heads={self.num_kv_heads}; "
                "take both from the model config (after tensor-parallel division)"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise InputError(f"head_dim={self.head_dim} must be even and >= 2; take it from the model config")

    @property
    def group_size(self) -> int:
        """Query heads per key/value head, ``G``."""
        return self.num_qo_heads // self.num_kv_heads


class AttnState(NamedTuple):
    """Attention over a set of keys, mergeable with the state over any disjoint set.

    ``out`` [..., Hq, D] fp32, the normalised output; ``lse2`` [..., Hq] fp32, base 2, ``-inf`` when empty (``out`` is
    then 0); ``kbar`` [..., Hq, D] fp32, the attention-weighted mean key, or ``None`` where it was not computed.
    """

    out: torch.Tensor
    lse2: torch.Tensor
    kbar: torch.Tensor | None = None


class MatchResult(NamedTuple):
    """The nominated ring row of every query head.

    ``row`` [B, Hq] int64, the ring row, -1 where nothing is eligible; ``pos`` [B, Hq] int64, its position, -1
    likewise; ``distance`` [B, Hq] fp32, ``||q_pre - q_pre[row]||``, ``inf`` where nothing is eligible.
    """

    row: torch.Tensor
    pos: torch.Tensor
    distance: torch.Tensor


class Reason(enum.IntEnum):
    """Why a kv group was reused (``HIT``) or computed exactly; the values index the device counters.

    When several causes hold at once the smallest value above ``HIT`` is reported.
    """

    HIT = 0
    NO_RING = 1
    SHORT_CONTEXT = 2
    BYPASSED = 3
    NO_ROW = 4
    DISTANCE = 5
    AGE = 6
    INFLUENCE = 7


class StepTrace(NamedTuple):
    """What one decode step of one layer decided, on the device.

    ``reason`` [B, Hkv] int64, a :class:`Reason`; ``head_hit`` [B, Hq] bool, heads that would pass on their own;
    ``matched_pos`` [B, Hq] int64 and ``distance`` [B, Hq] fp32 of the nominated row; ``weight_bound`` [B, Hq] fp32,
    upper bound of the reused state's weight in the output; ``start`` [B, Hq] int64, where the fresh rest begins;
    ``stop`` [B] int64, the covered end ``E(m)``; ``kv_read`` [B, Hkv] int64, KV tokens read; ``kv_len`` [B] int64;
    ``sparse`` [B, Hkv] bool, missed groups that read selected tokens only (``MacConfig.tca``).
    """

    reason: torch.Tensor
    head_hit: torch.Tensor
    matched_pos: torch.Tensor
    distance: torch.Tensor
    weight_bound: torch.Tensor
    start: torch.Tensor
    stop: torch.Tensor
    kv_read: torch.Tensor
    kv_len: torch.Tensor
    sparse: torch.Tensor

    @property
    def hit(self) -> torch.Tensor:
        """Reused kv groups, [B, Hkv] bool."""
        return self.reason == Reason.HIT


def covered_end(position: torch.Tensor, *, band: int, sinks: int) -> torch.Tensor:
    """End ``E(t) = max(F, t + 1 - S)`` of what the ring row of position ``t`` covers, same shape as ``position``."""
    return torch.clamp(position + 1 - band, min=sinks)
