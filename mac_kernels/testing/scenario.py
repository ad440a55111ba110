"""Inputs with known answers: poisoned paged KV caches, queries at a chosen distance from chosen ring rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ..complete.reference import correct
from ..config import MacConfig
from ..errors import InputError
from ..match.accept import distance_cap
from ..paged import PagedKV, PageTable, RowTable, Table
from ..prefill import fill_rings
from ..ring import RingPool
from ..rope import Rope
from ..types import AttnState, HeadLayout, KVLayout, covered_end

_NEAR_ROWS = 4  # fewer than any sensible number of nominees, so that a sketch finds them


class PagedStore:
    """A paged cache in random page order, NaN wherever no token was written.

    Parameters
    ----------
    batch, capacity : int
        Requests, and tokens that each may grow to.
    layout, page_size, kv_layout, dtype, device
        Of the cache.
    fused : bool, default False
        Keys and values are strided views of one tensor [num_pages, 2, ...].
    generator : torch.Generator
        CPU generator of the page order.

    Notes
    -----
    ``table()`` appends entries to ``indices`` beyond ``indptr[-1]`` that name a page full of NaN, so that a kernel that
    reads too far finds NaN instead of a neighbour's tokens.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        layout: HeadLayout,
        *,
        page_size: int,
        kv_layout: KVLayout = "NHD",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fused: bool = False,
        generator: torch.Generator,
    ) -> None:
        self.layout, self.page_size, self.kv_layout = layout, page_size, kv_layout
        pages = -(-capacity // page_size)
        order = torch.randperm(batch * pages + 2, generator=generator)
        self.pages = order[: batch * pages].view(batch, pages).to(device)
        self.poison_page = int(order[-1])
        heads, dim = layout.num_kv_heads, layout.head_dim
        inner = (page_size, heads, dim) if kv_layout == "NHD" else (heads, page_size, dim)
        shape = (batch * pages + 2, *inner)
        both = torch.full((shape[0], 2, *inner) if fused else (2, *shape), torch.nan, dtype=dtype, device=device)
        self.k_cache, self.v_cache = both.unbind(1 if fused else 0)

    def write(self, request: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write tokens [N, Hkv, D] of a request from position ``first`` on."""
        position = torch.arange(first, first + k.shape[0], device=self.pages.device)
        page, offset = self.pages[request, position // self.page_size], position % self.page_size
        for cache, values in ((self.k_cache, k), (self.v_cache, v)):
            values = values.to(cache.device, cache.dtype)
            if self.kv_layout == "NHD":
                cache[page, offset] = values
            else:
                cache[page, :, offset] = values

    def table(self, lengths: Sequence[int], requests: Sequence[int] | None = None) -> PageTable:
        """The page table of some requests (default all) at the given lengths."""
        requests = range(len(lengths)) if requests is None else requests
        counts = [-(-length // self.page_size) for length in lengths]
        used = [self.pages[r, :n] for r, n in zip(requests, counts, strict=True)]
        last = [length - (n - 1) * self.page_size if n else 0 for length, n in zip(lengths, counts, strict=True)]
        indices = torch.cat([*used, self.pages.new_full((3,), self.poison_page)])
        indptr = torch.tensor([0, *counts]).cumsum(0)
        device = self.pages.device
        return PageTable(
            indptr.to(device, torch.int32),
            indices.to(torch.int32),
            torch.tensor(last, dtype=torch.int32, device=device),
            self.page_size,
        )

    def row_table(self, lengths: Sequence[int], requests: Sequence[int] | None = None) -> RowTable:
        """The same as rows of token slots, those of row 0 and beyond the lengths poisoned; pages of one token only."""
        requests = range(len(lengths)) if requests is None else requests
        rows = torch.full_like(self.pages[:1], self.poison_page).repeat(len(self.pages) + 1, 1)
        for request, length in zip(requests, lengths, strict=True):
            rows[len(rows) - 1 - request, :length] = self.pages[request, :length]
        index = torch.tensor([len(rows) - 1 - r for r in requests], device=self.pages.device)
        return RowTable(rows.int(), index, torch.tensor(lengths, dtype=torch.int32, device=self.pages.device))

    def kv(self, table: Table) -> PagedKV:
        """The cache seen through a page table."""
        return PagedKV(self.k_cache, self.v_cache, table, self.layout, self.kv_layout)


def poison_rings(rings: RingPool) -> None:
    """Fill every field of every row but the position tag with NaN or nonsense; meant for a pool without rows."""
    for name, field in rings.fields.items():
        if name != "pos":
            field.fill_(torch.nan if field.is_floating_point() else 77)


@dataclass(frozen=True, slots=True)
class Scenario:
    """One decode step with a planted outcome.

    ``q`` [B, Hq, D] rotated queries at position ``kv_len - 1``; ``kv`` the cache, current token included; ``rings``
    with the ``W - 1`` rows before it; ``slots``, ``generations`` [B] int64; ``hit`` [B, Hkv] bool, groups planted as
    hits; ``matched_pos`` [B, Hq] int64, the nearest row; ``distance`` [B, Hq] fp32, as planted.
    """

    config: MacConfig
    rope: Rope
    q: torch.Tensor
    kv: PagedKV
    rings: RingPool
    slots: torch.Tensor
    generations: torch.Tensor
    hit: torch.Tensor
    matched_pos: torch.Tensor
    distance: torch.Tensor


def plant_step(
    config: MacConfig,
    layout: HeadLayout,
    *,
    kv_lens: Sequence[int],
    hit: float | torch.Tensor,
    rope: Rope,
    lag: tuple[int, int] = (1, 128),
    hit_fraction: tuple[float, float] = (0.6, 0.98),
    miss_ratio: tuple[float, float] = (1.02, 1.3),
    second_ratio: float = 1.09,
    influence_fraction: float = 0.7,
    rows: Literal["exact", "synthetic"] = "exact",
    num_layers: int = 1,
    page_size: int = 16,
    kv_layout: KVLayout = "NHD",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    store: PagedStore | None = None,
) -> Scenario:
    """Build a decode step in which chosen kv groups hit and the others narrowly miss.

    The ring rows lie around the query in the pre-RoPE frame. Up to four rows per kv group are near: the nearest of
    every head is one of them (one for the whole group with ``match_scope="group"``), the other three are at
    ``second_ratio`` or little more, and all other rows are farther out. At a missed group one random head is too far;
    the others are as near as at a hit. The first
    token becomes an attention sink as strong as the influence bound needs.

    Parameters
    ----------
    config, layout, rope
        Of the step; ``rope`` on ``device``.
    kv_lens : sequence of int
        Tokens per request, current one included; at least ``min_context + 1`` and ``window + band + sinks``.
    hit : float in [0, 1] or torch.Tensor, [B, Hkv] bool
        Share of groups that hit, scattered independently over requests and groups, or which.
    lag : tuple of int, default (1, 128)
        Range of ``m - p`` of the nearest row, cut at ``window - 1``.
    hit_fraction, miss_ratio : tuple of float
        Range of distance / cap of a near head and of the far head.
    second_ratio : float, default 1.09
        Second nearest to nearest distance.
    influence_fraction : float, default 0.7
        Weight bound x distance of a hit's heads as a share of the influence bound; above 1 it plants influence misses.
    rows : {"exact", "synthetic"}, default "exact"
        ``"exact"`` computes the rows' states with :func:`mac_kernels.fill_rings`; ``"synthetic"`` draws them, for
        benchmarks where only their cost counts.
    num_layers, page_size, kv_layout, dtype, device, seed
        Of rings, cache, queries and random numbers. Every layer gets the same rows.
    store : PagedStore, optional
        A filled cache to plant in again (its first keys are rewritten under an influence bound): filling one for a long
        context takes longer than the benchmark. Default: a new one with random keys and values.

    Raises
    ------
    InputError
        If a request is too short to hold the rows, or the influence bound is set without sinks.
    """
    batch, group = len(kv_lens), layout.group_size
    need = max(config.min_context + 1, config.window + config.band + config.sinks)
    if min(kv_lens) < need:
        raise InputError(f"kv_lens has {min(kv_lens)}; planting needs >= {need} tokens: window + band + sinks")
    if config.influence is not None and config.sinks < 1:
        raise InputError(f"sinks={config.sinks} must be >= 1 to plant under an influence bound; or set influence=None")
    generator = torch.Generator().manual_seed(seed)
    hits = torch.rand(batch, layout.num_kv_heads, generator=generator) < hit if isinstance(hit, float) else hit.cpu()
    lags, ratios = _plant_rows(hits, config, layout, lag, hit_fraction, miss_ratio, second_ratio, generator)
    cap = min(distance_cap(config, layout.head_dim), math.sqrt(2 * layout.head_dim))
    cap = cap if cap > 0 else math.sqrt(layout.head_dim)

    noise = torch.Generator(device=device).manual_seed(seed)
    heads, dim = layout.num_qo_heads, layout.head_dim
    kv_len = torch.tensor(kv_lens, device=device)
    position = kv_len - 1
    query = torch.randn(batch, heads, dim, generator=noise, device=device)
    q = rope.rotate(query, position).to(dtype)
    query = rope.unrotate(q, position)
    if store is None:
        store = random_store(
            kv_lens, layout, page_size=page_size, kv_layout=kv_layout, dtype=dtype, device=device, seed=seed
        )
    kv = store.kv(store.table(kv_lens))

    rings = RingPool(
        num_rings=batch,
        num_layers=num_layers,
        layout=layout,
        window=config.window,
        dtype=dtype,
        correction=config.correction,
        device=device,
    )
    poison_rings(rings)
    for slot in range(batch):
        rings.acquire(slot)
    slots = torch.arange(batch, device=device)
    generations = torch.zeros_like(slots)

    direction = torch.randn(batch, config.window - 1, heads, dim, generator=noise, device=device)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    row_q = query[:, None] + direction * (ratios * cap).to(device)[..., None]  # row i lies at lag i + 1
    for layer in range(num_layers):
        _fill(rows, layer, row_q, store, kv_lens, rings, slots, generations, rope, config, dtype, noise)
    matched_pos = position[:, None] - lags.to(device)
    distance = (ratios.gather(1, lags[:, None] - 1)[:, 0] * cap).to(device)
    if config.influence is not None:
        _strengthen_sink(store, rings, query, q, matched_pos, distance, config, influence_fraction, group)
    return Scenario(config, rope, q, kv, rings, slots, generations, hits.to(device), matched_pos, distance)


def _plant_rows(
    hits: torch.Tensor,
    config: MacConfig,
    layout: HeadLayout,
    lag: tuple[int, int],
    hit_fraction: tuple[float, float],
    miss_ratio: tuple[float, float],
    second_ratio: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lag of the nearest row [B, Hq] and distance / cap of every row [B, W - 1, Hq], row i at lag i + 1."""
    batch, kv_heads, group, count = *hits.shape, layout.group_size, config.window - 1
    low, high = max(1, min(lag[0], count)), max(1, min(lag[1], count))
    shuffled = torch.rand(batch, kv_heads, high - low + 1, generator=generator).argsort(-1) + low
    near = shuffled[..., :_NEAR_ROWS]  # [B, Hkv, R] lags
    shape = (batch, kv_heads, group if config.match_scope == "head" else 1)
    choice = torch.randint(near.shape[-1], shape, generator=generator).expand(batch, kv_heads, group)
    lags = near.gather(-1, choice).reshape(batch, -1)

    nearest = _uniform((batch, kv_heads, group), hit_fraction, generator)
    far_head = torch.randint(group, (batch, kv_heads, 1), generator=generator)
    far = torch.arange(group).expand(batch, kv_heads, group) == far_head
    nearest = torch.where(far & ~hits[..., None], _uniform(nearest.shape, miss_ratio, generator), nearest)
    nearest = nearest.reshape(batch, -1)

    # in group scope no other row may be nearer by its worst head
    base = nearest if config.match_scope == "head" else _worst(nearest, group)
    shape = (batch, count, kv_heads * group)
    is_near = torch.stack([_at(row, count) for row in near.unbind(-1)]).any(0).repeat_interleave(group, dim=2)
    spread = torch.rand(shape, generator=generator)
    spread = torch.where(is_near, 0.05 * spread, 0.15 + spread)
    return lags, torch.where(_at(lags, count), nearest[:, None], base[:, None] * (second_ratio + spread))


def _at(lags: torch.Tensor, count: int) -> torch.Tensor:
    return torch.arange(1, count + 1)[None, :, None] == lags[:, None]


def _worst(ratio: torch.Tensor, group: int) -> torch.Tensor:
    return ratio.view(ratio.shape[0], -1, group).amax(-1).repeat_interleave(group, dim=1)


def _uniform(shape: Sequence[int], between: tuple[float, float], generator: torch.Generator) -> torch.Tensor:
    return between[0] + (between[1] - between[0]) * torch.rand(tuple(shape), generator=generator)


def random_store(
    kv_lens: Sequence[int],
    layout: HeadLayout,
    *,
    page_size: int = 16,
    kv_layout: KVLayout = "NHD",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> PagedStore:
    """A cache with random keys and values of unit variance for every request."""
    generator, noise = torch.Generator().manual_seed(seed), torch.Generator(device=device).manual_seed(seed)
    store = PagedStore(
        len(kv_lens),
        max(kv_lens),
        layout,
        page_size=page_size,
        kv_layout=kv_layout,
        dtype=dtype,
        device=device,
        generator=generator,
    )
    for request, length in enumerate(kv_lens):
        shape = (length, layout.num_kv_heads, layout.head_dim)
        k, v = (torch.randn(shape, generator=noise, device=device, dtype=torch.float32) for _ in range(2))
        store.write(request, 0, k, v)
    return store


def _fill(
    rows: str,
    layer: int,
    row_q: torch.Tensor,
    store: PagedStore,
    kv_lens: Sequence[int],
    rings: RingPool,
    slots: torch.Tensor,
    generations: torch.Tensor,
    rope: Rope,
    config: MacConfig,
    dtype: torch.dtype,
    noise: torch.Generator,
) -> None:
    """Store the rows ``m - W + 1 .. m - 1`` of every request."""
    batch, count = row_q.shape[:2]
    position = torch.tensor(kv_lens, device=row_q.device)[:, None] - 1 - torch.arange(count, 0, -1, device=row_q.device)
    row_q = row_q.flip(1)  # oldest first
    if rows == "exact":
        prompt = store.kv(store.table([length - 1 for length in kv_lens]))
        q = rope.rotate(row_q, position).to(dtype).flatten(0, 1)
        indptr = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * count
        fill_rings(
            q, indptr, prompt, rings=rings, layer=layer, slots=slots, generations=generations, rope=rope, config=config
        )
        return
    for request in range(batch):
        draw = [torch.randn(row_q[request].shape, generator=noise, device=row_q.device) for _ in range(2)]
        covered = (covered_end(position[request], band=config.band, sinks=config.sinks) - config.sinks).float()
        lse2 = covered.log2()[:, None].expand(-1, row_q.shape[2])
        shrink = covered.rsqrt()[:, None, None]
        state = AttnState(draw[0] * shrink, lse2, draw[1] * shrink if rings.correction else None)
        anchor = position[request][:, None].expand(-1, rings.layout.num_kv_heads)
        ring = slots[request].expand(count)
        rings.write(layer, ring, position[request], q_pre=row_q[request], state=state, anchor=anchor)


def _strengthen_sink(
    store: PagedStore,
    rings: RingPool,
    query: torch.Tensor,
    q: torch.Tensor,
    matched_pos: torch.Tensor,
    distance: torch.Tensor,
    config: MacConfig,
    influence_fraction: float,
    group: int,
) -> None:
    """Set the first key so that weight x distance / sqrt(2D) of the matched rows is the wanted share of the bound.

    The band's mass is left out, so the weight comes out a little lower.
    """
    assert config.influence is not None
    batch, heads, dim = query.shape
    ring = torch.arange(batch, device=query.device)
    row = matched_pos % config.window
    state = rings.state(0, ring, row)
    if config.correction:
        index = (0, ring[:, None], row, torch.arange(heads, device=row.device))
        state = correct(state, query, rings.fields["q_pre"][index].float(), sm_scale=dim**-0.5)
    weight = (influence_fraction * config.influence * math.sqrt(2 * dim) / distance).clamp(max=0.999)
    logit = (state.lse2 + (1 / weight - 1).log2()) / math.log2(math.e)
    wanted = (logit * dim**0.5).view(batch, -1, group)
    grouped = q.float().view(batch, -1, group, dim)
    first_key = (torch.linalg.pinv(grouped.cpu()) @ wanted.cpu()[..., None])[..., 0]
    value = torch.zeros(1, rings.layout.num_kv_heads, dim)
    for request in range(batch):
        store.write(request, 0, first_key[request][None], value)
