"""The front of the fused step in CUDA C++: what it supports, its constants and arguments, its launch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ..config import MacConfig
from ..launch import LaunchParams
from ..match.accept import HANDOVER
from ..paged import PagedKV, Scale
from ..ring import RingPool
from . import compiler

Arguments = dict[str, Any]
_HALVES = (torch.bfloat16, torch.float16)
_MAX_NUMBERS = 2048  # of a group's queries: more of them do not fit into registers and shared memory

_STEP_POINTERS = ("q", "k", "v", "slots", "generations", "k_scale_ptr", "v_scale_ptr", "out")
_LONG_STRIDES = ("stride_qb", "stride_ob")
_STEP_STRIDES = ("stride_qh", "stride_oh")
_LAYER_POINTERS = (
    "begin_ptr", "page_ptr", "length_ptr", "slot_table_ptr", "ring_generation_ptr", "ring_q_ptr", "ring_out_ptr",
    "ring_key_ptr", "ring_lse_ptr", "ring_pos_ptr", "ring_anchor_ptr", "ring_sketch_ptr", "ring_scale_ptr",
    "sketch_index_ptr", "sketch_sign_ptr", "counters_ptr", "bypass_ptr", "cos_sin_ptr", "cap_ptr", "influence_ptr",
    "always_out_ptr", "always_lse_ptr", "decision_int_ptr", "decision_float_ptr", "group_ptr",
)  # fmt: skip
_LAYER_STRIDES = ("stride_kp", "stride_kt", "stride_kh", "stride_vp", "stride_vt", "stride_vh")
_CONSTANTS = (
    "GROUP", "NUM_KV_HEADS", "HEAD_DIM", "WINDOW", "BLOCK_W", "BAND", "SINKS", "NOMINEES", "TERMS", "SKETCH_DIM",
    "ROTARY_DIM", "INTERLEAVED", "PAGE_SIZE", "ROW_STRIDE", "GROUP_SCOPE", "CORRECTION", "KBAR", "BYPASS", "SOFT_CAP",
    "SCALES_ON_DEVICE",
)  # fmt: skip


class FrontArguments(ctypes.Structure):
    """``struct Args`` of ``layout.cuh``."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _STEP_POINTERS),
        *((name, ctypes.c_int64) for name in _LONG_STRIDES),
        *((name, ctypes.c_int32) for name in _STEP_STRIDES),
        *((name, ctypes.c_float) for name in ("k_scale", "v_scale")),
        *((name, ctypes.c_uint64) for name in _LAYER_POINTERS),
        *((name, ctypes.c_int32) for name in _LAYER_STRIDES),
        *((name, ctypes.c_float) for name in ("logit_scale", "soft_cap")),
        *((name, ctypes.c_int32) for name in ("num_slots", "max_age", "min_context")),
    )


def unsupported_front(
    q: torch.Tensor, kv: PagedKV, rings: RingPool, config: MacConfig, out: torch.Tensor
) -> str | None:
    """Why Triton's kernels serve these tensors instead, ``None`` if the front can."""
    layout = kv.layout
    caches = (kv.k_cache, kv.v_cache)
    steps = [tensor.stride(dim) for tensor in (*caches, q, out) for dim in range(tensor.dim() - 1)]
    address = q.data_ptr() | kv.k_cache.data_ptr() | kv.v_cache.data_ptr() | out.data_ptr()
    checks = (
        (q.dtype in _HALVES, f"queries in {q.dtype} (bf16 or fp16)"),
        (kv.k_cache.dtype == q.dtype, f"a cache in {kv.k_cache.dtype} beside queries in {q.dtype}"),
        (rings.dtype in _HALVES, f"ring rows in {rings.dtype} (bf16 or fp16)"),
        (layout.head_dim % 8 == 0, f"head_dim={layout.head_dim} (a multiple of 8)"),
        (layout.group_size <= 16, f"{layout.group_size} query heads per kv head (at most 16)"),
        (
            layout.group_size * layout.head_dim <= _MAX_NUMBERS,
            f"{layout.group_size} heads of {layout.head_dim} dims (at most {_MAX_NUMBERS} numbers)",
        ),
        (
            rings.sketch_dim % 16 == 0 and 0 < rings.sketch_dim <= 128,
            f"sketch_dim={rings.sketch_dim} (a multiple of 16, at most 128)",
        ),
        (rings.index is None, "rings with an index (rows then hold what a group has seen)"),
        ((config.nominees or 65) <= 64, f"nominees={config.nominees} (1 to 64)"),
        (
            all(step % 8 == 0 and step < 2**31 for step in steps),
            f"strides {steps} of cache, queries and output (multiples of 8 below 2**31)",
        ),
        (address % 16 == 0, "cache, queries or output at an address that is no multiple of 16"),
    )
    reasons = [reason for good, reason in checks if not good]
    return "; ".join(reasons) or unsupported_device(q.device)


