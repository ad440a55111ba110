"""The settings of TCA, and where the far region of a query begins and ends."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch

Rule = Literal["literal", "ours"]
Mode = Literal["index", "evict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TcaConfig:
    """What every head keeps of its context. Immutable.

    Parameters
    ----------
    block : int, tokens, default 128
        Blocks of the far region, a power of two in [8, 1024]; a block keeps 1, 2, 4, ... or ``block`` of its tokens.
    local_window : int, tokens, default 4096
        The newest tokens that every query attends densely, a multiple of ``block``, at least one. A query has between
        ``local_window`` and ``local_window + block - 1`` of them besides its own token.
    mass_target : float, in (0, 1], default 0.95
        A head takes the smallest budget whose retained mass in calibration reaches this; a head that no budget serves
        stays dense. The paper's tau, 0.9 there; what a value means depends on the calibrated measure.
    alpha : float, in [0, 1], default 0.5
        Weight of the redundancy term of the rule ``"literal"``; ``"ours"`` has none.
    sinks : int, tokens, default 4
        First tokens, always kept, outside of the budgets; the blocks begin after them. 0 is the paper's rule.
    rule : {"literal", "ours"}, default "ours"
        Score that ranks the blocks, from a block's attention mass and its Herfindahl-Hirschman index (1 where one token
        holds all of it): ``"literal"`` is the published ``(1 - alpha) * mass + alpha * (1 - hhi)``, ``"ours"`` is
        ``mass * (1 - hhi)``, in which a block of no mass cannot win a large budget by being flat.
    mode : {"index", "evict"}, default "index"
        ``"index"`` keeps the whole cache and skips what is not selected (less is read); ``"evict"`` drops it (the
        paper: less is read and less is stored, and a later question cannot get it back).
    refresh : int or None, decode steps, default None
        In the mode ``"index"``, select anew by the current query after so many decode steps, ``>= 1``, which reads all
        keys once; ``None``: what the prompt selected stands, as published.

    Raises
    ------
    ConfigError
        If a value is outside its range; the message names the field, the value and the range.

    Notes
    -----
    Source of the method: TCA-Attention, arXiv 2512.09238. Sinks, the rule ``"ours"``, the mode ``"index"`` and
    ``refresh`` are ours.
    """

    block: int = 128
    local_window: int = 4096
    mass_target: float = 0.95
    alpha: float = 0.5
    sinks: int = 4
    rule: Rule = "ours"
    mode: Mode = "index"
    refresh: int | None = None

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError("bad TcaConfig: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any], *, source: str = "tca") -> TcaConfig:
        """Build a config from a mapping of field names; absent fields keep their defaults.

        Raises
        ------
        ConfigError
            If a key is unknown (the nearest known one is named) or a value is wrong; ``source`` opens the message.
        """
        known = [field.name for field in dataclasses.fields(TcaConfig)]
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(f"{source}: unknown key {key!r}{hint}; known keys: {', '.join(known)}")
        try:
            return TcaConfig(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


def far_blocks(position: int, config: TcaConfig) -> int:
    """Number of far blocks of the query at ``position``: complete blocks that its local window does not reach."""
    return max((position - config.sinks) // config.block - config.local_window // config.block, 0)


def far_blocks_at(position: torch.Tensor, config: TcaConfig) -> torch.Tensor:
    """:func:`far_blocks` of many positions."""
    return ((position - config.sinks) // config.block - config.local_window // config.block).clamp(min=0)


def far_end(blocks: int, config: TcaConfig) -> int:
    """Where the dense window of a query with this many far blocks begins; 0 without any."""
    return config.sinks + blocks * config.block if blocks > 0 else 0


def _problems(c: TcaConfig) -> list[str]:
    kinds = [
        *((name, _is_int(getattr(c, name)), "an integer") for name in ("block", "local_window", "sinks")),
        *((name, _is_number(getattr(c, name)), "a finite number") for name in ("mass_target", "alpha")),
        ("rule", c.rule in ("literal", "ours"), "'literal' or 'ours'"),
        ("mode", c.mode in ("index", "evict"), "'index' or 'evict'"),
        ("refresh", c.refresh is None or _is_int(c.refresh), "an integer or null"),
    ]
    wrong = [(name, kind) for name, good, kind in kinds if not good]
    if not wrong:
        ranges = (
            ("block", 8 <= c.block <= 1024 and c.block & (c.block - 1) == 0, "a power of two in [8, 1024] tokens"),
            (
                "local_window",
                c.local_window >= c.block and c.local_window % c.block == 0,
                f"a multiple of block = {c.block} tokens, at least one",
            ),
            ("mass_target", 0 < c.mass_target <= 1, "in (0, 1]"),
            ("alpha", 0 <= c.alpha <= 1, "in [0, 1]"),
            ("sinks", c.sinks >= 0, ">= 0 tokens"),
            ("refresh", c.refresh is None or c.refresh >= 1, ">= 1 decode step, or null to never select anew"),
            ("refresh", c.refresh is None or c.mode == "index", "null in the mode 'evict', which keeps nothing else"),
        )
        wrong = [(name, allowed) for name, good, allowed in ranges if not good]
    return [f"{name}={getattr(c, name)!r} must be {allowed}" for name, allowed in wrong]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
