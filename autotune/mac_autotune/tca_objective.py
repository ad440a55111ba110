"""TCA's block, local window and mass target: the context that decoding reads against the divergence on traces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mac_kernels import InputError
from mac_kernels.tca import TcaBudgets, TcaConfig

from .objective import Measured, Report
from .replay_tca import replay_selected
from .space import Suggest
from .traces import Trace

BLOCKS = (32, 64, 128, 256)
_WINDOWS = (8, 16, 32)
"""Local windows, as parts of the context."""
_DROPPED = (0.005, 0.2)
"""Range of what a head may drop in calibration, 1 - mass_target."""

Calibrated = Callable[[TcaConfig], TcaBudgets]
"""Budgets of the model for a block and a window; asked again for the same ones it should not measure again."""


class TcaObjective:
    """Share of the context that a decode step reads, and the divergence from full attention on the traces.

    Parameters
    ----------
    base : TcaConfig
        Trial 0, of which block, local window and mass target are varied.
    traces : sequence of (Trace, torch.Tensor)
        With what full attention gives on each.
    calibrated : callable
    context : int, tokens
        Where the share is counted, longer than the windows.

    Raises
    ------
    InputError
        If the prompts of the traces have no far region under the largest block and window.
    """

    metrics = ("kv read", "divergence")
    noisy = False

    def __init__(
        self,
        base: TcaConfig,
        traces: Sequence[tuple[Trace, torch.Tensor]],
        calibrated: Calibrated,
        *,
        context: int,
    ) -> None:
        self._base, self._traces, self._calibrated, self._context = base, traces, calibrated, context
        self._windows = windows(context)
        shortest = min(trace.prompt for trace, _ in traces)
        if shortest <= base.sinks + self._windows[-1] + BLOCKS[-1]:
            raise InputError(
                f"traces with prompts of {shortest} tokens have nothing far of a window of {self._windows[-1]} and "
                f"blocks of {BLOCKS[-1]}; record longer prompts or tune for a shorter context"
            )

    def first(self) -> list[dict[str, Any]]:
        """Trial 0: the base, with the nearest values of the space."""
        nearest = {
            name: min(known, key=lambda value: abs(value - getattr(self._base, name)))
            for name, known in (("block", BLOCKS), ("local_window", self._windows))
        }
        return [{**nearest, "dropped": min(max(1 - self._base.mass_target, _DROPPED[0]), _DROPPED[1])}]

    def suggest(self, trial: Suggest) -> TcaConfig:
        """Let a trial choose."""
        chosen = {
            "block": trial.suggest_categorical("block", BLOCKS),
            "local_window": trial.suggest_categorical("local_window", self._windows),
            "dropped": trial.suggest_float("dropped", *_DROPPED, log=True),
        }
        return self.build(chosen)

    def build(self, params: Mapping[str, Any]) -> TcaConfig:
        """The config that a finished trial chose; the target is rounded to what a person would write."""
        values = dict(params)
        target = round(1 - values.pop("dropped"), 4)
        return dataclasses.replace(self._base, **values, mass_target=target)

    def measure(self, point: TcaConfig, report: Report) -> Measured:
        """Count what is read, replay the traces."""
        budgets = self._calibrated(point)
        choices = budgets.choices(point)
        share = budgets.share_read(point, self._context)
        errors = [replay_selected(trace, point, choices, exact) for trace, exact in self._traces]
        divergence = float(torch.stack([error.mean() for error in errors]).mean())
        return Measured((share, divergence), notes={"divergence": divergence})


def windows(context: int) -> tuple[int, ...]:
    """The local windows that are tried, whole blocks of every size, smallest first."""
    whole = (context // part // BLOCKS[-1] * BLOCKS[-1] for part in _WINDOWS)
    return tuple(sorted({max(BLOCKS[-1], min(window, TcaConfig().local_window)) for window in whole}))
