"""Select, the specification: which far tokens every kv head keeps of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import InputError
from ..paged import PagedKV
from .candidates import NUM_SPARSE, keep_by_rank
from .config import TcaConfig, far_blocks, far_end

_TINY = 1e-30  # keeps the index of a block without any mass finite


@dataclass(frozen=True, slots=True)
class FarSet:
    """The far tokens that one layer keeps of every request; what is read besides is ``[far_end, kv_len)``.

    ``ids`` [B, Hkv, C] int32, positions, ascending in ``[:count]``; the first ``sinks`` entries are the sinks even in
    an empty set, entries from ``count`` on are -1 otherwise; ``count`` [B, Hkv] int32, 0 where nothing is far (a short
    request, a dense head); ``far_end`` [B, Hkv] int32, where the dense window of the last position begins, 0 likewise.

    With ``sets`` [B] int32 the three tensors belong to a pool (:class:`.pool.FarPool`), and request ``b`` has the sets
    at ``sets[b]`` there; -1: it has none, and reads everything. For :func:`sparse_decode` and :func:`compact` alone.
    """

    ids: torch.Tensor
    count: torch.Tensor
    far_end: torch.Tensor
    sets: torch.Tensor | None = None

    def of_batch(self) -> FarSet:
        """A copy of what the requests of a batch have; itself where it is not part of a pool."""
        if self.sets is None:
            return self
        own, known = self.sets.clamp(min=0).long(), (self.sets >= 0)[:, None]
        return FarSet(self.ids[own], self.count[own] * known, self.far_end[own] * known)


class Selection(NamedTuple):
    """What :func:`select_far` found.

    ``far``: the :class:`FarSet` at the last position; ``prefix`` [B, Hkv, N + 1] int32: a query with ``m`` far blocks
    attends ``ids[:prefix[m]]``, with 0 at ``m = 0`` and for dense heads, and N the most far blocks in the batch.
    """

    far: FarSet
    prefix: torch.Tensor


def importance(q_last: torch.Tensor, kv: PagedKV, *, sm_scale: float, logits_soft_cap: float = 0.0) -> torch.Tensor:
    """Attention of the last query to every token, averaged over the heads of a kv group.

    Parameters
    ----------
    q_last : torch.Tensor, [B, Hq, D]
        Query of every request's last token, after RoPE.
    kv : PagedKV
        Keys; values are not read.
    sm_scale : float
        Scale of the logits, usually ``1 / sqrt(D)``.
    logits_soft_cap : float, default 0.0
        ``cap * tanh(logit / cap)``; 0 turns it off.

    Returns
    -------
    torch.Tensor, [B, Hkv, L] fp32
        Sums to 1 over the tokens of a request, ``L`` being the longest; 0 beyond a request's end.
    """
    kv_len = kv.table.kv_len()
    count = int(kv_len.max())
    k, _ = kv.gather(torch.zeros_like(kv_len), count)
    grouped = q_last.float().view(len(q_last), kv.layout.num_kv_heads, kv.layout.group_size, -1)
    logits = torch.einsum("bhgd,blhd->bhgl", grouped, k) * sm_scale
    if logits_soft_cap > 0:
        logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
    inside = torch.arange(count, device=k.device) < kv_len[:, None]
    logits = logits.masked_fill(~inside[:, None, None], -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).mean(2)  # a request without tokens has no softmax


def block_scores(s: torch.Tensor, config: TcaConfig) -> torch.Tensor:
    """Rank score of blocks from the importance [..., blocks, block] of their tokens, [..., blocks]."""
    mass = s.sum(-1)
    hhi = s.square().sum(-1) / mass.clamp(min=_TINY).square()
    if config.rule == "literal":
        return (1 - config.alpha) * mass + config.alpha * (1 - hhi)
    return mass * (1 - hhi)


def pick(s: torch.Tensor, candidate: int, config: TcaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Select from the importance ``s`` [blocks * block] of one head's far region.

    Returns
    -------
    keep : torch.Tensor, [blocks] int64
        Tokens that each block keeps.
    ids : torch.Tensor, [sum of keep] int64
        Places in ``s``, ascending. Of equal scores the earlier block, and in a block the earlier token, wins.
    """
    by_block = s.view(-1, config.block)
    order = block_scores(by_block, config).argsort(descending=True, stable=True)
    keep = torch.empty(len(by_block), dtype=torch.int64, device=s.device)
    keep[order] = torch.tensor(keep_by_rank(candidate, len(by_block), config.block), device=s.device)
    best = by_block.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(best).scatter_(1, best, torch.arange(config.block, device=s.device).expand_as(best))
    return keep, (rank < keep[:, None]).flatten().nonzero()[:, 0]


