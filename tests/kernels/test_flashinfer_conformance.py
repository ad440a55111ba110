"""The FlashInfer backend on a GPU: the conformance kit over all pairs of shapes, and its calls against other forms."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import ClassVar

import pytest
import torch

from mac_kernels import (
    AttnState,
    BatchMacDecodeWithPagedKVCacheWrapper,
    HeadLayout,
    InputError,
    MacConfig,
    RingPool,
    Rope,
    UnsupportedError,
)
from mac_kernels.attend.flashinfer import HEAD_DIMS, RangeAttention, Ranges, Scores
from mac_kernels.complete.flashinfer import merge_state
from mac_kernels.complete.reference import merge_state as reference_merge
from mac_kernels.testing.conformance import CONFIGS, Case, DecodeConformance, pairwise
from mac_kernels.testing.scenario import PagedStore
from mac_kernels.testing.tolerances import max_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs FlashInfer (extra flashinfer)"),
]
CASES = tuple(
    Case(**row)
    for row in pairwise(
        {
            "head_dim": HEAD_DIMS,
            "group": (1, 2, 3, 4, 5, 6, 7, 8, 16),
            "kv_heads": (1, 2, 4),
            "page_size": (1, 5, 16, 64),
            "kv_layout": ("NHD", "HND"),
            "rotary": ("full", "partial", "interleaved", "scaled"),
        }
    )
)


class TestFlashInfer(DecodeConformance):
    backend = "flashinfer"
    device = "cuda"
    dtypes = (torch.bfloat16, torch.float16)
    cases = CASES
    rules: ClassVar[dict[str, MacConfig]] = CONFIGS
    sums_rounded = True
    capturable = True


class Attended:
    """A random cache of two requests and the state of given ranges, by FlashInfer and by torch in fp64."""

    def __init__(
        self,
        layout: HeadLayout,
        *,
        lengths: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
        kv_layout: str = "NHD",
        page_size: int = 16,
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.layout, self.lengths = layout, lengths
        heads, dim = layout.num_kv_heads, layout.head_dim
        store = PagedStore(
            len(lengths),
            max(lengths),
            layout,
            page_size=page_size,
            kv_layout=kv_layout,
            dtype=dtype,
            device="cuda",
            generator=draw,
        )
        self.k, self.v = (torch.randn(len(lengths), max(lengths), heads, dim, generator=draw) for _ in range(2))
        for request, length in enumerate(lengths):
            store.write(request, 0, self.k[request, :length], self.v[request, :length])
        self.k, self.v = self.k.to(dtype), self.v.to(dtype)
        self.kv = store.kv(store.table(lengths))
        self.q = torch.randn(len(lengths), layout.num_qo_heads, dim, generator=draw).to("cuda", dtype)
        self.out = torch.full_like(self.q, torch.nan)
        self.lse2 = torch.full(self.q.shape[:2], torch.nan, device="cuda")
        self.attention = RangeAttention(
            self.kv.table.indptr.clone(),
            layout,
            indices=self.kv.table.indices,
            page_size=page_size,
            kv_layout=kv_layout,
            q_dtype=dtype,
            kv_dtype=dtype,
        )
        groups = len(lengths) * heads
        self.bounds = torch.zeros(groups, 4, dtype=torch.int32, device="cuda")
        self.bounds[:, 2] = torch.arange(groups)
        self.starts = torch.zeros(groups, layout.group_size, dtype=torch.int32, device="cuda")

    def run(self) -> None:
        ranges, scores = Ranges(self.bounds, self.starts, self.layout.group_size), Scores(self.layout.head_dim**-0.5)
        caches = (self.kv.k_cache, self.kv.v_cache)
        self.attention.run(self.q, caches, ranges, scores, out=self.out, lse2=self.lse2, pdl=True)

    def check(self) -> None:
        heads, group = self.layout.num_kv_heads, self.layout.group_size
        bounds, starts = self.bounds.cpu().view(-1, heads, 4), self.starts.cpu().view(-1, heads, group)
        for request in range(len(self.lengths)):
            for head in range(heads):
                low, high = bounds[request, head, :2].tolist()
                rows = slice(head * group, head * group + group)
                out, lse2 = self.out[request, rows].cpu(), self.lse2[request, rows].cpu()
                if high < 0:
                    assert bool(out.isnan().all()) and bool(lse2.isnan().all()), "written, although nobody asked"
                    continue
                if high <= low:
                    assert bool((out == 0).all()) and bool((lse2 < -4e4).all())
                    continue
                q = self.q[request, rows].cpu().double()
                k, v = (x[request, low:high, head].double() for x in (self.k, self.v))
                score = q @ k.T * self.layout.head_dim**-0.5 / math.log(2)
                seen = torch.arange(low, high) >= starts[request, head][:, None]
                some = seen.any(-1)  # a head that sees nothing beside others that do: whatever, without weight
                assert bool((lse2[~some] < -4e4).all()) and bool(out.isfinite().all())
                score = torch.where(seen, score, -torch.inf)[some]
                want = torch.logsumexp(score * math.log(2), -1) / math.log(2)
                assert max_error(lse2[some], want) < 5e-3
                assert max_error(out[some], torch.softmax(score * math.log(2), -1) @ v) < 2e-2

    def set(self, low: list[int], high: list[int], starts: int = 0) -> None:
        """Bounds per group; the heads of a group start ``starts`` tokens apart, the first at the group's bound."""
        self.bounds[:, 0] = torch.tensor(low, dtype=torch.int32)
        self.bounds[:, 1] = torch.tensor(high, dtype=torch.int32)
        steps = torch.arange(self.layout.group_size, device="cuda", dtype=torch.int32) * starts
        self.starts.copy_(self.bounds[:, :1] + steps)


