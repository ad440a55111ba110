"""Sparse decode through FlashInfer: every (request, kv head) is a request of its own with pages of one token.

Selection, compaction and prefill have no counterpart in FlashInfer; :mod:`.fused` has them. A prefill would need a
table of its own for every query tile, several hundred times the tokens that are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import torch
import triton

from ..attend.flashinfer import FP8_DTYPES, HEAD_DIMS, QUERY_DTYPES, flashinfer_version
from ..errors import UnsupportedError
from ..fused import kv_arguments, taken_by
from ..paged import PagedKV
from ..types import AttnState
from .fused import far_arguments
from .select import FarSet
from .triton_entries import entries_kernel

_WORKSPACE = 128 * 2**20  # bytes, what FlashInfer recommends
_EMPTY_LSE2 = -3e4  # before 0.7.0, FlashInfer says -5e4 where nothing was attended to
_ALIGNMENT = 16  # bytes of a load
_BLOCK = 1024


def unsupported_reasons(q_dtype: torch.dtype, kv: PagedKV) -> tuple[str, ...]:
    """Return every reason why FlashInfer cannot attend to this cache; empty if it can."""
    dtypes, unit = (q_dtype, *FP8_DTYPES), _unit(kv)
    rows, known = _rows(kv.k_cache, unit), ", ".join(map(str, HEAD_DIMS))
    checks = (
        (flashinfer_version() is not None, "flashinfer-python is missing (pip install 'mac-kernels[flashinfer]')"),
        (kv.layout.head_dim in HEAD_DIMS, f"head_dim={kv.layout.head_dim} (kernels for {known})"),
        (q_dtype in QUERY_DTYPES, f"{q_dtype} queries (bf16 or fp16)"),
        (kv.k_cache.dtype in dtypes, f"a {kv.k_cache.dtype} cache (the dtype of the queries, or fp8)"),
        (not isinstance(kv.k_scale, torch.Tensor), "k_scale and v_scale on the device (numbers)"),
        (kv.k_cache.stride() == kv.v_cache.stride(), "keys and values of different strides (alike)"),
        (unit * kv.itemsize % _ALIGNMENT == 0, f"rows {unit * kv.itemsize} bytes apart (a multiple of {_ALIGNMENT})"),
        (rows < 2**31, f"{rows} rows (less than 2^31)"),
    )
    return tuple(reason for good, reason in checks if not good)


def sparse_decode(
    q: torch.Tensor, kv: PagedKV, far: FarSet, *, sm_scale: float, logits_soft_cap: float = 0.0
) -> AttnState:
    """As :func:`mac_kernels.tca.sparse_decode`, the output in the dtype of the queries.

    FlashInfer plans on the host, and lengths differ by layer and grow by step: every call asks the device for them and
    plans anew, so no CUDA graph can capture it. The first call for a pair of dtypes compiles for about half a minute;
    FlashInfer keeps the result on disk.

    Raises
    ------
    UnsupportedError
        For the :func:`unsupported_reasons`.
    """
    layout, groups = kv.layout, len(q) * kv.layout.num_kv_heads
    reasons = unsupported_reasons(q.dtype, kv)
    if reasons:
        raise UnsupportedError("TCA on backend 'flashinfer'", reasons, "Use mac_kernels.tca.fused.")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not groups:
        return AttnState(out, lse2)
    # it also waits for the plan before, which FlashInfer copies to the device from memory that the next one overwrites
    own = dataclasses.replace(far, ids=far.ids[:, :, :0]).of_batch()
    kept = (own.count + kv.table.kv_len()[:, None] - own.far_end).flatten().tolist()
    begin = torch.tensor([0, *itertools.accumulate(kept)], dtype=torch.int32)
    entries = torch.empty(max(int(begin[-1]), 1), dtype=torch.int32, device=q.device)
    unit = _unit(kv)
    _list_entries(kv, far, begin.to(q.device), entries, max(kept), unit)
    wrapper = _wrapper(q.device)
    wrapper.plan(
        begin,
        entries,
        torch.ones(groups, dtype=torch.int32),
        layout.group_size,
        1,
        layout.head_dim,
        1,
        q_data_type=q.dtype,
        kv_data_type=kv.k_cache.dtype,
        sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap,
    )
    wrapper.run(
        q.reshape(groups, layout.group_size, layout.head_dim),
        tuple(_as_rows(cache, unit) for cache in (kv.k_cache, kv.v_cache)),
        k_scale=kv.k_scale,
        v_scale=kv.v_scale,
        out=out.view(groups, layout.group_size, layout.head_dim),
        lse=lse2.view(groups, layout.group_size),
        return_lse=True,
    )
    return AttnState(out, torch.threshold(lse2, _EMPTY_LSE2, -math.inf))


def _list_entries(
    kv: PagedKV, far: FarSet, begin: torch.Tensor, entries: torch.Tensor, longest: int, unit: int
) -> None:
    token_axis, head_axis = (1, 2) if kv.kv_layout == "NHD" else (2, 1)
    values = {
        **kv_arguments(kv, torch.float32),
        **far_arguments(far, pool=True),
        "first_ptr": begin,
        "entry_ptr": entries,
        "page_units": kv.k_cache.stride(0) // unit,
        "token_units": kv.k_cache.stride(token_axis) // unit,
        "head_units": kv.k_cache.stride(head_axis) // unit,
        "BLOCK_E": _BLOCK,
    }
    grid = triton.cdiv(max(longest, 1), _BLOCK), len(begin) - 1
    entries_kernel[grid](**taken_by(entries_kernel, values), num_warps=4)


def _unit(kv: PagedKV) -> int:
    """Elements between two neighbouring rows, of which every stride is a multiple."""
    cache = kv.k_cache
    return math.gcd(*(cache.stride(axis) for axis in range(3) if cache.shape[axis] > 1)) or kv.layout.head_dim


def _rows(cache: torch.Tensor, unit: int) -> int:
    return (
        sum((size - 1) * stride for size, stride in zip(cache.shape[:3], cache.stride()[:3], strict=True)) // unit + 1
    )


def _as_rows(cache: torch.Tensor, unit: int) -> torch.Tensor:
    """The cache as pages of one token and one head, without a copy; rows may overlap, and are only read."""
    return cache.as_strided((_rows(cache, unit), 1, 1, cache.shape[3]), (unit, unit, unit, 1))


@functools.cache
def _wrapper(device: torch.device) -> Any:
    import flashinfer

    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
