"""Audit mode: now and then a decoded output is also computed exactly, and the relative error is counted.

Everything happens on the device, at fixed addresses and without a host sync, so that the CUDA graph of the step records
it: every layer launches an exact decode step of one request, whose length is 0 (nothing is read) unless the layer was
drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, HeadLayout, InputError, MacConfig, RingPool, Rope
from mac_kernels.support import Backend

BOUNDS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
"""Upper bounds of the published histogram of relative errors; bf16 rounding alone lies at about 3e-3."""
_GROUPS, _SUM, _FIRST_BOUND = 0, 1, 2
_WORST = 1e3  # what an output that is not finite counts as


@dataclass(frozen=True, slots=True)
class AuditTotals:
    """Since the start: audited kv groups, the sum of their relative errors, and how many lie at or below each bound."""

    groups: int
    error_sum: float
    at_most: Mapping[str, int]


class Auditor:
    """Compares drawn outputs of a decode step with exact attention over the same queries and cache.

    It sees the error that one layer adds, not what earlier layers and tokens have already left in the cache.

    Parameters
    ----------
    rate : float, in (0, 1]
        Share of (step, layer) pairs in which one request, drawn at random, is computed exactly, too.
    layout, rope, sm_scale, logits_soft_cap
        As given to ``plan_rows``.
    num_layers : int
        Layers that :meth:`observe` will see, numbered from 0.
    req_to_token : torch.Tensor, [rows, max_context] int32
        SGLang's table of token slots; row 0 belongs to no request.
    max_kv_len : int, tokens
    dtype : torch.dtype
        Of queries and outputs.
    backend : {"auto", "triton", "reference"}, default "auto"

    Raises
    ------
    InputError
        If the rate is out of range.
    """

    def __init__(
        self,
        rate: float,
        *,
        layout: HeadLayout,
        num_layers: int,
        rope: Rope,
        req_to_token: torch.Tensor,
        max_kv_len: int,
        dtype: torch.dtype,
        sm_scale: float | None = None,
        logits_soft_cap: float = 0.0,
        backend: Literal["auto"] | Backend = "auto",
    ) -> None:
        if not 0 < rate <= 1:
            raise InputError(f"audit_rate={rate} must be in (0, 1]; leave it out to turn the audit off")
        device = req_to_token.device
        self._layout, self._num_layers = layout, num_layers
        self._limit = int(rate * 2**31)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._layers = torch.arange(num_layers, dtype=torch.int64, device=device)
        self._row, self._pool_index, self._length, self._none = torch.zeros(4, 1, dtype=torch.int64, device=device)
        self._lengths, self._observed = torch.zeros(2, num_layers, dtype=torch.int64, device=device)
        outputs = torch.zeros(2, num_layers, layout.num_qo_heads, layout.head_dim, dtype=dtype, device=device)
        self._served, self._exact = outputs
        self._bounds = torch.tensor(BOUNDS, dtype=torch.float32, device=device)
        self.totals = torch.zeros(_FIRST_BOUND + len(BOUNDS), dtype=torch.float64, device=device)
        config = MacConfig.preset("exact", window=64, correction=False)
        # no slot of this pool ever holds a ring, so every step is exact and stores nothing
        self._rings = RingPool(
            num_rings=1, num_layers=1, layout=layout, window=config.window, dtype=dtype, correction=False, device=device
        )
        self._decode = BatchMacDecodeWithPagedKVCacheWrapper("NHD", backend=backend)
        self._decode.plan_rows(
            req_to_token,
            self._pool_index,
            self._length,
            layout=layout,
            rope=rope,
            config=config,
            sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap,
            max_kv_len=max_kv_len,
        )

    def begin(self, req_pool_indices: torch.Tensor, seq_lens: torch.Tensor) -> None:
        """Count the errors of the last step and draw the request and the layers of this one; once per decode step.

        ``req_pool_indices``, ``seq_lens`` [B] int32 or int64, as in the step's plan; padded entries name row 0.
        """
        self._count()
        self._step += 1
        draws = _hash(self._step * self._num_layers + self._layers)
        self._row.copy_(_hash(~self._step) % len(seq_lens))
        self._pool_index.copy_(req_pool_indices[self._row])
        drawn = (draws < self._limit) & (self._pool_index > 0)
        self._lengths.copy_(torch.where(drawn, seq_lens[self._row].long(), 0))

    def observe(
        self,
        layer: int,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        scales: tuple[float, float],
    ) -> None:
        """Compute the drawn request of one layer exactly, after the layer's decode.

        ``q`` and ``out`` [B, Hq, D]; ``paged_kv_cache`` and ``scales`` (of keys and values) as for ``run``.
        """
        self._length.copy_(self._lengths[layer])
        self._observed[layer] = self._lengths[layer]
        self._served[layer] = out.index_select(0, self._row)[0]
        self._decode.run(
            q.index_select(0, self._row),
            paged_kv_cache,
            rings=self._rings,
            layer=0,
            slots=self._none,
            generations=self._none,
            k_scale=scales[0],
            v_scale=scales[1],
            out=self._exact[layer : layer + 1],
        )

    def reset(self) -> None:
        """Forget everything (after the warm-up of graphs)."""
        self._observed.zero_()
        self.totals.zero_()

    @staticmethod
    def read(totals: torch.Tensor) -> AuditTotals:
        """Name the numbers of a host copy of ``totals``."""
        values = totals.tolist()
        at_most = {f"{bound:g}": int(count) for bound, count in zip(BOUNDS, values[_FIRST_BOUND:], strict=True)}
        groups = int(values[_GROUPS])
        return AuditTotals(groups, values[_SUM], {**at_most, "+Inf": groups})

    def _count(self) -> None:
        shape = (self._num_layers, self._layout.num_kv_heads, -1)
        exact, served = self._exact.float().view(shape), self._served.float().view(shape)
        size = torch.linalg.vector_norm(exact, dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        error = torch.linalg.vector_norm(served - exact, dim=-1) / size  # [layers, Hkv]
        error = error.nan_to_num(nan=_WORST, posinf=_WORST).clamp(max=_WORST)
        audited = (self._observed > 0)[:, None].expand_as(error)
        self.totals[_GROUPS] += audited.sum()
        self.totals[_SUM] += torch.where(audited, error, 0.0).sum()
        below = (error[..., None] <= self._bounds) & audited[..., None]
        self.totals[_FIRST_BOUND:] += below.sum((0, 1))
        self._observed.zero_()


def _hash(x: torch.Tensor) -> torch.Tensor:
    """Mix integers into [0, 2**31): a draw that needs no generator, whose state a graph would have to carry."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47  # the multipliers of splitmix64, as signed numbers
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return (x >> 33) & 0x7FFFFFFF
