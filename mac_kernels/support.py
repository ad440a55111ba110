"""What each backend can run: every answer is a list of reasons, and the support table is generated from it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from .attend.flashinfer import (
    HEAD_DIMS,
    NEWEST,
    OLDEST,
    flashinfer_version,
    lost_attributes,
    takes_dtypes,
    version_text,
)
from .config import PRESETS, MacConfig
from .errors import UnsupportedError
from .types import HeadLayout

Backend = Literal["triton", "flashinfer", "reference"]
BACKENDS: tuple[Backend, ...] = ("triton", "flashinfer", "reference")
"""Fastest first; ``"auto"`` takes the first that has no reason against it."""
Dtypes = tuple[torch.dtype, torch.dtype]
"""Of queries and KV cache."""


def unsupported_reasons(
    backend: Backend, config: MacConfig, layout: HeadLayout, device: torch.device, *, dtypes: Dtypes | None = None
) -> tuple[str, ...]:
    """Return every reason why a backend cannot run this configuration here; empty if it can.

    ``dtypes`` may be unknown (``None``); what speaks against them is then left out.
    """
    missing = _missing_flashinfer() if backend == "flashinfer" else ()
    against = () if dtypes is None else dtype_reasons(backend, *dtypes, device)
    return (*missing, *_CHECKS[backend](config, layout, device), *against)


def choose_backend(
    config: MacConfig, layout: HeadLayout, device: torch.device, *, dtypes: Dtypes | None = None
) -> tuple[Backend, str, dict[str, tuple[str, ...]]]:
    """Return the fastest backend that can run this, one sentence why, and the reasons against those passed over."""
    rejected: dict[str, tuple[str, ...]] = {}
    for backend in BACKENDS:
        reasons = unsupported_reasons(backend, config, layout, device, dtypes=dtypes)
        if not reasons:
            return backend, f"the fastest backend that supports this on {device.type}", rejected
        rejected[backend] = reasons
    raise AssertionError("the reference backend supports everything that MacConfig and HeadLayout allow")


def resolve_backend(
    backend: Literal["auto"] | Backend,
    config: MacConfig,
    layout: HeadLayout,
    device: torch.device,
    *,
    dtypes: Dtypes | None = None,
) -> tuple[Backend, str, dict[str, tuple[str, ...]]]:
    """:func:`choose_backend` for ``"auto"``, otherwise the named one.

    Raises
    ------
    UnsupportedError
        If the named backend cannot run this; it lists every reason.
    """
    if backend == "auto":
        return choose_backend(config, layout, device, dtypes=dtypes)
    reasons = unsupported_reasons(backend, config, layout, device, dtypes=dtypes)
    if reasons:
        raise UnsupportedError(f"backend {backend!r}", reasons, "Use backend='auto'.")
    return backend, "named by the caller", {}


def _triton_reasons(config: MacConfig, layout: HeadLayout, device: torch.device) -> tuple[str, ...]:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    checks = (
        (device.type == "cuda" or interpreted, f"device {device.type} (needs an NVIDIA GPU)"),
        (layout.head_dim <= 256, f"head_dim={layout.head_dim} (at most 256)"),
    )
    return (*(reason for good, reason in checks if not good), *_match_reasons(config, layout))


def _flashinfer_reasons(config: MacConfig, layout: HeadLayout, device: torch.device) -> tuple[str, ...]:
    known = ", ".join(map(str, HEAD_DIMS))
    checks = (
        (device.type == "cuda", f"device {device.type} (needs an NVIDIA GPU)"),
        (layout.head_dim in HEAD_DIMS, f"head_dim={layout.head_dim} (FlashInfer has kernels for {known})"),
        (config.tca is None, "tca (its ranges are contiguous)"),
    )
    return (*(reason for good, reason in checks if not good), *_match_reasons(config, layout))


def _match_reasons(config: MacConfig, layout: HeadLayout) -> tuple[str, ...]:
    """Limits of the kernels that match and complete, which both fast backends use."""
    checks = (
        (layout.group_size <= 16, f"{layout.group_size} query heads per kv head (at most 16)"),
        (config.nominees is not None, "nominees=None (it scans the ring through the sketch; set nominees)"),
        ((config.nominees or 1) <= 64, f"nominees={config.nominees} (at most 64)"),
        (config.window <= 4096, f"window={config.window} (at most 4096 rows)"),
        (config.recompute_loaded_groups, "recompute_loaded_groups=False (a control for the reference backend)"),
    )
    return tuple(reason for good, reason in checks if not good)


def dtype_reasons(backend: Backend, q: torch.dtype, kv: torch.dtype, device: torch.device) -> tuple[str, ...]:
    """What speaks against queries and KV cache of these dtypes."""
    if backend == "triton" and kv.itemsize == 1 and device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 9):
            return (f"an fp8 cache on {torch.cuda.get_device_name(device)} (needs compute capability 8.9)",)
    elif backend == "flashinfer" and not takes_dtypes(q, kv):
        return (f"{q} queries beside a {kv} cache (FlashInfer takes bf16 or fp16, and beside either itself or fp8)",)
    return ()


def _missing_flashinfer() -> tuple[str, ...]:
    version = flashinfer_version()
    if version is None:
        return ("flashinfer-python is not installed (pip install 'mac-kernels[flashinfer]')",)
    found = f"flashinfer-python {version_text(version)}"
    if version < OLDEST:
        return (f"{found} (needs {version_text(OLDEST)} or newer)",)
    if version > NEWEST and (lost := lost_attributes()):
        return (f"{found}, whose wrapper has no {' and no '.join(lost)} (install {version_text(NEWEST)})",)
    return ()


def _reference_reasons(config: MacConfig, layout: HeadLayout, device: torch.device) -> tuple[str, ...]:
    del config, layout, device
    return ()


_CHECKS = {"triton": _triton_reasons, "flashinfer": _flashinfer_reasons, "reference": _reference_reasons}


@dataclass(frozen=True, slots=True)
class Feature:
    """One row of the support table: what is asked of a backend, described by inputs of :func:`unsupported_reasons`."""

    label: str
    config: MacConfig = MacConfig()
    layout: HeadLayout = HeadLayout(32, 8, 128)
    device: str = "cuda"


FEATURES = (
    Feature("CPU", device="cpu"),
    Feature("NVIDIA GPU"),
    *(Feature(f"head_dim {d}", layout=HeadLayout(32, 8, d)) for d in (80, 256, 512)),
    *(Feature(f"{g} query heads per kv head", layout=HeadLayout(8 * g, 8, 128)) for g in (12, 32)),
    Feature("without the correction", config=MacConfig(correction=False)),
    Feature('`match_scope="group"`', config=MacConfig(match_scope="group")),
    Feature("exact scan of every row (nominees=None)", config=MacConfig(nominees=None)),
    Feature("preset `paper` (control)", config=PRESETS["paper"]),
)
"""The rows of the support table."""


def support_table() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return, for every feature and backend, the reasons against it; an empty tuple means that it is supported.

    The table speaks of what the backends can do, not of the machine that it is printed on.
    """
    return {
        feature.label: {
            backend: _CHECKS[backend](feature.config, feature.layout, torch.device(feature.device))
            for backend in BACKENDS
        }
        for feature in FEATURES
    }
