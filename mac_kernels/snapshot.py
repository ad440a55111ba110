"""A ring taken out of its pool, to be put back into another slot later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .types import HeadLayout

SNAPSHOT_VERSION = 1


@dataclass(frozen=True, slots=True)
class RingSnapshot:
    """A copy of one ring over all layers, independent of the pool and of KV slots.

    ``fields`` maps a row field to its tensor [num_layers, W, ...]; positions at or beyond ``up_to`` are empty.
    """

    version: int
    layout: HeadLayout
    window: int
    fields: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(t.numel() * t.element_size() for t in self.fields.values())

    def to(self, device: torch.device | str) -> RingSnapshot:
        """Return the snapshot on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.fields.items()}
        return RingSnapshot(self.version, self.layout, self.window, moved)
