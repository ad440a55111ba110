"""The fused decode step: four launches, no host sync, fixed addresses, so that a CUDA graph can replay it."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from .attend.triton import rest_kernel
from .complete.triton import complete_kernel
from .config import MacConfig
from .launch import LaunchParams, block_n, default_launch
from .match.accept import distance_cap
from .match.triton import scout_kernel
from .match.triton_decide import decide_kernel
from .paged import PagedKV, PageTable
from .ring import RingPool
from .rope import Rope
from .types import LOG2_E, HeadLayout, StepTrace

_INT32_MAX = 2**31 - 1
_FIELDS = 8  # per kv group: low, high, position, ring, reuse, anchor, reason, head hits as bits


class FusedStep:
    """Workspace and launches of one planned batch. Allocates here, never in :meth:`run`.

    Parameters
    ----------
    table : PageTable
        Device page table; its values may change between runs, its batch size may not.
    layout, config, rope, sm_scale, logits_soft_cap
        As planned.
    max_kv_len : int, tokens
        Upper bound of the context over all runs.
    launch : LaunchParams, optional
        Default: :func:`default_launch`.
    """

    def __init__(
        self,
        table: PageTable,
        layout: HeadLayout,
        config: MacConfig,
        rope: Rope,
        *,
        sm_scale: float,
        logits_soft_cap: float,
        max_kv_len: int,
        launch: LaunchParams | None = None,
    ) -> None:
        device = table.indptr.device
        groups = table.batch_size * layout.num_kv_heads
        sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        self.launch = default_launch(groups, config, sms) if launch is None else launch
        self.programs = self.launch.programs_per_sm * sms
        self._groups, self._layout, self._config, self._batch = groups, layout, config, table.batch_size
        self._interleaved, self._rotary_dim = rope.interleaved, rope.rotary_dim
        self._cos_sin = rope.cos_sin_cache(max_kv_len, device)
        self._logit_scale = sm_scale * LOG2_E
        self._soft_cap = logits_soft_cap
        self._pdl = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        splits, group, dim = self.launch.splits, layout.group_size, layout.head_dim

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self._scan = empty(groups, config.window, dtype=torch.int32)
        self._always_out, self._always_lse = empty(groups, splits, group, dim), empty(groups, splits, group)
        most_parts = self.programs + groups
        self._part_out, self._part_key = empty(most_parts, group, dim), empty(most_parts, group, dim)
        self._part_lse = empty(most_parts, group)
        self._parts = empty(groups, 2, dtype=torch.int32)
        self._int = empty(groups, 3, group, dtype=torch.int32)
        self._float = empty(groups, 3, group)
        self._info = empty(groups, _FIELDS, dtype=torch.int32)

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
        config, layout, launch = self._config, self._layout, self.launch
        field = {name: tensor[layer] for name, tensor in rings.fields.items()}
        key = field["kbar"] if rings.correction else field["out"]
        sketch = rings.sketch
        assert sketch is not None  # check_fits() refused pools without one
        token_axis, head_axis = (1, 2) if kv.kv_layout == "NHD" else (2, 1)
        k, v = kv.k_cache, kv.v_cache
        strides = tuple(cache.stride(axis) for cache in (k, v) for axis in (0, token_axis, head_axis))
        dim, group = layout.head_dim, layout.group_size
        terms, sketch_dim = sketch.index.shape
        heads, attend, ring, ranges, rotation = self._constants(kv)
        block_g, block_d = ranges["BLOCK_G"], heads["BLOCK_D"]
        per_split = -(-(config.band + config.sinks) // launch.splits)
        owner = (slots, generations, rings.slot_table, rings.ring_generation, rings.num_slots)
        block_splits = triton.next_power_of_2(launch.splits)
        nominees = config.nominees or 1
        block_nominees = triton.next_power_of_2(nominees)
        scout_kernel[(self._groups * 2 * launch.splits,)](
            q, q.stride(0), q.stride(1), k, v, *strides,
            kv.table.indptr, kv.table.indices, kv.table.last_page_len, *owner,
            field["q_pre"], field["pos"], field["sketch"], field["sketch_scale"],
            sketch.index, sketch.sign, self._cos_sin, self._scan, self._always_out, self._always_lse,
            self._logit_scale, self._soft_cap,
            TERMS=terms, SKETCH_DIM=sketch_dim,
            BLOCK_T=triton.next_power_of_2(terms), BLOCK_K=triton.next_power_of_2(sketch_dim),
            BLOCK_R=launch.block_rows, STAGES=launch.scout_stages,
            BLOCK_N=block_n(launch.scout_tile_bytes, block_d, k.element_size(), triton.next_power_of_2(per_split)),
            num_warps=launch.scout_warps, **heads, **attend, **ring, **ranges, **rotation,
        )  # fmt: skip
        decide_kernel[(self._groups,)](
            q, q.stride(0), q.stride(1), kv.table.indptr, kv.table.last_page_len, *owner,
            field["q_pre"], key, field["lse2"], field["anchor"], self._cos_sin, rings.counters.values[layer],
            self._scan, self._always_lse, self._int, self._float, self._info,
            self._logit_scale, distance_cap(config, dim),
            math.inf if config.influence is None else config.influence * math.sqrt(2 * dim),
            _INT32_MAX if config.max_age is None else config.max_age, config.min_context,
            NUM_QO_HEADS=layout.num_qo_heads, NOMINEES=nominees, BLOCK_NOMINEES=block_nominees,
            NOMINEES_AT_ONCE=min(block_nominees, max(1, 64 // block_g)), BLOCK_SPLITS=block_splits,
            GROUP_SCOPE=config.match_scope == "group", CORRECTION=config.correction, PAGE_SIZE=kv.table.page_size,
            num_warps=launch.decide_warps, **heads, **ring, **ranges, **rotation,
        )  # fmt: skip
        rest_kernel[(self.programs,)](
            q, q.stride(0), q.stride(1), k, v, *strides, kv.table.indptr, kv.table.indices,
            self._int, self._info, self._parts, self._part_out, self._part_key, self._part_lse,
            self._logit_scale, self._soft_cap, self._groups, self.programs,
            KBAR=rings.correction, BLOCK_N=block_n(launch.rest_tile_bytes, block_d, k.element_size()),
            BLOCK_GROUPS=triton.next_power_of_2(self._groups), STAGES=launch.rest_stages, num_warps=launch.rest_warps,
            **heads, **attend,
        )  # fmt: skip
        complete_kernel[(self._groups * group,)](
            out, out.stride(0), out.stride(1), self._int, self._float, self._info, self._parts,
            self._part_out, self._part_key, self._part_lse, self._always_out, self._always_lse,
            field["out"], key, field["lse2"], field["pos"], field["anchor"], self._cos_sin,
            NUM_QO_HEADS=layout.num_qo_heads, BLOCK_SPLITS=block_splits, BLOCK_P=launch.block_parts,
            KBAR=rings.correction, num_warps=launch.complete_warps, **heads, **ring, **rotation,
        )  # fmt: skip

    def _constants(self, kv: PagedKV) -> tuple[dict[str, Any], ...]:
        """Compile-time constants by what they describe: heads, attention, ring, ranges, rotation."""
        config, layout, launch = self._config, self._layout, self.launch
        block_g = triton.next_power_of_2(layout.group_size)
        heads = {
            "NUM_KV_HEADS": layout.num_kv_heads,
            "GROUP": layout.group_size,
            "HEAD_DIM": layout.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(layout.head_dim)),
            "PDL": self._pdl,
            **({"launch_pdl": True} if self._pdl else {}),
        }
        attend = {
            "BLOCK_M": max(16, block_g),
            "SOFT_CAP": self._soft_cap > 0,
            "PAGE_SIZE": kv.table.page_size,
            "PRECISION": "ieee" if kv.k_cache.dtype == torch.float32 else "tf32",
        }
        rotation = {"ROTARY_DIM": self._rotary_dim, "INTERLEAVED": self._interleaved}
        ring = {"WINDOW": config.window, "SPLITS": launch.splits}
        ranges = {
            "BAND": config.band,
            "SINKS": config.sinks,
            "BLOCK_W": triton.next_power_of_2(config.window),
            "BLOCK_G": block_g,
        }
        return heads, attend, ring, ranges, rotation

    def trace(self) -> StepTrace:
        """What the last run decided (views and small copies on the device)."""
        heads = (self._batch, self._layout.num_qo_heads)
        groups = (self._batch, self._layout.num_kv_heads)
        info = self._info.view(*groups, _FIELDS).long()
        bits = torch.arange(self._layout.group_size, device=info.device)
        kv_len = info[:, 0, 2] + 1
        stop = torch.clamp(kv_len - self._config.band, min=self._config.sinks)
        low = info[..., 0]
        read = (stop[:, None] - low).clamp(min=0) + (kv_len - stop).clamp(min=0)[:, None] + self._config.sinks
        return StepTrace(
            reason=info[..., 6],
            head_hit=((info[..., 7, None] >> bits) & 1).bool().reshape(heads),
            matched_pos=self._int[:, 2].long().reshape(heads),
            distance=self._float[:, 1].clone().reshape(heads),
            weight_bound=self._float[:, 2].clone().reshape(heads),
            start=self._int[:, 0].long().reshape(heads),
            stop=stop,
            kv_read=torch.minimum(read, kv_len[:, None]),
            kv_len=kv_len,
        )
