"""What the FlashInfer backend says about itself on a machine without a GPU."""

from __future__ import annotations

import importlib.metadata
import itertools

import pytest
import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, HeadLayout, MacConfig, Rope, UnsupportedError, support
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
    [(None, "not installed"), ("0.6.14", "needs 0.6.15 or newer"), ("0.6.15.post1", ""), ("0.7.0", ""), ("0.9", "")],
)
def test_the_installed_version_decides(monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str) -> None:
    installed(monkeypatch, version)
    reasons = support.unsupported_reasons("flashinfer", MacConfig(), LAYOUT, CUDA)
    assert reason in reasons[0] if reason else reasons == (), reasons


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
    wrapper = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend="flashinfer")
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match="device cpu"):
        wrapper.plan(
            torch.tensor([0, 1], dtype=torch.int32),
            0 * one,
            one,
            layout=LAYOUT,
            page_size=1,
            rope=Rope.from_inv_freq(torch.ones(64)),
        )


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
