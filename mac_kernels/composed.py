"""The decode step composed of FlashInfer's parts: Triton matches and completes, FlashInfer attends."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .attend.flashinfer import RangeAttention, Ranges, Scores
from .attend.flashinfer_tiles import MIN_CHUNK, STEP, most_tiles, tiles_kernel
from .complete.triton import complete_kernel
from .config import MacConfig
from .errors import InputError
from .fused import Arguments, FusedStep, kv_arguments, ring_arguments, taken_by
from .launch import LaunchParams, chunk_d, default_launch, is_small
from .match.triton_decide import decide_kernel
from .match.triton_scan import scan_kernel
from .paged import PagedKV, RowTable, Table
from .planning import Planned
from .ring import RingPool

_TILE_WARPS = 4
_TILE_NUMBERS = 8192  # of queries that a program copies at once
_BLOCKS_PER_SM = 2  # of FlashInfer's kernel at once
_MOST_SPLITS = 4  # of sinks and band: less than a tile of FlashInfer's kernel is no faster


@dataclass(frozen=True, slots=True)
class _Attention:
    """FlashInfer's calls for one pair of dtypes, and the tensors of that dtype between them and our kernels."""

    always: RangeAttention
    rest: RangeAttention
    always_q: torch.Tensor
    always_out: torch.Tensor
    tile_q: torch.Tensor
    tile_out: torch.Tensor
    tile_key: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Launches:
    """Arguments of our four kernels that do not change from step to step."""

    rings: RingPool
    scan: Arguments
    decide: Arguments
    tiles: Arguments
    complete: Arguments


