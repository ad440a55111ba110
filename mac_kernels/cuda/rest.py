"""The rest of the fused step in CUDA C++: for what shapes, its constants and arguments, its launch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ..bypass import PAUSE_STEPS, TRIAL_GROUPS
from ..paged import PagedKV
from . import compiler
from .front import scale_argument

Arguments = dict[str, Any]
_WARPS = 8
_MAX_NUMBERS = 192  # that a thread may keep in registers beside addresses and logits
_MAX_LOADS = 3  # of 64 dims: twice 8 tiles of more do not fit into shared memory
_SHARED_BYTES = 128 * 1024  # of keys and values under way, a block
# what the early blocks read: before they wait for the decision, and before the others run, ahead of it or after it
_BYTES_AHEAD = 36_000_000
_LEAD_BYTES_AHEAD = 10_000_000
_LEAD_BYTES = 40_000_000

_STEP_POINTERS = ("q", "k", "v", "k_scale_ptr", "v_scale_ptr")
_LAYER_POINTERS = (
    "begin_ptr", "page_ptr", "length_ptr", "group_ptr", "tickets_ptr", "bypass_ptr", "parts_ptr", "part_out_ptr",
    "part_key_ptr", "part_lse_ptr",
)  # fmt: skip
_LAYER_STRIDES = ("stride_kp", "stride_kt", "stride_kh", "stride_vp", "stride_vt", "stride_vh")
_CONSTANTS = (
    "GROUP", "NUM_KV_HEADS", "HEAD_DIM", "PAGE_SIZE", "ROW_STRIDE", "BAND", "SINKS", "KBAR", "BYPASS", "SOFT_CAP",
    "SCALES_ON_DEVICE",
)  # fmt: skip


class RestArguments(ctypes.Structure):
    """``struct Args`` of ``rest.cu``."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in _STEP_POINTERS),
        ("stride_qb", ctypes.c_int64),
        ("stride_qh", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("k_scale", "v_scale")),
        ("num_groups", ctypes.c_int32),
        *((name, ctypes.c_uint64) for name in _LAYER_POINTERS),
        *((name, ctypes.c_int32) for name in _LAYER_STRIDES),
        *((name, ctypes.c_float) for name in ("logit_scale", "soft_cap", "break_even")),
        *((name, ctypes.c_int32) for name in ("num_blocks", "early_blocks", "lead", "lead_ahead", "tiles_ahead")),
    )


def serves_rest(head_dim: int, group_size: int, *, kbar: bool) -> bool:
    """Whether a thread can hold a tile and its sums, and a block a few tiles; otherwise Triton's rest is faster."""
    loads, head_blocks = -(-head_dim // 64), -(-group_size // 8)
    numbers = 8 * -(-head_dim // 32) + 16 * loads * (1 + head_blocks * (1 + kbar))
    return numbers <= _MAX_NUMBERS and loads <= _MAX_LOADS


def early_blocks(front_blocks: int, num_sms: int) -> int:
    """Blocks that run beside the front, on the SMs that it leaves free if those are half of all; there is one an SM."""
    return num_sms - front_blocks if front_blocks * 2 <= num_sms else 0


class Rest:
    """The rest with all arguments but those that change from step to step."""

    def __init__(self, kernel: compiler.Kernel, arguments: RestArguments, kept: Arguments) -> None:
        self._kernel, self._arguments, self._kept = kernel, arguments, kept

    def __call__(self, q: torch.Tensor, kv: PagedKV) -> None:
        """Launch for ``q`` [B, Hq, D]; the strides of the cache are those that it was bound with."""
        a = self._arguments
        a.q, a.k, a.v = q.data_ptr(), kv.k_cache.data_ptr(), kv.v_cache.data_ptr()
        a.stride_qb, a.stride_qh, _ = q.stride()
        a.k_scale, a.k_scale_ptr = scale_argument(kv.k_scale)
        a.v_scale, a.v_scale_ptr = scale_argument(kv.v_scale)
        self._kernel.launch(a)


def bind_rest(values: Arguments, *, q: torch.Tensor, early: int, num_sms: int) -> Rest | compiler.CudaError:
    """The rest of a layer that the front serves, or why it cannot be made.

    ``values`` are kernel arguments by the names that the Triton kernels give them.
    """
    tensors = {name: values[name] for name in _LAYER_POINTERS}
    definitions = {
        **{name: int(values[name]) for name in _CONSTANTS},
        "CLUSTER": 1,
        "THREADS": 32 * _WARPS,
        "SHARED_BYTES": _SHARED_BYTES,
        "HALF_KV": int(q.dtype == torch.float16),
        "TRIAL_GROUPS": TRIAL_GROUPS,
        "PAUSE_STEPS": PAUSE_STEPS,
        "BEGIN_64": int(tensors["begin_ptr"].dtype == torch.int64),
        "PAGE_64": int(tensors["page_ptr"].dtype == torch.int64),
        "LENGTH_64": int(tensors["length_ptr"].dtype == torch.int64),
    }
    kernel = compiler.make_kernel("rest.cu", tuple(definitions.items()), num_sms, q.device)
    if isinstance(kernel, compiler.CudaError):
        return kernel
    arguments = RestArguments()
    numbers = (*_LAYER_STRIDES, "logit_scale", "soft_cap", "break_even", "num_groups")
    compiler.fill(arguments, tensors | {name: values[name] for name in numbers})
    arguments.num_blocks, arguments.early_blocks = num_sms, early
    if early:
        tile_bytes = 2 * 16 * values["HEAD_DIM"] * q.element_size()
        arguments.lead, arguments.lead_ahead = (
            size // (early * tile_bytes) for size in (_LEAD_BYTES, _LEAD_BYTES_AHEAD)
        )
        arguments.tiles_ahead = -(-_BYTES_AHEAD // (early * _WARPS * tile_bytes))
    return Rest(kernel, arguments, tensors)
