"""TCA on Triton against its reference: interpreted on tiny shapes, and over real ones on a GPU.

Caches are NaN beyond their tokens, and so is all memory that the kernels allocate.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mac_kernels import HeadLayout, InputError, PagedKV, UnsupportedError, tca
from mac_kernels.tca import FarSet, Selection, TcaConfig, fused
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep, far_count, keep_by_rank
from mac_kernels.tca.config import far_blocks, far_end
from mac_kernels.tca.select import block_scores, empty_far_set, importance
from mac_kernels.testing.conformance.batch import poisoned_empty
from mac_kernels.testing.scenario import PagedStore, random_store
from mac_kernels.testing.tolerances import Stage, assert_close
from mac_kernels.types import AttnState

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
TIE = 1e-4  # scores that differ by less, relatively, may change places: sums are taken in another order


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads, pages, dtypes and rule of one test; ``str(shape)`` is its id."""

    layout: HeadLayout
    config: TcaConfig
    page_size: int = 4
    kv_layout: Any = "NHD"
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    rows: bool = False
    cap: float = 0.0

    def __str__(self) -> str:
        c, heads = self.config, self.layout
        name = f"G{heads.group_size}-Hkv{heads.num_kv_heads}-D{heads.head_dim}-b{c.block}-w{c.local_window}-F{c.sinks}"
        kv = str(self.kv_dtype or self.dtype).removeprefix("torch.")
        return f"{name}-{c.rule}-P{self.page_size}-{self.kv_layout}-{kv}{'-rows' * self.rows}{'-cap' * (self.cap > 0)}"

    @property
    def options(self) -> dict[str, float]:
        """Arguments of every function."""
        return {"sm_scale": self.layout.head_dim**-0.5, "logits_soft_cap": self.cap}


def small(block: int, window: int, sinks: int, rule: Any = "ours") -> TcaConfig:
    return TcaConfig(block=block, local_window=window, sinks=sinks, rule=rule)


TINY = (
    Shape(HeadLayout(4, 2, 16), small(16, 32, 4)),
    Shape(HeadLayout(3, 1, 24), small(16, 16, 0, "literal"), page_size=5, kv_layout="HND", cap=2.0),
    Shape(HeadLayout(2, 2, 16), small(32, 32, 3), page_size=1, rows=True),
)
BF16, FP16 = torch.bfloat16, torch.float16
REAL = (
    Shape(HeadLayout(32, 8, 128), TcaConfig(local_window=512), page_size=16, dtype=BF16),
    Shape(
        HeadLayout(32, 4, 128), TcaConfig(local_window=256, sinks=0, rule="literal"), page_size=1, dtype=BF16, rows=True
    ),
    Shape(HeadLayout(7, 1, 192), small(64, 128, 4), page_size=5, kv_layout="HND", dtype=FP16),
    Shape(HeadLayout(12, 1, 80), small(256, 256, 2), page_size=64, dtype=BF16, cap=20.0),
    Shape(HeadLayout(4, 2, 256), small(16, 64, 4), page_size=16, kv_layout="HND", dtype=BF16),
    Shape(HeadLayout(4, 4, 64), TcaConfig(local_window=128), page_size=16, dtype=BF16, kv_dtype=torch.float8_e4m3fn),
    Shape(HeadLayout(4, 2, 64), small(32, 64, 4), page_size=16),
)
SHAPES = TINY if INTERPRETED else (*TINY, *REAL)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def store_of(shape: Shape, lengths: Sequence[int]) -> PagedStore:
    return random_store(
        lengths,
        shape.layout,
        page_size=shape.page_size,
        kv_layout=shape.kv_layout,
        dtype=shape.kv_dtype or shape.dtype,
        device=DEVICE,
    )


def view(shape: Shape, store: PagedStore, lengths: Sequence[int]) -> PagedKV:
    table = store.row_table(lengths) if shape.rows else store.table(lengths)
    scales = (0.5, 1.5) if shape.kv_dtype else (1.0, 1.0)
    return PagedKV(store.k_cache, store.v_cache, table, shape.layout, shape.kv_layout, *scales)


