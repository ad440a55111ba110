"""MAC with TCA: which far tokens a missed kv group reads, ring by ring and layer by layer.

A miss reads the selected tokens and a dense window instead of the whole context; a hit does what it always did. The
ring's state then covers the tokens that were read, which is all that a merge needs: the sets must be disjoint, not
complete. What was not selected is not seen, neither by the miss nor by the hits that descend from it. Therefore nothing
is evicted, every selection is used for a limited time only, and each one is judged by how much the selection before it
would have dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..types import Reason
from .candidates import far_capacity
from .config import TcaConfig
from .reference import kept_mask
from .select import FarSet

NEVER = -(2**30)
"""Anchor of a ring row that no age limit lets pass."""


class MissIndex:
    """Far sets of all rings and layers, when they were selected and what they drop.

    Parameters
    ----------
    choices : sequence of sequence of int
        Candidate of every layer and kv head (:meth:`mac_kernels.tca.TcaBudgets.choices`).
    config : TcaConfig
        In the mode ``"index"``, with a ``refresh``.
    num_rings : int
        Rings of the pool that it belongs to.
    max_context : int, tokens
        Upper bound of the context.
    device : torch.device or str, default "cpu"

    Notes
    -----
    ``ids`` [layers, rings, Hkv, C] int32, ``count`` and ``far_end`` [layers, rings, Hkv] int32 are far sets
    (:class:`mac_kernels.tca.FarSet`); ``selected``, of the same shape, is the position of the query that selected, -1
    without one; ``dropped`` fp32 is the share of its attention that this query gave to tokens which the selection
    before left out (without one, its own selection). Addresses never change.
    """

    def __init__(
        self,
        choices: Sequence[Sequence[int]],
        *,
        config: TcaConfig,
        num_rings: int,
        max_context: int,
        device: torch.device | str = "cpu",
    ) -> None:
        if config.refresh is None or config.mode != "index":
            raise InputError(
                f"a miss needs tca.mode='index' and a tca.refresh, got {config.mode!r} and {config.refresh}; set them"
            )
        if len({len(choice) for choice in choices}) != 1:
            raise InputError("choices must name one candidate per kv head for every layer; take TcaBudgets.choices()")
        self.choices, self.config, self.max_context = [list(choice) for choice in choices], config, max_context
        self.refresh, self.limit = config.refresh, 1 - config.mass_target
        shape = len(choices), num_rings, len(choices[0])
        capacity = max(far_capacity(choice, max_context, config) for choice in self.choices)
        self.ids = torch.zeros(*shape, capacity, dtype=torch.int32, device=device)
        self.count, self.far_end = (torch.zeros(shape, dtype=torch.int32, device=device) for _ in range(2))
        self.selected = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.dropped = torch.zeros(shape, device=device)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """``ids``, ``count``, ``far_end``, ``selected`` and ``dropped``: layers, then rings, come first in all."""
        return self.ids, self.count, self.far_end, self.selected, self.dropped

    @property
    def nbytes(self) -> int:
        """Bytes of all far sets."""
        return sum(part.nbytes for part in self.tensors)

    def check_fits(self, num_layers: int, num_rings: int, num_kv_heads: int, device: torch.device) -> None:
        """Check that it belongs to a pool of this shape: kernels find a group's place by its ring, unasked.

        Raises
        ------
        InputError
            If it does not, or lies on another device.
        """
        have, need = tuple(self.selected.shape), (num_layers, num_rings, num_kv_heads)
        if have != need or self.selected.device != device:
            raise InputError(
                f"the index is for (layers, rings, kv heads) = {have} on {self.selected.device}, the pool has {need} "
                f"on {device}; build both alike"
            )

    def forget(self, ring: int) -> None:
        """Drop what was selected for a ring: its misses are exact until it is selected for again."""
        self.selected[:, ring].fill_(-1)

    def cut(self, rings: torch.Tensor, lengths: torch.Tensor) -> None:
        """Drop what was selected for ``rings`` [N] by queries at positions from ``lengths`` [N] on."""
        selected = self.selected[:, rings]
        self.selected[:, rings] = torch.where(selected < lengths[:, None], selected, -1)

    def take(self, other: MissIndex, rings: torch.Tensor, into: torch.Tensor) -> None:
        """Copy what was selected for ``rings`` [N] of another index of the same choices to the rings ``into`` [N]."""
        for own, theirs in zip(self.tensors, other.tensors, strict=True):
            own[:, into] = theirs[:, rings]

    def usable(self, layer: int, rings: torch.Tensor, reason: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Which kv groups may read their far set only, [B, Hkv] bool.

        Those that missed in a context long enough to match, and whose selection is young and dropped little.
        """
        at = layer, rings.clamp(min=0)
        selected, now = self.selected[at], position[:, None]
        young = (selected >= 0) & (selected <= now) & (now - selected <= self.refresh)
        # a request without a ring never gets beyond the first of these reasons
        missed = (reason != Reason.HIT) & (reason != Reason.NO_RING) & (reason != Reason.SHORT_CONTEXT)
        return missed & young & (self.count[at] > 0) & (self.dropped[at] <= self.limit)

    def far(self, layer: int, rings: torch.Tensor) -> FarSet:
        """A copy of the far sets of ``rings`` [B] (-1: none); empty where nothing is selected."""
        at = layer, rings.clamp(min=0)
        known = (self.selected[at] >= 0) & (rings >= 0)[:, None]
        return FarSet(self.ids[at], self.count[at] * known, self.far_end[at] * known)

    def kept(self, layer: int, rings: torch.Tensor, sparse: torch.Tensor, kv_len: torch.Tensor) -> torch.Tensor:
        """Positions that every kv group may read, [B, Hkv, L] bool: all, or those of its far set and window."""
        return kept_mask(self.far(layer, rings), kv_len, int(kv_len.max())) | ~sparse[..., None]

    def store(
        self, layer: int, rings: torch.Tensor, far: FarSet, position: torch.Tensor, dropped: torch.Tensor
    ) -> None:
        """Replace the far sets of ``rings`` [B] by those that the queries at ``position`` [B] selected."""
        at, width = (layer, rings), min(far.ids.shape[2], self.ids.shape[3])
        self.ids[layer, :, :, :width].index_copy_(0, rings.long(), far.ids[:, :, :width])
        self.count[at], self.far_end[at] = far.count, far.far_end
        self.selected[at] = position[:, None].int().expand_as(far.count)
        self.dropped[at] = dropped


def dropped_mass(s: torch.Tensor, far: FarSet, *, sinks: int) -> torch.Tensor:
    """Attention on the tokens that far sets leave out, [B, Hkv].

    ``s`` [B, Hkv, N] is the importance of the tokens from the sinks on; where a set is empty nothing is left out.
    """
    if not s.shape[2]:
        return torch.zeros(s.shape[:2], device=s.device)
    token = torch.arange(s.shape[2], device=s.device)
    region = torch.where(token < far.far_end[..., None] - sinks, s, 0.0).sum(-1)
    entry = torch.arange(far.ids.shape[2], device=s.device)
    listed = (entry >= sinks) & (entry < far.count[..., None])
    place = torch.where(listed, far.ids - sinks, 0).clamp(max=s.shape[2] - 1).long()
    kept = torch.where(listed, s.gather(2, place), 0.0).sum(-1)
    return torch.where(far.count > 0, (region - kept).clamp(min=0), 0.0)
