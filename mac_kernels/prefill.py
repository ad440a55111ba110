"""Fill ring rows from a prompt, so that the first decode steps can already reuse."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch

from . import ops
from .attend.reference import shared_attention
from .config import MacConfig
from .errors import InputError, require_contiguous
from .paged import SUPPORTED_DTYPES, PagedKV
from .ring import RingPool
from .rope import Rope
from .slots import check_slots
from .support import Backend, resolve_backend
from .types import AttnState, covered_end

_QUERIES_PER_BLOCK = 64  # bounds the logits that are held at once


def fill_rings(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv: PagedKV,
    *,
    rings: RingPool,
    layer: int,
    slots: torch.Tensor,
    generations: torch.Tensor,
    rope: Rope,
    config: MacConfig | None = None,
    sm_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    max_kv_len: int | None = None,
    backend: Literal["auto"] | Backend = "auto",
) -> None:
    """Store exact states for the last ``W`` queries of every request of a prefill chunk.

    Call it for every chunk: the rows of later chunks take the place of earlier ones. The state of position ``t`` is
    computed over ``[F, E(t))`` directly, never by subtracting the band from the full state.

    Parameters
    ----------
    q : torch.Tensor, [nnz_q, Hq, D], fp32, bf16 or fp16
        Queries of the chunk after RoPE, requests one after the other.
    qo_indptr : torch.Tensor, [B + 1] int32
        Where each request's queries begin; its last query is at position ``kv_len - 1``.
    kv : PagedKV
        Keys and values, those of the chunk included.
    rings, layer, slots, generations, rope, config, sm_scale, logits_soft_cap
        As for :meth:`BatchMacDecodeWithPagedKVCacheWrapper.run`.
    max_kv_len : int, optional, tokens
        Upper bound of the context. Without it a GPU backend asks the device (a host sync).
    backend : {"auto", "triton", "flashinfer", "reference"}, default "auto"
        As for the decode wrapper; ``"flashinfer"`` fills with the Triton kernel.

    Raises
    ------
    InputError
        If shapes or lengths disagree, or the rings do not fit.
    UnsupportedError
        If the named backend cannot run the configuration.
    """
    config = MacConfig() if config is None else config
    if torch.compiler.is_compiling():
        ops.fill(
            q,
            qo_indptr,
            kv,
            rings=rings,
            layer=layer,
            slots=slots,
            generations=generations,
            rope=rope,
            config=config,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            max_kv_len=max_kv_len,
            backend=backend,
        )
        return
    sm_scale = 1 / math.sqrt(kv.layout.head_dim) if sm_scale is None else sm_scale
    rings.check_fits(layer, kv.layout, config)
    check_slots(slots, generations, kv.table.batch_size)
    dtypes = q.dtype, kv.k_cache.dtype
    chosen = resolve_backend(backend, config, kv.layout, q.device, dtypes=dtypes)[0]
    _check_shapes(q, qo_indptr, kv)
    if q.device.type == "cpu":  # on a GPU this would sync; there the lengths are the caller's to keep right
        _check_lengths(q, qo_indptr, kv)
        kv.table.check(num_pages=kv.k_cache.shape[0])
    if chosen != "reference":
        from .fused_fill import fused_fill  # imports triton, which the reference backend does not need

        with torch.cuda.device(q.get_device()):  # where kernels are launched; -1 on a CPU does nothing
            fused_fill(
                q,
                qo_indptr,
                kv,
                rings,
                layer=layer,
                slots=slots,
                generations=generations,
                config=config,
                rope=rope,
                sm_scale=sm_scale,
                logits_soft_cap=logits_soft_cap,
                max_kv_len=int(kv.table.kv_len().max()) if max_kv_len is None else max_kv_len,
            )
        return
    _fill_reference(q, qo_indptr, kv, rings, layer, slots, generations, config, rope, sm_scale, logits_soft_cap)


def _fill_reference(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv: PagedKV,
    rings: RingPool,
    layer: int,
    slots: torch.Tensor,
    generations: torch.Tensor,
    config: MacConfig,
    rope: Rope,
    sm_scale: float,
    logits_soft_cap: float,
) -> None:
    ring = rings.lookup(slots, generations)
    kv_len = kv.table.kv_len()
    for request, (begin, end) in enumerate(zip(qo_indptr[:-1].tolist(), qo_indptr[1:].tolist(), strict=True)):
        length = int(kv_len[request])
        if int(ring[request]) < 0 or end == begin:
            continue
        count = min(end - begin, config.window)
        first = length - count
        k, v = kv.only(request).gather(kv_len.new_zeros(1), length)
        for low in range(first, length, _QUERIES_PER_BLOCK):
            position = torch.arange(low, min(low + _QUERIES_PER_BLOCK, length), device=q.device)
            queries = q[end - length + position]
            state = _states(queries, position, k, v, rings, config, sm_scale, logits_soft_cap)
            if state.kbar is not None:
                state = state._replace(kbar=rope.pull_back(state.kbar, position))
            rings.write(
                layer,
                ring[request].expand(len(position)),
                position,
                q_pre=rope.unrotate(queries, position),
                state=state,
                anchor=position[:, None].expand(-1, kv.layout.num_kv_heads),
            )


def _states(
    queries: torch.Tensor,
    position: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rings: RingPool,
    config: MacConfig,
    sm_scale: float,
    logits_soft_cap: float,
) -> AttnState:
    """States of a block of queries [N, Hq, D] over ``[F, E(t))``."""
    stop = covered_end(position, band=config.band, sinks=config.sinks)
    key = torch.arange(k.shape[1], device=k.device)
    mask = (key >= config.sinks) & (key < stop[:, None])  # [N, L]
    return shared_attention(
        queries,
        k,
        v,
        mask[:, None].expand(-1, queries.shape[1], -1),
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
        return_kbar=rings.correction,
    )


def _check_shapes(q: torch.Tensor, qo_indptr: torch.Tensor, kv: PagedKV) -> None:
    if qo_indptr.shape != (kv.table.batch_size + 1,):
        raise InputError(
            f"qo_indptr must be [{kv.table.batch_size + 1}] for {kv.table.batch_size} requests, "
            f"got {list(qo_indptr.shape)}"
        )
    if q.shape[1:] != (kv.layout.num_qo_heads, kv.layout.head_dim) or q.dtype not in SUPPORTED_DTYPES:
        raise InputError(
            f"q must be [nnz_q, {kv.layout.num_qo_heads}, {kv.layout.head_dim}] in fp32, bf16 or fp16, "
            f"got {list(q.shape)} {q.dtype}; check the layout"
        )
    require_contiguous("q", q)
    require_contiguous("qo_indptr", qo_indptr)


def _check_lengths(q: torch.Tensor, qo_indptr: torch.Tensor, kv: PagedKV) -> None:
    bounds = qo_indptr.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or any(b < a for a, b in itertools.pairwise(bounds)):
        raise InputError(
            f"qo_indptr must rise from 0 to the {q.shape[0]} rows of q, got {bounds[0]} .. {bounds[-1]}; check lengths"
        )
    for request, length in enumerate(kv.table.kv_len().tolist()):
        if bounds[request + 1] - bounds[request] > length:
            raise InputError(
                f"request {request} has {bounds[request + 1] - bounds[request]} queries but only {length} cached "
                "tokens; write the chunk's keys and values first"
            )