def unsupported_device(device: torch.device) -> str | None:
    """Why the front cannot run on a device, ``None`` if it can."""
    if device.type != "cuda":
        return f"device {device.type} (an NVIDIA GPU)"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} (needs thread block clusters, compute capability 9.0 or newer)"
    return None


class Front:
    """The front with all arguments but those that change from step to step."""

    def __init__(self, kernel: compiler.Kernel, arguments: FrontArguments, kept: Arguments) -> None:
        self._kernel, self._arguments, self._kept = kernel, arguments, kept

    def __call__(
        self,
        q: torch.Tensor,
        kv: PagedKV,
        out: torch.Tensor,
        *,
        slots: torch.Tensor,
        generations: torch.Tensor,
    ) -> None:
        """Launch for ``q`` [B, Hq, D]; the strides of the cache are those that it was bound with."""
        a = self._arguments
        a.q, a.k, a.v, a.out = q.data_ptr(), kv.k_cache.data_ptr(), kv.v_cache.data_ptr(), out.data_ptr()
        a.slots, a.generations = slots.data_ptr(), generations.data_ptr()
        a.stride_qb, a.stride_qh, _ = q.stride()
        a.stride_ob, a.stride_oh, _ = out.stride()
        a.k_scale, a.k_scale_ptr = scale_argument(kv.k_scale)
        a.v_scale, a.v_scale_ptr = scale_argument(kv.v_scale)
        self._kernel.launch(a)


def bind_front(
    values: Arguments, launch: LaunchParams, *, q: torch.Tensor, slots: torch.Tensor, generations: torch.Tensor
) -> Front | compiler.CudaError:
    """The front of a layer, or why it cannot be made.

    ``values`` are kernel arguments by the names that the Triton kernels give them.
    """
    group, numbers = values["GROUP"], values["GROUP"] * values["HEAD_DIM"]
    tensors = {name: values[name] for name in _LAYER_POINTERS}
    definitions = {
        **{name: int(values[name]) for name in _CONSTANTS},
        "HANDOVER": HANDOVER,
        "CLUSTER": launch.cluster_size,
        "THREADS": 32 * launch.front_warps,
        "BLOCKS_PER_SM": _blocks_per_sm(
            values["num_groups"], launch, wide=group > 8 or numbers > 1024, device=q.device
        ),
        "HALF_KV": int(q.dtype == torch.float16),
        "HALF_ROWS": int(tensors["ring_q_ptr"].dtype == torch.float16),
        "SLOT_64": int(slots.dtype == torch.int64),
        "GENERATION_64": int(generations.dtype == torch.int64),
        "BEGIN_64": int(tensors["begin_ptr"].dtype == torch.int64),
        "PAGE_64": int(tensors["page_ptr"].dtype == torch.int64),
        "LENGTH_64": int(tensors["length_ptr"].dtype == torch.int64),
    }
    blocks = values["num_groups"] * launch.cluster_size
    kernel = compiler.make_kernel("front.cu", tuple(definitions.items()), blocks, q.device)
    if isinstance(kernel, compiler.CudaError):
        return kernel
    arguments = FrontArguments()
    numbers = (*_LAYER_STRIDES, "logit_scale", "soft_cap", "num_slots", "max_age", "min_context")
    compiler.fill(arguments, tensors | {name: values[name] for name in numbers})
    return Front(kernel, arguments, tensors)


def _blocks_per_sm(groups: int, launch: LaunchParams, *, wide: bool, device: torch.device) -> int:
    """How many blocks must share an SM so that all run at once, as far as registers reach."""
    if device.type != "cuda":
        return 1
    needed = -(-groups * launch.cluster_size // torch.cuda.get_device_properties(device).multi_processor_count)
    return max(1, min(needed, (8 if wide else 16) // launch.front_warps))


def scale_argument(scale: Scale) -> tuple[float, int]:
    """A scale as a number and as a pointer, one of which counts."""
    return (1.0, scale.data_ptr()) if isinstance(scale, torch.Tensor) else (scale, 0)
