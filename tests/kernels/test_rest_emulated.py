"""rest.cu alone, emulated: hand-made decisions, all that it must not read or write is NaN."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from emulated import library

from mac_kernels.cuda.rest import RestArguments
from mac_kernels.types import LOG2_E

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SINKS, BAND = 3, 20
K_SCALE, V_SCALE, SOFT_CAP = 0.7, 1.6, 5.0
NEVER = 10**6  # tiles: a run is over before


@dataclass(frozen=True, slots=True)
class Shape:
    """What a library is compiled for; ``stages`` of so many ``warps``."""

    head_dim: int
    group: int
    kv_heads: int
    page_size: int
    kv_layout: str
    dtype: torch.dtype
    kbar: bool
    warps: int
    stages: int
    rows: bool = False
    on_device: bool = False
    soft_cap: bool = False

    def __str__(self) -> str:
        return f"D{self.head_dim}-G{self.group}-P{self.page_size}-{self.kv_layout}-{self.stages}x{self.warps}"


SHAPES = (
    Shape(64, 2, 2, 16, "NHD", torch.float16, kbar=True, warps=2, stages=3),
    Shape(80, 9, 1, 5, "HND", torch.bfloat16, kbar=True, warps=2, stages=2, soft_cap=True),
    Shape(64, 3, 2, 1, "NHD", torch.float16, kbar=False, warps=4, stages=4, rows=True, on_device=True),
)


@dataclass(frozen=True, slots=True)
class Deal:
    """A step: lengths of the requests, reused groups, and how the tiles are dealt out."""

    lengths: tuple[int, ...]
    reused: tuple[int, ...] = ()
    blocks: int = 5
    early: int = 0
    lead: int = 0
    tiles_ahead: int = 0
    ahead: bool = False


LENGTHS = (23, 331, 0, 150, 40, 24, 2)  # rests of 0, 308, 0, 127, 17, 1 and 0 keys
DEALS = {
    "one block": Deal(LENGTHS, blocks=1),
    "more blocks than tiles": Deal(LENGTHS, blocks=97),
    "lead": Deal(LENGTHS, early=3, lead=9),
    "lead of all": Deal(LENGTHS, early=4, lead=10**6),
    "reused": Deal(LENGTHS, reused=(2, 3), early=2, lead=4, tiles_ahead=1),
    "nothing": Deal((0, 5, 23)),
    "nothing, ahead": Deal((0, 5, 23), early=2, lead=3, tiles_ahead=2, ahead=True),
    "all reused": Deal(LENGTHS, reused=tuple(range(14)), early=2, lead=4, tiles_ahead=1),
    "all reused, ahead": Deal(LENGTHS, reused=tuple(range(14)), early=2, lead=4, tiles_ahead=1, ahead=True),
    "ahead": Deal(LENGTHS, early=2, lead=4, tiles_ahead=1, ahead=True),
    "ahead, reused in the middle": Deal(LENGTHS, reused=(2, 7), early=3, lead=5, tiles_ahead=1, ahead=True),
    "ahead, reused late": Deal(LENGTHS, reused=(1, 3, 6), early=3, lead=5, tiles_ahead=3, ahead=True),
    "ahead, waits at the end": Deal(LENGTHS, reused=(3, 6), early=3, lead=5, tiles_ahead=NEVER, ahead=True),
    "ahead, one block": Deal(LENGTHS, reused=(2, 6), blocks=1, early=1, lead=2, tiles_ahead=2, ahead=True),
    "more groups than threads": Deal((36, 0, 60, 24) * 37, reused=(0, 4, 5, 129), early=4, lead=3, tiles_ahead=1,
                                     ahead=True),
}  # fmt: skip


def compiled(shape: Shape) -> ctypes.CDLL:
    row = -(-shape.head_dim // 64) * 64
    definitions = {
        "GROUP": shape.group, "NUM_KV_HEADS": shape.kv_heads, "HEAD_DIM": shape.head_dim, "BAND": BAND, "SINKS": SINKS,
        "PAGE_SIZE": shape.page_size, "ROW_STRIDE": 400 if shape.rows else 0, "KBAR": int(shape.kbar),
        "SOFT_CAP": int(shape.soft_cap), "SCALES_ON_DEVICE": int(shape.on_device), "CLUSTER": 1,
        "THREADS": 32 * shape.warps, "SHARED_BYTES": shape.stages * shape.warps * 2 * 16 * row * 2,
        "HALF_KV": int(shape.dtype == torch.float16), "BEGIN_64": 0, "PAGE_64": int(shape.rows), "LENGTH_64": 1,
    }  # fmt: skip
    return library("rest.cu", tuple(definitions.items()))


class Step:
    """Tensors of a step and what the kernel is told; the cache is NaN but for the rest of every request."""

    def __init__(self, shape: Shape, deal: Deal) -> None:
        self.shape, self.deal = shape, deal
        generator = torch.Generator().manual_seed(0)
        batch, page = len(deal.lengths), shape.page_size
        groups = batch * shape.kv_heads
        self.ranges = [(SINKS, min(max(n - BAND, SINKS), n)) for n in deal.lengths for _ in range(shape.kv_heads)]
        self.k, self.v = (
            torch.full((batch, max(deal.lengths), shape.kv_heads, shape.head_dim), math.nan, dtype=shape.dtype)
            for _ in "kv"
        )
        for request, (low, high) in enumerate(self.ranges[:: shape.kv_heads]):
            for x in (self.k, self.v):
                x[request, low:high] = torch.randn(x[request, low:high].shape, generator=generator).to(shape.dtype)
        counts = [400 if shape.rows else -(-n // page) for n in deal.lengths]
        begin = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        pages = torch.randperm(int(begin[-1]) + 3, generator=generator)[: int(begin[-1])]
        self.cache = torch.full((2, len(pages) + 3, page, shape.kv_heads, shape.head_dim), math.nan, dtype=shape.dtype)
        if shape.kv_layout == "HND":
            self.cache = self.cache.transpose(2, 3).contiguous().transpose(2, 3)
        for request, length in enumerate(deal.lengths):
            t = torch.arange(length)
            where = pages[int(begin[request]) + t // page]
            for cache, x in zip(self.cache, (self.k, self.v), strict=True):
                cache[where, t % page] = x[request, :length]
            own = pages[int(begin[request]) : int(begin[request + 1])]
            low, high = self.ranges[request * shape.kv_heads]
            own[: low // page] = own[-(-high // page) :] = 2**26  # nobody may look there
        self.pages = pages.to(torch.int64 if shape.rows else torch.int32)
        self.begin = torch.arange(batch, dtype=torch.int32) if shape.rows else begin
        self.lengths = torch.tensor([n if shape.rows else (n - 1) % page + 1 for n in deal.lengths])
        self.q = torch.randn(batch, shape.kv_heads * shape.group, shape.head_dim, generator=generator).to(shape.dtype)
        self.info = torch.zeros(groups, 8, dtype=torch.int32)
        for group, (low, high) in enumerate(self.ranges):
            reused = group in deal.reused
            self.info[group, 0], self.info[group, 1], self.info[group, 4] = low, low if reused else high, reused
        slots = deal.blocks + groups
        self.parts = torch.full((groups, 2), -1, dtype=torch.int32)
        self.out, self.key = (torch.full((slots, shape.group, shape.head_dim), math.nan) for _ in range(2))
        self.lse = torch.full((slots, shape.group), math.nan)
        self.ahead = torch.tensor([int(deal.ahead), 0], dtype=torch.int32)
        self.scales = torch.tensor([K_SCALE, V_SCALE])

    def run(self) -> None:
        a, shape, deal = RestArguments(), self.shape, self.deal
        k, v = self.cache
        a.q, a.k, a.v = self.q.data_ptr(), k.data_ptr(), v.data_ptr()
        a.stride_qb, a.stride_qh, _ = self.q.stride()
        a.k_scale, a.v_scale = (math.nan, math.nan) if shape.on_device else (K_SCALE, V_SCALE)
        a.k_scale_ptr, a.v_scale_ptr = (x.data_ptr() if shape.on_device else 0 for x in self.scales)
        a.stride_kp, a.stride_kt, a.stride_kh, _ = k.stride()
        a.stride_vp, a.stride_vt, a.stride_vh, _ = v.stride()
        a.num_groups, a.logit_scale, a.soft_cap = len(self.info), shape.head_dim**-0.5 * LOG2_E, SOFT_CAP
        decided, shown = self.info, torch.full_like(self.info, 2**20)
        for name, tensor in (
            ("begin", self.begin), ("page", self.pages), ("length", self.lengths), ("group", shown),
            ("ahead", self.ahead), ("parts", self.parts), ("part_out", self.out), ("part_key", self.key),
            ("part_lse", self.lse),
        ):  # fmt: skip
            setattr(a, f"{name}_ptr", tensor.data_ptr())
        a.num_blocks, a.early_blocks, a.tiles_ahead = deal.blocks, deal.early, deal.tiles_ahead
        a.lead, a.lead_ahead = (10**8, deal.lead) if deal.ahead else (deal.lead, 10**8)
        code, unknown = compiled(shape), shown.clone()
        flags = torch.tensor([int(deal.ahead), int(not deal.ahead)], dtype=torch.int32)
        try:
            self._change(code, False, shown, unknown, decided, decided.nbytes)
            self._change(code, True, self.ahead, flags[:1], flags[1:], 4)
            assert code.run(ctypes.byref(a), deal.blocks) == 0
        finally:
            for after in (False, True):
                self._change(code, after, flags, flags, flags, 0)

    @staticmethod
    def _change(
        code: ctypes.CDLL, after: bool, to: torch.Tensor, old: torch.Tensor, new: torch.Tensor, size: int
    ) -> None:
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (to, old, new))
        code.change(int(after), *pointers, ctypes.c_size_t(size))

    def merged(self, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, count = self.parts[group].tolist()
        lse = self.lse[first : first + count]
        weight = torch.softmax(lse * math.log(2), 0)[..., None]
        out, key = ((weight * x[first : first + count]).sum(0) for x in (self.out, self.key))
        return out, key, torch.logsumexp(lse * math.log(2), 0) / math.log(2)

    def expected(self, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape, (low, high) = self.shape, self.ranges[group]
        request, kv_head = divmod(group, shape.kv_heads)
        q = self.q[request, kv_head * shape.group : (kv_head + 1) * shape.group].float()
        k, v = (x[request, low:high, kv_head].float() for x in (self.k * K_SCALE, self.v * V_SCALE))
        logits = q @ k.T * shape.head_dim**-0.5
        if shape.soft_cap:
            logits = SOFT_CAP * torch.tanh(logits / SOFT_CAP)
        weight = torch.softmax(logits, 1)
        return weight @ v, weight @ k, torch.logsumexp(logits, 1) / math.log(2)


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_merge_to_the_rest_of_every_group_that_missed(shape: Shape, deal: str) -> None:
    step = Step(shape, DEALS[deal])
    tolerance = 3e-3 if shape.dtype == torch.float16 else 2e-2
    step.run()
    written = torch.zeros(len(step.lse), dtype=torch.bool)
    for group, (low, high) in enumerate(step.ranges):
        if group in step.deal.reused:
            continue
        first, count = step.parts[group].tolist()
        assert (count > 0) == (high > low)
        if high <= low:
            continue
        assert not written[first : first + count].any()
        written[first : first + count] = True
        out, key, lse = step.merged(group)
        wanted = step.expected(group)
        torch.testing.assert_close(out, wanted[0], rtol=0, atol=tolerance)
        torch.testing.assert_close(lse, wanted[2], rtol=0, atol=tolerance)
        if shape.kbar:
            torch.testing.assert_close(key, wanted[1], rtol=0, atol=tolerance)
    assert step.lse[~written].isnan().all() and step.out[~written].isnan().all()
    assert step.key[~written if shape.kbar else slice(None)].isnan().all()
    assert step.ahead[1] == 0  # as the next launch must find it


@pytest.mark.parametrize("ahead", [False, True])
def test_early_blocks_lead(ahead: bool) -> None:
    """Blocks run one after the other here, so the first ones get the longer runs: parts tell how many."""
    deal = Deal((16 * 40 + SINKS + BAND,), blocks=6, early=2, lead=20, tiles_ahead=1, ahead=ahead)
    step = Step(SHAPES[0], deal)
    step.run()
    assert step.parts.tolist() == [[0, 2], [2, 5]]  # 80 tiles: 27, 27, 7, 7, 6, 6
    step = Step(SHAPES[0], dataclasses.replace(deal, early=0, lead=0))
    step.run()
    assert step.parts.tolist() == [[0, 3], [3, 4]]  # 14, 14, 13, 13, 13, 13
