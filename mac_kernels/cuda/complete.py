"""Completing what the front has left, in CUDA C++: constants and arguments, the launch."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from ..bypass import PAUSE_STEPS, TRIAL_GROUPS
from . import compiler

Arguments = dict[str, Any]
_WARPS_OF_FEW = 8  # that share the parts of a head: a miss of a small batch has many

_LAYER_POINTERS = (
    "group_ptr", "parts_ptr", "part_out_ptr", "part_key_ptr", "part_lse_ptr", "always_out_ptr", "always_lse_ptr",
    "ring_out_ptr", "ring_key_ptr", "ring_lse_ptr", "ring_pos_ptr", "ring_anchor_ptr", "cos_sin_ptr", "bypass_ptr",
)  # fmt: skip
_CONSTANTS = ("GROUP", "NUM_KV_HEADS", "HEAD_DIM", "WINDOW", "ROTARY_DIM", "INTERLEAVED", "KBAR")


class CompleteArguments(ctypes.Structure):
    """``struct Args`` of ``complete.cu``."""

    _fields_ = (
        ("out", ctypes.c_uint64),
        ("stride_ob", ctypes.c_int64),
        ("stride_oh", ctypes.c_int32),
        *((name, ctypes.c_uint64) for name in _LAYER_POINTERS),
        ("break_even", ctypes.c_float),
    )


class Complete:
    """The kernel with all arguments but those that change from step to step."""

    def __init__(self, kernel: compiler.Kernel, arguments: CompleteArguments, kept: Arguments) -> None:
        self._kernel, self._arguments, self._kept = kernel, arguments, kept

    def __call__(self, out: torch.Tensor) -> None:
        """Launch for ``out`` [B, Hq, D]."""
        a = self._arguments
        a.out = out.data_ptr()
        a.stride_ob, a.stride_oh, _ = out.stride()
        self._kernel.launch(a)


def bind_complete(values: Arguments, *, q: torch.Tensor, judges: bool, num_sms: int) -> Complete | compiler.CudaError:
    """The kernel of a layer, or why it cannot be made.

    ``values`` are kernel arguments by the names that the Triton kernels give them; ``judges``: whether no other kernel
    judges the layer's hits. With few groups a head gets a block of its own.
    """
    tensors = {name: values[name] for name in _LAYER_POINTERS}
    group = values["GROUP"]
    heads, part_warps = (1, _WARPS_OF_FEW) if values["num_groups"] * 2 <= num_sms else (group, 1)
    definitions = {
        **{name: int(values[name]) for name in _CONSTANTS},
        "CLUSTER": 1,
        "THREADS": 32 * heads * part_warps,
        "HEADS": heads,
        "PART_WARPS": part_warps,
        "JUDGES": int(judges and values["BYPASS"]),
        "HALF_KV": int(q.dtype == torch.float16),
        "HALF_ROWS": int(tensors["ring_out_ptr"].dtype == torch.float16),
        "TRIAL_GROUPS": TRIAL_GROUPS,
        "PAUSE_STEPS": PAUSE_STEPS,
    }
    blocks = values["num_groups"] * (group // heads)
    kernel = compiler.make_kernel("complete.cu", tuple(definitions.items()), blocks, q.device)
    if isinstance(kernel, compiler.CudaError):
        return kernel
    arguments = CompleteArguments()
    compiler.fill(arguments, tensors | {"break_even": values["break_even"]})
    return Complete(kernel, arguments, tensors)
