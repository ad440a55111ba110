"""The attention function that transformers calls under ``attn_implementation="tca"``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .attention import exact_attention, obstacle
from .fallback import Fallback, note_fallback
from .tca_cache import NAME, TcaCache

_NO_CACHE = Fallback("no TcaCache", "pass past_key_values=mac_transformers.TcaCache(model.config) to generate()")


def register_tca() -> None:
    """Register ``attn_implementation="tca"`` with transformers; doing it again changes nothing."""
    AttentionInterface.register(NAME, tca_attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def tca_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend ``query`` [B, Hq, N, D] to ``key``, ``value`` [B, Hkv, L, D]; returns [B, N, Hq, D] and ``None``.

    With a :class:`TcaCache`, far tokens are read as far as they were selected. Whatever TCA does not cover is attended
    exactly, said once and counted (:func:`mac_transformers.fallback_counts`).
    """
    origin = getattr(key, "tca_origin", None)
    cache: TcaCache | None = None if origin is None else origin()
    fallback = _NO_CACHE if cache is None else obstacle(module, query, key, value, dropout, kwargs)
    if cache is not None and fallback is None:
        fallback = cache.begin(module, query, attention_mask=attention_mask, position_ids=kwargs.get("position_ids"))
    if cache is not None and fallback is None:
        scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
        cap = kwargs.get("softcap") or 0.0
        return cache.attend(cast(int, module.layer_idx), query, sm_scale=scale, logits_soft_cap=cap), None
    if fallback is not None:
        note_fallback(fallback, "TCA")
        if cache is not None:
            cache.check_whole(cast(int, module.layer_idx), fallback)
    out = exact_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return out, None
