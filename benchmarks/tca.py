"""Time TCA beside FlashInfer's dense attention: prompts, decode steps, and what eviction holds, correctness first.

Every kept share counts all that is read of a context, window and sinks included. Keys and queries are random, so the
kept tokens lie scattered: the worst case for gathering them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import mac_kernels as mk
from mac_kernels import tca
from mac_kernels.attend.reference import shared_attention
from mac_kernels.tca import EvictedKV, FarSet, Selection, TcaConfig, fused
from mac_kernels.tca.candidates import NUM_SPARSE, decode_keep, far_count
from mac_kernels.tca.config import far_blocks
from mac_kernels.tca.reference import prefill_mask
from mac_kernels.testing.scenario import random_store
from mac_kernels.testing.timing import Timing, calls_per_round, measure

from . import results
from .decode import WrongResultError, after, flashinfer_decode

_DEVICE = "cuda"
_PAGE = 16
_TOLERANCE = 1e-2  # of the norm: two roundings to bf16
_MASS_TOLERANCE = 1e-4  # of the importance that is kept: near-equal scores may change places
_ROUND_US, _PREFILL_ROUND_US = 20_000.0, 500_000.0
_CONFIG = TcaConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class TcaCase:
    """A prompt of one request, a decode step, or a request's cache, of whose context about this share is kept."""

    kind: Literal["prefill", "decode", "evict"]
    batch: int
    context: int
    layout: mk.HeadLayout
    kept: float

    def __str__(self) -> str:
        return f"G{self.layout.group_size}-B{self.batch}-L{self.context}-{self.kind}-kept{self.kept:g}"


_LAYOUTS = (mk.HeadLayout(32, 8, 128), mk.HeadLayout(32, 4, 128))
TCA = tuple(
    TcaCase(kind=kind, batch=batch, context=context, layout=layout, kept=kept)
    for layout in _LAYOUTS
    for kind, batch, context in (
        ("prefill", 1, 131072), ("decode", 1, 126976), ("decode", 16, 126976), ("evict", 1, 131072)
    )
    for kept in (0.39, 0.15)
)  # fmt: skip
"""The published share of a context of 128K that is kept, and a smaller one."""


def run(cases: list[TcaCase], path: Path, facts: results.Row, repeats: int) -> int:
    """Run the cases; 1 if a result was wrong, else 0."""
    wrong = 0
    for case in cases:
        try:
            {"prefill": _prefill, "decode": _decode, "evict": _evict}[case.kind](case, path, facts, repeats)
        except WrongResultError as error:
            print(f"{case}: WRONG, not timed: {error}", flush=True)
            wrong = 1
        torch.cuda.empty_cache()
    return wrong


def budgets(case: TcaCase, config: TcaConfig = _CONFIG) -> tuple[list[int], float]:
    """Candidates of the kv heads, two neighbouring ones, that come nearest to the wanted share, and what they keep."""
    heads, blocks = case.layout.num_kv_heads, far_blocks(case.context - 1, config)
    window = case.context - config.sinks - blocks * config.block

    def kept(choice: list[int]) -> float:
        return sum(far_count(one, blocks, config) + window for one in choice) / (heads * case.context)

    choices = (
        [low] * (heads - more) + [low + 1] * more
        for low, more in itertools.product(range(NUM_SPARSE - 1), range(heads))
    )
    best = min(choices, key=lambda choice: abs(kept(choice) - case.kept))
    return best, kept(best)


def _prefill(case: TcaCase, path: Path, facts: results.Row, repeats: int) -> None:
    import flashinfer

    layout, length = case.layout, case.context
    store = random_store([length], layout, page_size=_PAGE, dtype=torch.bfloat16, device=_DEVICE)
    kv = mk.PagedKV(store.k_cache, store.v_cache, store.table([length]), layout)
    k, v = (x[0].bfloat16() for x in kv.gather(torch.zeros(1, dtype=torch.int64, device=_DEVICE), length))
    q = _queries(length, layout)
    indptr = torch.tensor([0, length], dtype=torch.int32, device=_DEVICE)
    choice, kept = budgets(case)
    scale = layout.head_dim**-0.5

    def select() -> Selection:
        return fused.select_prompt(q[-1:], kv, [length], choice, config=_CONFIG, sm_scale=scale)

    def attend(selection: Selection) -> torch.Tensor:
        return fused.sparse_prefill(q, indptr, kv, selection, config=_CONFIG, sm_scale=scale).out

    def dense() -> torch.Tensor:
        return flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, backend="fa3")

    selection = select()
    _check_selection(selection.far, q[-1:], kv, choice, scale)
    _check_prefill(attend(selection), q, k, v, selection, scale)
    providers: dict[str, Callable[[], object]] = {
        "flashinfer": dense,
        "select": select,
        "prefill": lambda: attend(select()),
    }
    # in a round each has the GPU for long enough that its clocks are its own, not those that the one before left
    calls = {name: [call] * calls_per_round(call, round_us=_PREFILL_ROUND_US) for name, call in providers.items()}
    timed = measure(calls, device=_DEVICE, repeats=repeats, warmup=1, capture=False)
    full, ours = timed["flashinfer"].p50_us, timed["prefill"].p50_us
    print(
        f"{case!s:38} kept {kept:.3f}  flashinfer-fa3 {full:9.0f}  tca {ours:9.0f}"
        f" (selection {timed['select'].p50_us:6.0f})  speedup {full / ours:5.2f}",
        flush=True,
    )
    results.upsert(path, _rows(case, kept, timed, facts))


