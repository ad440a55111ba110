"""For what shapes the CUDA rest serves, and what it and complete are told; nothing is compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mac_kernels.bypass import PAUSE_STEPS, TRIAL_GROUPS
from mac_kernels.cuda import compiler, complete, rest
from mac_kernels.cuda.complete import Complete, CompleteArguments, bind_complete
from mac_kernels.cuda.front import FrontArguments
from mac_kernels.cuda.rest import RestArguments, bind_rest, early_blocks, serves_rest


@pytest.mark.parametrize(
    ("dim", "group", "kbar", "serves"),
    [
        (128, 8, True, True),
        (128, 16, True, True),  # 192 numbers, as many as there may be
        (192, 8, True, True),
        (192, 16, False, True),
        (192, 9, True, False),  # sums of 16 heads
        (256, 8, True, False),
        (256, 8, False, False),  # 192 numbers, but two tiles of 8 warps take 256 KB of shared memory
        (8, 1, True, True),
    ],
)
def test_shapes(dim: int, group: int, kbar: bool, serves: bool) -> None:
    assert serves_rest(dim, group, kbar=kbar) is serves


def test_blocks_beside_the_front() -> None:
    assert [early_blocks(front, 132) for front in (4, 66, 67, 132, 264)] == [128, 66, 0, 0, 0]


@pytest.mark.parametrize(
    ("source", "arguments"),
    [("layout.cuh", FrontArguments), ("rest.cu", RestArguments), ("complete.cu", CompleteArguments)],
)
def test_fields_are_in_the_order_of_the_source(source: str, arguments: Any) -> None:
    text = (Path(compiler.__file__).parent / source).read_text()
    body = re.sub(r"//.*", "", text[text.index("struct Args {") : text.index("};")]).partition("{")[2]
    names = [
        re.sub(r".*[\s*&]", "", name.strip())
        for statement in body.split(";")
        for name in statement.split(",")
        if name.strip()
    ]
    if "strides" in names:
        at = names.index("strides")
        names[at : at + 1] = ["kp", "kt", "kh", "vp", "vt", "vh"]
    fields = [re.sub(r"^stride_(?=[kv])|_ptr$", "", name) for name, _ in arguments._fields_]
    same = {"begin": "begin", "page": "pages", "length": "lengths", "group": "info"}
    assert [same.get(name, name) for name in fields] == [name.removesuffix("_ptr") for name in names]


class _Kernel:
    def __init__(self, *asked: Any) -> None:
        self.asked = asked

    def launch(self, arguments: RestArguments) -> None:
        raise AssertionError("not in these tests")


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.setattr(compiler, "make_kernel", _Kernel)
    numbers = {
        "GROUP": 8, "NUM_KV_HEADS": 4, "HEAD_DIM": 128, "PAGE_SIZE": 16, "ROW_STRIDE": 0, "BAND": 256, "SINKS": 4,
        "KBAR": True, "SOFT_CAP": False, "SCALES_ON_DEVICE": False, "logit_scale": 0.1, "soft_cap": 0.0,
        "num_groups": 4, "BYPASS": True, "break_even": 0.25, "WINDOW": 16, "ROTARY_DIM": 128, "INTERLEAVED": False,
    }  # fmt: skip
    strides = {name: 8 * i for i, name in enumerate(rest._LAYER_STRIDES)}
    pointers = {*rest._LAYER_POINTERS, *complete._LAYER_POINTERS}
    yield {**numbers, **strides, **{name: torch.zeros(1, dtype=torch.int32) for name in pointers}}


@pytest.mark.parametrize("early", [0, 100])
def test_what_the_kernel_is_told(values: dict[str, Any], early: int) -> None:
    values["length_ptr"] = torch.zeros(1, dtype=torch.int64)
    bound = bind_rest(values, q=torch.zeros(1, 32, 128, dtype=torch.float16), early=early, num_sms=132)
    assert isinstance(bound, rest.Rest)
    source, definitions, blocks, _device = bound._kernel.asked
    constants, a = dict(definitions), bound._arguments
    assert source == "rest.cu" and blocks == a.num_blocks == 132
    assert (constants["HALF_KV"], constants["LENGTH_64"], constants["PAGE_64"], constants["KBAR"]) == (1, 1, 0, 1)
    assert (a.num_groups, a.early_blocks, a.stride_kt, a.stride_vh) == (4, early, 8, 40)
    assert (constants["BYPASS"], constants["TRIAL_GROUPS"], constants["PAUSE_STEPS"]) == (1, TRIAL_GROUPS, PAUSE_STEPS)
    assert (a.tickets_ptr, a.bypass_ptr) == (values["tickets_ptr"].data_ptr(), values["bypass_ptr"].data_ptr())
    assert a.break_even == 0.25
    assert a.page_ptr == values["page_ptr"].data_ptr() and a.part_lse_ptr == values["part_lse_ptr"].data_ptr()
    # 8 KB a tile: 40 and 10 MB ahead of the others, 36 MB before the decision, by 100 blocks of 8 warps
    assert (a.lead, a.lead_ahead, a.tiles_ahead) == ((48, 12, 6) if early else (0, 0, 0))


@pytest.mark.parametrize(("judges", "bypass"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(("num_groups", "cut"), [(66, (528, 1, 8)), (67, (67, 8, 1))])
def test_what_complete_is_told(
    values: dict[str, Any], judges: bool, bypass: bool, num_groups: int, cut: tuple[int, int, int]
) -> None:
    values |= {"num_groups": num_groups, "BYPASS": bypass}
    bound = bind_complete(values, q=torch.zeros(1, 32, 128, dtype=torch.float16), judges=judges, num_sms=132)
    assert isinstance(bound, Complete)
    source, definitions, asked, _device = bound._kernel.asked
    constants, a = dict(definitions), bound._arguments
    assert source == "complete.cu" and constants["THREADS"] == 256
    assert (asked, constants["HEADS"], constants["PART_WARPS"]) == cut
    assert (constants["JUDGES"], constants["TRIAL_GROUPS"]) == (int(judges and bypass), TRIAL_GROUPS)
    assert (a.bypass_ptr, a.break_even) == (values["bypass_ptr"].data_ptr(), 0.25)


def test_a_refusal_is_handed_on(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = compiler.CudaError("too small")
    monkeypatch.setattr(compiler, "make_kernel", lambda *_: refusal)
    assert bind_rest(values, q=torch.zeros(1, 32, 128), early=0, num_sms=132) is refusal
