"""What the rows of a comparison may do instead of full attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mac_kernels import InputError, MacConfig, MatchResult, RingPool, find_match
from mac_kernels.match.accept import distance_cap
from mac_kernels.ring import RingRows
from mac_kernels.step import FindMatch
from mac_kernels.tca import MissIndex, TcaBudgets, TcaConfig


@dataclass(frozen=True, slots=True)
class Mac:
    """MAC with a config.

    ``row_dtype`` of the ring rows; ``sketch_dim`` as for :class:`mac_kernels.RingPool`, used if the config nominates
    rows; ``find`` matches and ``pool`` builds the rings: others than the defaults are for measuring alternatives.
    ``budgets`` of the model, where misses read selected tokens (``config.tca``).
    """

    config: MacConfig = field(default_factory=MacConfig)
    row_dtype: torch.dtype = torch.float32
    sketch_dim: int | None = None
    find: FindMatch = find_match
    pool: type[RingPool] = RingPool
    budgets: TcaBudgets | None = None

    def __post_init__(self) -> None:
        if (self.config.tca is None) != (self.budgets is None):
            raise InputError("Mac(budgets=...) goes with a config that has tca; give both or neither")

    def index(self, *, num_layers: int, num_kv_heads: int, **options: Any) -> MissIndex | None:
        """What misses read, if they read selected tokens; ``options`` as for :class:`mac_kernels.tca.MissIndex`."""
        if self.config.tca is None or self.budgets is None:
            return None
        choices = choices_of(self.budgets, self.config.tca, num_layers, num_kv_heads)
        return MissIndex(choices, config=self.config.tca, **options)

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
        return config, self.row_dtype, self.sketch_dim, self.find, self.pool, self.budgets


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
        """Candidate of every layer and kv head (:func:`choices_of`)."""
        return choices_of(self.budgets, self.config, num_layers, num_kv_heads)


@dataclass(frozen=True, slots=True)
class Stored:
    """Full attention over a KV cache kept in another dtype: the control that tells rounding from reuse.

    Values beyond the dtype's range become its largest.
    """

    dtype: torch.dtype

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """What comes back from the cache, in the dtype of ``x``."""
        limit = torch.finfo(self.dtype).max
        return x.clamp(-limit, limit).to(self.dtype).to(x.dtype)


Dense = Window | Stored
"""Policies that attend without state of their own."""
Policy = Mac | Dense | Tca


def choices_of(
    budgets: TcaBudgets, config: TcaConfig, num_layers: int, num_kv_heads: int
) -> tuple[tuple[int, ...], ...]:
    """Candidate of every layer and kv head of a model of this shape.

    Raises
    ------
    InputError
        If the budgets are those of a model of another shape.
    """
    key = budgets.key
    if (key.num_layers, key.num_kv_heads) != (num_layers, num_kv_heads):
        raise InputError(
            f"the TCA budgets of {key.short_name} are for {key.num_layers} layers of {key.num_kv_heads} kv heads, "
            f"the model has {num_layers} of {num_kv_heads}; run `mac-kernels tca calibrate` on this model"
        )
    return budgets.choices(config)


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
