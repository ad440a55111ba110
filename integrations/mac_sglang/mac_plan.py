"""What one forward pass of MAC needs: plans of decode over fixed tensors, and the requests of a prefill chunk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, PagedKV, RowTable, fill_rings

from .layers import LayerKind, ServedLayer
from .requests import SCRATCH_ROW
from .serving import Caches, Scales, to_device

if TYPE_CHECKING:
    from .mac_serving import MacServing


class MacPlan:
    """Decode of one batch size: a wrapper per kind of layer, over fixed tensors of rows and lengths."""

    def __init__(self, serving: MacServing, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        self.rows, self.lengths = rows, lengths
        self._rings, self._auditor = serving.rings, serving.auditor
        self._generations = torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)  # see RequestTable
        self._wrappers: dict[LayerKind, BatchMacDecodeWithPagedKVCacheWrapper] = {}
        for kind in serving.site.kinds:
            wrapper = BatchMacDecodeWithPagedKVCacheWrapper(backend=serving.site.backend)
            wrapper.plan_rows(
                serving.site.runner.req_to_token_pool.req_to_token,
                rows,
                lengths,
                layout=serving.rings.layout,
                rope=kind.rotation,
                max_kv_len=serving.site.context_len,
                config=serving.config,
                sm_scale=kind.sm_scale,
                logits_soft_cap=kind.logits_soft_cap,
                q_data_type=serving.site.runner.dtype,
                kv_data_type=serving.site.runner.kv_cache_dtype,
            )
            self._wrappers[kind] = wrapper

    def begin(self) -> None:
        """Draw what is audited in this step."""
        if self._auditor is not None:
            self._auditor.begin(self.rows, self.lengths)

    def run(self, q: torch.Tensor, caches: Caches, scales: Scales, layer: ServedLayer) -> torch.Tensor:
        """One layer of one step for ``q`` [B, Hq, D]."""
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
            self._auditor.observe(layer.index, q, caches, out, scales)
        return out


class RingFill:
    """The last queries of the requests of a prefill pass that need them stored, for every layer.

    Parameters
    ----------
    serving : MacServing
    rows, lengths : torch.Tensor, [B] int32
        Of these requests: rows of the pool, and tokens including those of the pass.
    counts : sequence of int
        Queries of each to be stored, at most the window.
    queries : torch.Tensor, [sum(counts)] int64
        Where they are among the queries of the pass.
    """

    whole: ClassVar[bool] = False

    def __init__(
        self,
        serving: MacServing,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        counts: Sequence[int],
        queries: torch.Tensor,
    ) -> None:
        self._serving, self._queries = serving, queries
        self._table = RowTable(serving.site.runner.req_to_token_pool.req_to_token, rows, lengths)
        self._qo_indptr = to_device(torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32), rows.device)
        self._generations = torch.zeros(len(counts), dtype=torch.int64, device=rows.device)  # see RequestTable

    @staticmethod
    def of(forward_batch: Any, serving: MacServing) -> RingFill:
        """Read a forward batch; ``serving.chosen`` names its requests."""
        device = forward_batch.seq_lens.device
        ends = list(itertools.accumulate(forward_batch.extend_seq_lens_cpu))
        counts = [min(forward_batch.extend_seq_lens_cpu[at], serving.config.window) for at in serving.chosen]
        spans = [torch.arange(ends[at] - count, ends[at]) for at, count in zip(serving.chosen, counts, strict=True)]
        chosen = to_device(torch.tensor(serving.chosen), device)
        rows, lengths = forward_batch.req_pool_indices[chosen].int(), forward_batch.seq_lens[chosen].int()
        return RingFill(serving, rows, lengths, counts, to_device(torch.cat(spans), device))

    def run(
        self, q: torch.Tensor, exact: torch.Tensor | None, caches: Caches, scales: Scales, layer: ServedLayer
    ) -> torch.Tensor:
        """Store the last queries of one layer, of all queries ``q`` [nnz_q, Hq, D] of the pass; changes no output."""
        assert exact is not None  # nothing is computed here
        self.store(q, caches, scales, layer)
        return exact

    def store(self, q: torch.Tensor, caches: Caches, scales: Scales, layer: ServedLayer) -> None:
        """Store the last queries of one layer."""
        serving = self._serving
        fill_rings(
            q[self._queries],
            self._qo_indptr,
            PagedKV(*caches, self._table, serving.rings.layout, k_scale=scales[0], v_scale=scales[1]),
            rings=serving.rings,
            layer=layer.index,
            slots=self._table.req_pool_indices,
            generations=self._generations,
            rope=layer.kind.rotation,
            config=serving.config,
            sm_scale=layer.kind.sm_scale,
            logits_soft_cap=layer.kind.logits_soft_cap,
            max_kv_len=serving.site.context_len,
            backend=serving.site.backend,
        )


def compile_fill(serving: MacServing) -> None:
    """Run what stores a prompt's last queries once, storing nothing: no request should wait until it is compiled."""
    site, layout = serving.site, serving.rings.layout
    rows = torch.full((1,), SCRATCH_ROW, dtype=torch.int32, device=serving.rings.device)
    fill = RingFill(serving, rows, torch.ones_like(rows), [1], torch.zeros_like(rows, dtype=torch.int64))
    q = torch.zeros(1, layout.num_qo_heads, layout.head_dim, dtype=site.runner.dtype, device=rows.device)
    for layer, caches in site.one_of_each_kind():
        fill.store(q, caches, (1.0, 1.0), layer)
