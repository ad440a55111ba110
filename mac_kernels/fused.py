"""The fused decode step: a few launches, no host sync, fixed addresses, so that a CUDA graph can replay it.

Scout and decide, or the CUDA front in their place, then rest and complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .attend.triton import rest_kernel
from .complete.triton import complete_kernel
from .cuda.front import unsupported_front
from .cuda.kernels import CudaKernels, bind_kernels, say_unused
from .errors import UnsupportedError
from .launch import LaunchParams, block_n, chunk_d, default_launch, fitting, nominees_at_once
from .match.accept import limit_tables
from .match.triton import scout_kernel
from .match.triton_decide import decide_kernel
from .paged import PagedKV, Table
from .planning import Planned
from .ring import RingPool
from .support import dtype_reasons
from .tca.index import MissIndex
from .types import LOG2_E, StepTrace

_INT32_MAX = 2**31 - 1
_OF_INDEX = ("ids_ptr", "count_ptr", "far_end_ptr", "selected_ptr", "dropped_ptr", "refresh", "limit", "capacity")
_LISTED_STAGES = 2  # keys then wait for their pages, and those for the list
_SHARED_BYTES = 99 * 1024  # of a block, on the GPUs that have least
_FIELDS = 8  # per kv group: low, high, position, ring, reuse, anchor, reason, head hits as bits
Arguments = dict[str, Any]
"""Kernel arguments by parameter name; a name means the same in every kernel."""


class _Launch:
    """A kernel with all arguments but the first few, which change from step to step.

    From its second call on, it skips what Triton does to find the compiled kernel: given the same strides and dtypes,
    that depends on nothing but whether the pointers are aligned.
    """

    def __init__(self, kernel: Any, grid: int, arguments: Arguments, options: Arguments) -> None:
        self._kernel, self._grid, self._arguments = kernel, (grid, 1, 1), {**arguments, **options}
        self._last = tuple(arguments.values())
        self._compiled: Any = None  # stays None under the interpreter

    def __call__(self, *first: Any, aligned: bool) -> None:
        """Launch; ``aligned``: every pointer among ``first`` is a multiple of 16."""
        if aligned and self._compiled is not None:
            self._compiled[self._grid](*first, *self._last)
            return
        compiled = self._kernel[self._grid](*first, **self._arguments)
        if aligned:
            self._compiled = compiled


@dataclass(frozen=True, slots=True)
class _Bound:
    """The launches of one layer, for as long as rings and table lie where they did."""

    rings: RingPool
    table: Table
    cuda: CudaKernels | None
    """Where they serve, in place of the others."""
    scout: _Launch
    decide: _Launch
    rest: _Launch
    complete: _Launch


class FusedStep:
    """Workspace and launches of one planned batch. Allocates here, never in :meth:`run`.

    Parameters
    ----------
    planned : Planned
        The values of its table may change between runs, its batch size may not.
    launch : LaunchParams, optional
        Default: :func:`default_launch`.
    """

    def __init__(self, planned: Planned, *, launch: LaunchParams | None = None) -> None:
        self._planned = planned
        table, layout, config = planned.table, planned.layout, planned.config
        device, groups = table.device, table.batch_size * layout.num_kv_heads
        sms, shared = 2, _SHARED_BYTES
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            sms = properties.multi_processor_count
            shared = getattr(properties, "shared_memory_per_block_optin", shared)  # has no name in torch's types
        default = fitting(default_launch(groups, config, sms, table.page_size), shared)
        self.launch = default if launch is None else launch
        self._sms, self.programs, self._groups = sms, self.launch.programs_per_sm * sms, groups
        self._pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._bound: dict[tuple[object, ...], _Bound] = {}
        self._caps, self._influences = limit_tables(config, layout, device)
        splits, group, dim = self.launch.splits, layout.group_size, layout.head_dim

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        most_parts = self.programs + groups
        self._int = empty(groups, 3, group, dtype=torch.int32)
        self._float = empty(groups, 3, group)
        self._info = empty(groups, _FIELDS, dtype=torch.int32)
        self._spared = None if config.tca is None else empty(groups, dtype=torch.int32)
        self._workspace: Arguments = {
            "cos_sin_ptr": planned.rope.cos_sin_cache(planned.max_kv_len, device),
            "scan_ptr": empty(groups, config.window, dtype=torch.int32),
            "always_out_ptr": empty(groups, splits, group, dim),
            "always_lse_ptr": empty(groups, splits, group),
            "part_out_ptr": empty(most_parts, group, dim),
            "part_key_ptr": empty(most_parts, group, dim),
            "part_lse_ptr": empty(most_parts, group),
            "parts_ptr": empty(groups, 2, dtype=torch.int32),
            "tickets_ptr": torch.zeros(1, dtype=torch.int32, device=device),
            "decision_int_ptr": self._int,
            "decision_float_ptr": self._float,
            "group_ptr": self._info,
            "spared_ptr": self._spared,
        }

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
        """Launch the kernels for ``q`` [B, Hq, D]; writes ``out`` and the ring rows."""
        k, v, k_scale, v_scale = kv.k_cache, kv.v_cache, kv.k_scale, kv.v_scale
        stride_b, stride_h, _ = q.stride()
        out_stride_b, out_stride_h, _ = out.stride()
        address = q.data_ptr() | out.data_ptr() | k.data_ptr() | v.data_ptr()
        form: tuple[object, ...] = (
            layer, stride_b, stride_h, out_stride_b, out_stride_h, k.stride(), v.stride(), q.dtype, k.dtype,
            slots.dtype, generations.dtype, address % 16 == 0,
        )  # fmt: skip
        address |= slots.data_ptr() | generations.data_ptr()
        if isinstance(k_scale, torch.Tensor) and isinstance(v_scale, torch.Tensor):
            address |= k_scale.data_ptr() | v_scale.data_ptr()
            form = (*form, True)
        bound = self._bound.get(form)
        if bound is None or bound.rings is not rings or bound.table is not kv.table:
            bound = self._bound[form] = self._bind(q, kv, rings, layer, slots, generations, out)
        aligned = address % 16 == 0
        if (cuda := bound.cuda) is not None:
            cuda.front(q, kv, out, slots=slots, generations=generations)
        else:
            bound.scout(q, stride_b, stride_h, k, v, slots, generations, k_scale, v_scale, aligned=aligned)
            bound.decide(q, stride_b, stride_h, slots, generations, aligned=aligned)
        if cuda is not None and cuda.rest is not None:
            cuda.rest(q, kv)
        else:
            bound.rest(q, stride_b, stride_h, k, v, k_scale, v_scale, aligned=aligned)
        if cuda is not None:
            cuda.complete(out)
        else:
            bound.complete(out, out_stride_b, out_stride_h, aligned=aligned)

    def _bind(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        rings: RingPool,
        layer: int,
        slots: torch.Tensor,
        generations: torch.Tensor,
        out: torch.Tensor,
    ) -> _Bound:
        launch, block_d, itemsize = self.launch, _block_d(kv.layout.head_dim), max(q.element_size(), kv.itemsize)
        config, device = self._planned.config, q.device
        if against := dtype_reasons("triton", q.dtype, kv.k_cache.dtype, device):
            raise UnsupportedError("backend 'triton'", against, "Use a bf16 cache, or backend='reference'.")
        chunk = chunk_d(launch.complete_splits, block_d)
        band = triton.next_power_of_2(-(-(config.band + config.sinks) // launch.splits))
        values = {
            **self._workspace,
            **kv_arguments(kv, q.dtype),
            **ring_arguments(rings, layer),
            **self._rule(layer),
            "PDL": self._pdl,
        }
        cuda = None
        if launch.cluster_size > 0:
            reason = unsupported_front(q, kv, rings, config, out)
            if reason is None:
                cuda = bind_kernels(values, launch, q=q, slots=slots, generations=generations, num_sms=self._sms)
            else:
                say_unused(reason)

        def bind(kernel: Any, programs: int, warps: int, **own: Any) -> _Launch:
            options = {"num_warps": warps, **({"launch_pdl": True} if self._pdl else {})}
            return _Launch(kernel, programs, taken_by(kernel, {**values, **own}), options)

        return _Bound(
            rings,
            kv.table,
            cuda,
            scout=bind(
                scout_kernel,
                self._groups * 2 * launch.splits,
                launch.scout_warps,
                BLOCK_R=launch.block_rows,
                BLOCK_N=block_n(launch.scout_tile_bytes, block_d, itemsize, band),
                STAGES=launch.scout_stages,
            ),
            decide=bind(decide_kernel, self._groups, launch.decide_warps),
            rest=bind(
                rest_kernel,
                self.programs,
                launch.rest_warps,
                BLOCK_N=block_n(launch.rest_tile_bytes, block_d, itemsize),
                STAGES=launch.rest_stages + (0 if rings.index is None else _LISTED_STAGES),
            ),
            complete=bind(
                complete_kernel,
                self._groups * kv.layout.group_size * (block_d // chunk),
                launch.complete_warps,
                BLOCK_P=launch.block_parts,
                CHUNK_D=chunk,
            ),
        )

    def _rule(self, layer: int) -> Arguments:
        """What depends on config, rotation and workspace."""
        planned, launch = self._planned, self.launch
        config, rope, layout = planned.config, planned.rope, planned.layout
        gathered = triton.next_power_of_2(layout.group_size) * _block_d(layout.head_dim)  # numbers of a nominated row
        of_layer = min(layer, len(self._caps) - 1)  # one row serves all layers if they do not differ
        return {
            "logit_scale": planned.sm_scale * LOG2_E,
            "soft_cap": planned.logits_soft_cap,
            "cap_ptr": self._caps[of_layer],
            "influence_ptr": self._influences[of_layer],
            "max_age": _INT32_MAX if config.max_age is None else config.max_age,
            "min_context": config.min_context,
            "break_even": config.break_even or 0.0,
            "SCAN_IS_OLDER": False,
            "num_groups": self._groups,
            "num_programs": self.programs,
            "BAND": config.band,
            "SINKS": config.sinks,
            "NOMINEES": config.nominees or 1,
            "BLOCK_NOMINEES": triton.next_power_of_2(config.nominees or 1),
            "NOMINEES_AT_ONCE": nominees_at_once(config, launch.decide_warps, gathered),
            "GROUP_SCOPE": config.match_scope == "group",
            "CORRECTION": config.correction,
            "BYPASS": config.break_even is not None,
            "SOFT_CAP": planned.logits_soft_cap > 0,
            "ROTARY_DIM": rope.rotary_dim,
            "INTERLEAVED": rope.interleaved,
            "SPLITS": launch.splits,
            "ALWAYS_GROUP": launch.splits,  # the parts of a group follow each other
            "ALWAYS_SPLIT": 1,
            "PART_STRIDE": 1,
            "PARTS_ARE_OLDER": False,
            "BLOCK_SPLITS": triton.next_power_of_2(launch.splits),
            "BLOCK_GROUPS": triton.next_power_of_2(self._groups),
        }

    def trace(self) -> StepTrace:
        """What the last run decided (copies on the device)."""
        return StepTrace(*(values[0] for values in stacked_trace([self])))


def stacked_trace(steps: Sequence[FusedStep]) -> StepTrace:
    """What the last run of each step decided, the steps (of one batch and config) stacked in front.

    Together they cost what one costs.
    """
    planned = steps[0]._planned
    layout, config = planned.layout, planned.config
    count, batch = len(steps), planned.table.batch_size
    heads = (count, batch, layout.num_qo_heads)
    info = torch.stack([step._info for step in steps]).view(count, batch, layout.num_kv_heads, _FIELDS).long()
    whole = torch.stack([step._int for step in steps])
    real = torch.stack([step._float for step in steps])
    bits = torch.arange(layout.group_size, device=info.device)
    kv_len = info[:, :, 0, 2] + 1
    stop = torch.clamp(kv_len - config.band, min=config.sinks)
    read = (stop[..., None] - info[..., 0]).clamp(min=0) + (kv_len - stop).clamp(min=0)[..., None] + config.sinks
    some = [step._spared for step in steps if step._spared is not None]
    spared = torch.stack(some).view(read.shape).long() if some else torch.full_like(read, -1)
    return StepTrace(
        reason=info[..., 6],
        head_hit=((info[..., 7, None] >> bits) & 1).bool().reshape(heads),
        matched_pos=whole[:, :, 2].long().reshape(heads),
        distance=real[:, :, 1].reshape(heads),
        weight_bound=real[:, :, 2].reshape(heads),
        start=whole[:, :, 0].long().reshape(heads),
        stop=stop,
        kv_read=torch.minimum(read - spared.clamp(min=0), kv_len[..., None]),
        kv_len=kv_len,
        sparse=spared >= 0,
    )


def taken_by(kernel: Any, values: Arguments) -> Arguments:
    """Those arguments that a kernel has a parameter for."""
    return {name: values[name] for name in kernel.arg_names if name in values}


def kv_arguments(kv: PagedKV, q_dtype: torch.dtype) -> Arguments:
    """Table, strides and heads of a cache."""
    begin, pages, lengths = kv.table.pointers
    layout, dim, block_g = kv.layout, kv.layout.head_dim, triton.next_power_of_2(kv.layout.group_size)
    token_axis, head_axis = (1, 2) if kv.kv_layout == "NHD" else (2, 1)
    strides = {
        f"stride_{name}{axis}": cache.stride(dim)
        for name, cache in (("k", kv.k_cache), ("v", kv.v_cache))
        for axis, dim in (("p", 0), ("t", token_axis), ("h", head_axis))
    }
    return {
        **strides,
        "begin_ptr": begin,
        "page_ptr": pages,
        "length_ptr": lengths,
        "PAGE_SIZE": kv.table.page_size,
        "ROW_STRIDE": kv.table.row_stride,
        "SCALES_ON_DEVICE": isinstance(kv.k_scale, torch.Tensor),
        "PRECISION": "ieee" if q_dtype == torch.float32 else "tf32",
        "NUM_QO_HEADS": layout.num_qo_heads,
        "NUM_KV_HEADS": layout.num_kv_heads,
        "GROUP": layout.group_size,
        "BLOCK_G": block_g,
        "BLOCK_M": max(16, block_g),
        "HEAD_DIM": dim,
        "BLOCK_D": _block_d(dim),
    }


def ring_arguments(rings: RingPool, layer: int) -> Arguments:
    """Rows of a layer, who owns a ring, counters and sketch."""
    field = {name: tensor[layer] for name, tensor in rings.fields.items()}
    sketch = rings.sketch
    assert sketch is not None  # check_fits() refused pools without one
    terms, sketch_dim = sketch.index.shape
    return {
        **_index_arguments(rings.index, layer),
        "ring_seen_ptr": field.get("seen"),
        "ring_q_ptr": field["q_pre"],
        "ring_out_ptr": field["out"],
        "ring_key_ptr": field["kbar"] if rings.correction else field["out"],
        "ring_lse_ptr": field["lse2"],
        "ring_pos_ptr": field["pos"],
        "ring_anchor_ptr": field["anchor"],
        "ring_sketch_ptr": field["sketch"],
        "ring_scale_ptr": field["sketch_scale"],
        "slot_table_ptr": rings.slot_table,
        "ring_generation_ptr": rings.ring_generation,
        "num_slots": rings.num_slots,
        "counters_ptr": rings.counters.values[layer],
        "bypass_ptr": rings.bypass.values[layer],
        "sketch_index_ptr": sketch.index,
        "sketch_sign_ptr": sketch.sign,
        "KBAR": rings.correction,
        "WINDOW": rings.window,
        "BLOCK_W": triton.next_power_of_2(rings.window),
        "TERMS": terms,
        "SKETCH_DIM": sketch_dim,
        "BLOCK_T": triton.next_power_of_2(terms),
        "BLOCK_K": triton.next_power_of_2(sketch_dim),
    }


def _index_arguments(index: MissIndex | None, layer: int) -> Arguments:
    """What missed groups of a layer read; nothing without an index."""
    if index is None:
        return dict.fromkeys(_OF_INDEX)
    far = index.ids[layer], index.count[layer], index.far_end[layer], index.selected[layer], index.dropped[layer]
    return dict(zip(_OF_INDEX, (*far, index.refresh, index.limit, index.ids.shape[3]), strict=True))


def _block_d(head_dim: int) -> int:
    return max(16, int(triton.next_power_of_2(head_dim)))