class ComposedStep(FusedStep):
    """Workspace and calls of one planned batch.

    The first :meth:`run` for a pair of dtypes compiles and plans FlashInfer's calls (it may sync and allocate); after
    that nothing is allocated, nothing syncs, and a CUDA graph can capture it.

    Parameters
    ----------
    planned : Planned
        The values of its table may change between runs, its batch size may not.
    """

    def __init__(self, planned: Planned) -> None:
        table, layout, config = planned.table, planned.layout, planned.config
        batch, device = table.batch_size, table.device
        groups = batch * layout.num_kv_heads
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        self._apart = is_small(groups, sms)
        super().__init__(planned, launch=composed_launch(groups, config, sms, table.page_size, small=self._apart))
        splits = self.launch.splits
        self._attentions: dict[tuple[torch.dtype, torch.dtype, str], _Attention] = {}
        self._launches: dict[tuple[object, ...], _Launches] = {}
        self._scores = Scores(planned.sm_scale, planned.logits_soft_cap)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._entries = ints(batch * (config.sinks + config.band))
        self._always_ranges = Ranges(ints(splits * groups, 4), ints(layout.group_size), 0)
        self._always_lse = torch.zeros(splits * batch, layout.num_qo_heads, device=device)
        self._tiles = most_tiles(batch, layout.num_kv_heads, self.programs)
        places = self._tiles * layout.num_kv_heads
        self._rest_ranges = Ranges(ints(places, 4), ints(places, layout.group_size), layout.group_size)
        self._rest_ranges.bounds[:, 2] = torch.arange(places, dtype=torch.int32, device=device)
        self._tile_lse = torch.zeros(self._tiles, layout.num_qo_heads, device=device)
        self._spare_lse = torch.zeros_like(self._tile_lse)
        self._table_begin = ints(batch)
        self._table_entries = flat_entries(table)
        self._scan_splits = -(-config.window // self.launch.block_rows)
        self._scan_programs = groups * (self._scan_splits + (2 if self._apart else 0))

    def run(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        rings: RingPool,
        *,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Match, attend and complete ``q`` [B, Hq, D]; writes ``out`` and the ring rows."""
        k, v, layout = kv.k_cache, kv.v_cache, self._planned.layout
        attention = self._attention(q.dtype, kv)
        form = (layer, k.stride(), v.stride(), k.dtype, q.dtype)
        bound = self._launches.get(form)
        if bound is None or bound.rings is not rings:
            bound = self._launches[form] = self._bind_launches(q, kv, rings, layer, attention)
        tokens = token_view(kv, k), token_view(kv, v)
        stride_b, stride_h, _ = q.stride()
        scan_kernel[(self._scan_programs,)](q, stride_b, stride_h, slots, generations, **bound.scan)
        attention.always.run(
            attention.always_q,
            tokens,
            self._always_ranges,
            self._scores,
            out=attention.always_out,
            lse2=self._always_lse,
            k_scale=kv.k_scale,
            v_scale=kv.v_scale,
            pdl=self._pdl,
        )
        decide_kernel[(self._groups,)](q, stride_b, stride_h, slots, generations, **bound.decide)
        tiles_kernel[(self._tiles,)](q, stride_b, stride_h, **bound.tiles)
        self._attend_to_rest(kv, attention, with_keys=rings.correction)
        chunks = bound.complete["BLOCK_D"] // bound.complete["CHUNK_D"]
        programs = self._groups * layout.group_size * chunks
        complete_kernel[(programs,)](out, out.stride(0), out.stride(1), **bound.complete)

    def _attend_to_rest(self, kv: PagedKV, attention: _Attention, *, with_keys: bool) -> None:
        """Amended and missed ranges in one call; with keys as values in a second one, their weighted mean."""
        k, v = kv.k_cache, kv.v_cache
        attend = functools.partial(
            attention.rest.run,
            attention.tile_q,
            ranges=self._rest_ranges,
            scores=self._scores,
            k_scale=kv.k_scale,
            pdl=self._pdl,
        )
        attend((k, v), out=attention.tile_out, lse2=self._tile_lse, v_scale=kv.v_scale)
        if with_keys:
            attend((k, k), out=attention.tile_key, lse2=self._spare_lse, v_scale=kv.k_scale)

    def _attention(self, q_dtype: torch.dtype, kv: PagedKV) -> _Attention:
        key = (q_dtype, kv.k_cache.dtype, kv.kv_layout)
        if key not in self._attentions:
            self._attentions[key] = self._plan_attention(q_dtype, kv)
        return self._attentions[key]

    def _plan_attention(self, q_dtype: torch.dtype, kv: PagedKV) -> _Attention:
        check_cache(kv)
        planned, device = self._planned, self._entries.device
        batch, layout = planned.table.batch_size, planned.layout
        plan: Any = functools.partial(RangeAttention, layout=layout, q_dtype=q_dtype, kv_dtype=kv.k_cache.dtype)

        rows, entries = self.launch.splits * batch, self._entries.numel() // batch
        ascending = torch.arange(max(rows, self._tiles) + 1, dtype=torch.int32, device=device)

        def zeros(rows: int) -> torch.Tensor:
            return torch.zeros(rows, layout.num_qo_heads, layout.head_dim, dtype=q_dtype, device=device)

        always = plan(ascending[: rows + 1].clone(), indices=self._entries, page_size=1, kv_layout="NHD")
        always.begin[:-1] = ascending[:rows] % batch * entries
        rest = plan(
            ascending[: self._tiles + 1].clone(),
            indices=self._table_entries,
            page_size=planned.table.page_size,
            kv_layout=kv.kv_layout,
        )
        rest.begin[:-1] = 0  # every range may lie anywhere in the table
        return _Attention(
            always,
            rest,
            always_q=zeros(rows),
            always_out=zeros(rows),
            tile_q=zeros(self._tiles),
            tile_out=zeros(self._tiles),
            tile_key=zeros(self._tiles),
        )

    def _bind_launches(
        self, q: torch.Tensor, kv: PagedKV, rings: RingPool, layer: int, attention: _Attention
    ) -> _Launches:
        check_cache(kv)
        layout, config, launch = self._planned.layout, self._planned.config, self.launch
        batch, block_h = self._planned.table.batch_size, triton.next_power_of_2(layout.num_kv_heads)
        values: Arguments = {
            **self._workspace,
            **kv_arguments(kv, q.dtype),
            **ring_arguments(rings, layer),
            **self._rule(layer),
            "PDL": self._pdl,
            "always_q_ptr": attention.always_q,
            "always_out_ptr": attention.always_out,
            "ALWAYS_GROUP": 1,
            "ALWAYS_SPLIT": self._groups,
            "always_lse_ptr": self._always_lse,
            "part_out_ptr": attention.tile_out,
            "part_key_ptr": attention.tile_key,
            "part_lse_ptr": self._tile_lse,
            "PART_STRIDE": layout.num_kv_heads,
            "PARTS_ARE_OLDER": True,
            "entry_ptr": self._entries,
            "always_bounds_ptr": self._always_ranges.bounds,
            "entries_begin_ptr": self._table_begin,
            "tile_q_ptr": attention.tile_q,
            "tile_bounds_ptr": self._rest_ranges.bounds,
            "tile_start_ptr": self._rest_ranges.starts,
            "batch_size": batch,
            "tiles": self._tiles,
            "MIN_CHUNK": MIN_CHUNK,
            "STEP": STEP,
            "page_units": page_units(kv),
            "BLOCK_E": triton.next_power_of_2(config.sinks + config.band),
            "BLOCK_H": block_h,
            "BLOCK_B": triton.next_power_of_2(batch),
            "BLOCK_R": min(launch.block_rows, triton.next_power_of_2(config.window)),
            "SCAN_SPLITS": self._scan_splits,
            "APART": self._apart,
            "SCAN_IS_OLDER": True,
            "BLOCK_P": launch.block_parts,
        }
        at_once = _TILE_NUMBERS // (block_h * values["BLOCK_D"])
        values["CHUNK_D"] = chunk_d(launch.complete_splits, values["BLOCK_D"])
        values["HEADS_AT_ONCE"] = max(1, min(values["BLOCK_G"], at_once))

        def bind(kernel: Any, warps: int) -> Arguments:
            pdl = {"launch_pdl": True} if self._pdl else {}
            return {**taken_by(kernel, values), **pdl, "num_warps": warps}

        return _Launches(
            rings,
            scan=bind(scan_kernel, launch.scout_warps),
            decide=bind(decide_kernel, launch.decide_warps),
            tiles=bind(tiles_kernel, _TILE_WARPS),
            complete=bind(complete_kernel, launch.complete_warps),
        )


def composed_launch(num_groups: int, config: MacConfig, num_sms: int, page_size: int, *, small: bool) -> LaunchParams:
    """:func:`default_launch`, but for what FlashInfer's kernel does; measured on an H100.

    Nothing runs beside the scan, so in a small batch its programs are many and short.
    """
    launch = default_launch(num_groups, config, num_sms, page_size)
    if small:
        launch = dataclasses.replace(launch, block_rows=32)
    return dataclasses.replace(launch, splits=min(launch.splits, _MOST_SPLITS), programs_per_sm=_BLOCKS_PER_SM)


def flat_entries(table: Table) -> torch.Tensor:
    """All entries of a table in one dimension, without a copy.

    Raises
    ------
    InputError
        If they are not int32, which FlashInfer needs, or name too many tokens to be counted in it.
    """
    _, pages, _ = table.pointers
    if isinstance(table, RowTable):
        rows, columns = pages.shape
        pages = pages.as_strided(((rows - 1) * table.row_stride + columns,), (1,))
    if pages.dtype != torch.int32:
        raise InputError(f"FlashInfer reads int32 page tables, got {pages.dtype}; convert the table with .int()")
    if pages.numel() * table.page_size >= 2**31:
        raise InputError(
            f"positions in the whole page table must be below 2^31, got {pages.numel()} pages of {table.page_size} "
            "tokens; use backend='triton'"
        )
    return pages


def token_stride(kv: PagedKV) -> int:
    """Elements from one token of a page to the next."""
    if kv.table.page_size == 1:
        return kv.k_cache.stride(0)  # that of a dim of one element may be anything
    return kv.k_cache.stride(1 if kv.kv_layout == "NHD" else 2)


def page_units(kv: PagedKV) -> int:
    """Token strides from one page to the next."""
    return kv.k_cache.stride(0) // token_stride(kv)


def token_view(kv: PagedKV, cache: torch.Tensor) -> torch.Tensor:
    """The cache as pages of one token in the layout NHD, whatever its own is; entries overlap, and are only read.

    Entry ``page * page_units + slot`` is a token; with several heads between two tokens of a page, or none, other
    entries name nothing.
    """
    stride, heads = token_stride(kv), kv.layout.num_kv_heads
    count = (cache.shape[0] - 1) * page_units(kv) + kv.table.page_size
    head_stride = cache.stride(2 if kv.kv_layout == "NHD" else 1)
    return cache.as_strided((count, 1, heads, kv.layout.head_dim), (stride, stride, head_stride, 1))


def check_cache(kv: PagedKV) -> None:
    """Check that FlashInfer can address a cache.

    Raises
    ------
    InputError
        If keys and values lie differently in memory, or pages are no whole number of tokens apart.
    """
    k, v = kv.k_cache, kv.v_cache
    if k.stride() != v.stride():
        raise InputError(
            f"FlashInfer needs k_cache and v_cache of equal strides, got {k.stride()} and {v.stride()}; "
            "allocate both alike or use backend='triton'"
        )
    if k.stride(0) % token_stride(kv) or k.shape[0] * page_units(kv) >= 2**31:
        raise InputError(
            f"pages lie {k.stride(0)} elements apart, tokens {token_stride(kv)}: the first must be a multiple of the "
            "second and their ratio times the number of pages below 2^31; use backend='triton'"
        )
