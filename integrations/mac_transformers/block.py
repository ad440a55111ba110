"""Rows of a comparison whose MAC policies share one call of the decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, MacConfig, PagedKV, PageTable, RingPool, Rope, StepTrace
from mac_kernels.decode import stacked_trace
from mac_kernels.step import reference_step
from mac_kernels.tca import refresh_index

from .policies import Mac


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows; ring ``i`` belongs to the i-th of them.

    ``names``: the policy of every row; ``traces``: by layer, what the reference decided in the last pass; ``kernels``:
    by layer, the wrappers that serve the rows where the GPU's kernels run the policy (filled as layers are met);
    ``None``: the reference does. ``steps``: by layer, those decoded since tokens were selected for misses.
    """

    rows: slice
    names: tuple[str, ...]
    policy: Mac
    config: MacConfig
    rings: RingPool
    table: PageTable
    slots: torch.Tensor
    generations: torch.Tensor
    traces: dict[int, StepTrace]
    kernels: dict[int, BatchMacDecodeWithPagedKVCacheWrapper] | None
    steps: dict[int, int]

    def step(self, q: torch.Tensor, out: torch.Tensor, kv: PagedKV, *, layer: int, rope: Rope, sm_scale: float) -> None:
        """One layer's step of the rows: ``q`` and ``out`` [rows, Hq, D], the latter written."""
        if self.rings.index is not None:
            anew = self.steps[layer] == self.rings.index.refresh
            if anew:
                self._select(q, kv, layer, self.slots, sm_scale)
            self.steps[layer] = 0 if anew else self.steps[layer] + 1
        if self.kernels is None:
            result, self.traces[layer] = reference_step(
                q,
                kv,
                self.rings,
                layer=layer,
                slots=self.slots,
                generations=self.generations,
                config=self.config,
                rope=rope,
                sm_scale=sm_scale,
                find=self.policy.find,
            )
            out.copy_(result)
            return
        if layer not in self.kernels:
            self.kernels[layer] = self._planned(kv, rope, sm_scale)
        self.kernels[layer].run(
            q,
            (kv.k_cache, kv.v_cache),
            rings=self.rings,
            layer=layer,
            slots=self.slots,
            generations=self.generations,
            out=out,
        )

    def trace(self) -> StepTrace:
        """What the last pass decided, the layers in front of every tensor."""
        if self.kernels is not None:
            return stacked_trace([self.kernels[layer] for layer in sorted(self.kernels)])
        return StepTrace(*map(torch.stack, zip(*(self.traces[layer] for layer in sorted(self.traces)), strict=True)))

    def read_to_select(self) -> torch.Tensor | float:
        """Share of the KV cache that each layer read in the last pass to select tokens for misses, [layers, 1]."""
        if self.rings.index is None:
            return 0.0
        anew = [not self.steps[layer] for layer in range(self.rings.num_layers)]
        return 0.5 * torch.tensor(anew, device=self.slots.device)[:, None]  # all keys are half of the cache

    def select_prompt(
        self, q: torch.Tensor, kv: PagedKV, *, layer: int, text: int, texts: int, sm_scale: float
    ) -> None:
        """Select for the misses of all rows of one text by its last query [1, Hq, D]."""
        index = self.rings.index
        if index is None:
            return
        self._select(q, kv, layer, self.slots[text : text + 1], sm_scale)
        self.steps[layer] = 0
        for values in index.tensors:
            values[layer, text::texts] = values[layer, text].clone()

    def fills_like(self, other: Block) -> bool:
        """Whether a prompt leaves the same rows in the rings of both."""
        return self._filling() == other._filling()

    def copy_rings(self, other: Block, layer: int, text: int, texts: int) -> None:
        """Give the rings of all rows of one text what the first of them holds in another block (or in this one)."""
        for name, values in self.rings.fields.items():
            values[layer, text::texts] = other.rings.fields[name][layer, text].clone()

    def _filling(self) -> tuple[object, ...]:
        config, policy = self.policy.config, self.policy
        spans = config.window, config.band, config.sinks, config.correction
        plain = self.kernels is None, self.rings.index is None
        return spans, policy.row_dtype, policy.pool, self.rings.sketch_dim, plain

    def _select(self, q: torch.Tensor, kv: PagedKV, layer: int, slots: torch.Tensor, sm_scale: float) -> None:
        refresh_index(
            q,
            kv,
            kv.table.kv_len().tolist(),
            rings=self.rings,
            layer=layer,
            slots=slots,
            generations=torch.zeros_like(slots),
            sm_scale=sm_scale,
        )

    def _planned(self, kv: PagedKV, rope: Rope, sm_scale: float) -> BatchMacDecodeWithPagedKVCacheWrapper:
        wrapper, table = BatchMacDecodeWithPagedKVCacheWrapper("HND"), self.table
        wrapper.plan(
            table.indptr,
            table.indices,
            table.last_page_len,
            layout=kv.layout,
            page_size=table.page_size,
            rope=rope,
            config=self.policy.config,
            sm_scale=sm_scale,
            max_kv_len=table.page_size,
            kv_data_type=kv.k_cache.dtype,
        )
        return wrapper


@dataclass(frozen=True, slots=True)
class Seen:
    """One step of the rows of one block through all layers, for those who look on.

    ``policies`` by row; by layer, ``q`` and ``out`` [rows, Hq, D] and ``k``, ``v`` [rows, Hkv, L, D]; ``trace`` has the
    layers in front; ring ``i`` of ``rings`` is that of the i-th row. Copy what has to outlast the step: where steps are
    replayed as a CUDA graph, the next one writes to the same tensors.
    """

    step: int
    position: int
    policies: tuple[str, ...]
    q: Sequence[torch.Tensor]
    out: Sequence[torch.Tensor]
    trace: StepTrace
    rings: RingPool
    k: Sequence[torch.Tensor]
    v: Sequence[torch.Tensor]
    sm_scale: float
