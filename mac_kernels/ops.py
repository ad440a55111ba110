"""The decode step and the prompt fill as PyTorch operators: what ``torch.compile`` sees of them.

An operator takes every tensor that it reads or writes and declares what it writes, so that a compiler may reorder,
replace and reuse memory around it. What is not a tensor (a planned wrapper, a pool of rings, a rotation) is named by
the number under which it was registered.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import MacConfig
from .handles import registered
from .paged import PagedKV, PageTable, RowTable, Scale, Table
from .types import KVLayout

if TYPE_CHECKING:
    from .decode import BatchMacDecodeWithPagedKVCacheWrapper
    from .ring import RingPool
    from .rope import Rope


@torch.library.custom_op("mac_kernels::decode", mutates_args=("rows", "out"))
def decode_op(
    q: Tensor,
    cache: Sequence[Tensor],
    table: Sequence[Tensor],
    owners: Sequence[Tensor],
    rows: Sequence[Tensor],
    out: Tensor,
    *,
    scales: Sequence[float],
    wrapper: int,
    rings: int,
    layer: int,
) -> None:
    """One decode step.

    ``cache`` (k, v, and two device scalars unless ``scales`` holds two numbers); ``owners`` (slots, generations);
    ``rows`` all that a pool of rings holds.
    """
    pool: RingPool = registered(rings)
    planned: BatchMacDecodeWithPagedKVCacheWrapper = registered(wrapper)
    k_cache, v_cache, *scalars = cache
    k_scale, v_scale = scalars or scales
    planned.run_in_graph(
        q,
        (k_cache, v_cache),
        rings=_over(pool, rows),
        layer=layer,
        slots=owners[0],
        generations=owners[1],
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
        table=table,
    )


@decode_op.register_fake
def _(*_args: object, **_named: object) -> None:
    return None


@torch.library.custom_op("mac_kernels::fill", mutates_args=("rows",))
def fill_op(
    q: Tensor,
    qo_indptr: Tensor,
    cache: Sequence[Tensor],
    table: Sequence[Tensor],
    owners: Sequence[Tensor],
    rows: Sequence[Tensor],
    *,
    scales: Sequence[float],
    rope: int,
    rings: int,
    layer: int,
    page_size: int,
    kv_layout: str,
    ranges: Sequence[int],
    sm_scale: float | None,
    logits_soft_cap: float,
    max_kv_len: int | None,
    backend: str,
) -> None:
    """The prompt fill: ``page_size`` 0 stands for rows of token slots, ``ranges`` for window, band and sinks."""
    from .prefill import fill_rings

    pool: RingPool = registered(rings)
    begin, pages, lengths = table
    whole: Table = PageTable(begin, pages, lengths, page_size) if page_size else RowTable(pages, begin, lengths)
    k_cache, v_cache, *scalars = cache
    k_scale, v_scale = scalars or scales
    window, band, sinks = ranges
    config = MacConfig(
        window=window,
        band=band,
        sinks=sinks,
        min_context=band + sinks + 1,
        correction=pool.correction,
        nominees=1 if pool.sketch_dim else None,
        tca=None if pool.index is None else pool.index.config,
    )
    fill_rings(
        q,
        qo_indptr,
        PagedKV(k_cache, v_cache, whole, pool.layout, _layout_name(kv_layout), k_scale, v_scale),
        rings=_over(pool, rows),
        layer=layer,
        slots=owners[0],
        generations=owners[1],
        rope=registered(rope),
        config=config,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        max_kv_len=max_kv_len,
        backend=backend,  # type: ignore[arg-type]  # an operator passes it as a plain str
    )


@fill_op.register_fake
def _(*_args: object, **_named: object) -> None:
    return None


def decode(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    table: Table,
    *,
    wrapper: int,
    rings: RingPool,
    layer: int,
    slots: Tensor,
    generations: Tensor,
    k_scale: Scale | None,
    v_scale: Scale | None,
    out: Tensor | None,
) -> Tensor:
    """:meth:`BatchMacDecodeWithPagedKVCacheWrapper.run` as one operator call."""
    out = torch.empty_like(q) if out is None else out
    scalars, numbers = _scales(k_scale, v_scale)
    owners, rows = [slots, generations], _written(rings)
    decode_op(
        q,
        [*cache, *scalars],
        list(table.pointers),
        owners,
        rows,
        out,
        scales=numbers,
        wrapper=wrapper,
        rings=rings.number,
        layer=layer,
    )
    return out


def fill(
    q: Tensor,
    qo_indptr: Tensor,
    kv: PagedKV,
    *,
    rings: RingPool,
    layer: int,
    slots: Tensor,
    generations: Tensor,
    rope: Rope,
    config: MacConfig,
    sm_scale: float | None,
    logits_soft_cap: float,
    max_kv_len: int | None,
    backend: str,
) -> None:
    """:func:`mac_kernels.fill_rings` as one operator call."""
    scalars, numbers = _scales(kv.k_scale, kv.v_scale)
    fill_op(
        q,
        qo_indptr,
        [kv.k_cache, kv.v_cache, *scalars],
        list(kv.table.pointers),
        [slots, generations],
        _written(rings),
        scales=numbers,
        rope=rope.number,
        rings=rings.number,
        layer=layer,
        page_size=kv.table.page_size if kv.table.row_stride == 0 else 0,
        kv_layout=kv.kv_layout,
        ranges=[config.window, config.band, config.sinks],
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        max_kv_len=max_kv_len,
        backend=backend,
    )


def _written(rings: RingPool) -> list[Tensor]:
    """All that a decode step writes: row fields, counters, bypass."""
    return [*rings.fields.values(), rings.counters.values, rings.bypass.values]


def _over(rings: RingPool, tensors: Sequence[Tensor]) -> RingPool:
    """The pool with other memory for what a step writes; itself if it is the same memory."""
    if all(new.data_ptr() == own.data_ptr() for new, own in zip(tensors, _written(rings), strict=True)):
        return rings
    pool = copy.copy(rings)
    *fields, counts, record = tensors
    pool.fields = dict(zip(rings.fields, fields, strict=True))
    pool.counters, pool.bypass = copy.copy(rings.counters), copy.copy(rings.bypass)
    pool.counters.values, pool.bypass.values = counts, record
    return pool


def _scales(k_scale: Scale | None, v_scale: Scale | None) -> tuple[list[Tensor], list[float]]:
    """Scales as two device scalars or as two numbers."""
    if isinstance(k_scale, Tensor) and isinstance(v_scale, Tensor):
        return [k_scale, v_scale], []
    if isinstance(k_scale, Tensor) or isinstance(v_scale, Tensor):
        raise TypeError("k_scale and v_scale must be two numbers or two device scalars")
    return [], [1.0 if k_scale is None else k_scale, 1.0 if v_scale is None else v_scale]


def _layout_name(name: str) -> KVLayout:
    return "NHD" if name == "NHD" else "HND"
