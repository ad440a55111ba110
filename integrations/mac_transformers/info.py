"""What the cache has to know of a layer before it can decode it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mac_kernels import HeadLayout, InputError, UnsupportedError

from .fallback import Fallback
from .rope import ModelRope, rope_of_layer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One attention layer: place in the ring pool, heads, rotation, scale of the logits, soft-cap (0: none), device."""

    ring_layer: int
    layout: HeadLayout
    rope: ModelRope
    sm_scale: float
    logits_soft_cap: float
    device: torch.device


def inspect_layer(
    module: nn.Module,
    query: torch.Tensor,
    *,
    num_kv_heads: int,
    ring_layer: int,
    sm_scale: float | None,
    logits_soft_cap: float | None,
    known: LayerInfo | None,
) -> LayerInfo | Fallback:
    """Inspect a layer that gave ``query`` [B, Hq, N, D]; ``known`` is another layer of the model.

    Layers that rotate alike share one :class:`ModelRope`, so that one plan serves them all.
    """
    if query.dtype not in _DTYPES:
        return Fallback("dtype", f"{query.dtype} is not covered; load the model in fp32, bf16 or fp16")
    if known is not None and known.device != query.device:
        return Fallback("device", f"the rings are on {known.device}, layers on {query.device} are not covered")
    try:
        layout = HeadLayout(query.shape[1], num_kv_heads, query.shape[3])
        rope = rope_of_layer(module, query)
    except InputError as error:
        return Fallback("head layout", str(error))
    except UnsupportedError as error:
        return Fallback("rotation", str(error))
    if known is not None and known.layout != layout:
        return Fallback("head layout", f"the rings are built for {known.layout}, a layer with {layout} is not covered")
    if known is not None and known.rope.key == rope.key:
        rope = known.rope
    scale = query.shape[3] ** -0.5 if sm_scale is None else float(sm_scale)
    return LayerInfo(ring_layer, layout, rope, scale, logits_soft_cap or 0.0, query.device)
