"""What one forward pass needs: plans of decode over fixed tensors, and the requests of a prefill chunk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, PagedKV, RowTable, fill_rings

from .layers import LayerKind, MacLayer
from .requests import SCRATCH_ROW
from .serving import Serving


class Plan:
    """Decode of one batch size: a wrapper per kind of layer, over fixed tensors of rows and lengths."""

    def __init__(
        self,
        serving: Serving,
        rows: torch.Tensor,
        lengths: torch.Tensor,
    ) -> None:
        self.rows, self.lengths = rows, lengths
        self._rings, self._auditor = serving.rings, serving.auditor
        self._generations = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)  # see RequestRings
        self._wrappers: dict[LayerKind, BatchMacDecodeWithPagedKVCacheWrapper] = {}
        for kind in dict.fromkeys(layer.kind for layer in serving.layers.served.values()):
            wrapper = BatchMacDecodeWithPagedKVCacheWrapper(backend=serving.backend)
            wrapper.plan_rows(
                serving.runner.req_to_token_pool.req_to_token,
                rows,
                lengths,
                layout=serving.rings.layout,
                rope=kind.rope,
                max_kv_len=serving.context_len,
                config=serving.config,
                sm_scale=kind.sm_scale,
                logits_soft_cap=kind.logits_soft_cap,
            )
            self._wrappers[kind] = wrapper

    def run(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[float, float],
        layer: MacLayer,
    ) -> torch.Tensor:
        """One layer of one step for ``q`` [B, Hq, D]; stored keys and values are multiplied with ``scales``."""
        wrapper = self._wrappers[layer.kind]
        out = wrapper.run(
            q,
            caches,
            rings=self._rings,
            layer=layer.index,
            slots=self.rows,
            generations=self._generations,
            k_scale=scales[0],
            v_scale=scales[1],
        )
        if self._auditor is not None:
            self._auditor.observe(layer.index, q, caches, out)
        return out


class Fill:
    """The last queries of the requests of a prefill pass that need them stored, for every layer.

    Parameters
    ----------
    serving : Serving
    rows, lengths : torch.Tensor, [B] int32
        Of these requests: rows of the pool, and tokens including those of the pass.
    counts : sequence of int
        Queries of each to be stored, at most the window.
    queries : torch.Tensor, [sum(counts)] int64
        Where they are among the queries of the pass.
    """

    def __init__(
        self, serving: Serving, rows: torch.Tensor, lengths: torch.Tensor, counts: Sequence[int], queries: torch.Tensor
    ) -> None:
        self._serving, self._queries = serving, queries
        self._table = RowTable(serving.runner.req_to_token_pool.req_to_token, rows, lengths)
        self._qo_indptr = _to_device(torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32), rows.device)
        self._generations = torch.zeros(len(counts), dtype=torch.int64, device=rows.device)  # see RequestRings

    @staticmethod
    def of(forward_batch: Any, serving: Serving) -> Fill:
        """Read a forward batch; ``serving.fill`` names its requests."""
        device = forward_batch.seq_lens.device
        ends = list(itertools.accumulate(forward_batch.extend_seq_lens_cpu))
        counts = [min(forward_batch.extend_seq_lens_cpu[at], serving.config.window) for at in serving.fill]
        spans = [torch.arange(ends[at] - count, ends[at]) for at, count in zip(serving.fill, counts, strict=True)]
        chosen = _to_device(torch.tensor(serving.fill), device)
        rows, lengths = forward_batch.req_pool_indices[chosen].int(), forward_batch.seq_lens[chosen].int()
        return Fill(serving, rows, lengths, counts, _to_device(torch.cat(spans), device))

    def run(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[float, float],
        layer: MacLayer,
    ) -> None:
        """Store the last queries of one layer, of all queries ``q`` [nnz_q, Hq, D] of the pass."""
        serving = self._serving
        fill_rings(
            q[self._queries],
            self._qo_indptr,
            PagedKV(*caches, self._table, serving.rings.layout, k_scale=scales[0], v_scale=scales[1]),
            rings=serving.rings,
            layer=layer.index,
            slots=self._table.req_pool_indices,
            generations=self._generations,
            rope=layer.kind.rope,
            config=serving.config,
            sm_scale=layer.kind.sm_scale,
            logits_soft_cap=layer.kind.logits_soft_cap,
            max_kv_len=serving.context_len,
            backend=serving.backend,
        )


def compile_fill(serving: Serving) -> None:
    """Run what stores a prompt's last queries once, storing nothing: no request should wait until it is compiled."""
    layers, layout = serving.layers.served, serving.rings.layout
    rows = torch.full((1,), SCRATCH_ROW, dtype=torch.int32, device=serving.rings.device)
    fill = Fill(serving, rows, torch.ones_like(rows), [1], torch.zeros_like(rows, dtype=torch.int64))
    q = torch.zeros(1, layout.num_qo_heads, layout.head_dim, dtype=serving.runner.dtype, device=rows.device)
    for number in {layer.kind: number for number, layer in layers.items()}.values():
        k_cache, v_cache = serving.runner.token_to_kv_pool.get_kv_buffer(number)
        fill.run(q, (k_cache.unsqueeze(1), v_cache.unsqueeze(1)), (1.0, 1.0), layers[number])


def _to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy small host values without waiting for the device."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
