"""Device counters of what the decode steps decided, read off the critical path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .types import Reason, StepTrace

READ, _TOTAL, NUM_COUNTERS = len(Reason), len(Reason) + 1, len(Reason) + 2
"""Places of the tokens read, of all tokens, and how many places there are; the reasons come first."""


@dataclass(frozen=True, slots=True)
class CounterValues:
    """Counts since the last drain, each a list over layers.

    ``groups`` kv groups by :class:`Reason` name; ``kv_tokens_read`` and ``kv_tokens_skipped`` in tokens of one kv head
    (a token is ``2 * D * itemsize`` bytes of keys and values).
    """

    groups: dict[str, list[int]]
    kv_tokens_read: list[int]
    kv_tokens_skipped: list[int]

    @property
    def hit_rate(self) -> float:
        """Reused share of all kv groups; NaN before the first step."""
        total = sum(map(sum, self.groups.values()))
        return sum(self.groups[Reason.HIT.name]) / total if total else float("nan")


class DecodeCounters:
    """Counts by layer, [num_layers, NUM_COUNTERS] int64 on the device of the rings; added to inside a CUDA graph."""

    def __init__(self, num_layers: int, device: torch.device | str) -> None:
        self.values = torch.zeros(num_layers, NUM_COUNTERS, dtype=torch.int64, device=device)

    def add(self, layer: int, trace: StepTrace) -> None:
        """Add one step of one layer."""
        counts = torch.bincount(trace.reason.flatten(), minlength=len(Reason))
        self.values[layer, : len(Reason)] += counts
        self.values[layer, READ] += trace.kv_read.sum()
        self.values[layer, _TOTAL] += (trace.kv_len[:, None].expand_as(trace.kv_read)).sum()

    def add_scan(self, layer: int, kv_len: torch.Tensor, num_kv_heads: int) -> None:
        """Add a reading of all keys of requests of ``kv_len`` [B] tokens: half a token each."""
        self.values[layer, READ] += kv_len.sum() * num_kv_heads // 2

    def drain(self) -> CounterValues:
        """Return the counts and set them to zero (a host sync on a GPU: call it between steps, not in a graph)."""
        table = self.values.to("cpu", copy=True)
        self.values.zero_()
        read, total = table[:, READ], table[:, _TOTAL]
        return CounterValues(
            groups={reason.name: table[:, reason].tolist() for reason in Reason},
            kv_tokens_read=read.tolist(),
            kv_tokens_skipped=(total - read).tolist(),
        )
