"""rest.cu alone, emulated: hand-made decisions, all that it must not read or write is NaN; blocks in several orders."""

from __future__ import annotations

import dataclasses
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from emulated import AHEAD, EmulatedKernel, known_with_the_wait, library

from mac_kernels.bypass import PAUSE_STEPS, TRIAL_GROUPS, Bypass
from mac_kernels.cuda.rest import RestArguments
from mac_kernels.types import LOG2_E, Reason

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SINKS, BAND = 3, 20
K_SCALE, V_SCALE, SOFT_CAP = 0.7, 1.6, 5.0
NEVER = 10**6  # tiles: a run is over before
UNUSED = AHEAD + 7  # tickets, where there are no early blocks
ORDERS: dict[str, Callable[[int], Sequence[int]]] = {  # in which the blocks come
    "by index": range,
    "last index first": lambda blocks: range(blocks)[::-1],
    "shuffled": lambda blocks: random.Random(116).sample(range(blocks), blocks),
}


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
    bypass: bool = True

    def __str__(self) -> str:
        return f"D{self.head_dim}-G{self.group}-P{self.page_size}-{self.kv_layout}-{self.stages}x{self.warps}"


SHAPES = (
    Shape(64, 2, 2, 16, "NHD", torch.float16, kbar=True, warps=2, stages=3),
    Shape(80, 9, 1, 5, "HND", torch.bfloat16, kbar=True, warps=2, stages=2, soft_cap=True),
    Shape(64, 3, 2, 1, "NHD", torch.float16, kbar=False, warps=4, stages=4, rows=True, on_device=True,
          bypass=False),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Deal:
    """A step: lengths of the requests, reused groups, and how the tiles are dealt out; ``ahead``: how it begins."""

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
    "ahead, all blocks early": Deal(LENGTHS, reused=(1, 5), early=5, lead=4, tiles_ahead=1, ahead=True),
    "ahead": Deal(LENGTHS, early=2, lead=4, tiles_ahead=1, ahead=True),
    "ahead, reused in the middle": Deal(LENGTHS, reused=(2, 7), early=3, lead=5, tiles_ahead=1, ahead=True),
    "ahead, reused late": Deal(LENGTHS, reused=(1, 3, 6), early=3, lead=5, tiles_ahead=3, ahead=True),
    "ahead, waits at the end": Deal(LENGTHS, reused=(3, 6), early=3, lead=5, tiles_ahead=NEVER, ahead=True),
    "ahead, one block": Deal(LENGTHS, reused=(2, 6), blocks=1, early=1, lead=2, tiles_ahead=2, ahead=True),
    "more groups than threads": Deal((36, 0, 60, 24) * 37, reused=(0, 4, 5, 129), early=4, lead=3, tiles_ahead=1,
                                     ahead=True),
}  # fmt: skip


