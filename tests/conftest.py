"""What holds for every test: one thread per process, and a skip with its reason where the hardware is missing."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

# read by torch when it is imported; on tensors this small several threads only wait for one another, and on a busy
# machine that makes the tests ten times slower
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here."""
    missing = {}
    if not _has_cuda():
        missing["gpu"] = "needs a CUDA device"
    if find_spec("sglang") is None:
        missing["sglang"] = "needs SGLang"
    for item in items:
        for marker, reason in missing.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