def _decode(case: TcaCase, path: Path, facts: results.Row, repeats: int) -> None:
    layout, lengths = case.layout, [case.context] * case.batch
    store = random_store(lengths, layout, page_size=_PAGE, dtype=torch.bfloat16, device=_DEVICE)
    kv = mk.PagedKV(store.k_cache, store.v_cache, store.table(lengths), layout)
    q = _queries(case.batch, layout)
    choice, kept = budgets(case)
    scale = layout.head_dim**-0.5
    far = fused.select_prompt(q, kv, lengths, choice, config=_CONFIG, sm_scale=scale).far
    keep = torch.tensor([decode_keep(one, _CONFIG.block) for one in choice], dtype=torch.int32, device=_DEVICE)

    def step() -> torch.Tensor:
        fused.compact(q, kv, far, keep, config=_CONFIG, sm_scale=scale)
        return fused.sparse_decode(q, kv, far, sm_scale=scale).out

    first = FarSet(far.ids[:1], far.count[:1], far.far_end[:1])
    _check_selection(first, q[:1], kv.only(0), choice, scale)
    _compare("decode", step()[:1], tca.sparse_decode(q[:1], kv.only(0), first, sm_scale=scale).out)
    dense, _ = flashinfer_decode(q, kv)
    timed = cold({"flashinfer": dense, "decode": step}, repeats)
    full, ours = timed["flashinfer"].p50_us, timed["decode"].p50_us
    print(
        f"{case!s:38} kept {kept:.3f}  flashinfer-tc {full:8.1f}  tca {ours:8.1f}  speedup {full / ours:5.2f}",
        flush=True,
    )
    results.upsert(path, _rows(case, kept, timed, facts))


def _evict(case: TcaCase, path: Path, facts: results.Row, repeats: int) -> None:
    layout, lengths, scale = case.layout, [case.context], case.layout.head_dim**-0.5
    q = _queries(1, layout)
    choice, kept = budgets(case)
    before = torch.cuda.memory_allocated()
    store = random_store(lengths, layout, page_size=_PAGE, dtype=torch.bfloat16, device=_DEVICE)
    whole = torch.cuda.memory_allocated() - before
    kv = mk.PagedKV(store.k_cache, store.v_cache, store.table(lengths), layout)
    selection = fused.select_prompt(q, kv, lengths, choice, config=_CONFIG, sm_scale=scale)
    want = fused.sparse_decode(q, kv, selection.far, sm_scale=scale).out
    before = torch.cuda.memory_allocated()
    evicted = EvictedKV(kv, lengths, selection, choice, config=_CONFIG)
    held = torch.cuda.memory_allocated() - before
    rows = _one_head_a_request(evicted.paged())
    sparse, out = flashinfer_decode(q.view(len(evicted.lengths), layout.group_size, layout.head_dim), rows)
    sparse()
    _compare("decode from what eviction left", out.view(q.shape), want)
    dense, _ = flashinfer_decode(q, kv)
    timed = cold({"flashinfer": dense, "evicted": sparse}, repeats)
    full, ours = timed["flashinfer"].p50_us, timed["evicted"].p50_us
    print(
        f"{case!s:38} kept {kept:.3f}  MiB {whole / 2**20:7.1f} -> {held / 2**20:7.1f} ({held / whole - 1:+.1%})"
        f"  flashinfer-tc {full:8.1f}  evicted {ours:8.1f}  speedup {full / ours:5.2f}",
        flush=True,
    )
    memory = {"metric": "memory", "unit": "MiB"}
    sizes = {"flashinfer": whole, "evicted": held}
    sized = [row | memory | dict.fromkeys(("p20", "p50", "p80"), f"{sizes[name] / 2**20:.5g}") | {"n": "1"}
             for name, row in zip(timed, _rows(case, kept, timed, facts), strict=True)]  # fmt: skip
    results.upsert(path, [*_rows(case, kept, timed, facts), *sized])


