"""Time one decode step of one layer: MAC beside FlashInfer with tensor cores, correctness first.

Both sides are CUDA graphs, replayed in turn in one process. Between two calls a buffer larger than the L2 cache is
rewritten, so that every call starts cold; the time of the rewriting alone, measured in the same turns, is subtracted.
(Rotating copies of the cache instead is not possible at 127K tokens and batch 64: one copy fills 17 to 33 GB.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

import mac_kernels as mk
from mac_kernels.step import reference_step
from mac_kernels.support import Backend
from mac_kernels.testing.scenario import PagedStore, Scenario, plant_step
from mac_kernels.testing.timing import Timing, calls_per_round, measure

from .registry import DecodeCase

_DEVICE = "cuda"
# of the norm of what is compared: two roundings to bf16 are 2^-8 apart at most; an absolute bound would pass zeros,
# since attention over 127K random values is of the order of .003
_TOLERANCE = 1e-2
_ROUND_US = 20_000.0  # of calls between two clock readings
_FOR_EVER = 2**30  # steps
BYPASSED = ", bypassed"
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Measured:
    """Latency per provider (MAC's backends by name), group hit rate, KV bytes read per call by MAC and in full.

    At hit rate 0 the name of a backend with :data:`BYPASSED` behind it stands for the steps of a layer that has stopped
    matching because its hits do not pay, which is what such a layer does most of the time.
    """

    latency: dict[str, Timing]
    hit_rate: float
    mac_bytes: int
    full_bytes: int


class WrongResultError(Exception):
    """A provider's result is wrong; no timing is reported."""


def run_case(
    case: DecodeCase,
    store: PagedStore,
    config: mk.MacConfig,
    *,
    seed: int,
    repeats: int,
    backends: Sequence[Backend] = ("triton",),
) -> Measured:
    """Plant the case in the store, check all providers, then time them.

    Raises
    ------
    WrongResultError
        If a decision or an output is wrong.
    """
    layout = case.layout
    half = layout.head_dim // 2
    rope = mk.Rope.from_inv_freq(10000.0 ** (-torch.arange(half, device=_DEVICE) / half))
    scenario = plant_step(
        config,
        layout,
        kv_lens=[case.context] * case.batch,
        hit=_outcome(case, seed),
        rope=rope,
        lag=(case.lag, case.lag + 3),  # four rows lie near the query
        rows="synthetic",
        page_size=case.page_size,
        dtype=torch.bfloat16,
        device=_DEVICE,
        seed=seed,
        store=store,
    )
    run_flashinfer, full = flashinfer_decode(scenario.q, scenario.kv)
    run_flashinfer()
    expected = _reference_of_a_hit(scenario, rope, config)
    providers: dict[str, Call] = {}
    for backend in backends:
        searching = dataclasses.replace(config, break_even=None)
        run_traced, providers[backend], out = _mac(case, scenario, rope, searching, backend)
        trace = run_traced()
        _check(scenario, trace, out, full, expected)
        if case.hit_rate == 0 and config.break_even is not None:
            run_traced, providers[backend + BYPASSED], out = _mac(case, scenario, rope, config, backend)
            scenario.rings.bypass.pause(_FOR_EVER)
            trace = run_traced()
            _check(scenario, trace, out, full, expected)
            if not bool((trace.reason == mk.Reason.BYPASSED).all()):
                raise WrongResultError("a paused layer matched")

    flush = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device=_DEVICE)
    providers |= {"flashinfer-tc": run_flashinfer, "": lambda: None}
    calls = {name: [after(flush, call)] * calls_per_round(call, round_us=_ROUND_US) for name, call in providers.items()}
    timed = measure(calls, device=_DEVICE, repeats=repeats)
    idle = timed.pop("").p50_us
    token = 2 * layout.head_dim * scenario.kv.k_cache.element_size()
    return Measured(
        {name: Timing(t.p20_us - idle, t.p50_us - idle, t.p80_us - idle, t.n) for name, t in timed.items()},
        float(trace.hit.float().mean()),
        int(trace.kv_read.sum()) * token,
        int(trace.kv_len.sum()) * layout.num_kv_heads * token,
    )


def _outcome(case: DecodeCase, seed: int) -> torch.Tensor:
    """Which groups hit: exactly the wanted share, so that a small batch is not left to chance."""
    groups, misses = case.batch * case.layout.num_kv_heads, case.misses
    order = torch.randperm(groups, generator=torch.Generator().manual_seed(seed))
    hit = torch.ones(groups, dtype=torch.bool)
    hit[order[:misses] if case.miss_pattern == "scattered" else torch.arange(misses)] = False
    return hit.view(case.batch, case.layout.num_kv_heads)


