"""A model of FlashInfer's decode call in plain torch, tile by tile as its FA2 kernel works, for machines without a GPU.

It reads the same device tensors as the kernel: tile lists, begins, bounds and starts. What it shares with the tested
code is the layout of the plan alone.
"""

from __future__ import annotations

from typing import Any

import torch

from mac_kernels.attend.flashinfer import Ranges, Scores
from mac_kernels.attend.flashinfer_replan import PlanBuffers
from mac_kernels.complete.reference import merge_state
from mac_kernels.types import LOG2_E, AttnState, HeadLayout

TILES, PROGRAMS = 24, 24


def plan_info(batch: int, tiles: int = TILES) -> list[int]:
    """What FlashInfer's planner returns: buffers one after the other, 16-byte aligned but for the chunk size."""
    end = 0

    def place(size: int, alignment: int = 16) -> int:
        nonlocal end
        begin = -(-end // alignment) * alignment
        end = begin + size
        return begin

    request, qo_tile, kv_tile = (place(4 * tiles) for _ in range(3))
    o_indptr, chunk, rows = place(4 * batch + 4), place(4, 1), place(4)
    merge, valid = place(4 * batch + 4), place(tiles)
    return [tiles, batch, rows, 16, request, qo_tile, kv_tile, merge, o_indptr, chunk, 0, 4096, valid, 1, 1]


class ModelAttention:
    """Stands in for :class:`mac_kernels.attend.flashinfer.RangeAttention`."""

    def __init__(
        self,
        batch_size: int,
        layout: HeadLayout,
        *,
        indices: torch.Tensor,
        max_kv_len: int,
        page_size: int,
        kv_layout: str,
        q_dtype: torch.dtype,
        kv_dtype: torch.dtype,
        split: bool = True,
    ) -> None:
        assert indices.dtype == torch.int32 and indices.dim() == 1
        self._layout, self._indices, self._page, self._kv_layout = layout, indices, page_size, kv_layout
        self.programs = PROGRAMS
        self.begin = torch.arange(batch_size + 1, dtype=torch.int32) * -(-max_kv_len // page_size)
        self.begin[-1] = indices.numel()
        ints = [torch.full((n,), -7, dtype=torch.int32) for n in (TILES, TILES, TILES, batch_size + 1, batch_size + 1)]
        request, qo_tile, kv_tile, o_indptr, merge = ints
        self._plan = PlanBuffers(
            request=request,
            qo_tile=qo_tile,
            kv_tile=kv_tile,
            valid=torch.full((TILES,), 7, dtype=torch.uint8),
            o_indptr=o_indptr,
            merge_indptr=merge,
            chunk=torch.full((1,), -7, dtype=torch.int32),
        )
        self.plan_buffers = self._plan if split else None
        if not split:  # one chunk per request
            self._plan.chunk.fill_(max_kv_len)
            self._plan.o_indptr.copy_(torch.arange(batch_size + 1))
            self._plan.merge_indptr.copy_(torch.arange(batch_size + 1))
            self._plan.request[:batch_size] = torch.arange(batch_size, dtype=torch.int32)
            self._plan.kv_tile.zero_()
            self._plan.qo_tile.zero_()
            self._plan.valid.copy_(torch.arange(TILES) < batch_size)

    def run(
        self,
        q: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        ranges: Ranges,
        scores: Scores,
        *,
        out: torch.Tensor,
        lse2: torch.Tensor,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
    ) -> None:
        """Fill partial states tile by tile, then merge those that the plan assigns to each request."""
        plan, heads = self._plan, range(self._layout.num_kv_heads)
        partial: dict[tuple[int, int], AttnState] = {}
        for tile in plan.valid.bool().nonzero().flatten().tolist():
            request, number = int(plan.request[tile]), int(plan.kv_tile[tile])
            assert int(plan.qo_tile[tile]) == 0
            for head in heads:
                at = (int(plan.o_indptr[request]) + number, head)
                assert at not in partial, "two tiles write one partial state"
                partial[at] = self._tile(q * k_scale, keys_values, ranges, scores, request, head, number)
        group, dim = self._layout.group_size, self._layout.head_dim
        for request in range(q.shape[0]):
            first, stop = plan.merge_indptr[request : request + 2].tolist()
            for head in heads:
                state = AttnState(torch.zeros(group, dim), torch.full((group,), -torch.inf))
                for number in range(first, stop):
                    state = merge_state(state, partial.pop((number, head)))
                rows = slice(head * group, head * group + group)
                out[request, rows] = (state.out * v_scale).to(out.dtype)
                lse2[request, rows] = state.lse2
        assert not partial, "a tile was computed for nobody"

    def _tile(
        self,
        q: torch.Tensor,
        keys_values: tuple[torch.Tensor, torch.Tensor],
        ranges: Ranges,
        scores: Scores,
        request: int,
        head: int,
        number: int,
    ) -> AttnState:
        group = self._layout.group_size
        row = request * self._layout.num_kv_heads + head
        low, high = ranges.bounds.flatten()[row * ranges.bounds_pitch :][:2].tolist()
        starts = ranges.starts.flatten()[row * ranges.starts_pitch :][:group]
        low, high = (low, high) if high > low else (0, 0)
        chunk = int(self._plan.chunk)
        position = torch.arange(min(low + number * chunk, high), min(low + (number + 1) * chunk, high))
        if not len(position):
            return AttnState(torch.zeros(group, q.shape[-1]), torch.full((group,), -torch.inf))
        page = self._indices[int(self.begin[request]) + position // self._page].long()
        slot = position % self._page
        k, v = (
            (cache[page, slot, head] if self._kv_layout == "NHD" else cache[page, head, slot]).float()
            for cache in keys_values
        )
        score = q[request, head * group : (head + 1) * group].float() @ k.T * scores.sm_scale
        if (cap := scores.logits_soft_cap) > 0:
            score = cap * torch.tanh(score / cap)
        score = torch.where(position >= starts[:, None], score * LOG2_E, -torch.inf)
        top = score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weight = torch.exp2(score - top)
        total = weight.sum(-1)
        lse2 = total.log2() + top[:, 0]
        return AttnState(weight @ v / total.clamp(min=1e-30)[:, None], lse2)