class TestRanges:
    @pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
    def test_ranges_change_under_one_graph(self, kv_layout: str) -> None:
        """Captured with full ranges; then anything from nothing to all of it, per kv head."""
        at = Attended(HeadLayout(16, 4, 128), lengths=(3000, 700), kv_layout=kv_layout)
        at.set([4] * 8, [2744] * 4 + [444] * 4)
        at.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            at.run()
        for low, high, starts in (
            ([4] * 8, [2744] * 4 + [444] * 4, 0),
            ([2600, 2612, 2700, 2744, 400, 444, 443, 440], [2744] * 4 + [444] * 4, 1),
            ([2600, 4, 2700, 2744, 400, 444, 4, 444], [2744] * 4 + [444] * 4, 3),
            ([0] * 8, [0] * 8, 0),
            ([0, 0, 0, 0, 0, 0, 699, 0], [3000, 1, 0, 3000, 700, 0, 700, 1], 0),
            ([4, 2600, 7, 4, 0, 9, 444, 440], [2744, -1, -1, 90, -1, 444, -1, 444], 2),
        ):
            at.set(low, high, starts)
            at.out.fill_(torch.nan)
            at.lse2.fill_(torch.nan)
            graph.replay()
            at.check()

    def test_keys_as_values_give_the_mean_key(self) -> None:
        at = Attended(HeadLayout(4, 2, 64), lengths=(300,))
        at.set([10, 250], [290, 290])
        at.kv = type(at.kv)(at.kv.k_cache, at.kv.k_cache, at.kv.table, at.layout, at.kv.kv_layout)
        at.v = at.k
        at.run()
        at.check()

    def test_custom_mask_gives_the_same(self) -> None:
        """The literal form, which reads all keys: one packed mask bit per query head and key, one kv head a request."""
        import flashinfer

        layout = HeadLayout(8, 2, 128)
        at = Attended(layout, lengths=(600, 333), page_size=1)
        at.set([5, 480, 100, 4], [540, 540, 300, 300], 2)
        at.run()
        heads, group = layout.num_kv_heads, layout.group_size
        kv, lengths = at.kv, torch.tensor(at.lengths).repeat_interleave(heads)
        position = [torch.arange(n) for n in lengths.tolist()]
        bounds, starts = at.bounds.cpu(), at.starts.cpu()
        mask = [(p >= starts[i][:, None]) & (p < bounds[i, 1]) for i, p in enumerate(position)]
        pages = [
            kv.table.indices[int(kv.table.indptr[i // heads]) :][: len(p)].long() * heads + i % heads
            for i, p in enumerate(position)
        ]
        rows = len(position)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa2"
        )
        wrapper.plan(
            torch.arange(rows + 1, dtype=torch.int32, device="cuda") * group,
            torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().cuda(),
            torch.cat(pages).int(),
            torch.ones(rows, dtype=torch.int32, device="cuda"),
            1,
            1,
            layout.head_dim,
            1,
            custom_mask=torch.cat([m.flatten() for m in mask]).cuda(),
            q_data_type=at.q.dtype,
            kv_data_type=at.q.dtype,
        )
        views = tuple(cache.reshape(-1, 1, 1, layout.head_dim) for cache in (kv.k_cache, kv.v_cache))
        out, lse2 = wrapper.run(at.q.reshape(-1, 1, layout.head_dim), views, return_lse=True)
        assert max_error(at.out, out.view_as(at.out)) < 2e-2
        assert max_error(at.lse2, lse2.view_as(at.lse2)) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_of_two_states(dtype: torch.dtype) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    a, b = (
        AttnState(
            torch.randn(5, 8, 128, generator=draw, device="cuda").to(dtype),
            torch.randn(5, 8, generator=draw, device="cuda") * 4,
        )
        for _ in range(2)
    )
    a.lse2[0], b.lse2[1], a.lse2[2], b.lse2[2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    a.out[0], b.out[1], a.out[2], b.out[2] = 0, 0, 0, 0
    got = merge_state(a, b)
    want = reference_merge(AttnState(a.out.double(), a.lse2.double()), AttnState(b.out.double(), b.lse2.double()))
    assert got.out.dtype == dtype
    assert max_error(got.lse2, want.lse2) < 1e-5
    assert max_error(got.out, want.out) <= 2 * torch.finfo(dtype).eps * float(want.out.abs().max())


def test_fp32_is_refused() -> None:
    layout = HeadLayout(4, 2, 64)
    wrapper = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend="flashinfer")
    zero = torch.zeros(1, dtype=torch.int32, device="cuda")
    config = MacConfig(window=16, band=6, sinks=2, min_context=12)
    rope = Rope.from_inv_freq(torch.ones(32, device="cuda"))
    one = torch.ones(1, dtype=torch.int32, device="cuda")
    options = {"layout": layout, "page_size": 1, "config": config, "rope": rope}
    with pytest.raises(UnsupportedError, match=r"torch\.float32 queries beside a torch\.float32 cache"):
        wrapper.plan(torch.cat([zero, one]), zero, one, kv_data_type=torch.float32, **options)
    wrapper.plan(torch.cat([zero, one]), zero, one, **options)  # said nothing of fp32: found out by the run
    rings = RingPool(num_rings=1, num_layers=1, layout=layout, window=16, device="cuda")
    cache = torch.zeros(1, 1, 2, 64, device="cuda")
    with pytest.raises(InputError, match="bf16 or fp16"):
        wrapper.run(
            torch.zeros(1, 4, 64, device="cuda"),
            (cache, cache),
            rings=rings,
            layer=0,
            slots=zero.long(),
            generations=zero.long(),
        )
