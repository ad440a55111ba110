"""Attend through FlashInfer: its batch decode wrapper with a variant whose ranges lie on the device.

FlashInfer plans on the host, for lengths that it knows then. The variant below takes the range of every kv group from a
device tensor instead: the FA2 template asks the variant where the keys begin and end, before it loads any, so a short
range really costs little, and one kv head of a request may read everything while its neighbour reads nothing. The first
position of every query head is masked on top. What FlashInfer planned is then only an upper bound.

Read in flashinfer-python 0.6.15.post1 and 0.7.0, ``include/flashinfer/attention/prefill.cuh``:
``BatchPrefillWithPagedKVCacheDevice`` (the decode wrapper with tensor cores runs it with one query per request).
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..paged import Scale
from ..types import LOG2_E, HeadLayout, KVLayout

if TYPE_CHECKING:
    from .flashinfer_replan import PlanBuffers

HEAD_DIMS = (64, 128, 256)
QUERY_DTYPES = (torch.bfloat16, torch.float16)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
OLDEST = (0, 6, 15)
"""Before, the FA2 template did not take all of its bounds from the variant, or the wrapper lacked arguments."""
_GUARDED = (0, 7)
_TILE_ROWS = 16  # query rows of a thread block for at most 16 heads per kv head
_SLACK = 4096  # bytes, for alignment
_EMPTY_LSE2 = -3e4  # unguarded versions say -5e4 where nothing was attended to

# Scores leave LogitsTransform in base 2, so that FlashInfer's own "minus infinity" of old (-5e4) is far below all of
# them. blockIdx.z is the kv head: the constructor is not told, and its range is needed before the first load.
_VARIANT = r"""
struct MacRanges : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale_log2, logit_scale, tanh_scale, cap_log2, value_scale;
  const int32_t* start;

  template <typename Params>
  __device__ __host__ MacRanges(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    uint32_t kv_head = 0, num_kv_heads = 1;
#ifdef __CUDA_ARCH__
    kv_head = blockIdx.z;
    num_kv_heads = gridDim.z;
#endif
    const int64_t group = int64_t(batch_idx) * num_kv_heads + kv_head;
    const int32_t low = params.mac_range[group * params.mac_range_pitch];
    const int32_t high = params.mac_range[group * params.mac_range_pitch + 1];
    start = params.mac_start + group * params.mac_start_pitch -
            int64_t(kv_head) * (params.num_qo_heads / num_kv_heads);
    qo_len = 1;
    kv_len = high > low ? high : 0;
    window_left = high > low ? high - low - 1 : 0;
    sm_scale_log2 = 1.f;
    const float key_scale = *params.mac_key_scale;
    logit_scale = key_scale * float(params.mac_logit_scale);
    tanh_scale = key_scale * float(params.mac_tanh_scale);
    cap_log2 = params.mac_cap_log2;
    value_scale = *params.mac_value_scale;
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    const float score = cap_log2 > 0.f ? cap_log2 * float(math::tanh(float(logits) * tanh_scale))
                                       : float(logits) * logit_scale;
    return int32_t(kv_idx) >= __ldg(start + qo_head_idx) ? score : -math::inf;
  })

  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return m != -math::inf ? output * math::ptx_rcp(d) * value_scale : 0.f;
  })
};
"""
_TENSORS = {"mac_range": "int32_t", "mac_start": "int32_t", "mac_key_scale": "float", "mac_value_scale": "float"}
_SCALARS = {
    "mac_range_pitch": "int64_t",
    "mac_start_pitch": "int64_t",
    "mac_logit_scale": "double",
    "mac_tanh_scale": "double",
    "mac_cap_log2": "double",
}


def flashinfer_version() -> tuple[int, ...] | None:
    """Release numbers of the installed flashinfer-python, ``None`` without it; nothing is imported."""
    try:
        text = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    release = text.split("+")[0].split(".post")[0].split("rc")[0].split(".dev")[0]
    return tuple(int(part) for part in release.split(".") if part.isdigit())


@dataclass(frozen=True, slots=True)
class Ranges:
    """Which tokens every kv group reads, on the device; the values may change between runs.

    ``bounds`` int32, row ``group`` begins with the first token and the one after the last; ``starts`` int32, row
    ``group`` begins with the first token of each of its query heads. Rows lie ``bounds_pitch`` and ``starts_pitch``
    entries apart (0: one row for all).
    """

    bounds: torch.Tensor
    bounds_pitch: int
    starts: torch.Tensor
    starts_pitch: int


@dataclass(frozen=True, slots=True)
class Scores:
    """How scores are made: ``sm_scale``, ``logits_soft_cap`` (0: none), both for natural logarithms."""

    sm_scale: float
    logits_soft_cap: float = 0.0

    def scalars(self) -> tuple[float, float, float]:
        """Scale to base 2, scale before tanh, and cap to base 2."""
        scale, cap = self.sm_scale, self.logits_soft_cap
        return scale * LOG2_E, scale / cap if cap > 0 else 0.0, cap * LOG2_E


class RangeAttention:
    """One planned FlashInfer decode call over device-side ranges. Allocates and plans here, never in :meth:`run`.

    Parameters
    ----------
    batch_size : int
        Requests ``B``.
    layout : HeadLayout
        Heads of the layer; head dim 64, 128 or 256, at most 16 query heads per kv head.
    indices : torch.Tensor, int32
        Page of every table entry; its values may change.
    max_kv_len, page_size : int, tokens
        Upper bound of every request's length; tokens per page.
    kv_layout : {"NHD", "HND"}
    q_dtype, kv_dtype : torch.dtype
        bf16 or fp16 queries; keys and values of the same dtype, or fp8.
    split : bool, default True
        Long ranges are cut into tiles, dealt out anew on the device before every run where the installed FlashInfer
        allows it (see ``plan_buffers``); otherwise the host's plan for the full length stays, which is right for any
        ranges. ``False``, for short ranges: one thread block per kv group and nothing to merge; the entries of request
        ``b`` then begin at ``b * max_kv_len``, with pages of one token.

    Attributes
    ----------
    plan_buffers : PlanBuffers or None
        Where to deal the tiles out; ``None`` if that is not done.
    programs : int
        Thread blocks that FlashInfer expects to run at once, two per SM.

    Notes
    -----
    With ``split``, ``begin`` [B + 1] int32 must hold, before every run, where each request's entries begin in
    ``indices``; its last entry, how many there are, is set here. The first plan for a pair of dtypes and a head dim
    compiles for about half a minute; FlashInfer keeps the result on disk.
    """

    def __init__(
        self,
        batch_size: int,
        layout: HeadLayout,
        *,
        indices: torch.Tensor,
        max_kv_len: int,
        page_size: int,
        kv_layout: KVLayout,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        split: bool = True,
    ) -> None:
        device = indices.device
        if indices.dtype != torch.int32:
            raise InputError(f"FlashInfer reads int32 page tables, got {indices.dtype}; convert the table with .int()")
        self.begin = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
        self.programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
        self._layout, self._split = layout, split
        self.plan_buffers: PlanBuffers | None = None
        if split:
            self.plan_buffers = self._plan_for_replan(
                batch_size, indices, max_kv_len, page_size, kv_layout, q_dtype, kv_dtype
            )
        if self.plan_buffers is None:
            self._plan(batch_size, layout.num_kv_heads, indices, max_kv_len, page_size, kv_layout, q_dtype, kv_dtype)

    def _plan_for_replan(self, batch_size: int, *geometry: Any) -> PlanBuffers | None:
        from .flashinfer_replan import locate_plan_buffers

        self._plan(batch_size, planned_heads(self._layout), *geometry)
        return locate_plan_buffers(self._wrapper, batch_size, flashinfer_version() or ())

    def _plan(
        self,
        batch_size: int,
        planned_kv_heads: int,
        indices: torch.Tensor,
        max_kv_len: int,
        page_size: int,
        kv_layout: KVLayout,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        import flashinfer

        layout, device = self._layout, indices.device
        float_bytes, int_bytes = workspace_bytes(batch_size, layout, planned_kv_heads, self.programs)
        workspace = torch.zeros(float_bytes, dtype=torch.uint8, device=device)
        buffers = {
            "paged_kv_indptr_buffer": self.begin,
            "paged_kv_indices_buffer": indices,
            "paged_kv_last_page_len_buffer": torch.ones(batch_size, dtype=torch.int32, device=device),
        }
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            kv_layout,
            use_cuda_graph=self._split,  # without: exactly the planned tiles; what plan() allocates stays where it is
            use_tensor_cores=True,
            backend="fa2",
            **(buffers if self._split else {}),
        )
        # it took 8 MB, enough for any plan
        self._wrapper.reset_workspace_buffer(workspace, torch.zeros(int_bytes, dtype=torch.uint8, device=device))
        # the constructor's jit_args would go through the compiler's lock at every plan
        self._wrapper._jit_module = compiled_module(q_dtype, kv_dtype, layout.head_dim)
        self._wrapper._jit_additional_tensor_names = list(_TENSORS)
        pages = -(-max_kv_len // page_size)
        self._wrapper.plan(
            torch.arange(batch_size + 1, dtype=torch.int32) * pages,
            indices[:0] if self._split else indices,
            torch.full((batch_size,), max_kv_len - (pages - 1) * page_size, dtype=torch.int32),
            planned_kv_heads * layout.group_size,
            planned_kv_heads,
            layout.head_dim,
            page_size,
            q_data_type=q_dtype,
            kv_data_type=kv_dtype,
            disable_split_kv=not self._split,
        )
        self.begin[-1:].fill_(indices.numel())

    def run(
        self,
        q: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        ranges: Ranges,
        scores: Scores,
        *,
        out: torch.Tensor,
        lse2: torch.Tensor,
        k_scale: Scale = 1.0,
        v_scale: Scale = 1.0,
    ) -> None:
        """Write the state over the ranges: ``out`` [B, Hq, D] in the dtype of ``q``, ``lse2`` [B, Hq] fp32.

        Nothing to attend to gives 0 and ``-inf``. Capturable; no sync, and nothing is allocated.
        """
        self._wrapper.run(
            q,
            keys_values,
            ranges.bounds,
            ranges.starts,
            _on_device(k_scale, q.device),
            _on_device(v_scale, q.device),
            ranges.bounds_pitch,
            ranges.starts_pitch,
            *scores.scalars(),
            out=out,
            lse=lse2,
            return_lse=True,
            # with programmatic dependent launch the kernel would read plan and ranges before their writer is done
            enable_pdl=False,
        )
        if _unguarded():
            torch.threshold_(lse2, _EMPTY_LSE2, -math.inf)


def planned_heads(layout: HeadLayout) -> int:
    """Kv heads to plan for where tiles are dealt out on the device: the fewest that leave room for partial results.

    With fewer heads the grid has more tiles for each, up to the whole GPU for a single group. FlashInfer reserves 16
    fp32 rows of the planned heads per tile and fills one 16-bit row of the true ones.
    """
    return -(-layout.num_kv_heads // _TILE_ROWS)


def workspace_bytes(batch_size: int, layout: HeadLayout, planned_kv_heads: int, programs: int) -> tuple[int, int]:
    """What FlashInfer's planner takes of its two workspaces, from above (``PrefillPlanImpl``)."""
    rows = planned_kv_heads * layout.group_size * _TILE_ROWS
    tiles = max(programs // planned_kv_heads, batch_size - (-batch_size * layout.group_size // _TILE_ROWS))
    return 4 * rows * tiles * (layout.head_dim + 1) + _SLACK, 13 * tiles + 8 * (batch_size + 1) + _SLACK


@functools.cache
def compiled_module(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> Any:
    """FlashInfer's decode module of the variant, compiled on first use (then read from its cache).

    Raises
    ------
    InputError
        If FlashInfer's FA2 kernels do not take these dtypes.
    """
    if q_dtype not in QUERY_DTYPES or kv_dtype not in (q_dtype, *FP8_DTYPES):
        raise InputError(
            f"backend 'flashinfer' needs bf16 or fp16 queries and a cache of the same dtype or fp8, got {q_dtype} and "
            f"{kv_dtype}; convert them or use backend='triton'"
        )
    from flashinfer.jit import gen_customize_batch_prefill_module
    from flashinfer.prefill import get_batch_prefill_jit_module

    args = jit_args(q_dtype, kv_dtype, head_dim)
    return get_batch_prefill_jit_module(args[0], gen_customize_batch_prefill_module("fa2", *args).build_and_load())


def jit_args(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> list[Any]:
    """What FlashInfer's ``jit_args`` takes for the variant; the output has the dtype of the queries."""
    names = "_".join(str(dtype).removeprefix("torch.") for dtype in (q_dtype, kv_dtype))
    return [
        f"mac_ranges_{names}_d{head_dim}",
        q_dtype,
        kv_dtype,
        q_dtype,
        torch.int32,
        head_dim,
        head_dim,
        list(_TENSORS),
        list(_TENSORS.values()),
        list(_SCALARS),
        list(_SCALARS.values()),
        "MacRanges",
        _VARIANT,
    ]


def _on_device(scale: Scale, device: torch.device) -> torch.Tensor:
    return scale if isinstance(scale, torch.Tensor) else _number(float(scale), device)


@functools.lru_cache(maxsize=256)
def _number(value: float, device: torch.device) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)


@functools.cache
def _unguarded() -> bool:
    """Whether FlashInfer is from before states over nothing had an lse of minus infinity."""
    return (flashinfer_version() or _GUARDED) < _GUARDED
