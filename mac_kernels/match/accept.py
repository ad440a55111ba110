"""Acceptance: whether the state of the matched row may stand in for the exact one."""

from __future__ import annotations

import functools
import math

import torch

from ..config import HeadTable, MacConfig
from ..errors import InputError
from ..types import HeadLayout

HANDOVER = 16
"""Tokens of age that a state gains whenever it is handed on: a reused group stores the anchor of its oldest row less
this. The error of a state grows with both, and a text that goes in circles hands it on every few tokens."""


def distance_cap(config: MacConfig, head_dim: int) -> float:
    """Largest accepted query distance (exclusive), ``sqrt(2 D) (1 - threshold)``; ``inf`` for threshold ``-inf``."""
    return math.sqrt(2 * head_dim) * (1 - config.threshold)


def limit_tables(
    config: MacConfig, layout: HeadLayout, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two limits of :func:`accept` for kernels, each [layers, Hq] fp32; one row if all layers have the same.

    Returns
    -------
    cap : torch.Tensor
        Exclusive limit of the distance.
    influence : torch.Tensor
        Exclusive limit of weight x distance, ``inf`` where there is none.
    """
    tables = [table for table in (config.thresholds, config.influence_scale) if table is not None]
    rows = [_limits(config, layout.head_dim, layer, device) for layer in range(len(tables[0]) if tables else 1)]

    def stacked(values: list[float | torch.Tensor]) -> torch.Tensor:
        heads = layout.num_qo_heads
        return torch.stack(
            [x.expand(heads) if isinstance(x, torch.Tensor) else torch.full((heads,), x, device=device) for x in values]
        )

    return stacked([cap for cap, _ in rows]), stacked([math.inf if bound is None else bound for _, bound in rows])


def check_tables(config: MacConfig, layout: HeadLayout, num_layers: int) -> None:
    """Check that the config's tables have a row for every layer and a number for every query head.

    Raises
    ------
    InputError
        If one does not fit; the message names it and both sizes.
    """
    for name, table in (("thresholds", config.thresholds), ("influence_scale", config.influence_scale)):
        if table is not None and (len(table) != num_layers or len(table[0]) not in (1, layout.num_qo_heads)):
            raise InputError(
                f"{name} is a table of {len(table)} layers x {len(table[0])} heads, the rings have {num_layers} layers "
                f"and {layout.num_qo_heads} query heads; calibrate it for this model, or leave it out"
            )


@functools.lru_cache(maxsize=1024)
def _row(table: HeadTable, layer: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(table[layer], dtype=torch.float32, device=device)


def _limits(
    config: MacConfig, head_dim: int, layer: int, device: torch.device | str
) -> tuple[float | torch.Tensor, float | torch.Tensor | None]:
    device = torch.device(device)
    threshold = config.threshold if config.thresholds is None else _row(config.thresholds, layer, device)
    cap: float | torch.Tensor = math.sqrt(2 * head_dim) * (1 - threshold)
    bound: float | torch.Tensor | None = None
    if config.influence is not None:
        bound = config.influence * math.sqrt(2 * head_dim)
    if bound is not None and config.influence_scale is not None:
        bound = bound / _row(config.influence_scale, layer, device)
    return cap, bound


def accept(
    distance: torch.Tensor,
    weight_bound: torch.Tensor,
    age: torch.Tensor,
    *,
    config: MacConfig,
    head_dim: int,
    layer: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Judge every query head on its own.

    Parameters
    ----------
    distance : torch.Tensor, [...] fp32
        ``||q_pre - q_pre[row]||``; ``inf`` where no row is eligible.
    weight_bound : torch.Tensor, [...] fp32, in [0, 1]
        Upper bound of the weight that the reused state will get in the output.
    age : torch.Tensor, [...] int64, tokens
        Distance to the last exact prefix that the state descends from, and ``HANDOVER`` for each time it was handed on.
    config : MacConfig
        ``threshold``, ``influence`` and ``max_age`` are used, and their tables (the last dim is then ``Hq``).
    head_dim : int
        ``D``.
    layer : int, default 0
        Row of the config's tables.

    Returns
    -------
    near, young, light : torch.Tensor, [...] bool
        Within the distance cap, within the age limit, within the influence bound. A head passes if all three hold.

    Notes
    -----
    The cap carries retrieval (a head whose old query ignored a passage looks harmless by its weight), the bound carries
    fidelity; in long contexts retrieval needs both. With threshold ``-inf`` every eligible row is near.
    """
    cap, influence = _limits(config, head_dim, layer, distance.device)
    near = distance < cap
    young = torch.ones_like(near) if config.max_age is None else age <= config.max_age
    light = torch.ones_like(near) if influence is None else weight_bound * distance < influence
    return near, young, light