def queries(shape: Shape, count: int, seed: int = 5) -> torch.Tensor:
    size = (count, shape.layout.num_qo_heads, shape.layout.head_dim)
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2).to(DEVICE, shape.dtype)


def lengths_of(config: TcaConfig, longest: int) -> list[int]:
    """A long request, one before its first far block, one that has just got it, and a short one."""
    edge = config.sinks + config.local_window + config.block
    return [longest, edge, edge + 1, 3]


def choice_of(layout: HeadLayout) -> list[int]:
    return [(5, NUM_SPARSE, 9)[head % 3] for head in range(layout.num_kv_heads)]


def assert_state(got: AttnState, want: AttnState, dtype: torch.dtype) -> None:
    for stage, fast, ref, kind in (("output", got.out, want.out, dtype), ("lse2", got.lse2, want.lse2, torch.float32)):
        name: Stage = stage
        assert_close(name, fast, ref.to(kind), ref.double(), dtype=kind)


def assert_selection(
    got: Selection, s: torch.Tensor, lengths: Sequence[int], choice: Sequence[int], c: TcaConfig
) -> None:
    """A selection is right if the numbers are the budgets' and nothing that was left out beats what was kept."""
    ids, count, ends, prefix = (x.cpu() for x in (*tensors(got.far), got.prefix))
    for request, length in enumerate(lengths):
        blocks = far_blocks(length - 1, c)
        for head, candidate in enumerate(choice):
            listed = ids[request, head, : count[request, head]]
            assert len(listed) == far_count(candidate, blocks, c)
            assert torch.equal(ids[request, head, : c.sinks], torch.arange(c.sinks, dtype=torch.int32))
            if candidate == NUM_SPARSE or not blocks:
                assert not ends[request, head] and not prefix[request, head].any()
                continue
            assert ends[request, head] == far_end(blocks, c)
            below = [int((listed < c.sinks + m * c.block).sum()) for m in range(1, blocks + 1)]
            assert prefix[request, head, : blocks + 1].tolist() == [0, *below]
            assert bool((listed.diff() > 0).all()) and (not len(listed) or listed[-1] < ends[request, head])

            scores = s[request, head, c.sinks : c.sinks + blocks * c.block].view(blocks, c.block)
            kept = torch.zeros(blocks * c.block, dtype=torch.bool)
            kept[listed[c.sinks :].long() - c.sinks] = True
            kept = kept.view(blocks, c.block)
            least = torch.where(kept, scores, torch.inf).amin(1)
            assert bool((least >= torch.where(kept, 0.0, scores).amax(1) * (1 - TIE)).all())
            ranked, keep = block_scores(scores, c), kept.sum(1)
            assert sorted(keep.tolist(), reverse=True) == keep_by_rank(candidate, blocks, c.block)
            for one in set(keep.tolist()):
                assert ranked[keep >= one].amin() >= torch.where(keep < one, ranked, 0.0).amax() * (1 - TIE)


@shapes
def test_selection(shape: Shape) -> None:
    config, choice = shape.config, choice_of(shape.layout)
    lengths = lengths_of(config, 16 * config.block + config.local_window + 7)
    kv, q = view(shape, store_of(shape, lengths), lengths), queries(shape, len(lengths))
    with poisoned_empty():
        got = fused.select_prompt(q, kv, lengths, choice, config=config, **shape.options)
    s = importance(q, kv, **shape.options).cpu()
    assert_selection(got, s, lengths, choice, config)


def test_selection_finds_few_hot_tokens() -> None:
    """Tokens that hold the mass are kept wherever they lie, ties go to the earlier token and block."""
    shape = TINY[0]
    config, length = shape.config, 150
    store = PagedStore(1, length, shape.layout, page_size=4, device=DEVICE, generator=torch.Generator().manual_seed(0))
    k = torch.zeros(length, 2, 16)
    hot = [4, 37, 38, 71]  # 4 is the first token after the sinks
    k[hot] = 1.0
    store.write(0, 0, k, k)
    q = torch.ones(1, 4, 16, device=DEVICE)
    got = fused.select_prompt(q, view(shape, store, [length]), [length], [3, 3], config=config, **shape.options)
    listed = got.far.ids[0, 0, : got.far.count[0, 0]].tolist()
    assert set(hot) <= set(listed)
    want = tca.select_prompt(q, view(shape, store, [length]), [length], [3, 3], config=config, **shape.options)
    assert torch.equal(got.prefix, want.prefix) and listed == want.far.ids[0, 0, : want.far.count[0, 0]].tolist()


