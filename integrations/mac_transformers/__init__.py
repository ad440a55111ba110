"""MAC-Attention and TCA-Attention for unmodified transformers models.

Importing this package registers ``attn_implementation="mac"`` and ``"tca"``; generation then takes a :class:`MacCache`
or a :class:`TcaCache`.
"""

from __future__ import annotations

from .attention import mac_attention_forward, register
from .cache import MacCache
from .fallback import ExactFallbackWarning, fallback_counts
from .tca_attention import register_tca, tca_attention_forward
from .tca_cache import TcaCache

__all__ = [
    "ExactFallbackWarning", "MacCache", "TcaCache", "fallback_counts", "mac_attention_forward", "register",
    "register_tca", "tca_attention_forward",
]  # fmt: skip

register()
register_tca()
