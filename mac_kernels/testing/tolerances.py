"""How close is close enough: one rule, one row per (stage, dtype), each with its reason.

The rule: ``err(fast, ref) <= 2 * err(plain, ref) + floor``. ``ref`` is computed in fp64, ``plain`` is textbook torch with
the same inputs, the same rounding of the softmax weights and the same storage dtype, and ``floor = ulps * eps(dtype) *
max(1, |ref|)`` (largest magnitude) lets a lucky ``plain`` pass without hiding a bug. Errors are largest absolute differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Stage = Literal["query", "distance", "lse2", "state", "kbar", "output"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """``ulps`` units in the last place (of the stage's dtype) allowed beyond twice the plain error, and why."""

    ulps: float
    reason: str


_ORDER = "sums of a few thousand fp32 terms in another order, and exp2 good to 2 ulp"
_ROUND = "one rounding to the storage dtype, which may fall on the other side of a tie"
TOLERANCES: dict[tuple[Stage, torch.dtype], Tolerance] = {
    ("query", torch.float32): Tolerance(4, "one rotation: two products and a sum per element"),
    ("query", torch.bfloat16): Tolerance(1, _ROUND),
    ("query", torch.float16): Tolerance(1, _ROUND),
    ("distance", torch.float32): Tolerance(16, "a sum of D squares in another order, then a root"),
    ("lse2", torch.float32): Tolerance(16, _ORDER),
    ("state", torch.float32): Tolerance(16, _ORDER),
    ("state", torch.bfloat16): Tolerance(1, _ROUND),
    ("state", torch.float16): Tolerance(1, _ROUND),
    ("kbar", torch.float32): Tolerance(16, _ORDER),
    ("kbar", torch.bfloat16): Tolerance(1, _ROUND),
    ("kbar", torch.float16): Tolerance(1, _ROUND),
    ("output", torch.float32): Tolerance(16, _ORDER),
    ("output", torch.bfloat16): Tolerance(1, _ROUND),
    ("output", torch.float16): Tolerance(1, _ROUND),
}
"""Log-sum-exps and distances are fp32 whatever the inputs are; the error that 16-bit inputs and rows bring to them is
in ``plain``, which rounds in the same places."""


def max_error(x: torch.Tensor, ref: torch.Tensor) -> float:
    """Largest absolute difference, in fp64. Infinities must agree in place and sign; otherwise, or on NaN, ``inf``."""
    if x.shape != ref.shape:
        raise AssertionError(f"shapes differ: {list(x.shape)} and {list(ref.shape)}")
    x, ref = x.detach().double().cpu(), ref.detach().double().cpu()
    same_infinity = torch.isinf(ref) & (x == ref)
    difference = torch.where(same_infinity, 0.0, (x - ref).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(difference.max()) if difference.numel() else 0.0


def floor_error(stage: Stage, dtype: torch.dtype, ref: torch.Tensor) -> float:
    """The absolute error allowed beyond twice the plain one."""
    finite = ref[torch.isfinite(ref)].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    return TOLERANCES[stage, dtype].ulps * torch.finfo(dtype).eps * scale


def assert_close(
    stage: Stage,
    fast: torch.Tensor,
    plain: torch.Tensor,
    ref: torch.Tensor,
    *,
    dtype: torch.dtype,
    what: str = "",
) -> float:
    """Assert the rule for one tensor, print the measured errors and return ``err(fast) / allowed``.

    Parameters
    ----------
    stage : str
        Row of :data:`TOLERANCES`.
    fast, plain, ref : torch.Tensor, same shape
        Under test; textbook torch with the same inputs and storage dtype; fp64.
    dtype : torch.dtype
        In which the stage stores its result.
    what : str, optional
        Opens the message, e.g. ``"step 41, request 2"``.

    Raises
    ------
    AssertionError
        If the error is larger than allowed, or anything is NaN.
    """
    floor = floor_error(stage, dtype, ref)
    error, plain_error = max_error(fast, ref), max_error(plain, ref)
    allowed = 2 * plain_error + floor
    name = str(dtype).removeprefix("torch.")
    line = (
        f"{what}{': ' if what else ''}{stage} {name}: error {error:.3g}, plain torch {plain_error:.3g}, "
        f"floor {floor:.3g}, {error / allowed:.2f} of what is allowed"
    )
    print(line)
    if not error <= allowed:
        raise AssertionError(f"{line} ({TOLERANCES[stage, dtype].reason})")
    return error / allowed
