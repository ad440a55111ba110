"""Which request slot holds which of a fixed number of places, on the host and in a table on the device."""

from __future__ import annotations

import torch

from .errors import InputError, require_contiguous

EMPTY = -1
"""In place of a place: none."""


class SlotTable:
    """Gives places ``0 .. count - 1`` to slots and takes them back.

    Parameters
    ----------
    num_slots, count : int
        Request slots, and the places that they share.
    device : torch.device
        Of ``table``.

    Notes
    -----
    ``table`` [num_slots] int32, the slot's place or -1, may change between replays of a CUDA graph; its address never
    does.
    """

    def __init__(self, num_slots: int, count: int, device: torch.device) -> None:
        self.num_slots, self.count = num_slots, count
        self.table = torch.full((num_slots,), EMPTY, dtype=torch.int32, device=device)
        self._place_of: dict[int, int] = {}
        self._free = list(reversed(range(count)))

    @property
    def free(self) -> int:
        """Places that no slot holds."""
        return len(self._free)

    def place_of(self, slot: int) -> int:
        """Place of the slot; -1 if it holds none.

        Raises
        ------
        InputError
            If the slot is out of range; so do the methods below.
        """
        if not 0 <= slot < self.num_slots:
            raise InputError(f"slot {slot} is out of range [0, {self.num_slots - 1}]; build a pool of more num_slots")
        return self._place_of.get(slot, EMPTY)

    def acquire(self, slot: int) -> int:
        """Give the slot a place, its own if it has one, and return it; -1 if none is free."""
        place = self.place_of(slot)
        if place == EMPTY and self._free:
            place = self._place_of[slot] = self._free.pop()
            self.table[slot].fill_(place)  # an item assignment would wait for the device
        return place

    def release(self, slot: int) -> None:
        """Take the slot's place back; does nothing if it holds none."""
        place = self.place_of(slot)
        if place != EMPTY:
            del self._place_of[slot]
            self.table[slot].fill_(EMPTY)
            self._free.append(place)

    def reset(self) -> None:
        """Take all places back."""
        self.table.fill_(EMPTY)
        self._place_of.clear()
        self._free = list(reversed(range(self.count)))


def check_slots(slots: torch.Tensor, generations: torch.Tensor, batch_size: int) -> None:
    """Check what names the rings of a batch.

    Raises
    ------
    InputError
        If either is not [B] int32 or int64, or not contiguous.
    """
    for name, tensor in (("slots", slots), ("generations", generations)):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"{name} must be [{batch_size}] int32 or int64, got {tensor!r}; pass a tensor")
        if tensor.shape != (batch_size,) or tensor.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"{name} must be [{batch_size}] int32 or int64, got {list(tensor.shape)} {tensor.dtype}; one each"
            )
        require_contiguous(name, tensor)
