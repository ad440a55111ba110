"""Errors of tuning."""

from __future__ import annotations

from mac_kernels.errors import MacError


class ExportRefused(MacError, RuntimeError):
    """The winner is not better than the default beyond the noise, or breaks a constraint; nothing was written."""
