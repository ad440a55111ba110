"""What one forward pass needs: plans of decode over fixed tensors, and the requests of a prefill chunk."""

from __future__ import annotations

from typing import Any

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, PagedKV, RowTable, fill_rings

from .layers import LayerKind, MacLayer
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
    """The requests of a prefill pass, for storing their last queries."""

    def __init__(self, table: RowTable, qo_indptr: torch.Tensor) -> None:
        self._table, self._qo_indptr = table, qo_indptr
        self._generations = torch.zeros(table.batch_size, dtype=torch.int64, device=qo_indptr.device)

    @staticmethod
    def of(forward_batch: Any, req_to_token: torch.Tensor) -> Fill:
        """Read a forward batch."""
        lengths = forward_batch.extend_seq_lens
        qo_indptr = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        table = RowTable(req_to_token, forward_batch.req_pool_indices, forward_batch.seq_lens)
        return Fill(table, qo_indptr)

    def run(
        self,
        q: torch.Tensor,
        caches: tuple[torch.Tensor, torch.Tensor],
        scales: tuple[float, float],
        layer: MacLayer,
        serving: Serving,
    ) -> None:
        """Store the last queries of one layer, ``q`` [nnz_q, Hq, D]."""
        fill_rings(
            q,
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
