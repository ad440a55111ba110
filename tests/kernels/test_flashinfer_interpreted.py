"""The FlashInfer backend without FlashInfer: our kernels interpreted, its call modelled in torch, judged by the kit."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any, ClassVar

import pytest
import torch
import triton
from flashinfer_model import ModelAttention

from mac_kernels import (
    BatchMacDecodeWithPagedKVCacheWrapper,
    HeadLayout,
    MacConfig,
    PagedKV,
    Rope,
    composed,
    planning,
    support,
)
from mac_kernels.attend.flashinfer_tiles import MIN_CHUNK, STEP, most_tiles, tiles_kernel
from mac_kernels.composed import check_cache, flat_entries, page_units, token_view
from mac_kernels.errors import InputError
from mac_kernels.launch import LaunchParams, default_launch
from mac_kernels.testing.conformance import SMALL_CASES, Case, DecodeConformance, variant
from mac_kernels.testing.scenario import PagedStore

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs where TRITON_INTERPRET=1 (make test sets it)"
)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend can be planned here, without FlashInfer and a GPU."""
    monkeypatch.setitem(support._CHECKS, "flashinfer", lambda *_: ())
    monkeypatch.setattr(support, "_missing_flashinfer", lambda: ())


@interpreted
class TestComposedInterpreted(DecodeConformance):
    backend = "flashinfer"
    cases = (SMALL_CASES[0], Case(head_dim=48, group=3, kv_heads=2, page_size=5, kv_layout="HND", rotary="partial"))
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
    def _without_flashinfer(self, monkeypatch: pytest.MonkeyPatch, offered: None) -> None:
        def launch(*arguments: Any) -> LaunchParams:
            return dataclasses.replace(default_launch(*arguments), splits=2, complete_splits=2)

        monkeypatch.setattr(composed, "default_launch", launch)
        forms = itertools.cycle((True, False))
        monkeypatch.setattr(composed, "is_small", lambda *_: next(forms))
        monkeypatch.setattr(composed, "RangeAttention", ModelAttention)


@pytest.mark.parametrize(("version", "newer"), [((0, 7, 0), False), ((0, 7, 1), True), ((0, 10), True)])
@pytest.mark.parametrize("correction", [True, False])
def test_a_plan_notes_the_second_call_and_an_untested_version(
    monkeypatch: pytest.MonkeyPatch, offered: None, version: tuple[int, ...], newer: bool, correction: bool
) -> None:
    monkeypatch.setattr(planning, "flashinfer_version", lambda: version)
    mac, one = BatchMacDecodeWithPagedKVCacheWrapper(backend="flashinfer"), torch.ones(1, dtype=torch.int32)
    mac.plan(
        torch.tensor([0, 1]), 0 * one, one, layout=HeadLayout(4, 2, 64), page_size=1,
        config=variant(correction=correction), rope=Rope.from_inv_freq(torch.ones(32)),
    )  # fmt: skip
    notes = mac.explain().notes
    assert ["twice" in note for note in notes if "FlashInfer" in note] == [True] * correction
    assert [note.startswith("flashinfer-python 0.") for note in notes if "untested" in note] == [True] * newer


