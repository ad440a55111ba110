"""What the FlashInfer backend says about itself on a machine without a GPU."""

from __future__ import annotations

import importlib.metadata
import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from mac_kernels import (
    BatchMacDecodeWithPagedKVCacheWrapper,
    Explanation,
    HeadLayout,
    MacConfig,
    Rope,
    UnsupportedError,
    support,
)
from mac_kernels.attend.flashinfer import (
    FP8_DTYPES,
    QUERY_DTYPES,
    Scores,
    flashinfer_version,
    jit_args,
)

CUDA = torch.device("cuda")
LAYOUT = HeadLayout(32, 8, 128)


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    def look_up(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", look_up)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("0.6.15.post1", (0, 6, 15)), ("0.7.0", (0, 7, 0)), ("0.7.2.post1+cu130", (0, 7, 2)), ("0.8.0rc1", (0, 8, 0))],
)
def test_version_numbers(monkeypatch: pytest.MonkeyPatch, text: str, numbers: tuple[int, ...]) -> None:
    installed(monkeypatch, text)
    assert flashinfer_version() == numbers


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "not installed"), ("0.6.14", "needs 0.6.15 or newer"), ("0.6.15.post1", ""), ("0.7.0", "")],
)
def test_the_installed_version_decides(monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str) -> None:
    installed(monkeypatch, version)
    reasons = support.unsupported_reasons("flashinfer", MacConfig(), LAYOUT, CUDA)
    assert reason in reasons[0] if reason else reasons == (), reasons


class Read:
    """A wrapper that reads what is set from outside."""

    def plan(self) -> None:
        self._cached_module = self._jit_module

    def run(self) -> None:
        self.args = self._jit_additional_tensor_names


class Renamed(Read):
    """One that does not: only the source of the class itself counts, as FlashInfer's inherits nothing."""


@pytest.mark.parametrize(
    ("version", "wrapper", "reason"),
    [
        ("0.9", Read, ""),
        ("0.9", Renamed, "flashinfer-python 0.9, whose wrapper has no _jit_module and no _jit_additional_tensor_names"),
        ("0.7.0", None, ""),  # tested: nothing is imported to find out
    ],
)
def test_an_untested_version_must_have_what_is_set_on_it(
    monkeypatch: pytest.MonkeyPatch, version: str, wrapper: type | None, reason: str
) -> None:
    installed(monkeypatch, version)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=wrapper))
    reasons = support.unsupported_reasons("flashinfer", MacConfig(), LAYOUT, CUDA)
    assert reason in reasons[0] and "install 0.7.0" in reasons[0] if reason else reasons == (), reasons


FP32, BF16, FP16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("dtypes", "good"),
    [
        (None, True),
        ((BF16, BF16), True),
        ((FP16, FP8), True),
        ((FP32, FP32), False),
        ((FP16, BF16), False),
        ((BF16, torch.float8_e5m2), False),
    ],
)
def test_dtypes_decide_as_far_as_they_are_known(
    monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, torch.dtype] | None, good: bool
) -> None:
    installed(monkeypatch, "0.7.0")
    reasons = support.unsupported_reasons("flashinfer", MacConfig(), LAYOUT, CUDA, dtypes=dtypes)
    assert reasons == () if good else str(dtypes[1]) in reasons[0], reasons
    assert support.unsupported_reasons("reference", MacConfig(), LAYOUT, CUDA, dtypes=dtypes) == ()


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "flashinfer"), ((8, 9), "triton"), ((9, 0), "triton")])
def test_an_fp8_cache_on_an_older_gpu_passes_triton_over(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    installed(monkeypatch, "0.7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    backend, _, rejected = support.choose_backend(MacConfig(), LAYOUT, CUDA, dtypes=(BF16, FP8))
    assert backend == chosen
    assert all("fp8 cache on A100" in reason for reason in rejected.get("triton", ()))
    assert support.choose_backend(MacConfig(), LAYOUT, CUDA, dtypes=(BF16, BF16))[0] == "triton"


def test_every_reason_is_given_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    config, layout = MacConfig(nominees=None, window=8192), HeadLayout(32, 1, 80)
    reasons = support.unsupported_reasons("flashinfer", config, layout, torch.device("cpu"))
    for word in ("not installed", "device cpu", "head_dim=80", "32 query heads", "nominees=None", "window=8192"):
        assert any(word in reason for reason in reasons), word


def test_the_table_does_not_depend_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = support.support_table()
    installed(monkeypatch, "0.1")
    assert support.support_table() == before
    assert before["NVIDIA GPU"]["flashinfer"] == ()


def test_auto_prefers_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.7.0")
    assert support.BACKENDS == ("triton", "flashinfer", "reference")
    assert support.choose_backend(MacConfig(), LAYOUT, CUDA)[0] == "triton"


def test_named_on_a_cpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.7.0")
    with pytest.raises(UnsupportedError, match="device cpu") as caught:
        plan("flashinfer")
    assert len(caught.value.reasons) == 1


@pytest.mark.parametrize(
    ("dtypes", "reason"),
    [
        ({"kv_data_type": FP32}, "torch.float32 queries beside a torch.float32 cache"),
        ({"q_data_type": FP16}, "torch.float16 queries beside a torch.bfloat16 cache"),
        ({"q_data_type": FP32, "kv_data_type": FP8}, "torch.float32 queries beside a torch.float8_e4m3fn cache"),
        ({"kv_data_type": FP8}, None),  # the queries are bf16 unless it is said
    ],
)
def test_a_plan_knows_its_dtypes(
    monkeypatch: pytest.MonkeyPatch, dtypes: dict[str, torch.dtype], reason: str | None
) -> None:
    installed(monkeypatch, "0.7.0")
    with pytest.raises(UnsupportedError) as caught:
        plan("flashinfer", **dtypes)
    assert [text.partition(" (")[0] for text in caught.value.reasons] == ["device cpu", *([reason] if reason else [])]
    assert reason is None or reason in plan("auto", **dtypes).rejected["flashinfer"][-1]


def plan(backend: str, **dtypes: torch.dtype) -> Explanation:
    wrapper, one = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend=backend), torch.ones(1, dtype=torch.int32)
    rope = Rope.from_inv_freq(torch.ones(64))
    wrapper.plan(torch.tensor([0, 1]), 0 * one, one, layout=LAYOUT, page_size=1, rope=rope, **dtypes)
    return wrapper.explain()


def test_every_instantiation_has_its_own_name() -> None:
    forms = [*itertools.product(QUERY_DTYPES, FP8_DTYPES, (64, 128)), *((d, d, 64) for d in QUERY_DTYPES)]
    assert len({jit_args(*form)[0] for form in forms}) == len(forms)
    args = jit_args(torch.bfloat16, torch.float8_e4m3fn, 128)
    assert args[1:7] == [torch.bfloat16, torch.float8_e4m3fn, torch.bfloat16, torch.int32, 128, 128]
    assert len(args[7]) == len(args[8]) and len(args[9]) == len(args[10])
    assert all(f"params.{name}" in args[12] for name in (*args[7], *args[9]))


def test_scales_are_base_2() -> None:
    scale, before_tanh, cap = Scores(0.25, 3.0).scalars()
    assert (scale, before_tanh, cap) == pytest.approx((0.25 * 1.442695, 0.25 / 3, 3 * 1.442695))
    assert Scores(0.25).scalars()[1:] == (0.0, 0.0)
