"""What one layer of a TCA generation keeps of its rows, and how it attends."""

from __future__ import annotations

import itertools
from types import ModuleType

import torch

from mac_kernels import HeadLayout, InputError, PagedKV, tca
from mac_kernels.paged import SUPPORTED_DTYPES
from mac_kernels.tca import EvictedKV, FarSet, Selection, TcaBudgets, TcaConfig
from mac_kernels.tca.candidates import decode_keep, far_capacity
from mac_kernels.tca.select import empty_far_set

from .step import Step


class FarState:
    """The far tokens of every row in one layer, and the length up to which they were followed.

    Parameters
    ----------
    config : TcaConfig
    choice : tuple of int
        Candidate of every kv head.
    sm_scale, logits_soft_cap : float
        Scale of the layer's logits, and their soft cap (0: none).
    """

    def __init__(self, config: TcaConfig, choice: tuple[int, ...], *, sm_scale: float, logits_soft_cap: float) -> None:
        self._config, self._choice = config, choice
        self._scales = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap}
        self._far: FarSet | None = None
        self._kv_len: list[int] = []
        self._steps = 0  # decoded since the selection

    def forget(self) -> None:
        """Select anew at the next token."""
        self._far, self._kv_len = None, []

    def attend(self, query: torch.Tensor, kv: PagedKV, step: Step) -> torch.Tensor:
        """Attend the newest queries [B, Hq, N, D] of every row to ``kv``; returns [B, N, Hq, D].

        One token that follows the last one is decoded; anything else is read as a prompt, whose last token selects. So
        is a token after ``config.refresh`` decoded ones.
        """
        kv_len = (step.length - step.starts).tolist()
        follows = query.shape[2] == 1 and self._kv_len == [length - 1 for length in kv_len]
        if self._far is None or not follows or self._steps == self._config.refresh:
            selection, read = self._read(query, kv, kv_len)
            self._far, self._kv_len, self._steps = selection.far, kv_len, 0
            return read
        self._steps += 1
        self._far, self._kv_len = self._with_room(self._far, max(kv_len)), kv_len
        run, q = _functions(query.device), query[:, :, 0].contiguous()
        keep = torch.tensor([decode_keep(one, self._config.block) for one in self._choice], device=q.device)
        run.compact(q, kv, self._far, keep.int(), config=self._config, **self._scales)
        out: torch.Tensor = run.sparse_decode(q, kv, self._far, **self._scales).out
        return out.to(query.dtype)[:, None]

    def evict(self, query: torch.Tensor, kv: PagedKV, step: Step) -> tuple[torch.Tensor, EvictedKV]:
        """Read a prompt as :meth:`attend` does, and return what is kept of it, too."""
        kv_len = (step.length - step.starts).tolist()
        selection, out = self._read(query, kv, kv_len)
        return out, EvictedKV(kv, kv_len, selection, self._choice, config=self._config)

    def decode_evicted(
        self, query: torch.Tensor, kept: EvictedKV, fresh: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Append new tokens, keys and values [B, Hkv, N, D], one by one and attend each to what is kept."""
        batch, heads, count, dim = query.shape
        outs = []
        for token in range(count):
            q = query[:, :, token].contiguous()
            kept.append(*(part[:, :, token] for part in fresh))
            kept.compact(q, **self._scales)
            kv = kept.paged()
            rows = q.view(-1, kv.layout.num_qo_heads, dim)
            nothing = empty_far_set(len(rows), 1, 0, config=self._config, device=q.device)
            out = _functions(q.device).sparse_decode(rows, kv, nothing, **self._scales).out
            outs.append(out.view(batch, heads, dim).to(query.dtype))
        return torch.stack(outs, 1)

    def _read(self, query: torch.Tensor, kv: PagedKV, kv_len: list[int]) -> tuple[Selection, torch.Tensor]:
        """Select by the last token and attend all of them sparsely."""
        run, count, device = _functions(query.device), query.shape[2], query.device
        selection: Selection = run.select_prompt(
            query[:, :, -1].contiguous(), kv, kv_len, self._choice, config=self._config, **self._scales
        )
        new = [min(count, length) for length in kv_len]  # the others are padding
        rows = [(row, slice(count - tokens, count)) for row, tokens in enumerate(new)]
        q = torch.cat([query[row, :, part].transpose(0, 1) for row, part in rows])
        indptr = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32, device=device)
        state = run.sparse_prefill(q, indptr, kv, selection, config=self._config, **self._scales)
        out = query.new_zeros(len(query), count, *q.shape[1:])
        for (row, part), values in zip(rows, state.out.split(new), strict=True):
            out[row, part] = values.to(out.dtype)
        return selection, out

    def _with_room(self, far: FarSet, length: int) -> FarSet:
        """The far set with room for all that a request of this length can keep."""
        if far.ids.shape[2] >= far_capacity(self._choice, length, self._config):
            return far
        room = far_capacity(self._choice, 2 * length, self._config)
        batch, heads = far.count.shape
        grown = empty_far_set(batch, heads, room, config=self._config, device=far.ids.device)
        grown.ids[:, :, : far.ids.shape[2]] = far.ids
        return FarSet(grown.ids, far.count, far.far_end)


def choices_of_layers(budgets: TcaBudgets, config: TcaConfig, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Candidate of every layer and kv head.

    Raises
    ------
    ConfigError
        If the budgets were calibrated for another config.
    InputError
        If they are for another number of layers.
    """
    choices = budgets.choices(config)
    if len(choices) != num_layers:
        raise InputError(
            f"the TCA budgets of {budgets.key.short_name} are for {len(choices)} layers, the model has {num_layers}; "
            "calibrate it: mac-kernels tca calibrate"
        )
    return choices


def unsupported_reasons(
    layout: HeadLayout, config: TcaConfig, dtype: torch.dtype, device: torch.device
) -> tuple[str, ...]:
    """Return every reason why TCA cannot attend in such a layer on this device; empty if it can."""
    known = ", ".join(str(one).removeprefix("torch.") for one in SUPPORTED_DTYPES)
    reasons = () if dtype in SUPPORTED_DTYPES else (f"{dtype} ({known})",)
    if device.type != "cuda":
        return reasons
    from mac_kernels.tca import fused  # imports triton

    return (*reasons, *fused.unsupported_reasons(layout, config))


def _functions(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from mac_kernels.tca import fused  # imports triton

        return fused
    return tca
