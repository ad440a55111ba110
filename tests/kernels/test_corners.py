"""Corners that only a GPU reaches: a million tokens, a batch of 512, no sync, no allocation, compiled graphs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from mac_kernels import (
    BatchMacDecodeWithPagedKVCacheWrapper,
    HeadLayout,
    MacConfig,
    PagedKV,
    PageTable,
    Reason,
    RingPool,
    Rope,
    RowTable,
    fill_rings,
)
from mac_kernels.testing.conformance import Case, variant
from mac_kernels.testing.scenario import PagedStore, Scenario, plant_step

pytestmark = pytest.mark.gpu

FLASHINFER = pytest.param(
    "flashinfer",
    marks=pytest.mark.skipif(find_spec("flashinfer") is None, reason="needs FlashInfer (extra flashinfer)"),
)
MILLION = 1_050_000  # x 2 x 8 heads x 128 dims is more than 32 bits can count


def wrapper(kv_layout: str = "NHD", backend: str = "triton") -> BatchMacDecodeWithPagedKVCacheWrapper:
    return BatchMacDecodeWithPagedKVCacheWrapper(kv_layout, backend=backend)


def plan(
    mac: BatchMacDecodeWithPagedKVCacheWrapper, table: Any, layout: HeadLayout, config: MacConfig, rope: Rope
) -> None:
    if isinstance(table, RowTable):
        rows = (table.req_to_token, table.req_pool_indices, table.seq_lens)
        mac.plan_rows(*rows, layout=layout, rope=rope, config=config, max_kv_len=table.req_to_token.shape[1])
    else:
        mac.plan(*table.pointers, layout=layout, page_size=table.page_size, rope=rope, config=config)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full attention of [Hq, D] over [L, Hkv, D] in fp32, one kv head at a time."""
    group = q.shape[0] // k.shape[1]
    outs = []
    for head in range(k.shape[1]):
        logits = q[head * group : (head + 1) * group].float() @ k[:, head].float().T / k.shape[2] ** 0.5
        outs.append(logits.softmax(-1) @ v[:, head].float())
    return torch.cat(outs)


def million_tokens(rows: bool) -> tuple[Any, PagedKV, torch.Tensor, torch.Tensor]:
    """A table and a cache of a million tokens whose offsets need 64 bits, and its keys and values in order."""
    layout, page = HeadLayout(8, 8, 128), 1 if rows else 16
    cache = torch.randn(MILLION // page, 2, page, 8, 128, dtype=torch.bfloat16, device="cuda")
    assert cache.numel() > 2**31
    order = torch.randperm(MILLION // page, device="cuda")
    if rows:
        entries = torch.zeros(2**31 + MILLION, dtype=torch.int32, device="cuda")
        table = entries.as_strided((2, MILLION), (2**31, 1))  # the second row begins where 32 bits end
        table[1] = order
        length = torch.tensor([MILLION], dtype=torch.int32, device="cuda")
        pages: Any = RowTable(table, torch.ones(1, dtype=torch.int64, device="cuda"), length)
    else:
        bounds = torch.tensor([0, len(order)], dtype=torch.int32, device="cuda")
        pages = PageTable(bounds, order.int(), torch.tensor([page], dtype=torch.int32, device="cuda"), page)
    kv = PagedKV(cache[:, 0], cache[:, 1], pages, layout)
    k, v = (x[order].view(MILLION, 8, 128) for x in (cache[:, 0], cache[:, 1]))
    return pages, kv, k, v


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "pages"])
def test_a_million_tokens(rows: bool) -> None:
    table, kv, k, v = million_tokens(rows)
    layout, config = kv.layout, MacConfig(window=64, band=128, sinks=4, influence=None)
    rope = Rope.from_inv_freq(torch.zeros(1, device="cuda"))  # no phase: an equal query is reused exactly
    rings = RingPool(num_rings=1, num_layers=1, layout=layout, window=64, device="cuda")
    rings.acquire(0)
    slots = torch.zeros(1, dtype=torch.int64, device="cuda")
    prompt = torch.randn(64, 8, 128, dtype=torch.bfloat16, device="cuda")
    ends = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    fill_rings(
        prompt, ends, kv, rings=rings, layer=0, slots=slots, generations=slots, rope=rope, config=config,
        max_kv_len=MILLION,
    )  # fmt: skip
    for query, reason in ((torch.randn_like(prompt[:1]), Reason.DISTANCE), (prompt[40:41], Reason.HIT)):
        mac = wrapper()
        plan(mac, table, layout, config, rope)
        own = copy.deepcopy(rings)
        out, trace = mac.run_return_trace(
            query, (kv.k_cache, kv.v_cache), rings=own, layer=0, slots=slots, generations=slots
        )
        assert set(trace.reason.flatten().tolist()) == {reason}
        want = attention(query[0], k, v)
        error, size = (out[0].float() - want).abs().max(), want.abs().max()
        assert error <= 0.02 * size, f"error {error:.3g} of values up to {size:.3g}"


