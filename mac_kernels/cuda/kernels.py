"""The CUDA C++ kernels that serve a layer: front and complete together, the rest where it is the faster one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..launch import LaunchParams
from . import compiler
from .complete import Complete, bind_complete
from .front import Front, bind_front
from .rest import Rest, bind_rest, early_blocks, serves_rest

_LOG = logging.getLogger("mac_kernels.cuda")


@dataclass(frozen=True, slots=True)
class CudaKernels:
    """Launches of one layer."""

    front: Front
    rest: Rest | None
    """``None``: Triton's is the faster one."""
    complete: Complete


def bind_kernels(
    values: dict[str, Any],
    launch: LaunchParams,
    *,
    q: torch.Tensor,
    slots: torch.Tensor,
    generations: torch.Tensor,
    num_sms: int,
) -> CudaKernels | None:
    """The kernels of a layer; ``None``, with a line in the log, if this GPU cannot run them after all.

    ``values`` are kernel arguments by the names that the Triton kernels give them.
    """
    early = early_blocks(values["num_groups"] * launch.cluster_size, num_sms)
    front = bind_front(values, launch, q=q, slots=slots, generations=generations)
    rest = None
    if serves_rest(values["HEAD_DIM"], values["GROUP"], kbar=values["KBAR"]):
        rest = bind_rest(values, q=q, early=early, num_sms=num_sms)
    complete = bind_complete(values, q=q, judges=rest is None, num_sms=num_sms)
    error = compiler.CudaError
    if isinstance(front, error) or isinstance(rest, error) or isinstance(complete, error):
        say_unused(
            str(next(kernel for kernel in (front, rest, complete) if isinstance(kernel, error))), level=logging.WARNING
        )
        return None
    return CudaKernels(front, rest, complete)


_said: set[str] = set()


def say_unused(reason: str, *, level: int = logging.INFO) -> None:
    """Log, once for every reason, that Triton's kernels serve instead."""
    if reason not in _said:
        _said.add(reason)
        _LOG.log(level, "Triton's kernels run in place of the CUDA ones: %s", reason)
