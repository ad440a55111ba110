"""Budgets for tiny models, as a calibration would have found them."""

from __future__ import annotations

from typing import Any

from mac_kernels.tca import TcaBudgets, TcaConfig
from mac_kernels.tca.budgets import CalibrationRun
from mac_kernels.tca.candidates import NUM_SPARSE
from mac_transformers.model_key import model_key

CONFIG = TcaConfig(block=8, local_window=16, sinks=2)


def budgets_for(model: Any, choices: list[list[int]], config: TcaConfig = CONFIG) -> TcaBudgets:
    """Budgets under which every head takes the given candidate at any target up to 0.9."""
    table = tuple(
        tuple(tuple(float(place >= candidate) for place in range(NUM_SPARSE)) for candidate in layer)
        for layer in choices
    )
    run = CalibrationRun(texts=(), samples=1, tokens=1, versions={}, date="", command="")
    return TcaBudgets(key=model_key(model.config, "tiny"), config=config, measure="norm", retained=table, run=run)
