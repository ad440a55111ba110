"""Fixtures of the integration tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision_ops  # noqa: F401  # imported for what it registers

pytest.importorskip("transformers")

from sglang_engines import Engines, save_model
from tiny_models import FAMILIES, Family

from mac_transformers import fallback

# helpers that import SGLang, which doctest collection would do everywhere
collect_ignore = ["sglang_cpu.py", "sglang_cpu_server.py", "sglang_tree.py"]


@pytest.fixture(autouse=True)
def fresh_fallback_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees the first warning of every reason."""
    monkeypatch.setattr(fallback, "_COUNTS", Counter())


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """SGLang's, each of which runs once for all tests."""
    model: Path = tmp_path_factory.mktemp("model")
    save_model(model)
    return Engines(model, tmp_path_factory.mktemp("engines"))


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
