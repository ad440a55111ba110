"""The paged cache: gathering equals plain indexing whatever the page table, layout and strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mac_kernels import (
    BatchMacDecodeWithPagedKVCacheWrapper,
    HeadLayout,
    InputError,
    PagedKV,
    PageTable,
    Rope,
    RowTable,
)
from mac_kernels.testing.scenario import PagedStore

LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=6)


@st.composite
def stores(draw, page_sizes=(1, 2, 5, 16, 64)):
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=4))
    page_size = draw(st.sampled_from(page_sizes))
    kv_layout = draw(st.sampled_from(["NHD", "HND"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    store = PagedStore(
        len(lengths),
        max(*lengths, 1),
        LAYOUT,
        page_size=page_size,
        kv_layout=kv_layout,
        fused=draw(st.booleans()),
        generator=generator,
    )
    dense = [torch.randn(2, length, 2, 6, generator=generator) for length in lengths]
    for request, (k, v) in enumerate(dense):
        store.write(request, 0, k, v)
    return store, lengths, dense


@given(stores(), st.integers(-5, 45), st.integers(0, 50))
def test_gather_equals_plain_indexing(stored, first, count):
    store, lengths, dense = stored
    kv = store.kv(store.table(lengths))
    k, v = kv.gather(torch.full((len(lengths),), first), count)
    assert k.shape == v.shape == (len(lengths), count, 2, 6)
    for request, (dense_k, dense_v) in enumerate(dense):
        for i in range(count):
            inside = 0 <= first + i < lengths[request]
            for got, want in ((k, dense_k), (v, dense_v)):
                assert torch.equal(got[request, i], want[first + i] if inside else torch.zeros(2, 6))


@given(stores())
def test_lengths_come_from_the_table(stored):
    store, lengths, _ = stored
    table = store.table(lengths)
    table.check(num_pages=store.k_cache.shape[0])
    assert table.batch_size == len(lengths)
    assert table.kv_len().tolist() == lengths


@given(stores(), st.data())
def test_one_request_alone_sees_its_own_tokens(stored, data):
    store, lengths, dense = stored
    request = data.draw(st.integers(0, len(lengths) - 1))
    alone = store.kv(store.table(lengths)).only(request)
    assert alone.table.kv_len().tolist() == [lengths[request]]
    k, v = alone.gather(torch.zeros(1, dtype=torch.int64), lengths[request])
    assert torch.equal(k[0], dense[request][0]) and torch.equal(v[0], dense[request][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_come_back_in_fp32(dtype):
    store = PagedStore(1, 3, LAYOUT, page_size=2, dtype=dtype, generator=torch.Generator())
    values = torch.randn(3, 2, 6)
    store.write(0, 0, values, -values)
    k, v = store.kv(store.table([3])).gather(torch.zeros(1, dtype=torch.int64), 3)
    assert k.dtype == v.dtype == torch.float32
    assert torch.equal(k[0], values.to(dtype).float()) and torch.equal(v[0], -values.to(dtype).float())


def test_a_batch_of_empty_requests_needs_no_pages():
    table = PageTable(torch.zeros(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(2).int(), 4)
    table.check()
    cache = torch.full((1, 4, 2, 6), torch.nan)
    k, _ = PagedKV(cache, cache, table, LAYOUT).gather(torch.zeros(2, dtype=torch.int64), 3)
    assert torch.equal(k, torch.zeros(2, 3, 2, 6))


def test_long_tables_are_shortened_in_messages():
    indptr = torch.arange(20, dtype=torch.int32).flip(0)
    with pytest.raises(InputError, match=r"\[19, 18, 17, 16, 15, 14, \.\.\. 0\]"):
        PageTable(indptr, torch.zeros(20, dtype=torch.int32), torch.ones(19, dtype=torch.int32), 1).check()


@given(stores(page_sizes=(1,)), st.integers(-5, 45), st.integers(0, 50))
def test_rows_of_token_slots_are_pages_of_one_token(stored, first, count):
    store, lengths, _ = stored
    pages, rows = store.kv(store.table(lengths)), store.kv(store.row_table(lengths))
    rows.table.check(num_pages=store.k_cache.shape[0])
    assert rows.table.kv_len().tolist() == lengths and rows.table.batch_size == len(lengths)
    begin = torch.full((len(lengths),), first)
    for got, want in zip(rows.gather(begin, count), pages.gather(begin, count), strict=True):
        assert torch.equal(got, want)
    last = len(lengths) - 1
    for got, want in zip(rows.only(last).gather(begin[:1], count), pages.gather(begin, count), strict=True):
        assert torch.equal(got[0], want[last])


@pytest.mark.parametrize("change, message", [
    (dict(req_pool_indices=torch.tensor([0, 3])), r"req_pool_indices\[1\]=3 is out of range \[0, 2\]"),
    (dict(seq_lens=torch.tensor([5, 0])), r"seq_lens\[0\]=5 is out of range \[0, 4\]"),
    (dict(seq_lens=torch.tensor([-1, 0])), r"seq_lens\[0\]=-1 is out of range"),
    (dict(seq_lens=torch.tensor([1])), "2 entries and seq_lens 1"),
    (dict(seq_lens=torch.tensor([1.0, 2.0])), r"seq_lens must be \[B\] int32 or int64"),
    (dict(req_to_token=torch.zeros(3, dtype=torch.int32)), r"must be \[rows, max_context\] int32"),
    (dict(req_to_token=torch.zeros(4, 3, dtype=torch.int32).T), r"req_to_token must be contiguous .* got stride 3"),
    (dict(req_to_token=torch.full((3, 4), 9, dtype=torch.int32)), r"request 0 names token slots in \[9, 9\]"),
])  # fmt: skip
def test_wrong_rows_are_named(change, message):
    good = dict(
        req_to_token=torch.zeros(3, 4, dtype=torch.int32),
        req_pool_indices=torch.tensor([0, 2]),
        seq_lens=torch.tensor([2, 0]),
    )
    RowTable(**good).check(num_pages=9)
    with pytest.raises(InputError, match=message):
        RowTable(**{**good, **change}).check(num_pages=9)


@pytest.mark.parametrize("scales, message", [
    ((0.0, 1.0), r"k_scale=0.0 must be finite and > 0"),
    ((1.0, float("nan")), r"v_scale=nan must be finite"),
    ((torch.ones(1), 1.0), "two numbers or two device scalars"),
    ((torch.ones(2), torch.ones(1)), r"k_scale must hold one fp32, got \[2\]"),
    ((torch.ones(1), torch.ones(1, dtype=torch.float64)), r"v_scale must hold one fp32, got \[1\] torch.float64"),
])  # fmt: skip
def test_wrong_scales_are_named(scales, message):
    store = PagedStore(1, 3, LAYOUT, page_size=2, generator=torch.Generator())
    with pytest.raises(InputError, match=message):
        PagedKV(store.k_cache, store.v_cache, store.table([3]), LAYOUT, "NHD", *scales)


def test_scales_are_floats():
    """Triton makes the integer 1 a part of the compiled kernel, which would then serve every later scale."""
    store = PagedStore(1, 3, LAYOUT, page_size=2, generator=torch.Generator())
    kv = PagedKV(store.k_cache, store.v_cache, store.table([3]), LAYOUT, "NHD", 1, 2)
    assert [(type(scale), scale) for scale in (kv.k_scale, kv.v_scale)] == [(float, 1.0), (float, 2.0)]


@pytest.mark.parametrize("longest", [0, 5])
def test_rows_must_hold_the_longest_context(longest):
    mac = BatchMacDecodeWithPagedKVCacheWrapper(backend="reference")
    rows = (torch.zeros(3, 4, dtype=torch.int32), torch.tensor([0, 2]), torch.tensor([2, 0]))
    rope = Rope.from_inv_freq(torch.ones(3))
    with pytest.raises(InputError, match=rf"max_kv_len={longest} must be in \[1, 4\], the columns of req_to_token"):
        mac.plan_rows(*rows, layout=LAYOUT, rope=rope, max_kv_len=longest)
