"""What the kit runs: shapes as cases, acceptance rules as configs, and an all-pairs matrix over the shapes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ...config import MacConfig
from ...rope import Rope
from ...types import HeadLayout, KVLayout

_TABLE_ROWS = 4096  # more than any chain of the kit is long
Rotary = Literal["full", "partial", "interleaved", "scaled"]


@dataclass(frozen=True, slots=True)
class Case:
    """One shape: heads, page table and rotation. ``str(case)`` is its test id."""

    head_dim: int = 16
    group: int = 2
    kv_heads: int = 2
    page_size: int = 4
    kv_layout: KVLayout = "NHD"
    rotary: Rotary = "full"

    def __str__(self) -> str:
        return f"D{self.head_dim}-G{self.group}-Hkv{self.kv_heads}-P{self.page_size}-{self.kv_layout}-{self.rotary}"

    @property
    def layout(self) -> HeadLayout:
        """Heads of the case."""
        return HeadLayout(self.group * self.kv_heads, self.kv_heads, self.head_dim)

    def rope(self, device: torch.device | str) -> Rope:
        """The rotation: base 10000, over half the dims if partial, with magnitude 1.2 (as YaRN's) if scaled.

        A device reads the table that the CPU computed: its own powers and cosines differ in the last bit, and at
        position 40 that bit is already more than an fp32 rotation may be wrong by.
        """
        dim = self.head_dim // 2 if self.rotary == "partial" and self.head_dim >= 8 else self.head_dim
        dim -= dim % 2
        inv_freq = 10000.0 ** -(torch.arange(0, dim, 2).float() / dim)
        scaling = 1.2 if self.rotary == "scaled" else 1.0
        rope = Rope.from_inv_freq(inv_freq, attention_scaling=scaling, interleaved=self.rotary == "interleaved")
        if torch.device(device).type == "cpu":
            return rope
        table = rope.cos_sin_cache(_TABLE_ROWS, "cpu").to(device)
        return Rope.from_cos_sin_cache(table, interleaved=rope.interleaved)


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Combinations in which every pair of values of two factors occurs (greedy, deterministic)."""
    names = list(factors)
    missing = dict.fromkeys(
        (a, x, b, y) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    )
    chosen: list[dict[str, Any]] = []
    while missing:
        a, x, b, y = next(iter(missing))
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                gains = [sum(p in missing for p in _pairs({**row, name: value}, names)) for value in factors[name]]
                row[name] = factors[name][gains.index(max(gains))]
        chosen.append(row)
        for pair in _pairs(row, names):
            missing.pop(pair, None)
    return chosen


def _pairs(row: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, Any, str, Any]]:
    present = [name for name in names if name in row]
    return [(a, row[a], b, row[b]) for a, b in itertools.combinations(present, 2)]


SMALL_CASES = (
    Case(),
    Case(head_dim=80, group=3, kv_heads=1, page_size=5, kv_layout="HND", rotary="partial"),
    Case(head_dim=16, group=1, kv_heads=3, page_size=1, rotary="interleaved"),
    Case(head_dim=64, group=7, kv_heads=1, page_size=16, kv_layout="HND", rotary="scaled"),
)
"""Few and small: seconds on one CPU core, and fit for an interpreted kernel."""

PAIRWISE_CASES = tuple(
    Case(**row)
    for row in pairwise(
        {
            "head_dim": (16, 32, 64, 80, 96, 128, 192, 256),
            "group": (1, 3, 5, 6, 7, 8, 12, 16),
            "kv_heads": (1, 2, 4),
            "page_size": (1, 5, 16, 64),
            "kv_layout": ("NHD", "HND"),
            "rotary": ("full", "partial", "interleaved", "scaled"),
        }
    )
)
"""Every pair of two shape properties at least once: for a GPU."""

_BASE = MacConfig(
    window=16, band=6, sinks=2, min_context=12, influence=None, max_age=None, nominees=64, break_even=None
)


def variant(**changes: Any) -> MacConfig:
    """The kit's small config (window 16, band 6, sinks 2, min_context 12, no bound, age limit or bypass) with changes.

    There are more nominees than rows, so that the nearest row is found by backends that always nominate, too.
    """
    return MacConfig.from_dict({**_BASE.to_dict(), **changes})


CONFIGS: dict[str, MacConfig] = {
    "head": _BASE,
    "group": variant(match_scope="group"),
    "bound": variant(influence=0.35),
    "aged": variant(max_age=25),  # rows of the window are young, those that were handed on twice are not
    "plain": variant(correction=False),
    "no-sinks": variant(sinks=0),
    "wide": variant(window=40, band=3, sinks=5),
    "nominees": variant(nominees=2),
}
"""Acceptance rules that every backend must run, by name."""

PAPER = variant(correction=False, nominees=None, recompute_loaded_groups=False)
"""The published rule: heads of a loaded group stay approximate. The reference backend runs it, others refuse it."""
