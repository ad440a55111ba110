"""MAC-Attention for unmodified transformers models.

Importing this package registers ``attn_implementation="mac"``; generation then takes a :class:`MacCache`.
"""

from __future__ import annotations

from .attention import mac_attention_forward, register
from .cache import MacCache
from .fallback import ExactFallbackWarning, fallback_counts

__all__ = ["ExactFallbackWarning", "MacCache", "fallback_counts", "mac_attention_forward", "register"]

register()