def select_far(s: torch.Tensor, kv_len: Sequence[int], choice: Sequence[int], *, config: TcaConfig) -> Selection:
    """Select the far tokens of every request and kv head.

    Parameters
    ----------
    s : torch.Tensor, [B, Hkv, L]
        :func:`importance` of the tokens.
    kv_len : sequence of int
        Tokens of every request.
    choice : sequence of int
        Candidate of every kv head, in [0, 14] (:mod:`.candidates`); 14 is dense.
    config : TcaConfig
        Block, window, sinks and rule.

    Raises
    ------
    InputError
        If lengths or candidates do not fit ``s``.
    """
    _check(s, kv_len, choice)
    batch, heads = s.shape[:2]
    blocks = [far_blocks(length - 1, config) for length in kv_len]
    most, block, sinks = max(blocks, default=0), config.block, config.sinks
    prefix = torch.zeros(batch, heads, most + 1, dtype=torch.int32, device=s.device)
    far = empty_far_set(batch, heads, sinks + most * block, config=config, device=s.device)
    for request, count in enumerate(blocks):
        for head, candidate in enumerate(choice):
            if count == 0 or candidate == NUM_SPARSE:
                continue
            keep, ids = pick(s[request, head, sinks : sinks + count * block], candidate, config)
            prefix[request, head, 1 : count + 1] = sinks + keep.cumsum(0)
            far.ids[request, head, sinks : sinks + len(ids)] = (sinks + ids).int()
            far.count[request, head] = sinks + len(ids)
            far.far_end[request, head] = far_end(count, config)
    return Selection(far, prefix)


def select_prompt(
    q_last: torch.Tensor,
    kv: PagedKV,
    kv_len: Sequence[int],
    choice: Sequence[int],
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> Selection:
    """:func:`select_far` by the :func:`importance` that the last query of every request sees."""
    s = importance(q_last, kv, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap)
    return select_far(s, kv_len, choice, config=config)


def empty_far_set(batch: int, heads: int, capacity: int, *, config: TcaConfig, device: torch.device) -> FarSet:
    """Far sets of nothing, with room for ``capacity`` tokens a head (never less than the sinks)."""
    ids = torch.full((batch, heads, max(capacity, config.sinks)), -1, dtype=torch.int32, device=device)
    ids[:, :, : config.sinks] = torch.arange(config.sinks, dtype=torch.int32, device=device)
    nothing = torch.zeros(batch, heads, dtype=torch.int32, device=device)
    return FarSet(ids, nothing, nothing.clone())


def _check(s: torch.Tensor, kv_len: Sequence[int], choice: Sequence[int]) -> None:
    if s.dim() != 3 or len(kv_len) != s.shape[0] or len(choice) != s.shape[1]:
        raise InputError(
            f"s is {list(s.shape)}, with {len(kv_len)} lengths and {len(choice)} candidates; it must be "
            "[requests, kv heads, tokens], with one length per request and one candidate per kv head"
        )
    if any(not 0 <= candidate <= NUM_SPARSE for candidate in choice):
        raise InputError(f"candidates {list(choice)} must be in [0, {NUM_SPARSE}]; {NUM_SPARSE} is dense")
    if any(not 0 <= length <= s.shape[2] for length in kv_len):
        raise InputError(f"lengths {list(kv_len)} must be in [0, {s.shape[2]}], the tokens of s; pass kv_len")
