"""The quality limits of the presets: what a tuned policy has to keep, too."""

from __future__ import annotations

from collections.abc import Mapping

from mac_kernels import ConfigError

from .quality.metrics import Estimate

LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "careful": {"kl": (-1, 0.0015), "kl_p99": (-1, 0.015), "ppl_ratio": (-1, 1.01), "top1": (1, 0.985)},
    "balanced": {"kl": (-1, 0.0025), "kl_p99": (-1, 0.025), "ppl_ratio": (-1, 1.01), "top1": (1, 0.98)},
    "fast": {"kl": (-1, 0.004), "kl_p99": (-1, 0.04), "ppl_ratio": (-1, 1.02), "top1": (1, 0.975)},
}
"""By preset and metric of ``mac-kernels eval kl``: -1 for at most, 1 for at least, and the limit."""
RECALL = 0.95
"""Least share of full attention's recall in the needle tasks: one miss in twenty trials may be a tie."""


def violations(
    preset: str, found: Mapping[str, Estimate], base: Mapping[str, Estimate] | None = None
) -> dict[str, str]:
    """The limits that measured values break, by metric, in words.

    ``base`` is what the preset itself did on the same tokens: where it breaks its own limit (top-1 agreement depends on
    the text), the worse end of its interval takes the limit's place.

    Raises
    ------
    ConfigError
        If the preset has no limits.
    """
    if preset not in LIMITS:
        raise ConfigError(f"preset {preset!r} has no quality limits to tune under; choose one of {', '.join(LIMITS)}")
    broken = {}
    for name, (sign, limit) in {**LIMITS[preset], "recall": (1, RECALL)}.items():
        if base is not None and name in base and not _keeps(base[name].value, sign, limit):
            limit = base[name].low if sign > 0 else base[name].high
        if name in found and not _keeps(found[name].value, sign, limit):
            broken[name] = f"{name} {found[name].value:.4g} is {'above' if sign < 0 else 'below'} {limit:.4g}"
    return broken


def _keeps(value: float, sign: float, limit: float) -> bool:
    return (value - limit) * sign >= 0
