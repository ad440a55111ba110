"""Match, the specification: nearest eligible ring row by exact pre-RoPE distance."""

from __future__ import annotations

import torch

from ..config import MacConfig
from ..errors import InputError
from ..ring import RingRows
from ..types import MatchResult
from .sketch import dequantize


def find_match(q_pre: torch.Tensor, rows: RingRows, position: torch.Tensor, *, config: MacConfig) -> MatchResult:
    """Nominate a ring row for every query head.

    Parameters
    ----------
    q_pre : torch.Tensor, [B, Hq, D] fp32
        Queries before RoPE.
    rows : RingRows
        The rows of every request's ring in this layer.
    position : torch.Tensor, [B] int64
        Current position ``m``.
    config : MacConfig
        ``window``, ``match_scope`` and ``nominees`` are used.

    Returns
    -------
    MatchResult
        The nearest row; of equally near rows the newest.

    Notes
    -----
    Eligible: ``m - W < pos < m`` (the row at ``m - W`` is about to be overwritten), the ring belongs to the request,
    and the stored state is not empty. Scope ``"group"`` takes one row for the whole kv group: the one whose worst head
    is nearest.
    """
    batch, num_heads, _ = q_pre.shape
    num_kv_heads = rows.anchor.shape[-1]
    group = num_heads // num_kv_heads
    fresh = (rows.pos >= 0) & (rows.pos < position[:, None]) & (rows.pos > position[:, None] - config.window)
    eligible = fresh[:, :, None] & torch.isfinite(rows.lse2)  # [B, W, Hq]
    if config.nominees is not None:
        allowed = eligible.view(batch, -1, num_kv_heads, group).all(-1)
        if rows.sketch is None or rows.projection is None:
            raise InputError("nominees is set but the ring has no sketch; build it with the default sketch_dim")
        distance = (rows.sketch - dequantize(*rows.projection.of(q_pre))[:, None]).square().sum(-1)
        lag = position[:, None] - rows.pos
        nominated = _nominate(distance, allowed, lag, config)
        eligible = eligible & nominated.repeat_interleave(group, dim=2)
    distance = (rows.q_pre - q_pre[:, None]).square().sum(-1).sqrt()
    distance = torch.where(eligible, distance, torch.inf)
    if config.match_scope == "group":
        worst = distance.view(batch, -1, num_kv_heads, group).amax(-1)
        row = _first_newest(worst, rows.pos).repeat_interleave(group, dim=1)
    else:
        row = _first_newest(distance, rows.pos)
    best = distance.gather(1, row[:, None]).squeeze(1)
    found = torch.isfinite(best)
    pos = rows.pos.gather(1, row)
    return MatchResult(torch.where(found, row, -1), torch.where(found, pos, -1), best)


def _first_newest(distance: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """Row of the smallest distance [B, H]; among equals the one with the largest position."""
    tied = distance == distance.amin(dim=1, keepdim=True)
    return torch.where(tied, pos[:, :, None], -2).argmax(dim=1)


def _nominate(distance: torch.Tensor, allowed: torch.Tensor, lag: torch.Tensor, config: MacConfig) -> torch.Tensor:
    """The nominated rows per kv group, [B, W, Hkv] bool: smallest squared sketch distance, newest among equals.

    Distances are compared to the bits that leave room for the lag in a 32-bit key, because the kernels sort such keys.
    """
    assert config.nominees is not None
    room = 1 << (config.window - 1).bit_length()
    key = distance.float().view(torch.int32) // room * room + lag[:, :, None].int()
    key = torch.where(allowed, key, torch.iinfo(torch.int32).max)
    nearest = key.topk(min(config.nominees, key.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(allowed).scatter_(1, nearest, True) & allowed