@shapes
@pytest.mark.parametrize("chunk", [False, True], ids=["prompt", "chunk"])
def test_prefill(shape: Shape, chunk: bool) -> None:
    config = shape.config
    longest = 4 * config.block + config.local_window
    # tiles begin at the sinks: the last one reaches beyond a length that is full to the last row of what is gathered
    lengths = lengths_of(config, -(-longest // 128) * 128 if chunk else longest + 7)
    kv = view(shape, store_of(shape, lengths), lengths)
    last = queries(shape, len(lengths))
    selection = tca.select_prompt(last, kv, lengths, choice_of(shape.layout), config=config, **shape.options)
    counts = [config.block + 3, 0, 1, 2] if chunk else lengths
    indptr = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    q = queries(shape, sum(counts))
    with poisoned_empty():
        got = fused.sparse_prefill(q, indptr, kv, selection, config=config, **shape.options)
    want = tca.sparse_prefill(q, indptr, kv, selection, config=config, **shape.options)
    assert_state(got, want, shape.dtype)


def decoding(shape: Shape, capacity: int) -> tuple[list[int], PagedStore, torch.Tensor, list[FarSet]]:
    """Prompts that are about to lose a block to the far set, room to grow, and two equal far sets."""
    config, layout = shape.config, shape.layout
    edge = config.sinks + config.local_window + config.block
    lengths, choice = [edge + 2 * config.block - 1, edge - 1, 3, 1], choice_of(layout)
    keep = torch.tensor([decode_keep(one, config.block) for one in choice], dtype=torch.int32, device=DEVICE)
    store = store_of(shape, [length + config.block + 2 for length in lengths])
    kv = view(shape, store, lengths)
    start = tca.select_prompt(queries(shape, len(lengths)), kv, lengths, choice, config=config, **shape.options).far
    sets = []
    for _ in range(2):
        far = empty_far_set(len(lengths), layout.num_kv_heads, capacity, config=config, device=torch.device(DEVICE))
        far.ids[:, :, : start.ids.shape[2]] = start.ids[:, :, :capacity]
        sets.append(FarSet(far.ids, start.count.clone(), start.far_end.clone()))
    return lengths, store, keep, sets


def test_queries_of_any_strides() -> None:
    shape = TINY[0]
    config = shape.config
    kv = view(shape, store_of(shape, [60]), [60])
    q = queries(shape, 60)
    selection = tca.select_prompt(q[-1:], kv, [60], [5, 5], config=config, **shape.options)
    indptr = torch.tensor([0, 60], dtype=torch.int32, device=DEVICE)
    uneven = torch.full((60, 4, 18), torch.nan, device=DEVICE)[:, :, 1:17]
    by_head = torch.full((4, 60, 16), torch.nan, device=DEVICE).transpose(0, 1)
    want = fused.sparse_prefill(q, indptr, kv, selection, config=config, **shape.options)
    for strided in (uneven, by_head):
        strided.copy_(q)
        got = fused.sparse_prefill(strided, indptr, kv, selection, config=config, **shape.options)
        assert torch.equal(got.out, want.out)


@shapes
def test_decode_with_compaction(shape: Shape) -> None:
    """Far sets grow as the reference's do, and every step attends to the same tokens."""
    config = shape.config
    lengths, store, keep, (mine, theirs) = decoding(shape, capacity=config.sinks + 4 * config.block)
    for step in range(4 if INTERPRETED else config.block + 2):
        q, kv = queries(shape, len(lengths), seed=step), view(shape, store, [length + step for length in lengths])
        with poisoned_empty():
            fused.compact(q, kv, mine, keep, config=config, **shape.options)
            got = fused.sparse_decode(q, kv, mine, **shape.options)
        tca.compact(q, kv, theirs, keep, config=config, **shape.options)
        for name in ("ids", "count", "far_end"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
        assert_state(got, tca.sparse_decode(q, kv, theirs, **shape.options), shape.dtype)
    assert mine.far_end[:2, 0].tolist() == [far_end(3, config), far_end(1, config)]


def test_full_far_set_leaves_the_window_longer() -> None:
    shape = TINY[0]
    config = shape.config
    lengths, store, keep, (far, _) = decoding(shape, capacity=config.sinks + 2 * config.block)
    far.count[0] = far.ids.shape[2]
    far.ids[0] = torch.arange(far.ids.shape[2], device=DEVICE)
    before = far.ids.clone()
    kv, q = view(shape, store, [length + 2 for length in lengths]), queries(shape, len(lengths))
    fused.compact(q, kv, far, keep, config=config, **shape.options)
    assert torch.equal(far.ids[0], before[0]) and int(far.far_end[0, 0]) == far_end(2, config)
    assert int(far.far_end[1, 0]) == far_end(1, config)


def test_blocks_that_left_together_are_all_taken() -> None:
    shape = TINY[0]
    config = shape.config
    lengths, store, keep, (far, _) = decoding(shape, capacity=config.sinks + 4 * config.block)
    far.count[0], far.far_end[0] = 0, 0
    kv, q = view(shape, store, [length + 2 for length in lengths]), queries(shape, len(lengths))
    fused.compact(q, kv, far, keep, config=config, **shape.options)
    assert int(far.far_end[0, 0]) == far_end(3, config)
    assert int(far.count[0, 0]) == config.sinks + 3 * int(keep[0])
    listed = far.ids[0, 0, : far.count[0, 0]]
    assert bool((listed.diff() > 0).all()) and int(listed[-1]) < far_end(3, config)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    shape = dataclasses.replace(TINY[0], config=small(8, 16, 0))
    kv = view(shape, store_of(shape, [40]), [40])
    with pytest.raises(UnsupportedError, match="block=8"):
        fused.select_prompt(queries(shape, 1), kv, [40], [3, 3], config=shape.config, **shape.options)


def test_part_of_a_far_set_is_refused() -> None:
    shape = TINY[0]
    lengths, store, _, (far, _) = decoding(shape, capacity=64)
    part = FarSet(far.ids[:, :, :32], far.count, far.far_end)
    with pytest.raises(InputError, match=r"far\.ids .* contiguous"):
        fused.sparse_decode(queries(shape, 4), view(shape, store, lengths), part, **shape.options)


@pytest.mark.gpu
def test_decode_is_replayed() -> None:
    """One graph serves all lengths: far sets, tables and queries change between replays."""
    shape = REAL[0]
    config = shape.config
    lengths, store, keep, (mine, theirs) = decoding(shape, capacity=config.sinks + 4 * config.block)
    kv = view(shape, store, [length + config.block for length in lengths])
    q = queries(shape, len(lengths))
    table = kv.table

    def step() -> AttnState:
        fused.compact(q, kv, mine, keep, config=config, **shape.options)
        return fused.sparse_decode(q, kv, mine, **shape.options)

    saved = [x.clone() for x in tensors(mine)]
    step()
    for tensor, value in zip(tensors(mine), saved, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for tensor, value in zip(tensors(mine), saved, strict=True):
        tensor.copy_(value)
    for now in range(3):
        fresh = view(shape, store, [length + now for length in lengths])
        for target, source in zip(table.pointers, fresh.table.pointers, strict=True):
            target[: len(source)] = source
        q.copy_(queries(shape, len(lengths), seed=now))
        graph.replay()
        tca.compact(q, fresh, theirs, keep, config=config, **shape.options)
        assert torch.equal(mine.ids, theirs.ids)
        assert_state(got, tca.sparse_decode(q, fresh, theirs, **shape.options), shape.dtype)


def tensors(far: FarSet) -> list[torch.Tensor]:
    return [far.ids, far.count, far.far_end]
