"""TCA-Attention (arXiv 2512.09238): each head keeps its core context tokens and a local window."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "EvictedKV": "evict",
    "FarSet": "select",
    "MissIndex": "index",
    "Selection": "select",
    "TcaBudgets": "budgets",
    "TcaConfig": "config",
    "compact": "reference",
    "find_budgets": "budgets",
    "importance": "select",
    "refresh_index": "refresh",
    "select_far": "select",
    "select_prompt": "select",
    "sparse_decode": "reference",
    "sparse_prefill": "reference",
}
__all__ = [
    "EvictedKV",
    "FarSet",
    "MissIndex",
    "Selection",
    "TcaBudgets",
    "TcaConfig",
    "compact",
    "find_budgets",
    "importance",
    "refresh_index",
    "select_far",
    "select_prompt",
    "sparse_decode",
    "sparse_prefill",
]

if TYPE_CHECKING:
    from .budgets import TcaBudgets, find_budgets
    from .config import TcaConfig
    from .evict import EvictedKV
    from .index import MissIndex
    from .reference import compact, sparse_decode, sparse_prefill
    from .refresh import refresh_index
    from .select import FarSet, Selection, importance, select_far, select_prompt


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
