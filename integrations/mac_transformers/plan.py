"""A decode plan that lives as long as the buffers it was made for."""

from __future__ import annotations

import torch

from mac_kernels import BatchMacDecodeWithPagedKVCacheWrapper, MacConfig, PageTable, RingPool, Rope, StepTrace

from .info import LayerInfo
from .step import Step


class DecodePlan:
    """Decodes the layers that share capacity, rotation, scale and soft-cap.

    The page table keeps its addresses and is filled anew in every step, so planning (which on a GPU allocates a
    workspace and tabulates the rotation) happens only when batch, buffers or frequencies change.

    Parameters
    ----------
    step : Step
        The step under way.
    capacity : int, tokens
        Room in the buffers, the upper bound of the context.
    info : LayerInfo
        Of any of the layers.
    config : MacConfig
    rope : Rope
        The rotation with the frequencies in effect.
    table : PageTable
        Of the step, pages of one token.
    """

    def __init__(
        self, step: Step, capacity: int, info: LayerInfo, *, config: MacConfig, rope: Rope, table: PageTable
    ) -> None:
        batch = len(step.starts)
        self._step, self._made_for = step, (batch, capacity, rope)
        with torch.inference_mode(False):  # or a later step outside of inference mode could not write here
            indices = table.indices.new_zeros(batch * capacity)
            self._table = PageTable(table.indptr.clone(), indices, table.last_page_len.clone(), 1)
            slots = torch.arange(batch, device=indices.device)
            self._owners = {"slots": slots, "generations": torch.zeros_like(slots)}
            self._copy(table)
            self._mac = BatchMacDecodeWithPagedKVCacheWrapper("HND")
            self._mac.plan(
                self._table.indptr,
                self._table.indices,
                self._table.last_page_len,
                layout=info.layout,
                page_size=1,
                rope=rope,
                config=config,
                sm_scale=info.sm_scale,
                logits_soft_cap=info.logits_soft_cap,
                max_kv_len=capacity,
            )

    def fits(self, batch: int, capacity: int, rope: Rope) -> bool:
        """Whether the plan was made for this batch size, these buffers and this rotation."""
        return self._made_for == (batch, capacity, rope)

    def follow(self, step: Step, table: PageTable) -> None:
        """Take over the page table of another step."""
        self._step = step
        self._copy(table)

    def is_at(self, step: Step) -> bool:
        """Whether the page table is that of the step."""
        return self._step is step

    def run(
        self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], rings: RingPool, layer: int
    ) -> torch.Tensor:
        """Decode queries [B, Hq, D] of one layer; row ``i`` owns slot ``i`` of the rings."""
        return self._mac.run(query.contiguous(), pages, rings=rings, layer=layer, **self._owners)

    def run_return_trace(
        self, query: torch.Tensor, pages: tuple[torch.Tensor, torch.Tensor], rings: RingPool, layer: int
    ) -> tuple[torch.Tensor, StepTrace]:
        """:meth:`run`, and what was decided."""
        return self._mac.run_return_trace(query.contiguous(), pages, rings=rings, layer=layer, **self._owners)

    def _copy(self, table: PageTable) -> None:
        self._table.indptr.copy_(table.indptr)
        self._table.indices[: table.indices.numel()].copy_(table.indices)
        self._table.last_page_len.copy_(table.last_page_len)
