"""The CUDA front against the kit: emulated on tiny shapes, and over all pairs of shapes on a GPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")

from emulated import AHEAD, EmulatedKernel

from mac_kernels import MacConfig, fused
from mac_kernels.cuda import compiler, front, kernels, rest
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
    "test_one_plan_of_misses",
)


class _Front(DecodeConformance):
    backend = "triton"
    cluster_size: ClassVar[int]
    front_warps: ClassVar[int] = 8
    ahead: ClassVar[bool] = True
    """Whether also the first step of a plan begins its rest ahead of the decision."""
    capacity: ClassVar[int] = 2000

    @pytest.fixture(autouse=True)
    def _asks_for_the_front(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = {"cluster_size": self.cluster_size, "front_warps": self.front_warps}
        monkeypatch.setattr(fused, "default_launch", lambda *args: dataclasses.replace(default_launch(*args), **shape))
        self.plans: list[fused.FusedStep] = []
        init = fused.FusedStep.__init__

        def noted(step: fused.FusedStep, *args: Any, **options: Any) -> None:
            init(step, *args, **options)
            step._workspace["tickets_ptr"][0] = AHEAD if self.ahead else 0
            self.plans.append(step)

        monkeypatch.setattr(fused.FusedStep, "__init__", noted)

    def test_one_plan_of_misses(self, dtype: torch.dtype) -> None:
        """From the second step on the rest runs ahead; lengths, pages and queries change in place."""
        session = self.session(dtype=dtype, batch=2, capacity=self.capacity, rings_for=())
        for request in range(2):
            session.append(request, self.capacity)
        layout = session.layout
        q = torch.zeros(2, layout.num_qo_heads, layout.head_dim, dtype=dtype, device=self.device)
        slots, out = torch.full((2,), -1, dtype=torch.int64, device=self.device), torch.empty_like(q)
        session.plan_static()
        replay = self.capture(lambda: session.run_static(q, slots, torch.zeros_like(slots), out))
        for step in range(4):
            lengths = [self.capacity - 31 * step, self.capacity // 2 + 17 * step]
            q.copy_(session.draw(*q.shape))
            session.batches.refill_static(lengths, (0, 1))
            out.fill_(torch.nan)
            replay()
            for request, length in enumerate(lengths):
                k, v = (x[request, :length].transpose(0, 1).double() for x in (session.k, session.v))
                heads = q[request].cpu().double().unflatten(0, (layout.num_kv_heads, -1))
                wanted = torch.softmax(heads @ k.mT * layout.head_dim**-0.5, -1) @ v
                tolerance = 2e-3 if dtype == torch.float16 else 1.6e-2
                torch.testing.assert_close(
                    out[request].cpu().double(), wanted.flatten(0, 1), rtol=tolerance, atol=tolerance
                )
        plan = self.plans[-1]
        (bound,) = plan._bound.values()
        assert bound.cuda is not None and bound.cuda.rest is not None, "the first case is not the CUDA rest's"
        assert bound.cuda.rest._arguments.tiles_ahead > 0, "the front of the first case leaves too few SMs free"
        assert plan._workspace["tickets_ptr"].item() == AHEAD  # no block is missing, the next step begins so


class _Emulated(_Front):
    dtypes = (torch.float16,)  # the interpreter, which computes the rest, has no bf16 dot product
    steps, rule_steps, chain_steps, capacity = 2, 10, 40, 150
    bytes_ahead: ClassVar[int] = 1  # a tile a warp

    @pytest.fixture(autouse=True)
    def _runs_on_the_cpu(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(compiler, "make_kernel", EmulatedKernel)
        monkeypatch.setattr(front, "unsupported_device", lambda device: None)
        monkeypatch.setattr(kernels, "early_blocks", lambda front_blocks, num_sms: num_sms - 1)
        monkeypatch.setattr(rest, "_BYTES_AHEAD", self.bytes_ahead)
        before = EmulatedKernel.launches.copy()
        yield
        launched = EmulatedKernel.launches - before
        assert launched["front.cu"] == launched["rest.cu"] == launched["complete.cu"] > 0


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
    test_fp8_cache = test_fp8_cache_under_a_soft_cap = None  # 8 bits are not the front's

    @pytest.fixture(autouse=True)
    def _is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scout and decide would pass, too, so a front that cannot be made must fail."""
        if reason := front.unsupported_device(torch.device("cuda", 0)):
            pytest.skip(reason)
        for module in (fused, kernels):
            monkeypatch.setattr(module, "say_unused", lambda reason, **_: pytest.fail(reason))


@pytest.mark.gpu
class TestFrontGpu(_OnGpu):
    dtypes = (torch.bfloat16, torch.float16)
    cluster_size, ahead = 2, False
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