def definitions_of(shape: Shape) -> tuple[tuple[str, int], ...]:
    row = -(-shape.head_dim // 64) * 64
    definitions = {
        "GROUP": shape.group, "NUM_KV_HEADS": shape.kv_heads, "HEAD_DIM": shape.head_dim, "BAND": BAND, "SINKS": SINKS,
        "PAGE_SIZE": shape.page_size, "ROW_STRIDE": 400 if shape.rows else 0, "KBAR": int(shape.kbar),
        "SOFT_CAP": int(shape.soft_cap), "SCALES_ON_DEVICE": int(shape.on_device), "CLUSTER": 1,
        "THREADS": 32 * shape.warps, "SHARED_BYTES": shape.stages * shape.warps * 2 * 16 * row * 2,
        "HALF_KV": int(shape.dtype == torch.float16), "BEGIN_64": 0, "PAGE_64": int(shape.rows), "LENGTH_64": 1,
        "BYPASS": int(shape.bypass), "TRIAL_GROUPS": TRIAL_GROUPS, "PAUSE_STEPS": PAUSE_STEPS,
    }  # fmt: skip
    return tuple(definitions.items())


class Step:
    """Tensors of a step and what the kernel is told; the cache is NaN but for the rest of every request."""

    def __init__(self, shape: Shape, deal: Deal, after: Step | None = None) -> None:
        self.shape, self.deal = shape, deal
        if after is None:
            begun = AHEAD if deal.ahead else 0
            self.tickets = torch.tensor([begun if deal.early > 0 else UNUSED], dtype=torch.int32)
            self.bypass = torch.tensor([9, TRIAL_GROUPS, 3, 0], dtype=torch.int32)
        else:
            self.tickets, self.bypass = after.tickets, after.bypass
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
        self.scales = torch.tensor([K_SCALE, V_SCALE])

    def run(self, order: str = "by index", break_even: float = 0.0) -> None:
        """Launch, and look at what is left of tickets and bypass: the front has counted the hits."""
        expected, deal = Bypass(1, "cpu"), self.deal
        expected.values[0] = self.bypass
        if self.shape.bypass:
            expected.update(0, torch.tensor([[Reason.NO_RING]]), break_even)
        a, blocks = self._arguments(), deal.blocks
        a.break_even = break_even
        named, shown = ("rest.cu", definitions_of(self.shape)), torch.full_like(self.info, 2**20)
        a.group_ptr = shown.data_ptr()
        kernel = EmulatedKernel(*named, blocks, torch.device("cpu"))
        with known_with_the_wait(library(*named), shown, self.info):
            kernel.launch(a, ORDERS[order](blocks))
        reused = bool((self.info[:, 4] != 0).any())
        renewed = AHEAD if deal.tiles_ahead > 0 and not reused else 0
        assert self.tickets.item() == (renewed if deal.early > 0 else UNUSED)
        assert self.bypass.tolist() == expected.values[0].tolist()

    def _arguments(self) -> RestArguments:
        a, shape, deal = RestArguments(), self.shape, self.deal
        k, v = self.cache
        a.q, a.k, a.v = self.q.data_ptr(), k.data_ptr(), v.data_ptr()
        a.stride_qb, a.stride_qh, _ = self.q.stride()
        a.k_scale, a.v_scale = (math.nan, math.nan) if shape.on_device else (K_SCALE, V_SCALE)
        a.k_scale_ptr, a.v_scale_ptr = (x.data_ptr() if shape.on_device else 0 for x in self.scales)
        a.stride_kp, a.stride_kt, a.stride_kh, _ = k.stride()
        a.stride_vp, a.stride_vt, a.stride_vh, _ = v.stride()
        a.num_groups, a.logit_scale, a.soft_cap = len(self.info), shape.head_dim**-0.5 * LOG2_E, SOFT_CAP
        for name, tensor in (
            ("begin", self.begin), ("page", self.pages), ("length", self.lengths), ("tickets", self.tickets),
            ("bypass", self.bypass), ("parts", self.parts), ("part_out", self.out), ("part_key", self.key),
            ("part_lse", self.lse),
        ):  # fmt: skip
            setattr(a, f"{name}_ptr", tensor.data_ptr())
        a.num_blocks, a.early_blocks, a.tiles_ahead = deal.blocks, deal.early, deal.tiles_ahead
        a.lead, a.lead_ahead = (10**8, deal.lead) if self.tickets.item() == AHEAD else (deal.lead, 10**8)
        return a

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


def check_parts(step: Step) -> None:
    """Every group that missed has its rest, nobody has written anything else."""
    shape, tolerance = step.shape, 3e-3 if step.shape.dtype == torch.float16 else 2e-2
    written = torch.zeros(len(step.lse), dtype=torch.bool)
    for group, (low, high) in enumerate(step.ranges):
        if group in step.deal.reused:
            continue
        first, count = step.parts[group].tolist()
        assert count > 0 if high > low else count == 0
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


@pytest.mark.parametrize("deal", DEALS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts_merge_to_the_rest_of_every_group_that_missed(shape: Shape, deal: str) -> None:
    """In whatever order the blocks come: a late one may be the first, an early one the last."""
    steps = [Step(shape, DEALS[deal]) for _ in ORDERS]
    for step, order in zip(steps, ORDERS, strict=True):
        step.run(order)
    check_parts(steps[0])
    for step in steps[1:]:
        for name in ("parts", "out", "key", "lse"):  # bit by bit: runs go by tickets
            torch.testing.assert_close(getattr(step, name), getattr(steps[0], name), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("deal", ["nothing", "all reused", "all reused, ahead"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_without_tiles_have_no_parts(shape: Shape, deal: str, order: str) -> None:
    """Also where only they missed, so that blocks leave early."""
    whole = dataclasses.replace(DEALS[deal], lengths=LENGTHS, reused=())
    with_tiles = tuple(group for group, (low, high) in enumerate(Step(shape, whole).ranges) if high > low)
    step = Step(shape, dataclasses.replace(whole, reused=with_tiles))
    step.run(order)
    check_parts(step)


def test_orders_mix_early_and_late_blocks() -> None:
    for name in ("last index first", "shuffled"):
        order = ORDERS[name](5)
        assert sorted(order) == [0, 1, 2, 3, 4] and order[0] >= 3 and order[-1] < 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_a_step_begins_as_the_one_before_has_left_it(shape: Shape, order: str) -> None:
    """On one word of tickets and one row of hits."""
    groups = len(LENGTHS) * shape.kv_heads
    everything, lengths, step = tuple(range(groups)), LENGTHS, None
    began = []
    for reused in ((), (), (2, 3), (5,), (), everything, everything, (), (), tuple(range(1, groups)), ()):
        step = Step(shape, Deal(lengths, reused, early=2, lead=4, tiles_ahead=1), step)
        began.append(step.tickets.item() == AHEAD)
        step.run(order)
        check_parts(step)
        lengths = (*lengths[1:], lengths[0])
    assert began == [False, True, True, False, False, True, False, False, True, True, False]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reused", [(), (1,), (0, 1)])
@pytest.mark.parametrize(("early", "ahead"), [(0, False), (3, False), (3, True), (5, False), (5, True)])
def test_hits_are_judged_once_a_launch(order: str, reused: tuple[int, ...], early: int, ahead: bool) -> None:
    """:meth:`Step.run` compares with the reference; here all its branches."""
    step = None
    for judged, break_even in ((TRIAL_GROUPS - 1, 0.9), (TRIAL_GROUPS, 0.0), (TRIAL_GROUPS, 0.9), (0, 0.9)):
        step = Step(SHAPES[0], Deal((60,), reused, early=early, lead=1, tiles_ahead=int(early > 0)), step)
        if early:
            step.tickets[0] = AHEAD if ahead else 0
        step.bypass[:2] = torch.tensor([judged // 8, judged])
        step.run(order, break_even)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("early", "ahead", "parts"),
    [
        (2, False, [[0, 2], [2, 5]]),  # 80 tiles: 27, 27, 7, 7, 6, 6
        (2, True, [[0, 2], [2, 5]]),
        (0, False, [[0, 3], [3, 4]]),  # 14, 14, 13, 13, 13, 13
    ],
)
def test_the_first_blocks_lead(early: int, ahead: bool, parts: list[list[int]], order: str) -> None:
    """Whichever they are, if some are early; parts tell how long the runs are."""
    deal = Deal((16 * 40 + SINKS + BAND,), blocks=6, early=early, lead=20, tiles_ahead=early, ahead=ahead)
    step = Step(SHAPES[0], deal)
    step.run(order)
    assert step.parts.tolist() == parts
