"""Ring pools of a batch whose rows are the slots, and what the library does to batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mac_kernels import HeadLayout, MacConfig, PagedKV, RingPool, Rope, fill_rings
from mac_kernels.tca import MissIndex


def rings_for_batch(
    config: MacConfig,
    batch: int,
    *,
    layout: HeadLayout,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
    choices: Sequence[Sequence[int]] = (),
    max_context: int = 0,
) -> RingPool:
    """Allocate rings for all layers; slots ``0 .. batch - 1`` get an empty ring each.

    ``choices`` (TCA candidates by layer and kv head) and ``max_context`` are for a config whose misses read selected
    tokens.
    """
    with torch.inference_mode(False):  # or a later step outside of inference mode could not write here
        rings = RingPool(
            num_rings=batch,
            num_layers=num_layers,
            layout=layout,
            window=config.window,
            dtype=dtype,
            correction=config.correction,
            sketch_dim=None if config.nominees is not None else 0,
            index=None
            if config.tca is None
            else MissIndex(choices, config=config.tca, num_rings=batch, max_context=max_context, device=device),
            device=device,
        )
        for slot in range(batch):
            rings.acquire(slot)
    return rings


def fill_rows(
    rings: RingPool,
    kv: PagedKV,
    query: torch.Tensor,
    *,
    layer: int,
    rope: Rope,
    config: MacConfig,
    sm_scale: float,
    logits_soft_cap: float,
) -> None:
    """Fill the ring of every row from its newest queries in ``query`` [B, Hq, N, D], which end where ``kv`` ends."""
    counts = kv.table.kv_len().clamp(max=min(query.shape[2], config.window)).tolist()
    newest = [query[row, :, query.shape[2] - count :] for row, count in enumerate(counts)]
    slots = torch.arange(len(counts), device=query.device)
    fill_rings(
        torch.cat(newest, dim=1).transpose(0, 1),
        torch.tensor([0, *counts]).cumsum(0).int(),
        kv,
        rings=rings,
        layer=layer,
        slots=slots,
        generations=torch.zeros_like(slots),
        rope=rope,
        config=config,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
    )


def pick_rings(rings: RingPool, rows: list[int], into: RingPool) -> RingPool:
    """Copy the ring of slot ``rows[i]`` to slot ``i`` of another pool, which takes over the counters."""
    copies = {row: rings.snapshot(row) for row in set(rows)}
    for slot, row in enumerate(rows):
        into.restore(slot, copies[row])
    if rings.index is not None and into.index is not None:
        held = rings.slot_table[torch.tensor(rows, device=rings.device)]
        into.index.take(rings.index, held.long(), into.slot_table[: len(rows)].long())
    into.counters = rings.counters
    return into


def cut_rings(rings: RingPool, lengths: torch.Tensor) -> None:
    """Forget the ring rows of slot ``i`` at positions from ``lengths[i]`` [B] on."""
    held = rings.slot_table.long()
    pos = rings.fields["pos"][:, held]  # [layers, B, W]
    rings.fields["pos"][:, held] = torch.where(pos < lengths[:, None], pos, -1)
    if rings.index is not None:
        rings.index.cut(held, lengths)
