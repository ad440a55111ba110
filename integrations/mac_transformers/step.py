"""One forward pass as the cache sees it: where the rows start, and which positions the model gave to them."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from .fallback import Fallback


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of the model.

    ``starts`` [B] int64, the first real token of every row (left padding before it); ``length`` cached tokens, padding
    and the new ones included; ``count`` new tokens; ``seq_len`` the longest position of the batch plus one;
    ``offsets`` [B] int64, position that the model gave to a token minus its place after the padding (``None``: the
    model did not say).
    """

    starts: torch.Tensor
    length: int
    count: int
    seq_len: int
    offsets: torch.Tensor | None

    def moved(self, before: Step) -> list[int]:
        """Rows whose tokens have other positions now than in the step before: what was stored for them is void.

        A row that was nothing but padding has nothing stored. A constant offset does no harm: it turns all queries of
        a row alike.
        """
        moved = self.starts != before.starts
        if self.offsets is not None and before.offsets is not None:
            moved = moved | (self.offsets != before.offsets)
        rows: list[int] = torch.nonzero(moved & (before.starts < before.length)).flatten().tolist()
        return rows


class SeenPass:
    """Tells whether a layer's call belongs to the forward pass that was read last.

    The mask and the positions are held weakly: the mask of a long prompt is large.
    """

    def __init__(self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, length: int, count: int) -> None:
        self._sizes = length, count
        self._tensors = [None if tensor is None else weakref.ref(tensor) for tensor in (mask, position_ids)]

    def covers(self, mask: torch.Tensor | None, position_ids: torch.Tensor | None, length: int, count: int) -> bool:
        """Whether these are the very tensors and sizes."""
        pairs = zip(self._tensors, (mask, position_ids), strict=True)
        alike = all(tensor is None if ref is None else tensor is not None and ref() is tensor for ref, tensor in pairs)
        return alike and self._sizes == (length, count)


def read_step(
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    *,
    batch: int,
    count: int,
    length: int,
    checked: int,
    device: torch.device,
) -> Step | Fallback:
    """Read the mask and the positions of a forward pass, as the attention function gets them.

    Parameters
    ----------
    mask : torch.Tensor or None, [B or 1, 1, count, length] bool
        True where a query may look; ``None``: plain causal.
    position_ids : torch.Tensor or None, [B or 1, count] int64
        Positions of the new tokens.
    batch, count, length : int
        Rows, new tokens and all tokens.
    checked : int
        The newest queries for which causality is verified (those whose states are stored).
    device : torch.device
        Of the queries.
    """
    starts = _row_starts(mask, batch=batch, length=length, count=count, checked=checked, device=device)
    if starts is None:
        return Fallback("attention mask", "the mask is not causal with padding on the left; pad on the left")
    if position_ids is None:
        return Step(starts, length, count, length, None)
    offsets = _offsets(position_ids, starts, length=length, count=min(count, checked))
    if offsets is None:
        return Fallback("position ids", "positions must be one number per token, rising by one; leave position_ids out")
    return Step(starts, length, count, int(position_ids.max()) + 1, offsets)


def _offsets(position_ids: torch.Tensor, starts: torch.Tensor, *, length: int, count: int) -> torch.Tensor | None:
    """Position minus place after the padding, [B] int64; ``None`` if it is not one number for the newest tokens."""
    if position_ids.dim() != 2:
        return None
    token = torch.arange(length - count, length, device=starts.device)
    offsets = position_ids[:, -count:].to(starts.device) - (token - starts[:, None])
    padding = token < starts[:, None]
    return offsets[:, -1] if bool(((offsets == offsets[:, -1:]) | padding).all()) else None


def _row_starts(
    mask: torch.Tensor | None, *, batch: int, count: int, length: int, checked: int, device: torch.device
) -> torch.Tensor | None:
    """First visible token of every row, [B] int64; ``None`` if the mask is not causal with padding on the left."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if mask.dtype != torch.bool or mask.shape[1:] != (1, count, length):
        return None
    visible = mask[:, 0, -min(count, checked) :]  # [B or 1, N, L]
    starts = length - visible[:, -1].sum(-1)
    token = torch.arange(length, device=mask.device)
    query = token[length - visible.shape[1] :]
    expected = (token >= starts[:, None, None]) & (token <= query[:, None])
    padding = (query < starts[:, None])[..., None]
    if not bool(((visible == expected) | padding).all()):
        return None
    return starts.expand(batch).to(device)
