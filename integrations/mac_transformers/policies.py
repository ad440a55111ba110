"""What the rows of a comparison may do instead of full attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from mac_kernels import InputError, MacConfig, MatchResult, RingPool, find_match
from mac_kernels.match.accept import distance_cap
from mac_kernels.ring import RingRows
from mac_kernels.step import FindMatch
from mac_kernels.tca import TcaBudgets, TcaConfig


@dataclass(frozen=True, slots=True)
class Mac:
    """MAC with a config.

    ``row_dtype`` of the ring rows; ``sketch_dim`` as for :class:`mac_kernels.RingPool`, used if the config nominates
    rows; ``find`` matches and ``pool`` builds the rings: others than the defaults are for measuring alternatives.
    """

    config: MacConfig = field(default_factory=MacConfig)
    row_dtype: torch.dtype = torch.float32
    sketch_dim: int | None = None
    find: FindMatch = find_match
    pool: type[RingPool] = RingPool

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the config tells it from the method, so that any backend may run it."""
        return self.find is find_match and self.pool is RingPool

    def shares_step_with(self, other: Mac) -> bool:
        """Whether one call of the decode step can serve the rows of both."""
        return self._call() == other._call()

    def _call(self) -> tuple[object, ...]:
        per_row = ("threshold", "influence", "max_age")
        config = tuple((k, v) for k, v in self.config.to_dict().items() if k not in per_row)
        return config, self.row_dtype, self.sketch_dim, self.find, self.pool


@dataclass(frozen=True, slots=True)
class Window:
    """Drop everything but the first ``sinks`` and the newest tokens: the control that any KV saving has to beat.

    ``tokens`` newest tokens are kept; or ``like`` names a policy of the same comparison: what it read in one step (the
    mean over layers and kv groups) is read here in the next, so that both read the same in all.
    """

    sinks: int = 4
    tokens: int | None = None
    like: str | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.like is None):
            raise InputError("Window needs exactly one of tokens= (a fixed size) and like= (the policy to equal)")
        if self.sinks < 0 or (self.tokens is not None and self.tokens < 1):
            raise InputError(f"Window(sinks={self.sinks}, tokens={self.tokens}) must be >= 0 and >= 1 tokens")


@dataclass(frozen=True, slots=True)
class Tca:
    """TCA with a config and the calibrated budgets of the model.

    ``prefill``: ``"sparse"`` reads the prompt sparsely, too, as the method does; ``"dense"`` reads it exactly and
    selects at its end, so that only decoding differs from full attention.
    """

    config: TcaConfig
    budgets: TcaBudgets
    prefill: Literal["sparse", "dense"] = "sparse"

    def __post_init__(self) -> None:
        if self.prefill not in ("sparse", "dense"):
            raise InputError(f"Tca(prefill={self.prefill!r}) must be 'sparse' or 'dense'")

    def choices(self, num_layers: int, num_kv_heads: int) -> tuple[tuple[int, ...], ...]:
        """Candidate of every layer and kv head.

        Raises
        ------
        InputError
            If the budgets are those of a model of another shape.
        """
        key = self.budgets.key
        if (key.num_layers, key.num_kv_heads) != (num_layers, num_kv_heads):
            raise InputError(
                f"the TCA budgets of {key.short_name} are for {key.num_layers} layers of {key.num_kv_heads} kv heads, "
                f"the model has {num_layers} of {num_kv_heads}; run `mac-kernels tca calibrate` on this model"
            )
        return self.budgets.choices(self.config)


Policy = Mac | Window | Tca


def find_newest(q_pre: torch.Tensor, rows: RingRows, position: torch.Tensor, *, config: MacConfig) -> MatchResult:
    """Nominate the newest eligible row within the distance cap, the nearest where there is none.

    A control: it shows what choosing the nearest row is worth.
    """
    nearest = find_match(q_pre, rows, position, config=config)
    fresh = (rows.pos >= 0) & (rows.pos < position[:, None]) & (rows.pos > position[:, None] - config.window)
    distance = (rows.q_pre - q_pre[:, None]).square().sum(-1).sqrt()
    near = fresh[:, :, None] & torch.isfinite(rows.lse2) & (distance < _per_row(distance_cap(config, q_pre.shape[-1])))
    row = torch.where(near, rows.pos[:, :, None], -1).argmax(1)
    found = near.any(1)
    return MatchResult(
        torch.where(found, row, nearest.row),
        torch.where(found, rows.pos.gather(1, row), nearest.pos),
        torch.where(found, distance.gather(1, row[:, None])[:, 0], nearest.distance),
    )


def _per_row(cap: float | torch.Tensor) -> float | torch.Tensor:
    return cap[..., None] if isinstance(cap, torch.Tensor) else cap


def config_rows(configs: Sequence[MacConfig], device: torch.device) -> MacConfig:
    """Fold configs that differ only in threshold, influence and age limit into one whose three limits are [B, 1].

    The decode step compares against the limits elementwise, so one call serves rows under different rules.
    """
    if not configs:
        raise InputError("config_rows needs at least one config")

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    rows = copy.copy(configs[0])
    limits = {
        "threshold": column([c.threshold for c in configs]),
        "influence": column([math.inf if c.influence is None else c.influence for c in configs]),
        "max_age": column([math.inf if c.max_age is None else c.max_age for c in configs]),
    }
    for name, values in limits.items():
        object.__setattr__(rows, name, values)  # frozen, and its fields are scalars for everybody else
    return rows