def _one_head_a_request(kv: mk.PagedKV) -> mk.PagedKV:
    """The pages of one kv head, whose layouts are the same memory, in the layout that the baseline is asked in."""
    k, v = (cache.transpose(1, 2) for cache in (kv.k_cache, kv.v_cache))
    return mk.PagedKV(k, v, kv.table, kv.layout, "NHD")


def cold(providers: dict[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time decode steps in turn, each behind a flush of the L2 cache, whose own time is taken off."""
    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device=_DEVICE)
    with_idle = {**providers, "": lambda: None}
    calls = {name: [after(flush, call)] * calls_per_round(call, round_us=_ROUND_US) for name, call in with_idle.items()}
    timed = measure(calls, device=_DEVICE, repeats=repeats)
    idle = timed.pop("").p50_us
    return {name: Timing(t.p20_us - idle, t.p50_us - idle, t.p80_us - idle, t.n) for name, t in timed.items()}


def _queries(count: int, layout: mk.HeadLayout) -> torch.Tensor:
    draw = torch.Generator(_DEVICE).manual_seed(1)
    shape = (count, layout.num_qo_heads, layout.head_dim)
    return torch.randn(shape, generator=draw, device=_DEVICE, dtype=torch.bfloat16)


def _check_selection(far: FarSet, q: torch.Tensor, kv: mk.PagedKV, choice: list[int], scale: float) -> None:
    """Compare the first request's kept tokens with the reference's: as many, of the same importance."""
    s = tca.importance(q, kv, sm_scale=scale)
    want = tca.select_far(s, kv.table.kv_len().tolist(), choice, config=_CONFIG).far
    if not torch.equal(far.count, want.count) or not torch.equal(far.far_end, want.far_end):
        raise WrongResultError("the far sets have other sizes than the reference's")
    for head, count in enumerate(want.count[0].tolist()):
        got, best = (s[0, head, one.ids[0, head, :count].long()].sum() for one in (far, want))
        if not abs(float(got / best) - 1) <= _MASS_TOLERANCE:
            raise WrongResultError(
                f"head {head} keeps an importance of {float(got):.6g}, the reference {float(best):.6g}"
            )


def _check_prefill(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, selection: Selection, scale: float
) -> None:
    """Compare queries from all over the prompt with the reference."""
    length, far = len(q), selection.far
    position = torch.tensor([0, _CONFIG.local_window, length // 3, length // 2 + 77, length - 1], device=_DEVICE)
    one = FarSet(far.ids[0], far.count[0], far.far_end[0])
    mask = prefill_mask(position, one, selection.prefix[0], length, _CONFIG)
    mask = mask.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    state = shared_attention(q[position], k[None], v[None], mask, sm_scale=scale)
    for place, got, want in zip(position.tolist(), out[position], state.out, strict=True):
        _compare(f"prefill at {place}", got, want)
    if not torch.isfinite(out).all():
        raise WrongResultError("the output is not finite everywhere")


def _compare(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    error = float((got.float() - want).norm() / want.norm())
    if not error <= _TOLERANCE:
        raise WrongResultError(f"{what}: relative error {error:.3g} above {_TOLERANCE}")


def _rows(case: TcaCase, kept: float, timed: dict[str, Timing], facts: results.Row) -> list[results.Row]:
    common = {
        "suite": "tca",
        "batch": case.batch,
        "context": case.context,
        "hq": case.layout.num_qo_heads,
        "hkv": case.layout.num_kv_heads,
        "head_dim": case.layout.head_dim,
        "dtype": "bfloat16",
        "page_size": _PAGE,
        "window": _CONFIG.local_window,
        "tp": 1,
        "metric": "latency",
        "unit": "us",
        **facts,
    }
    rows, choice, steps = [], f"kept {kept:.3f}", case.kind != "prefill"
    for name, timing in timed.items():
        dense = name == "flashinfer"
        row = {
            **common,
            "case": case.kind if dense else name,
            "provider": ("flashinfer-tc" if steps else "flashinfer") if dense else "tca",
            "backend": "triton" if name in ("prefill", "decode", "select") else "fa2" if steps else "fa3",
            "config": results.beside("flashinfer" if case.kind == "evict" else "triton", choice) if dense else choice,
            "n": timing.n,
            **{f"p{part}": f"{getattr(timing, f'p{part}_us'):.5g}" for part in (20, 50, 80)},
        }
        rows.append({column: str(row.get(column, "")) for column in results.COLUMNS})
    return rows
