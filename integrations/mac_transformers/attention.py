"""The attention function that transformers calls under ``attn_implementation="mac"``."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .cache import NAME, MacCache
from .fallback import Fallback, note_fallback

_NO_CACHE = Fallback(
    "no MacCache",
    "pass past_key_values=mac_transformers.MacCache(model.config) to generate(); if you did, this model changes keys "
    "after caching them (as MLA does) and is not covered",
)


def register() -> None:
    """Register ``attn_implementation="mac"`` with transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, mac_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def mac_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    mac_probe: list[torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend ``query`` [B, Hq, N, D] to ``key``, ``value`` [B, Hkv, L, D]; returns [B, N, Hq, D] and ``None``.

    With a :class:`MacCache`, a single new token is decoded with MAC; several are attended exactly and fill the rings.
    Whatever MAC does not cover is attended exactly, said once and counted (:func:`fallback_counts`). ``mac_probe``
    receives the query and nothing is attended: so the cache asks a layer how it rotates.
    """
    if mac_probe is not None:
        mac_probe.append(query)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    cache = _cache_of(key)
    fallback = _NO_CACHE if cache is None else obstacle(module, query, key, value, dropout, kwargs)
    if cache is not None and fallback is None:
        fallback = cache.begin(
            module,
            query,
            key,
            attention_mask=attention_mask,
            position_ids=kwargs.get("position_ids"),
            sm_scale=scaling,
            logits_soft_cap=kwargs.get("softcap"),
        )
    if cache is not None and fallback is None and query.shape[2] == 1:
        return cache.decode(cast(int, module.layer_idx), query[:, :, 0])[:, None], None
    out = exact_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if fallback is not None:
        note_fallback(fallback)
    elif cache is not None:
        cache.prefill(cast(int, module.layer_idx), query)
    return out, None


def exact_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> torch.Tensor:
    """Attend with the library's own functions: sdpa, or the model's eager one for soft-caps and attention sinks."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        attend = sdpa_attention_forward
    else:
        attend = sys.modules[type(module).__module__].eager_attention_forward
        attention_mask = _additive(attention_mask, query, key)
    out: torch.Tensor = attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)[0]
    return out


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask as eager attention adds it: 0 where a query may look, the least number elsewhere; none means causal."""
    if mask is None:
        count, length = query.shape[2], key.shape[2]
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)


def _cache_of(key: torch.Tensor) -> MacCache | None:
    origin = getattr(key, "mac_origin", None)
    cache: MacCache | None = None if origin is None else origin()
    return cache


def obstacle(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    kwargs: dict[str, Any],
) -> Fallback | None:
    """Why this call cannot use MAC or TCA although it has a cache for it; ``None`` if it can."""
    causal = kwargs.get("is_causal")
    numbered = isinstance(getattr(module, "layer_idx", None), int)
    checks = (
        (not numbered, "layer index", "the attention layer has no layer_idx and is not covered"),
        (kwargs.get("s_aux") is not None, "attention sinks", "layers with learned sinks are not covered"),
        (kwargs.get("sliding_window") is not None, "sliding window", "sliding-window layers read little anyway"),
        (kwargs.get("position_bias") is not None, "position bias", "layers with a position bias are not covered"),
        (not (getattr(module, "is_causal", True) if causal is None else causal), "not causal", "it must be causal"),
        (dropout > 0, "dropout", "attention dropout is on; call model.eval()"),
        (torch.is_grad_enabled() and query.requires_grad, "gradients", "there is no backward; use torch.no_grad()"),
        (key.shape[-1] != value.shape[-1], "head dims", "keys and values of different head dims are not covered"),
    )
    return next((Fallback(reason, detail) for holds, reason, detail in checks if holds), None)
