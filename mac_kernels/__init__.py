"""mac-kernels: composable attention kernels for long-context decoding.

MAC-Attention (Match, Amend, Complete; arXiv 2604.00235) reuses the attention of a similar recent query, so that on a
hit the cost of a decode step no longer depends on the context, while no token is ever dropped.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME = {
    "AttnState": "types",
    "BatchMacDecodeWithPagedKVCacheWrapper": "decode",
    "ConfigError": "errors",
    "Explanation": "decode",
    "HeadLayout": "types",
    "InputError": "errors",
    "MacConfig": "config",
    "MacError": "errors",
    "MatchResult": "types",
    "MissingError": "errors",
    "PRESETS": "config",
    "PagedKV": "paged",
    "PageTable": "paged",
    "PlanError": "errors",
    "Reason": "types",
    "ResolvedConfig": "settings",
    "RingPool": "ring",
    "RingSnapshot": "snapshot",
    "Rope": "rope",
    "RowTable": "paged",
    "SnapshotError": "errors",
    "StepTrace": "types",
    "UnsupportedError": "errors",
    "accept": "match.accept",
    "correct": "complete.reference",
    "fill_rings": "prefill",
    "find_match": "match.reference",
    "lse2_from_lse_e": "complete.reference",
    "merge_state": "complete.reference",
    "partial_attention": "attend.reference",
    "resolve_config": "settings",
}
__all__ = [
    "AttnState",
    "BatchMacDecodeWithPagedKVCacheWrapper",
    "ConfigError",
    "Explanation",
    "HeadLayout",
    "InputError",
    "MacConfig",
    "MacError",
    "MatchResult",
    "MissingError",
    "PRESETS",
    "PagedKV",
    "PageTable",
    "PlanError",
    "Reason",
    "ResolvedConfig",
    "RingPool",
    "RingSnapshot",
    "Rope",
    "RowTable",
    "SnapshotError",
    "StepTrace",
    "UnsupportedError",
    "accept",
    "correct",
    "fill_rings",
    "find_match",
    "lse2_from_lse_e",
    "merge_state",
    "partial_attention",
    "resolve_config",
    "__version__",
]

if TYPE_CHECKING:
    from .attend.reference import partial_attention
    from .complete.reference import correct, lse2_from_lse_e, merge_state
    from .config import PRESETS, MacConfig
    from .decode import BatchMacDecodeWithPagedKVCacheWrapper, Explanation
    from .errors import ConfigError, InputError, MacError, MissingError, PlanError, SnapshotError, UnsupportedError
    from .match.accept import accept
    from .match.reference import find_match
    from .paged import PagedKV, PageTable, RowTable
    from .prefill import fill_rings
    from .ring import RingPool
    from .rope import Rope
    from .settings import ResolvedConfig, resolve_config
    from .snapshot import RingSnapshot
    from .types import AttnState, HeadLayout, MatchResult, Reason, StepTrace


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
