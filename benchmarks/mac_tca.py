"""Time MAC whose misses read selected tokens beside MAC alone and FlashInfer, correctness first.

The selection of every missed group is trusted here: keys are random, so every one of them would be found out. What a
selection costs is timed apart and told as its share of a step, once in ``refresh`` steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import mac_kernels as mk
from mac_kernels.tca import FarSet, MissIndex, TcaConfig, fused, refresh_index
from mac_kernels.testing.scenario import Scenario, plant_step, random_store
from mac_kernels.testing.timing import Timing, measure

from . import results
from .decode import Call, WrongResultError, flashinfer_decode
from .tca import TcaCase, budgets, cold

_DEVICE = "cuda"
_PAGE = 16
_TOLERANCE = 1e-2  # of the norm: two roundings to bf16
_REFRESH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class MissCase:
    """A decode step whose missed groups keep about this share of their context."""

    batch: int
    context: int
    layout: mk.HeadLayout
    hit_rate: float
    kept: float

    def __str__(self) -> str:
        return f"G{self.layout.group_size}-B{self.batch}-L{self.context}-misses-hit{self.hit_rate:g}-kept{self.kept:g}"


MISSES = tuple(
    MissCase(batch=16, context=126976, layout=mk.HeadLayout(32, 8, 128), hit_rate=hit, kept=0.39)
    for hit in (0.5, 0.7, 0.9)
)


def run(cases: list[MissCase], path: Path, facts: results.Row, repeats: int) -> int:
    """Run the cases; 1 if a result was wrong, else 0."""
    wrong = 0
    for case in cases:
        try:
            _run(case, path, facts, repeats)
        except WrongResultError as error:
            print(f"{case}: WRONG, not timed: {error}", flush=True)
            wrong = 1
        torch.cuda.empty_cache()
    return wrong


def _run(case: MissCase, path: Path, facts: results.Row, repeats: int) -> None:
    layout, lengths = case.layout, [case.context] * case.batch
    half = layout.head_dim // 2
    rope = mk.Rope.from_inv_freq(10000.0 ** (-torch.arange(half, device=_DEVICE) / half))
    alone = mk.MacConfig(break_even=None)
    both = dataclasses.replace(alone, tca=TcaConfig(refresh=_REFRESH))
    order = torch.randperm(case.batch * layout.num_kv_heads, generator=torch.Generator().manual_seed(1))
    hit = order.view(case.batch, -1) < round(case.hit_rate * order.numel())
    store = random_store(lengths, layout, page_size=_PAGE, dtype=torch.bfloat16, device=_DEVICE)
    scenario = plant_step(
        alone,
        layout,
        kv_lens=lengths,
        hit=hit,
        rope=rope,
        lag=(64, 67),
        rows="synthetic",
        page_size=_PAGE,
        dtype=torch.bfloat16,
        device=_DEVICE,
        seed=1,
        store=store,
    )
    choice, kept = budgets(
        TcaCase(kind="decode", batch=case.batch, context=case.context, layout=layout, kept=case.kept)
    )  # fmt: skip
    rings, index = _with_index(scenario, both, choice, case.context)
    scale = layout.head_dim**-0.5

    def select() -> None:
        owners = {"slots": scenario.slots, "generations": scenario.generations}
        refresh_index(scenario.q, scenario.kv, lengths, rings=rings, layer=0, sm_scale=scale, **owners)

    select()
    index.dropped.zero_()
    mac, expected, _ = _step(scenario, scenario.rings, alone, rope)
    mac()
    step, out, traced = _step(scenario, rings, both, rope)
    _check(scenario, traced(), out, expected, index, scale)
    dense, _ = flashinfer_decode(scenario.q, scenario.kv)
    timed = cold({"flashinfer-tc": dense, "mac": mac, "mac+tca": step}, repeats)
    timed |= measure({"select": [select]}, device=_DEVICE, repeats=repeats, warmup=1, capture=False)
    one, two, selection = (timed[name].p50_us for name in ("mac", "mac+tca", "select"))
    two += selection / _REFRESH
    print(
        f"{case!s:44} kept {kept:.3f}  flashinfer-tc {timed['flashinfer-tc'].p50_us:8.1f}  mac {one:8.1f}"
        f"  mac+tca {two:8.1f} (selection {selection:7.0f} / {_REFRESH})  speedup {one / two:5.2f}",
        flush=True,
    )
    results.upsert(path, _rows(case, kept, timed, facts))


def _with_index(
    scenario: Scenario, config: mk.MacConfig, choice: list[int], context: int
) -> tuple[mk.RingPool, MissIndex]:
    """A pool of the same rows with an index."""
    planted = scenario.rings
    assert config.tca is not None
    rings_of = {"num_rings": planted.num_rings, "device": _DEVICE}
    index = MissIndex([choice], config=config.tca, max_context=context, **rings_of)
    rings = mk.RingPool(
        num_layers=1,
        layout=planted.layout,
        window=planted.window,
        num_slots=planted.num_slots,
        dtype=planted.dtype,
        correction=planted.correction,
        index=index,
        **rings_of,
    )
    for name, values in planted.fields.items():
        rings.fields[name].copy_(values)
    rings.fields["seen"].fill_(-1)
    rings.slot_table.copy_(planted.slot_table)
    rings.ring_generation.copy_(planted.ring_generation)
    return rings, index


def _step(
    scenario: Scenario, rings: mk.RingPool, config: mk.MacConfig, rope: mk.Rope
) -> tuple[Call, torch.Tensor, Callable[[], mk.StepTrace]]:
    """One step, where it writes, and one with its trace."""
    table, out = scenario.kv.table, torch.full_like(scenario.q, torch.nan)
    assert isinstance(table, mk.PageTable)
    mac = mk.BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend="triton")
    mac.plan(
        table.indptr,
        table.indices,
        table.last_page_len,
        layout=rings.layout,
        page_size=_PAGE,
        config=config,
        rope=rope,
    )
    cache = (scenario.kv.k_cache, scenario.kv.v_cache)
    step = {
        "rings": rings,
        "layer": 0,
        "slots": scenario.slots,
        "generations": scenario.generations,
        "out": out,
    }
    return lambda: mac.run(scenario.q, cache, **step), out, lambda: mac.run_return_trace(scenario.q, cache, **step)[1]


def _check(
    scenario: Scenario, trace: mk.StepTrace, out: torch.Tensor, alone: torch.Tensor, index: MissIndex, scale: float
) -> None:
    """Hits are MAC's own, misses are sparse attention to the selected tokens and the window."""
    if not torch.equal(trace.hit, scenario.hit) or not torch.equal(trace.sparse, ~scenario.hit):
        raise WrongResultError("groups were not decided as planted")
    far = FarSet(*(part[0] for part in (index.ids, index.count, index.far_end)))
    order = scenario.rings.lookup(scenario.slots, scenario.generations)
    far = FarSet(far.ids[order], far.count[order], far.far_end[order])
    missed = (~scenario.hit).repeat_interleave(scenario.rings.layout.group_size, dim=1)
    want = torch.where(missed[..., None], fused.sparse_decode(scenario.q, scenario.kv, far, sm_scale=scale).out, alone)
    for what, part in (("missed", missed), ("reused", ~missed)):
        error = float((out[part].float() - want[part].float()).norm() / want[part].float().norm())
        if not error <= _TOLERANCE:
            raise WrongResultError(f"{what} heads: relative error {error:.3g} above {_TOLERANCE}")
    if not torch.isfinite(out).all():
        raise WrongResultError("the output is not finite everywhere")


