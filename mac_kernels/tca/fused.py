"""Selection, sparse prefill and sparse decode with the Triton kernels, without a host sync.

A CUDA graph can capture :func:`compact` and :func:`sparse_decode`; selection copies lengths and budgets from the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..errors import InputError, UnsupportedError
from ..fused import kv_arguments, taken_by
from ..launch import block_n
from ..paged import PagedKV
from ..types import LOG2_E, AttnState, HeadLayout
from .candidates import NUM_SPARSE, block_counts, far_count
from .config import TcaConfig, far_blocks, far_end
from .select import FarSet, Selection
from .triton import compact_kernel, kept_kernel, merge_kernel
from .triton_prefill import deal_kernel, gather_kernel, prefill_kernel
from .triton_select import block_kernel, dropped_kernel, list_kernel, rank_kernel, score_kernel

_TILE = 128  # rows that are gathered at once, and the largest query tile
_SMALLEST = 16  # rows of a tensor core
_HOPPER_SHARED = 232_448  # bytes that a program may have
_Arguments = dict[str, Any]


def unsupported_reasons(layout: HeadLayout, config: TcaConfig | None) -> tuple[str, ...]:
    """Return every reason why these kernels cannot run a model; empty if they can."""
    checks = (
        (layout.head_dim <= 256, f"head_dim={layout.head_dim} (at most 256)"),
        (config is None or config.block >= _SMALLEST, f"block={config and config.block} (at least {_SMALLEST})"),
    )
    return tuple(reason for good, reason in checks if not good)


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
    """As :func:`mac_kernels.tca.select_prompt`, in four launches.

    Reads the keys once. Scratch: 4 bytes per query head and token, as much again per kv head.

    Raises
    ------
    InputError
        If lengths or candidates do not fit the batch.
    UnsupportedError
        For the :func:`unsupported_reasons`.
    """
    options: _Arguments = {"config": config, "sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
    return select_and_score(q_last, kv, kv_len, choice, **options)[0]


def select_and_score(
    q_last: torch.Tensor,
    kv: PagedKV,
    kv_len: Sequence[int],
    choice: Sequence[int],
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> tuple[Selection, torch.Tensor]:
    """:func:`select_prompt`, and the importance of the tokens of all far blocks, [B, Hkv, N * block] fp32.

    Of dense heads, and beyond a request's own far blocks, it is not written.
    """
    batch, heads = len(q_last), kv.layout.num_kv_heads
    if len(kv_len) != batch or len(choice) != heads or any(not 0 <= one <= NUM_SPARSE for one in choice):
        raise InputError(
            f"{len(kv_len)} lengths and candidates {list(choice)} for {batch} requests of {heads} kv heads; pass one "
            f"length per request and one candidate in [0, {NUM_SPARSE}] per kv head"
        )
    values, groups, device = _values(q_last, kv, config, sm_scale, logits_soft_cap), batch * heads, q_last.device
    blocks = [far_blocks(length - 1, config) for length in kv_len]
    most = max(blocks, default=0)
    # one copy to the device: counts, ends of the windows, ends of the budgets' ranks
    sizes = [size for count in blocks for size in _sizes(tuple(choice), count, config)]
    known = torch.tensor(sizes, dtype=torch.int32).view(groups, -1).T.contiguous().to(device, non_blocking=True)
    far = FarSet(
        torch.empty(batch, heads, config.sinks + most * config.block, dtype=torch.int32, device=device),
        known[0].view(batch, heads),
        known[1].view(batch, heads),
    )
    selection = Selection(far, torch.zeros(batch, heads, most + 1, dtype=torch.int32, device=device))
    splits = triton.next_power_of_2(max(1, 4 * _sms(device) // max(groups, 1)))
    width, rows = max(kv_len, default=0), batch * kv.layout.num_qo_heads
    part = torch.empty(2, rows, splits, device=device)
    score = torch.empty(batch, heads, most * config.block, device=device)
    values |= {
        **far_arguments(far),
        "prefix_ptr": selection.prefix,
        "ends_ptr": known[2:],
        "logits_ptr": torch.empty(rows, width, device=device),
        "part_max_ptr": part[0],
        "part_sum_ptr": part[1],
        "token_score_ptr": score,
        "block_score_ptr": torch.empty(groups, most, device=device),
        "keep_ptr": torch.empty(groups, most, dtype=torch.int32, device=device),
        "alpha": config.alpha,
        "width": width,
        "most_blocks": most,
        "num_groups": groups,
        "SPLITS": splits,
        "LITERAL": config.rule == "literal",
        "LEVELS": config.block.bit_length() - 1,
        "BLOCK_SINKS": triton.next_power_of_2(max(config.sinks, 1)),
    }
    if most:
        tile = block_n(32 * 1024, values["BLOCK_D"], q_last.element_size())
        _launch(score_kernel, (splits, groups), values, num_warps=4, BLOCK_N=tile, STAGES=3)
        _launch(block_kernel, (most, groups), values, num_warps=4)
        _launch(rank_kernel, (triton.cdiv(most, 32), groups), values, num_warps=4, BLOCK_R=32, BLOCK_C=128)
    if groups:
        _launch(list_kernel, (max(most, 1), groups), values, num_warps=1, BLOCK_C=1024)
    return selection, score


def dropped_mass(s: torch.Tensor, far: FarSet, *, sinks: int) -> torch.Tensor:
    """As :func:`mac_kernels.tca.index.dropped_mass`, in one pass over ``s`` and the lists."""
    batch, heads, tokens = s.shape
    splits = triton.next_power_of_2(max(1, 8 * _sms(s.device) // max(batch * heads, 1)))
    left_out = torch.empty(batch, heads, splits, device=s.device)
    values = {**far_arguments(far), "score_ptr": s, "part_ptr": left_out, "num_tokens": tokens, "SINKS": sinks}
    if left_out.numel():
        _launch(dropped_kernel, (splits, batch * heads), values, num_warps=4, SPLITS=splits, BLOCK_E=1024)
    return left_out.sum(-1).clamp(min=0)


def sparse_prefill(
    q: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv: PagedKV,
    selection: Selection,
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> AttnState:
    """As :func:`mac_kernels.tca.sparse_prefill`, the output in the dtype of the queries.

    Gathers far tokens and windows into scratch in the dtype of the queries, at most twice the keys and values of the
    longest request for every request, and attends to it there.

    Raises
    ------
    UnsupportedError
        For the :func:`unsupported_reasons`.
    """
    values, layout, far = _values(q, kv, config, sm_scale, logits_soft_cap), kv.layout, selection.far
    batch, groups = len(qo_indptr) - 1, (len(qo_indptr) - 1) * layout.num_kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if not len(q):
        return AttnState(out, lse2)
    block_d, most = values["BLOCK_D"], selection.prefix.shape[2] - 1
    longest = config.sinks + (most + 1) * config.block + config.local_window
    far_rows = triton.cdiv(far.ids.shape[2], _TILE) * _TILE
    rows = far_rows + (triton.cdiv(longest, _TILE) + 1) * _TILE  # a tile may reach beyond the last token
    compact_kv = torch.empty(2, groups * rows, block_d, dtype=q.dtype, device=q.device)
    tile = _PrefillTile.of(block_d, q.element_size(), config.block, q.device)
    tiles = len(q) // tile.queries + 2 * batch  # a request has at most two that are not full
    shape = [tile.keys, block_d]
    values |= {
        "q_ptr": q,
        "stride_qn": q.stride(0),
        "stride_qh": q.stride(1),
        "qo_indptr_ptr": qo_indptr,
        **far_arguments(far),
        "prefix_ptr": selection.prefix,
        "compact_k_ptr": compact_kv[0],
        "compact_v_ptr": compact_kv[1],
        "k_desc": TensorDescriptor.from_tensor(compact_kv[0], shape),
        "v_desc": TensorDescriptor.from_tensor(compact_kv[1], shape),
        "out_ptr": out,
        "lse_ptr": lse2,
        "tile_ptr": torch.empty(tiles, 2, dtype=torch.int32, device=q.device),
        "num_requests": batch,
        "num_tiles": tiles,
        "num_prefixes": most + 1,
        "far_rows": far_rows,
        "rows": rows,
        "BLOCK_R": _TILE,
        "BLOCK_B": triton.next_power_of_2(batch),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "STAGES": tile.stages,
    }
    _launch(deal_kernel, (triton.cdiv(tiles, 16),), values, num_warps=4, BLOCK_T=16)
    _launch(gather_kernel, (rows // _TILE, groups), values, num_warps=8)
    heads = layout.num_qo_heads
    _launch(prefill_kernel, (tiles * heads,), values, num_warps=tile.warps, num_stages=tile.stages)
    return AttnState(out, lse2)


def sparse_decode(
    q: torch.Tensor, kv: PagedKV, far: FarSet, *, sm_scale: float, logits_soft_cap: float = 0.0
) -> AttnState:
    """As :func:`mac_kernels.tca.sparse_decode`, the output in the dtype of the queries; two launches.

    Raises
    ------
    UnsupportedError
        For the :func:`unsupported_reasons`.
    """
    layout, groups, device = kv.layout, len(q) * kv.layout.num_kv_heads, q.device
    values, launch = _values(q, kv, None, sm_scale, logits_soft_cap), _DecodeLaunch.of(groups, _sms(device))
    programs = _sms(device) * launch.programs_per_sm
    parts = programs + groups
    out = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse2 = torch.empty(q.shape[:2], dtype=torch.float32, device=device)
    values |= {
        **far_arguments(far, pool=True),
        "parts_ptr": torch.empty(groups, 2, dtype=torch.int32, device=device),
        "part_out_ptr": torch.empty(parts, layout.group_size, layout.head_dim, device=device),
        "part_lse_ptr": torch.empty(parts, layout.group_size, device=device),
        "out_ptr": out,
        "lse_ptr": lse2,
        "num_groups": groups,
        "num_programs": programs,
        "BLOCK_GROUPS": triton.next_power_of_2(max(groups, 1)),
        "BLOCK_N": block_n(launch.tile_bytes, values["BLOCK_D"], max(q.element_size(), kv.itemsize)),
        "UNIT": _SMALLEST,
        "STAGES": launch.stages,
    }
    _launch(kept_kernel, (programs,), values, num_warps=launch.warps)
    _launch(
        merge_kernel, (groups * layout.group_size,), values, num_warps=launch.merge_warps, BLOCK_P=launch.block_parts
    )
    return AttnState(out, lse2)


def compact(
    q: torch.Tensor,
    kv: PagedKV,
    far: FarSet,
    keep: torch.Tensor,
    *,
    config: TcaConfig,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
) -> None:
    """As :func:`mac_kernels.tca.compact`; takes any number of blocks that are due, and leaves what finds no room.

    Raises
    ------
    UnsupportedError
        For the :func:`unsupported_reasons`.
    """
    values, groups = _values(q, kv, config, sm_scale, logits_soft_cap), len(q) * kv.layout.num_kv_heads
    values |= {
        **far_arguments(far, pool=True),
        "keep_ptr": keep,
        "score_ptr": torch.empty(groups, config.block, device=q.device),
    }
    _launch(compact_kernel, (groups,), values, num_warps=4, BLOCK_C=min(config.block, 64))


@dataclass(frozen=True, slots=True)
class _PrefillTile:
    """Queries and keys of a prefill tile, warps, and loads that are under way at once."""

    queries: int
    keys: int
    warps: int
    stages: int

    @staticmethod
    def of(block_d: int, itemsize: int, block: int, device: torch.device) -> _PrefillTile:
        """Fill the shared memory of an SM; query tiles must not cross blocks."""
        queries = min(_TILE, block)
        if itemsize == 4:  # no tensor cores: the products need registers
            return _PrefillTile(min(32, block), 32, 4, 1)
        shared = _HOPPER_SHARED
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            shared = getattr(properties, "shared_memory_per_block_optin", 48 * 1024)  # PyTorch's stubs lack it
        rows = (shared - 2048) // (block_d * itemsize)  # of queries, and of keys and values in every stage
        keys = next((keys for keys in (64, 32) if queries + 4 * keys <= rows), 16)
        stages = max(2, min(4, (rows - queries) // (2 * keys)))
        return _PrefillTile(queries, keys, 8 if queries == _TILE else 4, stages)


@dataclass(frozen=True, slots=True)
class _DecodeLaunch:
    """Programs, bytes of keys and values in a tile, warps and stages of the attention, and how parts are merged.

    A tile's keys wait for their pages and those for the listed tokens, so it takes more stages than dense attention.
    """

    programs_per_sm: int = 2
    tile_bytes: int = 32 * 1024
    warps: int = 4
    stages: int = 7
    block_parts: int = 4
    merge_warps: int = 1

    @staticmethod
    def of(groups: int, sms: int) -> _DecodeLaunch:
        """With few groups, runs are short: more loads under way at once, and more parts that are merged at once."""
        if groups * 4 <= sms:
            return _DecodeLaunch(stages=9, block_parts=32, merge_warps=4)
        return _DecodeLaunch()


def _values(
    q: torch.Tensor, kv: PagedKV, config: TcaConfig | None, sm_scale: float, logits_soft_cap: float
) -> _Arguments:
    """Arguments that most kernels share."""
    values = {
        **kv_arguments(kv, q.dtype),
        "q_ptr": q,
        "stride_qb": q.stride(0),
        "stride_qh": q.stride(1),
        "k_ptr": kv.k_cache,
        "v_ptr": kv.v_cache,
        "k_scale": kv.k_scale,
        "v_scale": kv.v_scale,
        "logit_scale": sm_scale * LOG2_E,
        "soft_cap": logits_soft_cap,
        "SOFT_CAP": logits_soft_cap > 0,
        "PDL": q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= (9, 0),
    }
    reasons = unsupported_reasons(kv.layout, config)
    if reasons:
        raise UnsupportedError("TCA on backend 'triton'", reasons, "Use the functions of mac_kernels.tca.")
    if config is not None:
        values |= {"SINKS": config.sinks, "KEEP_BLOCK": config.block, "LOCAL": config.local_window}
    return values


def far_arguments(far: FarSet, *, pool: bool = False) -> _Arguments:
    """Arguments of a kernel that reads far sets; only with ``pool`` does it know those of a pool."""
    if far.sets is not None and not pool:
        raise InputError("these far sets belong to a pool, which this function does not read; pass far.of_batch()")
    for name in ("ids", "count", "far_end"):
        tensor = getattr(far, name)
        if tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise InputError(
                f"far.{name} is {tensor.dtype} of strides {tensor.stride()}; it must be int32 and contiguous: clone it"
            )
    return {
        "ids_ptr": far.ids,
        "count_ptr": far.count,
        "far_end_ptr": far.far_end,
        "sets_ptr": far.sets,
        "capacity": far.ids.shape[2],
    }


@lru_cache(maxsize=4096)
def _sizes(choice: tuple[int, ...], blocks: int, config: TcaConfig) -> tuple[list[int], ...]:
    """By kv head: tokens kept, end of the far region, and how many blocks keep at least all, half, ... two tokens."""
    sizes = []
    for one in choice:
        counts = reversed(block_counts(one, blocks, config.block)[1:])
        end = 0 if one == NUM_SPARSE else far_end(blocks, config)
        sizes.append([far_count(one, blocks, config), end, *accumulate(counts)])
    return tuple(sizes)


def _launch(
    kernel: Any, grid: tuple[int, ...], values: _Arguments, *, num_warps: int, num_stages: int = 3, **own: Any
) -> None:
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if values.get("PDL") and "PDL" in kernel.arg_names:
        options["launch_pdl"] = True
    kernel[grid](**taken_by(kernel, {**values, **own}), **options)


def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