def _mac(
    case: DecodeCase, scenario: Scenario, rope: mk.Rope, config: mk.MacConfig, backend: Backend
) -> tuple[Callable[[], mk.StepTrace], Call, torch.Tensor]:
    """One step with its trace, one without, and where both write."""
    table = scenario.kv.table
    mac = mk.BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend=backend)
    mac.plan(
        table.indptr,
        table.indices,
        table.last_page_len,
        layout=case.layout,
        page_size=case.page_size,
        config=config,
        rope=rope,
    )
    out = torch.full_like(scenario.q, torch.nan)
    cache = (scenario.kv.k_cache, scenario.kv.v_cache)
    step = {
        "rings": scenario.rings,
        "layer": 0,
        "slots": scenario.slots,
        "generations": scenario.generations,
        "out": out,
    }
    return lambda: mac.run_return_trace(scenario.q, cache, **step)[1], lambda: mac.run(scenario.q, cache, **step), out


def flashinfer_decode(q: torch.Tensor, kv: mk.PagedKV) -> tuple[Call, torch.Tensor]:
    """FlashInfer's attention with tensor cores over whole requests, and where it writes."""
    import flashinfer

    table, layout = kv.table, kv.layout
    assert isinstance(table, mk.PageTable)
    indices = table.indices[: int(table.indptr[-1])]
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=_DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace,
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=table.indptr.clone(),
        paged_kv_indices_buffer=indices.clone(),
        paged_kv_last_page_len_buffer=table.last_page_len.clone(),
    )
    wrapper.plan(
        table.indptr.cpu(),
        indices,
        table.last_page_len.cpu(),
        layout.num_qo_heads,
        layout.num_kv_heads,
        layout.head_dim,
        table.page_size,
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    out = torch.empty_like(q)
    return lambda: wrapper.run(q, (kv.k_cache, kv.v_cache), out=out), out


def _reference_of_a_hit(scenario: Scenario, rope: mk.Rope, config: mk.MacConfig) -> tuple[int, torch.Tensor] | None:
    """Reference output of the first request all of whose groups hit (a miss would gather the whole cache)."""
    whole = scenario.hit.all(1).nonzero()
    if not len(whole):
        return None
    request = int(whole[0])
    rings = mk.RingPool(
        num_rings=1,
        num_layers=1,
        layout=scenario.rings.layout,
        window=config.window,
        dtype=scenario.rings.dtype,
        correction=scenario.rings.correction,
        device=_DEVICE,
    )
    rings.restore(0, scenario.rings.snapshot(request))
    slot = torch.zeros(1, dtype=torch.int64, device=_DEVICE)
    out, _ = reference_step(
        scenario.q[request : request + 1],
        scenario.kv.only(request),
        rings,
        layer=0,
        slots=slot,
        generations=slot,
        config=config,
        rope=rope,
        sm_scale=scenario.rings.layout.head_dim**-0.5,
    )
    return request, out[0]


def _check(
    scenario: Scenario,
    trace: mk.StepTrace,
    out: torch.Tensor,
    full: torch.Tensor,
    expected: tuple[int, torch.Tensor] | None,
) -> None:
    wrong = int((trace.hit != scenario.hit).sum())
    if wrong:
        raise WrongResultError(f"{wrong} of {scenario.hit.numel()} kv groups were not decided as planted")
    missed = (~scenario.hit).repeat_interleave(scenario.rings.layout.group_size, dim=1)
    pairs = [("exact heads against FlashInfer", out[missed], full[missed])]
    if expected is not None:
        pairs.append(("reused heads against the reference", out[expected[0]], expected[1]))
    for what, got, want in pairs:
        error = float((got.float() - want.float()).norm() / want.float().norm()) if want.numel() else 0.0
        if not error <= _TOLERANCE:
            raise WrongResultError(f"{what}: relative error {error:.3g} above {_TOLERANCE}")
    if not torch.isfinite(out).all():
        raise WrongResultError("the output is not finite everywhere")


def after(flush: torch.Tensor, call: Call) -> Call:
    """The call behind a rewriting of ``flush``, which leaves nothing else in the L2 cache."""

    def run() -> object:
        flush.add_(1)
        return call()

    return run
