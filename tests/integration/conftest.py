"""Fixtures of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torchvision_ops  # noqa: F401  # imported for what it registers

pytest.importorskip("transformers")

from tiny_models import FAMILIES, Family

from mac_transformers import fallback

# helpers that import SGLang, which doctest collection would do everywhere
collect_ignore = ["sglang_cpu.py", "sglang_cpu_server.py", "sglang_tree.py"]


@pytest.fixture(autouse=True)
def fresh_fallback_counts() -> Iterator[None]:
    """Every test sees the first warning of every reason."""
    fallback.reset_fallbacks()
    yield
    fallback.reset_fallbacks()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads cost far more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Every family in turn."""
    return FAMILIES[request.param]
