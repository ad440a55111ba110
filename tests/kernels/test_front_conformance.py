"""The CUDA front against the kit: emulated on tiny shapes, and over all pairs of shapes on a GPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton")

from emulated import EmulatedKernel

from mac_kernels import MacConfig, fused
from mac_kernels.cuda import compiler, front, rest
from mac_kernels.launch import default_launch
from mac_kernels.testing.conformance import PAIRWISE_CASES, Case, DecodeConformance, variant

emulated = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or shutil.which("g++") is None,
    reason="runs where TRITON_INTERPRET=1 (make test sets it) and g++ is installed",
)


# what the front itself decides or writes; the others take their time in the interpreter
EMULATED = (
    "test_rules",
    "test_rows_and_outputs",
    "test_slots_out_of_range_are_misses",
    "test_limits_by_head",
    "test_bypass",
    "test_mixed_batch",
    "test_empty_request",
    "test_rows_of_token_slots",
)


class _Front(DecodeConformance):
    backend = "triton"
    cluster_size: ClassVar[int]
    front_warps: ClassVar[int] = 8

    @pytest.fixture(autouse=True)
    def _asks_for_the_front(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = {"cluster_size": self.cluster_size, "front_warps": self.front_warps}
        monkeypatch.setattr(fused, "default_launch", lambda *args: dataclasses.replace(default_launch(*args), **shape))


class _Emulated(_Front):
    dtypes = (torch.float16,)  # the interpreter, which computes the rest, has no bf16 dot product
    steps, rule_steps, chain_steps = 2, 10, 40
    bytes_ahead: ClassVar[int] = 1  # a tile a warp

    @pytest.fixture(autouse=True)
    def _runs_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(compiler, "make_kernel", EmulatedKernel)
        monkeypatch.setattr(front, "unsupported_device", lambda device: None)
        monkeypatch.setattr(rest, "early_blocks", lambda front_blocks, num_sms: num_sms - 1)
        monkeypatch.setattr(rest, "_BYTES_AHEAD", self.bytes_ahead)
        before = EmulatedKernel.launches.copy()
        yield
        launched = EmulatedKernel.launches - before
        assert launched["front.cu"] == launched["rest.cu"] > 0


for _name in dir(DecodeConformance):
    if _name.startswith("test_") and _name not in EMULATED:
        setattr(_Emulated, _name, None)


@emulated
class TestFrontEmulated(_Emulated):
    cluster_size, front_warps = 1, 4
    cases = (Case(), Case(head_dim=80, group=9, kv_heads=1, page_size=5, kv_layout="HND", rotary="partial"))
    rules: ClassVar[dict[str, MacConfig]] = {"group-bound": variant(nominees=15, match_scope="group", influence=0.35)}
    test_mixed_batch = test_empty_request = test_rows_of_token_slots = None


@emulated
class TestFrontEmulatedCluster(_Emulated):
    cluster_size, front_warps = 4, 4
    bytes_ahead = 10**9  # all of a group's
    cases = (Case(head_dim=32, group=3, kv_heads=1, page_size=1, kv_layout="HND", rotary="interleaved"),)
    rules: ClassVar[dict[str, MacConfig]] = {"head": variant(nominees=12)}
    test_bypass = test_limits_by_head = test_slots_out_of_range_are_misses = None


SHAPES = tuple(case for case in PAIRWISE_CASES if case.group * case.head_dim <= 2048)


class _OnGpu(_Front):
    device = "cuda"
    capturable = True

    @pytest.fixture(autouse=True)
    def _is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scout and decide would pass, too, so a front that cannot be made must fail."""
        if reason := front.unsupported_device(torch.device("cuda", 0)):
            pytest.skip(reason)
        monkeypatch.setattr(front, "say_unused", lambda reason, **_: pytest.fail(reason))


@pytest.mark.gpu
class TestFrontGpu(_OnGpu):
    dtypes = (torch.bfloat16, torch.float16)
    cluster_size = 2
    cases = SHAPES


@pytest.mark.gpu
class TestFrontGpuAlone(_OnGpu):
    dtypes = (torch.float16,)
    cluster_size, front_warps = 1, 4
    cases = SHAPES[::3]


@pytest.mark.gpu
class TestFrontGpuFour(_OnGpu):
    dtypes = (torch.bfloat16,)
    cluster_size = 4
    cases = SHAPES[1::3]


@pytest.mark.gpu
class TestFrontGpuEight(_OnGpu):
    dtypes = (torch.bfloat16,)
    cluster_size = 8
    cases = SHAPES[2::3]