def dealt(lengths: torch.Tensor, *, tiles: int, programs: int) -> tuple[int, list[list[int]]]:
    """Cut groups of lengths [B, Hkv] that begin at 11; check the rows; the longest chunk and the chunks of a group."""
    (batch, heads), dim, page = lengths.shape, 4, 16
    groups = torch.full((batch * heads, 8), 3, dtype=torch.int32)
    groups[:, 0], groups[:, 1] = 11, 11 + lengths.flatten()
    first_seen = torch.arange(batch * heads * 9, dtype=torch.int32).view(-1, 3, 3)
    q = torch.randn(batch, heads * 3, dim, generator=torch.Generator().manual_seed(0))
    entries = torch.arange(batch, dtype=torch.int32) * 1000 + 5

    def dirty(*shape: int) -> torch.Tensor:
        return torch.full(shape, -7, dtype=torch.int32)

    parts, bounds, starts = dirty(batch * heads, 2), dirty(tiles, heads, 4), dirty(tiles, heads, 3)
    tile_q = torch.full((tiles, heads, 3, dim), torch.nan)
    tiles_kernel[(tiles,)](
        q, q.stride(0), q.stride(1), groups, first_seen, parts, entries, tile_q, bounds, starts, batch, tiles, programs,
        NUM_KV_HEADS=heads, GROUP=3, BLOCK_G=4, HEAD_DIM=dim, BLOCK_D=16, PAGE_SIZE=page, MIN_CHUNK=MIN_CHUNK,
        STEP=STEP, BLOCK_B=triton.next_power_of_2(batch), BLOCK_H=triton.next_power_of_2(heads), HEADS_AT_ONCE=2,
        PDL=False,
    )  # fmt: skip
    counts = parts[:, 1].view(batch, heads)
    seen = torch.zeros(tiles, heads, dtype=torch.bool)
    longest = 0
    for group, (first, count) in enumerate(parts.tolist()):
        request, head = divmod(group, heads)
        table = int(entries[request]) * page
        low = table + 11
        for tile in range(first // heads, first // heads + count):
            assert first % heads == head and not seen[tile, head], "two groups share a place"
            seen[tile, head] = True
            start, stop, *kept = bounds[tile, head].tolist()
            assert start == low and stop > start and kept == [-7, -7]
            assert torch.equal(starts[tile, head], table + first_seen[group, 0])
            assert torch.equal(tile_q[tile, head], q[request, head * 3 : head * 3 + 3])
            longest, low = max(longest, stop - start), stop
        assert low == table + 11 + max(int(lengths[request, head]), 0)
    assert bool((bounds[..., 1][~seen] == -1).all()), "a place without an owner would be computed"
    return longest, counts.tolist()


@interpreted
class TestTiles:
    @pytest.mark.parametrize("seed", range(4))
    def test_every_token_has_one_place(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        batch, heads = (1, 5, 16, 33)[seed], (4, 3, 8, 1)[seed]
        lengths = torch.randint(0, 40_000, (batch, heads), generator=draw)
        lengths[torch.rand(batch, heads, generator=draw) < 0.6] = 100
        lengths[torch.rand(batch, heads, generator=draw) < 0.2] = -5
        dealt(lengths, tiles=most_tiles(batch, heads, 66), programs=66)

    @pytest.mark.parametrize(("heads", "least"), [(1, 24), (2, 24), (4, 12), (8, 12)])
    def test_a_lone_miss_gets_every_sm(self, heads: int, least: int) -> None:
        lengths = torch.full((6, heads), 100)
        lengths[3, heads - 1] = 126_000
        _, chunks = dealt(lengths, tiles=most_tiles(6, heads, 24), programs=24)
        assert chunks[3][heads - 1] in (least, least + 1)

    def test_misses_of_several_heads_share_rows(self) -> None:
        """Six lone misses get four blocks each, which together are more chunks than there are rows."""
        lengths = torch.full((7, 3), 100)
        for miss in range(6):
            lengths[miss, miss % 3] = 126_000
        _, chunks = dealt(lengths, tiles=19, programs=24)
        assert all(chunks[miss][miss % 3] == 4 for miss in range(6))

    def test_equal_groups_share_one_wave(self) -> None:
        _, chunks = dealt(torch.full((3, 4), 32_512), tiles=most_tiles(3, 4, 48), programs=48)
        assert set(itertools.chain(*chunks)) == {4}

    def test_ragged_waves_are_made_finer(self) -> None:
        _, chunks = dealt(torch.full((7, 4), 32_512), tiles=most_tiles(7, 4, 48), programs=48)
        assert set(itertools.chain(*chunks)) == {3}

    def test_chunks_find_room(self) -> None:
        lengths = torch.full((3, 2), 50_000)
        _, chunks = dealt(lengths, tiles=8, programs=24)
        assert chunks == [[2, 2]] * 3

    def test_nothing_to_read_takes_no_place(self) -> None:
        _, chunks = dealt(torch.zeros(3, 2, dtype=torch.int64), tiles=27, programs=24)
        assert chunks == [[0, 0]] * 3


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
            generator=draw,
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
        with pytest.raises(InputError, match="below 2\\^31"):
            flat_entries(dataclasses.replace(kv.table, page_size=2**30))
