"""Time the prompt fill of one layer beside the prefill attention of its prompt: what a prefill pays for warm rings.

The prompt arrives in chunks, as a server sends it. FlashInfer attends to every chunk; the fill runs once, after the
last one, over the last ``W`` queries. Tokens lie in pages of one, scattered, as SGLang stores them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import mac_kernels as mk
from mac_kernels.attend.reference import shared_attention
from mac_kernels.testing.timing import Timing, measure
from mac_kernels.types import covered_end

from . import results
from .decode import WrongResultError

_DEVICE = "cuda"
_CHUNK = 8192  # tokens, SGLang's default on an 80 GB GPU
_TOLERANCE = 1e-2  # of the norm: two roundings to bf16
_DENSE = ("fa2", "fa3")


@dataclass(frozen=True, slots=True, kw_only=True)
class FillCase:
    """A prompt of one request."""

    context: int
    layout: mk.HeadLayout

    def __str__(self) -> str:
        return f"G{self.layout.group_size}-B1-L{self.context}-fill"


FILL = tuple(
    FillCase(context=context, layout=layout)
    for layout in (mk.HeadLayout(32, 4, 128), mk.HeadLayout(32, 8, 128))
    for context in (32768, 126976)
)


def run(cases: list[FillCase], config: mk.MacConfig, path: Path, facts: results.Row, repeats: int) -> int:
    """Run the cases; 1 if a result was wrong, else 0."""
    wrong = 0
    for case in cases:
        try:
            _run_case(case, config, path, facts, repeats)
        except WrongResultError as error:
            print(f"{case}: WRONG, not timed: {error}", flush=True)
            wrong = 1
        torch.cuda.empty_cache()
    return wrong


def _run_case(case: FillCase, config: mk.MacConfig, path: Path, facts: results.Row, repeats: int) -> None:
    """Fill, check sampled rows against the reference, time fill and prefill attention in turn, and write the rows.

    Raises
    ------
    WrongResultError
        If a sampled row differs from the reference.
    """
    layout, length = case.layout, case.context
    draw = torch.Generator(_DEVICE).manual_seed(0)
    cache = torch.randn(2, length, 1, layout.num_kv_heads, layout.head_dim, device=_DEVICE, generator=draw)
    k, v = cache.to(torch.bfloat16)
    q = torch.randn(length, layout.num_qo_heads, layout.head_dim, device=_DEVICE, generator=draw).to(torch.bfloat16)
    slots = torch.randperm(length, device=_DEVICE, generator=draw).int()
    fill, rings, rope = _fill(q[-_CHUNK:], k, v, slots, config, layout)
    fill()
    _check(q, k, v, slots, rings, rope, config, layout)
    calls: dict[str, list[Callable[[], object]]] = {"mac": [fill]}
    calls |= {backend: _prefill(q, k, v, slots, layout, backend) for backend in _DENSE}
    timed = {
        name: Timing(*(us * len(calls[name]) for us in (t.p20_us, t.p50_us, t.p80_us)), t.n)
        for name, t in measure(calls, device=_DEVICE, repeats=repeats, warmup=1).items()
    }
    full = min(timed[backend].p50_us for backend in _DENSE)
    products = 3 if config.correction else 2
    flop = 2 * products * layout.num_qo_heads * layout.head_dim * config.window * length
    ours = timed["mac"].p50_us
    prefill = "  ".join(f"prefill {backend} {timed[backend].p50_us:8.0f}" for backend in _DENSE)
    print(
        f"{case!s:24} fill {ours:8.1f} ({flop / ours / 1e6:.0f} TFLOP/s)  {prefill}  share {ours / full:.3%}",
        flush=True,
    )
    results.upsert(path, _rows(case, timed, config, facts))


def _fill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, config: mk.MacConfig, layout: mk.HeadLayout
) -> tuple[Callable[[], None], mk.RingPool, mk.Rope]:
    """The call that fills the ring from the last chunk."""
    half = layout.head_dim // 2
    rope = mk.Rope.from_inv_freq(10000.0 ** (-torch.arange(half, device=_DEVICE) / half))
    rings = mk.RingPool(
        num_rings=1, num_layers=1, layout=layout, window=config.window, dtype=torch.bfloat16, device=_DEVICE
    )
    rings.acquire(0)
    one = torch.zeros(1, dtype=torch.int64, device=_DEVICE)
    table = mk.RowTable(slots[None], one, torch.full((1,), len(slots), dtype=torch.int32, device=_DEVICE))
    kv = mk.PagedKV(k, v, table, layout, "NHD")
    indptr = torch.tensor([0, len(q)], dtype=torch.int32, device=_DEVICE)

    def fill() -> None:
        mk.fill_rings(
            q, indptr, kv, rings=rings, layer=0, slots=one, generations=one, rope=rope, config=config,
            max_kv_len=len(slots), backend="triton",
        )  # fmt: skip

    return fill, rings, rope


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    rings: mk.RingPool,
    rope: mk.Rope,
    config: mk.MacConfig,
    layout: mk.HeadLayout,
) -> None:
    """Compare three rows with the reference: the oldest, the newest and one between."""
    length, window = len(slots), config.window
    position = torch.tensor([length - window, length - window // 2, length - 1], device=_DEVICE)
    key = torch.arange(length, device=_DEVICE)
    stop = covered_end(position, band=config.band, sinks=config.sinks)
    seen = (key >= config.sinks) & (key < stop[:, None])
    order = slots.long()
    state = shared_attention(
        q[position],
        k[order].transpose(0, 1),
        v[order].transpose(0, 1),
        seen[:, None].expand(-1, layout.num_qo_heads, -1),
        sm_scale=layout.head_dim**-0.5,
        return_kbar=rings.correction,
    )
    row = {name: field[0, 0, position % window].float() for name, field in rings.fields.items()}
    pairs = [("out", row["out"], state.out), ("lse2", row["lse2"], state.lse2), ("pos", row["pos"], position.float())]
    pairs.append(("q_pre", row["q_pre"], rope.unrotate(q[position], position).float()))
    if state.kbar is not None:
        pairs.append(("kbar", row["kbar"], rope.pull_back(state.kbar, position)))
    for name, got, want in pairs:
        error = float((got - want).norm() / want.norm())
        if not error <= _TOLERANCE:
            raise WrongResultError(f"{name} of ring rows: relative error {error:.3g} above {_TOLERANCE}")


def _prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor, layout: mk.HeadLayout, backend: str
) -> list[Callable[[], object]]:
    """FlashInfer's attention of every chunk over all that came before it."""
    import flashinfer

    calls: list[Callable[[], object]] = []
    for begin in range(0, len(slots), _CHUNK):
        chunk = q[begin : begin + _CHUNK]
        end = begin + len(chunk)
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=_DEVICE)
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        wrapper.plan(
            torch.tensor([0, len(chunk)], dtype=torch.int32),
            torch.tensor([0, end], dtype=torch.int32),
            slots[:end],
            torch.ones(1, dtype=torch.int32),
            layout.num_qo_heads,
            layout.num_kv_heads,
            layout.head_dim,
            1,
            causal=True,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        out = torch.empty_like(chunk)
        calls.append(partial(wrapper.run, chunk, (k, v), out=out))
    return calls


def _rows(case: FillCase, timed: dict[str, Timing], config: mk.MacConfig, facts: results.Row) -> list[results.Row]:
    rows = []
    for name, timing in timed.items():
        ours = name == "mac"
        rows.append(
            {
                "suite": "fill",
                "case": "ring" if ours else "attention",
                "provider": "mac" if ours else "flashinfer",
                "backend": "triton" if ours else name,
                "batch": 1,
                "context": case.context,
                "hq": case.layout.num_qo_heads,
                "hkv": case.layout.num_kv_heads,
                "head_dim": case.layout.head_dim,
                "dtype": "bfloat16",
                "page_size": 1,
                "window": config.window,
                "band": config.band,
                "lag": "",
                "config": "careful" if ours else "full",
                "hit_rate": "",
                "miss_pattern": "",
                "tp": 1,
                "metric": "latency",
                "unit": "us",
                "p20": f"{timing.p20_us:.4g}",
                "p50": f"{timing.p50_us:.4g}",
                "p80": f"{timing.p80_us:.4g}",
                "n": timing.n,
                **facts,
            }
        )
    return results.as_text(rows)