def against_reference(scenario: Scenario, other: str = "triton") -> None:
    """One step by both backends from the same rings: equal decisions, and rows and outputs within rounding."""
    close = {"rtol": 1e-4, "atol": 1e-4} if scenario.q.dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-3}
    results = []
    for backend in ("reference", other):
        rings, mac = copy.deepcopy(scenario.rings), wrapper(scenario.kv.kv_layout, backend)
        plan(mac, scenario.kv.table, scenario.kv.layout, scenario.config, scenario.rope)
        out, trace = mac.run_return_trace(
            scenario.q,
            (scenario.kv.k_cache, scenario.kv.v_cache),
            rings=rings,
            layer=0,
            slots=scenario.slots,
            generations=scenario.generations,
        )
        results.append((out, trace, rings))
    (want, expected, stored), (out, trace, rings) = results
    for name in ("reason", "matched_pos", "start", "stop", "kv_read", "kv_len"):
        assert torch.equal(getattr(trace, name), getattr(expected, name)), name
    torch.testing.assert_close(out, want, **close)
    tagged = stored.fields["pos"] >= 0
    assert torch.equal(rings.fields["pos"], stored.fields["pos"])
    for name in ("q_pre", "out", "kbar"):
        torch.testing.assert_close(rings.fields[name][tagged], stored.fields[name][tagged], **close)


