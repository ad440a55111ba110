"""Attend through FlashInfer: its batch decode wrapper with a variant whose ranges lie on the device.

FlashInfer plans on the host, for lengths that it knows then. The variant below takes the range of every kv head from a
device tensor instead: the FA2 template asks the variant where the keys begin and end, before it loads any, so a short
range really costs little, and one kv head of a row may read everything while its neighbour reads nothing. The first
position of every query head is masked on top. What FlashInfer planned is then only how many rows there are.

Read in flashinfer-python 0.6.15.post1 and 0.7.0, ``include/flashinfer/attention/prefill.cuh``:
``BatchPrefillWithPagedKVCacheDevice`` (the decode wrapper with tensor cores runs it with one query per row).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..paged import Scale
from ..types import LOG2_E, HeadLayout, KVLayout

HEAD_DIMS = (64, 128, 256)
QUERY_DTYPES = (torch.bfloat16, torch.float16)
FP8_DTYPES = (torch.float8_e4m3fn,)
OLDEST = (0, 6, 15)
"""Before, the FA2 template did not take all of its bounds from the variant, or the wrapper lacked arguments."""
NEWEST = (0, 7, 0)
"""The newest that was tested."""
_ATTRIBUTES = ("_jit_module", "_jit_additional_tensor_names")  # private; set from outside, read by plan() and run()
_WORKSPACE = 4096  # bytes: without a split FlashInfer keeps nothing but four short lists
# Scores leave LogitsTransform in base 2, so that FlashInfer's own "minus infinity" of old (-5e4) is far below all of
# them. blockIdx.z is the kv head: the constructor is not told, and its range is needed before the first load. The
# constructor comes before the template's own wait for the launch that wrote the ranges, so it waits itself; then it
# lets the next launch begin, which does not rely on this one until it has waited in turn.
_VARIANT = r"""
struct MacRows : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t qo_len, kv_len, window_left;
  float sm_scale_log2, logit_scale, tanh_scale, cap_log2, value_scale;
  const int32_t* start;

  template <typename Params>
  __device__ __host__ MacRows(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    uint32_t kv_head = 0, num_kv_heads = 1;
#ifdef __CUDA_ARCH__
    kv_head = blockIdx.z;
    num_kv_heads = gridDim.z;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
#endif
    const int4 range = reinterpret_cast<const int4*>(params.mac_range)[batch_idx * num_kv_heads + kv_head];
    const int32_t low = range.x, high = range.y;
#ifdef __CUDA_ARCH__
    if (high < 0) asm volatile("exit;");  // all threads of the block agree
#endif
    start = params.mac_start + range.z * params.mac_start_pitch -
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


def version_text(version: tuple[int, ...]) -> str:
    """``(0, 7, 0)`` as ``"0.7.0"``."""
    return ".".join(map(str, version))


def lost_attributes() -> tuple[str, ...]:
    """What :class:`RangeAttention` sets on FlashInfer's wrapper and the installed wrapper does not read."""
    import flashinfer

    source = inspect.getsource(flashinfer.BatchDecodeWithPagedKVCacheWrapper)
    return tuple(name for name in _ATTRIBUTES if f"self.{name}" not in source)


def takes_dtypes(q_dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether FlashInfer's FA2 kernels take these queries beside such a cache."""
    return q_dtype in QUERY_DTYPES and kv_dtype in (q_dtype, *FP8_DTYPES)


@dataclass(frozen=True, slots=True)
class Ranges:
    """Which tokens every row reads with each kv head, on the device; the values may change between runs.

    ``bounds`` int32 [R * Hkv, 4], contiguous: the first token, the one after the last (negative: nothing is read or
    written), the row of ``starts``, and nothing. ``starts`` int32: rows of ``starts_pitch`` entries, which begin with
    the first token of each query head of a kv head.
    """

    bounds: torch.Tensor
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

    A row is a query and the tokens that it reads: a request, or a chunk of one. Every row and kv head is one thread
    block; nothing is split or merged.

    Parameters
    ----------
    begin : torch.Tensor, int32 [R + 1]
        Where the entries of each row begin in ``indices``. Ascending now; the values may change between runs. The last
        one is set here, to the number of entries.
    layout : HeadLayout
        Heads of the layer; head dim 64, 128 or 256, at most 16 query heads per kv head.
    indices : torch.Tensor, int32
        Page of every table entry; its values may change.
    page_size : int, tokens
        Tokens per page.
    kv_layout : {"NHD", "HND"}
    q_dtype, kv_dtype : torch.dtype
        bf16 or fp16 queries; keys and values of the same dtype, or fp8.

    Notes
    -----
    The first plan for a pair of dtypes and a head dim compiles for about half a minute; FlashInfer keeps the result on
    disk.
    """

    def __init__(
        self,
        begin: torch.Tensor,
        layout: HeadLayout,
        *,
        indices: torch.Tensor,
        page_size: int,
        kv_layout: KVLayout,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> None:
        import flashinfer

        rows, device = begin.numel() - 1, indices.device
        if indices.dtype != torch.int32:
            raise InputError(f"FlashInfer reads int32 page tables, got {indices.dtype}; convert the table with .int()")
        self.begin = begin
        workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
        # planned without a graph, it keeps begin and indices where they are; nothing else depends on the lengths
        self._wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, kv_layout, use_tensor_cores=True, backend="fa2"
        )
        # it took 8 MB, enough for any plan
        lists = torch.zeros(32 * rows + _WORKSPACE, dtype=torch.uint8, device=device)
        self._wrapper.reset_workspace_buffer(workspace, lists)
        # the constructor's jit_args would go through the compiler's lock at every plan
        self._wrapper._jit_module = compiled_module(q_dtype, kv_dtype, layout.head_dim)
        self._wrapper._jit_additional_tensor_names = list(_TENSORS)
        self._wrapper.plan(
            begin,
            indices,
            torch.ones(rows, dtype=torch.int32),
            layout.num_qo_heads,
            layout.num_kv_heads,
            layout.head_dim,
            page_size,
            q_data_type=q_dtype,
            kv_data_type=kv_dtype,
            disable_split_kv=True,
        )
        begin[-1:].fill_(indices.numel())

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
        pdl: bool = False,
    ) -> None:
        """Write the state of every row: ``out`` [R, Hq, D] in the dtype of ``q``, ``lse2`` [R, Hq] fp32.

        An empty range gives 0 and ``-inf``, before FlashInfer 0.7.0 about -5e4, which weighs nothing beside any score
        either. ``pdl``: launch early and wait on the device. Capturable; no sync, and nothing is allocated.
        """
        self._wrapper.run(
            q,
            keys_values,
            ranges.bounds,
            ranges.starts,
            _on_device(k_scale, q.device),
            _on_device(v_scale, q.device),
            ranges.starts_pitch,
            *scores.scalars(),
            out=out,
            lse=lse2,
            return_lse=True,
            enable_pdl=pdl,
        )


@functools.cache
def compiled_module(q_dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> Any:
    """FlashInfer's decode module of the variant, compiled on first use (then read from its cache).

    Raises
    ------
    InputError
        If FlashInfer's FA2 kernels do not take these dtypes.
    """
    if not takes_dtypes(q_dtype, kv_dtype):
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
        f"mac_rows_{hashlib.sha256(_VARIANT.encode()).hexdigest()[:8]}_{names}_d{head_dim}",
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
        "MacRows",
        _VARIANT,
    ]


def _on_device(scale: Scale, device: torch.device) -> torch.Tensor:
    return scale if isinstance(scale, torch.Tensor) else _number(float(scale), device)


@functools.lru_cache(maxsize=256)
def _number(value: float, device: torch.device) -> torch.Tensor:
    return torch.full((1,), value, dtype=torch.float32, device=device)
