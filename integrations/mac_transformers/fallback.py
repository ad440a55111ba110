"""Layers and calls that run exact attention instead of MAC or TCA: said once per reason, always counted."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import NamedTuple


class Fallback(NamedTuple):
    """Why attention is exact here: a short ``reason`` to count by, and a sentence that says what to do."""

    reason: str
    detail: str


class ExactFallbackWarning(UserWarning):
    """A layer or call runs exact attention instead of MAC or TCA; the message names the reason and what to do."""


_COUNTS: Counter[str] = Counter()


def note_fallback(fallback: Fallback, method: str = "MAC") -> None:
    """Count one exact call; warn if it is the first for its reason."""
    _COUNTS[fallback.reason] += 1
    if _COUNTS[fallback.reason] == 1:
        message = f"exact attention instead of {method} ({fallback.reason}): {fallback.detail}"
        warnings.warn(message, ExactFallbackWarning, stacklevel=3)


def fallback_counts() -> dict[str, int]:
    """Exact attention calls (one per layer and forward pass) of this process, by reason."""
    return dict(_COUNTS)
