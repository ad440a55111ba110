"""Ring rows held at lower precision, to measure what it costs before a kernel is built for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch

from mac_kernels import AttnState, InputError, RingPool

STORED = ("q_pre", "out", "kbar")


def _fp8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round().clamp(-127, 127) * scale


ROUNDINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bf16": lambda x: x.bfloat16().float(),
    "fp8": _fp8,
    "int8": _int8,
}
"""fp8 (e4m3) and int8 keep one fp32 scale per head and row."""


def rounding_pool(formats: Mapping[str, str]) -> type[RingPool]:
    """Return a pool class that rounds fields (``q_pre``, ``out``, ``kbar``) to formats when a row is written.

    Raises
    ------
    InputError
        If a field or a format is unknown.
    """
    for field, kind in formats.items():
        if field not in STORED or kind not in ROUNDINGS:
            raise InputError(
                f"cannot keep {field!r} as {kind!r}; fields: {', '.join(STORED)}; formats: {', '.join(ROUNDINGS)}"
            )
    return _pool(tuple(sorted(formats.items())))


@lru_cache
def _pool(formats: tuple[tuple[str, str], ...]) -> type[RingPool]:
    kinds = {field: ROUNDINGS[kind] for field, kind in formats}

    def rounded(field: str, value: torch.Tensor) -> torch.Tensor:
        return kinds[field](value.float()) if field in kinds else value

    class RoundingPool(RingPool):
        def write(
            self,
            layer: int,
            rings: torch.Tensor,
            position: torch.Tensor,
            *,
            q_pre: torch.Tensor,
            state: AttnState,
            anchor: torch.Tensor,
            seen: torch.Tensor | None = None,
        ) -> None:
            kbar = None if state.kbar is None else rounded("kbar", state.kbar)
            state = AttnState(rounded("out", state.out), state.lse2, kbar)
            q_pre = rounded("q_pre", q_pre)
            super().write(layer, rings, position, q_pre=q_pre, state=state, anchor=anchor, seen=seen)

    return RoundingPool
