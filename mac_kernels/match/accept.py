"""Acceptance: whether the state of the matched row may stand in for the exact one."""

from __future__ import annotations

import math

import torch

from ..config import MacConfig


def distance_cap(config: MacConfig, head_dim: int) -> float:
    """Largest accepted query distance (exclusive), ``sqrt(2 D) (1 - threshold)``; ``inf`` for threshold ``-inf``."""
    return math.sqrt(2 * head_dim) * (1 - config.threshold)


def accept(
    distance: torch.Tensor, weight_bound: torch.Tensor, age: torch.Tensor, *, config: MacConfig, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Judge every query head on its own.

    Parameters
    ----------
    distance : torch.Tensor, [...] fp32
        ``||q_pre - q_pre[row]||``; ``inf`` where no row is eligible.
    weight_bound : torch.Tensor, [...] fp32, in [0, 1]
        Upper bound of the weight that the reused state will get in the output.
    age : torch.Tensor, [...] int64, tokens
        Distance to the last exact prefix that the state descends from.
    config : MacConfig
        ``threshold``, ``influence`` and ``max_age`` are used.
    head_dim : int
        ``D``.

    Returns
    -------
    near, young, light : torch.Tensor, [...] bool
        Within the distance cap, within the age limit, within the influence bound. A head passes if all three hold.

    Notes
    -----
    The cap carries retrieval (a head whose old query ignored a passage looks harmless by its weight), the bound carries
    fidelity; in long contexts retrieval needs both. With threshold ``-inf`` every eligible row is near.
    """
    cap = distance_cap(config, head_dim)
    near = distance < cap
    young = torch.ones_like(near) if config.max_age is None else age <= config.max_age
    if config.influence is None:
        light = torch.ones_like(near)
    else:
        light = weight_bound * distance < config.influence * math.sqrt(2 * head_dim)
    return near, young, light
