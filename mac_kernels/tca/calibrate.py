"""Which budget a head needs: retained mass of every candidate, from one dense pass over a text.

No ``L x L`` tensor is held: the attention of a layer is seen a tile of queries at a time, and sums by column stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..errors import InputError
from .candidates import NUM_SPARSE
from .config import TcaConfig, far_blocks, far_end
from .select import pick

Measure = Literal["raw", "norm", "row"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""What "retained mass" may mean; ``S`` are the far tokens kept for the last query, sinks included.

``raw``: sum over ``S`` of the column means of the attention matrix (a column's mean is over the queries that see it).
Over all tokens this sums to more than 1, so a target of 0.9 asks for less than it seems. ``norm``: the same sum divided
by that over the whole far region. ``row``: mean, over the queries that have a far region, of the attention that falls
on what they would read, the window included: 1 minus the mean dropped mass, which the published error bound is about.
"""


@dataclass(frozen=True, slots=True)
class ColumnSums:
    """Attention of one layer over one text, summed by column and averaged over the heads of a kv group.

    ``last`` [Hkv, L], the last query's row; ``mean`` [Hkv, L], a column's mean over the queries that see it; ``far``
    [Hkv, L], a column's sum over the queries for which it is far; ``far_queries``, how many queries have a far region.
    """

    last: torch.Tensor
    mean: torch.Tensor
    far: torch.Tensor
    far_queries: int


def column_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> ColumnSums:
    """Sum up the causal attention of ``q`` [Hq, L, D] to ``k`` [Hkv, L, D], both after RoPE.

    Parameters
    ----------
    q, k : torch.Tensor
        Queries and keys of one text.
    config : TcaConfig
        Block, window and sinks: they say which columns are far for which query.
    sm_scale : float
        Scale of the logits, usually ``1 / sqrt(D)``.
    logits_soft_cap : float, default 0.0
        ``cap * tanh(logit / cap)``; 0 turns it off.

    Notes
    -----
    Holds ``Hq x block x L`` numbers at a time and computes every logit once.
    """
    kv_heads, length, dim = k.shape
    mean, far = (torch.zeros(kv_heads, length, device=k.device) for _ in range(2))
    grouped, keys = q.float().view(kv_heads, -1, length, dim), k.float()
    far_queries, low = 0, 0
    while low < length:
        # tiles end where blocks do, so that all queries of a tile have the same far region
        end = min(low + config.block - (low - config.sinks) % config.block, length)
        logits = torch.einsum("hgqd,hld->hgql", grouped[:, :, low:end], keys[:, :end]) * sm_scale
        if logits_soft_cap > 0:
            logits = logits_soft_cap * torch.tanh(logits / logits_soft_cap)
        hidden = torch.ones(end - low, end, dtype=torch.bool, device=k.device).triu(low + 1)
        weight = logits.masked_fill_(hidden, -torch.inf).softmax(-1).mean(1)  # [Hkv, queries, end]
        columns = weight.sum(1)
        mean[:, :end] += columns
        begin = far_end(far_blocks(end - 1, config), config)
        far[:, :begin] += columns[:, :begin]
        far_queries += (end - low) * (begin > 0)
        low = end
    seen_by = torch.arange(length, 0, -1, device=k.device)
    return ColumnSums(weight[:, -1].clone(), mean / seen_by, far, far_queries)


def retained(sums: ColumnSums, config: TcaConfig) -> dict[Measure, torch.Tensor]:
    """Retained mass of every kv head under every sparse candidate, [Hkv, 14] fp32 on the CPU, by measure.

    Raises
    ------
    InputError
        If the text has no far region.
    """
    heads, length = sums.last.shape
    end = far_end(far_blocks(length - 1, config), config)
    if end == 0:
        least = config.sinks + config.local_window + config.block + 1
        raise InputError(f"a text of {length} tokens has no far region; take at least {least}, better several windows")
    columns = torch.stack((sums.mean, sums.far))[:, :, :end]  # [2, Hkv, end]
    everything = columns.sum(-1)
    kept = torch.empty(2, heads, NUM_SPARSE, device=columns.device)
    for head in range(heads):
        always, blocks = columns[:, head, : config.sinks], columns[:, head, config.sinks :]
        for candidate in range(NUM_SPARSE):
            _, ids = pick(sums.last[head, config.sinks : end], candidate, config)
            kept[:, head, candidate] = always.sum(-1) + blocks[:, ids].sum(-1)
    dropped = everything[1, :, None] - kept[1]
    found: dict[Measure, torch.Tensor] = {
        "raw": kept[0],
        "norm": kept[0] / everything[0, :, None],
        "row": 1 - dropped / sums.far_queries,
    }
    return {measure: mass.cpu() for measure, mass in found.items()}


def choose(retained_mass: Sequence[float], mass_target: float) -> int:
    """The smallest candidate whose retained mass reaches the target, or dense."""
    valid = (candidate for candidate, mass in enumerate(retained_mass) if mass >= mass_target)
    return next(valid, NUM_SPARSE)
