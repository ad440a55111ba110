"""What is measured: the cases of every suite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mac_kernels import HeadLayout

MissPattern = Literal["scattered", "contiguous"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """One decode step: batch, context, heads, and the outcome that is planted in the rings.

    ``hit_rate`` per kv group; ``"scattered"`` misses lie anywhere over requests and groups, ``"contiguous"`` ones fill
    whole requests; ``lag`` tokens between the query and the row it matches.
    """

    batch: int
    context: int
    layout: HeadLayout
    hit_rate: float
    miss_pattern: MissPattern = "scattered"
    lag: int = 64
    page_size: int = 16

    @property
    def misses(self) -> int:
        """Groups that miss: the nearest whole number."""
        return round((1 - self.hit_rate) * self.batch * self.layout.num_kv_heads)

    @property
    def planted_hit_rate(self) -> float:
        """What the whole number of misses makes of ``hit_rate``."""
        return 1 - self.misses / (self.batch * self.layout.num_kv_heads)

    def __str__(self) -> str:
        return (
            f"G{self.layout.group_size}-B{self.batch}-L{self.context}-hit{self.hit_rate:g}"
            f"-{self.miss_pattern}-lag{self.lag}"
        )


_LAYOUTS = (HeadLayout(32, 4, 128), HeadLayout(32, 8, 128))
_OUTCOMES: tuple[tuple[float, MissPattern, int], ...] = (
    (1.0, "scattered", 64),
    (1.0, "scattered", 160),
    (0.95, "scattered", 64),
    (0.95, "contiguous", 64),
    (0.9, "scattered", 64),
    (0.5, "scattered", 64),
    (0.0, "scattered", 64),
)

_CASES = (
    DecodeCase(batch=batch, context=context, layout=layout, hit_rate=hit, miss_pattern=pattern, lag=lag)
    for layout in _LAYOUTS
    for batch in (1, 16, 64)
    for context in (32768, 126976)
    for hit, pattern, lag in _OUTCOMES
)
DECODE = tuple(case for case in _CASES if abs(case.planted_hit_rate - case.hit_rate) <= 0.03)
"""Both group sizes, batch 1 to 64, both contexts, every hit rate that the number of groups can show: the rows where MAC
loses are among them."""
