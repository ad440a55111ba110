"""One decode step of one layer, composed of the reference stages. This is the specification of every backend."""

from __future__ import annotations

import functools
from typing import NamedTuple, Protocol

import torch

from .attend.reference import partial_attention
from .complete.reference import correct, merge_state
from .config import MacConfig
from .match.accept import HANDOVER, accept
from .match.reference import find_match
from .paged import PagedKV
from .ring import RingPool, RingRows
from .rope import Rope
from .types import AttnState, HeadLayout, MatchResult, Reason, StepTrace, covered_end


class FindMatch(Protocol):
    """The call of :func:`mac_kernels.find_match`."""

    def __call__(
        self, q_pre: torch.Tensor, rows: RingRows, position: torch.Tensor, *, config: MacConfig
    ) -> MatchResult:
        """See there."""
        ...


def reference_step(
    q: torch.Tensor,
    kv: PagedKV,
    rings: RingPool,
    *,
    layer: int,
    slots: torch.Tensor,
    generations: torch.Tensor,
    config: MacConfig,
    rope: Rope,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    find: FindMatch = find_match,
) -> tuple[torch.Tensor, StepTrace]:
    """Match, attend, complete for ``q`` [B, Hq, D]; returns the output [B, Hq, D] fp32 and the trace.

    ``find`` nominates the row of every head; another one than :func:`find_match` is for measuring alternatives.

    The band and the sinks are attended whatever is decided, so they come first: their mass bounds the weight that a
    reused state can get.
    """
    kv_len = kv.table.kv_len()
    position = kv_len - 1
    stop = covered_end(position, band=config.band, sinks=config.sinks)
    attend = functools.partial(partial_attention, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)
    heads = torch.ones_like(q[..., 0], dtype=torch.int64)
    sink = attend(q, kv, 0 * heads, torch.full_like(stop, config.sinks))
    band = attend(q, kv, stop[:, None] * heads, kv_len)
    always = merge_state(sink, band)

    q_pre = rope.unrotate(q, position)
    ring = rings.lookup(slots, generations)
    searched = ring if config.break_even is None else torch.where(rings.bypass.paused(layer), -1, ring)
    rows = rings.rows(layer, searched)
    match = find(q_pre, rows, position, config=config)
    candidate = rings.state(layer, ring, match.row)
    if config.correction:
        matched_q = _at_row(rows.q_pre, match.row)
        candidate = correct(candidate, q_pre, matched_q, sm_scale=sm_scale)
    weight_bound = torch.exp2(candidate.lse2 - merge_state(candidate, always).lse2)
    weight_bound = torch.where(match.row >= 0, weight_bound, 0.0)
    anchor = rows.anchor.repeat_interleave(q.shape[1] // rows.anchor.shape[-1], dim=-1)
    anchor = torch.where(match.row >= 0, _at_row(anchor[..., None], match.row)[..., 0], -1)

    reason, head_hit = _decide(match, weight_bound, anchor, ring, searched, position, config, rings.layout, layer)
    group = rings.layout.group_size
    reuse = head_hit if not config.recompute_loaded_groups else (reason == Reason.HIT).repeat_interleave(group, 1)

    matched_end = covered_end(match.pos, band=config.band, sinks=config.sinks)
    start = torch.where(reuse, matched_end, config.sinks)
    selected = _selected(rings, layer, ring, reason, match.row, kv_len, stop)
    rest = attend(q, kv, start, stop, return_kbar=rings.correction, keep=selected.keep)
    if rest.kbar is not None:
        rest = rest._replace(kbar=rope.pull_back(rest.kbar, position))
    row = merge_state(_masked(candidate, reuse), rest)
    row_anchor = torch.where(reuse, anchor - HANDOVER, position[:, None])
    row_anchor = row_anchor.view(len(position), -1, group).amin(-1)
    target = torch.where(kv_len > 0, ring, -1)
    rings.write(layer, target, position, q_pre=q_pre, state=row, anchor=row_anchor, seen=selected.seen)

    rest_read = (stop[:, None] - start.view(len(position), -1, group).amin(-1)).clamp(min=0)
    rest_read = torch.where(selected.sparse, selected.read, rest_read)
    trace = StepTrace(
        reason=reason,
        head_hit=head_hit,
        matched_pos=match.pos,
        distance=match.distance,
        weight_bound=weight_bound,
        start=start,
        stop=stop,
        kv_read=torch.minimum(rest_read + (kv_len - stop).clamp(min=0)[:, None] + config.sinks, kv_len[:, None]),
        kv_len=kv_len,
        sparse=selected.sparse,
    )
    rings.counters.add(layer, trace)
    if config.break_even is not None:
        rings.bypass.update(layer, reason, config.break_even)
    return merge_state(row, always).out, trace


class _Selected(NamedTuple):
    """What a selection leaves of the rest.

    ``sparse`` [B, Hkv] bool, groups that read selected tokens only, and ``read`` [B, Hkv] int64, how many of the rest;
    ``keep`` [B, Hkv, L] bool, what every group may read (``None``: all); ``seen`` [B, Hq] int64, position of the query
    that selected what each head's state was read with, -1 for everything (``None``: nobody asks).
    """

    sparse: torch.Tensor
    read: torch.Tensor
    keep: torch.Tensor | None = None
    seen: torch.Tensor | None = None


def _selected(
    rings: RingPool,
    layer: int,
    ring: torch.Tensor,
    reason: torch.Tensor,
    row: torch.Tensor,
    kv_len: torch.Tensor,
    stop: torch.Tensor,
) -> _Selected:
    index, group = rings.index, rings.layout.group_size
    if index is None:
        return _Selected(torch.zeros_like(reason, dtype=torch.bool), torch.zeros_like(reason))
    sparse = index.usable(layer, ring, reason, kv_len - 1)
    keep = index.kept(layer, ring, sparse, kv_len)
    at = layer, ring.clamp(min=0)
    disjoint = ~sparse | (index.far_end[at] <= stop[:, None])
    assert bool(disjoint.all()), "selected tokens lie in the band, although the config demands a longer local_window"
    token = torch.arange(keep.shape[2], device=keep.device)
    rest = (token >= index.config.sinks) & (token < stop[:, None])
    fresh = torch.where(sparse, index.selected[at], -1).repeat_interleave(group, 1)
    stored = _at_row(rings.fields["seen"][at][..., None], row)[..., 0]
    seen = torch.where((reason == Reason.HIT).repeat_interleave(group, 1), stored, fresh)
    return _Selected(sparse, (keep & rest[:, None]).sum(-1), keep, seen)


def _decide(
    match: MatchResult,
    weight_bound: torch.Tensor,
    anchor: torch.Tensor,
    ring: torch.Tensor,
    searched: torch.Tensor,
    position: torch.Tensor,
    config: MacConfig,
    layout: HeadLayout,
    layer: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reason per kv group [B, Hkv] and hit per head [B, Hq]; a group hits only if all its heads do."""
    near, young, light = accept(
        match.distance, weight_bound, position[:, None] - anchor, config=config, head_dim=layout.head_dim, layer=layer
    )
    causes = {
        Reason.NO_RING: (ring < 0)[:, None].expand_as(near),
        Reason.SHORT_CONTEXT: (position < config.min_context)[:, None].expand_as(near),
        Reason.BYPASSED: (searched < 0)[:, None].expand_as(near),
        Reason.NO_ROW: match.row < 0,
        Reason.DISTANCE: ~near,
        Reason.AGE: ~young,
        Reason.INFLUENCE: ~light,
    }
    head_hit = ~torch.stack(list(causes.values())).any(0)
    reason = torch.full((len(position), layout.num_kv_heads), int(Reason.HIT), device=position.device)
    for cause, holds in reversed(causes.items()):
        reason = torch.where(holds.view(*reason.shape, -1).any(-1), int(cause), reason)
    return reason, head_hit


def _at_row(values: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Pick ``values`` [B, W, Hq, X] at ``row`` [B, Hq] (row -1 reads row 0; the caller masks it)."""
    index = row.clamp(min=0)[:, None, :, None].expand(-1, 1, -1, values.shape[-1])
    return values.gather(1, index).squeeze(1)


def _masked(state: AttnState, keep: torch.Tensor) -> AttnState:
    """The state where ``keep`` [B, Hq], else the empty state."""
    kbar = None if state.kbar is None else torch.where(keep[..., None], state.kbar, 0.0)
    return AttnState(torch.where(keep[..., None], state.out, 0.0), torch.where(keep, state.lse2, -torch.inf), kbar)
