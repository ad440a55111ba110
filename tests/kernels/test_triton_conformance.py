"""The Triton backend against the kit: interpreted on tiny shapes, and over all pairs of shapes on a GPU.

The interpreter's bf16 dot product is wrong up to Triton 3.9 (it multiplies the bit patterns), so bf16 is the GPU's.
"""

import dataclasses
import os
from typing import Any, ClassVar

import pytest
import torch

from mac_kernels import MacConfig, fill_rings
from mac_kernels.testing.conformance import PAIRWISE_CASES, SMALL_CASES, Case, DecodeConformance, variant

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs where TRITON_INTERPRET=1 (make test sets it)"
)


@interpreted
class TestTritonInterpreted(DecodeConformance):
    backend = "triton"
    cases = SMALL_CASES[:2]
    # 15 nominees hold every candidate of a window of 16
    rules: ClassVar[dict[str, MacConfig]] = {
        "head": variant(nominees=15),
        "group-bound": variant(nominees=15, match_scope="group", influence=0.35),
    }
    steps, rule_steps, chain_steps = 2, 10, 40
    runs_selected = True
    test_rows_in_another_dtype = None  # bf16 rows
    # what they judge happens between the steps, where no kernel of this backend is asked
    test_selected_tokens_of_old_selections_are_not_used = test_selected_tokens_that_miss_too_much = None

    @pytest.fixture(autouse=True)
    def _programs_share_heads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for the small batches of a GPU."""
        from mac_kernels import fused
        from mac_kernels.launch import default_launch

        monkeypatch.setattr(
            fused, "default_launch", lambda *args: dataclasses.replace(default_launch(*args), complete_splits=2)
        )

    def fill_rings(self, *args: Any, **kwargs: Any) -> None:
        fill_rings(*args, backend="triton", **kwargs)


@pytest.mark.gpu
class TestTritonGpu(DecodeConformance):
    backend = "triton"
    device = "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cases = (*PAIRWISE_CASES, Case(head_dim=192, group=7, page_size=5), Case(head_dim=80, group=12, page_size=5))
    capturable = runs_selected = True

    @pytest.fixture(autouse=True)
    def _without_the_front(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mac_kernels import fused
        from mac_kernels.launch import default_launch

        monkeypatch.setattr(
            fused, "default_launch", lambda *args: dataclasses.replace(default_launch(*args), cluster_size=0)
        )
