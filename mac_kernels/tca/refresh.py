"""Select anew what missed kv groups read, and judge the selection before by the present query."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..paged import PagedKV
from ..ring import RingPool
from .config import TcaConfig
from .index import NEVER, dropped_mass
from .select import FarSet, importance, select_far


@torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
def refresh_index(
    q: torch.Tensor,
    kv: PagedKV,
    kv_len: Sequence[int],
    *,
    rings: RingPool,
    layer: int,
    slots: torch.Tensor,
    generations: torch.Tensor,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> None:
    """Select for every request what its misses read from now on; call it after a prompt and every ``refresh`` steps.

    Reads all keys once. Where the present query shows that the selection in force so far dropped more than
    ``1 - mass_target`` of its attention, the kv head's misses stay exact until the next call, and the ring rows that
    descend from that selection are not reused any more.

    Parameters
    ----------
    q : torch.Tensor, [B, Hq, D]
        Queries of every request's last token, after RoPE.
    kv : PagedKV
        Keys and values, those of the last token included.
    kv_len : sequence of int
        Tokens of every request.
    rings, layer, slots, generations
        As for :meth:`mac_kernels.BatchMacDecodeWithPagedKVCacheWrapper.run`; requests without a ring are left out.
    sm_scale : float
        Scale of the logits, usually ``1 / sqrt(D)``.
    logits_soft_cap : float, default 0.0
        ``cap * tanh(logit / cap)``; 0 turns it off.

    Raises
    ------
    InputError
        If the rings have no index, or a request is longer than it has room for.

    Notes
    -----
    Syncs with the device; no CUDA graph can capture it, and ``torch.compile`` leaves it out of its
    graphs, whose steps read the index as it was before them.
    """
    index = rings.index
    if index is None:
        raise InputError("the rings have no index; build RingPool(index=MissIndex(...))")
    if max(kv_len, default=0) > index.max_context:
        raise InputError(f"a request of {max(kv_len)} tokens is longer than max_context={index.max_context}; raise it")
    config, ring = index.config, rings.lookup(slots, generations)
    before, choice = index.far(layer, ring), index.choices[layer]
    after, dropped = _select(
        q, kv, kv_len, choice, before, config=config, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap
    )
    rings.counters.add_scan(layer, kv.table.kv_len(), kv.layout.num_kv_heads)

    own = ring >= 0
    ring, dropped = ring[own], dropped[own]
    _void(rings, layer, ring, torch.where(dropped > index.limit, index.selected[layer, ring], -1))
    position = torch.tensor(kv_len, device=q.device)[own] - 1
    ids = after.ids[:, :, : index.ids.shape[3]]
    index.store(layer, ring, FarSet(ids[own], after.count[own], after.far_end[own]), position, dropped)


def _select(
    q: torch.Tensor,
    kv: PagedKV,
    kv_len: Sequence[int],
    choice: Sequence[int],
    before: FarSet,
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float,
) -> tuple[FarSet, torch.Tensor]:
    """What is kept from now on, and the attention [B, Hkv] that the sets ``before`` drop, or without one the new ones.

    By the reference where there is no kernel.
    """
    options = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
    dropped = dropped_mass
    if _on_kernels(q.device) and not _reasons(kv, config):
        from . import fused  # imports triton

        selection, s = fused.select_and_score(q, kv, kv_len, choice, config=config, **options)
        after, dropped = selection.far, fused.dropped_mass
    else:
        s = importance(q, kv, **options)
        after, s = select_far(s, kv_len, choice, config=config).far, s[:, :, config.sinks :]
    of_before, of_after = (dropped(s, far, sinks=config.sinks) for far in (before, after))
    return after, torch.where(before.count > 0, of_before, of_after)


def _reasons(kv: PagedKV, config: TcaConfig) -> tuple[str, ...]:
    from . import fused  # imports triton

    return fused.unsupported_reasons(kv.layout, config)


def _on_kernels(device: torch.device) -> bool:
    return device.type == "cuda"


def _void(rings: RingPool, layer: int, ring: torch.Tensor, version: torch.Tensor) -> None:
    """Keep the rows of ``ring`` [N] from being reused that were read with the selection of ``version`` [N, Hkv]."""
    seen, anchor = (rings.fields[name][layer, ring] for name in ("seen", "anchor"))
    group = rings.layout.group_size
    found = seen == version.repeat_interleave(group, 1)[:, None]
    found = found.view(*seen.shape[:2], -1, group).any(-1) & (version >= 0)[:, None]
    rings.fields["anchor"][layer, ring] = torch.where(found, NEVER, anchor)