@pytest.mark.parametrize("backend", ["triton", FLASHINFER])
def test_a_batch_of_512(backend: str) -> None:
    lengths = [200 + 7 * b % 400 for b in range(512)]
    config = MacConfig(window=32, band=16, sinks=2, min_context=64, influence=None)
    layout, rope = HeadLayout(16, 8, 64), Case(head_dim=64).rope("cuda")
    dtype = torch.float32 if backend == "triton" else torch.bfloat16
    scenario = plant_step(config, layout, kv_lens=lengths, hit=0.5, rope=rope, dtype=dtype, device="cuda")
    scenario.slots[::17] = -1  # padding among them
    against_reference(scenario, backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", FLASHINFER])
def test_tensors_on_another_device_than_the_current_one(backend: str) -> None:
    config = MacConfig(window=32, band=16, sinks=2, min_context=64, influence=None)
    rope = Case(head_dim=64).rope("cuda:1")
    for dtype in (torch.bfloat16, torch.float16):  # which the CUDA front takes
        scenario = plant_step(
            config, HeadLayout(16, 4, 64), kv_lens=[300, 80], hit=0.5, rope=rope, dtype=dtype, device="cuda:1"
        )
        against_reference(scenario, backend)
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("head_dim, group, page_size", [(80, 12, 5), (192, 7, 5), (192, 12, 1), (80, 7, 64)])
def test_lengths_from_none_to_many(head_dim: int, group: int, page_size: int) -> None:
    """Requests of 0, 1 and a few tokens beside long ones, in shapes that fill no power of two."""
    lengths = [60, 61, 77, 64, 90, 59]
    config = MacConfig(window=16, band=6, sinks=2, min_context=24, influence=None)
    layout = HeadLayout(2 * group, 2, head_dim)
    rope = Case(head_dim=head_dim, rotary="partial").rope("cuda")
    scenario = plant_step(config, layout, kv_lens=lengths, hit=0.5, rope=rope, page_size=page_size, device="cuda")
    store = scenario.kv
    counts = [0, 1, 2, 7, 90, 59]  # shorter than what their rings were filled for: only younger rows are eligible
    pages = [-(-n // page_size) for n in counts]
    first = store.table.pointers[0].tolist()
    indices = [store.table.pointers[1][first[b] : first[b] + n] for b, n in enumerate(pages)]
    table = PageTable(
        torch.tensor([0, *torch.tensor(pages).cumsum(0).tolist()], dtype=torch.int32, device="cuda"),
        torch.cat(indices),
        torch.tensor([n - (p - 1) * page_size if p else 0 for n, p in zip(counts, pages, strict=True)],
                     dtype=torch.int32, device="cuda"),
        page_size,
    )  # fmt: skip
    against_reference(dataclasses.replace(scenario, kv=dataclasses.replace(store, table=table)))


def rows_batch(config: MacConfig) -> tuple[PagedStore, RowTable, RingPool, Rope]:
    store = PagedStore(
        4, 128, HeadLayout(8, 2, 64), page_size=1, dtype=torch.bfloat16, device="cuda", generator=torch.Generator()
    )
    for request in range(4):
        store.write(request, 0, *torch.randn(2, 128, 2, 64, generator=torch.Generator().manual_seed(request)))
    rings = RingPool(num_rings=4, num_layers=2, layout=store.layout, window=config.window, device="cuda")
    for slot in range(4):
        rings.acquire(slot)
    return store, store.row_table([100, 128, 77, 0]), rings, Case(head_dim=64).rope("cuda")


@pytest.mark.parametrize("backend", ["triton", FLASHINFER])
def test_neither_plan_nor_run_syncs_and_run_does_not_allocate(backend: str) -> None:
    config = variant(break_even=0.1, thresholds=((0.4,), (0.5,)))
    store, table, rings, rope = rows_batch(config)
    slots, generations = torch.arange(4, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
    q = torch.randn(4, 8, 64, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    mac = wrapper(backend=backend)

    def run() -> None:
        for layer in range(2):
            mac.run(
                q, (store.k_cache, store.v_cache), rings=rings, layer=layer, slots=slots, generations=generations,
                out=out,
            )  # fmt: skip

    for _ in range(2):  # once to compile, to build the rotation table and to upload the limits of the layers
        plan(mac, table, store.layout, config, rope)
        run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if backend == "triton":  # FlashInfer's own plan waits for the device
            plan(mac, table, store.layout, config, rope)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(3):
            run()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((out[3] == 0).all()) and bool(out.isfinite().all())


def test_scales_may_change_between_runs() -> None:
    """Also from the integer 1, which Triton would make a part of the compiled kernel."""
    store, table, rings, rope = rows_batch(variant())
    nobody, q = torch.full((4,), -1, device="cuda"), torch.randn(4, 8, 64, dtype=torch.bfloat16, device="cuda")

    def outputs(*scales: float) -> list[torch.Tensor]:
        mac = wrapper()
        plan(mac, table, store.layout, variant(), rope)
        return [
            mac.run(
                q, (store.k_cache, store.v_cache), rings=rings, layer=0, slots=nobody, generations=nobody,
                k_scale=scale, v_scale=scale,
            )
            for scale in scales
        ]  # fmt: skip

    *_, changed = outputs(1, 1, 0.5)
    (alone,) = outputs(0.5)
    assert torch.equal(changed, alone)


def two_layers(mac: Any, store: PagedStore, rings: RingPool) -> Callable[[torch.Tensor], torch.Tensor]:
    slots = torch.arange(4, device="cuda")
    generations = torch.zeros_like(slots)

    def step(q: torch.Tensor) -> torch.Tensor:
        for layer in range(2):
            q = q + mac.run(
                1.5 * q, (store.k_cache, store.v_cache), rings=rings, layer=layer, slots=slots, generations=generations
            )
        return q

    return step


def test_a_compiled_graph_gives_what_eager_gives() -> None:
    config = variant()
    results = []
    for compiled in (False, True):
        store, table, rings, rope = rows_batch(config)
        mac = wrapper()
        plan(mac, table, store.layout, config, rope)
        step = two_layers(mac, store, rings)
        step = torch.compile(step, fullgraph=True) if compiled else step
        # in fp32, so that fusing the sums around the step changes no decision
        q = torch.randn(4, 8, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        for length in (80, 81, 82):
            table.seq_lens.copy_(torch.tensor([length, length + 20, length - 30, 0]))
            out = step(rope.rotate(q, table.seq_lens - 1))  # the same query again and again, before its rotation
        results.append((out, rings))
    (want, expected), (got, rings) = results
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(rings.fields["pos"], expected.fields["pos"])
    assert torch.equal(rings.counters.values, expected.counters.values)
    hits = rings.counters.drain().groups[Reason.HIT.name]
    assert hits[0] == 2 * 3 * 2, "every group of every request with tokens hits from the second step on"
