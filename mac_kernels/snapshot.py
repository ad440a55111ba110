"""A ring taken out of its pool, to be put back into another slot later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .errors import SnapshotError
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


def row_fields(
    layout: HeadLayout, window: int, dtype: torch.dtype, correction: bool, sketch_dim: int, indexed: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape [W, ...] and dtype of every row field of one ring in one layer."""
    heads, kv_heads, dim = layout.num_qo_heads, layout.num_kv_heads, layout.head_dim
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "q_pre": ((window, heads, dim), dtype),
        "out": ((window, heads, dim), dtype),
        "lse2": ((window, heads), torch.float32),
        "pos": ((window,), torch.int32),
        "anchor": ((window, kv_heads), torch.int32),
    }
    if correction:
        fields["kbar"] = ((window, heads, dim), dtype)
    if sketch_dim:
        fields["sketch"] = ((window, kv_heads, sketch_dim), torch.int8)
        fields["sketch_scale"] = ((window, kv_heads), torch.float32)
    if indexed:
        fields["seen"] = ((window, heads), torch.int32)
    return fields


def check_fields(
    fields: Mapping[str, torch.Tensor], pool: Mapping[str, torch.Tensor], problems: Sequence[str] = ()
) -> None:
    """Check that tensors [num_layers, W, ...] hold one ring of a pool's fields [num_layers, num_rings, W, ...].

    Raises
    ------
    SnapshotError
        If they do not, or if there are other ``problems``; the message names all.
    """
    layers, needed_layers = (sorted({tensor.shape[0] for tensor in some.values()}) for some in (fields, pool))
    rows = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in fields.items()}
    needed = {name: (tuple(tensor.shape[2:]), tensor.dtype) for name, tensor in pool.items()}
    problems = [
        *problems,
        *(
            f"{what} {have!r}, this pool needs {need!r}"
            for what, have, need in (("layers", layers, needed_layers), ("row fields", rows, needed))
            if have != need
        ),
    ]
    if problems:
        raise SnapshotError("the snapshot has " + "; ".join(problems) + "; start with an empty ring instead")
