"""What each backend can run: every answer is a list of reasons, and the support table is generated from it."""

from __future__ import annotations

from typing import Literal

import torch

from .config import MacConfig
from .types import HeadLayout

Backend = Literal["reference"]
BACKENDS: tuple[Backend, ...] = ("reference",)
"""Fastest first; ``"auto"`` takes the first that has no reason against it."""


def unsupported_reasons(
    backend: Backend, config: MacConfig, layout: HeadLayout, device: torch.device
) -> tuple[str, ...]:
    """Return every reason why a backend cannot run this configuration here; empty if it can."""
    checks = {"reference": _reference_reasons}
    return checks[backend](config, layout, device)


def choose_backend(
    config: MacConfig, layout: HeadLayout, device: torch.device
) -> tuple[Backend, str, dict[str, tuple[str, ...]]]:
    """Return the fastest backend that can run this, one sentence why, and the reasons against those passed over."""
    rejected: dict[str, tuple[str, ...]] = {}
    for backend in BACKENDS:
        reasons = unsupported_reasons(backend, config, layout, device)
        if not reasons:
            return backend, f"the fastest backend that supports this on {device.type}", rejected
        rejected[backend] = reasons
    raise AssertionError("the reference backend supports everything that MacConfig and HeadLayout allow")


def _reference_reasons(config: MacConfig, layout: HeadLayout, device: torch.device) -> tuple[str, ...]:
    del config, layout, device
    return ()
