"""Misuse of the library: each error names the value, the allowed range and the next step, and changes nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from misused_step import CONFIG, LENGTHS, Setup, check_refused, pool, ready_setup

import mac_kernels as mk
from mac_kernels.launch import LaunchParams
from mac_kernels.tca import MissIndex, TcaConfig


@pytest.fixture
def setup() -> Setup:
    return ready_setup()


def other_page(s: Setup, page: int) -> Any:
    indices = s.plan_arguments["indices"].clone()
    indices[1] = page
    s.plan(indices=indices)
    return s.run()


def planned_otherwise(s: Setup, **changes: Any) -> Any:
    s.plan(config=dataclasses.replace(CONFIG, **changes))
    return s.run()


def fill_page(s: Setup, page: int) -> None:
    table = s.store.table(LENGTHS)
    table.indices[1] = page
    s.fill(kv=s.store.kv(table))


def index(num_rings: int = 2) -> MissIndex:
    return MissIndex([[3, 3]] * 2, config=TcaConfig(refresh=8), num_rings=num_rings, max_context=64)


def restore(s: Setup, **changes: Any) -> Any:
    return s.rings.restore(0, dataclasses.replace(s.rings.snapshot(1), **changes))


SHORT_ROPE = mk.Rope.from_cos_sin_cache(torch.ones(13, 8))
fresh = mk.BatchMacDecodeWithPagedKVCacheWrapper
half = torch.bfloat16
# name: (what is done, error, parts of the message: value, allowed range, next step)
MISUSES: dict[str, tuple[Callable[[Setup], Any], type[Exception], tuple[str, ...]]] = {
    # wrapper
    "run before plan": (lambda s: fresh().run(**s.run_arguments), mk.PlanError, ("plan() must be called before run",)),
    "explain before plan": (lambda s: fresh().explain(), mk.PlanError, ("plan() must be called",)),
    "unknown backend": (lambda s: fresh(backend="cuda"), mk.InputError, ("'cuda'", "'auto'", "'reference'")),
    "unknown kv layout": (lambda s: fresh("NDH"), mk.InputError, ("'NDH'", "'NHD' or 'HND'")),
    # plan
    "short rope table": (lambda s: s.plan(rope=SHORT_ROPE), mk.InputError, ("14", "13", "longer cos_sin_cache")),
    "indptr from 1": (lambda s: s.plan(indptr=torch.tensor([1, 4, 7])), mk.InputError, ("[1, 4, 7]", "start at 0")),
    "indptr falls": (lambda s: s.plan(indptr=torch.tensor([0, 4, 3])), mk.InputError, ("[0, 4, 3]", "never fall")),
    "indptr too short": (
        lambda s: s.plan(indptr=torch.tensor([0, 7])),
        mk.InputError,
        ("indptr has 2 entries", "last_page_len 2", "exactly one more"),
    ),
    "indices too short": (
        lambda s: s.plan(indices=torch.tensor([0, 1, 2])),
        mk.InputError,
        ("ends at 7", "3 entries", "pass every page"),
    ),
    "indices as floats": (
        lambda s: s.plan(indices=torch.zeros(7)),
        mk.InputError,
        ("torch.float32", "int32", "as for FlashInfer"),
    ),
    "last page overfull": (
        lambda s: s.plan(last_page_len=torch.tensor([3, 5])),
        mk.InputError,
        ("last_page_len[1]=5", "[1, 4]"),
    ),
    "last page empty": (
        lambda s: s.plan(last_page_len=torch.tensor([0, 2])),
        mk.InputError,
        ("last_page_len[0]=0", "[1, 4]"),
    ),
    "page size 0": (lambda s: s.plan(page_size=0), mk.InputError, ("page_size=0", ">= 1", "page size of the KV cache")),
    "page size with a fraction": (
        lambda s: s.plan(page_size=1.5),
        mk.InputError,
        ("page_size=1.5", ">= 1", "page size of the KV cache"),
    ),
    "config by its name": (
        lambda s: s.plan(config="careful"),
        mk.InputError,
        ("config='careful'", "a MacConfig", "MacConfig.preset"),
    ),
    "scale 0": (lambda s: s.plan(sm_scale=0.0), mk.InputError, ("sm_scale=0.0", "> 0", "leave it out")),
    "scale NaN": (lambda s: s.plan(sm_scale=math.nan), mk.InputError, ("sm_scale=nan", "finite", "leave it out")),
    "soft-cap negative": (
        lambda s: s.plan(logits_soft_cap=-1.0),
        mk.InputError,
        ("logits_soft_cap=-1.0", ">= 0", "0 turns it off"),
    ),
    "rotation wider than a head": (
        lambda s: s.plan(rope=mk.Rope.from_inv_freq(torch.ones(8))),
        mk.InputError,
        ("rotary_dim=16", "<= head_dim=8", "build Rope from this model"),
    ),
    "an index for fewer rings": (
        lambda s: pool(index=index(num_rings=1)),
        mk.InputError,
        ("= (2, 1, 2) on cpu", "the pool has (2, 2, 2) on cpu", "build both alike"),
    ),
    "an index that the config knows nothing of": (
        lambda s: s.run(rings=pool(index=index())),
        mk.InputError,
        ("config.tca and the rings' index disagree", "MissIndex(..., config=config.tca)"),
    ),
    "launch parameters that nobody takes": (
        lambda s: s.plan(launch=LaunchParams()),
        mk.InputError,
        ("launch is for backend 'triton'", "'reference' was chosen", "leave it out"),
    ),
    "max_kv_len too small": (lambda s: s.plan(max_kv_len=13), mk.InputError, ("max_kv_len=13", ">= 14")),
    # run
    "q in fp64": (
        lambda s: s.run(q=torch.randn(2, 4, 8, dtype=torch.float64)),
        mk.InputError,
        ("torch.float64", "fp32, bf16 or fp16"),
    ),
    "q of another batch": (
        lambda s: s.run(q=torch.randn(3, 4, 8)),
        mk.InputError,
        ("[3, 4, 8]", "[2, 4, 8]", "plan() the batch you run"),
    ),
    "out of another dtype": (
        lambda s: s.run(out=torch.empty(2, 4, 8, dtype=half)),
        mk.InputError,
        ("torch.bfloat16", "torch.float32 like q", "empty_like(q)"),
    ),
    "out of another shape": (
        lambda s: s.run(out=torch.empty(2, 4, 4)),
        mk.InputError,
        ("[2, 4, 4]", "[2, 4, 8]", "empty_like(q)"),
    ),
    "cache of another head dim": (
        lambda s: s.run(paged_kv_cache=(torch.zeros(10, 4, 2, 16),) * 2),
        mk.InputError,
        ("[10, 4, 2, 16]", "[num_pages, 4, 2, 8]", "check page_size"),
    ),
    "cache in the other layout": (
        lambda s: s.run(paged_kv_cache=(s.store.k_cache.transpose(1, 2), s.store.v_cache.transpose(1, 2))),
        mk.InputError,
        ("[10, 2, 4, 8]", "kv_layout NHD", "check page_size"),
    ),
    "cache in fp64": (
        lambda s: s.run(paged_kv_cache=(s.store.k_cache.double(), s.store.v_cache.double())),
        mk.InputError,
        ("torch.float64", "torch.bfloat16", "convert the cache"),
    ),
    "halves of different caches": (
        lambda s: s.run(paged_kv_cache=(s.store.k_cache, s.store.v_cache.to(half))),
        mk.InputError,
        ("torch.float32", "torch.bfloat16", "both halves of one cache"),
    ),
    "page index beyond the cache": (
        lambda s: other_page(s, 10),
        mk.InputError,
        ("page index 10", "[0, 9]", "check the indices"),
    ),
    "negative page index": (
        lambda s: other_page(s, -1),
        mk.InputError,
        ("page index -1", "[0, 9]", "check the indices"),
    ),
    "rings of another layout": (
        lambda s: s.run(rings=pool(layout=mk.HeadLayout(2, 2, 8))),
        mk.InputError,
        ("num_qo_heads=2", "num_qo_heads=4", "build a RingPool for this one"),
    ),
    "rings of another window": (
        lambda s: s.run(rings=pool(window=16)),
        mk.InputError,
        ("window 16", "window=8", "build the RingPool with it"),
    ),
    "rings without mean keys": (
        lambda s: s.run(rings=pool(correction=False)),
        mk.InputError,
        ("no mean key", "RingPool(correction=True)"),
    ),
    "rings without a sketch": (
        lambda s: s.run(rings=pool(sketch_dim=0)),
        mk.InputError,
        ("nominates 12 rows", "no sketch", "nominees=None"),
    ),
    "rings against a replanned window": (
        lambda s: planned_otherwise(s, window=4),
        mk.InputError,
        ("window 8", "window=4", "build the RingPool with it"),
    ),
    "layer out of range": (lambda s: s.run(layer=2), mk.InputError, ("layer=2", "[0, 1]", "check num_layers")),
    "layer negative": (lambda s: s.run(layer=-1), mk.InputError, ("layer=-1", "[0, 1]", "check num_layers")),
    "slots as a list": (lambda s: s.run(slots=[0, 1]), mk.InputError, ("slots", "[2]", "got [0, 1]", "pass a tensor")),
    "scale of the keys as text": (
        lambda s: s.run(k_scale="a"),
        mk.InputError,
        ("k_scale='a'", "finite and > 0", "leave it out"),
    ),
    "slots of another batch": (
        lambda s: s.run(slots=torch.tensor([0])),
        mk.InputError,
        ("slots", "[1]", "[2]", "one each"),
    ),
    "generations as floats": (
        lambda s: s.run(generations=torch.zeros(2)),
        mk.InputError,
        ("generations", "torch.float32", "int32 or int64", "one each"),
    ),
    "slots on another device": (
        lambda s: s.run(slots=torch.zeros(2, dtype=torch.int64, device="meta")),
        mk.InputError,
        ("cpu, meta", "one device", "move them"),
    ),
    # prefill
    "chunk of another length": (
        lambda s: s.fill(qo_indptr=torch.tensor([0, 2, 4])),
        mk.InputError,
        ("0 .. 4", "5 rows of q", "check lengths"),
    ),
    "chunk bounds of another batch": (lambda s: s.fill(qo_indptr=torch.tensor([0, 5])), mk.InputError, ("[2]", "[3]")),
    "more queries than tokens": (
        lambda s: s.fill(q=torch.randn(13, 4, 8), qo_indptr=torch.tensor([0, 12, 13])),
        mk.InputError,
        ("12 queries", "11 cached", "write the chunk's keys and values first"),
    ),
    "chunk of another layout": (
        lambda s: s.fill(q=torch.randn(5, 4, 16)),
        mk.InputError,
        ("[5, 4, 16]", "[nnz_q, 4, 8]", "check the layout"),
    ),
    "chunk in fp64": (
        lambda s: s.fill(q=torch.randn(5, 4, 8, dtype=torch.float64)),
        mk.InputError,
        ("torch.float64", "fp32, bf16 or fp16"),
    ),
    "chunk with a page beyond the cache": (
        lambda s: fill_page(s, 10),
        mk.InputError,
        ("page index 10", "[0, 9]", "check the indices"),
    ),
    "chunk with slots of another batch": (
        lambda s: s.fill(slots=torch.tensor([0])),
        mk.InputError,
        ("slots", "[1]", "[2]", "one each"),
    ),
    "chunk for rings of another window": (
        lambda s: s.fill(rings=pool(window=9)),
        mk.InputError,
        ("window 9", "window=8", "build the RingPool with it"),
    ),
    # rings
    "no rings": (lambda s: pool(num_rings=0), mk.ConfigError, ("num_rings=0", ">= 1", "larger value")),
    "ring of one row": (lambda s: pool(window=1), mk.ConfigError, ("window=1", ">= 2", "larger value")),
    "rings in int8": (lambda s: pool(dtype=torch.int8), mk.InputError, ("torch.int8", "torch.float16", "use torch.bf")),
    "slot beyond the table": (lambda s: s.rings.acquire(2), mk.InputError, ("slot 2", "[0, 1]", "more num_slots")),
    "slot negative": (lambda s: s.rings.release(-1), mk.InputError, ("slot -1", "[0, 1]", "more num_slots")),
    "snapshot without a ring": (
        lambda s: pool(num_slots=4).snapshot(3),
        mk.SnapshotError,
        ("slot 3 holds no ring", "acquire one"),
    ),
    "snapshot of another version": (
        lambda s: restore(s, version=99),
        mk.SnapshotError,
        ("format version 99", "needs 1", "start with an empty ring"),
    ),
    "snapshot of another layout": (
        lambda s: restore(s, layout=mk.HeadLayout(8, 2, 8)),
        mk.SnapshotError,
        ("num_qo_heads=8", "num_qo_heads=4", "start with an empty ring"),
    ),
    "snapshot of another window": (
        lambda s: restore(s, window=7),
        mk.SnapshotError,
        ("window 7", "needs 8", "start with an empty ring"),
    ),
    "snapshot of another dtype": (
        lambda s: restore(s, fields={**s.rings.snapshot(1).fields, "out": torch.zeros(2, 8, 4, 8, dtype=half)}),
        mk.SnapshotError,
        ("torch.bfloat16", "torch.float32", "start with an empty ring"),
    ),
    # config and layout
    "threshold NaN": (lambda s: mk.MacConfig(threshold=math.nan), mk.ConfigError, ("threshold=nan", "not NaN")),
    "window 0": (lambda s: mk.MacConfig(window=0), mk.ConfigError, ("window=0", ">= 2 rows")),
    "band against min_context": (
        lambda s: mk.MacConfig(band=2048),
        mk.ConfigError,
        ("min_context=2048", "> band + sinks = 2052"),
    ),
    "heads not divisible": (
        lambda s: mk.HeadLayout(6, 4, 8),
        mk.InputError,
        ("num_qo_heads=6", "multiple of num_kv_heads=4", "from the model config"),
    ),
    "no heads": (lambda s: mk.HeadLayout(0, 1, 8), mk.InputError, ("num_qo_heads=0", ">= 1", "from the model config")),
    "odd head dim": (lambda s: mk.HeadLayout(2, 1, 7), mk.InputError, ("head_dim=7", "even and >= 2", "model config")),
    "a backend that cannot": (
        lambda s: mk.BatchMacDecodeWithPagedKVCacheWrapper(backend="triton").plan(
            **{**s.plan_arguments, "config": dataclasses.replace(CONFIG, recompute_loaded_groups=False)}
        ),
        mk.UnsupportedError,
        ("'triton'", "recompute_loaded_groups=False", "backend='auto'"),
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_explained_and_changes_nothing(setup: Setup, name: str) -> None:
    check_refused(setup, *MISUSES[name])


def test_there_is_nothing_wrong_with_the_setup(setup: Setup) -> None:
    setup.plan()
    setup.fill()
    assert bool(setup.run().isfinite().all())
    assert setup.rings.restore(0, setup.rings.snapshot(1)) >= 0


def test_a_refused_plan_leaves_the_former_one(setup: Setup) -> None:
    before = setup.wrapper.explain()
    with pytest.raises(mk.InputError):
        setup.plan(sm_scale=-1.0)
    assert setup.wrapper.explain() is before
    assert bool(setup.run().isfinite().all())


def test_unsupported_names_every_reason(setup: Setup) -> None:
    wrapper = mk.BatchMacDecodeWithPagedKVCacheWrapper(backend="triton")
    config = dataclasses.replace(CONFIG, recompute_loaded_groups=False, nominees=None)
    with pytest.raises(mk.UnsupportedError) as caught:
        wrapper.plan(**{**setup.plan_arguments, "config": config})
    assert any("recompute" in reason for reason in caught.value.reasons)
    assert any("nominees" in reason for reason in caught.value.reasons)
