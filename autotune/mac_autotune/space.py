"""What may be varied: launch parameters of the kernels, fields of a policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mac_kernels import MacConfig
from mac_kernels.launch import LaunchParams

_KB = 1024

LAUNCH_CHOICES: dict[str, tuple[int, ...]] = {
    "splits": (1, 2, 4, 8),
    "scout_tile_bytes": (16 * _KB, 32 * _KB, 64 * _KB),
    "scout_warps": (4, 8),
    "scout_stages": (1, 2, 3),
    "block_rows": (64, 128),
    "decide_warps": (2, 4, 8),
    "programs_per_sm": (1, 2, 3, 4),
    "rest_tile_bytes": (16 * _KB, 32 * _KB, 64 * _KB),
    "rest_warps": (4, 8),
    "rest_stages": (2, 3, 4, 5),
    "block_parts": (4, 8, 16, 32),
    "complete_warps": (1, 2, 4),
    "cluster_size": (0, 1, 2, 4, 8),
    "front_warps": (4, 8),
}
"""Every field of :class:`mac_kernels.launch.LaunchParams`; the values of the defaults are among them."""

KERNELS: dict[str, tuple[str, ...]] = {
    "scout": ("splits", "scout_tile_bytes", "scout_warps", "scout_stages", "block_rows"),
    "decide": ("splits", "decide_warps"),
    "rest": ("rest_tile_bytes", "rest_warps", "rest_stages"),
    "complete": ("splits", "block_parts", "complete_warps"),
    "front": ("cluster_size", "front_warps"),
}
"""The fields that each kernel is compiled for: what they do not share need not be compiled in every combination."""

_POLICY_CHOICES: dict[str, tuple[Any, ...]] = {
    "window": (128, 256, 512, 1024),
    "band": (64, 128, 256, 512),
    "sinks": (1, 4, 16),
    "max_age": (256, 512, 1024, 2048),
    "nominees": (4, 8, 12, 16, 24),
    "match_scope": ("head", "group"),
}
# the cap carries retrieval: below .3 needles are lost whatever the influence bound is
_THRESHOLD, _INFLUENCE = (0.3, 0.75), (0.02, 0.6)


class Suggest(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """See :meth:`optuna.trial.Trial.suggest_categorical`."""
        ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """See :meth:`optuna.trial.Trial.suggest_float`."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchSpace:
    """Launch parameters; ``default`` is trial 0."""

    default: LaunchParams

    def params(self) -> dict[str, Any]:
        """Trial 0."""
        return dataclasses.asdict(self.default)

    def suggest(self, trial: Suggest) -> LaunchParams:
        """Let a trial choose."""
        return LaunchParams(**{name: trial.suggest_categorical(name, LAUNCH_CHOICES[name]) for name in LAUNCH_CHOICES})

    def build(self, params: Mapping[str, Any]) -> LaunchParams:
        """What a finished trial chose."""
        return LaunchParams(**params)


@dataclass(frozen=True, slots=True)
class PolicySpace:
    """Fields of a config; ``default`` (a preset) is trial 0 and keeps what is not varied."""

    default: MacConfig

    def params(self) -> dict[str, Any]:
        """Trial 0."""
        return {name: getattr(self.default, name) for name in (*_POLICY_CHOICES, "threshold", "influence")}

    def suggest(self, trial: Suggest) -> MacConfig:
        """Let a trial choose."""
        chosen = {name: trial.suggest_categorical(name, choices) for name, choices in _POLICY_CHOICES.items()}
        chosen["threshold"] = trial.suggest_float("threshold", *_THRESHOLD)
        chosen["influence"] = trial.suggest_float("influence", *_INFLUENCE, log=True)
        return self.build(chosen)

    def build(self, params: Mapping[str, Any]) -> MacConfig:
        """What a finished trial chose; the limits are rounded to what a person would write."""
        rounded = {name: float(f"{params[name]:.3g}") for name in ("threshold", "influence")}
        return dataclasses.replace(self.default, **{**params, **rounded})


def variants(space: Mapping[str, tuple[int, ...]] = LAUNCH_CHOICES) -> list[LaunchParams]:
    """Launch parameters that together hold every variant of every kernel, as few as possible: what to compile ahead."""
    # the front replaces scout and decide, so it has launches of its own
    by_splits = {
        split: {name: _combinations(fields, space) for name, fields in KERNELS.items() if name != "front"}
        for split in space["splits"]
    }
    found = []
    for split, kernels in by_splits.items():
        for index in range(max(map(len, kernels.values()))):
            values: dict[str, int] = {}
            for combinations in kernels.values():
                values |= combinations[index % len(combinations)]
            found.append(LaunchParams(**{**values, "splits": split}))
    return [*found, *(LaunchParams(**front) for front in _combinations(KERNELS["front"], space))]


def _combinations(fields: tuple[str, ...], space: Mapping[str, tuple[int, ...]]) -> list[dict[str, int]]:
    rows: list[dict[str, int]] = [{}]
    for name in fields:
        if name != "splits":
            rows = [{**row, name: value} for row in rows for value in space[name]]
    return rows
