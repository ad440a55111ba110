"""How close is close enough: one rule, one row per (stage, dtype), each with its reason.

The rule: ``err(fast, ref) <= 2 * err(plain, ref) + floor``. ``ref`` is computed in fp64; ``plain`` is textbook torch
with the same inputs, the same rounding of the softmax weights and the same storage dtype; ``floor = ulps * eps(dtype) *
max(1, |ref|)`` (largest magnitude) lets a lucky ``plain`` pass without hiding a bug. Errors are largest absolute
differences.
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
_SUM = "a sum of weights that were rounded, relative to another maximum: at most log2(e) / 2 ulp, if all round alike"
TOLERANCES: dict[tuple[Stage, torch.dtype], Tolerance] = {
    ("query", torch.float32): Tolerance(4, "one rotation: two products and a sum per element"),
    ("query", torch.bfloat16): Tolerance(1, _ROUND),
    ("query", torch.float16): Tolerance(1, _ROUND),
    ("distance", torch.float32): Tolerance(16, "a sum of D squares in another order, then a root"),
    ("lse2", torch.float32): Tolerance(16, _ORDER),
    ("lse2", torch.bfloat16): Tolerance(1 / 16, _SUM),
    ("lse2", torch.float16): Tolerance(1 / 16, _SUM),
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
in ``plain``, which rounds in the same places. Only a backend that sums rounded weights is judged by the 16-bit rows of
``lse2``."""


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


@dataclass(slots=True)
class _Worst:
    error: float = 0.0
    plain: float = 0.0
    floor: float = 0.0
    where: str = ""


class Ledger:
    """Largest errors per (stage, dtype) over many tensors, judged together.

    Rounding errors are random, so a handful of values says little about how large the plain error can be; over a whole
    chain the largest one does.
    """

    def __init__(self) -> None:
        self._worst: dict[tuple[Stage, torch.dtype], _Worst] = {}

    def record(
        self,
        stage: Stage,
        fast: torch.Tensor,
        plain: torch.Tensor,
        ref: torch.Tensor,
        *,
        dtype: torch.dtype,
        what: str = "",
    ) -> None:
        """Take one tensor into account; arguments as for :func:`assert_close`.

        Raises
        ------
        AssertionError
            If anything is NaN or infinite that should not be.
        """
        worst = self._worst.setdefault((stage, dtype), _Worst())
        error = max_error(fast, ref)
        if error == float("inf"):
            raise AssertionError(f"{what or 'tensor'}: {stage} is NaN or infinite where it should not be: {fast}")
        if error >= worst.error:
            worst.error, worst.where = error, what
        worst.plain = max(worst.plain, max_error(plain, ref))
        worst.floor = max(worst.floor, floor_error(stage, dtype, ref))

    def verify(self) -> float:
        """Assert the rule for every stage, print the measured errors and return the largest share of what is allowed.

        Raises
        ------
        AssertionError
            If the error of any stage is larger than allowed.
        """
        shares, problems = [0.0], []
        for (stage, dtype), worst in self._worst.items():
            allowed = 2 * worst.plain + worst.floor
            shares.append(worst.error / allowed)
            line = (
                f"{stage} {str(dtype).removeprefix('torch.')}: error {worst.error:.3g}, plain torch {worst.plain:.3g}, "
                f"floor {worst.floor:.3g}, {worst.error / allowed:.2f} of what is allowed"
            )
            print(line)
            if not worst.error <= allowed:
                problems.append(f"{line}; worst at {worst.where or 'the tensor'} ({TOLERANCES[stage, dtype].reason})")
        if problems:
            raise AssertionError("\n".join(problems))
        return max(shares)


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
        Where this is, e.g. ``"step 41, request 2"``.

    Raises
    ------
    AssertionError
        If the error is larger than allowed, or anything is NaN.
    """
    ledger = Ledger()
    ledger.record(stage, fast, plain, ref, dtype=dtype, what=what)
    return ledger.verify()
