"""Errors of the library: each names the value, the allowed range and the next step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MacError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(MacError, ValueError):
    """A configuration value, file or key is wrong."""


class InputError(MacError, ValueError):
    """A tensor or a length handed to a kernel is wrong (shape, dtype, device, stride or range)."""


def require_contiguous(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose last dim the kernels would read as if its entries lay side by side.

    Raises
    ------
    InputError
        If they do not.
    """
    if tensor.is_contiguous():  # much faster to ask than a stride, and every run() asks for several
        return
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise InputError(
            f"{name} must be contiguous in its last dim, got stride {tensor.stride(-1)}; pass {name}.contiguous()"
        )


class PlanError(MacError, RuntimeError):
    """``run()`` was called before ``plan()``, or with inputs that differ from the planned ones."""


class SnapshotError(MacError, ValueError):
    """A ring snapshot does not belong to this pool (layout, window, dtype or format version)."""


class UnsupportedError(MacError, NotImplementedError):
    """A backend cannot run this configuration; every reason is listed, not only the first.

    Parameters
    ----------
    subject : str
        What was asked for, e.g. ``"backend 'triton'"``.
    reasons : sequence of str
        Why not, one sentence each.
    hint : str
        What to do instead.
    """

    def __init__(self, subject: str, reasons: Sequence[str], hint: str) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{subject} cannot be used: {'; '.join(self.reasons)}. {hint}")


class MissingError(MacError, RuntimeError):
    """Something that a task needs is not on this machine (an extra, model weights); the message says how to get it."""
