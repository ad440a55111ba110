"""The policy layer: expected latency of a config on recorded traces, no further from full attention than the preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mac_kernels import MacConfig
from mac_kernels.config import HeadTable

from .latency import LatencyModel, Reads
from .objective import Measured, Report
from .replay import Replayed, replay
from .space import PolicySpace, Suggest
from .traces import Trace

SLACK = 1.15
"""How much more divergence than the preset's a trial may show on the traces; the closed loop has the last word."""
_CALIBRATED = "influence_scale"


class PolicyObjective:
    """Expected latency relative to the preset's; the second metric is the divergence on the traces.

    Parameters
    ----------
    preset : MacConfig
        Trial 0, and the measure of divergence.
    traces : sequence of (Trace, torch.Tensor)
        With what full attention gives on each.
    latency : LatencyModel
    constrained : bool, default True
        ``False`` for a Pareto study, whose second metric is what would be constrained.
    """

    metrics = ("expected latency", "divergence")
    noisy = False

    def __init__(
        self,
        preset: MacConfig,
        traces: Sequence[tuple[Trace, torch.Tensor]],
        latency: LatencyModel,
        *,
        constrained: bool = True,
    ) -> None:
        self._space, self._traces, self._latency, self._constrained = PolicySpace(preset), traces, latency, constrained
        scale = traces[0][0].scale
        self._scale: HeadTable | None = None if scale is None else tuple(map(tuple, scale))
        self._base: tuple[Reads, Replayed] | None = None

    def first(self) -> list[dict[str, Any]]:
        """Trial 0: the preset."""
        return [self._space.params() | ({} if self._scale is None else {_CALIBRATED: "none"})]

    def suggest(self, trial: Suggest) -> MacConfig:
        """Let a trial choose."""
        config = self._space.suggest(trial)
        if self._scale is None or trial.suggest_categorical(_CALIBRATED, ("none", "calibrated")) == "none":
            return config
        return dataclasses.replace(config, influence_scale=self._scale)

    def build(self, params: Mapping[str, Any]) -> MacConfig:
        """The config that a finished trial chose."""
        values = dict(params)
        scaled = values.pop(_CALIBRATED, "none") == "calibrated"
        return dataclasses.replace(self._space.build(values), influence_scale=self._scale if scaled else None)

    def measure(self, point: MacConfig, report: Report) -> Measured:
        """Replay a config on every trace."""
        preset = self._space.default
        if self._base is None:
            base = self._all(preset, lambda value, step: None)
            self._base = base
        base_reads, base_seen = self._base
        reads, seen = self._base if point == preset else self._all(point, report)
        ratio = self._latency.ratio(point, reads, preset, base_reads)
        more = {
            "divergence": seen.divergence / base_seen.divergence - SLACK,
            "divergence p99": seen.divergence_p99 / base_seen.divergence_p99 - SLACK,
        }
        notes = {
            "group hit": round(reads.hit, 4),
            "tokens on hit": round(reads.tokens_on_hit, 1) if reads.hit else 0.0,
            "divergence": seen.divergence,
            "divergence p99": seen.divergence_p99,
            "basis": self._latency.basis,
        }
        return Measured((ratio, seen.divergence), more if self._constrained else {}, notes)

    def _all(self, config: MacConfig, report: Report) -> tuple[Reads, Replayed]:
        """Means over the traces."""
        seen: list[Replayed] = []
        for step, (trace, exact) in enumerate(self._traces):
            seen.append(replay(trace, config, exact))
            if step + 1 < len(self._traces) and self._base is not None:
                reads = mean_reads([one.reads for one in seen])
                report(self._latency.ratio(config, reads, self._space.default, self._base[0]), step)
        reads = mean_reads([one.reads for one in seen])
        divergence, p99 = (float(np.mean([getattr(one, name) for one in seen])) for name in _DIVERGENCES)
        return reads, Replayed(reads, divergence, p99)


_DIVERGENCES = ("divergence", "divergence_p99")


def mean_reads(parts: Sequence[Reads]) -> Reads:
    """Reads over several texts of equal length."""
    hit = sum(part.hit for part in parts)
    tokens = sum(part.hit * part.tokens_on_hit for part in parts if part.hit > 0)
    return Reads(hit / len(parts), tokens / hit if hit else 0.0)
