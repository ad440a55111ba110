"""What one forward pass of TCA needs: decode over the pool of far sets, and the requests that are read sparsely."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mac_kernels import PagedKV, RowTable
from mac_kernels.tca import Selection

from .layers import LayerKind, ServedLayer
from .requests import SCRATCH_ROW
from .serving import Caches, Scales, to_device

if TYPE_CHECKING:
    from .tca_serving import TcaServing


class TcaPlan:
    """Decode of one batch size over fixed tensors of rows and lengths; a request without far sets is read whole."""

    def __init__(self, serving: TcaServing, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        self.rows, self.lengths = rows, lengths
        self._serving = serving
        self._table = RowTable(serving.site.runner.req_to_token_pool.req_to_token, rows, lengths)
        self._sets = serving.pool.sets_of(rows)

    def begin(self) -> None:
        """Look up whose far sets are whose; the rows of a replay are others than those of the capture."""
        self._sets = self._serving.pool.sets_of(self.rows)

    def run(self, q: torch.Tensor, caches: Caches, scales: Scales, layer: ServedLayer) -> torch.Tensor:
        """One layer of one step for ``q`` [B, Hq, D]; blocks that leave the window are compressed first."""
        serving, options = self._serving, _options(layer.kind)
        kv = PagedKV(*caches, self._table, serving.site.layout, k_scale=scales[0], v_scale=scales[1])
        far = serving.pool.far(layer.index, self._sets)
        serving.kernels.compact(q, kv, far, serving.keep[layer.index], config=serving.config, **options)
        out: torch.Tensor = serving.kernels.sparse_decode(q, kv, far, **options).out
        if layer.index == serving.pool.num_layers - 1:
            serving.count(self.rows, self.lengths, self._sets)
        return out.to(q.dtype)


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests of a prefill pass that are read together.

    ``queries`` [n] int64, where theirs are among those of the pass (``None``: they are all); ``qo_indptr`` [B + 1]
    int32 and ``last`` [B] int64 among ``queries``; ``kv_len`` as the host knows it; ``sets`` [B] int32, their far sets.
    """

    queries: torch.Tensor | None
    qo_indptr: torch.Tensor
    last: torch.Tensor
    table: RowTable
    kv_len: Sequence[int]
    sets: torch.Tensor


class TcaPrefill:
    """The requests of a prefill pass that have a far region: selected by their last query, attended sparsely.

    A selection is made from all keys of a request, cached or new, so neither a chunk nor a prefix hit needs anything of
    earlier passes. That of a prompt's last chunk is what decoding goes on with.

    Parameters
    ----------
    serving : TcaServing
        ``chosen`` names the requests.
    forward_batch : object
        SGLang's batch of the pass.
    """

    def __init__(self, serving: TcaServing, forward_batch: Any) -> None:
        self._serving = serving
        counts, chosen = list(forward_batch.extend_seq_lens_cpu), serving.chosen
        kv_len = [prefix + count for prefix, count in zip(forward_batch.extend_prefix_lens_cpu, counts, strict=True)]
        self.whole = len(chosen) == len(counts)
        self.num_queries = sum(counts[at] for at in chosen)
        ends, device = list(itertools.accumulate(counts)), forward_batch.seq_lens.device
        batches = list(_batches(chosen, kv_len, serving.site.context_len))
        rows, lengths = forward_batch.req_pool_indices, forward_batch.seq_lens
        req_to_token = serving.site.runner.req_to_token_pool.req_to_token
        self._groups = []
        for members in batches:
            at = to_device(torch.tensor(members), device)
            own = [counts[member] for member in members]
            spans = torch.cat([torch.arange(ends[m] - counts[m], ends[m]) for m in members])
            indptr = torch.tensor([0, *itertools.accumulate(own)], dtype=torch.int32)
            self._groups.append(
                _Group(
                    queries=None if self.whole and len(batches) == 1 else to_device(spans, device),
                    qo_indptr=to_device(indptr, device),
                    last=to_device(indptr[1:].long() - 1, device),
                    table=RowTable(req_to_token, rows[at], lengths[at]),
                    kv_len=[kv_len[member] for member in members],
                    sets=serving.pool.sets_of(rows[at]),
                )
            )

    def run(
        self, q: torch.Tensor, exact: torch.Tensor | None, caches: Caches, scales: Scales, layer: ServedLayer
    ) -> torch.Tensor:
        """One layer, for all queries ``q`` [nnz_q, Hq, D] of the pass; their outputs replace those in ``exact``."""
        out = q.new_empty(len(q), q.shape[1] * q.shape[2]) if exact is None else exact
        for group in self._groups:
            own = q if group.queries is None else q[group.queries]
            selection, attended = _attend(self._serving, own, group, caches, scales, layer)
            self._serving.pool.store(layer.index, group.sets, selection.far)
            if group.queries is None:
                return attended
            out.index_copy_(0, group.queries, attended)
        return out


def compile_prefill(serving: TcaServing) -> None:
    """Run the kernels of prefill once for the shortest context that has a far region, storing nothing."""
    site, length = serving.site, serving.shortest
    rows = torch.full((1,), SCRATCH_ROW, dtype=torch.int32, device=serving.pool.device)
    table = RowTable(site.runner.req_to_token_pool.req_to_token, rows, torch.full_like(rows, length))
    one = torch.ones_like(rows)
    group = _Group(None, torch.cat((one * 0, one)), one.long() - 1, table, [length], serving.pool.sets_of(rows))
    q = torch.zeros(1, site.layout.num_qo_heads, site.layout.head_dim, dtype=site.runner.dtype, device=rows.device)
    for layer, caches in site.one_of_each_kind():
        _attend(serving, q, group, caches, (1.0, 1.0), layer)


def _attend(
    serving: TcaServing, q: torch.Tensor, group: _Group, caches: Caches, scales: Scales, layer: ServedLayer
) -> tuple[Selection, torch.Tensor]:
    """Select, and attend the queries of a group; outputs [nnz_q, Hq * D]."""
    options: dict[str, Any] = {"config": serving.config, **_options(layer.kind)}
    kv = PagedKV(*caches, group.table, serving.site.layout, k_scale=scales[0], v_scale=scales[1])
    choice = serving.choices[layer.index]
    selection: Selection = serving.kernels.select_prompt(q[group.last], kv, group.kv_len, choice, **options)
    out: torch.Tensor = serving.kernels.sparse_prefill(q, group.qo_indptr, kv, selection, **options).out
    return selection, out.to(q.dtype).flatten(1)


def _batches(chosen: Sequence[int], kv_len: Sequence[int], context_len: int) -> list[list[int]]:
    """Split requests so that none of the batches, padded to its longest, has more tokens than the longest context."""
    waiting, batches = sorted(chosen, key=lambda at: kv_len[at], reverse=True), []
    while waiting:
        count = max(context_len // kv_len[waiting[0]], 1)
        batches.append(sorted(waiting[:count]))
        del waiting[:count]
    return batches


def _options(kind: LayerKind) -> dict[str, float]:
    return {"sm_scale": kind.sm_scale, "logits_soft_cap": kind.logits_soft_cap}