def _rows(case: MissCase, kept: float, timed: dict[str, Timing], facts: results.Row) -> list[results.Row]:
    config, choice = mk.MacConfig(), f"kept {kept:.3f}"
    beside = {"flashinfer-tc": results.beside("triton", choice), "mac": f"careful, beside {choice}"}
    common = {
        "suite": "tca",
        "batch": case.batch,
        "context": case.context,
        "hq": case.layout.num_qo_heads,
        "hkv": case.layout.num_kv_heads,
        "head_dim": case.layout.head_dim,
        "dtype": "bfloat16",
        "page_size": _PAGE,
        "window": config.window,
        "band": config.band,
        "hit_rate": f"{case.hit_rate:g}",
        "miss_pattern": "scattered",
        "tp": 1,
        "metric": "latency",
        "unit": "us",
        **facts,
    }
    rows = []
    for name, timing in timed.items():
        provider = "mac+tca" if name == "select" else name
        row = {
            **common,
            "case": "select" if name == "select" else "step",
            "provider": provider,
            "backend": "fa2" if name == "flashinfer-tc" else "triton",
            "config": beside.get(name, choice),
            "n": timing.n,
            **{f"p{part}": f"{getattr(timing, f'p{part}_us'):.5g}" for part in (20, 50, 80)},
        }
        rows.append({column: str(row.get(column, "")) for column in results.COLUMNS})
    return rows
