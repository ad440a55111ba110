"""Which attention layers of a model are served, with which rotation, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mac_kernels import HeadLayout, Rope
from mac_kernels.paged import KV_DTYPES

from . import compat


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What layers that share a plan have in common; ``rope`` is ``None`` where nobody asked for it."""

    rope: Rope | None
    sm_scale: float
    logits_soft_cap: float

    @property
    def rotation(self) -> Rope:
        """How queries are rotated, of layers that were mapped with ``rotated``."""
        assert self.rope is not None
        return self.rope


@dataclass(frozen=True, slots=True)
class ServedLayer:
    """One layer that is served: its place among them and its kind."""

    index: int
    kind: LayerKind


@dataclass(frozen=True, slots=True)
class LayerMap:
    """The attention layers of a model by SGLang's layer id.

    ``served``: those that are served; ``exact``: the reason for every other one; ``layout``: heads of the served ones
    as this rank sees them (``None`` if there are none).
    """

    served: Mapping[int, ServedLayer]
    exact: Mapping[int, str]
    layout: HeadLayout | None

    @property
    def complete(self) -> bool:
        """Whether every attention layer is served, so that decode needs no exact plan."""
        return not self.exact

    def reasons(self) -> dict[str, list[int]]:
        """Layers that run exact attention, by reason."""
        by_reason: dict[str, list[int]] = {}
        for layer, reason in self.exact.items():
            by_reason.setdefault(reason, []).append(layer)
        return by_reason


def map_layers(model: torch.nn.Module, *, kv_dtype: torch.dtype, context_len: int, rotated: bool) -> LayerMap:
    """Look at every attention layer of a loaded model.

    Parameters
    ----------
    model : torch.nn.Module
        With SGLang's ``RadixAttention`` layers; the module that owns one holds its rotary embedding too.
    kv_dtype : torch.dtype
        Of the KV cache.
    context_len : int, tokens
        Longest context that is served.
    rotated : bool
        Whether the rotation of the queries must be known; layers that have none, or another kind, are then exact.
    """
    ropes: dict[int, Rope] = {}
    kinds: dict[tuple[int | None, float, float], LayerKind] = {}
    served: dict[int, ServedLayer] = {}
    exact: dict[int, str] = {}
    layouts: dict[int, HeadLayout] = {}
    for owner, layer in _attention_layers(model):
        number = int(layer.layer_id)
        reason = _reason_against(layer, kv_dtype) or (_reason_against_rotation(owner) if rotated else None)
        if reason is not None:
            exact[number] = reason
            continue
        layouts[number] = HeadLayout(layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim)
        rope = None
        if rotated:
            rotary = owner.rotary_emb
            if id(rotary) not in ropes:
                ropes[id(rotary)] = compat.rope_of(rotary, context_len)
            rope = ropes[id(rotary)]
        key = (None if rope is None else id(rope), float(layer.scaling), float(layer.logit_cap))
        if key not in kinds:
            kinds[key] = LayerKind(rope, *key[1:])
        served[number] = ServedLayer(0, kinds[key])
    layout = _most_common(layouts.values())
    for number, own in layouts.items():
        if own != layout:
            del served[number]
            exact[number] = "its heads differ from those of most layers"
    ordered = {number: ServedLayer(index, served[number].kind) for index, number in enumerate(sorted(served))}
    return LayerMap(ordered, exact, layout)


def _attention_layers(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Every attention layer with the module that owns it."""
    kind = compat.attention_layer_class()
    return [
        (owner, child) for owner in model.modules() for child in owner.children() if isinstance(child, kind)
    ]  # fmt: skip


def _reason_against(layer: Any, kv_dtype: torch.dtype) -> str | None:
    checks = (
        (kv_dtype not in KV_DTYPES, f"kv cache dtype {kv_dtype}"),
        (layer.is_cross_attention, "cross attention"),
        (not compat.is_decoder_layer(layer), "not causal"),
        (layer.sliding_window_size > -1, "sliding window"),
        (layer.qk_head_dim != layer.v_head_dim, "keys and values of different head dims"),
        (layer.xai_temperature_len > 0, "queries scaled by position"),
    )
    return next((reason for holds, reason in checks if holds), None)


def _reason_against_rotation(owner: Any) -> str | None:
    rotary = getattr(owner, "rotary_emb", None)
    checks = (
        (rotary is None or not compat.is_rotated(owner), "no rotary embedding"),
        (rotary is not None and not compat.is_plain_rope(rotary), f"rotary embedding {type(rotary).__name__}"),
    )
    return next((reason for holds, reason in checks if holds), None)


def _most_common(layouts: Iterable[HeadLayout]) -> HeadLayout | None:
    counts: dict[HeadLayout, int] = {}
    for layout in layouts:
        counts[layout] = counts.get(layout, 0) + 1
    return max(counts, key=counts.__getitem__) if counts else None
