"""The quality limits of the presets: what a tuned policy has to keep, too."""

from __future__ import annotations

from collections.abc import Mapping

from mac_kernels import ConfigError

from .quality.metrics import Estimate

LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "careful": {"kl": (-1, 0.0015), "kl_p99": (-1, 0.015), "ppl_ratio": (-1, 1.01), "top1": (1, 0.985)},
    "balanced": {"kl": (-1, 0.004), "kl_p99": (-1, 0.045), "ppl_ratio": (-1, 1.02), "top1": (1, 0.975)},
    "fast": {"kl": (-1, 0.012), "kl_p99": (-1, 0.15), "ppl_ratio": (-1, 1.03), "top1": (1, 0.955)},
}
"""By preset and metric of ``mac-kernels eval kl``: -1 for at most, 1 for at least, and the limit."""
RECALL = 0.95
"""Least share of full attention's recall in the needle tasks: one miss in twenty trials may be a tie."""


def violations(preset: str, found: Mapping[str, Estimate]) -> dict[str, str]:
    """The limits that measured values break, by metric, in words.

    Raises
    ------
    ConfigError
        If the preset has no limits.
    """
    if preset not in LIMITS:
        raise ConfigError(f"preset {preset!r} has no quality limits to tune under; choose one of {', '.join(LIMITS)}")
    limits = {**LIMITS[preset], "recall": (1, RECALL)}
    broken = {}
    for name, (sign, limit) in limits.items():
        if name in found and not (found[name].value - limit) * sign >= 0:
            word = "above" if sign < 0 else "below"
            broken[name] = f"{name} {found[name].value:.4g} is {word} {limit:g}"
    return broken
