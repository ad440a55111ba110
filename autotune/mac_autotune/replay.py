"""Replay a policy on a recorded trace, with the reference step itself: the layers are the requests of one batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch

from mac_kernels import AttnState, InputError, MacConfig, PagedKV, PageTable, RingPool, fill_rings
from mac_kernels.attend.reference import partial_attention
from mac_kernels.step import reference_step

from .latency import Reads
from .traces import MAX_WINDOW, Trace


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a policy did on a trace.

    ``divergence``: squared error that the attention of a layer brings into the residual stream, relative to its norm,
    with the recorded inputs (errors do not travel from layer to layer), mean over steps and layers; ``divergence_p99``
    the 99% quantile over steps. KL grows with it, at a factor that only a closed loop can tell.
    """

    reads: Reads
    divergence: float
    divergence_p99: float


@torch.inference_mode()
def replay(trace: Trace, config: MacConfig, exact: torch.Tensor) -> Replayed:
    """Decode the steps of the trace under a policy.

    Parameters
    ----------
    trace : Trace
    config : MacConfig
        Window up to :data:`MAX_WINDOW`.
    exact : torch.Tensor, [steps, N, Hq, D]
        From :func:`full_attention`.

    Raises
    ------
    InputError
        If the window is larger than what was recorded.
    """
    if config.window > MAX_WINDOW:
        raise InputError(f"window={config.window} must be <= {MAX_WINDOW}, the queries that a trace holds")
    layers, first = trace.q.shape[0], trace.q.shape[1] - trace.steps
    rope, slots = trace.rope, torch.arange(layers)
    rings = RingPool(
        num_rings=layers,
        num_layers=1,
        layout=trace.layout,
        window=config.window,
        dtype=torch.float32,
        correction=config.correction,
        sketch_dim=None if config.nominees is not None else 0,
    )
    for slot in range(layers):
        rings.acquire(slot)
    count = min(config.window, first)
    fill_rings(
        trace.q[:, first - count : first].flatten(0, 1),
        torch.arange(layers + 1) * count,
        cache_of(trace, trace.prompt),
        rings=rings,
        layer=0,
        slots=slots,
        generations=torch.zeros_like(slots),
        rope=rope,
        config=dataclasses.replace(config, thresholds=None, influence_scale=None),  # what is stored knows no limits
        sm_scale=trace.sm_scale,
        backend="reference",
    )
    rule = _per_layer(trace, config)
    out_proj = trace.out_proj.float()
    hits, hit_reads, errors = [], [], []
    for step in range(trace.steps):
        out, seen = reference_step(
            trace.q[:, first + step],
            cache_of(trace, trace.prompt + step + 1),
            rings,
            layer=0,
            slots=slots,
            generations=torch.zeros_like(slots),
            config=rule,
            rope=rope,
            sm_scale=trace.sm_scale,
        )
        hits.append(seen.hit)
        hit_reads.append(torch.where(seen.hit, seen.kv_read, 0).double())
        error = (out_proj @ (out - exact[step]).flatten(1)[..., None])[..., 0].norm(dim=-1)
        errors.append((error / trace.residual[:, step]).square())
    hit, error = torch.stack(hits).float(), torch.stack(errors)  # [steps, N, ...]
    tokens = float(torch.stack(hit_reads).sum() / hit.sum().clamp(min=1))
    reads = Reads(hit=float(hit.mean()), tokens_on_hit=tokens if hit.any() else math.nan)
    return Replayed(reads, float(error.mean()), float(error.mean(1).quantile(0.99)))


@torch.inference_mode()
def full_attention(trace: Trace, progress: Callable[[int, int], None] | None = None) -> torch.Tensor:
    """Outputs of full attention at the decoded tokens, [steps, N, Hq, D] fp32."""
    first = trace.q.shape[1] - trace.steps
    outputs = []
    for step in range(trace.steps):
        q, length = trace.q[:, first + step], trace.prompt + step + 1
        begin = torch.zeros(q.shape[:2], dtype=torch.int64)
        state: AttnState = partial_attention(
            q, cache_of(trace, length), begin, torch.full((len(q),), length), sm_scale=trace.sm_scale
        )
        outputs.append(state.out)
        if progress is not None:
            progress(step + 1, trace.steps)
    return torch.stack(outputs)


def _per_layer(trace: Trace, config: MacConfig) -> MacConfig:
    """The config with its tables, which are by layer, spread over the requests, which are the layers of the trace."""
    values: dict[str, Any] = config.to_dict()
    for table, scalar, merge in (("thresholds", "threshold", _second), ("influence_scale", "influence", _quotient)):
        if values[table] is not None and values[scalar] is not None:
            values[scalar] = merge(values[scalar], torch.tensor([values[table][layer] for layer in trace.layers]))
        values[table] = None
    return cast(MacConfig, SimpleNamespace(**values))


def _second(_: float, table: torch.Tensor) -> torch.Tensor:
    return table


def _quotient(limit: float, table: torch.Tensor) -> torch.Tensor:
    return limit / table


def cache_of(trace: Trace, length: int) -> PagedKV:
    """The first tokens of every layer; a layer is one page."""
    layers, _, capacity, _ = trace.k.shape
    index = torch.arange(layers + 1, dtype=torch.int32)
    table = PageTable(index, index[:-1], torch.full_like(index[:-1], length), capacity)
    return _Dense(trace.k, trace.v, table, trace.layout, "HND")


class _Dense(PagedKV):
    """A cache of one page per request: a slice where the library gathers token by token, many times as fast."""

    def gather(self, first: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(self.table, PageTable)
        starts, pages = first.tolist(), self.table.indices[: len(first)].tolist()
        low, capacity = starts[0], self.k_cache.shape[2]
        aligned = low + count <= capacity and starts == [low] * len(starts) and pages == list(range(len(self.k_cache)))
        pair = []
        for cache in (self.k_cache, self.v_cache):
            if aligned:
                rows = cache[:, :, low : low + count]
            else:
                rows = cache.new_zeros(len(pages), cache.shape[1], count, cache.shape[3])
                for row, (page, start) in enumerate(zip(pages, starts, strict=True)):
                    some = cache[page, :, start : start + count]
                    rows[row, :, : some.shape[1]] = some
            pair.append(rows.transpose(1, 2))
        return pair[0], pair[1]
