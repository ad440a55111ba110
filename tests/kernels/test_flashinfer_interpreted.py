"""The FlashInfer backend without FlashInfer: our kernels interpreted, its call modelled in torch, judged by the kit."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import ClassVar

import pytest
import torch
from flashinfer_model import ModelAttention, plan_info

from mac_kernels import HeadLayout, MacConfig, PagedKV, composed, support
from mac_kernels.attend.flashinfer_replan import PlanBuffers, locate_plan_buffers, parse_plan_info, replan
from mac_kernels.composed import check_cache, flat_entries, page_units, token_view
from mac_kernels.errors import InputError
from mac_kernels.testing.conformance import SMALL_CASES, Case, DecodeConformance, variant
from mac_kernels.testing.scenario import PagedStore

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs where TRITON_INTERPRET=1 (make test sets it)"
)


@interpreted
class TestComposedInterpreted(DecodeConformance):
    backend = "flashinfer"
    cases = (SMALL_CASES[0], Case(head_dim=16, group=3, kv_heads=2, page_size=5, kv_layout="HND", rotary="partial"))
    # 15 nominees hold every candidate of a window of 16
    rules: ClassVar[dict[str, MacConfig]] = {
        "head": variant(nominees=15),
        "group-bound": variant(nominees=15, match_scope="group", influence=0.35),
        "plain-no-sinks": variant(nominees=15, correction=False, sinks=0),
    }
    steps, rule_steps, chain_steps = 2, 10, 40
    test_rows_in_another_dtype = None  # bf16 rows
    test_paper_rule = None  # refused before a step is built: tests/unit/test_flashinfer_support.py

    @pytest.fixture(autouse=True)
    def _without_flashinfer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(composed, "RangeAttention", ModelAttention)
        monkeypatch.setitem(support._CHECKS, "flashinfer", lambda *_: ())
        monkeypatch.setattr(support, "_missing_flashinfer", lambda: ())


def buffers(batch: int, tiles: int) -> PlanBuffers:
    def dirty(count: int) -> torch.Tensor:
        return torch.full((count,), -7, dtype=torch.int32)

    return PlanBuffers(
        request=dirty(tiles),
        qo_tile=dirty(tiles),
        kv_tile=dirty(tiles),
        valid=torch.full((tiles,), 7, dtype=torch.uint8),
        o_indptr=dirty(batch + 1),
        merge_indptr=dirty(batch + 1),
        chunk=dirty(1),
    )


def dealt(lengths: torch.Tensor, *, tiles: int, programs: int) -> tuple[int, list[list[int]]]:
    """Replan for lengths [B, Hkv]; check the lists against each other; the chunk and the chunks of every group."""
    batch, heads = lengths.shape
    plan, bounds = buffers(batch, tiles), torch.full((batch * heads, 8), 3, dtype=torch.int32)
    bounds[:, 0] = 11
    bounds[:, 1] = 11 + lengths.flatten()
    replan(plan, bounds, batch_size=batch, num_kv_heads=heads, programs=programs)
    chunk, used = int(plan.chunk), plan.valid.bool()
    assert plan.valid.max() <= 1 and torch.equal(plan.o_indptr, plan.merge_indptr)
    listed = list(zip(plan.request[used].tolist(), plan.kv_tile[used].tolist(), strict=True))
    chunks = [[-(-max(length, 0) // chunk) for length in row] for row in lengths.tolist()]
    assert listed == [(b, i) for b, row in enumerate(chunks) for i in range(max(row))]
    assert plan.o_indptr.tolist() == [0, *itertools.accumulate(map(max, chunks))]
    assert bool((plan.qo_tile == 0).all()) and bool((plan.request[~used] == 0).all())
    return chunk, chunks


@interpreted
class TestReplan:
    @pytest.mark.parametrize("seed", range(4))
    def test_every_token_has_one_tile(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        batch, heads = (1, 5, 16, 33)[seed], (4, 3, 8, 1)[seed]
        lengths = torch.randint(0, 40_000, (batch, heads), generator=draw)
        lengths[torch.rand(batch, heads, generator=draw) < 0.6] = 100
        lengths[torch.rand(batch, heads, generator=draw) < 0.2] = -5
        dealt(lengths, tiles=max(264, batch), programs=264)

    def test_a_lone_miss_gets_the_whole_gpu(self) -> None:
        lengths = torch.full((64, 4), 100)
        lengths[17, 2] = 126_000
        _, chunks = dealt(lengths, tiles=264, programs=264)
        assert 0.7 * 264 <= chunks[17][2] <= 264

    def test_equal_groups_share_one_wave(self) -> None:
        _, chunks = dealt(torch.full((16, 4), 32_512), tiles=264, programs=264)
        assert set(itertools.chain(*chunks)) == {4}

    def test_ragged_waves_are_made_finer(self) -> None:
        _, chunks = dealt(torch.full((35, 4), 32_512), tiles=264, programs=264)
        assert set(itertools.chain(*chunks)) == {7}

    def test_nothing_to_read_takes_no_tile(self) -> None:
        _, chunks = dealt(torch.zeros(3, 2, dtype=torch.int64), tiles=24, programs=24)
        assert chunks == [[0, 0]] * 3


class TestPlanLayout:
    @pytest.mark.parametrize(("batch", "tiles"), [(1, 264), (3, 5), (64, 264), (7, 33)])
    def test_known_layout(self, batch: int, tiles: int) -> None:
        info = parse_plan_info(plan_info(batch, tiles), batch)
        assert info is not None and info.padded_batch_size == tiles

    @pytest.mark.parametrize("place", [n for n in range(15) if n != 11])  # where the partial lse lies is not used
    def test_any_other_number_is_refused(self, place: int) -> None:
        values = plan_info(3)
        values[place] += 16
        assert parse_plan_info(values, 3) is None

    def test_other_sizes_are_refused(self) -> None:
        assert parse_plan_info([*plan_info(3), 0], 3) is None
        assert parse_plan_info(plan_info(3), 4) is None
        assert parse_plan_info(plan_info(3, tiles=2), 3) is None

    def test_other_versions_are_refused(self) -> None:
        class Wrapper:
            _plan_info = plan_info(3)
            _int_workspace_buffer = torch.zeros(4096, dtype=torch.uint8)

        for version, known in (
            ((0, 6, 14), False),
            ((0, 6, 15), True),
            ((0, 7, 2), True),
            ((0, 8), False),
            ((), False),
        ):
            assert (locate_plan_buffers(Wrapper(), 3, version) is not None) == known
        assert locate_plan_buffers(object(), 3, (0, 7, 0)) is None

    def test_buffers_lie_where_the_plan_says(self) -> None:
        class Wrapper:
            _plan_info = plan_info(3)
            _int_workspace_buffer = torch.zeros(4096, dtype=torch.uint8)

        plan = locate_plan_buffers(Wrapper(), 3, (0, 7, 0))
        assert plan is not None
        for field, offset in (("request", 4), ("kv_tile", 6), ("merge_indptr", 7), ("o_indptr", 8), ("chunk", 9)):
            tensor = getattr(plan, field)
            assert tensor.data_ptr() - Wrapper._int_workspace_buffer.data_ptr() == Wrapper._plan_info[offset]
        assert plan.tiles == 24 and plan.o_indptr.numel() == 4 and plan.valid.dtype == torch.uint8


class TestTokenView:
    @pytest.mark.parametrize("page_size", [1, 5])
    @pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
    @pytest.mark.parametrize("fused", [False, True])
    def test_token_slots_name_the_tokens(self, page_size: int, kv_layout: str, fused: bool) -> None:
        layout = HeadLayout(4, 2, 8)
        draw = torch.Generator().manual_seed(0)
        store = PagedStore(
            2,
            23,
            layout,
            page_size=page_size,
            kv_layout=kv_layout,
            fused=fused,
            generator=draw,  # type: ignore[arg-type]
        )
        k, v = (torch.randn(23, 2, 8, generator=draw) for _ in range(2))
        store.write(1, 0, k, v)
        kv = store.kv(store.table([0, 23]))
        check_cache(kv)
        position = torch.arange(23)
        slots = kv.table.indices[position // page_size].long() * page_units(kv) + position % page_size
        assert torch.equal(token_view(kv, kv.k_cache)[slots, 0], k)
        assert torch.equal(token_view(kv, kv.v_cache)[slots, 0], v)

    def test_rows_are_flattened_in_place(self) -> None:
        store = PagedStore(3, 9, HeadLayout(2, 1, 8), page_size=1, generator=torch.Generator().manual_seed(0))
        table = store.row_table([4, 9, 2])
        entries = flat_entries(table)
        assert entries.data_ptr() == table.req_to_token.data_ptr()
        for b, length in enumerate((4, 9, 2)):
            row = int(table.req_pool_indices[b])
            first = row * table.row_stride
            assert torch.equal(entries[first : first + length], table.req_to_token[row, :length])

    def test_what_flashinfer_cannot_address_is_refused(self) -> None:
        store = PagedStore(1, 8, HeadLayout(2, 1, 8), page_size=4, generator=torch.Generator().manual_seed(0))
        kv = store.kv(store.table([8]))
        other = dataclasses.replace(kv, v_cache=torch.zeros(*kv.v_cache.shape[:3], 16)[..., :8])
        with pytest.raises(InputError, match="equal strides"):
            check_cache(other)
        padded = torch.zeros(kv.k_cache.shape[0] * 33).as_strided(kv.k_cache.shape, (33, 8, 8, 1))
        with pytest.raises(InputError, match="multiple"):
            check_cache(PagedKV(padded, padded, kv.table, kv.layout))
        with pytest.raises(InputError, match="int32"):
            flat_entries(dataclasses.replace(kv.table, indices=kv.table.indices.long()))
