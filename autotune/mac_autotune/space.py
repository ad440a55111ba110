"""What may be varied: launch parameters of the kernels, fields of a policy."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
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
    "programs_per_sm": (1, 2, 3),
    "rest_tile_bytes": (16 * _KB, 32 * _KB, 64 * _KB),
    "rest_warps": (4, 8),
    "rest_stages": (3, 5, 7),
    "block_parts": (4, 8, 16, 32, 64),
    "complete_splits": (1, 2, 4),
    "complete_warps": (1, 2, 4),
    "cluster_size": (0, 1, 2, 4, 8),
    "front_warps": (4, 8),
}
"""Every field of :class:`mac_kernels.launch.LaunchParams`; the values of the defaults are among them."""

KERNELS: dict[str, tuple[str, ...]] = {
    "scout": ("scout_tile_bytes", "scout_warps", "scout_stages", "block_rows"),
    "decide": ("decide_warps",),
    "rest": ("rest_tile_bytes", "rest_warps", "rest_stages"),
    "complete": ("block_parts", "complete_splits", "complete_warps"),
    "front": ("cluster_size", "front_warps"),
}
"""The fields that each kernel is compiled for: what they do not share need not be compiled in every combination."""

TRITON = ("scout", "decide", "rest", "complete")
"""The kernels of a step where no CUDA kernel serves."""
_PROGRAMS = {"scout": "splits", "rest": "programs_per_sm"}
"""The fields that say how many programs of a kernel there are."""
_FEW = 16

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
    """Launch parameters of the kernels that serve; ``default`` is trial 0 and keeps what those kernels do not take.

    ``kernels``: those that serve and have fields: :data:`TRITON`, ``("front",)`` or ``("front", "rest")``.
    """

    default: LaunchParams
    kernels: tuple[str, ...]

    @property
    def size(self) -> int:
        """Points."""
        return math.prod(len(self._choices(name)) for name in self._names)

    def params(self) -> dict[str, Any]:
        """Trial 0."""
        return {name: getattr(self.default, name) for name in self._names}

    def first(self) -> list[dict[str, Any]]:
        """Trial 0, and behind it all of a space so small that drawing would miss some and draw others again."""
        if self.size > _FEW:
            return [self.params()]
        every = itertools.product(*(self._choices(name) for name in self._names))
        points = [dict(zip(self._names, values, strict=True)) for values in every]
        return sorted(points, key=lambda params: params != self.params())

    def suggest(self, trial: Suggest) -> LaunchParams:
        """Let a trial choose."""
        return self.build({name: trial.suggest_categorical(name, self._choices(name)) for name in self._names})

    def build(self, params: Mapping[str, Any]) -> LaunchParams:
        """What a finished trial chose."""
        return dataclasses.replace(self.default, **params)

    def _choices(self, name: str) -> tuple[int, ...]:
        """Where the front can serve, it does."""
        return tuple(c for c in LAUNCH_CHOICES[name] if c > 0 or "front" not in self.kernels)

    @property
    def _names(self) -> list[str]:
        programs = [name for kernel, name in _PROGRAMS.items() if kernel in self.kernels]
        return [*programs, *(name for kernel in self.kernels for name in KERNELS[kernel])]


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


def variants(space: LaunchSpace) -> list[LaunchParams]:
    """Launch parameters that together hold every variant of every kernel, as few as possible: what to compile ahead."""
    default, rows = space.default, {kernel: _combinations(KERNELS[kernel]) for kernel in space.kernels}
    if "front" not in rows:
        return [
            dataclasses.replace(default, splits=splits, **values)
            for splits in LAUNCH_CHOICES["splits"]
            for values in _side_by_side(rows.values())
        ]
    front = [row for row in rows.pop("front") if row["cluster_size"] > 0]
    # one after the other: processes that compile side by side would all begin with the few variants of the front
    return [dataclasses.replace(default, **values) for values in (*front, *_side_by_side(rows.values()))]


def _combinations(fields: tuple[str, ...]) -> list[dict[str, int]]:
    choices = (LAUNCH_CHOICES[name] for name in fields)
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*choices)]


def _side_by_side(rows: Collection[Sequence[dict[str, int]]]) -> list[dict[str, int]]:
    """One row of every list at a time, shorter lists over and over."""
    return [
        {name: value for one in rows for name, value in one[index % len(one)].items()}
        for index in range(max(map(len, rows), default=0))
    ]
