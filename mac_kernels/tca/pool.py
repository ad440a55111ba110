"""Far sets of many requests at fixed addresses, for a server whose batches change from step to step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError
from ..slots import EMPTY, SlotTable
from .candidates import far_capacity
from .config import TcaConfig
from .select import FarSet, empty_far_set

_ITEM = 4  # bytes of a position


class FarPool:
    """A fixed number of far sets of every layer, and which request slot holds which of them.

    Parameters
    ----------
    num_sets, num_slots : int
        Far sets in the pool, each ``>= 1`` request's in all layers, and request slots.
    choices : sequence of sequence of int
        Candidate of every layer and kv head (of this rank).
    max_len : int, tokens
        The longest request; a set has room for all that it can keep.
    config : TcaConfig
    device : torch.device or str, default "cpu"

    Raises
    ------
    ConfigError
        If there is no set.

    Notes
    -----
    The contents of all tensors may change between replays of a CUDA graph; their addresses never do.
    """

    def __init__(
        self,
        *,
        num_sets: int,
        num_slots: int,
        choices: Sequence[Sequence[int]],
        max_len: int,
        config: TcaConfig,
        device: torch.device | str = "cpu",
    ) -> None:
        if num_sets < 1:
            raise ConfigError(f"num_sets={num_sets} must be >= 1; choose a larger value")
        self.num_sets, self.num_layers, self.num_kv_heads = num_sets, len(choices), len(choices[0])
        self.device, self.slots = torch.device(device), SlotTable(num_slots, num_sets, torch.device(device))
        self.count, self.far_end = torch.zeros(
            2, self.num_layers, num_sets, self.num_kv_heads, dtype=torch.int32, device=device
        )
        self._ids = [
            empty_far_set(
                num_sets, self.num_kv_heads, far_capacity(choice, max_len, config), config=config, device=self.device
            ).ids
            for choice in choices
        ]

    @staticmethod
    def bytes_per_set(choices: Sequence[Sequence[int]], max_len: int, config: TcaConfig) -> int:
        """Bytes that one request's far sets take over all layers; a budget divided by this is the number of sets."""
        return sum(_ITEM * len(choice) * (far_capacity(choice, max_len, config) + 2) for choice in choices)

    @property
    def nbytes(self) -> int:
        """Bytes of all sets (without the slot table)."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._ids, self.count, self.far_end))

    def acquire(self, slot: int) -> int:
        """Give the slot empty sets (its own, emptied, if it has some) and return their place; -1 if none is free."""
        place = self.slots.acquire(slot)
        if place != EMPTY:
            self.count[:, place].zero_()
            self.far_end[:, place].zero_()
        return place

    def release(self, slot: int) -> None:
        """Take the slot's sets back; does nothing if it holds none."""
        self.slots.release(slot)

    def reset(self) -> None:
        """Take all sets back."""
        self.slots.reset()

    def sets_of(self, slots: torch.Tensor) -> torch.Tensor:
        """Sets of a batch of slots [B], [B] int32 on the device; -1 where a slot has none."""
        return self.slots.table[slots.long()]

    def far(self, layer: int, sets: torch.Tensor) -> FarSet:
        """The far sets of a batch in one layer, where they lie; ``sets`` [B] int32 from :meth:`sets_of`."""
        return FarSet(self._ids[layer], self.count[layer], self.far_end[layer], sets)

    def store(self, layer: int, sets: torch.Tensor, found: FarSet) -> None:
        """Replace the sets [B] int32, none of them -1, of one layer by what was selected for a batch."""
        own, ids = sets.long(), self._ids[layer]
        width = min(found.ids.shape[2], ids.shape[2])
        ids[:, :, :width].index_copy_(0, own, found.ids[:, :, :width])
        self.count[layer].index_copy_(0, own, found.count)
        self.far_end[layer].index_copy_(0, own, found.far_end)

    def skipped(self, sets: torch.Tensor) -> torch.Tensor:
        """Tokens of one kv head that a decode step of a batch does not read, over all layers and heads, one int64."""
        own, known = sets.clamp(min=0).long(), (sets >= 0)[None, :, None]
        spared = (self.far_end.index_select(1, own) - self.count.index_select(1, own)) * known
        total: torch.Tensor = spared.sum(dtype=torch.int64)
        return total
