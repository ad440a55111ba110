"""complete.cu alone, emulated: hand-made parts, all that it must not read or write is NaN."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from emulated import EmulatedKernel, known_with_the_wait, library

from mac_kernels.bypass import PAUSE_STEPS, TRIAL_GROUPS, Bypass
from mac_kernels.cuda.complete import CompleteArguments
from mac_kernels.rope import Rope
from mac_kernels.types import Reason

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

WINDOW, RINGS = 8, 3
COUNTS = (0, 1, 3, 0, 2, 40, 70, 9)  # parts of the groups
REUSED = (2, 3)
POSITIONS = (21, 5, 900, -1)  # of the requests
OWNED = (2, 0, -1, -1)  # their rings


@dataclass(frozen=True, slots=True)
class Shape:
    """Of two kv heads; ``few``: as for a small batch."""

    head_dim: int
    group: int
    few: bool
    dtype: torch.dtype
    row_dtype: torch.dtype
    rotary_dim: int
    interleaved: bool = False
    kbar: bool = True

    def __str__(self) -> str:
        return f"D{self.head_dim}-G{self.group}-R{self.rotary_dim}-{'few' if self.few else 'many'}"


SHAPES = (
    Shape(64, 3, True, torch.float16, torch.bfloat16, 64),
    Shape(192, 7, False, torch.bfloat16, torch.float16, 96),
    Shape(80, 12, False, torch.float16, torch.float16, 80, interleaved=True),
    Shape(192, 2, True, torch.bfloat16, torch.bfloat16, 40, interleaved=True),
    Shape(128, 12, False, torch.bfloat16, torch.bfloat16, 128, kbar=False),
)


class Step:
    """Tensors of a step; parts that nobody has written are NaN, and so are rows and outputs."""

    def __init__(self, shape: Shape) -> None:
        self.shape, generator = shape, torch.Generator().manual_seed(1)
        groups, heads, dim = len(COUNTS), shape.group, shape.head_dim
        self.info = torch.full((groups, 8), 77, dtype=torch.int32)
        for group in range(groups):
            self.info[group, 2], self.info[group, 3] = POSITIONS[group // 2], OWNED[group // 2]
            self.info[group, 4], self.info[group, 5] = group in REUSED, 10 + group
        first = [sum(COUNTS[:group]) + group for group in range(groups)]
        self.parts = torch.tensor([*zip(first, COUNTS, strict=True)], dtype=torch.int32)
        self.part_out, self.part_key = (torch.full((sum(COUNTS) + groups, heads, dim), math.nan) for _ in range(2))
        self.part_lse = torch.full((sum(COUNTS) + groups, heads), math.nan)
        for group in range(groups):
            if group not in REUSED:
                own = slice(first[group], first[group] + COUNTS[group])
                for x, size in ((self.part_out, 1.0), (self.part_key, 1.0), (self.part_lse, 4.0)):
                    x[own] = size * torch.randn(x[own].shape, generator=generator)
        self.always_out = torch.randn(groups, heads, dim, generator=generator)
        self.always_lse = 4 * torch.randn(groups, heads, generator=generator)
        self.always_out[6:], self.always_lse[6:] = 0, -math.inf
        self.always_out[list(REUSED)], self.always_lse[list(REUSED)] = math.nan, math.nan
        rows = RINGS, WINDOW, 2 * heads
        self.ring_out, self.ring_key = (torch.full((*rows, dim), math.nan, dtype=shape.row_dtype) for _ in range(2))
        self.ring_lse = torch.full(rows, math.nan)
        self.ring_pos = torch.full(rows[:2], -7, dtype=torch.int32)
        self.ring_anchor = torch.full((*rows[:2], 2), -7, dtype=torch.int32)
        inv_freq = 100.0 ** -(torch.arange(0, shape.rotary_dim, 2).float() / shape.rotary_dim)
        self.rope = Rope.from_inv_freq(inv_freq, attention_scaling=1.2, interleaved=shape.interleaved)
        self.out = torch.full((groups // 2, 2 * heads, dim), math.nan, dtype=shape.dtype)
        self.bypass = torch.tensor([9, TRIAL_GROUPS - 1, 3, 0], dtype=torch.int32)

    def run(self, break_even: float = 0.2, judges: bool = False) -> None:
        shape, a = self.shape, CompleteArguments()
        heads, warps = (1, 8) if shape.few else (shape.group, 1)
        definitions = {
            "GROUP": shape.group, "NUM_KV_HEADS": 2, "HEAD_DIM": shape.head_dim, "WINDOW": WINDOW,
            "ROTARY_DIM": shape.rotary_dim, "INTERLEAVED": int(shape.interleaved), "KBAR": int(shape.kbar),
            "JUDGES": int(judges), "CLUSTER": 1, "THREADS": 32 * heads * warps, "HEADS": heads,
            "PART_WARPS": warps, "HALF_KV": int(shape.dtype == torch.float16),
            "HALF_ROWS": int(shape.row_dtype == torch.float16), "TRIAL_GROUPS": TRIAL_GROUPS,
            "PAUSE_STEPS": PAUSE_STEPS,
        }  # fmt: skip
        shown = torch.full_like(self.parts, 2**20)
        table = self.rope.cos_sin_cache(max(POSITIONS) + 1, "cpu")
        for name, tensor in (
            ("out", self.out), ("group_ptr", self.info), ("parts_ptr", shown), ("part_out_ptr", self.part_out),
            ("part_key_ptr", self.part_key), ("part_lse_ptr", self.part_lse), ("always_out_ptr", self.always_out),
            ("always_lse_ptr", self.always_lse), ("ring_out_ptr", self.ring_out), ("ring_key_ptr", self.ring_key),
            ("ring_lse_ptr", self.ring_lse), ("ring_pos_ptr", self.ring_pos), ("ring_anchor_ptr", self.ring_anchor),
            ("cos_sin_ptr", table), ("bypass_ptr", self.bypass),
        ):  # fmt: skip
            setattr(a, name, tensor.data_ptr())
        a.stride_ob, a.stride_oh, _ = self.out.stride()
        a.break_even = break_even
        named = "complete.cu", tuple(definitions.items())
        kernel = EmulatedKernel(*named, len(COUNTS) * shape.group // heads, None)
        with known_with_the_wait(library(*named), shown, self.parts):
            kernel.launch(a)


def _merged(lse: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """States [N, H] over disjoint keys; none gives (0, -inf)."""
    top = torch.logsumexp(lse * math.log(2), 0)
    weight = torch.where(top.isinf(), 0.0, (lse * math.log(2) - top).exp())[..., None]
    return top / math.log(2), *((weight * value).sum(0) for value in values)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_outputs(shape: Shape) -> None:
    step = Step(shape)
    step.run()
    written = torch.zeros(RINGS, WINDOW, 2, dtype=torch.bool)
    for group, count in enumerate(COUNTS):
        request, kv_head = divmod(group, 2)
        heads = slice(kv_head * shape.group, (kv_head + 1) * shape.group)
        out = step.out[request, heads].float()
        if group in REUSED:
            assert out.isnan().all()
            continue
        own = slice(int(step.parts[group, 0]), int(step.parts[group, 0]) + count)
        lse, rest, key = _merged(step.part_lse[own], step.part_out[own], step.part_key[own])
        both = torch.stack((step.always_lse[group], lse))
        _, wanted = _merged(both, torch.stack((step.always_out[group], rest)))
        torch.testing.assert_close(out, wanted, rtol=8e-3, atol=1e-4)
        ring, position = OWNED[request], POSITIONS[request]
        if ring < 0:
            continue
        at = ring, position % WINDOW
        written[(*at, kv_head)] = True
        torch.testing.assert_close(step.ring_out[at][heads].float(), rest, rtol=8e-3, atol=1e-4)
        torch.testing.assert_close(step.ring_lse[at][heads], lse, rtol=1e-5, atol=1e-5)
        assert step.ring_pos[at] == position and step.ring_anchor[(*at, kv_head)] == 10 + group
        if shape.kbar:
            key = step.rope.pull_back(key, torch.tensor(position))
            torch.testing.assert_close(step.ring_key[at][heads].float(), key, rtol=8e-3, atol=1e-4)
    others = ~written.repeat_interleave(shape.group, 2)
    assert step.ring_lse[others].isnan().all() and step.ring_out[others].isnan().all()
    assert step.ring_key[others if shape.kbar else ...].isnan().all()
    assert (step.ring_anchor[~written] == -7).all() and (step.ring_pos[~written.any(2)] == -7).all()


@pytest.mark.parametrize("judged", [TRIAL_GROUPS - 1, TRIAL_GROUPS])
@pytest.mark.parametrize("break_even", [0.0, 0.9])
@pytest.mark.parametrize("judges", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=str)
def test_hits_are_judged_once_or_left_alone(shape: Shape, judges: bool, break_even: float, judged: int) -> None:
    step, expected = Step(shape), Bypass(1, "cpu")
    step.bypass[1] = judged
    expected.values[0] = step.bypass
    if judges:
        expected.update(0, torch.tensor([[Reason.NO_RING]]), break_even)  # its groups are counted by the front
    step.run(break_even, judges)
    assert step.bypass.tolist() == expected.values[0].tolist()
